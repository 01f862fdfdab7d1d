"""What notebook 11b plays with: a disk whose reader looks after every step, a real one, a store that keeps old values.

They are small on purpose, and no stores for use: see `kvlab.stores`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class Disk:
    """A disk in memory. A reader looks at one file, `watched`, after every step that a writer makes.

    A write has two steps: half of the value is there, then all of it. A rename has one, and replaces what is there.

    Args:
        watched: the file that the reader looks at.
        files: what is there at the beginning.
        writer: the name of the writer whose steps these are.
        other: the name of a writer that does the same at the same time. Before a rename of the first one, it is
            half-way through each file that the first one has written, its own name in place of the first one's.

    Attributes:
        files: contents by name.
        seen: what the reader got, without repetitions in a row; None for no file.
    """

    def __init__(
        self, watched: str, files: Mapping[str, bytes] | None = None, writer: str = "", other: str = ""
    ) -> None:
        self.files = dict(files or {})
        self.seen: list[bytes | None] = []
        self._watched, self._writer, self._other = watched, writer, other
        self._written: set[str] = set()
        self._look()

    def write(self, file: str, value: bytes) -> None:
        """Write a file, in two steps."""
        for part in (value[: len(value) // 2], value):
            self.files[file] = part
            self._look()
        self._written.add(file)

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, in one step. What had this name is gone.

        Raises:
            FileNotFoundError: there is no file `old`.
        """
        if self._other:
            for file in self._written:
                self.files[file.replace(self._writer, self._other)] = b"half of another va"
        if old not in self.files:
            raise FileNotFoundError(old)
        self.files[new] = self.files.pop(old)
        self._look()

    def exists(self, file: str) -> bool:
        """Whether there is such a file."""
        return file in self.files

    def delete(self, file: str) -> None:
        """Delete a file, in one step, if it is there."""
        self.files.pop(file, None)
        self._look()

    def _look(self) -> None:
        now = self.files.get(self._watched)
        if not self.seen or self.seen[-1] != now:
            self.seen.append(now)


class RealDisk:
    """The calls of `Disk` for the files of a folder."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def write(self, file: str, value: bytes) -> None:
        """Write a file."""
        (self._folder / file).write_bytes(value)

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, in one step."""
        (self._folder / old).replace(self._folder / new)

    def exists(self, file: str) -> bool:
        """Whether there is such a file."""
        return (self._folder / file).exists()

    def delete(self, file: str) -> None:
        """Delete a file if it is there."""
        (self._folder / file).unlink(missing_ok=True)

    def read(self, file: str) -> bytes:
        """Return what is in a file."""
        return (self._folder / file).read_bytes()


class KeepsFirst:
    """A store whose `put` keeps what is there, and says True all the same. Some real ones do.

    Args:
        values: what is there at the beginning.
        leased: keys that somebody reads at present. They are not removed.

    Attributes:
        values: by key.
        removed: how many values were removed.
    """

    def __init__(self, values: Mapping[str, bytes] | None = None, leased: tuple[str, ...] = ()) -> None:
        self.values, self._leased = dict(values or {}), leased
        self.removed = 0

    def put(self, key: str, value: bytes) -> bool:
        """Store a value, unless the key has one."""
        self.values.setdefault(key, value)
        return True

    def get(self, key: str) -> bytes | None:
        """Return a value, or None if there is none."""
        return self.values.get(key)

    def remove(self, key: str) -> bool:
        """Remove a value, unless it is leased; return whether it is gone."""
        if key in self._leased:
            return False
        self.removed += self.values.pop(key, None) is not None
        return True
