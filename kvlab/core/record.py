"""The record: the KV of one block as self-describing bytes with a checksum or an authentication tag.

A record is a header of 128 bytes and a payload. In version 1, all integers are little-endian:

    offset  size  field
    0       4     magic "KVL1"
    4       1     version = 1
    5       1     kind: 1 block of tokens, 2 text prefix, 3 block of an engine, 4 description
    6       1     codec: 0 raw, 1 gzip, 2 zstd of byte planes
    7       1     precision: 1 fp32, 2 fp16, 3 bf16, 4 int8, 5 int4, 6 opaque
    8       1     dtype of the tensor before encoding: 1 fp32, 2 fp16, 3 bf16, 0 for opaque
    9       1     seal kind: 1 xxh3, 2 aes-gcm
    10      1     number of dims, at most 8
    11      1     zero; readers ignore it
    12      4     key id: the id of the master key, 0 for xxh3
    16      32    dims, 8 x u32, unused ones zero; a block is [L, P, H, B, D], opaque
                  elements have their width in bytes (1, 2 or 4) as the last dim
    48      8     payload length in bytes
    56      8     zero; readers ignore it
    64      32    the full cache key
    96      32    seal. xxh3: 8 bytes of XXH3-64 over the header (with this field zero) and
                  the payload, then zeros. aes-gcm: nonce 12, tag 16, zeros; its associated
                  data are the 96 bytes before

`precisions` and `codecs` define the payload, and `seals` defines the seals.

Kinds 1 and 2 hold a tensor. Kinds 3 and 4 hold opaque elements, which only the writer interprets: a block
in the memory layout of an inference engine (`kvlab.connectors.vllm`), and the description of a namespace
(`kvlab.cache.describe`).

`encode` returns the header and the payload in pieces. It does not copy a contiguous CPU tensor of
the stored dtype if the payload is raw and not encrypted. `decode` returns a tensor only for an
intact record of exactly the requested cache key and shape. Any other value raises `BadRecord` with
a reason, which the cache counts as a miss. `decode` executes no code from a record. The sizes of
the value and of the requested tensor bound its allocations.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from kvlab.core import codecs, precisions
from kvlab.core.keys import KEY_BYTES
from kvlab.core.precisions import Array, Unholdable
from kvlab.core.seals import BadSeal, Pieces, Seal, Xxh3
from kvlab.errors import ConfigError, InputError

MAGIC: Final = b"KVL1"
VERSION: Final = 1
KIND_BLOCK: Final = 1
KIND_TEXT: Final = 2
KIND_ENGINE: Final = 3
KIND_DESCRIPTION: Final = 4
OPAQUE: Final = "opaque"
MAX_DIMS: Final = 8
MAX_TENSOR_BYTES: Final = 1 << 30  # of a tensor as fp32; readers allocate at most this, so writers store at most this
HEADER = struct.Struct("<4s8BI8IQQ32s32s")
HEADER_BYTES: Final = HEADER.size
_UNSEALED_HEADER = struct.Struct("<4s8BI8IQQ32s")  # the header without the seal
_SEAL_AT: Final = _UNSEALED_HEADER.size
_PLANE_AXIS: Final = {KIND_BLOCK: 1, KIND_TEXT: 0}  # the axis of keys (0) and values (1)
_PRECISION_IDS: Final = {**precisions.PRECISIONS, OPAQUE: 6}
_UNSIGNED: Final[dict[int, np.dtype[Any]]] = {  # opaque elements, by width
    1: np.dtype(np.uint8),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
}

DTYPES: Final = {1: torch.float32, 2: torch.float16, 3: torch.bfloat16}
_DTYPE_IDS: Final = {t: i for i, t in DTYPES.items()}
_NO_DTYPE: Final = 0
_XXH3: Final = Xxh3()


class BadRecord(Exception):
    """Bytes are not an intact record of the requested cache key and shape. The cache handles this error itself.

    Reasons: magic, version, key_id, length, checksum, forged, kind, key, precision, codec, dims, overflow.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    @property
    def damaged(self) -> bool:
        """Whether the record is unusable for every reader.

        A "forged" record may be intact: to a reader with a wrong master key, every record looks
        forged. That reader must not delete the records of all others. Its next save replaces them.
        """
        return self.reason == "checksum"


@dataclass(frozen=True)
class Format:
    """How records are written. The precision is part of the cache key; the codec and the seal are not."""

    precision: str = "fp32"
    codec: str = "raw"
    seal: Seal = _XXH3

    def __post_init__(self) -> None:
        if self.precision not in _PRECISION_IDS:
            raise ConfigError(
                f"expected one of the precisions {', '.join(precisions.PRECISIONS)}, got {self.precision!r}"
            )
        if self.codec not in codecs.CODECS:
            raise ConfigError(f"expected one of the codecs {', '.join(codecs.CODECS)}, got {self.codec!r}")


