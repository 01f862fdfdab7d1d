"""Integers: how far off they may be, what they cannot hold, and the same numbers from a second implementation."""

from __future__ import annotations

import itertools
import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvlab.core import precisions, record
from kvlab.core.codecs import CODECS
from kvlab.core.record import KIND_BLOCK, KIND_TEXT, Format, Unholdable
from kvlab.errors import InputError
from tests.harness.helpers import KEY, encoded, reason_of, resealed, same_bits

INTEGERS = ("int8", "int4")
TINY = 2.0**-126
ROUND_UP = 1 + 2.0**-6  # a scale is rounded up to 6 bits of mantissa
SHAPES = [(1, 2, 1, 5, 3), (2, 2, 1, 64, 4), (1, 2, 2, 128, 80), (1, 2, 1, 80, 128), (1, 2, 1, 65, 64), (3, 2, 2, 1, 1)]
EMPTY = [(1, 2, 1, 0, 4), (1, 2, 1, 4, 0), (0, 2, 1, 4, 4), (1, 2, 0, 4, 4), (0, 2, 0, 0, 0)]
both = pytest.mark.parametrize("precision", INTEGERS)


def back(tensor: Tensor, precision: str, codec: str = "raw", kind: int = KIND_BLOCK) -> Tensor:
    """What a reader gets of a tensor."""
    fmt = Format(precision, codec)
    got = record.decode(encoded(tensor, fmt, kind=kind), KEY, fmt, tuple(tensor.shape), kind)
    assert (got.shape, got.dtype) == (tensor.shape, tensor.dtype)
    return got


