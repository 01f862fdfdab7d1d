"""A consistent read of a model folder: every file is opened once, and changes meanwhile are detected.

The weights are those of `model.safetensors`. If it is missing, `model.safetensors.index.json` names
the weights and the file of each. Other weight files are not read, and pickles are never read.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from kvlab.errors import ModelError
from kvlab.model.stored import EMBEDDING, OUTPUT_HEAD, StoredTensor, is_rotary_buffer, stored_tensors, unique_keys

T = TypeVar("T")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_ATTEMPTS = 3
# Two changes within one tick of the kernel's clock (at most 10 ms) give a file the same stamp.
_TICK_NS = 20_000_000


class Stamp(NamedTuple):
    """Identifies a state of a file. A change sets `ctime_ns`, which no program can reset."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, s: os.stat_result) -> Stamp:
        """Return the stamp of a file with this status."""
        return cls(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)


class ModelFolder(AbstractContextManager["ModelFolder"]):
    """A folder during one read. Its files stay open until the `with` block ends.

    A symbolic link to the folder is resolved once. A later change of the link has no effect.
    """

    def __init__(self, folder: str | Path) -> None:
        self.name = Path(folder)
        self._stack = ExitStack()
        self._stamps: dict[str, Stamp | None] = {}  # by file name; None for a missing file
        try:
            self._path = self.name.resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(f"{self.name}: not a model folder ({error})") from error

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, name: str) -> bytes | None:
        """Return a whole file, or None if it is missing.

        Raises:
            ModelError: the file cannot be read.
        """
        stream = self._open(name)
        try:
            return None if stream is None else stream.read()
        except OSError as error:
            raise ModelError(f"{self.name}: {name} cannot be read ({error})") from error

    def json(self, name: str) -> dict[str, Any] | None:
        """Return the JSON object in a file, or None if the file is missing.

        Raises:
            ModelError: the file cannot be read, or is not a JSON object.
        """
        data = self.read(name)
        return None if data is None else parse_json(data, f"{self.name}/{name}")

    def weights(self, tied: bool = False) -> dict[str, StoredTensor]:
        """Return the location of every weight, sorted by name within each file. RoPE buffers are left out.

        A `tied` model may be stored with its output head alone, which is then listed as the embedding.

        Raises:
            ModelError: there is no safetensors file, a file is damaged, or the index does not match
                its files.
        """
        found = self._weights_of(WEIGHTS)
        if found is None:
            found = self._indexed_weights()
        if tied and OUTPUT_HEAD in found and EMBEDDING not in found:
            found[EMBEDDING] = found.pop(OUTPUT_HEAD)
        return found

    def stamps(self) -> dict[str, Stamp]:
        """Return, by path, the stamp that each file had when it was opened."""
        return {str(self._path / name): stamp for name, stamp in self._stamps.items() if stamp}

    def unchanged(self) -> bool:
        """Return whether every opened file is unchanged and every missing file is still missing."""
        return all(self._stamp_now(name) == stamp for name, stamp in self._stamps.items())

    def _stamp_now(self, name: str) -> Stamp | None:
        try:
            return Stamp.of((self._path / name).stat())
        except OSError:
            return None

    def _open(self, name: str) -> FileIO | None:
        try:
            stream = FileIO(self._path / name, opener=_open_nonblocking)
        except FileNotFoundError:
            self._stamps.setdefault(name, None)
            return None
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.name}: {name} cannot be read ({error})") from error
        status = os.fstat(self._stack.enter_context(stream).fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{self.name}: {name} cannot be read (it is not a regular file)")
        self._stamps.setdefault(name, Stamp.of(status))
        _wait_for_a_tick(status.st_ctime_ns)
        return stream

    def _weights_of(self, file: str) -> dict[str, StoredTensor] | None:
        stream = self._open(file)
        if stream is None:
            return None
        found = stored_tensors(stream)
        return {name: tensor for name, tensor in found.items() if not is_rotary_buffer(name)}

    def _indexed_weights(self) -> dict[str, StoredTensor]:
        index = self.json(INDEX)
        if index is None:
            raise ModelError(
                f"{self.name}: expected {WEIGHTS} or {INDEX}, found neither; "
                "pickled weights (*.bin, *.pt) are not read and must be converted first"
            )
        file_of = _checked_index(index, f"{self.name}/{INDEX}")
        found: dict[str, StoredTensor] = {}
        for file in sorted(set(file_of.values())):
            stored = self._weights_of(file)
            if stored is None:
                raise ModelError(f"{self.name}/{INDEX} names {file}, which is missing")
            if unnamed := sorted(stored.keys() - file_of.keys()):
                raise ModelError(f"{self.name}/{INDEX} does not name {unnamed[0]}, which is in {file}")
            found |= {name: tensor for name, tensor in stored.items() if file_of[name] == file}
        if missing := sorted(file_of.keys() - found.keys()):
            raise ModelError(f"{self.name}/{INDEX} says that {missing[0]} is in {file_of[missing[0]]}, but it is not")
        return found


def read_folder(folder: str | Path, read: Callable[[ModelFolder], T]) -> T:
    """Return the result of `read` for a folder that did not change meanwhile. There are three attempts.

    Raises:
        ModelError: `read` raised it, or the folder changed during each attempt.
    """
    for _ in range(_ATTEMPTS):
        with ModelFolder(folder) as files:
            try:
                value = read(files)
            except ModelError:
                if files.unchanged():
                    raise
            else:
                if files.unchanged():
                    return value
    raise ModelError(f"{folder}: files changed while they were read, {_ATTEMPTS} times; retry when writing has ended")


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in `data`.

    Raises:
        ModelError: `data` is not a JSON object, is nested too deeply, or has a key twice with
            different values.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise ModelError(f"{where} cannot be read (it is nested too deeply)") from error
    except ValueError as error:
        raise ModelError(f"{where} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _open_nonblocking(path: str, flags: int) -> int:
    """Open a file. Opening a named pipe does not wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _wait_for_a_tick(changed_ns: int) -> None:
    """Wait until the last change is a tick old, so that a change during the read gives the file another stamp."""
    age = time.time_ns() - changed_ns
    if 0 <= age < _TICK_NS:
        time.sleep((_TICK_NS - age) / 1e9)


def _checked_index(index: dict[str, Any], where: str) -> dict[str, str]:
    """Return the file of each weight in an index."""
    file_of = index.get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise ModelError(f"{where}: expected a weight_map from names of weights to names of files")
    for file in file_of.values():
        if not isinstance(file, str) or not _is_inside(file):
            raise ModelError(f"{where}: expected the name of a file in the folder, got {file!r:.80}")
    return {name: file for name, file in file_of.items() if not is_rotary_buffer(name)}


def _is_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return path.name != "" and not path.is_absolute() and ".." not in path.parts and not set(file) & set("\\:\0")
