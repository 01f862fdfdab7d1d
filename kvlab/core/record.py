"""The record: one block's KV as bytes that describe and guard themselves.

A record is a header of 128 bytes and a payload. Version 1, all integers little-endian:

    offset  size  field
    0       4     magic "KVL1"
    4       1     version = 1
    5       1     kind: 1 block of tokens, 2 text prefix
    6       1     codec: 0 raw, 1 gzip, 2 zstd of shuffled bytes
    7       1     precision: 1 fp32, 2 fp16, 3 bf16, 4 int8, 5 int4
    8       1     dtype of the tensor before encoding: 1 fp32, 2 fp16, 3 bf16
    9       1     seal kind: 1 xxh3, 2 aes-gcm
    10      1     number of dims, at most 8
    11      1     zero
    12      4     key id: which key of the seal, 0 for xxh3
    16      32    dims, 8 x u32, unused ones zero; a block is [L, P, H, B, D]
    48      8     payload length in bytes
    56      8     zero
    64      32    the full key
    96      32    seal: xxh3 64 of (header with this field zero, then payload) in 8 bytes and
                  zeros; aes-gcm: nonce 12, tag 16, zeros

`encode` gives header and payload as two pieces, so that a raw payload is never copied.
`decode` gives back a tensor only for an intact record of exactly the key and shape asked
for; anything else is a `BadRecord` with a reason, which the cache counts as a miss. It
executes nothing and allocates no more than the shape it was asked for.

xxh3 finds accidents. It does not stop an attacker who can write to the store: whoever can
forge a value can compute its checksum. That is the job of aes-gcm.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import xxhash
from torch import Tensor

from kvlab.core import codecs
from kvlab.core.identity import KEY_BYTES
from kvlab.errors import ConfigError, InputError

MAGIC: Final = b"KVL1"
VERSION: Final = 1
KIND_BLOCK: Final = 1
KIND_TEXT: Final = 2
SEAL_XXH3: Final = 1
SEAL_AES_GCM: Final = 2
MAX_DIMS: Final = 8
HEADER = struct.Struct("<4s8BI8IQQ32s32s")
HEADER_BYTES: Final = HEADER.size
_SEAL_AT: Final = 96

DTYPES: Final = {1: torch.float32, 2: torch.float16, 3: torch.bfloat16}
_DTYPE_IDS: Final = {t: i for i, t in DTYPES.items()}

Pieces = tuple[bytes | memoryview, ...]
"""A value in parts whose concatenation is what the store keeps."""


class BadRecord(Exception):
    """Bytes that are not an intact record of the key and shape asked for. Never leaves the cache.

    Reasons: magic, version, kind, length, dims, precision, codec, key, key_id, checksum, forged, overflow.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Unholdable(Exception):
    """A tensor with values that the precision cannot hold. The cache drops the put and counts it."""


@dataclass(frozen=True)
class Format:
    """How records are written: precision (part of identity) and codec (not part of it)."""

    precision: str = "fp32"
    codec: str = "raw"

    def __post_init__(self) -> None:
        if self.precision not in codecs.PRECISIONS:
            raise ConfigError(f"expected a precision of {', '.join(codecs.PRECISIONS)}, got {self.precision!r}")
        if self.codec not in codecs.CODECS:
            raise ConfigError(f"expected a codec of {', '.join(codecs.CODECS)}, got {self.codec!r}")


