"""Records: golden files decode for ever, every tensor comes back, and nothing but an intact record is accepted."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvlab.cache import DistributedKVCache
from kvlab.core import codecs, record
from kvlab.core.record import BadRecord, Format, Unholdable
from kvlab.errors import ConfigError, InputError
from tests.core.make_golden import GOLDEN, GOLDEN_KEY, golden_tensor
from tests.helpers import exact_kv, flipped, joined, resealed, small_spec, tampered

KEY = bytes(range(32))
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CODECS = ("raw", "gzip")
FORMATS = [Format(p, c) for p in PRECISIONS for c in CODECS]
REASONS = {"magic", "version", "kind", "length", "dims", "precision", "codec", "key", "key_id", "checksum", "overflow"}
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.precision}-{f.codec}")


def encoded(tensor: Tensor, fmt: Format, **options: Any) -> bytes:
    return joined(record.encode(tensor, KEY, fmt, **options))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, NaN payloads and signs of zero included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(BITS[a.dtype]), b.contiguous().view(BITS[b.dtype]))


def reason_of(value: bytes, fmt: Format = Format(), shape: Any = None, key: bytes = KEY, **options: Any) -> str:  # noqa: B008
    """Why decoding refuses a value; fails if it does not."""
    with pytest.raises(BadRecord) as refused:
        record.decode(value, key, fmt, shape, **options)
    assert refused.value.reason in REASONS
    return refused.value.reason


# --- golden files -------------------------------------------------------------------------------
@every_format
def test_golden_records_decode_exactly(fmt: Format) -> None:
    value = (GOLDEN / f"{fmt.precision}-{fmt.codec}.bin").read_bytes()
    tensor = golden_tensor()
    assert same_bits(record.decode(value, GOLDEN_KEY, fmt, tuple(tensor.shape)), tensor)
    assert same_bits(record.decode(value, GOLDEN_KEY, fmt, None), tensor)


@every_format
def test_todays_records_have_the_golden_bytes(fmt: Format) -> None:
    """Headers, raw payloads and unpacked payloads. What gzip makes of them may differ by zlib version."""
    golden = (GOLDEN / f"{fmt.precision}-{fmt.codec}.bin").read_bytes()
    today = joined(record.encode(golden_tensor(), GOLDEN_KEY, fmt))
    if fmt.codec == "raw":
        assert today == golden
    else:
        assert today[:48] == golden[:48] and today[64:96] == golden[64:96]
        assert gzip.decompress(today[128:]) == gzip.decompress(golden[128:])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_golden_header_is_what_the_text_says(precision: str) -> None:
    """Field by field, from the table in `kvlab.core.record`."""
    value = (GOLDEN / f"{precision}-raw.bin").read_bytes()
    size = 4 if precision == "fp32" else 2
    ids = bytes([1, 1, 0, {"fp32": 1, "fp16": 2, "bf16": 3}[precision], 1, 1, 5, 0])
    assert value[:12] == b"KVL1" + ids
    assert value[12:48] == struct.pack("<9I", 0, 2, 2, 1, 4, 3, 0, 0, 0)
    assert value[48:64] == struct.pack("<QQ", 48 * size, 0)
    assert value[64:96] == GOLDEN_KEY
    assert value == resealed(value)
    assert len(value) == 128 + 48 * size


def test_the_golden_payload_is_little_endian() -> None:
    payload = (GOLDEN / "fp32-raw.bin").read_bytes()[128:]
    assert payload == struct.pack("<48f", *[(i - 24) / 8 for i in range(48)])
    half = (GOLDEN / "fp16-raw.bin").read_bytes()[128:]
    assert half == struct.pack("<48e", *[(i - 24) / 8 for i in range(48)])


# --- round trips --------------------------------------------------------------------------------
SPECIAL = [0.0, -0.0, 1.0, -1.0, 65504.0, -65504.0, 6e-8, 2**-24, 2**-25, 2**-149, 1e-40, float("inf"), float("-inf")]
INTEGERS = {torch.float32: np.uint32, torch.float16: np.uint16, torch.bfloat16: np.uint16}


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype | None = None) -> Tensor:
    """Any bits, NaN, infinities and denormals too, in any shape and strides. Of no or one element: below."""
    dtype = draw(st.sampled_from(list(INTEGERS))) if dtype is None else dtype
    shape = [draw(st.integers(2, 4)), *draw(st.lists(st.integers(1, 4), max_size=4))]
    count = int(np.prod([2 * n for n in shape]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    integer = INTEGERS[dtype]
    bits = rng.integers(0, np.iinfo(integer).max, count, dtype=integer, endpoint=True)
    whole = torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(dtype).reshape([2 * n for n in shape])
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=4)):
        whole.view(-1)[draw(st.integers(0, count - 1))] = value
    stepped = whole[tuple(slice(draw(st.integers(0, 1)), None, 2) for _ in shape)]
    return stepped.permute(draw(st.permutations(range(len(shape)))))


@given(tensors(torch.float32), st.sampled_from(CODECS))
def test_fp32_comes_back_bit_by_bit(tensor: Tensor, codec: str) -> None:
    value = encoded(tensor, Format("fp32", codec))
    got = record.decode(value, KEY, Format("fp32"), tuple(tensor.shape))
    assert same_bits(got, tensor)


@pytest.mark.parametrize("precision", PRECISIONS)
@given(tensor=tensors(), codec=st.sampled_from(CODECS))
def test_every_precision_rounds_as_torch_does(precision: str, tensor: Tensor, codec: str) -> None:
    """And a finite value that would become infinite is refused."""
    rounded = tensor.to(PRECISIONS[precision])
    fmt = Format(precision, codec)
    if bool(((rounded.isinf() | rounded.to(tensor.dtype).isinf()) & tensor.isfinite()).any()):
        with pytest.raises(Unholdable, match=precision):
            record.encode(tensor, KEY, fmt)
        return
    got = record.decode(encoded(tensor, fmt), KEY, fmt, None)
    assert got.dtype == tensor.dtype
    assert torch.equal(got.nan_to_num(nan=123.0), rounded.to(tensor.dtype).nan_to_num(nan=123.0))
    assert torch.equal(got.isnan(), tensor.isnan())


@given(tensors())
def test_the_native_precision_of_a_tensor_keeps_every_bit(tensor: Tensor) -> None:
    precision = next(p for p, dtype in PRECISIONS.items() if dtype == tensor.dtype)
    assert same_bits(record.decode(encoded(tensor, Format(precision)), KEY, Format(precision), None), tensor)


@given(tensors(torch.float32), st.sampled_from(FORMATS), st.sampled_from(list(BITS)), st.data())
def test_out_may_have_any_dtype_and_strides(
    tensor: Tensor, fmt: Format, dtype: torch.dtype, data: st.DataObject
) -> None:
    tensor = tensor.nan_to_num(nan=0.5, posinf=2.0, neginf=-2.0).clamp(-1000, 1000)
    order = data.draw(st.permutations(range(tensor.ndim)))
    room = torch.full([2 * tensor.shape[i] for i in order], -7.0, dtype=dtype)
    back = [order.index(i) for i in range(tensor.ndim)]
    out = room[tuple(slice(1, None, 2) for _ in order)].permute(back)
    got = record.decode(encoded(tensor, fmt), KEY, fmt, tuple(tensor.shape), out=out)
    assert got is out
    assert torch.equal(out, tensor.to(PRECISIONS[fmt.precision]).to(dtype))
    assert int((room == -7.0).sum()) >= room.numel() - out.numel()


DEGENERATE = {
    "one axis": torch.zeros(0),
    "sliced away": torch.zeros(4)[4:],
    "first axis": torch.zeros(0, 3),
    "middle axis": torch.zeros(2, 0, 3),
    "every axis": torch.zeros(0, 0, 0),
    "permuted": torch.zeros(2, 0, 3).permute(2, 0, 1),
    "stepped": torch.zeros(4, 0)[::2],
    "stepped and sliced": torch.zeros(6)[6::2],
    "expanded": torch.zeros(0, 1).expand(0, 5),
    "one element": torch.zeros(1, 1),
    "one element of a stride": torch.zeros(2)[1::2],
    "one element of a matrix": torch.zeros(4, 4)[3:, 3:],
}


@every_format
@pytest.mark.parametrize("name", DEGENERATE)
def test_tensors_of_no_or_one_element_come_back(fmt: Format, name: str) -> None:
    for dtype in PRECISIONS.values():
        tensor = DEGENERATE[name].to(dtype)
        got = record.decode(encoded(tensor, fmt), KEY, fmt, tuple(tensor.shape))
        assert (got.shape, got.dtype) == (tensor.shape, dtype)


@pytest.mark.parametrize("fmt", FORMATS[:2], ids=CODECS)
def test_expanded_tensors_come_back(fmt: Format) -> None:
    tensor = golden_tensor()[:, :, :, :1].expand(2, 2, 1, 9, 3)
    assert torch.equal(record.decode(encoded(tensor, fmt), KEY, fmt, (2, 2, 1, 9, 3)), tensor)


@every_format
def test_a_tensor_on_the_graph_is_encoded_by_value(fmt: Format) -> None:
    tensor = golden_tensor().requires_grad_()
    got = record.decode(encoded(tensor * 2, fmt), KEY, fmt, None)
    assert not got.requires_grad and torch.equal(got, golden_tensor() * 2)


@every_format
@pytest.mark.parametrize("offset", range(1, 5))
def test_records_at_any_alignment_decode(fmt: Format, offset: int) -> None:
    value = encoded(golden_tensor(), fmt)
    room = bytearray(len(value) + offset)
    room[offset:] = value
    for view in (memoryview(room)[offset:], memoryview(bytes(room))[offset:]):
        assert same_bits(record.decode(view, KEY, fmt, tuple(golden_tensor().shape)), golden_tensor())


@every_format
def test_the_result_shares_no_memory_with_the_record(fmt: Format) -> None:
    value = bytearray(encoded(golden_tensor(), fmt))
    got = record.decode(memoryview(value), KEY, fmt, None)
    value[:] = bytes(len(value))
    assert same_bits(got, golden_tensor())


def test_a_raw_payload_of_a_contiguous_tensor_is_not_copied() -> None:
    tensor = golden_tensor()
    header, payload = record.encode(tensor, KEY, Format())
    assert len(header) == 128
    tensor.fill_(1.0)
    assert bytes(payload) == struct.pack("<48f", *[1.0] * 48)


@every_format
def test_equal_input_gives_equal_bytes(fmt: Format) -> None:
    assert encoded(golden_tensor(), fmt) == encoded(golden_tensor().clone(), fmt)


# --- what no record holds -----------------------------------------------------------------------
@pytest.mark.parametrize("value", [65520.0, -70000.0, 3e38])
def test_a_value_beyond_fp16_cannot_be_held(value: float) -> None:
    tensor = golden_tensor()
    tensor[0, 0, 0, 0, 0] = value
    with pytest.raises(Unholdable, match="fp16"):
        record.encode(tensor, KEY, Format("fp16"))
    record.encode(tensor, KEY, Format("bf16"))


def test_a_value_beyond_bf16_cannot_be_held() -> None:
    with pytest.raises(Unholdable, match="bf16"):
        record.encode(torch.tensor([torch.finfo(torch.float32).max]), KEY, Format("bf16"))


def test_what_cannot_be_held_is_a_counted_drop_of_the_cache() -> None:
    cache = DistributedKVCache(precision="fp16", model=small_spec(), block_tokens=16)
    kv = exact_kv(small_spec(), 48)
    kv[0, 1, 0, 17, 0] = 1e6
    assert cache.save(list(range(48)), kv) == 1
    assert cache.stats().drops == Counter(overflow=2)
    assert not cache.cache_kv("text", 0, kv, kv)
    assert cache.stats().drops == Counter(overflow=3)
    assert cache.store.stats().offered == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int8, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=str(dtype)):
        record.encode(torch.zeros(2, dtype=dtype), KEY, Format())


@pytest.mark.parametrize("shape", [(), (1,) * 9])
def test_other_numbers_of_dims_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="1 to 8 dims"):
        record.encode(torch.zeros(shape), KEY, Format())


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33)])
def test_keys_of_other_lengths_are_refused(key: bytes) -> None:
    with pytest.raises(InputError, match="32 bytes"):
        record.encode(torch.zeros(2), key, Format())


@pytest.mark.parametrize(("precision", "codec"), [("int8", "raw"), ("fp8", "raw"), ("", "raw"), ("fp32", "zstd")])
def test_formats_that_do_not_exist_are_refused(precision: str, codec: str) -> None:
    with pytest.raises(ConfigError, match="expected a"):
        Format(precision, codec)


# --- damage -------------------------------------------------------------------------------------
@every_format
@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_single_byte_that_flips_is_noticed(fmt: Format, mask: int) -> None:
    value = encoded(golden_tensor(), fmt)
    shape = tuple(golden_tensor().shape)
    for at in range(len(value)):
        assert reason_of(flipped(value, at, mask), fmt, shape) in REASONS


@every_format
def test_every_length_but_the_right_one_is_noticed(fmt: Format) -> None:
    value = encoded(golden_tensor(), fmt)
    for length in range(len(value)):
        assert reason_of(value[:length], fmt) == "length"
    for garbage in (b"\0", b"x" * 100, value):
        assert reason_of(value + garbage, fmt) == "length"


@given(st.binary(max_size=400), st.sampled_from(FORMATS))
def test_arbitrary_bytes_are_a_bad_record(value: bytes, fmt: Format) -> None:
    assert reason_of(value, fmt) in {"length", "magic"}


@given(st.data(), st.sampled_from(FORMATS))
def test_arbitrary_headers_are_a_bad_record_or_the_right_tensor(data: st.DataObject, fmt: Format) -> None:
    """The worst case: a forger who knows the format and makes every checksum fit."""
    value = bytearray(encoded(golden_tensor(), fmt))
    for at in data.draw(st.lists(st.integers(0, len(value) - 1), min_size=1, max_size=6)):
        value[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        struct.pack_into("<Q", value, 48, len(value) - 128)
    shape = tuple(golden_tensor().shape)
    try:
        got = record.decode(resealed(bytes(value)), KEY, fmt, shape)
    except BadRecord as error:
        assert error.reason in REASONS
    else:
        assert tuple(got.shape) == shape


@given(st.data(), st.sampled_from(FORMATS))
def test_arbitrary_text_headers_are_a_bad_record_or_some_tensor(data: st.DataObject, fmt: Format) -> None:
    """Where any shape is accepted, what is made is bounded, whatever the header says."""
    value = bytearray(encoded(golden_tensor(), fmt, kind=record.KIND_TEXT))
    ndim = data.draw(st.integers(0, 9))
    extent = st.one_of(st.integers(0, 8), st.sampled_from([2**16, 2**31, 2**32 - 1]))
    dims = data.draw(st.lists(extent, min_size=min(ndim, 8), max_size=8))[:8]
    value[10] = ndim
    struct.pack_into(f"<{len(dims)}I", value, 16, *dims)
    try:
        got = record.decode(resealed(bytes(value)), KEY, fmt, None, record.KIND_TEXT, max_bytes=1 << 20)
    except BadRecord as error:
        assert error.reason in REASONS
    else:
        assert got.nbytes <= 1 << 20


# --- forged records, one for each reason --------------------------------------------------------
SHAPE = (2, 2, 1, 4, 3)
RECORD = encoded(golden_tensor(), Format())
PACKED = encoded(golden_tensor(), Format("fp32", "gzip"))


def with_payload(record_: bytes, payload: bytes) -> bytes:
    """Another payload, with its length and checksum made to fit."""
    return resealed(record_[:48] + struct.pack("<Q", len(payload)) + record_[56:128] + payload)


def dims_bytes(*dims: int) -> bytes:
    return struct.pack("<8I", *dims, *[0] * (8 - len(dims)))


FORGED: dict[str, tuple[bytes, str]] = {
    "other magic": (tampered(RECORD, 0, b"KVL2"), "magic"),
    "version 0": (tampered(RECORD, 4, b"\0"), "version"),
    "version 2": (tampered(RECORD, 4, b"\2"), "version"),
    "text kind": (tampered(RECORD, 5, b"\2"), "kind"),
    "unknown kind": (tampered(RECORD, 5, b"\x63"), "kind"),
    "unknown codec": (tampered(RECORD, 6, b"\x07"), "codec"),
    "reserved codec zstd": (tampered(RECORD, 6, b"\2"), "codec"),
    "raw called gzip": (tampered(RECORD, 6, b"\1"), "codec"),
    "gzip called raw": (tampered(PACKED, 6, b"\0"), "codec"),
    "precision fp16": (tampered(RECORD, 7, b"\2"), "precision"),
    "precision unknown": (tampered(RECORD, 7, b"\0"), "precision"),
    "dtype unknown": (tampered(RECORD, 8, b"\0"), "dims"),
    "seal aes-gcm": (tampered(RECORD, 9, b"\2"), "key_id"),
    "seal unknown": (tampered(RECORD, 9, b"\0"), "key_id"),
    "key id": (tampered(RECORD, 12, b"\1\0\0\0"), "key_id"),
    "no dims": (tampered(RECORD, 10, b"\0"), "dims"),
    "fewer dims": (tampered(RECORD, 10, b"\4"), "dims"),
    "more dims": (tampered(RECORD, 10, b"\6"), "dims"),
    "nine dims": (tampered(RECORD, 10, b"\x09"), "dims"),
    "dims swapped": (tampered(RECORD, 16, dims_bytes(2, 2, 4, 1, 3)), "dims"),
    "dims larger": (tampered(RECORD, 16, dims_bytes(2, 2, 1, 8, 3)), "dims"),
    "length too small": (tampered(RECORD, 48, struct.pack("<Q", 4)), "length"),
    "length huge": (tampered(RECORD, 48, struct.pack("<Q", 2**64 - 1)), "length"),
    "other key": (tampered(RECORD, 64, bytes(32)), "key"),
    "last byte of the key": (tampered(RECORD, 95, b"\xff"), "key"),
    "other checksum": (RECORD[:96] + bytes(8) + RECORD[104:], "checksum"),
    "checksum with a tail": (flipped(RECORD, 127), "checksum"),
    "short payload": (with_payload(RECORD, RECORD[128:-4]), "codec"),
    "long payload": (with_payload(RECORD, RECORD[128:] + bytes(4)), "codec"),
    "empty payload": (with_payload(RECORD, b""), "codec"),
    "empty gzip payload": (with_payload(PACKED, b""), "codec"),
    "gzip cut short": (with_payload(PACKED, PACKED[128:-5]), "codec"),
    "gzip of less": (with_payload(PACKED, gzip.compress(bytes(188))), "codec"),
    "gzip of more": (with_payload(PACKED, gzip.compress(bytes(196))), "codec"),
    "gzip with a tail": (with_payload(PACKED, PACKED[128:] + b"tail"), "codec"),
    "gzip twice": (with_payload(PACKED, gzip.compress(bytes(96)) + gzip.compress(bytes(96))), "codec"),
    "gzip with a wrong sum": (with_payload(PACKED, PACKED[128:-8] + bytes(8)), "codec"),
    "zlib instead of gzip": (with_payload(PACKED, zlib.compress(RECORD[128:])), "codec"),
    "not gzip at all": (with_payload(PACKED, b"\xff" * 50), "codec"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_record_is_refused_with_its_reason(name: str) -> None:
    value, reason = FORGED[name]
    assert reason_of(value, Format(), SHAPE) == reason
    assert reason_of(value, Format(), SHAPE, out=torch.empty(SHAPE)) == reason


def test_an_honest_reseal_is_accepted() -> None:
    """Otherwise every forged record above might be refused for its checksum alone."""
    assert same_bits(record.decode(resealed(RECORD), KEY, Format(), SHAPE), golden_tensor())
    again = with_payload(PACKED, gzip.compress(RECORD[128:]))
    assert same_bits(record.decode(again, KEY, Format(), SHAPE), golden_tensor())


@pytest.mark.parametrize("dims", [(2**32 - 1,) * 8, (2, 2**30), (2**15, 2**14)], ids=str)
@pytest.mark.parametrize("value", [RECORD, PACKED], ids=CODECS)
def test_where_any_shape_is_accepted_the_size_is_bounded(dims: tuple[int, ...], value: bytes) -> None:
    forged = tampered(tampered(value, 10, bytes([len(dims)])), 16, dims_bytes(*dims))
    assert reason_of(forged, Format(), None) == "overflow"


def test_a_forged_shape_without_elements_is_refused_or_empty() -> None:
    forged = tampered(tampered(RECORD, 10, b"\5"), 16, dims_bytes(2, 0, 2**32 - 1, 2**32 - 1, 2**32 - 1))
    assert reason_of(with_payload(forged, b""), Format(), None) in {"dims", "overflow"}


@pytest.mark.parametrize("make", [lambda n: gzip.compress(bytes(n)), lambda n: gzip.compress(gzip.compress(bytes(n)))])
@pytest.mark.parametrize("shape", [SHAPE, None])
def test_a_gzip_bomb_is_refused_without_unpacking_it(make: Callable[[int], bytes], shape: Any) -> None:
    bomb = with_payload(PACKED, make(64 << 20))
    tracemalloc.start()
    try:
        assert reason_of(bomb, Format(), shape) == "codec"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_decoding_makes_no_more_than_the_tensor_and_one_copy() -> None:
    tensor = torch.zeros(1 << 20)
    value = encoded(tensor, Format("fp32", "gzip"))
    tracemalloc.start()
    try:
        record.decode(value, KEY, Format(), (1 << 20,), out=torch.empty(1 << 20))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * tensor.nbytes


def test_a_record_is_only_for_the_precision_asked_for() -> None:
    for wrote in FORMATS:
        for asked in FORMATS:
            value = encoded(golden_tensor(), wrote)
            if wrote.precision == asked.precision:
                assert same_bits(record.decode(value, KEY, asked, SHAPE), golden_tensor())
            else:
                assert reason_of(value, asked, SHAPE) == "precision"


def test_a_text_record_is_no_block_and_a_block_no_text() -> None:
    text = encoded(golden_tensor(), Format(), kind=record.KIND_TEXT)
    assert reason_of(text, Format(), SHAPE) == "kind"
    assert reason_of(RECORD, Format(), None, kind=record.KIND_TEXT) == "kind"
    assert same_bits(record.decode(text, KEY, Format(), None, record.KIND_TEXT), golden_tensor())


# --- codecs -------------------------------------------------------------------------------------
def test_format_numbers_are_frozen() -> None:
    assert codecs.PRECISIONS == {"fp32": 1, "fp16": 2, "bf16": 3}
    assert codecs.CODECS == {"raw": 0, "gzip": 1}
    assert (record.MAGIC, record.VERSION, record.KIND_BLOCK, record.KIND_TEXT) == (b"KVL1", 1, 1, 2)


def test_gzip_payloads_are_plain_gzip_without_a_time_stamp() -> None:
    payload = PACKED[128:]
    assert gzip.decompress(payload) == RECORD[128:]
    assert payload[4:8] == bytes(4)
