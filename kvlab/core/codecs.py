"""Lossless conversion of parts to payload bytes and back.

    raw    the little-endian bytes of all parts, concatenated
    gzip   the same bytes as one gzip member, level 6
    zstd   the lengths of all frames, u32 each, and then the frames. A part has one byte plane per
           byte of its numbers (all lowest bytes, …, all highest bytes). A byte plane is one zstd
           frame that declares its content size. The frames have the order of the parts

The high bytes of floating-point numbers hold the sign and the exponent, which repeat. The low
bytes hold the mantissa, which looks random. Byte planes separate the two for the compressor.

This module does not authenticate payloads; `kvlab.core.record` does. `unpack` accepts any bytes,
and knows the size of every allocation in advance.
"""

from __future__ import annotations

import math
import struct
import threading
import zlib
from typing import Any, Final

import numpy as np
import zstandard

from kvlab.core.precisions import Array, Layout, layout_bytes

CODECS: Final = {"raw": 0, "gzip": 1, "zstd": 2}
GZIP_LEVEL: Final = 6

_GZIP_WINDOW: Final = 31  # selects gzip framing in zlib


def pack(parts: list[Array], codec: str) -> tuple[bytes | memoryview, ...]:
    """Return the payload in pieces. Raw pieces share the memory of the parts.

    Raises:
        ValueError: there is no such codec.
    """
    flat = [p.reshape(-1).view(np.uint8).data for p in parts]
    if codec == "raw":
        return tuple(flat)
    if codec == "gzip":
        packer = zlib.compressobj(GZIP_LEVEL, wbits=_GZIP_WINDOW)  # no time stamp, so equal input gives equal bytes
        return (*map(packer.compress, flat), packer.flush())
    if codec == "zstd":
        frames = [frame for part in parts for frame in _zstd_frames(part)]
        return struct.pack(f"<{len(frames)}I", *map(len, frames)), *frames
    raise ValueError(f"expected a codec of {', '.join(CODECS)}, got {codec!r}")


def unpack(payload: memoryview, codec: int, parts: Layout) -> list[Array]:
    """Return the parts of a payload. They may share its memory and be read-only.

    Raises:
        ValueError: the payload does not unpack to exactly these parts.
    """
    if codec == CODECS["zstd"]:
        return _unzstd(payload, parts)
    size = layout_bytes(parts)
    if codec == CODECS["gzip"]:
        payload = memoryview(_gunzip(payload, size))
    elif codec != CODECS["raw"]:
        raise ValueError(f"unknown codec number {codec}")
    if payload.nbytes != size:
        raise ValueError(f"expected {size} bytes, got {payload.nbytes}")
    arrays, at = [], 0
    for dtype, shape in parts:
        count = math.prod(shape)
        arrays.append(np.frombuffer(payload, dtype, count, at).reshape(shape) if count else np.zeros(shape, dtype))
        at += count * dtype.itemsize
    return arrays


def _gunzip(payload: memoryview, size: int) -> bytes:
    """Unpack exactly `size` bytes, so that a decompression bomb takes no more memory than an intact record."""
    unpacker = zlib.decompressobj(wbits=_GZIP_WINDOW)
    try:
        data = unpacker.decompress(payload, size or 1)  # a limit of 0 would mean no limit
        more = unpacker.decompress(unpacker.unconsumed_tail, 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if more or not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"the gzip member does not unpack to exactly {size} bytes")
    return data


def _unzstd(payload: memoryview, parts: Layout) -> list[Array]:
    frame_count = sum(dtype.itemsize for dtype, _ in parts)
    if payload.nbytes < 4 * frame_count:
        raise ValueError("the payload is too short for the lengths of its frames")
    lengths = struct.unpack_from(f"<{frame_count}I", payload)
    if 4 * frame_count + sum(lengths) != payload.nbytes:
        raise ValueError("the lengths of the frames do not add up to the length of the payload")
    frames, at, arrays = iter(lengths), 4 * frame_count, []
    for dtype, shape in parts:
        byte_planes = []
        for _ in range(dtype.itemsize):
            length = next(frames)
            byte_planes.append(_unzstd_frame(payload[at : at + length], math.prod(shape)))
            at += length
        arrays.append(_unshuffled(byte_planes, dtype).reshape(shape))
    return arrays


def _unzstd_frame(frame: memoryview, size: int) -> Array:
    """Unpack one byte plane. The declared size is checked first, because it determines the allocation."""
    try:
        if zstandard.frame_content_size(frame) != size:
            raise ValueError(f"a frame does not declare {size} bytes")
        return np.frombuffer(_zstd.decompressor.decompress(frame, allow_extra_data=False), np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def _shuffled(part: Array) -> list[Array]:
    """Return the byte planes of a part, lowest byte first."""
    flat = part.reshape(-1)
    if part.itemsize == 1:
        return [flat.view(np.uint8)]
    return [(flat >> 8 * i).astype(np.uint8) for i in range(part.itemsize)]


def _unshuffled(byte_planes: list[Array], dtype: np.dtype[Any]) -> Array:
    if dtype.itemsize == 1:
        return byte_planes[0].view(dtype)
    whole = byte_planes[-1].astype(dtype)
    for byte_plane in reversed(byte_planes[:-1]):
        whole <<= 8
        whole |= byte_plane
    return whole


def _zstd_frames(part: Array) -> list[bytes]:
    *low, highest = _shuffled(part)
    return [*[_zstd.low.compress(byte_plane.data) for byte_plane in low], _zstd.high.compress(highest.data)]


class _Zstd(threading.local):
    """The zstd contexts of one thread. They are costly to create and not safe to share.

    Entropy coding compresses the highest byte plane. Matches shorter than 7 bytes only impair it:
    without them the plane is 1 % smaller than at level 1. The lower byte planes contain almost no
    matches. A search in larger steps makes them 0.1 % larger and is up to 5 times faster.
    """

    def __init__(self) -> None:
        self.high = _compressor(steps=0)
        self.low = _compressor(steps=4)
        self.decompressor = zstandard.ZstdDecompressor()


def _compressor(steps: int) -> zstandard.ZstdCompressor:
    fast = {"strategy": zstandard.STRATEGY_FAST, "min_match": 7, "target_length": steps}
    sizes = {"window_log": 20, "chain_log": 13, "hash_log": 13, "search_log": 1}
    return zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(**fast, **sizes))


_zstd: Final = _Zstd()
