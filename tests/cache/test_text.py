"""The calls of the source document: `cache_kv` and `get_cached_kv`, one layer's tensors under an exact text."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab import DistributedKVCache
from kvlab.errors import InputError
from kvlab.stores import MemoryStore, RedisStore
from kvlab.testbed.server import RedisServer
from tests.harness.helpers import blank, build_model, exact_kv, small_spec

PREFIX = "You are a helpful assistant."


def pair(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values that fp16 and bf16 hold exactly."""
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randint(-127, 128, (2, *shape), generator=g) / 16
    return k.to(dtype), v.to(dtype)


K, V = pair(1, 2, 16, 8)


def is_pair(got: tuple[Tensor, Tensor] | None, k: Tensor = K, v: Tensor = V) -> bool:
    return got is not None and [t.dtype for t in got] == [k.dtype, v.dtype] and all(map(torch.equal, got, (k, v)))


@pytest.fixture
def cache() -> Iterator[DistributedKVCache]:
    """As the source document makes it, but in process."""
    made = DistributedKVCache()
    yield made
    made.stats().check()
    made.store.stats().check()
    made.close()


# --- the calls as the source document writes them ---------------------------------------------------------
def test_the_call_in_both_of_its_forms(cache: DistributedKVCache) -> None:
    assert cache.cache_kv(PREFIX, 0, K, V) is True
    assert cache.cache_kv(PREFIX, layer=1, k_tensor=K, v_tensor=V) is True
    assert cache.cache_kv(prefix=PREFIX, layer=2, v_tensor=V, k_tensor=K) is True
    assert is_pair(cache.get_cached_kv(PREFIX, layer=0))
    assert is_pair(cache.get_cached_kv(PREFIX, 1))
    assert is_pair(cache.get_cached_kv(prefix=PREFIX, layer=2))
    assert cache.stats().hit_rate == 1.0


@pytest.mark.redis
def test_the_constructor_in_both_of_its_forms(redis_server: RedisServer) -> None:
    port = redis_server.port
    by_name = DistributedKVCache(
        redis_host="127.0.0.1", redis_port=port, precision="float16", compress=True, ttl_seconds=86400
    )
    by_place = DistributedKVCache("127.0.0.1", port, "float16", True, 86400)
    assert by_name.cache_kv(PREFIX, 0, K, V)
    assert is_pair(by_place.get_cached_kv(PREFIX, 0))
    (key,) = redis_server.client().keys()
    assert 86_000 < redis_server.client().ttl(key) <= 86_400
    for cache in (by_name, by_place):
        assert cache.health().ok
        cache.close()


def test_the_defaults() -> None:
    cache = DistributedKVCache()
    assert (cache.format.precision, cache.format.codec) == ("fp16", "zstd")
    assert isinstance(cache.store, RedisStore) and cache.store.url == "fakeredis://"
    assert cache.store._ttl_ms == 86_400_000
    assert DistributedKVCache(ttl_seconds=None).store._ttl_ms is None
    assert DistributedKVCache("localhost").store.url == "redis://localhost:6379"


def test_two_default_caches_share_nothing(cache: DistributedKVCache) -> None:
    cache.cache_kv(PREFIX, 0, K, V)
    assert DistributedKVCache().get_cached_kv(PREFIX, 0) is None