def encode(tensor: Tensor, key: bytes, fmt: Format, kind: int = KIND_BLOCK) -> Pieces:
    """Encode one block as pieces, the header first.

    Args:
        tensor: fp32, fp16 or bf16; any device, any strides; up to 8 dims. The integer precisions
            require the planes at axis 1 of a block or axis 0 of a text record, and tokens and
            channels as the last two axes.
        key: the 32-byte cache key.

    The payload of a raw record may share memory with `tensor`: send the record before `tensor` changes.

    Raises:
        InputError: a record of this precision cannot have this dtype, shape or cache key.
        Unholdable: a number is too large for the precision, is NaN or infinite at int8 or int4, or
            the tensor is larger than readers allocate.
    """
    if tensor.dtype not in _DTYPE_IDS or fmt.precision == OPAQUE:
        raise InputError(
            f"expected a tensor of float32, float16 or bfloat16 and a precision for it, got {tensor.dtype} and "
            f"{fmt.precision}"
        )
    if not 1 <= tensor.ndim <= MAX_DIMS or max(tensor.shape) >= 2**32:
        raise InputError(f"expected a tensor of 1 to {MAX_DIMS} dims, got {tuple(tensor.shape)}")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise InputError(f"expected a dense tensor with data, got {tensor.layout} on {tensor.device}")
    if _tensor_bytes(tensor.shape) > MAX_TENSOR_BYTES:
        raise Unholdable(f"a tensor of shape {tuple(tensor.shape)} is larger than readers allocate")
    if len(key) != KEY_BYTES:
        raise InputError(f"expected a cache key of {KEY_BYTES} bytes, got {len(key)}")
    try:
        parts = precisions.to_parts(tensor, fmt.precision, _PLANE_AXIS[kind])
    except ValueError as error:
        raise InputError(f"{fmt.precision}: {error}") from error
    return encode_parts(parts, tensor.shape, tensor.dtype, key, fmt, kind)


def encode_parts(
    parts: list[Array], shape: Sequence[int], dtype: torch.dtype, key: bytes, fmt: Format, kind: int = KIND_BLOCK
) -> Pieces:
    """Encode the parts of a tensor of this shape and dtype, as `encode` does with the tensor itself."""
    return _sealed(parts, shape, _DTYPE_IDS[dtype], key, fmt, kind)


def encode_opaque(elements: Array, key: bytes, fmt: Format, kind: int = KIND_ENGINE) -> Pieces:
    """Encode elements that only the writer interprets, as pieces, the header first.

    Args:
        elements: unsigned integers of 1, 2 or 4 bytes, up to 7 dims, contiguous. The width is that of the
            numbers that they hold, so that zstd separates their bytes.
        fmt: of the precision "opaque".

    Raises:
        InputError: the elements, the format or the cache key have another form.
    """
    width = elements.dtype.itemsize
    if elements.dtype != _UNSIGNED.get(width) or not 1 <= elements.ndim < MAX_DIMS or fmt.precision != OPAQUE:
        raise InputError(
            f"expected opaque elements as unsigned integers of 1, 2 or 4 bytes in 1 to {MAX_DIMS - 1} dims, "
            f"got {elements.dtype} in {elements.ndim} dims for the precision {fmt.precision}"
        )
    if len(key) != KEY_BYTES:
        raise InputError(f"expected a cache key of {KEY_BYTES} bytes, got {len(key)}")
    return _sealed([elements], (*elements.shape, width), _NO_DTYPE, key, fmt, kind)


def _sealed(parts: list[Array], shape: Sequence[int], dtype: int, key: bytes, fmt: Format, kind: int) -> Pieces:
    payload = codecs.pack(parts, fmt.codec)
    dims = (*shape, *[0] * (MAX_DIMS - len(shape)))
    ids = (codecs.CODECS[fmt.codec], _PRECISION_IDS[fmt.precision], dtype)
    seal_ids, size = (fmt.seal.kind, len(shape), 0, fmt.seal.key_id), sum(map(len, payload))
    header = _UNSEALED_HEADER.pack(MAGIC, VERSION, kind, *ids, *seal_ids, *dims, size, 0, key)
    seal, payload = fmt.seal.close(header, payload)
    return header + seal, *payload


