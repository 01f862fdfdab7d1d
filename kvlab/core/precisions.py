"""Tensor to parts and back: at which precision the numbers are kept.

A precision turns a tensor into one array or more, the parts. Their types and shapes follow
from the tensor's shape, so nothing needs a table of contents:

    fp32, fp16, bf16   the numbers
    int8               keys: integers k, scales; values: integers v, scales
                           key = k * scale, k in -127 … 127     value = v * scale, v in -72 … 72
    int4               keys: nibbles k, scales, lows; values: nibbles v, scales
                           key = k * scale + low, k in 0 … 15   value = (v - 8) * scale, v in 1 … 15

Integers share a scale in groups of 64 (or a whole axis that is no multiple of 64). Keys are
grouped along the tokens of one channel, because a few channels of keys are many times larger
than the rest; values along the channels of one token (Liu et al. 2024, "KIVI"). Keys get
more levels than values, because an error in a key changes where attention looks: on the
shipped model, int8 keys cost about five times the KL of int8 values.

How integers are chosen: a scale is the group's largest magnitude (int4 keys: its range above
the low) divided by the levels, rounded up to a bf16 with 6 bits of mantissa, at least 2**-126;
a low is the smallest number rounded down to a bf16. The integer is the number (less the low)
times the fp32 inverse of the scale, rounded half to even. Nibbles go two to a byte, the first
one low, an odd one at the end beside a zero.
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
_INFINITE: Final = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}  # as exponents
_KEY_LEVELS: Final = {"int8": 127, "int4": 15}  # int8: -127 … 127; int4: 0 … 15 above the group's lowest value
_VALUE_LEVELS: Final = {"int8": 72, "int4": 7}  # -72 … 72, -7 … 7
_SCALE_BITS: Final = 6  # of a scale's mantissa, rounded up: these compress better than all 7 of a bf16
_TINY: Final = np.float32(2.0**-126)  # the smallest scale whose inverse is finite
_U1: Final = np.dtype(np.uint8)
_I1: Final = np.dtype(np.int8)
_U2: Final = np.dtype("<u2")
_U4: Final = np.dtype("<u4")
_UNSIGNED: Final[dict[int, np.dtype[Any]]] = {2: _U2, 4: _U4}

Array = NDArray[Any]
Layout = list[tuple[np.dtype[Any], tuple[int, ...]]]


class Unholdable(Exception):
    """Numbers that a precision cannot hold: too large, or NaN or infinity among integers."""


def layout(precision: str, shape: tuple[int, ...], planes: int) -> Layout:
    """Type and shape of each part of a tensor of this shape.

    Args:
        planes: the axis with keys at 0 and values at 1; only the integer precisions ask.

    Raises:
        ValueError: an integer precision for a shape without planes, tokens and channels.
    """
    if precision in _STORED:
        return [(_U4 if precision == "fp32" else _U2, shape)]
    if len(shape) < planes + 3 or shape[planes] != 2:
        raise ValueError(f"expected two planes at axis {planes}, then tokens and channels, got {shape}")
    keys, values = _group_shapes(shape[:planes] + shape[planes + 1 :])
    key_scale, value_scale = (_U2, (*keys[:-2], 1, keys[-1])), (_U2, (*values[:-1], 1))
    if precision == "int8":
        return [(_I1, keys), key_scale, (_I1, values), value_scale]
    nibbles = (_U1, (-(-math.prod(keys) // 2),))
    return [nibbles, key_scale, key_scale, nibbles, value_scale]


def layout_bytes(parts: Layout) -> int:
    """Bytes of all parts together."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in parts)


def to_parts(tensor: Tensor, precision: str, planes: int) -> list[Array]:
    """The parts of a tensor. A contiguous CPU tensor of the stored dtype is its own part, not a copy.

    Raises:
        Unholdable: see there.
        ValueError: see `layout`.
    """
    tensor = tensor.detach()
    return (
        [_floats(tensor, precision)]
        if precision in _STORED
        else _quantise(tensor.float().cpu().numpy(), precision, planes)
    )


