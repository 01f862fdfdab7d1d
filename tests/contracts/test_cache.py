"""The conformance suite of the `KVCache` contract: every cache, a learner's own included, passes all of it.

Values are such that fp16 and bf16 hold them exactly, so at every precision what comes back is
exactly what was saved. What rounding does is tested at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab.cache import DistributedKVCache, KVCache
from kvlab.core.keys import KVSpec
from kvlab.engine.tiers import TieredCache
from kvlab.errors import ConfigError, InputError
from kvlab.stores import MemoryStore
from tests.contracts.conftest import CacheKind
from tests.harness.helpers import SpyStore, blank, exact_kv, small_spec


def tokens_of(count: int, seed: int = 0) -> list[int]:
    """A prompt; other seeds differ from the first token on."""
    return [(seed * 7919 + i * 31) % 4096 for i in range(1, count + 1)]


def loaded(cache: KVCache, tokens: list[int], spec: KVSpec, start: int = 0, stop: int | None = None) -> Tensor:
    """What `load` gives, cut to what it says is there."""
    stop = cache.match(tokens) if stop is None else stop
    out = blank(spec, stop - start)
    end = cache.load(tokens, start, stop, out)
    assert start <= end <= stop and end % cache.block_tokens == 0
    return out[:, :, :, : end - start]


def drop_block(cache: KVCache, spy: SpyStore, index: int) -> None:
    """Remove the block that was offered at this place, from all tiers."""
    assert spy.inner.delete_many([spy.put_keys[index]]) == 1
    forget_in_host(cache, spy.put_keys[index])


def forget_in_host(cache: KVCache, key: bytes) -> None:
    """Remove a block from the host tier, if there is one."""
    if isinstance(cache, TieredCache):
        cache.host.remove(key)


# --- match, load, save --------------------------------------------------------------------------
def test_an_empty_cache_has_nothing(cache: KVCache, spec: KVSpec) -> None:
    B = cache.block_tokens
    tokens = tokens_of(2 * B)
    assert cache.match(tokens) == 0
    assert cache.load(tokens, 0, 2 * B, blank(spec, 2 * B)) == 0
    assert cache.load(tokens, B, 2 * B, blank(spec, B)) == B
    assert cache.stats().hits == 0


def test_what_was_saved_comes_back_exactly(cache: KVCache, spec: KVSpec) -> None:
    B = cache.block_tokens
    tokens, kv = tokens_of(3 * B), exact_kv(spec, 3 * B)
    assert cache.save(tokens, kv) == 3
    assert cache.match(tokens) == 3 * B
    assert torch.equal(loaded(cache, tokens, spec), kv)


def test_a_partial_last_block_is_not_saved(cache: KVCache, spec: KVSpec) -> None:
    B = cache.block_tokens
    tokens, kv = tokens_of(2 * B + 5), exact_kv(spec, 2 * B + 5)
    assert cache.save(tokens, kv) == 2
    assert cache.match(tokens) == 2 * B
    assert torch.equal(loaded(cache, tokens, spec), kv[:, :, :, : 2 * B])


@pytest.mark.parametrize("missing", [1, None])
def test_less_than_a_block_is_nothing(cache: KVCache, spec: KVSpec, missing: int | None) -> None:
    count = cache.block_tokens - missing if missing else 1
    assert cache.save(tokens_of(count), exact_kv(spec, count)) == 0
    assert cache.match(tokens_of(count)) == 0
    assert cache.match([]) == 0


def test_match_counts_only_leading_blocks_that_agree(cache: KVCache, spec: KVSpec) -> None:
    B = cache.block_tokens
    tokens = tokens_of(3 * B)
    cache.save(tokens, exact_kv(spec, 3 * B))
    for changed, expected in ((0, 0), (B - 1, 0), (B, B), (2 * B, 2 * B), (3 * B - 1, 2 * B)):
        other = [*tokens[:changed], tokens[changed] ^ 1, *tokens[changed + 1 :]]
        assert cache.match(other) == expected
    assert cache.match(tokens[B:]) == 0
    assert cache.match([*tokens, 1, 2, 3]) == 3 * B


def test_any_range_of_blocks_can_be_loaded(cache: KVCache, spec: KVSpec) -> None:
    B = cache.block_tokens
    tokens, kv = tokens_of(4 * B), exact_kv(spec, 4 * B)
    cache.save(tokens, kv)
    for start, stop in ((0, B), (B, 3 * B), (3 * B, 4 * B), (2 * B, 2 * B)):
        assert torch.equal(loaded(cache, tokens, spec, start, stop), kv[:, :, :, start:stop])


def test_load_fills_any_strides_and_nothing_beside(cache: KVCache, spec: KVSpec) -> None:
    B = cache.block_tokens
    tokens, kv = tokens_of(2 * B), exact_kv(spec, 2 * B)
    cache.save(tokens, kv)
    pool = torch.full((spec.layers, 2, 3, spec.heads, 2 * B + 7, spec.head_dim), -99.0)  # [L, P, N, H, C, D]
    assert cache.load(tokens, 0, 2 * B, pool[:, :, 1, :, : 2 * B]) == 2 * B
    assert torch.equal(pool[:, :, 1, :, : 2 * B], kv)
    assert bool((pool[:, :, 1, :, 2 * B :] == -99).all())
    assert bool((pool[:, :, 0::2] == -99).all())


def test_load_fills_a_tensor_with_its_axes_in_another_order(cache: KVCache, spec: KVSpec) -> None:
    B = cache.block_tokens
    tokens, kv = tokens_of(2 * B), exact_kv(spec, 2 * B)
    cache.save(tokens, kv)
    out = torch.full((2 * B, spec.head_dim, spec.heads, 2, spec.layers), torch.nan).permute(4, 3, 2, 0, 1)
    assert cache.load(tokens, 0, 2 * B, out) == 2 * B
    assert torch.equal(out, kv)


def test_save_takes_a_tensor_of_any_strides(cache: KVCache, spec: KVSpec) -> None:
    B = cache.block_tokens
    kv = exact_kv(spec, 2 * B)
    pool = torch.full((spec.layers, 2, spec.heads, 2 * B + 9, spec.head_dim), torch.nan)
    pool[:, :, :, : 2 * B] = kv
    assert cache.save(tokens_of(2 * B), pool[:, :, :, : 2 * B]) == 2
    pool.fill_(torch.nan)  # the cache keeps no reference to the caller's tensor
    assert torch.equal(loaded(cache, tokens_of(2 * B), spec), kv)


def test_save_from_a_position_offers_only_what_follows(cache: KVCache, spy: SpyStore, spec: KVSpec) -> None:
    B = cache.block_tokens
    tokens, kv = tokens_of(4 * B), exact_kv(spec, 4 * B)
    assert cache.save(tokens, kv, start=2 * B) == 2
    assert cache.match(tokens) == 0
    assert cache.save(tokens[: 2 * B], kv[:, :, :, : 2 * B]) == 2
    assert len(set(spy.put_keys)) == len(spy.put_keys) == 4
    assert torch.equal(loaded(cache, tokens, spec), kv)


def test_save_from_inside_a_block_leaves_that_block_out(cache: KVCache, spy: SpyStore, spec: KVSpec) -> None:
    B = cache.block_tokens
    assert cache.save(tokens_of(3 * B), exact_kv(spec, 3 * B), start=B + 1) == 1
    assert cache.save(tokens_of(3 * B), exact_kv(spec, 3 * B), start=3 * B) == 0
    assert len(spy.put_keys) == 1


def test_two_prompts_share_the_blocks_of_their_common_prefix(cache: KVCache, spy: SpyStore, spec: KVSpec) -> None:
    B = cache.block_tokens
    first = tokens_of(3 * B)
    second = [*first[: 2 * B], *tokens_of(B, seed=5)]
    kv, tail = exact_kv(spec, 3 * B, seed=1), exact_kv(spec, B, seed=2)
    cache.save(first, kv)
    assert cache.match(second) == 2 * B
    both = torch.cat((kv[:, :, :, : 2 * B], tail), dim=3)
    assert cache.save(second, both, start=2 * B) == 1
    assert len(set(spy.put_keys)) == 4
    assert torch.equal(loaded(cache, second, spec), both)
    assert torch.equal(loaded(cache, first, spec), kv)


# --- gaps ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("lost", [0, 1, 2, 3])
def test_what_comes_back_has_no_gap(cache: KVCache, spy: SpyStore, spec: KVSpec, lost: int) -> None:
    B = cache.block_tokens
    tokens, kv = tokens_of(4 * B), exact_kv(spec, 4 * B)
    cache.save(tokens, kv)
    drop_block(cache, spy, lost)
    assert cache.match(tokens) == lost * B
    assert torch.equal(loaded(cache, tokens, spec, 0, 4 * B), kv[:, :, :, : lost * B])
    stats = cache.stats()
    assert (stats.requested, stats.hits) == (4, lost)
    assert stats.misses == Counter(absent=1) + Counter(gap=3 - lost)


def test_a_gap_is_closed_by_the_next_save(cache: KVCache, spy: SpyStore, spec: KVSpec) -> None:
    B = cache.block_tokens
    tokens, kv = tokens_of(3 * B), exact_kv(spec, 3 * B)
    cache.save(tokens, kv)
    drop_block(cache, spy, 1)
    assert cache.save(tokens, kv, start=cache.match(tokens)) == 2
    assert torch.equal(loaded(cache, tokens, spec), kv)


def test_a_block_lost_between_match_and_load_shortens_the_load(cache: KVCache, spy: SpyStore, spec: KVSpec) -> None:
    B = cache.block_tokens
    tokens, kv = tokens_of(3 * B), exact_kv(spec, 3 * B)
    cache.save(tokens, kv)
    found = cache.match(tokens)
    drop_block(cache, spy, 1)
    out = blank(spec, found)
    assert cache.load(tokens, 0, found, out) == B
    assert torch.equal(out[:, :, :, :B], kv[:, :, :, :B])


def other_byte(value: bytes, at: int) -> bytes:
    return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]


DAMAGES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "a changed byte": lambda value, following: other_byte(value, len(value) - 1),
    "a lost end": lambda value, following: value[:-8],
    "nothing": lambda value, following: b"",
    "another block": lambda value, following: following,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_block_is_a_miss_and_never_wrong_kv(cache: KVCache, spy: SpyStore, spec: KVSpec, damage: str) -> None:
    B = cache.block_tokens
    tokens, kv = tokens_of(4 * B), exact_kv(spec, 4 * B)
    cache.save(tokens, kv)
    key = spy.put_keys[1]
    value, following = (bytes(found) for found in spy.inner.get_many(spy.put_keys[1:3]) if found is not None)
    spy.inner.put_many([key], [DAMAGES[damage](value, following)])
    forget_in_host(cache, key)
    assert torch.equal(loaded(cache, tokens, spec, 0, 4 * B), kv[:, :, :, :B])
    stats = cache.stats()
    assert (stats.requested, stats.hits, stats.misses.total(), stats.misses["gap"]) == (4, 1, 3, 2)


# --- what is shared, and what is not ------------------------------------------------------------
def test_another_model_shares_nothing(cache_kind: CacheKind, cache: KVCache, spy: SpyStore, spec: KVSpec) -> None:
    B = cache.block_tokens
    other = cache_kind.cache(spy, small_spec(model=1))
    cache.save(tokens_of(2 * B), exact_kv(spec, 2 * B))
    assert other.match(tokens_of(2 * B)) == 0
    assert other.load(tokens_of(2 * B), 0, 2 * B, blank(spec, 2 * B)) == 0
    assert other.save(tokens_of(2 * B), exact_kv(spec, 2 * B, seed=9)) == 2
    assert len(set(spy.put_keys)) == 4
    assert torch.equal(loaded(cache, tokens_of(2 * B), spec), exact_kv(spec, 2 * B))


def test_a_cache_of_the_same_model_shares_everything(
    cache_kind: CacheKind, cache: KVCache, spy: SpyStore, spec: KVSpec
) -> None:
    B = cache.block_tokens
    cache.save(tokens_of(2 * B), exact_kv(spec, 2 * B))
    assert torch.equal(loaded(cache_kind.cache(spy, small_spec()), tokens_of(2 * B), spec), exact_kv(spec, 2 * B))


@pytest.mark.parametrize("changes", [{"salt": b"tenant two"}, {"block_tokens": 32}], ids=["salt", "block size"])
def test_another_salt_or_block_size_shares_nothing(
    set_cache_kind: CacheKind, spec: KVSpec, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    check_that_nothing_is_shared(set_cache_kind, spec, changes, request)


OTHER_PRECISION = {"fp32": "fp16", "fp16": "bf16", "bf16": "fp32"}


def test_another_precision_shares_nothing(
    own_cache_kind: CacheKind, spec: KVSpec, request: pytest.FixtureRequest
) -> None:
    changes = {"precision": OTHER_PRECISION[own_cache_kind.settings["precision"]]}
    check_that_nothing_is_shared(own_cache_kind, spec, changes, request)


def check_that_nothing_is_shared(
    kind: CacheKind, spec: KVSpec, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Two caches over one store, one of them with other settings, keep the same tokens apart."""
    with kind.backing.store(request) as store:
        own = kind.cache(store, spec)
        other = kind.cache(store, spec, **changes)
        kv = exact_kv(spec, 128)
        own.save(tokens_of(128), kv)
        assert other.match(tokens_of(128)) == 0
        assert other.load(tokens_of(128), 0, 128, blank(spec, 128)) == 0
        other.save(tokens_of(128), -kv)
        assert torch.equal(loaded(own, tokens_of(128), spec), kv)
        assert torch.equal(loaded(other, tokens_of(128), spec), -kv)


