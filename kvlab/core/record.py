"""The record: one block's KV as bytes that describe and guard themselves.

A record is a header of 128 bytes and a payload. Version 1, all integers little-endian:

    offset  size  field
    0       4     magic "KVL1"
    4       1     version = 1
    5       1     kind: 1 block of tokens, 2 text prefix
    6       1     codec: 0 raw, 1 gzip, 2 zstd of byte planes
    7       1     precision: 1 fp32, 2 fp16, 3 bf16, 4 int8, 5 int4
    8       1     dtype of the tensor before encoding: 1 fp32, 2 fp16, 3 bf16
    9       1     seal kind: 1 xxh3, 2 aes-gcm
    10      1     number of dims, at most 8
    11      1     zero; readers do not look at it
    12      4     key id: which key of the seal, 0 for xxh3
    16      32    dims, 8 x u32, unused ones zero; a block is [L, P, H, B, D]
    48      8     payload length in bytes
    56      8     zero; readers do not look at it
    64      32    the full key
    96      32    seal: xxh3 64 of (header with this field zero, then payload) in 8 bytes and
                  zeros; aes-gcm: nonce 12, tag 16, zeros; the 96 bytes before are its
                  associated data

What the payload holds is said in `precisions` and `codecs`, how seals work in `seals`.

`encode` gives header and payload in pieces, so that a raw payload is never copied.
`decode` gives back a tensor only for an intact record of exactly the key and shape asked
for; anything else is a `BadRecord` with a reason, which the cache counts as a miss. It
executes nothing and allocates no more than the shape it was asked for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvlab.core import codecs, precisions
from kvlab.core.keys import KEY_BYTES
from kvlab.core.precisions import Unholdable
from kvlab.core.seals import Broken, Pieces, Seal, Xxh3
from kvlab.errors import ConfigError, InputError

MAGIC: Final = b"KVL1"
VERSION: Final = 1
KIND_BLOCK: Final = 1
KIND_TEXT: Final = 2
MAX_DIMS: Final = 8
MAX_TENSOR_BYTES: Final = 1 << 30  # of a tensor as fp32: no reader allocates more, so no writer stores more
HEADER = struct.Struct("<4s8BI8IQQ32s32s")
HEADER_BYTES: Final = HEADER.size
_HEAD = struct.Struct("<4s8BI8IQQ32s")  # all but the seal
_SEAL_AT: Final = _HEAD.size
_PLANES: Final = {KIND_BLOCK: 1, KIND_TEXT: 0}  # the axis with keys and values

DTYPES: Final = {1: torch.float32, 2: torch.float16, 3: torch.bfloat16}
_DTYPE_IDS: Final = {t: i for i, t in DTYPES.items()}
_XXH3: Final = Xxh3()


class BadRecord(Exception):
    """Bytes that are not an intact record of the key and shape asked for. Never leaves the cache.

    Reasons: magic, version, key_id, length, checksum, forged, kind, key, precision, codec, dims, overflow.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    @property
    def damaged(self) -> bool:
        """Whether the record is worthless to everyone.

        "forged" is not: to a reader with a wrong master key every record looks forged, and it
        must not empty the store for all others. The next save replaces such a record anyway.
        """
        return self.reason == "checksum"


@dataclass(frozen=True)
class Format:
    """How records are written: precision (part of identity), codec and seal (not part of it)."""

    precision: str = "fp32"
    codec: str = "raw"
    seal: Seal = _XXH3

    def __post_init__(self) -> None:
        if self.precision not in precisions.PRECISIONS:
            raise ConfigError(f"expected a precision of {', '.join(precisions.PRECISIONS)}, got {self.precision!r}")
        if self.codec not in codecs.CODECS:
            raise ConfigError(f"expected a codec of {', '.join(codecs.CODECS)}, got {self.codec!r}")


def encode(tensor: Tensor, key: bytes, fmt: Format, kind: int = KIND_BLOCK) -> Pieces:
    """Turn one block into pieces, the header first.

    Args:
        tensor: fp32, fp16 or bf16; any device, any strides; up to 8 dims. The integer precisions
            want the planes at axis 1 of a block and at axis 0 of a text record, tokens and
            channels as the last two.
        key: its 32-byte key.

    The payload of a raw record may share memory with `tensor`: send it before you change that.

    Raises:
        InputError: a dtype or shape that no record of this precision holds.
        Unholdable: a value too large for the precision, NaN or infinity at int8 or int4, or a tensor
            that no reader would allocate.
    """
    if tensor.dtype not in _DTYPE_IDS:
        raise InputError(f"expected a tensor of float32, float16 or bfloat16, got {tensor.dtype}")
    if not 1 <= tensor.ndim <= MAX_DIMS or max(tensor.shape) >= 2**32:
        raise InputError(f"expected a tensor of 1 to {MAX_DIMS} dims, got {tuple(tensor.shape)}")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise InputError(f"expected a dense tensor with data, got {tensor.layout} on {tensor.device}")
    if _tensor_bytes(tensor.shape) > MAX_TENSOR_BYTES:
        raise Unholdable(f"a tensor of shape {tuple(tensor.shape)} is more than any reader allocates")
    if len(key) != KEY_BYTES:
        raise InputError(f"expected a key of {KEY_BYTES} bytes, got {len(key)}")
    try:
        payload = codecs.pack(precisions.to_parts(tensor, fmt.precision, _PLANES[kind]), fmt.codec)
    except ValueError as error:
        raise InputError(f"{fmt.precision}: {error}") from error
    dims = (*tensor.shape, *[0] * (MAX_DIMS - tensor.ndim))
    ids = (codecs.CODECS[fmt.codec], precisions.PRECISIONS[fmt.precision], _DTYPE_IDS[tensor.dtype])
    guard, size = (fmt.seal.kind, tensor.ndim, 0, fmt.seal.key_id), sum(map(len, payload))
    head = _HEAD.pack(MAGIC, VERSION, kind, *ids, *guard, *dims, size, 0, key)
    seal, payload = fmt.seal.close(head, payload)
    return head + seal, *payload