def from_parts(parts: list[Array], precision: str, planes: int, out: Tensor) -> None:
    """Fill `out` (any strides, any device, any floating dtype) from parts of its layout.

    Raises:
        Unholdable: a number that `out`'s dtype cannot hold.
    """
    if precision in _STORED:
        _put_floats(parts[0], precision, out)
    elif out.device.type == "cpu" and out.dtype == torch.float32:
        _dequantise(parts, precision, planes, out.numpy())
    else:
        whole = np.empty(out.shape, np.float32)
        _dequantise(parts, precision, planes, whole)
        _copy(torch.from_numpy(whole), out)


def _floats(tensor: Tensor, precision: str) -> Array:
    """The numbers at a precision, as unsigned integers of the same bits."""
    dtype = _STORED[precision]
    stored = tensor.cpu() if tensor.dtype == dtype else _rounded(tensor, precision)
    bits: Array = stored.contiguous().view(_SAME_SIZE[dtype.itemsize]).numpy()
    unsigned: Array = bits.view(_UNSIGNED[dtype.itemsize])
    return unsigned


def _rounded(tensor: Tensor, precision: str) -> Tensor:
    stored = tensor.to("cpu", _STORED[precision])
    # fp16 to bf16: the reader has fp16 again, and 65504 has become 65536
    back = stored.to(tensor.dtype) if _max(stored) > _max(tensor) else stored
    if _has_infinite(back) and not torch.equal(back.isinf(), tensor.isinf().cpu()):
        raise Unholdable(f"a value is beyond what {precision} holds")
    return stored


def _max(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).max


def _has_infinite(tensor: Tensor) -> bool:
    """Whether there is an infinity or NaN, by the exponents: much faster than asking each number."""
    mask = _INFINITE[tensor.dtype]
    bits: Array = tensor.view(_SAME_SIZE[tensor.itemsize]).numpy()
    return bool(bits.size) and bool((bits & mask).max() == mask)


def _put_floats(bits: Array, precision: str, out: Tensor) -> None:
    dtype = _STORED[precision]
    signed = bits.view(f"i{bits.itemsize}")
    if out.device.type == "cpu" and out.dtype == dtype:
        # numpy reads bytes that may not be written to, torch does not: this saves a copy of each record.
        np.copyto(out.view(_SAME_SIZE[bits.itemsize]).numpy(), signed)
    else:
        _copy(torch.from_numpy(signed if bits.flags.writeable else signed.copy()).view(dtype), out)


def _copy(source: Tensor, out: Tensor) -> None:
    out.copy_(source)
    if _max(out) < _max(source) and not torch.equal(source.isinf(), out.isinf().cpu()):
        raise Unholdable(f"a value is beyond what {out.dtype} holds")


def _quantise(x: Array, precision: str, planes: int) -> list[Array]:
    """Parts of an integer precision from fp32 numbers."""
    parts = layout(precision, x.shape, planes)
    if x.size == 0:
        return [np.zeros(shape, dtype) for dtype, shape in parts]
    keys, values = _grouped(x, planes)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found in the scales
        if precision == "int8":
            return [*_symmetric(keys, -2, _KEY_LEVELS["int8"]), *_symmetric(values, -1, _VALUE_LEVELS["int8"])]
        low = _bf16_below(keys.min(-2, keepdims=True))
        scale = _scale(keys.max(-2, keepdims=True) - _from_bf16(low), _KEY_LEVELS["int4"], _from_bf16(low))
        steps = (keys - _from_bf16(low)) * (1 / _from_bf16(scale))
        integers, value_scale = _symmetric(values, -1, _VALUE_LEVELS["int4"])
    return [_nibbles(np.rint(steps).astype(np.uint8)), scale, low, _nibbles(integers + 8), value_scale]