def test_compression_is_no_part_of_identity(
    own_cache_kind: CacheKind, spec: KVSpec, request: pytest.FixtureRequest
) -> None:
    with own_cache_kind.backing.store(request) as store:
        own = own_cache_kind.cache(store, spec)
        other = own_cache_kind.cache(store, spec, compress=not own_cache_kind.settings["compress"])
        own.save(tokens_of(128), exact_kv(spec, 128))
        assert torch.equal(loaded(other, tokens_of(128), spec), exact_kv(spec, 128))


# --- counters -----------------------------------------------------------------------------------
def test_every_block_asked_for_is_counted_once(cache: KVCache, spec: KVSpec) -> None:
    B = cache.block_tokens
    assert cache.stats().hit_rate == 0
    tokens = tokens_of(2 * B)
    loaded(cache, tokens, spec, 0, 2 * B)
    cache.save(tokens, exact_kv(spec, 2 * B))
    loaded(cache, tokens, spec, 0, 2 * B)
    loaded(cache, tokens, spec, B, 2 * B)
    loaded(cache, tokens, spec, B, B)
    stats = cache.stats()
    assert (stats.requested, stats.hits, stats.misses) == (5, 3, Counter(absent=1, gap=1))
    assert stats.hit_rate == 3 / 5
    assert (stats.stored, stats.drops) == (2, Counter())
    assert stats.bytes_written > 0
    assert (stats.bytes_read > stats.bytes_written) == (sum(stats.sources.values()) == stats.sources["store"])


