"""The distributed cache as it is made: which store it gets, what contradicts, what is refused, and what it shows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvlab import DistributedKVCache
from kvlab.errors import ConfigError, InputError, KVLabError
from kvlab.stores import MemoryStore, RedisStore, Store, WriteBehind
from kvlab.stores.base import MAX_VALUE_BYTES
from kvlab.testbed.server import RedisServer
from tests.harness.helpers import blank, exact_kv, small_spec
from tests.harness.scripted import ScriptedServer

SPEC = small_spec()
B = 16
TOKENS = list(range(3 * B))
KV = exact_kv(SPEC, 3 * B)
K = torch.zeros(1, 2, 4, 8)
DAY_MS = 86_400_000
LONG_S = 30.0


def made(**options: Any) -> DistributedKVCache:
    return DistributedKVCache(**{"model": SPEC, "block_tokens": B, "precision": "fp32", **options})


# --- which store --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        ({}, "fakeredis://"),
        ({"redis_host": "localhost"}, "redis://localhost:6379"),
        ({"redis_host": "localhost", "redis_port": 7000}, "redis://localhost:7000"),
        ({"redis_host": "::1"}, "redis://[::1]:6379"),
        ({"redis_host": "[::1]", "redis_port": 1}, "redis://[::1]:1"),
        ({"redis_host": "10.0.0.7", "redis_port": 65535}, "redis://10.0.0.7:65535"),
        ({"store": "redis://me:secret@h:7000/2"}, "redis://me:secret@h:7000/2"),
        ({"store": "redis-cluster://a,b"}, "redis-cluster://a,b"),
        ({"store": "unix:///run/redis.sock"}, "unix:///run/redis.sock"),
        ({"store": "fakeredis://shared by name".partition(" ")[0]}, "fakeredis://shared"),
    ],
)
def test_the_store_is_the_one_that_is_named(arguments: dict[str, Any], url: str) -> None:
    cache = DistributedKVCache(**arguments)
    assert isinstance(cache.store, RedisStore) and cache.store.url == url and cache.store._ttl_ms == DAY_MS


def test_the_store_may_be_in_memory_or_made_already() -> None:
    assert isinstance(DistributedKVCache(store="memory://").store, MemoryStore)
    for store in (MemoryStore(), RedisStore(ttl_s=5), WriteBehind(MemoryStore())):
        assert DistributedKVCache(store=store).store is store


@pytest.mark.parametrize(("ttl", "ms"), [(5, 5000), (0.5, 500), (None, None)])
@pytest.mark.parametrize("where", [{}, {"redis_host": "localhost"}, {"store": "redis://h"}], ids=str)
def test_the_ttl_is_the_stores(where: dict[str, Any], ttl: float | None, ms: int | None) -> None:
    assert DistributedKVCache(ttl_seconds=ttl, **where).store._ttl_ms == ms  # type: ignore[attr-defined]


@pytest.mark.redis
@pytest.mark.parametrize("how", ["host", "url", "store"])
def test_a_real_server_by_host_by_url_and_by_store(redis_server: RedisServer, how: str) -> None:
    where: dict[str, dict[str, Any]] = {
        "host": {"redis_host": "127.0.0.1", "redis_port": redis_server.port},
        "url": {"store": redis_server.url},
        "store": {"store": RedisStore(redis_server.url, deadline_s=LONG_S)},
    }
    with made(**where[how]) as cache:
        assert cache.health().ok and cache.save(TOKENS, KV) == 3
        out = blank(SPEC, 3 * B)
        assert cache.load(TOKENS, 0, 3 * B, out) == 3 * B and torch.equal(out, KV)


# --- settings that contradict each other, or that nothing would use -------------------------------
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"redis_host": "h", "store": "redis://h:6379"}, "at most one of redis_host and store"),
    ({"redis_host": "h", "store": MemoryStore()}, "at most one of redis_host and store"),
    ({"redis_host": "h", "redis_port": 7000, "store": "fakeredis://"}, "at most one of redis_host and store"),
    ({"redis_port": 7000}, "redis_host= with redis_port="),
    ({"redis_port": 6379}, "redis_host= with redis_port="),
    ({"redis_port": None}, "redis_host= with redis_port="),
    ({"redis_port": 7000, "store": "redis://h"}, "redis_port="),
    ({"redis_port": 7000, "store": MemoryStore()}, "redis_port="),
    ({"store": MemoryStore(), "ttl_seconds": 5}, "it has a TTL of its own"),
    ({"store": MemoryStore(ttl_s=5), "ttl_seconds": 5}, "it has a TTL of its own"),
    ({"store": RedisStore(), "ttl_seconds": None}, "it has a TTL of its own"),
    ({"store": WriteBehind(MemoryStore()), "ttl_seconds": 86400}, "it has a TTL of its own"),
    ({"encryption_key_id": 3}, "encryption_keys= with encryption_key_id="),
    ({"encryption_key_id": 0}, "encryption_keys= with encryption_key_id="),
    ({"encryption_keys": {}, "encryption_key_id": 3}, "master keys"),
    ({"encryption_keys": {1: bytes(32)}, "encryption_key_id": 3}, "key id"),
    ({"block_tokens": 16}, "model= with block_tokens="),
    ({"redis_host": ""}, "host name"),
    ({"store": ""}, "store URL"),
    ({"store": "memory://x"}, "store URL"),
]


@pytest.mark.parametrize(("arguments", "says"), CONTRADICTIONS, ids=lambda case: str(case)[:70])
def test_what_contradicts_or_would_be_ignored_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DistributedKVCache(**arguments)


@pytest.mark.parametrize("name", ["url", "host", "port", "redis_url", "ttl_s", "ttl", "key_id", "block_size"])
def test_a_setting_of_another_name_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        DistributedKVCache(**{name: "redis://h"})


def test_only_the_five_settings_of_the_source_document_go_by_place() -> None:
    DistributedKVCache("localhost", 6379, "float16", True, 86400)
    with pytest.raises(TypeError):
        DistributedKVCache("localhost", 6379, "float16", True, 86400, MemoryStore())  # type: ignore[misc]


def test_nothing_is_connected_by_what_is_refused() -> None:
    with ScriptedServer(lambda command: b"+OK\r\n") as server:
        for wrong in ({"precision": "fp8"}, {"compress": "lz4"}, {"block_tokens": 0}, {"encryption_key_id": 1}):
            with pytest.raises(ConfigError):
                DistributedKVCache("127.0.0.1", server.port, **wrong)
        assert server._open == []


# --- settings of other types and out of bounds --------------------------------------------------
WRONG: dict[str, list[Any]] = {
    "redis_host": [b"h", 7, True, 7.5, ["h"], object()],
    "precision": [None, 16, torch.float16, "fp8", "FLOAT16", "", b"fp16", ["fp16"]],
    "compress": [None, 1, 0, "lz4", "", b"zstd", "ZSTD", 3.5],
    "ttl_seconds": [0, -1, 0.0, math.nan, math.inf, -math.inf, "5", True, False, 10**30, 10**5000, [5], 5j],
    "store": [7, True, b"redis://h", ["redis://h"], {}, object(), MemoryStore, "redis://h?no=1"],
    "model": ["model", 7, {}, SPEC.fingerprint, object()],
    "salt": [None, 7, ["salt"], "\ud800", bytearray(b"salt"), True],
    "encryption_keys": [b"k" * 32, "k" * 32, [bytes(32)], {1: bytes(31)}, {0: bytes(32)}, {-1: bytes(32)}, 7, True],
    "encryption_key_id": [0, 1, "1", b"1", True],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(name, value, id=f"{name} {i}") for name in WRONG for i, value in enumerate(WRONG[name])],
)
def test_a_setting_of_another_type_or_out_of_bounds_is_refused_at_once(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        DistributedKVCache(**{name: value})
    assert str(refused.value).startswith(("expected", "not a usable")) and len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "port", [0, -1, 65536, 10**5000, 7000.0, "7000", True, None, math.nan, b"1"], ids=lambda value: type(value).__name__
)
def test_a_port_that_is_none_is_refused(port: Any) -> None:
    with pytest.raises(ConfigError, match="redis_port of 1 … 65535"):
        DistributedKVCache("localhost", port)


@pytest.mark.parametrize(
    "block", [0, -16, 2**32, 10**5000, 16.0, "16", True, math.inf, [16], 1 << 24], ids=lambda b: type(b).__name__
)
def test_a_block_that_is_none_or_too_large_is_refused(block: Any) -> None:
    with pytest.raises(ConfigError, match="expected a block"):
        DistributedKVCache(model=SPEC, block_tokens=block)


# --- calls --------------------------------------------------------------------------------------
BAD_NUMBERS = [math.nan, math.inf, 0.5, 16.0, "0", b"0", None, [], {}, True, 1j, object()]


@pytest.mark.parametrize("wrong", BAD_NUMBERS, ids=lambda value: type(value).__name__)
def test_positions_are_whole_numbers(wrong: Any) -> None:
    cache = made(store=MemoryStore())
    calls: list[Callable[[], Any]] = [
        lambda: cache.load(TOKENS, wrong, B, blank(SPEC, B)),
        lambda: cache.load(TOKENS, 0, wrong, blank(SPEC, B)),
        lambda: cache.save(TOKENS, KV, wrong),
    ]
    for call in calls:
        with pytest.raises(InputError, match="positions as whole numbers"):
            call()
    assert cache.stats() == made().stats() and cache.store.stats() == MemoryStore().stats()


def test_positions_of_other_whole_types_will_do() -> None:
    numpy = pytest.importorskip("numpy")
    cache = made(store=MemoryStore())
    assert cache.save(TOKENS, KV, numpy.int64(B)) == 2
    assert cache.load(TOKENS, numpy.int64(B), numpy.int64(3 * B), blank(SPEC, 2 * B)) == 3 * B


@pytest.mark.parametrize(
    "start", [-(10**5000), 10**5000, -1, 1, 2 * B], ids=lambda s: str(s)[:5] if abs(s) < 99 else "huge"
)
def test_positions_that_do_not_fit_are_refused(start: int) -> None:
    with pytest.raises(InputError, match="expected 0 <= start <= stop <= 48 in steps of 16"):
        made().load(TOKENS, start, B, blank(SPEC, B))


@pytest.mark.parametrize("tokens", [None, 7, 1.5, object(), iter(TOKENS), "text", b"bytes", [[1]], ["a"], [0.5]])
def test_tokens_are_a_list_of_numbers(tokens: Any) -> None:
    cache = made(store=MemoryStore())
    calls: list[Callable[[], Any]] = [lambda: cache.match(tokens), lambda: cache.save(tokens, blank(SPEC, 1))]
    if not isinstance(tokens, list):  # of none of them load looks at one
        calls.append(lambda: cache.load(tokens, 0, 0, blank(SPEC, 0)))
    for call in calls:
        with pytest.raises(KVLabError, match="expected"):
            call()


@pytest.mark.parametrize("layer", [-1, 2**32, 10**5000, *BAD_NUMBERS], ids=lambda value: type(value).__name__)
def test_a_layer_is_a_whole_number(layer: Any) -> None:
    cache = DistributedKVCache()
    for call in (lambda: cache.cache_kv("text", layer, K, K), lambda: cache.get_cached_kv("text", layer)):
        with pytest.raises(InputError, match=r"a layer number of 0 … 2\*\*32 - 1, got"):
            call()
    assert cache.stats() == DistributedKVCache().stats()


# --- what is too large to come back ---------------------------------------------------------------
@pytest.mark.parametrize("shape", [(2, 8, 131072, 65), (1, (1 << 27) + 1), (1 << 31, 0), (2**32 - 1, 0)], ids=str)
def test_tensors_too_large_to_read_back_are_a_counted_drop(shape: tuple[int, ...]) -> None:
    cache = DistributedKVCache(store=MemoryStore())
    big = torch.zeros(1, dtype=torch.float16).expand(shape)
    assert cache.cache_kv("text", 0, big, big) is False and cache.get_cached_kv("text", 0) is None
    assert cache.stats().drops == Counter(overflow=1) and cache.store.stats().offered == 0
    cache.stats().check()


def test_a_record_too_large_for_the_store_is_a_counted_drop() -> None:
    cache = DistributedKVCache(precision="float32", compress=False)
    big = torch.zeros(1).expand(MAX_VALUE_BYTES // 8)
    assert cache.cache_kv("text", 0, big, big) is False and cache.get_cached_kv("text", 0) is None
    assert cache.stats().drops == Counter(store=1) and cache.store.stats().drops == Counter(too_big=1)
    fits = torch.zeros(1).expand(MAX_VALUE_BYTES // 8 - 1024)
    assert cache.cache_kv("text", 0, fits, fits) is True
    got = cache.get_cached_kv("text", 0)
    assert got is not None and got[0].shape == fits.shape


# --- what it counts and shows -------------------------------------------------------------------
def test_what_was_there_is_kept_and_what_was_not_is_stored_and_both_are_saved() -> None:
    cache = made(store=MemoryStore())
    assert cache.save(TOKENS[: 2 * B], KV[:, :, :, : 2 * B]) == 2
    assert cache.save(TOKENS, KV) == 3
    stats = cache.stats()
    assert (stats.stored, stats.kept, stats.saved) == (3, 2, 5)
    assert cache.save(TOKENS, KV, start=B) == 2 and cache.stats().kept == 4


def test_a_block_that_the_store_dropped_is_not_saved() -> None:
    store = RedisStore()
    cache = made(store=store)
    store.close()
    assert cache.save(TOKENS, KV) == 0
    stats = cache.stats()
    assert (stats.stored, stats.kept, stats.saved, stats.drops) == (0, 0, 0, Counter(store=3))


def test_a_cache_is_closed_by_leaving_it_and_closes_its_store() -> None:
    with made() as cache:
        assert cache.save(TOKENS, KV) == 3 and cache.health().ok
    assert not cache.health().ok and not cache.store.health().ok
    assert cache.match(TOKENS) == 0 and cache.save(TOKENS, KV) == 0
    cache.close()


@pytest.mark.parametrize(
    ("store", "shown"),
    [
        (MemoryStore(), "DistributedKVCache(MemoryStore(0 values), fp16, zstd)"),
        ("redis://me:secret@h:1", "DistributedKVCache(RedisStore('redis://me:***@h:1'), fp16, zstd)"),
        (WriteBehind(MemoryStore()), "DistributedKVCache(WriteBehind(MemoryStore(0 values)), fp16, zstd)"),
    ],
    ids=["memory", "redis", "behind"],
)
def test_a_cache_shows_where_it_points(store: str | Store, shown: str) -> None:
    assert repr(DistributedKVCache(store=store)) == shown


def test_a_root_that_is_only_touched_is_used() -> None:
    """Loading what follows, and saving what is there, tell the store of the blocks before."""
    asked: list[bytes] = []

    class Watched(MemoryStore):
        def touch_many(self, keys: Any) -> list[bool]:
            asked.extend(keys)
            return super().touch_many(keys)

    cache = made(store=Watched())
    cache.save(TOKENS, KV)
    root, middle, leaf = asked
    asked.clear()
    assert cache.load(TOKENS, 2 * B, 3 * B, blank(SPEC, B)) == 3 * B and asked == [root, middle]
    asked.clear()
    assert cache.save(TOKENS, KV, start=2 * B) == 1 and asked == [root, middle, leaf]
