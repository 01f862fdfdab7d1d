"""Conversion of a tensor to parts and back, at a given precision.

A precision converts a tensor to one or more arrays, the parts. The shape of the tensor determines
their dtypes and shapes, so a record needs no table of contents:

    fp32, fp16, bf16   the numbers
    int8               keys: integers k, scales; values: integers v, scales
                           key = k * scale, k in -127 … 127     value = v * scale, v in -72 … 72
    int4               keys: nibbles k, scales, lows; values: nibbles v, scales
                           key = k * scale + low, k in 0 … 15   value = (v - 8) * scale, v in 1 … 15

The 64 integers of a group share a scale. An axis whose length is not a multiple of 64 is one
group. Keys are grouped along the tokens of one channel, because a few channels of keys are many
times larger than the others. Values are grouped along the channels of one token. Keys have
larger integers than values, because an error in a key changes the attention weights: with
127 for both, int8 keys cause about five times the KL divergence of int8 values on the shipped model.
Source: Liu et al., 2024, "KIVI".

A scale is the largest magnitude of its group divided by the largest integer. For int4 keys it is
the largest number minus the low, divided by 15. A scale is rounded up to a bf16 with 6 bits of
mantissa, and is at least 2**-126. A low is the smallest number of the group, rounded down to a
bf16. An integer is the number (for int4 keys, minus the low) times the fp32 inverse of the scale,
rounded half to even. A byte holds two nibbles, the first one in its low bits. After an odd number
of nibbles, the high bits of the last byte are zero.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PRECISIONS: Final = {"fp32": 1, "fp16": 2, "bf16": 3, "int8": 4, "int4": 5}
GROUP: Final = 64

_STORED: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SAME_SIZE: Final = {4: torch.int32, 2: torch.int16}
_INFINITE: Final = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}  # exponent bits
_KEY_MAX: Final = {"int8": 127, "int4": 15}  # int8: -127 … 127; int4: 0 … 15
_VALUE_MAX: Final = {"int8": 72, "int4": 7}  # int8: -72 … 72; int4: -7 … 7
_SCALE_BITS: Final = 6  # of a scale's mantissa; scales with all 7 bits of a bf16 compress less
_TINY: Final = np.float32(2.0**-126)  # the smallest normal fp32; its inverse is finite
_U1: Final = np.dtype(np.uint8)
_I1: Final = np.dtype(np.int8)
_U2: Final = np.dtype("<u2")
_U4: Final = np.dtype("<u4")
_UNSIGNED: Final[dict[int, np.dtype[Any]]] = {2: _U2, 4: _U4}

Array = NDArray[Any]
Layout = list[tuple[np.dtype[Any], tuple[int, ...]]]


class Unholdable(Exception):
    """A tensor cannot be stored: a number is too large, or is NaN or infinite at an integer precision."""


def layout(precision: str, shape: tuple[int, ...], plane_axis: int) -> Layout:
    """Return the dtype and the shape of each part of a tensor of this shape.

    Args:
        plane_axis: the axis of keys (index 0) and values (index 1). Only the integer precisions use it.

    Raises:
        ValueError: the precision is int8 or int4, and the shape lacks planes, tokens or channels.
    """
    if precision in _STORED:
        return [(_U4 if precision == "fp32" else _U2, shape)]
    if len(shape) < plane_axis + 3 or shape[plane_axis] != 2:
        raise ValueError(f"expected two planes at axis {plane_axis}, and tokens and channels at the end, got {shape}")
    keys, values = _group_shapes(shape[:plane_axis] + shape[plane_axis + 1 :])
    key_scale, value_scale = (_U2, (*keys[:-2], 1, keys[-1])), (_U2, (*values[:-1], 1))
    if precision == "int8":
        return [(_I1, keys), key_scale, (_I1, values), value_scale]
    nibbles = (_U1, (-(-math.prod(keys) // 2),))
    return [nibbles, key_scale, key_scale, nibbles, value_scale]


def layout_bytes(parts: Layout) -> int:
    """Return the sum of the bytes of all parts."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in parts)


def to_parts(tensor: Tensor, precision: str, plane_axis: int) -> list[Array]:
    """Return the parts of a tensor. A contiguous CPU tensor of the stored dtype shares memory with its part.

    Raises:
        Unholdable: the precision cannot represent a number.
        ValueError: as in `layout`.
    """
    tensor = tensor.detach()
    return (
        [_floats(tensor, precision)]
        if precision in _STORED
        else _quantise(tensor.float().cpu().numpy(), precision, plane_axis)
    )