def noise(shape: tuple[int, ...], seed: int = 0, spread: float = 3.0) -> Tensor:
    """Numbers of very different sizes in different channels and tokens, as keys and values have them."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(*shape[:-2], shape[-2], 1, generator=g))
    return torch.randn(shape, generator=g) * sizes * torch.exp(spread * torch.randn(shape[-1], generator=g))


# --- a second implementation, in plain loops from the text of kvlab.core.precisions ---------------
def f32(x: float) -> float:
    """The nearest fp32."""
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def bits_of(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def from_bits(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def scale2(x: float) -> float:
    """Rounded up to 6 bits of mantissa, at least the smallest normal number."""
    bits = bits_of(max(f32(x), TINY))
    return from_bits(-(-bits // 2**17) * 2**17)


def bf16_at_or_below(x: float) -> float:
    upper = from_bits(bits_of(x) // 2**16 * 2**16)  # towards zero
    return upper if upper <= x else from_bits((bits_of(x) // 2**16 + 1) * 2**16)


def groups2(n: int) -> list[range]:
    """Runs of 64, or all where the axis is no multiple of 64."""
    size = 64 if n % 64 == 0 else n
    return [range(at, at + size) for at in range(0, n, size)]


def nearest(x: float, scale: float) -> int:
    return round(f32(x * f32(1 / scale)))  # Python and the package both round halves to even


def bf16_bytes(x: float) -> bytes:
    return struct.pack("<H", bits_of(x) >> 16)


def nibbles2(integers: list[int]) -> bytes:
    pairs = itertools.zip_longest(integers[::2], integers[1::2], fillvalue=0)
    return bytes(low | high << 4 for low, high in pairs)


def quantised2(tensor: Tensor, precision: str) -> tuple[bytes, Tensor]:
    """Raw payload, and what a reader makes of it, of a block [L, 2, H, T, D]."""
    L, _, H, T, D = tensor.shape
    x, got = tensor.tolist(), torch.empty(tensor.shape)
    heads = list(itertools.product(range(L), range(H)))
    integers: dict[tuple[int, ...], int] = {}
    key_scales, lows, value_scales = b"", b"", b""
    for (i, h), group, d in itertools.product(heads, groups2(T), range(D)):
        column = [x[i][0][h][t][d] for t in group]
        if precision == "int8":
            low, scale = 0.0, scale2(max(map(abs, column)) / 127)
        else:
            low = bf16_at_or_below(min(column))
            scale = scale2(f32(max(column) - low) / 15)
        key_scales, lows = key_scales + bf16_bytes(scale), lows + bf16_bytes(low)
        for t in group:
            n = integers[i, 0, h, t, d] = nearest(f32(x[i][0][h][t][d] - low), scale)
            got[i, 0, h, t, d] = f32(f32(n * scale) + low)
    for (i, h), t, group in itertools.product(heads, range(T), groups2(D)):
        row = [x[i][1][h][t][d] for d in group]
        scale = scale2(max(map(abs, row)) / (72 if precision == "int8" else 7))
        value_scales += bf16_bytes(scale)
        for d in group:
            n = integers[i, 1, h, t, d] = nearest(x[i][1][h][t][d], scale)
            got[i, 1, h, t, d] = f32(n * scale)
    keys, values = (
        [integers[i, plane, h, t, d] for (i, h), t, d in itertools.product(heads, range(T), range(D))]
        for plane in (0, 1)
    )
    if precision == "int8":
        payload = struct.pack(f"{len(keys)}b", *keys) + key_scales
        return payload + struct.pack(f"{len(values)}b", *values) + value_scales, got
    return nibbles2(keys) + key_scales + lows + nibbles2([n + 8 for n in values]) + value_scales, got


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_both_implementations_agree_to_the_last_bit(precision: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = noise(shape, seed=sum(shape), spread=1.0).to(dtype)
    payload, got = quantised2(tensor, precision)
    assert encoded(tensor, Format(precision))[128:] == payload
    assert same_bits(back(tensor.float(), precision), got)


numbers = st.one_of(
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-127, 2.0**-126, 1.0, 127.0, 63.5, -0.5, 1e30, -1e30]),
)


@st.composite
def blocks(draw: st.DrawFn) -> Tensor:
    """[1, 2, 1, T, D], small enough to shrink, some with two groups along T or D."""
    T, D = draw(st.sampled_from([(1, 1), (2, 3), (5, 3), (4, 4), (128, 1), (1, 128), (64, 2), (3, 65)]))
    few = draw(st.lists(numbers, min_size=1, max_size=8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return torch.from_numpy(rng.choice(np.array(few, np.float32), (1, 2, 1, T, D)))


@both
@given(tensor=blocks())
def test_both_implementations_agree_on_awkward_numbers(precision: str, tensor: Tensor) -> None:
    tensor = tensor + 0.0  # no -0.0: which zero is the lowest of a group with both is left open
    payload, got = quantised2(tensor, precision)
    assert encoded(tensor, Format(precision))[128:] == payload
    assert same_bits(back(tensor, precision), got)


# --- how far off ----------------------------------------------------------------------------------
def grouped(x: Tensor, axis: int) -> Tensor:
    """The axis as groups and members: what shares a scale is along the last axis."""
    moved = x.double().movedim(axis, -1)
    n = moved.shape[-1]
    return moved.reshape(*moved.shape[:-1], n // 64, 64) if n % 64 == 0 else moved.unsqueeze(-2)


def half_steps(tensor: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Half a step of each group of keys and of values, from the claim and not from the scales."""
    keys, values = grouped(tensor[:, 0], -2), grouped(tensor[:, 1], -1)
    if precision == "int8":
        steps = keys.abs().amax(-1) / 127, values.abs().amax(-1) / 72
    else:
        low = keys.amin(-1)
        # the lowest value is a bf16 at or below: up to 2**-7 of it wider
        steps = (keys.amax(-1) - low + low.abs() * 2.0**-7 + 2.0**-133) / 15, values.abs().amax(-1) / 7
    return tuple((step * (ROUND_UP + 1e-6)).clamp(min=TINY).unsqueeze(-1) / 2 for step in steps)


def assert_within_half_a_step(tensor: Tensor, got: Tensor, precision: str) -> None:
    for plane, axis, half in zip((0, 1), (-2, -1), half_steps(tensor, precision), strict=True):
        x, y = grouped(tensor[:, plane], axis), grouped(got[:, plane], axis)
        rounding = 2.0**-22 * x.abs().amax(-1, keepdim=True)
        assert bool(((x - y).abs() <= half + rounding).all())


@both
@given(tensor=blocks())
def test_no_number_is_off_by_more_than_half_a_step_of_its_group(precision: str, tensor: Tensor) -> None:
    assert_within_half_a_step(tensor, back(tensor, precision), precision)


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_no_number_of_a_real_size_is_off_by_more(precision: str, shape: tuple[int, ...], codec: str) -> None:
    tensor = noise(shape)
    got = back(tensor, precision, codec)
    assert same_bits(got, back(tensor, precision))
    assert_within_half_a_step(tensor, got, precision)


