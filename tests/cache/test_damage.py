"""Damaged, foreign and forged records through the cache: a miss with its reason, and who may remove what."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvlab.cache import DistributedKVCache
from kvlab.core import record
from kvlab.core.codecs import CODECS
from kvlab.core.keys import Namespace, text_key
from kvlab.core.precisions import PRECISIONS
from kvlab.core.record import Format
from kvlab.core.seals import AesGcm
from kvlab.errors import ConfigError
from kvlab.stores import MemoryStore, RedisStore, Store
from tests.harness.helpers import KEY, blank, encoded, exact_kv, flipped, small_spec, tampered

SPEC = small_spec()
B = 16
TOKENS = list(range(3 * B))
KV = exact_kv(SPEC, 3 * B)
K, V = KV[0, 0], KV[0, 1]
SHAPE = (2, 2, 2, B, 4)
KEYS = {i: bytes([i]) * 32 for i in (1, 2, 3)}
TEXT = "a text"

Change = Callable[[bytes], bytes]


def made(store: Store | None = None, **options: Any) -> DistributedKVCache:
    options = {"precision": "fp32", "compress": False, "model": SPEC, "block_tokens": B, **options}
    return DistributedKVCache(store=MemoryStore() if store is None else store, **options)


def filled(**options: Any) -> DistributedKVCache:
    """A cache that holds three blocks and one text."""
    cache = made(**options)
    assert cache.save(TOKENS, KV) == 3
    assert cache.cache_kv(TEXT, 0, K, V)
    return cache


def block_keys(cache: DistributedKVCache, salt: bytes = b"") -> list[bytes]:
    return Namespace(SPEC.fingerprint, cache.format.precision, salt, B).keys(TOKENS)


def key_of_text(cache: DistributedKVCache, salt: bytes = b"") -> bytes:
    return text_key(TEXT, 0, cache.format.precision, salt, SPEC.fingerprint)


def stored(store: Store, key: bytes) -> bytes:
    value = store.get_many([key])[0]
    assert isinstance(value, bytes)
    return value


def change(store: Store, key: bytes, how: Change) -> bytes:
    """Put a changed value in the place of the stored one."""
    value = how(stored(store, key))
    assert store.put_many([key], [value]) == 1
    return value


def loaded(cache: DistributedKVCache, tokens: int = 3 * B) -> tuple[int, Tensor]:
    out = blank(SPEC, tokens)
    return cache.load(TOKENS[:tokens], 0, tokens, out), out


def checked(cache: DistributedKVCache) -> Counter[str]:
    """The misses by reason, after the sums are found right; reasons that never came up left out."""
    cache.stats().check()
    cache.store.stats().check()
    return +cache.stats().misses


def flip_at(offset: int) -> Change:
    return lambda value: flipped(value, offset)


def put_at(offset: int, new: bytes) -> Change:
    """Changed with a checksum made to fit: what another writer may have written, not an accident."""
    return lambda value: tampered(value, offset, new)


def overwritten(offset: int, new: bytes) -> Change:
    return lambda value: value[:offset] + new + value[offset + len(new) :]


DAMAGED: dict[str, Change] = {
    "first payload byte": flip_at(128),
    "last payload byte": flip_at(-1 + 128 + 4 * 2 * 2 * 2 * B * 4),
    "checksum": flip_at(96),
    "zeros of the seal": flip_at(110),
    "kind": flip_at(5),
    "codec": flip_at(6),
    "precision": flip_at(7),
    "dtype": flip_at(8),
    "dims": flip_at(16),
    "key": flip_at(70),
    "all zeros": lambda value: value[:128] + bytes(len(value) - 128),
}
FOREIGN: dict[str, tuple[Change, str]] = {
    "newer version": (put_at(4, b"\2"), "version"),
    "other magic": (put_at(0, b"KVL2"), "magic"),
    "key id": (put_at(12, b"\1"), "key_id"),
    "seal aes-gcm": (put_at(9, b"\2"), "key_id"),
    "seal of the future": (put_at(9, b"\3"), "key_id"),
    "other precision": (put_at(7, b"\2"), "precision"),
    "precision of the future": (put_at(7, b"\6"), "precision"),
    "codec of the future": (put_at(6, b"\3"), "codec"),
    "codec that does not fit": (put_at(6, b"\2"), "codec"),
    "text kind": (put_at(5, b"\2"), "kind"),
    "kind of the future": (put_at(5, b"\3"), "kind"),
    "other dims": (put_at(16, struct.pack("<5I", 2, 2, 2, 4, B)), "dims"),
    "dtype of the future": (put_at(8, b"\4"), "dims"),
    "other key": (put_at(64, bytes(32)), "key"),
    "cut short": (lambda value: value[:-1], "length"),
    "longer": (lambda value: value + b"\0", "length"),
    "header only": (lambda value: value[:128], "length"),
    "cut header": (lambda value: value[:100], "length"),
    "empty": (lambda value: b"", "length"),
    "something else": (lambda value: b"<html>" * 100, "magic"),
}


# --- token calls ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_block_is_a_miss_and_is_removed(name: str) -> None:
    cache = filled()
    keys = block_keys(cache)
    change(cache.store, keys[1], DAMAGED[name])
    stop, out = loaded(cache)
    assert stop == B and torch.equal(out[:, :, :, :B], KV[:, :, :, :B])
    assert checked(cache) == Counter(checksum=1, gap=1)
    assert cache.store.probe([keys[1]]) == 0
    assert cache.store.probe([keys[0]]) == cache.store.probe([keys[2]]) == 1
    assert cache.match(TOKENS) == B
    assert loaded(cache)[0] == B
    assert checked(cache) == Counter(checksum=1, absent=1, gap=2)
    assert cache.save(TOKENS, KV, start=B) == 2
    stop, out = loaded(cache)
    assert stop == 3 * B and torch.equal(out, KV)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_block_that_this_reader_cannot_use_is_a_miss_and_stays(name: str) -> None:
    how, reason = FOREIGN[name]
    cache = filled()
    keys = block_keys(cache)
    value = change(cache.store, keys[1], how)
    stop, out = loaded(cache)
    assert stop == B and torch.equal(out[:, :, :, :B], KV[:, :, :, :B])
    assert checked(cache) == Counter({reason: 1, "gap": 1})
    assert stored(cache.store, keys[1]) == value


def test_a_block_under_the_key_of_another_is_a_miss_and_stays() -> None:
    cache = filled()
    keys = block_keys(cache)
    value = stored(cache.store, keys[2])
    cache.store.put_many([keys[0]], [value])
    assert loaded(cache)[0] == 0
    assert checked(cache) == Counter(key=1, gap=2)
    assert stored(cache.store, keys[0]) == value


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("keys", [None, KEYS], ids=["xxh3", "aes"])
def test_damage_is_found_in_every_format(precision: str, codec: str, keys: dict[int, bytes] | None) -> None:
    cache = filled(precision=precision, compress=codec, encryption_keys=keys)
    first = block_keys(cache)[0]
    change(cache.store, first, flip_at(150))
    assert loaded(cache)[0] == 0
    assert checked(cache) == Counter({"forged" if keys else "checksum": 1, "gap": 2})
    assert cache.store.probe([first]) == (1 if keys else 0)  # a wrong master key makes every record look forged


@given(st.data())
def test_no_change_of_stored_bytes_gives_a_wrong_tensor_or_an_error(data: st.DataObject) -> None:
    options = data.draw(st.sampled_from([{}, {"compress": "zstd"}, {"compress": "gzip"}, {"encryption_keys": KEYS}]))
    cache = filled(**options)
    victim = data.draw(st.integers(0, 2))
    key = block_keys(cache)[victim]
    honest = stored(cache.store, key)
    value = bytearray(honest)
    for at in data.draw(st.lists(st.integers(0, len(value) - 1), max_size=5)):
        value[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(value)), st.integers(0, len(value))))
    cache.store.put_many([key], [bytes(value[:cut])])
    stop, out = loaded(cache)
    assert stop == (3 * B if bytes(value[:cut]) == honest else victim * B)
    assert torch.equal(out[:, :, :, :stop], KV[:, :, :, :stop])
    assert cache.stats().requested == 3 and checked(cache).total() == 3 - stop // B


# --- text calls -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_text_is_a_miss_and_is_removed(name: str) -> None:
    cache = filled()
    change(cache.store, key_of_text(cache), DAMAGED[name] if "last" not in name else flip_at(200))
    assert cache.get_cached_kv(TEXT, 0) is None
    assert checked(cache) == Counter(checksum=1)
    assert cache.store.probe([key_of_text(cache)]) == 0


TEXT_FOREIGN = {name: case for name, case in FOREIGN.items() if name not in ("text kind", "other dims")} | {
    "block kind": (put_at(5, b"\1"), "kind"),
    "dims of another size": (put_at(16, struct.pack("<4I", 2, 2, 48, 5)), "codec"),
    "dims without two planes": (put_at(16, struct.pack("<4I", 4, 1, 48, 4)), "dims"),
    "dims beyond what is allowed": (put_at(16, struct.pack("<4I", 2, 2**15, 2**15, 4)), "overflow"),
}


@pytest.mark.parametrize("name", TEXT_FOREIGN)
def test_a_text_that_this_reader_cannot_use_is_a_miss_and_stays(name: str) -> None:
    how, reason = TEXT_FOREIGN[name]
    cache = filled()
    value = change(cache.store, key_of_text(cache), how)
    assert cache.get_cached_kv(TEXT, 0) is None
    assert checked(cache) == Counter({reason: 1})
    assert stored(cache.store, key_of_text(cache)) == value


# --- encryption -------------------------------------------------------------------------------------
def test_encryption_works_for_tokens_and_texts() -> None:
    cache = filled(encryption_keys=KEYS, salt="tenant")
    stop, out = loaded(cache)
    assert stop == 3 * B and torch.equal(out, KV)
    got = cache.get_cached_kv(TEXT, 0)
    assert got is not None and torch.equal(got[0], K) and torch.equal(got[1], V)
    assert checked(cache) == Counter()
    for key in (*block_keys(cache, b"tenant"), key_of_text(cache, b"tenant")):
        value = stored(cache.store, key)
        assert value[9] == 2 and value[12:16] == struct.pack("<I", 3)
    plain = KV[:, :, :, :B].contiguous().numpy().tobytes()
    assert plain[:8] not in stored(cache.store, block_keys(cache, b"tenant")[0])


def test_keys_that_do_not_work_are_refused_when_the_cache_is_made() -> None:
    for keys in ({}, {1: b"short"}, {0: KEYS[1]}, {2**32: KEYS[1]}, {1: "k" * 32}):
        with pytest.raises(ConfigError, match="master keys"):
            made(encryption_keys=keys)


@pytest.mark.parametrize("keys", [None, KEYS], ids=["xxh3", "aes"])
def test_another_tenant_finds_nothing(keys: dict[int, bytes] | None) -> None:
    cache = filled(encryption_keys=keys, salt="one")
    other = made(cache.store, encryption_keys=keys, salt="two")
    assert other.match(TOKENS) == 0 and loaded(other)[0] == 0
    assert other.get_cached_kv(TEXT, 0) is None
    assert checked(other) == Counter(absent=2, gap=2)
    assert loaded(cache)[0] == 3 * B


def test_a_record_moved_to_another_tenant_is_forged_and_stays() -> None:
    cache = filled(encryption_keys=KEYS, salt="one")
    other = made(cache.store, encryption_keys=KEYS, salt="two")
    key = block_keys(cache, b"two")[0]
    value = stored(cache.store, block_keys(cache, b"one")[0])
    for moved in (value, value[:64] + key + value[96:]):
        cache.store.put_many([key], [moved])
        assert loaded(other)[0] == 0
        assert stored(cache.store, key) == moved
    assert checked(other) == Counter(forged=2, gap=4)
    assert loaded(cache)[0] == 3 * B


def test_a_record_moved_to_another_key_of_the_same_tenant_is_a_miss() -> None:
    cache = filled(encryption_keys=KEYS)
    first, second, _ = block_keys(cache)
    value = stored(cache.store, first)
    cache.store.put_many([second], [value])
    assert loaded(cache)[0] == B
    assert checked(cache) == Counter(key=1, gap=1)
    cache.store.put_many([second], [value[:64] + second + value[96:]])
    assert loaded(cache)[0] == B
    assert checked(cache) == Counter(key=1, forged=1, gap=2)
    assert cache.store.probe([second]) == 1


@pytest.mark.parametrize("offset", [5, 6, 7, 8, 10, 11, 16, 60, 70, 96, 108, 124, 128, 300])
def test_a_forged_record_is_a_miss_until_the_next_save(offset: int) -> None:
    cache = filled(encryption_keys=KEYS)
    key = block_keys(cache)[0]
    change(cache.store, key, flip_at(offset))
    change(cache.store, key_of_text(cache), flip_at(offset))
    assert loaded(cache)[0] == 0
    assert cache.get_cached_kv(TEXT, 0) is None
    assert checked(cache) == Counter(forged=2, gap=2)
    assert cache.store.probe([key]) == cache.store.probe([key_of_text(cache)]) == 1
    assert cache.save(TOKENS, KV) == 3
    assert loaded(cache)[0] == 3 * B


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (overwritten(4, b"\2"), "version"),
        (overwritten(9, b"\1"), "key_id"),
        (overwritten(9, b"\3"), "key_id"),
        (overwritten(12, struct.pack("<I", 4)), "key_id"),
        (overwritten(12, bytes(4)), "key_id"),
        (lambda value: value[:-1], "length"),
    ],
)
def test_an_encrypted_record_that_this_reader_cannot_use_stays(how: Change, reason: str) -> None:
    cache = filled(encryption_keys=KEYS)
    key = block_keys(cache)[0]
    value = change(cache.store, key, how)
    assert loaded(cache)[0] == 0
    assert checked(cache) == Counter({reason: 1, "gap": 2})
    assert stored(cache.store, key) == value


@pytest.mark.parametrize(("wrote", "reads"), [(None, KEYS), (KEYS, None), ({1: KEYS[1]}, {2: KEYS[2]})])
def test_a_reader_with_other_keys_or_none_misses_and_removes_nothing(wrote: Any, reads: Any) -> None:
    cache = filled(encryption_keys=wrote)
    reader = made(cache.store, encryption_keys=reads)
    assert loaded(reader)[0] == 0
    assert reader.get_cached_kv(TEXT, 0) is None
    assert checked(reader) == Counter(key_id=2, gap=2)
    stop, out = loaded(cache)
    assert stop == 3 * B and torch.equal(out, KV)
    assert cache.get_cached_kv(TEXT, 0) is not None


def test_keys_rotate_with_one_miss_a_record() -> None:
    """While both keys are known everything hits; records of a key that was taken away are replaced when missed."""
    old = filled(encryption_keys={1: KEYS[1]})
    during = made(old.store, encryption_keys={1: KEYS[1], 2: KEYS[2]})
    stop, out = loaded(during)
    assert stop == 3 * B and torch.equal(out, KV)
    assert during.save(TOKENS, KV) == during.stats().kept == 3
    assert checked(during) == Counter()
    after = made(old.store, encryption_keys={2: KEYS[2]})
    assert loaded(after)[0] == 0
    assert after.get_cached_kv(TEXT, 0) is None
    assert checked(after) == Counter(key_id=2, gap=2)
    assert after.save(TOKENS, KV) == after.stats().stored == 3
    assert {stored(old.store, key)[12:16] for key in block_keys(old)} == {struct.pack("<I", 2)}
    assert loaded(after)[0] == loaded(during)[0] == 3 * B


# --- tensors that are held on to ----------------------------------------------------------------------
@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    made_here = MemoryStore() if request.param == "memory" else RedisStore("fakeredis://")
    yield made_here
    made_here.close()


@pytest.mark.parametrize("compress", [False, "zstd"])
@pytest.mark.parametrize("keys", [None, KEYS], ids=["xxh3", "aes"])
def test_tensors_keep_their_values_over_a_thousand_later_reads(
    store: Store, compress: bool | str, keys: dict[int, bytes] | None
) -> None:
    cache = made(store, compress=compress, encryption_keys=keys)
    pairs = [exact_kv(SPEC, B, seed)[0] for seed in range(20)]
    for i, pair in enumerate(pairs):
        assert cache.cache_kv(f"text {i}", 0, pair[0], pair[1])
    held = cache.get_cached_kv("text 0", 0)
    assert held is not None
    for n in range(1000):
        i = 1 + n % 19
        got = cache.get_cached_kv(f"text {i}", 0)
        assert got is not None and torch.equal(torch.stack(got), pairs[i])
    assert torch.equal(torch.stack(held), pairs[0])


@pytest.mark.parametrize("text", [False, True])
def test_writing_to_a_tensor_never_changes_what_the_store_holds(store: Store, text: bool) -> None:
    cache = filled(store=store)
    key = key_of_text(cache) if text else block_keys(cache)[0]
    before = bytes(bytearray(stored(store, key)))
    got = cache.get_cached_kv(TEXT, 0)
    assert got is not None
    for tensor in got:
        tensor.fill_(-1.0)
    out = loaded(cache)[1]
    out.fill_(-1.0)
    kind, shape = (record.KIND_TEXT, None) if text else (record.KIND_BLOCK, SHAPE)
    record.decode(stored(store, key), key, cache.format, shape, kind).fill_(-1.0)
    assert stored(store, key) == before
    again = cache.get_cached_kv(TEXT, 0)
    assert again is not None and torch.equal(again[0], K) and torch.equal(again[1], V)
    assert torch.equal(loaded(cache)[1], KV)


# --- no memory in common ------------------------------------------------------------------------------
BLOCK = exact_kv(SPEC, B)


def room_for(value: bytes, offset: int = 0) -> memoryview:
    """A writable copy that starts `offset` bytes after an address that is a multiple of 64."""
    room = np.zeros(len(value) + 128, np.uint8)
    start = -room.ctypes.data % 64 + offset
    room[start : start + len(value)] = np.frombuffer(value, np.uint8)
    return memoryview(room)[start : start + len(value)]


def lives_in(tensor: Tensor, view: memoryview) -> bool:
    first = np.frombuffer(view, np.uint8).ctypes.data
    return first <= tensor.data_ptr() < first + view.nbytes


READ = {  # precision, the tensor's dtype, and where in memory its record begins
    "fp32": (Format("fp32"), torch.float32, 0),
    "fp16": (Format("fp16"), torch.float16, 0),
    "bf16": (Format("bf16"), torch.bfloat16, 0),
    "aligned to its elements": (Format(), torch.float32, 4),
    "misaligned": (Format(), torch.float32, 2),
    "misaligned half": (Format("fp16"), torch.float16, 1),
    "other dtype": (Format("fp32"), torch.bfloat16, 0),
    "other precision": (Format("fp16"), torch.float32, 0),
    "gzip": (Format("fp32", "gzip"), torch.float32, 0),
    "zstd": (Format("fp32", "zstd"), torch.float32, 0),
    "int8": (Format("int8"), torch.float32, 0),
    "int4": (Format("int4"), torch.float32, 0),
    "aes-gcm": (Format("fp32", "raw", AesGcm(KEYS)), torch.float32, 0),
}


@pytest.mark.parametrize("into", [False, True], ids=["new tensor", "out"])
@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("name", READ)
def test_a_tensor_has_no_memory_in_common_with_the_bytes_it_was_read_from(
    name: str, read_only: bool, into: bool
) -> None:
    fmt, dtype, offset = READ[name]
    view = room_for(encoded(BLOCK.to(dtype), fmt), offset)
    right = record.decode(bytes(view), KEY, fmt, SHAPE)
    out = torch.empty(SHAPE, dtype=dtype) if into else None
    got = record.decode(view.toreadonly() if read_only else view, KEY, fmt, SHAPE, out=out)
    assert torch.equal(got, right) and got.dtype == dtype and (got is out) == into and not lives_in(got, view)
    before = bytes(view)
    got.fill_(-1.0)
    assert bytes(view) == before
    view[128:] = bytes(view.nbytes - 128)
    assert bool((got == -1.0).all())