def from_parts(parts: list[Array], precision: str, plane_axis: int, out: Tensor) -> None:
    """Fill `out` (any strides, any device, any floating dtype) from the parts of its layout.

    The parts travel to the device of `out` as they are and are converted there. If they are in pinned memory, the
    call may return before they have left it.

    Raises:
        Unholdable: the dtype of `out` cannot represent a number.
    """
    if precision in _STORED and out.device.type == "cpu" and out.dtype == _STORED[precision]:
        # Unlike torch, numpy accepts read-only memory. This saves a copy of each record.
        np.copyto(out.view(_SAME_SIZE[out.itemsize]).numpy(), _signed(parts[0]))
    elif out.numel():
        convert(to_device(parts, out.device), precision, plane_axis, out)


def to_device(parts: list[Array], device: torch.device) -> list[Tensor]:
    """Return parts as they are on a device, for `convert`. Out of pinned memory, the copies may not have ended yet."""
    return [_on(device, part) for part in parts]


def convert(parts: list[Tensor], precision: str, plane_axis: int, out: Tensor) -> None:
    """Fill `out` from parts that are on its device.

    Raises:
        Unholdable: the dtype of `out` cannot represent a number.
    """
    if precision in _STORED:
        _copy(parts[0].view(_STORED[precision]), out)
    else:
        _dequantise(parts, precision, plane_axis, out)


def _floats(tensor: Tensor, precision: str) -> Array:
    """Return the numbers at a precision, as unsigned integers with the same bits."""
    dtype = _STORED[precision]
    stored = tensor.cpu() if tensor.dtype == dtype else _rounded(tensor, precision)
    bits: Array = stored.contiguous().view(_SAME_SIZE[dtype.itemsize]).numpy()
    unsigned: Array = bits.view(_UNSIGNED[dtype.itemsize])
    return unsigned


def _rounded(tensor: Tensor, precision: str) -> Tensor:
    stored = tensor.to("cpu", _STORED[precision])
    # readers convert back: bf16 rounds the fp16 number 65504 to 65536, which fp16 cannot represent
    back = stored.to(tensor.dtype) if _max(stored) > _max(tensor) else stored
    if _has_infinite(back) and not torch.equal(back.isinf(), tensor.isinf().cpu()):
        raise Unholdable(f"a number is too large for {precision}")
    return stored


def _max(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).max


def _has_infinite(tensor: Tensor) -> bool:
    """Return whether a number is infinite or NaN. Testing the exponents is faster than testing numbers."""
    mask = _INFINITE[tensor.dtype]
    bits: Array = tensor.view(_SAME_SIZE[tensor.itemsize]).numpy()
    return bool(bits.size) and bool((bits & mask).max() == mask)


def _on(device: torch.device, part: Array) -> Tensor:
    """A part as a tensor of signed integers (or bytes) on a device."""
    bits = _signed(part)
    whole = torch.from_numpy(bits if bits.flags.writeable else bits.copy())
    return whole.to(device, non_blocking=True)


def _signed(part: Array) -> Array:
    """The same bits as integers that torch has; single bytes as they are."""
    return part if part.itemsize == 1 else part.view(f"i{part.itemsize}")


def _copy(source: Tensor, out: Tensor) -> None:
    out.copy_(source)
    if _max(out) < _max(source) and not torch.equal(source.isinf(), out.isinf()):
        raise Unholdable(f"a number is too large for {out.dtype}")


def _quantise(x: Array, precision: str, plane_axis: int) -> list[Array]:
    """Return the parts of fp32 numbers at an integer precision."""
    parts = layout(precision, x.shape, plane_axis)
    if x.size == 0:
        return [np.zeros(shape, dtype) for dtype, shape in parts]
    keys, values = _grouped(x, plane_axis)
    with np.errstate(over="ignore", invalid="ignore"):  # _scale detects overflow
        if precision == "int8":
            return [*_symmetric(keys, -2, _KEY_MAX["int8"]), *_symmetric(values, -1, _VALUE_MAX["int8"])]
        low = _bf16_below(keys.min(-2, keepdims=True))
        scale = _scale(keys.max(-2, keepdims=True) - _from_bf16(low), _KEY_MAX["int4"], _from_bf16(low))
        steps = (keys - _from_bf16(low)) * (1 / _from_bf16(scale))
        integers, value_scale = _symmetric(values, -1, _VALUE_MAX["int4"])
    return [_nibbles(np.rint(steps).astype(np.uint8)), scale, low, _nibbles(integers + 8), value_scale]