def test_match_and_save_request_nothing(cache: KVCache, spec: KVSpec) -> None:
    B = cache.block_tokens
    cache.save(tokens_of(B), exact_kv(spec, B))
    cache.match(tokens_of(B))
    assert cache.stats().requested == 0


def test_stats_are_a_copy(cache: KVCache, spec: KVSpec) -> None:
    B = cache.block_tokens
    loaded(cache, tokens_of(B), spec, 0, B)
    stats = cache.stats()
    stats.requested, stats.misses["absent"] = 99, 99
    assert (cache.stats().requested, cache.stats().misses) == (1, Counter(absent=1))


def test_a_closed_store_makes_misses_and_drops(cache: KVCache, spy: SpyStore, spec: KVSpec) -> None:
    B = cache.block_tokens
    tokens, kv = tokens_of(2 * B), exact_kv(spec, 2 * B)
    cache.save(tokens, kv)
    assert cache.health().ok
    spy.close()
    inside = 2 if isinstance(cache, TieredCache) and cache.host.capacity else 0  # these blocks are there all the same
    assert cache.match(tokens) == inside * B
    assert cache.load(tokens, 0, 2 * B, out := blank(spec, 2 * B)) == inside * B
    assert torch.equal(out[:, :, :, : inside * B], kv[:, :, :, : inside * B])
    assert cache.save(tokens, kv) == inside
    assert (cache.stats().requested, cache.stats().hits) == (2, inside)
    assert cache.stats().drops.total() == 2
    assert not cache.health().ok


