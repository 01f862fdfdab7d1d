"""Pins of a cache: what each tier keeps for them, and for whom."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvlab.cache import DistributedKVCache
from kvlab.cache.pins import MAX_LEASE_S
from kvlab.engine.tiers import TieredCache
from kvlab.errors import ConfigError, InputError
from kvlab.stores import FileStore, MemoryStore, RedisStore, Store, WriteBehind
from kvlab.testbed.server import RedisServer
from tests.contracts.test_cache import tokens_of
from tests.faults.kit import wait_for
from tests.harness.helpers import FakeClock, exact_kv, small_spec

SPEC = small_spec()
B = 16
BLOCK_BYTES = SPEC.layers * 2 * SPEC.heads * B * SPEC.head_dim * 4


def cache_over(store: Store, **settings: Any) -> DistributedKVCache:
    given = {"precision": "fp32", "compress": False, "block_tokens": B, "describe": False, **settings}
    return DistributedKVCache(store=store, model=SPEC, **given)


def tiers_over(store: Store, blocks: int = 8, salt: str = "", **settings: Any) -> TieredCache:
    return TieredCache(cache_over(store, salt=salt), blocks * BLOCK_BYTES, planner=False, **settings)


def save(cache: Any, blocks: int, seed: int = 0, **options: Any) -> list[int]:
    tokens = tokens_of(blocks * B, seed)
    assert cache.save(tokens, exact_kv(SPEC, blocks * B), **options) == blocks
    return tokens


def fill(cache: Any, requests: int, first: int = 100) -> None:
    for seed in range(first, first + requests):
        cache.save(tokens_of(2 * B, seed), exact_kv(SPEC, 2 * B))


# --- one tier -----------------------------------------------------------------------------------
def test_a_store_that_cannot_hold_refreshes_and_says_so() -> None:
    clock = FakeClock()
    with cache_over(MemoryStore(ttl_s=10, clock=clock)) as cache:
        tokens = save(cache, 3)
        before = time.time()
        pin = cache.pin([*tokens, 1, 2], 60)
        assert (pin.wanted, pin.held, pin.refreshed) == (3, {}, {"store": 3})
        assert before + 60 <= pin.expires_at <= time.time() + 60
        clock.now += 59
        assert cache.match(tokens) == 3 * B
        pin.renew(5)  # the TTL of 1 s that is left becomes 5 s
        clock.now += 4
        assert cache.match(tokens) == 3 * B
        clock.now += 2
        assert cache.match(tokens) == 0
        assert cache.stats().pinned == Counter(refreshed=6)


def test_only_the_prefix_that_is_there_is_kept(tmp_path: Path) -> None:
    with cache_over(FileStore(tmp_path / "store")) as cache:
        tokens = save(cache, 4)
        cache.store.delete_many([cache.namespace.keys(tokens)[2]])
        pin = cache.pin(tokens, 60)
        assert (pin.wanted, pin.held, pin.refreshed) == (4, {"store": 2}, {})
        cache.save(tokens, exact_kv(SPEC, 4 * B))
        pin.renew(60)  # takes what has come since
        assert pin.held == {"store": 4}
        assert cache.pin(tokens[: B - 1], 60).wanted == 0 and cache.pin([], 60).held == {}


def test_a_context_manager_releases_and_a_release_may_come_twice(tmp_path: Path) -> None:
    with cache_over(FileStore(tmp_path / "store")) as cache:
        tokens = save(cache, 2)
        leases = tmp_path / "store" / ".held"
        with cache.pin(tokens, 60) as pin:
            assert len([*leases.iterdir()]) == 1
        pin.release()
        assert [*leases.iterdir()] == [] and (pin.held, pin.expires_at) == ({}, 0.0)


@pytest.mark.parametrize("lease_s", [0, -1, MAX_LEASE_S + 1, float("nan"), float("inf"), "60", None, True])
def test_a_lease_is_bounded(lease_s: Any) -> None:
    with cache_over(MemoryStore(ttl_s=10)) as cache, tiers_over(MemoryStore()) as tiers:
        tokens = save(cache, 1)
        for each in (cache, tiers):
            with pytest.raises(ConfigError, match=r"lease_s .* at most 3600.0 seconds"):
                each.pin(tokens, lease_s)
        pin = cache.pin(tokens, MAX_LEASE_S)
        with pytest.raises(ConfigError, match="lease_s"):
            pin.renew(lease_s)
        assert pin.refreshed == {"store": 1}  # as before


def test_the_longest_lease_is_a_setting() -> None:
    with cache_over(MemoryStore(ttl_s=10), max_lease_s=5) as cache:
        tokens = save(cache, 1)
        assert cache.pin(tokens, 5).refreshed == {"store": 1}
        with pytest.raises(ConfigError, match="at most 5 seconds"):
            cache.pin(tokens, 6)
    with pytest.raises(ConfigError, match="max_lease_s"):
        cache_over(MemoryStore(), max_lease_s=0)


def test_what_are_no_tokens_is_an_error() -> None:
    with cache_over(MemoryStore()) as cache, tiers_over(MemoryStore()) as tiers:
        for each in (cache, tiers):
            with pytest.raises(InputError):
                each.pin([-1] * B, 60)
    with pytest.raises(ConfigError, match="model="):
        DistributedKVCache().pin([1], 60)


@pytest.mark.parametrize("tiered", [False, True])
def test_nobody_pins_what_belongs_to_another_tenant(tmp_path: Path, tiered: bool) -> None:
    path, make = tmp_path / "store", tiers_over if tiered else cache_over
    with make(FileStore(path, 40 * 4096), salt="a") as mine, make(FileStore(path, 40 * 4096), salt="b") as theirs:
        tokens = save(mine, 3)
        pin = theirs.pin(tokens, 60)
        assert (pin.wanted, pin.held, pin.refreshed) == (3, {}, {})
        fill(theirs, 60)
        assert mine.match(tokens) == (3 * B if tiered else 0)  # of its own memory, not of the store
        assert (mine.store.store if isinstance(mine, TieredCache) else mine.store).probe(
            mine.namespace.keys(tokens)
        ) == 0


@pytest.mark.redis
def test_a_store_that_is_down_keeps_nothing_raises_nothing_and_counts_why() -> None:
    with RedisServer() as server, cache_over(RedisStore(server.url, ttl_s=60)) as cache:
        tokens = save(cache, 2)
        pin = cache.pin(tokens, 60)
        server.kill()
        pin.renew(60)
        assert (pin.held, pin.refreshed, pin.wanted) == ({}, {}, 2)
        assert cache.store.stats().faults["conn"] >= 1
        pin.release()


# --- Redis --------------------------------------------------------------------------------------
@pytest.mark.redis
def test_on_redis_a_pin_is_a_longer_ttl_and_eviction_takes_the_blocks_all_the_same() -> None:
    lru = ("--maxmemory-policy", "allkeys-lru", "--maxmemory-samples", "64")
    with RedisServer(*lru) as server, cache_over(RedisStore(server.url, ttl_s=60, deadline_s=30)) as cache:
        client, tokens = server.client(), save(cache, 3)
        names = [b"kv:" + key for key in cache.namespace.keys(tokens)]
        pin = cache.pin(tokens, 1800)
        assert (pin.held, pin.refreshed) == ({}, {"store": 3})
        assert all(1_700_000 < client.pttl(name) <= 1_800_000 for name in names)
        cache.load(tokens, 0, 3 * B, exact_kv(SPEC, 3 * B))  # a use does not shorten it
        cache.save(tokens, exact_kv(SPEC, 3 * B))
        assert all(client.pttl(name) > 1_700_000 for name in names)
        wait_for(lambda: client.object("idletime", names[0]) >= 1)
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 4_000_000)
        for number in range(80):
            client.set(f"other {number}", bytes(100_000))
        assert client.info("stats")["evicted_keys"] > 0
        assert client.exists(*names) == 0 and cache.match(tokens) == 0
        pin.renew(1800)
        assert (pin.held, pin.refreshed) == ({}, {})


@pytest.mark.redis
def test_the_ttl_of_a_save_is_that_of_its_blocks_and_the_longest_counts(redis_server: RedisServer) -> None:
    with cache_over(RedisStore(redis_server.url, ttl_s=60, deadline_s=30)) as cache:
        client, tokens = redis_server.client(), save(cache, 2, ttl_s=20)
        names = [b"kv:" + key for key in cache.namespace.keys(tokens)]
        left = lambda: [round(client.pttl(name) / 10_000) for name in names]  # noqa: E731
        assert left() == [2, 2]
        for ttl_s, expected in ((900, [90, 90]), (20, [90, 90]), (None, [90, 90])):
            cache.save(tokens, exact_kv(SPEC, 2 * B), ttl_s=ttl_s)
            assert left() == expected


# --- a TTL per save -----------------------------------------------------------------------------
@pytest.mark.parametrize("make", [cache_over, tiers_over, lambda store: tiers_over(store, write="back")])
def test_a_save_with_a_ttl_ends_with_it_unless_a_later_one_says_more(make: Any) -> None:
    clock = FakeClock()
    store = MemoryStore(ttl_s=100, clock=clock)
    with make(store) as cache:
        short, again, plain = save(cache, 2, 1, ttl_s=20), save(cache, 2, 2, ttl_s=20), save(cache, 2, 3)
        cache.save(again, exact_kv(SPEC, 2 * B), ttl_s=50)
        alive = lambda tokens: store.probe(cache.namespace.keys(tokens))  # noqa: E731
        is_back = isinstance(cache, TieredCache) and cache.write == "back"
        assert [alive(tokens) for tokens in (short, again, plain)] == [2, 2, 0 if is_back else 2]
        clock.now += 30
        assert [alive(tokens) for tokens in (short, again)] == [0, 2]
        clock.now += 30
        assert [alive(tokens) for tokens in (short, again, plain)] == [0, 0, 0 if is_back else 2]


def test_a_save_that_extends_a_prompt_keeps_its_beginning_as_long() -> None:
    clock = FakeClock()
    with cache_over(MemoryStore(ttl_s=100, clock=clock)) as cache:
        tokens = tokens_of(3 * B)
        cache.save(tokens[: 2 * B], exact_kv(SPEC, 2 * B), ttl_s=20)
        cache.save(tokens, exact_kv(SPEC, 3 * B), start=2 * B, ttl_s=80)
        clock.now += 79
        assert cache.match(tokens) == 3 * B


@pytest.mark.parametrize("ttl_s", [0, -5, "60", True])
@pytest.mark.parametrize("make", [cache_over, tiers_over])
def test_a_ttl_that_is_none_is_an_error_before_anything_is_saved(make: Any, ttl_s: Any) -> None:
    with make(MemoryStore(ttl_s=100)) as cache:
        with pytest.raises(ConfigError, match="TTL"):
            save(cache, 1, ttl_s=ttl_s)
        assert cache.match(tokens_of(B)) == 0
    with make(MemoryStore()) as cache, pytest.raises(ConfigError, match="a store with a TTL of its own"):
        save(cache, 1, ttl_s=60)


# --- two tiers ----------------------------------------------------------------------------------
def test_each_tier_keeps_what_it_has_as_strongly_as_it_can() -> None:
    clock = FakeClock()
    with tiers_over(MemoryStore(ttl_s=100, clock=clock), blocks=8, clock=clock) as tiers:
        tokens = save(tiers, 3)
        pin = tiers.pin(tokens, 60)
        assert (pin.held, pin.refreshed) == ({"host": 3}, {"store": 3})
        assert tiers.stats().pinned == Counter(held=3, refreshed=3)
        fill(tiers, 20)
        keys = tiers.namespace.keys(tokens)
        assert [key in tiers.host for key in keys] == [True] * 3 and tiers.host.held == 3
        clock.now += 60
        fill(tiers, 20, first=500)
        assert [key in tiers.host for key in keys] == [False] * 3


def test_host_memory_holds_a_share_from_the_front_and_the_rest_serves_on() -> None:
    with tiers_over(MemoryStore(ttl_s=100), blocks=8, max_held=0.5) as tiers:
        tokens = save(tiers, 6)
        pin = tiers.pin(tokens, 60)
        assert (pin.wanted, pin.held, pin.refreshed) == (6, {"host": 4}, {"store": 6})
        fill(tiers, 20)
        assert [key in tiers.host for key in tiers.namespace.keys(tokens)] == [True] * 4 + [False] * 2
        assert len(tiers.host) == 8  # all others share the other half
        pin.release()
        fill(tiers, 20, first=500)
        assert not any(key in tiers.host for key in tiers.namespace.keys(tokens))


def test_blocks_that_only_host_memory_has_are_held_too(tmp_path: Path) -> None:
    with tiers_over(FileStore(tmp_path / "store"), write="back") as tiers:
        tokens = save(tiers, 3)
        assert tiers.pin(tokens, 60).held == {"host": 3}
        assert tiers.flush()
        assert tiers.pin(tokens, 60).held == {"host": 3, "store": 3}


def test_exclusive_tiers_do_not_give_a_held_block_away() -> None:
    with tiers_over(MemoryStore(), exclusive=True, write="back") as tiers:
        tokens = save(tiers, 2)
        keys = tiers.namespace.keys(tokens)
        assert tiers.flush()
        pin = tiers.pin(tokens[:B], 60)
        assert pin.held == {"host": 1}
        tiers.on_device(keys)
        assert [key in tiers.host for key in keys] == [True, False]
        pin.release()
        tiers.on_device(keys)
        assert [key in tiers.host for key in keys] == [False, False]


def test_a_queue_in_front_of_the_store_passes_pins_on(tmp_path: Path) -> None:
    behind = WriteBehind(FileStore(tmp_path / "store"))
    with cache_over(behind) as cache:
        tokens = save(cache, 2)
        assert behind.flush(30)
        with cache.pin(tokens, 60) as pin:
            assert pin.held == {"store": 2}
            assert len([*(tmp_path / "store" / ".held").iterdir()]) == 1
        assert [*(tmp_path / "store" / ".held").iterdir()] == []
