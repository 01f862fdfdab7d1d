"""What every cache of kvlab does with a TTL per save and with a pin, over each kind of store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from kvlab.cache import DistributedKVCache
from kvlab.core.keys import KVSpec
from kvlab.engine.tiers import TieredCache
from kvlab.errors import ConfigError
from kvlab.stores import FileStore, RedisStore
from tests.contracts.conftest import BEHIND, FAKEREDIS, FILES, MEMORY, REDIS_TCP, VALKEY, StoreKind
from tests.contracts.test_cache import tokens_of
from tests.contracts.test_store_ttl import _age_keys, plain_client
from tests.harness.helpers import FakeClock, blank, exact_kv

B = 16
KINDS = (MEMORY, BEHIND, FILES, FAKEREDIS, REDIS_TCP, VALKEY)


@dataclass
class Kept:
    """A cache over a store with a TTL of 100 seconds, and a way to let time pass."""

    cache: Any
    age: Callable[[float], None]

    def save(self, blocks: int, seed: int, spec: KVSpec, **options: Any) -> list[int]:
        tokens = tokens_of(blocks * B, seed)
        assert self.cache.save(tokens, exact_kv(spec, blocks * B, seed), **options) == blocks
        return tokens

    def alive(self, tokens: list[int]) -> int:
        """The blocks that the store has; a look is no use."""
        inner = self.cache.store if isinstance(self.cache, TieredCache) else self.cache
        return inner.store.probe(inner.namespace.keys(tokens))


@pytest.fixture(params=["one tier", "two tiers", "written back"])
def kept(request: pytest.FixtureRequest, retaining: StoreKind, spec: KVSpec) -> Iterator[Kept]:
    clock = FakeClock()
    settings = {"ttl_s": 100} | ({"clock": clock} if retaining in (MEMORY, BEHIND, FILES) else {})
    store = retaining.store(request, **settings)

    def age(seconds: float) -> None:
        clock.now += seconds
        if isinstance(store, RedisStore):
            _age_keys(plain_client(store), seconds)

    cache: Any = DistributedKVCache(store=store, model=spec, precision="fp32", block_tokens=B, describe=False)
    if request.param != "one tier":
        write = "back" if request.param == "written back" else "through"
        cache = TieredCache(cache, 1 << 20, write=write, planner=False, clock=clock)
    yield Kept(cache, age)
    cache.stats().check()
    cache.close()


@pytest.fixture(params=[pytest.param(kind, id=kind.name, marks=kind.marks) for kind in KINDS])
def retaining(request: pytest.FixtureRequest) -> StoreKind:
    """Each kind of store that keeps a TTL per value."""
    kind: StoreKind = request.param
    return kind


def test_the_ttl_of_a_save_is_that_of_its_blocks(kept: Kept, spec: KVSpec) -> None:
    short, long = kept.save(2, 1, spec, ttl_s=30), kept.save(2, 2, spec, ttl_s=300)
    for age, expected in ((20, [2, 2]), (20, [0, 2]), (240, [0, 2]), (40, [0, 0])):
        kept.age(age)
        assert [kept.alive(short), kept.alive(long)] == expected


def test_the_longest_of_several_saves_counts_whatever_comes_last(kept: Kept, spec: KVSpec) -> None:
    tokens = kept.save(2, 1, spec, ttl_s=300)
    for ttl_s in (30, None, 200):
        kept.save(2, 1, spec, ttl_s=ttl_s)
    kept.age(290)
    assert kept.alive(tokens) == 2
    kept.age(20)
    assert kept.alive(tokens) == 0


def test_a_load_keeps_blocks_for_the_ttl_of_the_store_and_shortens_nothing(kept: Kept, spec: KVSpec) -> None:
    short, long = kept.save(2, 1, spec, ttl_s=30), kept.save(2, 2, spec, ttl_s=300)
    for tokens in (short, long):
        assert kept.cache.load(tokens, 0, 2 * B, blank(spec, 2 * B)) == 2 * B
    kept.age(90)
    assert [kept.alive(short), kept.alive(long)] == [2, 2]
    kept.age(190)
    assert [kept.alive(short), kept.alive(long)] == [0, 2]


def test_a_pin_keeps_a_prefix_until_its_lease_ends(kept: Kept, spec: KVSpec) -> None:
    tokens, other = kept.save(3, 1, spec, ttl_s=50), kept.save(3, 2, spec, ttl_s=50)
    pin = kept.cache.pin(tokens[: 2 * B], 500)
    store = kept.cache.store.store if isinstance(kept.cache, TieredCache) else kept.cache.store
    strength = pin.held if isinstance(store, FileStore) else pin.refreshed
    assert pin.wanted == 2 and strength["store"] == 2
    assert pin.held.get("host", 0) == (2 if isinstance(kept.cache, TieredCache) else 0)
    kept.age(490)
    assert [kept.alive(tokens), kept.alive(other)] == [2, 0]
    pin.renew(100)
    kept.age(90)
    assert kept.alive(tokens) == 2
    pin.release()
    kept.age(100)
    assert kept.alive(tokens) == 0


@pytest.mark.parametrize("wrong", [0, -1, "60", float("nan")])
def test_what_is_no_time_is_an_error_that_changes_nothing(kept: Kept, spec: KVSpec, wrong: Any) -> None:
    with pytest.raises(ConfigError):
        kept.save(1, 1, spec, ttl_s=wrong)
    tokens = kept.save(1, 2, spec, ttl_s=30)
    with pytest.raises(ConfigError):
        kept.cache.pin(tokens, wrong)
    assert kept.alive(tokens_of(B, 1)) == 0 and kept.alive(tokens) == 1
    kept.age(40)
    assert kept.alive(tokens) == 0