@both
def test_zeros_stay_zeros(precision: str) -> None:
    zeros = torch.zeros(2, 2, 1, 5, 3)
    assert torch.equal(back(zeros, precision), zeros)
    assert torch.equal(back(-zeros, precision), zeros)


@both
@pytest.mark.parametrize("x", [1.0, -1.0, 0.1, -1e-20, 65504.0, 1e30])
def test_a_constant_is_as_exact_as_its_scale(precision: str, x: float) -> None:
    """A key at int4 is its group's lowest value and loses what bf16 does not hold, to within half a step of that."""
    got = back(torch.full((1, 2, 1, 128, 64), x), precision)
    keys, values = got[:, 0], got[:, 1]
    assert keys.unique().numel() == values.unique().numel() == 1
    assert abs(keys[0, 0, 0, 0].item() - x) <= abs(x) * (ROUND_UP - 1 if precision == "int8" else 2.0**-8 / 15)
    assert abs(values[0, 0, 0, 0].item() - x) <= abs(x) / (72 if precision == "int8" else 7) / 2 * ROUND_UP


@both
@pytest.mark.parametrize("x", [2.0**-149, -(2.0**-149), 2.0**-130, 2.0**-127, -(2.0**-126), 2.0**-120])
def test_numbers_near_the_smallest_come_back_nearly(precision: str, x: float) -> None:
    tensor = torch.zeros(1, 2, 1, 4, 4)
    tensor[..., 1, 2] = x
    assert bool(((back(tensor, precision) - tensor).abs() <= max(abs(x) / 7 * 0.6, TINY / 2)).all())


@both
def test_a_huge_number_costs_only_its_own_group(precision: str) -> None:
    """Of keys the channel's 64 tokens, of values the token's 64 channels; all others are as without it."""
    tensor = noise((1, 2, 1, 128, 128), spread=0.0)
    calm = back(tensor, precision)
    tensor[0, 0, 0, 70, 5] = tensor[0, 1, 0, 70, 5] = 1e6
    got = back(tensor, precision)
    changed = torch.zeros(tensor.shape, dtype=torch.bool)
    changed[0, 0, 0, 64:, 5] = True
    changed[0, 1, 0, 70, :64] = True
    assert torch.equal(got[~changed], calm[~changed])
    assert int((got[0, 1, 0, 70, :64] == 0).sum()) == 63
    assert got[0, 0, 0, 64:, 5].unique().numel() == 2
    assert_within_half_a_step(tensor, got, precision)


def test_keys_get_more_levels_than_values_at_int8() -> None:
    ramp = torch.linspace(-1, 1, 64 * 64).reshape(64, 64)
    keys = back(torch.stack((ramp, ramp))[None, :, None], "int8")[0, 0, 0]
    assert max(len(channel.unique()) for channel in keys.T) <= 2 * 127 + 1
    wide = torch.linspace(-1, 1, 4096).reshape(1, 1, 1, 4096, 1).expand(1, 2, 1, 4096, 1)[:, :, :, :4095]
    assert back(wide, "int8")[:, 0].unique().numel() > 2 * 120
    flat = wide.transpose(-1, -2)
    assert 2 * 68 < back(flat, "int8")[:, 1].unique().numel() <= 2 * 72 + 1
    assert back(wide, "int4")[:, 0].unique().numel() == 16
    assert 13 <= back(flat, "int4")[:, 1].unique().numel() <= 15


# --- what integers cannot hold ----------------------------------------------------------------------
NAN_BITS = [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF, 0xFF800001]
INFINITIES = [0x7F800000, 0xFF800000]