def _dequantise(parts: list[Tensor], precision: str, plane_axis: int, out: Tensor) -> None:
    """Fill `out` from the parts of an integer precision, on the device of both."""
    if out.dtype != torch.float32:
        whole = torch.empty(out.shape, device=out.device)
        _dequantise(parts, precision, plane_axis, whole)
        return _copy(whole, out)
    *_, T, D = out.shape
    keys = out.select(plane_axis, 0).unflatten(-2, _groups_of(T))
    values = out.select(plane_axis, 1).unflatten(-1, _groups_of(D))
    if precision == "int8":
        k, ks, v, vs = parts
    else:
        k, ks, low, v, vs = parts
        k, v = _from_nibbles(k, keys.shape), _from_nibbles(v, values.shape).view(torch.int8).sub_(8)
    torch.mul(k, _bf16(ks), out=keys)  # without a temporary: its memory would be new each time
    torch.mul(v, _bf16(vs), out=values)
    if precision == "int4":
        keys += _bf16(low)


def _bf16(bits: Tensor) -> Tensor:
    """The fp32 numbers that these bits of bf16 stand for."""
    return bits.view(torch.bfloat16).float()


def _symmetric(x: Array, axis: int, max_integer: int) -> tuple[Array, Array]:
    """Return int8 integers in -max_integer … max_integer and bf16 scales, for groups along `axis`."""
    largest = np.maximum(x.max(axis, keepdims=True), -x.min(axis, keepdims=True))
    scale = _scale(largest, max_integer)
    return np.rint(x * (1 / _from_bf16(scale))).astype(np.int8), scale


def _scale(width: Array, max_integer: int, low: Array | float = 0.0) -> Array:
    """Return the scales of groups of these widths as bf16 bits, rounded up so that no integer exceeds `max_integer`.

    Raises:
        Unholdable: a group contains NaN or infinity, or fp32 cannot represent its largest decoded number.
    """
    drop = 23 - _SCALE_BITS
    bits = np.maximum(width / np.float32(max_integer), _TINY).view(np.uint32)
    rounded: Array = (((bits + ((1 << drop) - 1)) >> drop << drop) >> 16).astype(_U2)
    if not (np.isfinite(width).all() and np.isfinite(low + max_integer * _from_bf16(rounded)).all()):
        raise Unholdable("int8 and int4 cannot represent NaN, infinity or numbers near the end of fp32's range")
    return rounded


def _bf16_below(x: Array) -> Array:
    """Return the bits of the largest bf16 at or below each number."""
    bits = x.view(np.uint32)
    below: Array = (bits + (bits >> 31) * np.uint32(0xFFFF)) >> 16
    return below.astype(_U2)


def _from_bf16(bits: Array) -> Array:
    wide: Array = (bits.astype(np.uint32) << 16).view(np.float32)
    return wide


def _nibbles(integers: Array) -> Array:
    """Pack two integers in 0 … 15 per byte, the first one into the low bits."""
    flat = np.zeros((integers.size + 1) // 2 * 2, np.uint8)
    flat[: integers.size] = integers.reshape(-1)
    pairs: Array = flat.view(_U2)
    packed: Array = (pairs | pairs >> 4).astype(np.uint8)
    return packed


def _from_nibbles(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    pairs = packed.to(torch.int16)  # two bytes for two integers
    pairs |= pairs << 4
    pairs &= 0x0F0F
    return pairs.view(torch.uint8)[: math.prod(shape)].view(shape)


def _group_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the grouped shapes of […, T, D]: keys […, groups, tokens, D] and values […, T, groups, channels]."""
    *rest, T, D = shape
    return (*rest, *_groups_of(T), D), (*rest, T, *_groups_of(D))


def _groups_of(n: int) -> tuple[int, int]:
    return (n // GROUP, GROUP) if n % GROUP == 0 and n else (1, n)


def _halves(x: Array, plane_axis: int) -> tuple[Array, Array]:
    """Return views of the keys and of the values."""
    moved = np.moveaxis(x, plane_axis, 0)
    return moved[0], moved[1]


def _grouped(x: Array, plane_axis: int) -> tuple[Array, Array]:
    keys, values = _halves(x, plane_axis)
    key_shape, value_shape = _group_shapes(keys.shape)
    return np.ascontiguousarray(keys).reshape(key_shape), np.ascontiguousarray(values).reshape(value_shape)