# --- wrong arguments ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("start", "stop"), [(1, 2), (0, 1), (2, 1), (-1, 1), (0, 4), (3, 4), (-2, -1)], ids=lambda x: f"{x}"
)
def test_positions_that_do_not_fit_are_refused(cache: KVCache, spec: KVSpec, start: int, stop: int) -> None:
    """Positions are in half blocks here; the request is of three halves."""
    half = cache.block_tokens // 2
    begin, end = start * half, stop * half
    with pytest.raises(InputError):
        cache.load(tokens_of(3 * half), begin, end, blank(spec, max(0, end - begin)))


@pytest.mark.parametrize("axis", range(5))
@pytest.mark.parametrize("call", ["load", "save"])
def test_a_tensor_of_another_shape_is_refused(cache: KVCache, spec: KVSpec, axis: int, call: str) -> None:
    B = cache.block_tokens
    shape = list(exact_kv(spec, B).shape)
    shape[axis] += 1
    with pytest.raises(InputError, match=r"expected .*got"):
        run_call(cache, call, tokens_of(B), torch.zeros(shape))


@pytest.mark.parametrize("call", ["load", "save"])
def test_a_tensor_of_integers_or_fewer_axes_is_refused(cache: KVCache, spec: KVSpec, call: str) -> None:
    B = cache.block_tokens
    for wrong in (exact_kv(spec, B).int(), exact_kv(spec, B)[0]):
        with pytest.raises(InputError):
            run_call(cache, call, tokens_of(B), wrong)


