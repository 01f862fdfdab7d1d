"""The tensors of a safetensors file, read through one open file into memory of their own.

A file is a length as u64, little-endian; a JSON header of that length with each tensor's dtype,
shape and place; the tensors' bytes. Libraries map such a file into memory, and then whoever
overwrites it changes the model that runs, and whoever cuts it short ends the process.

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

# One weight of a tied model may be stored under either name.
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
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
    """Whether a tensor is no weight, but a known buffer of RoPE that follows from the config.

    Older checkpoints store it.

    >>> is_rotary_buffer("model.layers.0.self_attn.rotary_emb.inv_freq"), is_rotary_buffer("model.inv_freq")
    (True, False)
    """
    return _ROTARY_BUFFER.fullmatch(name) is not None


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name, dtype, shape: its own.
        stream: its open file.
        offset: of its first byte in that file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stream: FileIO
    offset: int

    @property
    def nbytes(self) -> int:
        """How many bytes it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, in memory of its own. The file must still be open.

        Raises:
            ModelError: the file became shorter, or cannot be read.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        room = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            self.stream.seek(self.offset)
            while room:
                count = self.stream.readinto(room)
                if not count:
                    raise OSError(f"it ends within {self.name}")
                room = room[count:]
        except OSError as error:
            raise ModelError(f"{self.stream.name}: damaged or cut short ({error}); copy the file again") from error
        return tensor


def stored_tensors(stream: FileIO) -> dict[str, StoredTensor]:
    """What an open safetensors file holds, in order of name.

    Raises:
        ModelError: it is no safetensors file, or is damaged or cut short.
    """
    try:
        start, size, header = _read_header(stream)
        found = {name: _stored_tensor(name, header[name], stream, start) for name in sorted(header)}
        _check_places(list(found.values()), start, size)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{stream.name}: damaged or cut short ({error}); copy the file again") from error
    return found


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `json.loads(object_pairs_hook=)`.

    Raises:
        ValueError: a key stands there twice with different values.
    """
    value = dict(pairs)
    for key, one in pairs if len(value) < len(pairs) else []:
        if value[key] != one:
            raise ValueError(f"{key!r} stands there twice, as {one!r:.40} and as {value[key]!r:.40}")
    return value


def _read_header(stream: FileIO) -> tuple[int, int, dict[str, Any]]:
    """Where the tensors' bytes start, the size of the file, and the header without its metadata."""
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError("no safetensors header")
    header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=unique_keys)
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    header.pop("__metadata__", None)
    return 8 + length, size, header


def _stored_tensor(name: str, entry: Any, stream: FileIO, start: int) -> StoredTensor:
    name.encode()  # a name is hashed as UTF-8; half a surrogate pair has none
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is not described")
    dtype = _DTYPES.get(str(entry.get("dtype")))
    if dtype is None:
        raise ValueError(f"{name} is of dtype {entry.get('dtype')!r:.40}, which is not known here")
    shape, place = _sizes(entry.get("shape"), name), _sizes(entry.get("data_offsets"), name)
    if len(place) != 2:
        raise ValueError(f"{name} has no place")
    if math.prod(max(n, 1) for n in shape) >= 2**60:  # zeros apart: torch computes strides from the others
        raise ValueError(f"{name} is larger than any tensor")
    tensor = StoredTensor(name, dtype, shape, stream, start + place[0])
    if tensor.nbytes != place[1] - place[0]:
        raise ValueError(f"{name} has {place[1] - place[0]} bytes, its shape takes {tensor.nbytes}")
    return tensor


def _sizes(value: object, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(f"{name} has no shape or no place")
    return tuple(value)


def _check_places(tensors: list[StoredTensor], start: int, size: int) -> None:
    """Every byte belongs to one tensor."""
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != start:
            raise ValueError(f"a gap or an overlap before {tensor.name}")
        start += tensor.nbytes
    if start != size:
        raise ValueError(f"expected {start} bytes, got {size}")