def _dequantise(parts: list[Array], precision: str, planes: int, out: Array) -> None:
    """Fill `out` (fp32, any strides) from the parts of an integer precision."""
    if out.size == 0:
        return
    keys, values = _halves(out, planes)
    if precision == "int8":
        k, ks, v, vs = parts
        np.copyto(keys, _times(k, ks).reshape(keys.shape))
        np.copyto(values, _times(v, vs).reshape(values.shape))
        return
    k, ks, low, v, vs = parts
    grouped_k, grouped_v = _group_shapes(keys.shape)
    keys4 = _times(_from_nibbles(k, grouped_k), ks)
    keys4 += _from_bf16(low)
    np.copyto(keys, keys4.reshape(keys.shape))
    values4 = _from_nibbles(v, grouped_v).view(np.int8)
    values4 -= 8
    np.copyto(values, _times(values4, vs).reshape(values.shape))


def _symmetric(x: Array, axis: int, levels: int) -> tuple[Array, Array]:
    """int8 in -levels … levels, and bf16 scales, of groups along `axis`."""
    largest = np.maximum(x.max(axis, keepdims=True), -x.min(axis, keepdims=True))
    scale = _scale(largest, levels)
    return np.rint(x * (1 / _from_bf16(scale))).astype(np.int8), scale


def _scale(width: Array, levels: int, low: Array | float = 0.0) -> Array:
    """Scales of groups so wide, as bf16 bits, rounded up so that no integer exceeds its levels.

    Raises:
        Unholdable: NaN or infinity in the group, or the largest number that it would decode to is none of fp32.
    """
    drop = 23 - _SCALE_BITS
    bits = np.maximum(width / np.float32(levels), _TINY).view(np.uint32)
    rounded: Array = (((bits + ((1 << drop) - 1)) >> drop << drop) >> 16).astype(_U2)
    if not (np.isfinite(width).all() and np.isfinite(low + levels * _from_bf16(rounded)).all()):
        raise Unholdable("integers hold no NaN, no infinity, and no numbers at the very end of fp32's range")
    return rounded


def _bf16_below(x: Array) -> Array:
    """The next bf16 at or below each number, as bits."""
    bits = x.view(np.uint32)
    below: Array = (bits + (bits >> 31) * np.uint32(0xFFFF)) >> 16
    return below.astype(_U2)


def _from_bf16(bits: Array) -> Array:
    wide: Array = (bits.astype(np.uint32) << 16).view(np.float32)
    return wide


def _times(integers: Array, scale: Array) -> Array:
    with np.errstate(over="ignore"):  # only a forger writes such scales
        product: Array = np.multiply(integers, _from_bf16(scale), dtype=np.float32)
    return product


def _nibbles(integers: Array) -> Array:
    """Two integers of 0 … 15 in a byte, the first one low."""
    flat = np.zeros((integers.size + 1) // 2 * 2, np.uint8)
    flat[: integers.size] = integers.reshape(-1)
    pairs: Array = flat.view(_U2)
    packed: Array = (pairs | pairs >> 4).astype(np.uint8)
    return packed


def _from_nibbles(packed: Array, shape: tuple[int, ...]) -> Array:
    pairs = packed.astype(_U2)
    flat: Array = ((pairs | pairs << 4) & 0x0F0F).view(np.uint8)
    return flat[: math.prod(shape)].reshape(shape)


def _group_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """[…, T, D] as keys are grouped, […, groups, tokens, D], and as values are, […, T, groups, channels]."""
    *rest, T, D = shape
    return (*rest, *_cut(T), D), (*rest, T, *_cut(D))


def _cut(n: int) -> tuple[int, int]:
    return (n // GROUP, GROUP) if n % GROUP == 0 and n else (1, n)


def _halves(x: Array, planes: int) -> tuple[Array, Array]:
    """Views of the keys and of the values."""
    moved = np.moveaxis(x, planes, 0)
    return moved[0], moved[1]


def _grouped(x: Array, planes: int) -> tuple[Array, Array]:
    keys, values = _halves(x, planes)
    key_shape, value_shape = _group_shapes(keys.shape)
    return np.ascontiguousarray(keys).reshape(key_shape), np.ascontiguousarray(values).reshape(value_shape)