def max_record_bytes(fmt: Format, shape: Sequence[int], kind: int = KIND_BLOCK) -> int:
    """Room for any honest record of this shape and precision, whatever its codec; a multiple of 64."""
    size = precisions.layout_bytes(precisions.layout(fmt.precision, tuple(shape), _PLANES[kind]))
    return -(-(HEADER_BYTES + size + size // 64 + 4096) // 64) * 64  # what does not compress grows by less than that


def decode(
    value: bytes | bytearray | memoryview,
    key: bytes,
    fmt: Format,
    shape: Sequence[int] | None,
    kind: int = KIND_BLOCK,
    out: Tensor | None = None,
    max_bytes: int = MAX_TENSOR_BYTES,
) -> Tensor:
    """Turn a record back into its tensor.

    Args:
        value: what the store returned; any alignment.
        key, fmt.precision, fmt.seal, shape, kind: what was asked for; the record must agree.
            `shape` None accepts any shape whose tensor takes at most `max_bytes` (text
            records). The codec is read from the record: writers may differ in it.
        out: a tensor of `shape` to fill, of any strides and floating dtype. Without it a new
            tensor of the dtype that was encoded is made.

    Returns:
        `out`, or the new tensor. It has no memory in common with `value`.

    Raises:
        BadRecord: with the reason; `out` may then hold anything.
    """
    view = memoryview(value)
    if view.nbytes < HEADER_BYTES:
        raise BadRecord("length")
    magic, version, got_kind, codec, precision, dtype, seal, ndim, _, key_id, *rest = _HEAD.unpack_from(view)
    dims, (length, _, got_key) = tuple(rest[:MAX_DIMS]), rest[MAX_DIMS:]
    # The order matters: what this reader does not know is told before what is damaged.
    if magic != MAGIC:
        raise BadRecord("magic")
    if version != VERSION:
        raise BadRecord("version")
    if seal != fmt.seal.kind:  # a reader with a key takes no mere checksum: anyone could have written that
        raise BadRecord("key_id")
    payload = view[HEADER_BYTES:]
    if length != payload.nbytes:
        raise BadRecord("length")
    try:
        payload = fmt.seal.open(bytes(view[:_SEAL_AT]), bytes(view[_SEAL_AT:HEADER_BYTES]), payload, key_id)
    except Broken as error:
        raise BadRecord(error.reason) from None
    if got_kind != kind:
        raise BadRecord("kind")
    if got_key != key:
        raise BadRecord("key")
    if precision != precisions.PRECISIONS[fmt.precision]:
        raise BadRecord("precision")
    if codec not in codecs.CODECS.values():
        raise BadRecord("codec")
    if not 1 <= ndim <= MAX_DIMS or any(dims[ndim:]) or dtype not in DTYPES:
        raise BadRecord("dims")
    dims = dims[:ndim]
    if shape is not None and dims != tuple(shape):
        raise BadRecord("dims")
    if out is None and _tensor_bytes(dims) > max_bytes:
        raise BadRecord("overflow")
    return _unpack(payload, codec, fmt.precision, _PLANES[kind], dims, DTYPES[dtype], out)


def _tensor_bytes(dims: Sequence[int]) -> int:
    """Of a tensor as fp32. A dim of 0 must not hide the others: torch computes strides from them."""
    return 4 * math.prod(max(d, 1) for d in dims)


def _unpack(
    payload: memoryview,
    codec: int,
    precision: str,
    planes: int,
    dims: tuple[int, ...],
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    try:
        layout = precisions.layout(precision, dims, planes)
    except ValueError:
        raise BadRecord("dims") from None
    try:
        parts = codecs.unpack(payload, codec, layout)
        out = torch.empty(dims, dtype=dtype) if out is None else out
        precisions.from_parts(parts, precision, planes, out)
    except ValueError:
        raise BadRecord("codec") from None
    except Unholdable:
        raise BadRecord("overflow") from None
    return out