@both
@pytest.mark.parametrize("plane", [0, 1])
@pytest.mark.parametrize("bits", [*NAN_BITS, *INFINITIES], ids=hex)
@pytest.mark.parametrize("shape", [(1, 2, 1, 1, 1), (1, 2, 1, 5, 3), (2, 2, 2, 64, 64)], ids=str)
def test_nan_and_infinity_are_refused_in_any_place(
    precision: str, plane: int, bits: int, shape: tuple[int, ...]
) -> None:
    for place in {0, shape[-1] * shape[-2] - 1, shape[-1] * shape[-2] // 2}:
        tensor = noise(shape)
        tensor[-1, plane, -1].view(-1).view(torch.int32)[place] = bits - (bits >> 31 << 32)
        with pytest.raises(Unholdable, match="NaN"):
            record.encode(tensor, KEY, Format(precision))


@both
@pytest.mark.parametrize("plane", [0, 1])
@pytest.mark.parametrize("x", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_nan_and_infinity_of_half_precision_are_refused(
    precision: str, plane: int, x: float, dtype: torch.dtype
) -> None:
    tensor = noise((1, 2, 1, 5, 3), spread=0.0).to(dtype)
    tensor[0, plane, 0, 2, 1] = x
    with pytest.raises(Unholdable, match="NaN"):
        record.encode(tensor, KEY, Format(precision))


@pytest.mark.parametrize("plane", [0, 1])
def test_huge_numbers_of_both_signs_come_back_or_are_refused(plane: int) -> None:
    tensor = torch.zeros(1, 2, 1, 4, 4)
    tensor[0, plane, 0] = torch.tensor([3e38, -3e38, 3e38, -3e38])[:, None]
    assert_within_half_a_step(tensor, back(tensor, "int8"), "int8")
    if plane == 0:  # 6e38 apart, which is no fp32
        with pytest.raises(Unholdable, match="end of fp32"):
            record.encode(tensor, KEY, Format("int4"))
    else:
        assert_within_half_a_step(tensor, back(tensor, "int4"), "int4")


LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("precision", "plane", "x"),
    [
        *[pytest.param(*p, 0.99 * LARGEST) for p in itertools.product(INTEGERS, (0, 1))],
        pytest.param("int8", 0, LARGEST),
        pytest.param("int4", 0, -LARGEST),
        pytest.param("int4", 0, LARGEST),
        pytest.param("int8", 1, LARGEST),
        pytest.param("int8", 1, -LARGEST),
        pytest.param("int8", 1, 0.996 * LARGEST),
        pytest.param("int4", 1, LARGEST),
        pytest.param("int4", 1, -0.999 * LARGEST),
    ],
)
def test_a_finite_number_comes_back_finite_or_is_refused(precision: str, plane: int, x: float) -> None:
    tensor = torch.zeros(1, 2, 1, 4, 4)
    tensor[0, plane, 0, :, 0] = x
    try:
        value = encoded(tensor, Format(precision))
    except Unholdable:
        return
    assert bool(record.decode(value, KEY, Format(precision), tuple(tensor.shape)).isfinite().all())


TOO_LARGE = [
    ("int8", 0, 7e4, torch.float16),
    ("int8", 1, -7e4, torch.float16),
    ("int4", 0, -1e30, torch.float16),
    ("int4", 1, 7e4, torch.float16),
    ("int4", 1, -511 * 2.0**119, torch.bfloat16),  # 7 steps of 73 * 2**119
]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("precision", "plane", "x", "dtype"), TOO_LARGE)
def test_what_the_readers_dtype_cannot_hold_is_overflow_and_never_infinite(
    codec: str, precision: str, plane: int, x: float, dtype: torch.dtype
) -> None:
    tensor, fmt = torch.zeros(1, 2, 1, 5, 3), Format(precision, codec)
    tensor[0, plane, 0, 2, 1] = x
    assert bool(back(tensor, precision, codec).isfinite().all())
    value = encoded(tensor, fmt)
    assert reason_of(value, fmt, tuple(tensor.shape), out=torch.empty(tensor.shape, dtype=dtype)) == "overflow"
    itself = resealed(value[:8] + {torch.float16: b"\2", torch.bfloat16: b"\3"}[dtype] + value[9:])
    assert reason_of(itself, fmt, tuple(tensor.shape)) == "overflow"


# --- shapes and strides -----------------------------------------------------------------------------
@both
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_tensors_without_elements_come_back(precision: str, codec: str, shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        back(torch.zeros(shape, dtype=dtype), precision, codec)
    fmt = Format(precision, codec)
    out = torch.empty(shape)
    assert record.decode(encoded(torch.zeros(shape), fmt), KEY, fmt, shape, out=out) is out


@both
@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((2,), KIND_BLOCK),
        ((4, 2), KIND_BLOCK),
        ((4, 2, 3), KIND_BLOCK),
        ((2, 3, 1, 4, 4), KIND_BLOCK),
        ((2, 1, 1, 4, 4), KIND_BLOCK),
        ((2, 0, 1, 4, 4), KIND_BLOCK),
        ((2,), KIND_TEXT),
        ((2, 3), KIND_TEXT),
        ((3, 4, 4), KIND_TEXT),
        ((1, 2, 4, 4), KIND_TEXT),
    ],
    ids=str,
)
def test_shapes_without_planes_tokens_and_channels_are_refused(
    precision: str, shape: tuple[int, ...], kind: int
) -> None:
    with pytest.raises(InputError, match=f"{precision}: expected two planes"):
        record.encode(torch.zeros(shape), KEY, Format(precision), kind)


