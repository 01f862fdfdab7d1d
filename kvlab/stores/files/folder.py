"""The folder of a `FileStore`: one file per value, and one small file with the bytes that are taken.

    DIR/.kvlab       what is taken, and when the folder was last swept; changed under its lock
    DIR/.tmp/…       values that are being written; each writer has a lock on its file
    DIR/3f/3f9c…     values; the name is a hash of the key

A value is written to a file of its own and renamed into place. Readers therefore get the old value, the new value or
none, whatever happens to the writer. A file that a killed writer left in .tmp has no lock, so a sweep deletes it.

Several processes share the folder. The bytes of a value are counted before it is written, and subtracted when its file
is gone. A process that is killed in between leaves the count too high, never too low: the bound holds, and the next
sweep counts again. A file counts in whole blocks of the disk; the smallest value takes one.

Every function may wait for the disk without limit, and raises OSError. `FileStore` calls them in threads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from kvlab.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows, where `FileStore` refuses to work
    pass

SYNCS: Final = ("none", "data", "full")
BLOCK: Final = 4096
NAME_LENGTH: Final = 40
_COUNT: Final = struct.Struct("<8sQQQ")
_MOST_PARTS: Final = 512
_MAGIC: Final = b"kvlabfs1"
_CLOEXEC: Final = getattr(os, "O_CLOEXEC", 0)
# A link in the place of a file is not followed, and a pipe is not waited for.
_FLAGS: Final = _CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class Gone(OSError):
    """The folder is no longer there, or what is there is not the folder of a store (its disk is not mounted)."""


class Stopped(Exception):
    """The caller no longer waits for a write, so nothing was stored."""


@dataclass
class Count:
    """What the folder's small file says.

    Attributes:
        used: bytes of all values, in whole blocks, and of those that are being written.
        added: bytes ever added. It never decreases, so its growth shows what was written during a sweep.
        swept_ns: when the last sweep began, in nanoseconds since 1970.
    """

    used: int
    added: int
    swept_ns: int

    def add(self, size: int) -> None:
        """Count a new file."""
        self.used += size
        self.added += size

    def subtract(self, size: int) -> None:
        """Count a file that is gone."""
        self.used = max(0, self.used - size)


@dataclass(frozen=True)
class Entry:
    """A stored value: the name of its file, its size in whole blocks, and its last use in nanoseconds since 1970."""

    name: str
    size: int
    used_ns: int


def name_of(key: bytes) -> str:
    """Return the file of a key, below the folder."""
    name = blake2b(key, digest_size=NAME_LENGTH // 2).hexdigest()
    return f"{name[:2]}/{name}"


def blocks(size: int) -> int:
    """Return the bytes that a file of `size` bytes takes: whole blocks, at least one."""
    return max(1, -(-size // BLOCK)) * BLOCK


class Folder:
    """The files below `path`. Several processes may use it at the same time.

    Args:
        path: an absolute path. `prepare` makes the folder.
        sync: what reaches the disk before `write` returns: "none", "data" (the value), "full" (also its name).
    """

    def __init__(self, path: str, sync: str = "none") -> None:
        self.path = path
        self._sync = sync
        self._count = f"{path}/.kvlab"
        self._tmp = f"{path}/.tmp"

    def prepare(self) -> None:
        """Make the folder, unless it is there.

        Raises:
            ConfigError: the path is that of a file, or of a folder with other files.
        """
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            present = os.listdir(self.path)
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(f"expected a folder for a store, got a file: {self.path}") from None
        if ".kvlab" in present:
            return
        if set(present) - {".tmp"}:
            raise ConfigError(f"expected an empty or a new folder for a store, got one with other files: {self.path}")
        os.makedirs(self._tmp, mode=0o700, exist_ok=True)
        made = f"{self._tmp}/{os.urandom(8).hex()}"
        with open(made, "xb") as file:
            file.write(_COUNT.pack(_MAGIC, 0, 0, 0))
        try:
            os.link(made, self._count)
        except FileExistsError:  # another process was faster
            pass
        except OSError:  # a file system without links
            os.replace(made, self._count)
            return
        os.unlink(made)

    def check(self) -> None:
        """Check that the folder is still that of a store.

        Raises:
            Gone: it is not.
        """
        if not os.path.exists(self._count):
            raise Gone(errno.ENOENT, "the folder of the store is gone", self.path)

    @contextlib.contextmanager
    def counting(self) -> Iterator[Count]:
        """Lock the count, and write back what is changed in it. One process and thread at a time.

        Raises:
            Gone: the folder is no longer that of a store.
        """
        try:
            fd = os.open(self._count, os.O_RDWR | _FLAGS)
        except FileNotFoundError:
            raise Gone(errno.ENOENT, "the folder of the store is gone", self.path) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            packed = os.pread(fd, _COUNT.size, 0)
            if len(packed) != _COUNT.size or not packed.startswith(_MAGIC):
                raise Gone(errno.ENOENT, "the folder is not that of a store", self.path)
            count = Count(*_COUNT.unpack(packed)[1:])
            yield count
            changed = _COUNT.pack(_MAGIC, count.used, count.added, count.swept_ns)
            if changed != packed:
                os.pwrite(fd, changed, 0)
        finally:
            os.close(fd)

    # --- values ---------------------------------------------------------------------------------
    def open(self, name: str) -> tuple[int, os.stat_result] | None:
        """Open a value; None if there is none. The caller closes the file."""
        try:
            fd = os.open(f"{self.path}/{name}", os.O_RDONLY | _FLAGS)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EIO, "expected a file", name)
        except BaseException:
            os.close(fd)
            raise
        return fd, status

    def write(
        self, name: str, parts: Sequence[memoryview], most: int, now_ns: int, stopped: Callable[[], bool]
    ) -> int | None:
        """Store a value, in place of an older one; return the bytes that are then taken.

        Returns None, and stores nothing, if more than `most` bytes would be taken.

        Args:
            stopped: asked before the value gets its name; True leaves the older value.

        Raises:
            Stopped: `stopped` returned True.
            Gone: the folder is no longer that of a store.
        """
        target, written = f"{self.path}/{name}", f"{self._tmp}/{os.urandom(8).hex()}"
        size = sum(part.nbytes for part in parts)
        with self.counting() as count:
            if count.used + blocks(size) > most:
                return None
            fd = self._reserved(written, size)  # under the lock: a sweep sees both the file and its bytes, or neither
            count.add(blocks(size))
        try:
            try:
                _write_all(fd, parts)
                os.utime(fd, ns=(now_ns, now_ns))
                if self._sync != "none":
                    _sync_data(fd)
                if stopped():
                    raise Stopped
                with self.counting() as count:
                    older = _size(target)
                    self._rename(written, target)
                    count.subtract(older)
                    used = count.used
            except BaseException:
                with contextlib.suppress(OSError), self.counting() as count:
                    os.unlink(written)
                    count.subtract(blocks(size))
                raise
        finally:
            os.close(fd)
        if self._sync == "full":
            _sync_folder(os.path.dirname(target))
        return used

    def _reserved(self, written: str, size: int) -> int:
        """Make an empty file of `size` bytes, with a lock that says that its writer lives."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CLOEXEC
        try:
            fd = os.open(written, flags, 0o600)
        except FileNotFoundError:  # somebody emptied the folder
            os.makedirs(self._tmp, mode=0o700, exist_ok=True)
            fd = os.open(written, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.ftruncate(fd, size)
        except OSError:
            os.close(fd)
            os.unlink(written)
            raise
        return fd

    def _rename(self, written: str, target: str) -> None:
        try:
            os.replace(written, target)
        except FileNotFoundError:  # the first value with these two digits
            os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
            os.replace(written, target)

    def touch(self, name: str, oldest_ns: int, now_ns: int) -> bool:
        """Note a use of a value; return whether it is there and was last used after `oldest_ns`."""
        try:
            if os.stat(f"{self.path}/{name}", follow_symlinks=False).st_mtime_ns <= oldest_ns:
                return False
            os.utime(f"{self.path}/{name}", ns=(now_ns, now_ns), follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def is_there(self, name: str, oldest_ns: int) -> bool:
        """Return whether a value is there and was last used after `oldest_ns`."""
        try:
            return os.stat(f"{self.path}/{name}", follow_symlinks=False).st_mtime_ns > oldest_ns
        except FileNotFoundError:
            return False

    def delete(self, names: Sequence[str], newest_ns: Sequence[int] | None = None) -> list[int | None]:
        """Delete values; return the last use of each that was deleted, None for the others.

        Args:
            newest_ns: one per name. A value that was used later stays.
        """
        deleted: list[int | None] = []
        with self.counting() as count:
            for i, name in enumerate(names):
                deleted.append(None)
                path = f"{self.path}/{name}"
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(path, follow_symlinks=False)
                    if newest_ns is None or status.st_mtime_ns <= newest_ns[i]:
                        os.unlink(path)
                        count.subtract(blocks(status.st_size))
                        deleted[-1] = status.st_mtime_ns
        return deleted

    # --- sweeps ---------------------------------------------------------------------------------
    @contextlib.contextmanager
    def sweeping(self) -> Iterator[None]:
        """Wait until no other process or thread sweeps this folder."""
        self.check()
        os.makedirs(self._tmp, mode=0o700, exist_ok=True)
        fd = os.open(self._tmp, os.O_RDONLY | os.O_DIRECTORY | _CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def reap(self) -> tuple[int, int]:
        """Delete what killed writers left. Return how many files, and the bytes of those still being written."""
        reaped = writing = 0
        for entry in os.scandir(self._tmp):
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(entry.path, os.O_RDONLY | _FLAGS)
                try:
                    size = os.fstat(fd).st_size
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)
                    reaped += 1
                except BlockingIOError:
                    writing += blocks(size)
                finally:
                    os.close(fd)
        return reaped, writing

    def entries(self) -> Iterator[Entry]:
        """Yield all values, in no order. Values may come and go meanwhile."""
        for folder in os.scandir(self.path):
            if len(folder.name) != 2 or not folder.is_dir(follow_symlinks=False):
                continue
            for file in os.scandir(folder.path):
                if len(file.name) != NAME_LENGTH:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat(follow_symlinks=False)
                    yield Entry(f"{folder.name}/{file.name}", blocks(status.st_size), status.st_mtime_ns)


def _write_all(fd: int, parts: Sequence[memoryview]) -> None:
    left = [part for part in parts if part.nbytes]
    while left:
        count = os.writev(fd, left[:_MOST_PARTS])
        while left and count >= left[0].nbytes:
            count -= left.pop(0).nbytes
        if count:
            left[0] = left[0][count:]


def _size(path: str) -> int:
    """Return what a file takes; 0 if there is none."""
    try:
        return blocks(os.stat(path, follow_symlinks=False).st_size)
    except FileNotFoundError:
        return 0


def _sync_data(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)  # macOS has no fdatasync


def _sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
