"""Tensor to payload bytes and back: first the precision, then the compression.

Implemented so far: fp32, fp16 and bf16, raw or gzip. int8, int4 and zstd have their numbers
reserved in the record format and are refused by name until they exist.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

PRECISIONS: Final = {"fp32": 1, "fp16": 2, "bf16": 3}
CODECS: Final = {"raw": 0, "gzip": 1}
STORED: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GZIP_LEVEL: Final = 6
_SAME_SIZE: Final = {4: torch.int32, 2: torch.int16}
_GZIP_WINDOW: Final = 31  # zlib's way to say: gzip framing


def tensor_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


def encode(tensor: Tensor, precision: str, codec: str) -> memoryview:
    """The payload of a record. A raw payload shares the tensor's memory when dtype and layout allow it.

    Raises:
        OverflowError: a finite value became infinite at this precision.
    """
    stored = tensor.detach().to("cpu", STORED[precision]).contiguous()
    if stored.dtype != tensor.dtype and bool((stored.isinf() != tensor.to("cpu").isinf()).any()):
        raise OverflowError(f"a value is beyond what {precision} holds")
    flat = stored.as_strided((stored.numel(),), (1,))  # a contiguous tensor of one element may have any stride
    raw = flat.view(torch.uint8).numpy().data
    if codec == "raw":
        return raw
    packer = zlib.compressobj(GZIP_LEVEL, wbits=_GZIP_WINDOW)  # writes no time stamp: equal input, equal bytes
    return memoryview(packer.compress(raw) + packer.flush())


def decode(payload: bytes | memoryview, precision: str, codec: int, out: Tensor) -> None:
    """Fill `out` (any strides, any floating dtype) from a payload.

    Raises:
        ValueError: the payload does not unpack to exactly the bytes of `out`'s shape.
    """
    stored = STORED[precision]
    size = tensor_bytes(out.shape, stored)
    if codec == CODECS["gzip"]:
        payload = _gunzip(payload, size)
    if memoryview(payload).nbytes != size:
        raise ValueError(f"expected {size} bytes, got {memoryview(payload).nbytes}")
    if size == 0:
        return
    if out.dtype == stored and out.device.type == "cpu":
        # numpy reads bytes that may not be written to, torch does not: this saves a copy of each record.
        source = np.frombuffer(payload, dtype=f"u{stored.itemsize}").reshape(out.shape)
        np.copyto(out.view(_SAME_SIZE[stored.itemsize]).numpy(), source.view(f"i{stored.itemsize}"))
    else:
        out.copy_(_view(payload, stored).reshape(out.shape))


def _gunzip(payload: bytes | memoryview, size: int) -> bytes:
    """Unpack exactly `size` bytes: a decompression bomb costs no more memory than an honest record."""
    unpacker = zlib.decompressobj(wbits=_GZIP_WINDOW)
    try:
        data = unpacker.decompress(payload, size or 1)  # 0 would mean "no limit"
        more = unpacker.decompress(unpacker.unconsumed_tail, 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if more or not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"does not unpack to exactly {size} bytes")
    return data


def _view(payload: bytes | memoryview, dtype: torch.dtype) -> Tensor:
    """The payload as a 1-D tensor, without a copy where the bytes are writable and aligned."""
    view = memoryview(payload)
    flat = torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)
    return (flat.clone() if flat.data_ptr() % dtype.itemsize else flat).view(dtype)
