"""The tensors of a safetensors file, read from one open file into memory of their own.

A file contains a length as little-endian u64, a JSON header of that length with the dtype, shape and
place of each tensor, and the bytes of the tensors. Libraries map the file into memory, but this
module does not: overwriting a mapped file changes the running model, and truncating it ends the
process.

Source: the safetensors format, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from io import FileIO
from typing import Any, Final

import torch
from torch import Tensor

from kvlab.errors import ModelError

# A tied model may store its one weight under either name.
EMBEDDING, OUTPUT_HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_HEADER_BYTES = 100_000_000

_DTYPES: Final = {
    "BOOL": torch.bool,
    **{f"I{8 * t.itemsize}": t for t in (torch.int8, torch.int16, torch.int32, torch.int64)},
    **{f"U{8 * t.itemsize}": t for t in (torch.uint8, torch.uint16, torch.uint32, torch.uint64)},
    **{f"F{8 * t.itemsize}": t for t in (torch.float16, torch.float32, torch.float64)},
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_ROTARY_BUFFER: Final = re.compile(
    r"(\w+\.)?(layers\.\d+\.\w+\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
)


def is_rotary_buffer(name: str) -> bool:
    """Return whether a tensor is a known RoPE buffer of older checkpoints.

    Such a buffer follows from the config and is not a weight.

    >>> is_rotary_buffer("model.layers.0.self_attn.rotary_emb.inv_freq"), is_rotary_buffer("model.inv_freq")
    (True, False)
    """
    return _ROTARY_BUFFER.fullmatch(name) is not None


@dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor in a file.

    Attributes:
        name, dtype, shape: those of the tensor.
        stream: the open file.
        offset: the position of the first byte in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stream: FileIO
    offset: int

    @property
    def nbytes(self) -> int:
        """The size in the file, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Return the tensor in memory of its own. The file must still be open.

        Raises:
            ModelError: the file is truncated or cannot be read.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        room = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            self.stream.seek(self.offset)
            while room:
                count = self.stream.readinto(room)
                if not count:
                    raise OSError(f"the file ends within {self.name}")
                room = room[count:]
        except OSError as error:
            raise ModelError(f"{self.stream.name}: damaged or cut short ({error}); copy the file again") from error
        return tensor


def stored_tensors(stream: FileIO) -> dict[str, StoredTensor]:
    """Return the tensors of an open safetensors file, sorted by name.

    Raises:
        ModelError: the file is not a safetensors file, or is damaged or truncated.
    """
    try:
        start, size, header = _read_header(stream)
        found = {name: _stored_tensor(name, header[name], stream, start) for name in sorted(header)}
        _check_places(list(found.values()), start, size)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{stream.name}: damaged or cut short ({error}); copy the file again") from error
    return found


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object from its pairs, for `json.loads(object_pairs_hook=)`.

    Raises:
        ValueError: a key occurs twice with different values.
    """
    value = dict(pairs)
    for key, one in pairs if len(value) < len(pairs) else []:
        if value[key] != one:
            raise ValueError(f"{key!r} occurs twice, as {one!r:.40} and as {value[key]!r:.40}")
    return value


def _read_header(stream: FileIO) -> tuple[int, int, dict[str, Any]]:
    """Return the position of the tensors' bytes, the size of the file, and the header without its metadata."""
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError("it has no safetensors header")
    header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=unique_keys)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    header.pop("__metadata__", None)
    return 8 + length, size, header


def _stored_tensor(name: str, entry: Any, stream: FileIO, start: int) -> StoredTensor:
    name.encode()  # raises for a lone surrogate: a name is hashed as UTF-8
    if not isinstance(entry, dict):
        raise ValueError(f"the entry of {name} is not a JSON object")
    dtype = _DTYPES.get(str(entry.get("dtype")))
    if dtype is None:
        raise ValueError(f"{name} has the unsupported dtype {entry.get('dtype')!r:.40}")
    shape, place = _sizes(entry.get("shape"), name), _sizes(entry.get("data_offsets"), name)
    if len(place) != 2:
        raise ValueError(f"{name} does not have two data_offsets")
    if math.prod(max(n, 1) for n in shape) >= 2**60:  # 0 counts as 1: torch computes strides from the others
        raise ValueError(f"{name} is too large for a tensor")
    tensor = StoredTensor(name, dtype, shape, stream, start + place[0])
    if tensor.nbytes != place[1] - place[0]:
        raise ValueError(f"{name} has {place[1] - place[0]} bytes, but its shape needs {tensor.nbytes}")
    return tensor


def _sizes(value: object, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(f"{name} has no valid shape or data_offsets")
    return tuple(value)


def _check_places(tensors: list[StoredTensor], start: int, size: int) -> None:
    """Check that every byte belongs to exactly one tensor."""
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != start:
            raise ValueError(f"there is a gap or an overlap before {tensor.name}")
        start += tensor.nbytes
    if start != size:
        raise ValueError(f"expected a file of {start} bytes, got {size}")