# --- what comes back ----------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 2, 16, 8), (2, 8), (5,), (), (2, 0, 3), (1, 1, 1, 1), (1, 2, 3, 1, 2, 3, 2)], ids=str
)
def test_shape_dtype_and_values_come_back(
    precision: str, compress: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    cache = DistributedKVCache(precision=precision, compress=compress, store=MemoryStore())
    k, v = pair(*shape, dtype=dtype)
    assert cache.cache_kv(PREFIX, 3, k, v)
    got = cache.get_cached_kv(PREFIX, 3)
    assert is_pair(got, k, v)
    assert got is not None and got[0].shape == got[1].shape == shape


@pytest.mark.parametrize(("precision", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_lower_precisions_give_the_rounded_values(precision: str, dtype: torch.dtype) -> None:
    cache = DistributedKVCache(precision=precision)
    k, v = torch.randn(2, 1, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    cache.cache_kv(PREFIX, 0, k, v)
    got = cache.get_cached_kv(PREFIX, 0)
    assert is_pair(got, k.to(dtype).float(), v.to(dtype).float())
    assert got is not None and not torch.equal(got[0], k)


def test_any_strides_and_gradients_are_taken_by_value(cache: DistributedKVCache) -> None:
    whole = pair(2, 16, 1, 16)[0].requires_grad_()
    k, v = whole[..., ::2].transpose(1, 2), whole[..., 1::2].transpose(1, 2)
    cache.cache_kv(PREFIX, 0, k, v)
    got = cache.get_cached_kv(PREFIX, 0)
    assert is_pair(got, k, v)
    assert got is not None and not got[0].requires_grad


def test_what_comes_back_is_the_callers_own(cache: DistributedKVCache) -> None:
    k, v = K.clone(), V.clone()
    cache.cache_kv(PREFIX, 0, k, v)
    k.zero_()
    got = cache.get_cached_kv(PREFIX, 0)
    assert is_pair(got)
    got[0].zero_()
    assert torch.equal(got[1], V)
    assert is_pair(cache.get_cached_kv(PREFIX, 0))


def test_a_second_put_replaces_the_first(cache: DistributedKVCache) -> None:
    cache.cache_kv(PREFIX, 0, K, V)
    k, v = pair(3, 4, seed=1)
    cache.cache_kv(PREFIX, 0, k, v)
    assert is_pair(cache.get_cached_kv(PREFIX, 0), k, v)


@pytest.mark.parametrize(
    "prefix",
    ["x", " ", "\0", "line\r\nline", "größer 🙂", "a" * 100_000, "*3\r\n$3\r\nSET\r\n"],
    ids=lambda p: repr(p)[:12],
)
def test_any_text_is_a_prefix(cache: DistributedKVCache, prefix: str) -> None:
    assert cache.cache_kv(prefix, 0, K, V)
    assert is_pair(cache.get_cached_kv(prefix, 0))
    assert cache.get_cached_kv(prefix + " ", 0) is None


# --- what is shared, and what is not ------------------------------------------------------------
def test_only_the_exact_text_and_layer_hit(cache: DistributedKVCache) -> None:
    cache.cache_kv(PREFIX, 1, K, V)
    for prefix, layer in ((PREFIX[:-1], 1), (PREFIX + ".", 1), (PREFIX.lower(), 1), (PREFIX, 0), (PREFIX, 11)):
        assert cache.get_cached_kv(prefix, layer) is None
    assert cache.stats().misses == Counter(absent=5)


@pytest.mark.parametrize("change", [{"precision": "float32"}, {"salt": "b"}, {"model": small_spec()}], ids=str)
def test_other_settings_do_not_meet(change: dict[str, Any]) -> None:
    store = MemoryStore()
    own, other = DistributedKVCache(store=store, salt="a"), DistributedKVCache(store=store, **{"salt": "a", **change})
    own.cache_kv(PREFIX, 0, K, V)
    assert other.get_cached_kv(PREFIX, 0) is None
    other.cache_kv(PREFIX, 0, V, K)
    assert is_pair(own.get_cached_kv(PREFIX, 0))
    assert is_pair(other.get_cached_kv(PREFIX, 0), V, K)


@pytest.mark.parametrize("change", [{"compress": False}, {"compress": "gzip"}, {"block_tokens": 32}], ids=str)
def test_settings_that_change_no_value_meet(change: dict[str, Any]) -> None:
    store, model = MemoryStore(), small_spec()
    DistributedKVCache(store=store, model=model, block_tokens=16).cache_kv(PREFIX, 0, K, V)
    assert is_pair(DistributedKVCache(store=store, model=model, **change).get_cached_kv(PREFIX, 0))


def test_another_ttl_changes_no_value() -> None:
    DistributedKVCache(store="fakeredis://ttl").cache_kv(PREFIX, 0, K, V)
    assert is_pair(DistributedKVCache(store="fakeredis://ttl", ttl_seconds=5).get_cached_kv(PREFIX, 0))


def test_salts_may_be_text_or_its_bytes() -> None:
    store = MemoryStore()
    DistributedKVCache(store=store, salt="Mieter ü").cache_kv(PREFIX, 0, K, V)
    assert is_pair(DistributedKVCache(store=store, salt="Mieter ü".encode()).get_cached_kv(PREFIX, 0))


def test_bound_to_a_model_keys_are_its_own_and_unbound_they_are_everybodys() -> None:
    store = MemoryStore()
    bound = [DistributedKVCache(store=store, model=build_model(seed=seed)) for seed in (0, 1)]
    unbound = [DistributedKVCache(store=store) for _ in range(2)]
    bound[0].cache_kv(PREFIX, 0, K, V)
    assert bound[1].get_cached_kv(PREFIX, 0) is None
    assert unbound[0].get_cached_kv(PREFIX, 0) is None
    assert is_pair(DistributedKVCache(store=store, model=build_model(seed=0)).get_cached_kv(PREFIX, 0))
    unbound[0].cache_kv(PREFIX, 0, V, K)
    assert is_pair(unbound[1].get_cached_kv(PREFIX, 0), V, K)
    assert is_pair(bound[0].get_cached_kv(PREFIX, 0))


def test_texts_and_tokens_never_meet() -> None:
    """Not in one cache, and not even where one's record is found under the other's key."""
    spec, store = small_spec(), MemoryStore()
    cache = DistributedKVCache(precision="fp32", compress=False, store=store, model=spec, block_tokens=16)
    tokens, kv = list(PREFIX.encode()[:16]), exact_kv(spec, 16)
    cache.save(tokens, kv)
    assert cache.get_cached_kv(PREFIX[:16], 0) is None
    cache.cache_kv(PREFIX[:16], 0, kv[:, 0], kv[:, 1])
    (block_key,), text_key = cache._namespace.keys(tokens), cache._text._key(PREFIX[:16], 0)
    block, text = store.get_many([block_key, text_key])
    store.put_many([block_key, text_key], [text, block])
    before = cache.stats().misses
    assert cache.get_cached_kv(PREFIX[:16], 0) is None
    assert cache.load(tokens, 0, 16, blank(spec, 16)) == 0
    assert cache.stats().misses - before == Counter(kind=2)


# --- counters, faults, wrong calls --------------------------------------------------------------
def test_every_call_is_counted(cache: DistributedKVCache) -> None:
    assert cache.stats().hit_rate == 0
    cache.cache_kv(PREFIX, 0, K, V)
    cache.get_cached_kv(PREFIX, 0)
    cache.get_cached_kv(PREFIX, 1)
    cache.get_cached_kv(PREFIX, 0)
    stats = cache.stats()
    assert (stats.requested, stats.hits, stats.misses) == (3, 2, Counter(absent=1))
    assert (stats.stored, stats.drops, stats.hit_rate) == (1, Counter(), 2 / 3)
    assert stats.bytes_read == 2 * stats.bytes_written > 0
    assert cache.store.stats().bytes_in == stats.bytes_written


def test_a_closed_cache_misses_and_drops() -> None:
    cache = DistributedKVCache()
    cache.cache_kv(PREFIX, 0, K, V)
    cache.close()
    assert cache.get_cached_kv(PREFIX, 0) is None
    assert cache.cache_kv(PREFIX, 0, K, V) is False
    assert cache.stats().drops == Counter(store=1)
    assert cache.store.stats().misses == Counter(closed=1)
    assert not cache.health().ok


def test_what_fp16_cannot_hold_is_dropped_and_counted(cache: DistributedKVCache) -> None:
    assert cache.cache_kv(PREFIX, 0, K, V * 1e6) is False
    assert cache.get_cached_kv(PREFIX, 0) is None
    assert cache.stats().drops == Counter(overflow=1)


WRONG_TENSORS: dict[str, tuple[Any, Any]] = {
    "shapes differ": (K, V[:, :1]),
    "dtypes differ": (K, V.half()),
    "integers": (K.int(), V.int()),
    "float64": (K.double(), V.double()),
    "eight dims": (torch.zeros((1,) * 8), torch.zeros((1,) * 8)),
    "lists": ([1.0], [2.0]),
    "nothing": (None, None),
    "one missing": (K, None),
}
WRONG_NAMES: dict[str, tuple[Any, Any]] = {
    "empty prefix": ("", 0),
    "no prefix": (None, 0),
    "bytes": (b"text", 0),
    "half a surrogate pair": ("\ud800", 0),
    "negative layer": (PREFIX, -1),
    "layer beyond u32": (PREFIX, 2**32),
    "layer a float": (PREFIX, 0.5),
    "layer a word": (PREFIX, "0"),
    "layer nothing": (PREFIX, None),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_tensors_are_refused(cache: DistributedKVCache, name: str) -> None:
    with pytest.raises(InputError, match="expected"):
        cache.cache_kv(PREFIX, 0, *WRONG_TENSORS[name])
    assert cache.stats() == DistributedKVCache().stats()


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_wrong_names_are_refused(cache: DistributedKVCache, name: str) -> None:
    prefix, layer = WRONG_NAMES[name]
    with pytest.raises(InputError, match="expected"):
        cache.cache_kv(prefix, layer, K, V)
    with pytest.raises(InputError, match="expected"):
        cache.get_cached_kv(prefix, layer)
    assert cache.stats() == DistributedKVCache().stats()


def test_eight_threads_get_what_they_put() -> None:
    cache = DistributedKVCache()
    wrong: list[str] = []

    def work(seed: int) -> None:
        k, v = pair(2, 8, seed=seed)
        for layer in range(20):
            if not cache.cache_kv(f"thread {seed}", layer, k, v):
                wrong.append(f"put {seed} {layer}")
            if not is_pair(cache.get_cached_kv(f"thread {seed}", layer), k, v):
                wrong.append(f"get {seed} {layer}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    stats = cache.stats()
    assert (stats.requested, stats.hits, stats.stored) == (160, 160, 160)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3, 4).to_sparse(), torch.zeros(2, 2, device="meta")], ids=["sparse", "meta"]
)
def test_tensors_without_plain_data_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(InputError, match="dense"):
        DistributedKVCache().cache_kv("text", 0, tensor, tensor)