@both
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 1, 2, 64, 80), (2, 3, 2, 7, 128), (2, 1, 1, 1, 1, 1, 5, 3)], ids=str)
def test_a_text_record_has_its_planes_first(precision: str, codec: str, shape: tuple[int, ...]) -> None:
    tensor = noise(shape)
    got = back(tensor, precision, codec, KIND_TEXT)
    as_block = tensor.reshape(2, -1, 1, *shape[-2:]).transpose(0, 1)
    assert same_bits(got, back(as_block, precision).transpose(0, 1).reshape(shape))


@both
@pytest.mark.parametrize("order", [(0, 1, 2, 4, 3), (4, 3, 2, 1, 0), (2, 1, 0, 3, 4), (1, 0, 3, 4, 2)], ids=str)
def test_strides_of_input_and_output_do_not_matter(precision: str, order: tuple[int, ...]) -> None:
    tensor = noise((3, 2, 2, 6, 4))
    undo = tuple(order.index(i) for i in range(5))
    strided = tensor.permute(order).contiguous().permute(undo)
    value = encoded(strided, Format(precision))
    assert value == encoded(tensor, Format(precision))
    for dtype in (torch.float32, torch.bfloat16):
        room = torch.full([2 * n for n in tensor.permute(order).shape], -7.0, dtype=dtype)
        out = room[tuple(slice(1, None, 2) for _ in order)].permute(undo)
        record.decode(value, KEY, Format(precision), tuple(tensor.shape), out=out)
        assert torch.equal(out, back(tensor, precision).to(dtype))
        out.fill_(-7.0)
        assert bool((room == -7.0).all())


@both
@pytest.mark.parametrize("take", [(slice(None, None, 2), ...), (..., slice(1, 6), slice(None)), (..., slice(None, 3))])
def test_slices_and_expanded_tensors_are_encoded_by_value(precision: str, take: Any) -> None:
    for whole in (noise((3, 2, 2, 6, 4)), noise((3, 2, 2, 1, 4)).expand(3, 2, 2, 6, 4)):
        part = whole[take]
        assert encoded(part, Format(precision)) == encoded(part.clone(), Format(precision))


@both
def test_a_tensor_on_the_graph_is_quantised_by_value(precision: str) -> None:
    tensor = noise((1, 2, 1, 4, 4)).requires_grad_()
    got = back(tensor, precision)
    assert not got.requires_grad and torch.equal(got, back(tensor.detach(), precision))


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_quantised_as_its_fp32_and_rounded_once(precision: str, dtype: torch.dtype) -> None:
    tensor = noise((1, 2, 1, 64, 64), spread=0.5).to(dtype)
    assert torch.equal(back(tensor, precision), back(tensor.float(), precision).to(dtype))


@pytest.mark.parametrize(
    ("precision", "shape", "size"),
    [
        ("int8", (1, 2, 1, 5, 3), 15 + 2 * 3 + 15 + 2 * 5),
        ("int4", (1, 2, 1, 5, 3), 8 + 4 * 3 + 8 + 2 * 5),
        ("int8", (1, 2, 1, 128, 80), 10240 + 2 * 160 + 10240 + 2 * 128),
        ("int4", (1, 2, 1, 64, 128), 4096 + 4 * 128 + 4096 + 2 * 128),
        ("int8", (2, 2, 3, 0, 4), 2 * 2 * 3 * 4),
    ],
)
def test_a_layout_takes_the_bytes_that_its_groups_need(precision: str, shape: tuple[int, ...], size: int) -> None:
    assert precisions.layout_bytes(precisions.layout(precision, shape, 1)) == size
    assert len(encoded(torch.zeros(shape), Format(precision))) == 128 + size
