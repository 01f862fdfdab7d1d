"""The folder of a `FileStore`: one file per value, and one small file with the bytes that are taken.

    DIR/.kvlab       what is taken, and when the folder was last swept; changed under its lock
    DIR/.tmp/…       values that are being written; each writer has a lock on its file
    DIR/.held/…      one file per lease: the names of the values that it holds; its time is when it ends
    DIR/3f/3f9c…     values; the name is a hash of the key

A value is written to a file of its own and renamed into place. Readers therefore get the old value, the new value or
none, whatever happens to the writer. A file that a killed writer left in .tmp has no lock, so a sweep deletes it.

Several processes share the folder. The bytes of a value are counted before it is written, and subtracted when its file
is gone. A process that is killed in between leaves the count too high, never too low: the bound holds, and the next
sweep counts again. A file counts in whole blocks of the disk; the smallest value takes one.

Every function may wait for the disk without limit, and raises OSError. `FileStore` calls them in threads. Where one
waits for a lock it asks `stopped` again and again, because the process that has the lock may have been stopped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from kvlab.errors import ConfigError
from kvlab.stores.fork import reset_in_children

with contextlib.suppress(ImportError):  # Windows, where `FileStore` refuses to work
    import fcntl

SYNCS: Final = ("none", "data", "full")
BLOCK: Final = 4096
NAME_LENGTH: Final = 40
_COUNT: Final = struct.Struct("<8sQQQ")
_MOST_PARTS: Final = 512
_MAGIC: Final = b"kvlabfs1"
MOST_LEASES: Final = 1024
"""Leases at the same time. Each is read when another one begins."""
_CLOEXEC: Final = getattr(os, "O_CLOEXEC", 0)
# A link in the place of a file is not followed, and a pipe is not waited for.
_FLAGS: Final = _CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_MOST_PAUSE_S: Final = 0.001


class Gone(OSError):
    """The folder is no longer there, or what is there is not the folder of a store (its disk is not mounted)."""


class Stopped(Exception):
    """The caller no longer waits. What was to be changed has not been changed."""


def never() -> bool:
    """`stopped` of a call that nobody gives up."""
    return False


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
        self._leases = f"{path}/.held"
        self._locked: set[int] = set()
        reset_in_children(self)

    def reset_after_fork(self) -> None:
        """See `Forkable`. A lock belongs to parent and child, and stays as long as one of them has its file open."""
        inherited, self._locked = self._locked, set()
        for fd in inherited:
            with contextlib.suppress(OSError):
                os.close(fd)

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
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._tmp, 0o700)
        with self._locking(self._tmp, os.O_RDONLY):
            if not os.path.exists(self._count):  # no other process was faster
                made = f"{self._tmp}/count"
                with open(made, "wb") as file:
                    file.write(_COUNT.pack(_MAGIC, 0, 0, 0))
                    os.fsync(file.fileno())
                os.replace(made, self._count)

    def check(self) -> None:
        """Check that the folder is still that of a store.

        Raises:
            Gone: it is not.
        """
        try:
            os.stat(self._count)
        except (FileNotFoundError, NotADirectoryError):
            raise Gone(errno.ENOENT, "the folder of the store is gone", self.path) from None

    @contextlib.contextmanager
    def counting(self, stopped: Callable[[], bool] = never) -> Iterator[Count]:
        """Lock the count, and write back what is changed in it. One process and thread at a time.

        Raises:
            Gone: the folder is no longer that of a store.
            Stopped: `stopped` returned True before the lock was free.
        """
        self.check()
        with self._locking(self._count, os.O_RDWR, stopped) as fd:
            packed = os.pread(fd, _COUNT.size, 0)
            if len(packed) != _COUNT.size or not packed.startswith(_MAGIC):
                raise Gone(errno.ENOENT, "the folder is not that of a store", self.path)
            count = Count(*_COUNT.unpack(packed)[1:])
            yield count
            changed = _COUNT.pack(_MAGIC, count.used, count.added, count.swept_ns)
            if changed != packed:
                os.pwrite(fd, changed, 0)

    @contextlib.contextmanager
    def _locking(self, path: str, mode: int, stopped: Callable[[], bool] = never) -> Iterator[int]:
        fd = os.open(path, mode | _FLAGS)
        self._locked.add(fd)
        try:
            _lock(fd, stopped)
            yield fd
        finally:
            self._unlock(fd)

    def _unlock(self, fd: int) -> None:
        """Unlock and close a file. Closing alone would leave the lock to a child that has the file open, too."""
        try:
            fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            self._locked.discard(fd)
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
        self, name: str, parts: Sequence[memoryview], most: int, now_ns: int, stopped: Callable[[], bool] = never
    ) -> int | None:
        """Store a value, in place of an older one; return the bytes that are then taken.

        Returns None, and stores nothing, if more than `most` bytes would be taken.

        Args:
            stopped: asked last when nobody else can change the value; True leaves the older value.

        Raises:
            Stopped: `stopped` returned True.
            Gone: the folder is no longer that of a store.
        """
        target, written = f"{self.path}/{name}", f"{self._tmp}/{os.urandom(8).hex()}"
        size = sum(part.nbytes for part in parts)
        fd = self._reserve(written, size, most, stopped)
        if fd is None:
            return None
        used: int | None = None
        try:
            _write_all(fd, parts)
            os.utime(fd, ns=(now_ns, now_ns))
            if self._sync != "none":
                _sync_data(fd)
            with contextlib.ExitStack() as stack:
                count = stack.enter_context(self.counting(stopped))
                if stopped():
                    raise Stopped
                older = _size(target)
                self._rename(written, target)
                count.subtract(older)
                used = count.used
        except BaseException:
            if used is None:  # else only the count could not be written, and is too high
                self._forget(written, blocks(size))
                raise
        finally:
            self._unlock(fd)
        if self._sync == "full":
            try:
                _sync_folder(os.path.dirname(target))
            except OSError:
                self.delete([name])
                raise
        return used

    def _reserve(self, written: str, size: int, most: int, stopped: Callable[[], bool]) -> int | None:
        """Count a value, and make a file for it with a lock that says that its writer lives; None without room."""
        fd = None
        try:
            with self.counting(stopped) as count:  # `reap` has this lock, so that it sees no file without its lock
                if count.used + blocks(size) > most:
                    return None
                fd = self._created(written)
                fcntl.flock(fd, fcntl.LOCK_EX)
                os.ftruncate(fd, size)
                count.add(blocks(size))
        except BaseException:
            if fd is not None:
                self._unlock(fd)
                os.unlink(written)
            raise
        return fd

    def _created(self, path: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _CLOEXEC
        try:
            fd = os.open(path, flags, 0o600)
        except FileNotFoundError:  # somebody emptied the folder
            os.mkdir(self._tmp, 0o700)
            fd = os.open(path, flags, 0o600)
        self._locked.add(fd)
        return fd

    def _rename(self, written: str, target: str) -> None:
        try:
            os.replace(written, target)
        except FileNotFoundError:  # the first value with these two digits
            os.mkdir(os.path.dirname(target), 0o700)
            os.replace(written, target)

    def _forget(self, written: str, size: int) -> None:
        """Delete a file that was not renamed. If that fails, the count stays too high until a sweep."""
        with contextlib.suppress(OSError):
            os.unlink(written)
            with self.counting() as count:
                count.subtract(size)

    def touch(self, name: str, oldest_ns: int, now_ns: int) -> bool:
        """Note a use of a value; return whether it is there and was last used after `oldest_ns`."""
        path = f"{self.path}/{name}"
        try:
            before_ns = os.stat(path, follow_symlinks=False).st_mtime_ns
            if before_ns <= oldest_ns:
                return False
            os.utime(path, ns=(max(now_ns, before_ns),) * 2, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def is_there(self, name: str, oldest_ns: int) -> bool:
        """Return whether a value is there and was last used after `oldest_ns`."""
        try:
            return os.stat(f"{self.path}/{name}", follow_symlinks=False).st_mtime_ns > oldest_ns
        except FileNotFoundError:
            return False

    def delete(
        self, names: Sequence[str], newest_ns: Sequence[int] | None = None, stopped: Callable[[], bool] = never
    ) -> list[int | None]:
        """Delete values; return the last use of each that was deleted, None for the others.

        Args:
            newest_ns: one per name. A value that was used later stays.
        """
        deleted: list[int | None] = []
        with self.counting(stopped) as count:
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

    # --- leases ---------------------------------------------------------------------------------
    def hold(
        self,
        holder: str,
        names: Sequence[str],
        most: int,
        now_ns: int,
        lease_ns: int,
        oldest_ns: int,
        used_ns: int,
        stopped: Callable[[], bool] = never,
    ) -> int:
        """Hold the values that are there, from the first on, as long as all leases hold at most `most` bytes.

        Args:
            holder: its earlier lease ends.
            oldest_ns: values that were last used then, or before, are not there.
            used_ns: their last use from now on. A sweep that has chosen one before spares it for that.

        Returns:
            How many are held.
        """
        with self.counting(stopped):
            if stopped():  # who asked for it was told that nothing is held
                raise Stopped
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._leases, 0o700)
            self._end_lease(holder)
            others, leases = self._held(now_ns)
            total = sum(blocks(status.st_size) for name in others if (status := self._status(name)))
            held: list[str] = []
            for name in dict.fromkeys(names) if leases < MOST_LEASES else ():
                status = self._status(name)
                if status is None or status.st_mtime_ns <= oldest_ns:
                    continue
                total += 0 if name in others else blocks(status.st_size)
                if total > most:
                    break
                os.utime(f"{self.path}/{name}", ns=(max(used_ns, status.st_mtime_ns + 1),) * 2, follow_symlinks=False)
                held.append(name)
            if held:
                self._write_lease(holder, held, now_ns + lease_ns)
        return len(held)

    def release(self, holder: str, stopped: Callable[[], bool] = never) -> None:
        """End a lease."""
        with self.counting(stopped):
            self._end_lease(holder)

    def held(self, now_ns: int, stopped: Callable[[], bool] = never) -> set[str]:
        """Return the names of all values that leases hold; delete leases that have ended."""
        with self.counting(stopped):
            return self._held(now_ns)[0]

    def _held(self, now_ns: int) -> tuple[set[str], int]:
        """Return the names that leases hold, and the number of leases. The caller has the lock."""
        names: set[str] = set()
        leases = 0
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self._leases):
                if not entry.is_file(follow_symlinks=False):  # whoever put it there, it is no lease
                    continue
                if entry.stat(follow_symlinks=False).st_mtime_ns <= now_ns:
                    os.unlink(entry.path)
                    continue
                with open(entry.path, "rb") as file:
                    lines = file.read().split()
                names.update(line.decode("ascii", "replace") for line in lines)
                leases += 1
        return names, leases

    def _write_lease(self, holder: str, names: Sequence[str], until_ns: int) -> None:
        path = f"{self._leases}/{holder}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600)
        try:
            _write_all(fd, [memoryview("\n".join(names).encode())])
            os.utime(fd, ns=(until_ns, until_ns))  # a process that is killed before leaves one that has ended
        finally:
            os.close(fd)

    def _end_lease(self, holder: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self._leases}/{holder}")

    def _status(self, name: str) -> os.stat_result | None:
        try:
            return os.stat(f"{self.path}/{name}", follow_symlinks=False)
        except (FileNotFoundError, ValueError):
            return None

    # --- sweeps ---------------------------------------------------------------------------------
    @contextlib.contextmanager
    def sweeping(self, stopped: Callable[[], bool] = never) -> Iterator[None]:
        """Wait until no other process or thread sweeps this folder."""
        self.check()
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._tmp, 0o700)
        with self._locking(self._tmp, os.O_RDONLY, stopped):
            yield

    def reap(self, stopped: Callable[[], bool] = never) -> tuple[int, int]:
        """Delete what killed writers left. Return how many files, and the bytes of those still being written."""
        reaped = writing = 0
        with self.counting(stopped):
            for entry in os.scandir(self._tmp):
                with contextlib.suppress(OSError):  # gone, or something that is not a writer's
                    fd = os.open(entry.path, os.O_RDWR | _FLAGS)
                    try:
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        os.unlink(entry.path)
                        reaped += 1
                    except BlockingIOError:
                        writing += blocks(os.fstat(fd).st_size)
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

    def free(self) -> int:
        """Return how many bytes the disk has left."""
        disk = os.statvfs(self.path)
        return disk.f_bavail * disk.f_frsize


def is_in_memory(path: str) -> bool:
    """Return whether the file system of a path is in memory, so that a read waits for no disk; False if unknown."""
    try:
        device = os.stat(path).st_dev
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            lines = [line.partition(" - ") for line in mounts]
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(number == about.split()[2] and kind.startswith(("tmpfs ", "ramfs ")) for about, _, kind in lines)


def _lock(fd: int, stopped: Callable[[], bool]) -> None:
    """Lock a file.

    Raises:
        Stopped: `stopped` returned True before the lock was free.
    """
    pause_s = 2e-5
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if stopped():
                raise Stopped from None
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _MOST_PAUSE_S)


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
    fd = os.open(path, os.O_RDONLY | _CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
