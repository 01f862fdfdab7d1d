"""One reading of a model folder: every file is opened once, and a change meanwhile is noticed.

The weights are those of `model.safetensors`; where there is none, those that
`model.safetensors.index.json` names, each from the file that it names. Any other file is left
alone, and no pickle is ever read.
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
from kvlab.model.stored import EMBEDDING, HEAD, StoredTensor, is_rotary_buffer, stored_tensors, unique_keys

T = TypeVar("T")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_ATTEMPTS = 3
# Within one tick of the kernel's clock (10 ms at most) a second change leaves the same stamp.
_TICK_NS = 20_000_000


class Stamp(NamedTuple):
    """What tells one state of a file from another. A change sets `ctime_ns`, and no program can set it back."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, s: os.stat_result) -> Stamp:
        """The stamp of a file with this status."""
        return cls(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)


class ModelFolder(AbstractContextManager["ModelFolder"]):
    """A folder while it is read. It holds files open until the `with` block ends.

    A link to the folder is followed once: pointing it elsewhere meanwhile changes nothing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.name = Path(folder)
        self._stack = ExitStack()
        self._stamps: dict[str, Stamp | None] = {}  # of every file that was read or looked for; None: it was missing
        try:
            self._path = self.name.resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(f"{self.name}: not a model folder ({error})") from error

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, name: str) -> bytes | None:
        """A whole file, or None if there is none.

        Raises:
            ModelError: it cannot be read.
        """
        stream = self._open(name)
        try:
            return None if stream is None else stream.read()
        except OSError as error:
            raise ModelError(f"{self.name}: {name} cannot be read ({error})") from error

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON object, or None if there is no such file.

        Raises:
            ModelError: it cannot be read, or is no JSON object.
        """
        data = self.read(name)
        return None if data is None else parse_json(data, f"{self.name}/{name}")

    def weights(self, tied: bool = False) -> dict[str, StoredTensor]:
        """Where every weight lies, in order of name within each file. Rotary buffers are left out.

        A `tied` model may be stored with its output head alone; that is then listed as the embedding.

        Raises:
            ModelError: no safetensors, a damaged file, or an index that does not fit its files.
        """
        found = self._weights_of(WEIGHTS)
        if found is None:
            found = self._indexed_weights()
        if tied and HEAD in found and EMBEDDING not in found:
            found[EMBEDDING] = found.pop(HEAD)
        return found

    def stamps(self) -> dict[str, Stamp]:
        """The stamp of every file that was read, as it was when the file was opened, by path."""
        return {str(self._path / name): stamp for name, stamp in self._stamps.items() if stamp}

    def unchanged(self) -> bool:
        """Whether every file that was read, or looked for, is still the same."""
        return all(self._stamp_now(name) == stamp for name, stamp in self._stamps.items())

    def _stamp_now(self, name: str) -> Stamp | None:
        try:
            return Stamp.of((self._path / name).stat())
        except OSError:
            return None

    def _open(self, name: str) -> FileIO | None:
        try:
            stream = FileIO(self._path / name, opener=_open_at_once)
        except FileNotFoundError:
            self._stamps.setdefault(name, None)
            return None
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.name}: {name} cannot be read ({error})") from error
        status = os.fstat(self._stack.enter_context(stream).fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{self.name}: {name} cannot be read (it is no regular file)")
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
                f"{self.name}: no *.safetensors file to read: neither {WEIGHTS} nor {INDEX}; "
                "pickled weights (*.bin, *.pt) are not read: convert them first"
            )
        homes = _checked_index(index, f"{self.name}/{INDEX}")
        found: dict[str, StoredTensor] = {}
        for file in sorted(set(homes.values())):
            stored = self._weights_of(file)
            if stored is None:
                raise ModelError(f"{self.name}/{INDEX}: names {file}, which is missing")
            if unnamed := sorted(stored.keys() - homes.keys()):
                raise ModelError(f"{self.name}/{INDEX}: does not name {unnamed[0]}, which {file} holds")
            found |= {name: tensor for name, tensor in stored.items() if homes[name] == file}
        if missing := sorted(homes.keys() - found.keys()):
            raise ModelError(f"{self.name}/{INDEX}: says that {missing[0]} is in {homes[missing[0]]}: it is not")
        return found


def read_folder(folder: str | Path, read: Callable[[ModelFolder], T]) -> T:
    """What `read` makes of a folder that did not change while it was read. It is tried three times.

    Raises:
        ModelError: what `read` raises, or the folder changed each time.
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
    raise ModelError(f"{folder}: files changed while they were read, {_ATTEMPTS} times; load it when they are written")


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: it is none, is nested too deeply, or has a key twice with different values.
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


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for the other end of a named pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _wait_for_a_tick(changed_ns: int) -> None:
    """Let a file that was changed this moment rest, so that a change while it is read shows in its stamp."""
    age = time.time_ns() - changed_ns
    if 0 <= age < _TICK_NS:
        time.sleep((_TICK_NS - age) / 1e9)


def _checked_index(index: dict[str, Any], where: str) -> dict[str, str]:
    """The weights of an index and the files that hold them."""
    homes = index.get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise ModelError(f"{where}: expected a weight_map of names and files")
    for file in homes.values():
        if not isinstance(file, str) or not _is_inside(file):
            raise ModelError(f"{where}: expected the name of a file in the folder, got {file!r:.80}")
    return {name: file for name, file in homes.items() if not is_rotary_buffer(name)}


def _is_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return path.name != "" and not path.is_absolute() and ".." not in path.parts and not set(file) & set("\\:\0")