def max_record_bytes(fmt: Format, shape: Sequence[int], kind: int = KIND_BLOCK) -> int:
    """Return the size of a buffer for any intact record of this shape and precision. It is a multiple of 64."""
    size = precisions.layout_bytes(_layout(fmt.precision, tuple(shape), kind))
    return -(-(HEADER_BYTES + size + size // 64 + 4096) // 64) * 64  # incompressible data grows by less


def decode(
    value: bytes | bytearray | memoryview,
    key: bytes,
    fmt: Format,
    shape: Sequence[int] | None,
    kind: int = KIND_BLOCK,
    out: Tensor | None = None,
    max_bytes: int = MAX_TENSOR_BYTES,
) -> Tensor:
    """Decode a record.

    Args:
        value: the value from the store, with any alignment.
        key, fmt.precision, fmt.seal, shape, kind: the request, which the record must match. If
            `shape` is None, as for text records, every shape matches. The codec is read from the
            record, because writers may use different codecs.
        out: a tensor of `shape` to fill, with any strides and floating dtype. Without it, the
            result is a new tensor of the dtype before encoding.
        max_bytes: the largest new tensor, measured as fp32.

    Returns:
        `out` or the new tensor. It shares no memory with `value`.

    Raises:
        BadRecord: the record cannot be used, for this reason. The contents of `out` are then undefined.
    """
    parts, dims, dtype = decode_parts(value, key, fmt, shape, kind, MAX_TENSOR_BYTES if out is not None else max_bytes)
    out = torch.empty(dims, dtype=DTYPES[dtype]) if out is None else out
    try:
        precisions.from_parts(parts, fmt.precision, _PLANE_AXIS[kind], out)
    except Unholdable:
        raise BadRecord("overflow") from None
    return out


def decode_parts(
    value: bytes | bytearray | memoryview,
    key: bytes,
    fmt: Format,
    shape: Sequence[int] | None,
    kind: int = KIND_BLOCK,
    max_bytes: int = MAX_TENSOR_BYTES,
) -> tuple[list[Array], tuple[int, ...], int]:
    """Check and unpack a record, as `decode` does, but leave the numbers at the precision of the record.

    Returns:
        The parts (see `precisions`), which may share memory with `value` and be read-only, the shape, and the dtype
        before encoding, a key of `DTYPES`.

    Raises:
        BadRecord: as in `decode`.
    """
    view = memoryview(value)
    if view.nbytes < HEADER_BYTES:
        raise BadRecord("length")
    magic, version, got_kind, codec, precision, dtype, seal, ndim, _, key_id, *rest = _UNSEALED_HEADER.unpack_from(view)
    dims, (length, _, got_key) = tuple(rest[:MAX_DIMS]), rest[MAX_DIMS:]
    # The order matters: an unknown format is reported before damage.
    if magic != MAGIC:
        raise BadRecord("magic")
    if version != VERSION:
        raise BadRecord("version")
    if seal != fmt.seal.kind:  # with a master key, a reader rejects checksums, which anyone can compute
        raise BadRecord("key_id")
    payload = view[HEADER_BYTES:]
    if length != payload.nbytes:
        raise BadRecord("length")
    try:
        payload = fmt.seal.open(bytes(view[:_SEAL_AT]), bytes(view[_SEAL_AT:HEADER_BYTES]), payload, key_id)
    except BadSeal as error:
        raise BadRecord(error.reason) from None
    if got_kind != kind:
        raise BadRecord("kind")
    if got_key != key:
        raise BadRecord("key")
    if precision != _PRECISION_IDS[fmt.precision]:
        raise BadRecord("precision")
    if codec not in codecs.CODECS.values():
        raise BadRecord("codec")
    known = dtype == _NO_DTYPE if fmt.precision == OPAQUE else dtype in DTYPES
    if not 1 <= ndim <= MAX_DIMS or any(dims[ndim:]) or not known:
        raise BadRecord("dims")
    dims = dims[:ndim]
    if shape is not None and dims != tuple(shape):
        raise BadRecord("dims")
    if _tensor_bytes(dims) > max_bytes:
        raise BadRecord("overflow")
    try:
        layout = _layout(fmt.precision, dims, kind)
    except ValueError:
        raise BadRecord("dims") from None
    try:
        return codecs.unpack(payload, codec, layout), dims, dtype
    except ValueError:
        raise BadRecord("codec") from None


def decode_opaque(
    value: bytes | bytearray | memoryview,
    key: bytes,
    fmt: Format,
    shape: Sequence[int] | None,
    kind: int = KIND_ENGINE,
    max_bytes: int = MAX_TENSOR_BYTES,
) -> Array:
    """Return the elements of a record of `encode_opaque`, which may share memory with `value` and be read-only.

    Args:
        shape: the shape of the elements with their width in bytes as the last dim; None for every shape.

    Raises:
        BadRecord: as in `decode`.
    """
    return decode_parts(value, key, fmt, shape, kind, max_bytes)[0][0]


def _layout(precision: str, dims: tuple[int, ...], kind: int) -> precisions.Layout:
    """Return the dtype and the shape of each part.

    Raises:
        ValueError: there is no such tensor.
    """
    if precision != OPAQUE:
        return precisions.layout(precision, dims, _PLANE_AXIS[kind])
    if dims[-1] not in _UNSIGNED:
        raise ValueError(f"expected a width of 1, 2 or 4 bytes, got {dims[-1]}")
    return [(_UNSIGNED[dims[-1]], dims[:-1])]


def _tensor_bytes(dims: Sequence[int]) -> int:
    """Return the size as fp32. A dim of 0 counts as 1, because torch computes strides from the other dims."""
    return 4 * math.prod(max(d, 1) for d in dims)