@pytest.mark.parametrize("call", ["match", "load", "save"])
@pytest.mark.parametrize("bad", [-1, 2**32, 0.5, "a", None, True], ids=repr)
def test_tokens_that_are_none_are_refused(cache: KVCache, spec: KVSpec, call: str, bad: Any) -> None:
    B = cache.block_tokens
    tokens = [bad] * B
    with pytest.raises(InputError, match="expected tokens"):
        run_call(cache, call, tokens, exact_kv(spec, B))


def run_call(cache: KVCache, call: str, tokens: Any, kv: Tensor) -> None:
    """One of the three calls, on the whole request."""
    if call == "match":
        cache.match(tokens)
    elif call == "load":
        cache.load(tokens, 0, len(tokens), kv)
    else:
        cache.save(tokens, kv)


def test_a_refused_call_counts_nothing(cache: KVCache, spec: KVSpec) -> None:
    before = cache.stats()
    B = cache.block_tokens
    for call in ("load", "save"):
        with pytest.raises(InputError):
            run_call(cache, call, tokens_of(B), exact_kv(spec, B)[0])
    assert cache.stats() == before


# --- precision ----------------------------------------------------------------------------------
TORCH_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def test_values_are_rounded_as_torch_rounds(
    own_cache_kind: CacheKind, spec: KVSpec, request: pytest.FixtureRequest
) -> None:
    kv = torch.randn(exact_kv(spec, 128).shape, generator=torch.Generator().manual_seed(4))
    with own_cache_kind.backing.store(request) as store:
        cache = own_cache_kind.cache(store, spec)
        cache.save(tokens_of(128), kv)
        rounded = kv.to(TORCH_TYPES[own_cache_kind.settings["precision"]]).float()
        assert torch.equal(loaded(cache, tokens_of(128), spec), rounded)


@pytest.mark.parametrize("compress", [False, True])
def test_values_beyond_fp16_drop_their_block_and_those_after_it(spec: KVSpec, compress: bool) -> None:
    cache = DistributedKVCache(precision="fp16", compress=compress, store=MemoryStore(), model=spec, block_tokens=16)
    kv = exact_kv(spec, 64)
    kv[1, 0, 1, 20, 2] = 70000.0
    assert cache.save(tokens_of(64), kv) == 1
    stats = cache.stats()
    assert (stats.stored, stats.drops) == (1, Counter(overflow=3))
    assert cache.match(tokens_of(64)) == 16
    assert torch.equal(loaded(cache, tokens_of(64), spec), kv[:, :, :, :16])


def test_infinities_of_the_model_itself_are_kept(spec: KVSpec) -> None:
    cache = DistributedKVCache(precision="fp16", store=MemoryStore(), model=spec, block_tokens=16)
    kv = exact_kv(spec, 16)
    kv[0, 0, 0, 0, 0], kv[0, 0, 0, 1, 0] = torch.inf, -torch.inf
    assert cache.save(tokens_of(16), kv) == 1
    assert torch.equal(loaded(cache, tokens_of(16), spec), kv)


