"""`save` does not send what is there already, and that never keeps a damaged block alive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from kvlab.cache import DistributedKVCache
from kvlab.core.keys import Namespace
from kvlab.stores import MemoryStore, RedisStore, WriteBehind
from tests.harness.helpers import SpyStore, blank, exact_kv, flipped, small_spec, tampered

B, BLOCKS = 16, 6
SPEC = small_spec()
TOKENS = list(range(B * BLOCKS))
KV = exact_kv(SPEC, B * BLOCKS)
KEYS = Namespace(SPEC.fingerprint, "fp32", b"", B).keys(TOKENS)


@pytest.fixture
def spy() -> SpyStore:
    return SpyStore(MemoryStore())


def over(store: SpyStore) -> DistributedKVCache:
    return DistributedKVCache(precision="fp32", store=store, model=SPEC, block_tokens=B)


def blocks_loaded(cache: DistributedKVCache, start: int = 0) -> int:
    out = blank(SPEC, B * BLOCKS - start)
    stop = cache.load(TOKENS, start, B * BLOCKS, out)
    assert torch.equal(out[:, :, :, : stop - start], KV[:, :, :, start:stop])
    return stop // B


def damage(spy: SpyStore, i: int) -> None:
    (value,) = spy.inner.get_many([KEYS[i]])
    spy.inner.put_many([KEYS[i]], [flipped(value, len(value) - 1)])


def test_what_is_there_is_not_sent_again(spy: SpyStore) -> None:
    first, second = over(spy), over(spy)
    assert first.save(TOKENS, KV) == BLOCKS
    assert second.save(TOKENS, KV) == BLOCKS
    assert spy.put_keys == KEYS
    assert (second.stats().stored, second.stats().kept, second.stats().bytes_written) == (0, BLOCKS, 0)


def test_only_the_holes_are_filled(spy: SpyStore) -> None:
    cache = over(spy)
    cache.save(TOKENS, KV)
    spy.delete_many([KEYS[1], KEYS[4]])
    spy.put_keys.clear()
    assert blocks_loaded(cache) == 1
    assert cache.save(TOKENS, KV, start=B) == BLOCKS - 1
    assert spy.put_keys == [KEYS[1], KEYS[4]]
    assert blocks_loaded(cache) == BLOCKS


@pytest.mark.parametrize("damaged", [[0], [2], [2, 3, 5], list(range(BLOCKS))])
def test_one_save_repairs_all_that_a_load_found_or_could_not_look_at(spy: SpyStore, damaged: list[int]) -> None:
    cache = over(spy)
    cache.save(TOKENS, KV)
    for i in damaged:
        damage(spy, i)
    spy.put_keys.clear()
    assert blocks_loaded(cache) == damaged[0]
    assert cache.save(TOKENS, KV, start=damaged[0] * B) == BLOCKS - damaged[0]
    assert spy.put_keys == KEYS[damaged[0] :]
    assert blocks_loaded(over(spy)) == BLOCKS
    spy.put_keys.clear()
    assert cache.save(TOKENS, KV) == BLOCKS and spy.put_keys == []


def test_a_save_that_was_dropped_leaves_the_repair_to_the_next(spy: SpyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = over(spy)
    cache.save(TOKENS, KV)
    damage(spy, 0)
    (bad,) = spy.inner.get_many([KEYS[0]])
    assert blocks_loaded(cache) == 0
    with monkeypatch.context() as patch:
        patch.setattr(spy, "put_many", lambda keys, values: 0)
        assert cache.save(TOKENS, KV) == 0
    spy.inner.put_many([KEYS[0]], [bad])  # say, another reader with the damaged value in flight
    assert cache.save(TOKENS, KV) == BLOCKS
    assert blocks_loaded(cache) == BLOCKS


@pytest.mark.parametrize("make", [lambda: RedisStore(), lambda: WriteBehind(RedisStore())], ids=["redis", "behind"])
def test_a_value_that_no_reader_takes_is_replaced_too(make: Callable[[], RedisStore]) -> None:
    store = make()
    cache = DistributedKVCache(precision="fp32", store=store, model=SPEC, block_tokens=B)
    cache.save(TOKENS, KV)
    store.put_many([KEYS[1]], [bytes(1 << 20)])
    assert blocks_loaded(cache) == 1
    assert cache.stats().misses == Counter(too_big=1, gap=BLOCKS - 2)
    assert cache.save(TOKENS, KV, start=B) == BLOCKS - 1
    assert blocks_loaded(cache) == BLOCKS
    cache.close()


def test_the_whole_chain_lives_on_when_only_its_end_is_used() -> None:
    now = [0.0]
    store = MemoryStore(ttl_s=100, clock=lambda: now[0])
    cache = DistributedKVCache(precision="fp32", store=store, model=SPEC, block_tokens=B)
    cache.save(TOKENS, KV)
    for _ in range(5):
        now[0] += 60
        assert blocks_loaded(cache, start=(BLOCKS - 1) * B) == BLOCKS
    now[0] += 60
    cache.save(TOKENS, KV, start=(BLOCKS - 1) * B)
    now[0] += 60
    assert blocks_loaded(cache) == BLOCKS


def test_the_list_of_suspects_is_bounded(spy: SpyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlab.cache.distributed.MAX_SUSPECTS", 2)
    cache = over(spy)
    cache.save(TOKENS, KV)
    values = spy.inner.get_many(KEYS)
    spy.inner.put_many(KEYS, [tampered(value, 4, b"\x02") for value in values])  # of a version that nobody removes
    for done in range(0, BLOCKS, 2):  # those that were forgotten are found by the next load
        assert blocks_loaded(cache) == done
        cache.save(TOKENS, KV, start=done * B)
    assert blocks_loaded(cache) == BLOCKS
