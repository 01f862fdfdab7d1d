"""Records: golden files decode for ever, every tensor comes back, and nothing but an intact record is accepted."""

from __future__ import annotations

import gzip
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvlab.cache import DistributedKVCache
from kvlab.core import precisions, record
from kvlab.core.codecs import CODECS
from kvlab.core.record import Format, Unholdable
from kvlab.errors import ConfigError, InputError
from tests.core.make_golden import GOLDEN, GOLDEN_FORMATS, GOLDEN_KEY, golden_tensor
from tests.harness.helpers import (
    BITS,
    KEY,
    encoded,
    exact_kv,
    resealed,
    same_bits,
    small_spec,
)

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EXACT = [Format(p, c) for p in FLOATS for c in CODECS]
FORMATS = [Format(p, c) for p in precisions.PRECISIONS for c in CODECS]
SHAPE = tuple(golden_tensor().shape)


def name_of(fmt: Format) -> str:
    return f"{fmt.precision}-{fmt.codec}"


every_exact_format = pytest.mark.parametrize("fmt", EXACT, ids=name_of)
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
every_golden = pytest.mark.parametrize("name", GOLDEN_FORMATS)


# --- golden files -------------------------------------------------------------------------------
def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.bin").read_bytes()


def expected(precision: str) -> Tensor:
    """What the golden records of a precision hold."""
    if precision in FLOATS:
        return golden_tensor()
    numbers = np.frombuffer((GOLDEN / f"{precision}.expected").read_bytes(), "<f4")
    return torch.from_numpy(numbers.astype(np.float32)).reshape(SHAPE)


def test_there_is_a_golden_record_of_every_format() -> None:
    names = {f"{p}-{c}{s}" for p in precisions.PRECISIONS for c in CODECS for s in ("", "-aes")}
    assert {file.stem for file in GOLDEN.glob("*.bin")} == names == set(GOLDEN_FORMATS)


@every_golden
def test_golden_records_decode_exactly(name: str) -> None:
    fmt = GOLDEN_FORMATS[name]
    for shape in (SHAPE, None):
        got = record.decode(golden(name), GOLDEN_KEY, fmt, shape)
        assert same_bits(got, expected(fmt.precision))
    out = torch.empty(SHAPE)
    record.decode(golden(name), GOLDEN_KEY, fmt, SHAPE, out=out)
    assert same_bits(out, expected(fmt.precision))


@every_format
def test_todays_records_have_the_golden_bytes(fmt: Format) -> None:
    """Of packed payloads what they unpack to: another version of zlib or zstd may pack otherwise."""
    today, then = encoded(golden_tensor(), fmt, GOLDEN_KEY), golden(name_of(fmt))
    if fmt.codec == "raw":
        assert today == then
    else:
        assert today[:48] == then[:48] and today[56:96] == then[56:96]
    if fmt.codec == "gzip":
        assert gzip.decompress(today[128:]) == gzip.decompress(then[128:])


@every_golden
def test_the_golden_header_is_what_the_text_says(name: str) -> None:
    """Field by field, from the table in `kvlab.core.record`."""
    value = golden(name)
    precision, codec, *aes = name.split("-")
    ids = bytes([1, 1, ["raw", "gzip", "zstd"].index(codec), 1 + [*FLOATS, "int8", "int4"].index(precision)])
    assert value[:12] == b"KVL1" + ids + bytes([1, 2 if aes else 1, 5, 0])
    assert value[12:48] == struct.pack("<9I", 7 if aes else 0, 2, 2, 1, 4, 3, 0, 0, 0)
    assert value[48:64] == struct.pack("<QQ", len(value) - 128, 0)
    assert value[64:96] == GOLDEN_KEY
    assert value[124:128] == bytes(4)
    assert (value == resealed(value)) == (not aes)