# --- settings -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precision": "fp8"}, "expected one of the precisions fp32, fp16, bf16, int8, int4, got 'fp8'"),
        ({"ttl_seconds": -1}, "TTL .* above 0"),
        ({"ttl_seconds": 0}, "TTL .* above 0"),
        ({"ttl_seconds": 5, "store": MemoryStore()}, "a TTL of its own"),
        ({"block_tokens": 0}, "whole number in 1"),
        ({"block_tokens": -16}, "whole number in 1"),
        ({"store": "http://localhost"}, "store URL"),
        ({"store": ""}, "URL"),
        ({"redis_host": ""}, "host"),
        ({"redis_host": "localhost", "redis_port": 99999}, "redis_port of 1 … 65535"),
        ({"redis_host": "localhost", "redis_port": "port"}, "redis_port of 1 … 65535, got str"),
        ({"redis_host": "localhost", "redis_port": 0}, "redis_port"),
        ({"redis_host": "localhost", "store": "redis://localhost"}, "at most one"),
        ({"ttl_seconds": 1e30}, "TTL .* at most"),
        ({"ttl_seconds": "x"}, "TTL .* got str"),
        ({"block_tokens": True}, "whole number"),
        ({"block_tokens": "16"}, "whole number"),
        ({"block_tokens": 1.5}, "whole number"),
        ({"block_tokens": 2**32}, "whole number"),
        ({"salt": None}, "salt as text or bytes"),
        ({"salt": 5}, "salt as text or bytes"),
        ({"salt": "\ud800"}, "salt that can be encoded as UTF-8"),
        ({"model": "x"}, "a loaded Llama or a KVSpec"),
        ({"store": "x"}, "store URL"),
        ({"store": 5}, "a URL or a kvlab.stores.Store"),
        ({"redis_port": 7000}, "redis_host"),
        ({"encryption_key_id": 3}, "encryption_keys"),
        ({"block_tokens": 16}, "expected model="),
        ({"compress": "lz4"}, "expected one of the codecs raw, gzip, zstd"),
        ({"redis_host": "localhost", "store": MemoryStore()}, "at most one"),
    ],
    ids=lambda x: " ".join(f"{k}={v}" for k, v in x.items() if k != "store") if isinstance(x, dict) else "",
)
def test_settings_that_cannot_work_are_refused_at_once(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DistributedKVCache(**settings)


@pytest.mark.parametrize(("long", "short"), [("float32", "fp32"), ("float16", "fp16"), ("bfloat16", "bf16")])
def test_both_names_of_a_precision_are_one(long: str, short: str, spec: KVSpec) -> None:
    store = MemoryStore()
    DistributedKVCache(precision=long, store=store, model=spec).save(tokens_of(64), exact_kv(spec, 64))
    assert DistributedKVCache(precision=short, store=store, model=spec).match(tokens_of(64)) == 64


def test_token_calls_without_a_model_say_what_is_missing(spec: KVSpec) -> None:
    cache = DistributedKVCache(store=MemoryStore())
    for call in ("match", "load", "save"):
        with pytest.raises(ConfigError, match="model="):
            run_call(cache, call, tokens_of(64), exact_kv(spec, 64))
    with pytest.raises(ConfigError, match="model="):
        cache.block_tokens  # noqa: B018


@pytest.mark.parametrize(
    ("layers", "heads", "head_dim", "precision", "expected"),
    [
        (6, 2, 64, "fp32", 64),  # the shipped model: 6 KiB a token
        (32, 8, 64, "fp32", 16),  # 128 KiB a token: even 16 tokens are beyond 1 MiB
        (32, 8, 64, "fp16", 16),
        (16, 4, 64, "fp32", 32),  # 32 KiB a token
        (16, 4, 64, "fp16", 64),
        (16, 4, 65, "fp32", 16),  # 32.5 KiB: 32 tokens are just beyond
    ],
)
def test_the_default_block_is_the_largest_record_within_a_mebibyte(
    layers: int, heads: int, head_dim: int, precision: str, expected: int
) -> None:
    spec = KVSpec(layers, heads, head_dim, torch.float32, bytes(32))
    assert DistributedKVCache(precision=precision, model=spec).block_tokens == expected
