"""Digests of weights and tokenizers, and a digest cache on disk, so that unchanged weights are hashed once.

`kvlab.core.keys` defines what is hashed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvlab.core.keys import KEY_BYTES, digest, field
from kvlab.errors import InputError
from kvlab.model.files import ModelFolder, Stamp, parse_json
from kvlab.model.stored import EMBEDDING, OUTPUT_HEAD, StoredTensor, is_rotary_buffer

Progress = Callable[[int, int], None]
log = logging.getLogger("kvlab")
TOKENIZER = "tokenizer.json"
# File systems have time steps of up to 2 s. Two changes within one step give a file the same stamp.
SETTLED_NS = 3_000_000_000


class WeightsDigest:
    """SHA-256 of the names, dtypes, shapes and bytes of weights, independent of their order and files.

    Two kinds of tensor are left out: RoPE buffers, which follow from the config, and an output head
    that equals the embedding bit by bit.
    """

    def __init__(self) -> None:
        self._entries: dict[str, bytes] = {}  # by name; an entry does not contain the name

    def add(self, name: str, tensor: Tensor) -> None:
        """Hash one tensor, on any device and with any strides.

        Raises:
            InputError: a tensor with this name was added before.
        """
        if is_rotary_buffer(name):
            return
        if name in self._entries:
            raise InputError(f"expected each tensor once, got {name} twice")
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        shape = struct.pack(f"<{tensor.ndim}Q", *tensor.shape)
        dtype = str(tensor.dtype).removeprefix("torch.").encode()
        self._entries[name] = field(dtype) + field(shape) + hashlib.sha256(flat).digest()

    def digest(self) -> bytes:
        """Return the digest of all added tensors. 32 bytes."""
        entries = dict(self._entries)
        if OUTPUT_HEAD in entries and entries[OUTPUT_HEAD] == entries.get(EMBEDDING):
            del entries[OUTPUT_HEAD]
        return digest("kvlab/1/weights", *sorted(field(name.encode()) + entry for name, entry in entries.items()))


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """Return the digest of (name, tensor) pairs, for example of `model.state_dict().items()`.

    The names and the dtypes must be those of the checkpoint.

    Raises:
        InputError: a name occurs twice.
    """
    weights = WeightsDigest()
    for name, tensor in tensors:
        weights.add(name, tensor)
    return weights.digest()


def tokenizer_digest(data: bytes | None, where: str = TOKENIZER) -> bytes:
    """Return the SHA-256 of a tokenizer, or b"" without one.

    Args:
        data: the content of `tokenizer.json`. The digest does not depend on its spacing, its version
            or the run-time settings `truncation` and `padding`.
        where: the name of the file in messages.

    Raises:
        ModelError: `data` is not a JSON object.
    """
    if data is None:
        return b""
    content = parse_json(data, where)
    for setting in ("version", "truncation", "padding"):
        content.pop(setting, None)
    return digest("kvlab/1/tokenizer", json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


@dataclass(frozen=True)
class Digests:
    """The digests of a model's files for its fingerprint: 32 bytes each; b"" for no tokenizer."""

    weights: bytes
    tokenizer: bytes = b""


class FolderWeights:
    """The weights of a folder and their digest, from a single read.

    Attributes:
        stored: the location of every weight.

    Raises:
        ModelError: as in `ModelFolder.weights`.
    """

    def __init__(self, files: ModelFolder, tied: bool) -> None:
        self.stored = files.weights(tied)
        self._files = files
        self._entry = _entry_name(self.stored, files.stamps())
        self._value = _cached_digest(self._entry)

    def tensors(self, progress: Progress | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight in memory of its own, and hash it unless the digest is known.

        `progress(done, total)` receives numbers of bytes.
        """
        weights, done, total = WeightsDigest(), 0, sum(tensor.nbytes for tensor in self.stored.values())
        known = self._value is not None
        for name, place in self.stored.items():
            tensor = place.read()
            if not known:
                weights.add(name, tensor)
            yield name, tensor
            done += tensor.nbytes
            if progress:
                progress(done, total)
        if not known:
            self._value = weights.digest()
            if self._files.unchanged():
                _cache_digest(self._entry, self._value)

    def digest(self, progress: Progress | None = None) -> bytes:
        """Return the digest of the weights. If it is not known, all weights are read."""
        if self._value is None:
            log.info("hashing the weights in %s", self._files.name)
            for _ in self.tensors(progress):
                pass
        assert self._value is not None, "`tensors` sets it"
        return self._value


def tokenizer_of(files: ModelFolder) -> bytes:
    """Return the digest of a folder's tokenizer, or b"" if it has none."""
    return tokenizer_digest(files.read(TOKENIZER), f"{files.name}/{TOKENIZER}")


# --- the digest cache ---------------------------------------------------------------------------
def _entry_name(weights: Mapping[str, StoredTensor], stamps: Mapping[str, Stamp]) -> str | None:
    """Return the file name of these weights in the digest cache, or None if they must not be cached.

    The name depends on the stamps of the open files, and on the file of each tensor. A file that was
    written recently must not be cached: the next change may give it the same stamp.
    """
    files = sorted({str(tensor.stream.name) for tensor in weights.values()})
    if not all(_is_settled(stamps[file]) for file in files):
        return None
    places = [f"{files.index(str(tensor.stream.name))} {name}" for name, tensor in sorted(weights.items())]
    parts = [*(repr(tuple(stamps[file])) for file in files), *places]
    return digest("kvlab/1/stamp", *(part.encode() for part in parts)).hex()


def _cached_digest(name: str | None) -> bytes | None:
    """Return a cached digest, or None if it is missing or damaged."""
    if name is None:
        return None
    try:
        text = (_cache_folder() / name).read_bytes()
        value = bytes.fromhex(text[: 2 * KEY_BYTES].decode("ascii"))
    except (OSError, ValueError, RuntimeError):
        return None
    return value if text == _entry_content(name, value) else None


def _cache_digest(name: str | None, value: bytes) -> None:
    """Cache a digest on disk. If this fails, the weights are hashed again next time."""
    if name is None:
        return
    try:
        folder = _cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=folder, prefix=name[:16], suffix=".part")
    except (OSError, ValueError, RuntimeError):
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_entry_content(name, value))
        Path(part).replace(folder / name)
    except OSError:
        Path(part).unlink(missing_ok=True)


def _entry_content(name: str, value: bytes) -> bytes:
    """Return a digest and a checksum of the name and the digest, in hex. The checksum detects damage."""
    return (value + digest("kvlab/1/remembered", name.encode(), value)).hex().encode()


def _is_settled(stamp: Stamp) -> bool:
    return time.time_ns() - max(stamp.ctime_ns, stamp.mtime_ns) > SETTLED_NS


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache"
    return folder / "kvlab" / "digests"
