"""Digests of weights and tokenizers, and a memory so that unchanged weights are hashed once.

What is hashed stands in `kvlab.core.keys`.
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
from kvlab.model.stored import EMBEDDING, HEAD, StoredTensor, is_rotary_buffer

Progress = Callable[[int, int], None]
log = logging.getLogger("kvlab")
TOKENIZER = "tokenizer.json"
# File systems count time in steps, the coarsest of 2 s. Within one step two contents have the same stamp.
SETTLED_NS = 3_000_000_000


class WeightsDigest:
    """SHA-256 over names, dtypes, shapes and bytes, whatever the order and the files they came in.

    Two kinds of tensor are no weights of their own and are left out: rotary buffers, which follow
    from the config, and an output head that equals the embedding to the last bit.
    """

    def __init__(self) -> None:
        self._entries: dict[str, bytes] = {}  # by name, without that name

    def add(self, name: str, tensor: Tensor) -> None:
        """Hash one tensor, on any device and of any strides.

        Raises:
            InputError: a name that was there before.
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
        """The digest of all that was added. 32 bytes."""
        entries = dict(self._entries)
        if HEAD in entries and entries[HEAD] == entries.get(EMBEDDING):
            del entries[HEAD]
        return digest("kvlab/1/weights", *sorted(field(name.encode()) + entry for name, entry in entries.items()))


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """The digest of (name, tensor) pairs, named and typed as in the checkpoint: `model.state_dict().items()`, say.

    Raises:
        InputError: a name that comes twice.
    """
    weights = WeightsDigest()
    for name, tensor in tensors:
        weights.add(name, tensor)
    return weights.digest()


def tokenizer_digest(data: bytes | None, where: str = TOKENIZER) -> bytes:
    """SHA-256 of what turns text into tokens; b"" without a tokenizer.

    Args:
        data: the content of `tokenizer.json`. Its spacing and the run-time settings of other
            programs, truncation and padding, do not matter.
        where: the file, for messages.

    Raises:
        ModelError: no JSON object.
    """
    if data is None:
        return b""
    content = parse_json(data, where)
    for setting in ("version", "truncation", "padding"):
        content.pop(setting, None)
    return digest("kvlab/1/tokenizer", json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


@dataclass(frozen=True)
class Digests:
    """What of a model's files goes into its fingerprint: 32 bytes each, b"" without a tokenizer."""

    weights: bytes
    tokenizer: bytes = b""


class FolderWeights:
    """A folder's weights and their digest, both out of one reading.

    Attributes:
        stored: where every weight lies.

    Raises:
        ModelError: as `ModelFolder.weights`.
    """

    def __init__(self, files: ModelFolder, tied: bool) -> None:
        self.stored = files.weights(tied)
        self._files = files
        self._entry = _entry_name(self.stored, files.stamps())
        self._value = _recall(self._entry)

    def tensors(self, progress: Progress | None = None) -> Iterator[tuple[str, Tensor]]:
        """Each weight, in memory of its own, hashed on its way unless the digest is remembered.

        `progress(done, total)` is called in bytes.
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
                _remember(self._entry, self._value)

    def digest(self, progress: Progress | None = None) -> bytes:
        """The digest of the weights, which are read for it if nobody did yet."""
        if self._value is None:
            log.info("reading the weights in %s for their digest", self._files.name)
            for _ in self.tensors(progress):
                pass
        assert self._value is not None, "tensors sets it"
        return self._value


def tokenizer_of(files: ModelFolder) -> bytes:
    """The digest of a folder's tokenizer; b"" if it has none."""
    return tokenizer_digest(files.read(TOKENIZER), f"{files.name}/{TOKENIZER}")


# --- the memory ---------------------------------------------------------------------------------
def _entry_name(weights: Mapping[str, StoredTensor], stamps: Mapping[str, Stamp]) -> str | None:
    """The name under which the digest of these weights is remembered; None if it must not be.

    It is made of the stamps of their open files and of which tensor is read from which. A file
    that was written a moment ago must not be remembered: the next change may not show in its stamp.
    """
    files = sorted({str(tensor.stream.name) for tensor in weights.values()})
    if not all(_is_settled(stamps[file]) for file in files):
        return None
    homes = [f"{files.index(str(tensor.stream.name))} {name}" for name, tensor in sorted(weights.items())]
    parts = [*(repr(tuple(stamps[file])) for file in files), *homes]
    return digest("kvlab/1/stamp", *(part.encode() for part in parts)).hex()


def _recall(name: str | None) -> bytes | None:
    """A remembered digest; None if there is none, or none that is intact."""
    if name is None:
        return None
    try:
        text = (_memory() / name).read_bytes()
        value = bytes.fromhex(text[: 2 * KEY_BYTES].decode("ascii"))
    except (OSError, ValueError, RuntimeError):
        return None
    return value if text == _sealed(name, value) else None


def _remember(name: str | None, value: bytes) -> None:
    """Keep a digest for the next process. A home that cannot be written costs a second hashing, nothing else."""
    if name is None:
        return
    try:
        home = _memory()
        home.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=home, prefix=name[:16], suffix=".part")
    except (OSError, ValueError, RuntimeError):
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_sealed(name, value))
        Path(part).replace(home / name)
    except OSError:
        Path(part).unlink(missing_ok=True)


def _sealed(name: str, value: bytes) -> bytes:
    """A digest in hex, and a checksum of it and its name: damage is noticed."""
    return (value + digest("kvlab/1/remembered", name.encode(), value)).hex().encode()


def _is_settled(stamp: Stamp) -> bool:
    return time.time_ns() - max(stamp.ctime_ns, stamp.mtime_ns) > SETTLED_NS


def _memory() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache"
    return home / "kvlab" / "digests"