@pytest.mark.parametrize(
    ("precision", "size"),
    # int: keys and values of [2, 1, 4, 3]: 24 integers each; 6 groups of keys, 8 of values, in bf16
    [("fp32", 192), ("fp16", 96), ("bf16", 96), ("int8", 24 + 12 + 24 + 16), ("int4", 12 + 12 + 12 + 12 + 16)],
)
def test_a_golden_raw_payload_has_the_size_that_the_text_says(precision: str, size: int) -> None:
    assert len(golden(f"{precision}-raw")) == len(golden(f"{precision}-raw-aes")) == 128 + size


def test_the_golden_payload_is_little_endian() -> None:
    payload = golden("fp32-raw")[128:]
    assert payload == struct.pack("<48f", *[(i - 24) / 8 for i in range(48)])
    half = golden("fp16-raw")[128:]
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


@given(tensors(torch.float32), st.sampled_from(list(CODECS)))
def test_fp32_comes_back_bit_by_bit(tensor: Tensor, codec: str) -> None:
    value = encoded(tensor, Format("fp32", codec))
    got = record.decode(value, KEY, Format("fp32"), tuple(tensor.shape))
    assert same_bits(got, tensor)


@pytest.mark.parametrize("precision", FLOATS)
@given(tensor=tensors(), codec=st.sampled_from(list(CODECS)))
def test_every_precision_rounds_as_torch_does(precision: str, tensor: Tensor, codec: str) -> None:
    """And a finite value that would become infinite is refused."""
    rounded = tensor.to(FLOATS[precision])
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
    precision = next(p for p, dtype in FLOATS.items() if dtype == tensor.dtype)
    assert same_bits(record.decode(encoded(tensor, Format(precision)), KEY, Format(precision), None), tensor)


@given(tensors(torch.float32), st.sampled_from(EXACT), st.sampled_from(list(BITS)), st.data())
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
    assert torch.equal(out, tensor.to(FLOATS[fmt.precision]).to(dtype))
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


@every_exact_format
@pytest.mark.parametrize("name", DEGENERATE)
def test_tensors_of_no_or_one_element_come_back(fmt: Format, name: str) -> None:
    for dtype in FLOATS.values():
        tensor = DEGENERATE[name].to(dtype)
        got = record.decode(encoded(tensor, fmt), KEY, fmt, tuple(tensor.shape))
        assert (got.shape, got.dtype) == (tensor.shape, dtype)


@pytest.mark.parametrize("fmt", EXACT[:3], ids=name_of)
def test_expanded_tensors_come_back(fmt: Format) -> None:
    tensor = golden_tensor()[:, :, :, :1].expand(2, 2, 1, 9, 3)
    assert torch.equal(record.decode(encoded(tensor, fmt), KEY, fmt, (2, 2, 1, 9, 3)), tensor)


@every_exact_format
def test_a_tensor_on_the_graph_is_encoded_by_value(fmt: Format) -> None:
    tensor = golden_tensor().requires_grad_()
    got = record.decode(encoded(tensor * 2, fmt), KEY, fmt, None)
    assert not got.requires_grad and torch.equal(got, golden_tensor() * 2)


@every_exact_format
@pytest.mark.parametrize("offset", range(1, 5))
def test_records_at_any_alignment_decode(fmt: Format, offset: int) -> None:
    value = encoded(golden_tensor(), fmt)
    room = bytearray(len(value) + offset)
    room[offset:] = value
    for view in (memoryview(room)[offset:], memoryview(bytes(room))[offset:]):
        assert same_bits(record.decode(view, KEY, fmt, tuple(golden_tensor().shape)), golden_tensor())


@every_exact_format
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


@pytest.mark.parametrize(
    ("precision", "codec"),
    [("float32", "raw"), ("fp8", "raw"), ("", "raw"), ("fp32", "lz4"), ("fp32", ""), ("fp32", 2)],
)
def test_formats_that_do_not_exist_are_refused(precision: str, codec: str) -> None:
    with pytest.raises(ConfigError, match="expected one of the"):
        Format(precision, codec)