def encode(tensor: Tensor, key: bytes, fmt: Format, kind: int = KIND_BLOCK) -> Pieces:
    """Turn one block into (header, payload).

    Args:
        tensor: any shape of up to 8 dims; fp32, fp16 or bf16; any device, any strides.
        key: its 32-byte key.

    The payload of a raw record may share memory with `tensor`: send it before you change that.

    Raises:
        InputError: a dtype or shape that no record holds.
        Unholdable: a value too large for the precision.
    """
    if tensor.dtype not in _DTYPE_IDS:
        raise InputError(f"expected a tensor of float32, float16 or bfloat16, got {tensor.dtype}")
    if not 1 <= tensor.ndim <= MAX_DIMS or max(tensor.shape) >= 2**32 or len(key) != KEY_BYTES:
        raise InputError(
            f"expected 1 to {MAX_DIMS} dims and a key of {KEY_BYTES} bytes, got {tuple(tensor.shape)} and {len(key)}"
        )
    try:
        payload = codecs.encode(tensor, fmt.precision, fmt.codec)
    except OverflowError as error:
        raise Unholdable(str(error)) from error
    dims = (*tensor.shape, *[0] * (MAX_DIMS - tensor.ndim))
    ids = (codecs.CODECS[fmt.codec], codecs.PRECISIONS[fmt.precision], _DTYPE_IDS[tensor.dtype])
    header = HEADER.pack(
        MAGIC, VERSION, kind, *ids, SEAL_XXH3, tensor.ndim, 0, 0, *dims, payload.nbytes, 0, key, bytes(32)
    )
    return header[:_SEAL_AT] + _xxh3(header, payload), payload


def decode(
    value: bytes | memoryview,
    key: bytes,
    fmt: Format,
    shape: Sequence[int] | None,
    kind: int = KIND_BLOCK,
    out: Tensor | None = None,
    max_bytes: int = 1 << 30,
) -> Tensor:
    """Turn a record back into its tensor.

    Args:
        value: what the store returned; any alignment.
        key, fmt.precision, shape, kind: what was asked for; the record must agree. `shape`
            None accepts any shape whose tensor takes at most `max_bytes` (text records). The
            codec is read from the record: writers may differ in it.
        out: a tensor of `shape` to fill, of any strides and floating dtype. Without it a new
            tensor of the dtype that was encoded is made.

    Returns:
        `out`, or the new tensor. It shares no memory with `value`.

    Raises:
        BadRecord: with the reason; `out` may then hold anything.
    """
    view = memoryview(value)
    if view.nbytes < HEADER_BYTES:
        raise BadRecord("length")
    magic, version, got_kind, codec, precision, dtype, seal, ndim, _, key_id, *rest = HEADER.unpack_from(view)
    dims, (length, _, got_key, _) = tuple(rest[:MAX_DIMS]), rest[MAX_DIMS:]
    payload = view[HEADER_BYTES:]
    # The order matters: what this reader does not know is told before what is damaged.
    if magic != MAGIC:
        raise BadRecord("magic")
    if version != VERSION:
        raise BadRecord("version")
    if seal != SEAL_XXH3 or key_id != 0:
        raise BadRecord("key_id")
    if length != payload.nbytes:
        raise BadRecord("length")
    if bytes(view[_SEAL_AT:HEADER_BYTES]) != _xxh3(bytes(view[:HEADER_BYTES]), payload):
        raise BadRecord("checksum")
    if got_kind != kind:
        raise BadRecord("kind")
    if got_key != key:
        raise BadRecord("key")
    if precision != codecs.PRECISIONS[fmt.precision]:
        raise BadRecord("precision")
    if codec not in codecs.CODECS.values():
        raise BadRecord("codec")
    if not 1 <= ndim <= MAX_DIMS or any(dims[ndim:]) or dtype not in DTYPES:
        raise BadRecord("dims")
    dims = dims[:ndim]
    if shape is not None and dims != tuple(shape):
        raise BadRecord("dims")
    try:
        if out is None:
            # A dim of 0 must not hide the others: torch computes strides from them.
            if codecs.tensor_bytes([max(d, 1) for d in dims], torch.float32) > max_bytes:
                raise BadRecord("overflow")
            out = torch.empty(dims, dtype=DTYPES[dtype])
        codecs.decode(payload, fmt.precision, codec, out)
    except ValueError as error:
        raise BadRecord("codec") from error
    return out


def _xxh3(header: bytes, payload: bytes | memoryview) -> bytes:
    """The 32-byte seal field: 8 bytes of xxh3-64, then zeros."""
    h = xxhash.xxh3_64(header[:_SEAL_AT])
    h.update(bytes(HEADER_BYTES - _SEAL_AT))
    h.update(payload)
    return h.intdigest().to_bytes(8, "little") + bytes(24)
