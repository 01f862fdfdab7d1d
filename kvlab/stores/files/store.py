"""Blocks in files: one file per block, in a folder that several processes share and that outlives them all.

`folder` does the disk's work, `calls` gives it a deadline, `janitor` frees room. This module joins the results and
counts hits, misses, dropped writes and faults.

A call that was abandoned at its deadline may go on at any time. Its thread therefore never reads into a buffer of the
caller, and renames nothing into place. The caller itself reads into its buffers, by a system call that takes only what
is in the page cache; what is not there, a thread reads first.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final, TypeVar

from kvlab.core.policies import POLICIES
from kvlab.errors import ConfigError
from kvlab.stores.base import (
    MAX_TTL_S,
    MAX_VALUE_BYTES,
    Health,
    Store,
    StoreStats,
    Value,
    check_buffers,
    check_clock,
    check_keys,
    check_number,
    check_own_ttl,
    check_ttl,
    check_values,
    pieces,
)
from kvlab.stores.deadline import Deadline
from kvlab.stores.faults import Reason
from kvlab.stores.files.calls import Call, Calls, Failed, reason_of
from kvlab.stores.files.folder import BLOCK, SYNCS, Folder, Stopped, blocks, is_in_memory, name_of
from kvlab.stores.files.janitor import NS, Janitor
from kvlab.stores.fork import reset_in_children

MAX_DEADLINE_S: Final = 3600
OPEN_AT_ONCE: Final = 32
"""Files of a batch that are open at the same time."""
READ_AT_ONCE: Final = 8 << 20
SWEEP_S: Final = 60.0
"""Seconds between two sweeps of a folder that does not fill; less with a short TTL."""
_NO_WAIT: Final[int | None] = getattr(os, "RWF_NOWAIT", None)  # Linux
_NO_FAULT: Final = frozenset({Reason.ABSENT, Reason.TOO_BIG, Reason.CLOSED})
R = TypeVar("R")
Open = tuple[int, int]
"""A file descriptor, and the size of the file."""


class FileStore(Store):
    """Values in the files of one folder.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with FileStore(folder) as store:
    ...     store.put_many([b"a", b"b"], [b"one", b"two"])
    2
    >>> FileStore(folder).get_many([b"a", b"x"])
    [b'one', None]

    Args:
        path: the absolute path of the folder. It is made if it does not exist; a folder with other files is refused.
            If it vanishes later, because its disk is not mounted for example, it is not made again ("gone").
        max_bytes: what all values may take together, in blocks of 4 KiB. It holds for all processes that use the
            folder together, also if some of them are killed.
        ttl_s: how long a value lives after its last write or read.
        policy: which values leave when room is needed, a name in `kvlab.core.policies.POLICIES`.
        sync: what is on the disk when a put returns, and so outlives a power failure: "none" (the kernel writes it
            later), "data" (the value), "full" (its name, too). The end of a process alone loses nothing.
        deadline_s: the limit for a whole call. Every 50 MB of values add one second.
        max_held: the share of `max_bytes` that all leases together may hold (`hold_many`).
        clock: returns seconds since 1970; tests pass their own.

    If the disk is full, a tenth of the values leave, as if `max_bytes` were reached.

    Raises:
        ConfigError: the path is relative, or that of a file or of a folder with other files; a setting is invalid; or
            the system is Windows.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: int = 16 << 30,
        ttl_s: float | None = None,
        policy: str = "lru",
        sync: str = "none",
        deadline_s: float = 1.0,
        max_held: float = 0.5,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if os.name == "nt":
            raise ConfigError("expected Linux or macOS for a store in files; use redis:// on Windows")
        check_ttl(ttl_s)
        check_number("max_bytes", max_bytes, BLOCK - 1, 1 << 60, "bytes", whole=True)
        check_number("deadline_s", deadline_s, 0, MAX_DEADLINE_S, "seconds")
        check_number("max_held", max_held, 0, 1, "of the room")
        check_clock(clock)
        for name, value, known in (("policy", policy, POLICIES), ("sync", sync, SYNCS)):
            if not isinstance(value, str) or value not in known:
                raise ConfigError(f"expected {name} as one of {', '.join(known)}, got {value!r}")
        self.path, self.max_bytes, self.deadline_s = _checked(path), max_bytes, deadline_s
        self.ttl_s, self._most_held = ttl_s, int(max_held * max_bytes)
        self._ttl_ns = None if ttl_s is None else max(1, int(ttl_s * NS))
        self._clock = clock
        self._folder = Folder(self.path, sync)
        every_s = SWEEP_S if ttl_s is None else min(SWEEP_S, max(1.0, ttl_s / 4))
        self._janitor = Janitor(self._folder, max_bytes, self._ttl_ns, policy, every_s, self._now)
        self._calls = Calls()
        self._stats = StoreStats()
        self._closed = self._prepared = self._in_memory = False
        self.reset_after_fork()
        reset_in_children(self)
        with contextlib.suppress(Failed):  # a disk that does not work now may work later
            self._calls.run(Deadline(deadline_s), lambda call: self._prepare())

    def __repr__(self) -> str:
        return f"FileStore({self.path!r})"

    # --- reads ----------------------------------------------------------------------------------
    def get_many(
        self, keys: Sequence[bytes], out: Sequence[memoryview] | None = None, reasons: list[str] | None = None
    ) -> list[bytes | memoryview | None]:
        """See `Store.get_many`. A file that something else has cut while it was read is a miss ("io")."""
        check_buffers(keys, out)
        deadline = Deadline(self.deadline_s)
        got: list[bytes | memoryview | Reason] = []
        for i in range(0, len(keys), OPEN_AT_ONCE):
            names = [name_of(key) for key in keys[i : i + OPEN_AT_ONCE]]
            if deadline.passed:
                got += [Reason.TIMEOUT] * len(names)
                continue
            try:
                if out is None:
                    got += self._run(deadline, partial(self._read, names, deadline))
                else:
                    got += self._read_into(names, [buffer.cast("B") for buffer in out[i : i + len(names)]], deadline)
            except Failed as failed:
                got += [failed.reason] * len(names)
        missed = [value for value in got if isinstance(value, Reason)]
        with self._lock:
            self._stats.requested += len(keys)
            self._stats.hits += len(keys) - len(missed)
            self._stats.misses.update(missed)
            self._stats.bytes_out += sum(len(value) for value in got if not isinstance(value, Reason))
        self._count_fault(missed)
        if reasons is not None:
            reasons += [value if isinstance(value, Reason) else "" for value in got]
        return [None if isinstance(value, Reason) else value for value in got]

    def _read(self, names: Sequence[str], deadline: Deadline, call: object) -> list[bytes | memoryview | Reason]:
        """Read values into memory of this thread."""
        opened = self._open(names, [MAX_VALUE_BYTES] * len(names), deadline, call)
        try:
            return [file if isinstance(file, Reason) else _read_all(*file) for file in opened]
        finally:
            _close(opened)

    def _read_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], deadline: Deadline
    ) -> list[bytes | memoryview | Reason]:
        """Read values into buffers, in the thread of the caller."""
        opened = self._run(
            deadline, partial(self._open, names, [buffer.nbytes for buffer in buffers], deadline), dispose=_close
        )
        try:
            return [
                file if isinstance(file, Reason) else self._fill(*file, buffer, deadline)
                for file, buffer in zip(opened, buffers, strict=True)
            ]
        finally:
            self._calls.start(partial(_close, opened))  # closing may hang, too

    def _fill(self, fd: int, size: int, buffer: memoryview, deadline: Deadline) -> memoryview | Reason:
        at = 0
        while at < size:
            try:
                count = _read_now(fd, buffer[at:size], at, self._in_memory)
                if count is None and deadline.passed:
                    return Reason.TIMEOUT
                if count is None:
                    data = self._calls.run(deadline, partial(_read_part, fd, min(size - at, READ_AT_ONCE), at))
                    count = len(data)
                    buffer[at : at + count] = data
            except (OSError, Failed) as error:
                return reason_of(error)
            if count == 0:
                return Reason.IO
            at += count
        return buffer[:size]

    def _open(self, names: Sequence[str], room: Sequence[int], deadline: Deadline, call: object) -> list[Open | Reason]:
        """Open values of at most `room` bytes, and note that they are used."""
        opened: list[Open | Reason] = []
        try:
            for name, most in zip(names, room, strict=True):
                try:
                    opened.append(self._open_one(name, min(most, MAX_VALUE_BYTES), deadline))
                except OSError as error:
                    opened.append(reason_of(error))
            if Reason.ABSENT in opened:
                self._folder.check()
        except BaseException:
            _close(opened)
            raise
        return opened

    def _open_one(self, name: str, most: int, deadline: Deadline) -> Open | Reason:
        found = self._folder.open(name)
        if found is None:
            return Reason.ABSENT
        fd, status = found
        if status.st_mtime_ns <= self._oldest_ns() or status.st_size > most:
            os.close(fd)
            return Reason.ABSENT if status.st_mtime_ns <= self._oldest_ns() else Reason.TOO_BIG
        deadline.extend(status.st_size)
        with contextlib.suppress(OSError):  # a disk that cannot be written can be read
            os.utime(fd, ns=(max(self._now(), status.st_mtime_ns),) * 2)
        return fd, status.st_size

    # --- writes ---------------------------------------------------------------------------------
    def put_many(self, keys: Sequence[bytes], values: Sequence[Value], ttl_s: float | None = None) -> int:
        """See `Store.put_many`.

        A file has one time, its last use. One that is to live longer or shorter is written with a use in the future
        or in the past, so it also leaves later or earlier when room is needed.
        """
        check_values(keys, values)
        check_own_ttl(ttl_s, self.ttl_s)
        parts = [[view.cast("B") for part in pieces(value) if (view := memoryview(part)).nbytes] for value in values]
        sizes = [sum(part.nbytes for part in value) for value in parts]
        fits = [i for i, size in enumerate(sizes) if size <= MAX_VALUE_BYTES and blocks(size) <= self.max_bytes]
        deadline = Deadline(self.deadline_s)
        deadline.extend(sum(sizes[i] for i in fits))
        results: list[Reason | None] = []
        failed: Reason | None = None
        if fits:
            try:
                values_of = [(name_of(keys[i]), parts[i]) for i in fits]
                self._run(deadline, partial(self._write, values_of, results, self._shift_ns(ttl_s)))
            except Failed as error:
                failed = error.reason
        outcomes = [*results, *[failed] * len(fits)][: len(fits)]  # of the first, some were written in time
        drops = [reason for reason in outcomes if reason]
        drops += [Reason.CLOSED if self._closed else Reason.TOO_BIG] * (len(keys) - len(fits))
        stored = [i for i, reason in zip(fits, outcomes, strict=True) if not reason]
        with self._lock:
            self._stats.offered += len(keys)
            self._stats.stored += len(stored)
            self._stats.drops.update(drops)
            self._stats.bytes_in += sum(sizes[i] for i in stored)
        self._count_fault(drops)
        return len(stored)

    def _write(
        self,
        values: Sequence[tuple[str, list[memoryview]]],
        results: list[Reason | None],
        shift_ns: int,
        call: Call[None],
    ) -> None:
        """Write values; append to `results` why each was dropped, or None."""
        for name, parts in values:
            if call.abandoned:
                return
            try:
                results.append(self._write_one(name, parts, lambda: call.abandoned, shift_ns))
            except (OSError, Stopped) as error:
                results.append(reason_of(error))
            if call.abandoned and results[-1] is None:  # the caller may have counted it as dropped
                self._folder.delete([name])

    def _write_one(
        self, name: str, parts: list[memoryview], stopped: Callable[[], bool], shift_ns: int = 0
    ) -> Reason | None:
        def write() -> int | None:
            return self._folder.write(name, parts, self.max_bytes, self._now() + shift_ns, stopped)

        need, began_ns = blocks(sum(part.nbytes for part in parts)), self._now()
        try:
            used = write()
            if used is None:
                self._janitor.sweep(need, stopped=stopped)
                used = write()
        except OSError as error:
            if reason_of(error) != Reason.OOM:
                raise
            self._janitor.sweep(need, full_since_ns=began_ns, stopped=stopped)
            used = write()
        if used is None:
            return Reason.OOM
        self._janitor.wake(used)
        return None

    # --- names ----------------------------------------------------------------------------------
    def probe(self, keys: Sequence[bytes]) -> int:
        """See `Store.probe`."""
        check_keys(keys)
        return self._advice(self._present, keys, 0)

    def touch_many(self, keys: Sequence[bytes], ttl_s: float | None = None) -> list[bool]:
        """See `Store.touch_many`."""
        check_keys(keys)
        check_ttl(ttl_s)
        return self._advice(partial(self._touch, shift_ns=self._shift_ns(ttl_s)), keys, [False] * len(keys))

    def hold_many(self, keys: Sequence[bytes], lease_s: float, holder: str) -> tuple[int, bool]:
        """See `Store.hold_many`. All processes that share the folder spare them, also if this one is killed.

        All leases together hold at most `max_held` of the room. Of keys that exceed it, the first ones are held. The
        values live at least as long as the lease; a process that has a shorter TTL than this one does not see that.
        """
        check_keys(keys)
        check_number("lease_s", lease_s, 0, MAX_TTL_S, "seconds")
        return self._advice(partial(self._hold, _lease_of(holder), lease_s), keys, 0), True

    def _hold(self, holder: str, lease_s: float, names: list[str], stopped: Callable[[], bool]) -> int:
        now_ns, oldest_ns = self._now(), self._oldest_ns()
        used_ns = max(now_ns, now_ns + self._shift_ns(lease_s))
        return self._folder.hold(holder, names, self._most_held, now_ns, int(lease_s * NS), oldest_ns, used_ns, stopped)

    def release(self, holder: str) -> None:
        """See `Store.release`."""
        self._advice(lambda names, stopped: self._folder.release(_lease_of(holder), stopped), [], None)

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """See `Store.delete_many`."""
        check_keys(keys)
        return self._advice(self._delete, [*dict.fromkeys(keys)], 0)

    def _advice(self, work: Callable[[list[str], Callable[[], bool]], R], keys: Sequence[bytes], otherwise: R) -> R:
        names = [name_of(key) for key in keys]
        try:
            return self._run(Deadline(self.deadline_s), lambda call: work(names, lambda: call.abandoned))
        except Failed as failed:
            self._count_fault([failed.reason])
            return otherwise

    def _present(self, names: list[str], stopped: Callable[[], bool]) -> int:
        oldest_ns = self._oldest_ns()
        count = next((i for i, name in enumerate(names) if not self._folder.is_there(name, oldest_ns)), len(names))
        if count < len(names):
            self._folder.check()
        return count

    def _touch(self, names: list[str], stopped: Callable[[], bool], shift_ns: int = 0) -> list[bool]:
        oldest_ns, now_ns = self._oldest_ns(), self._now() + shift_ns
        touched = [self._folder.touch(name, oldest_ns, now_ns) for name in names]
        if not all(touched):
            self._folder.check()
        return touched

    def _delete(self, names: list[str], stopped: Callable[[], bool]) -> int:
        oldest_ns = self._oldest_ns()
        deleted = self._folder.delete(names, stopped=stopped)
        return sum(used_ns is not None and used_ns > oldest_ns for used_ns in deleted)

    # --- the rest -------------------------------------------------------------------------------
    def health(self) -> Health:
        """See `Store.health`. Writes, reads and deletes a value of its own."""
        try:
            said = self._run(Deadline(self.deadline_s), self._try_all, always=True)
        except Failed as failed:
            return Health(False, f"{self.path}: {failed.reason}")
        return Health(True, f"{self.path}: {said}")

    def _try_all(self, call: Call[str]) -> str:
        name, value = name_of(b"health" + os.urandom(16)), b"health"
        if reason := self._write_one(name, [memoryview(value)], lambda: call.abandoned):
            raise Failed(reason)
        if self._read([name], Deadline(self.deadline_s), call) != [value] or not self._delete(
            [name], lambda: call.abandoned
        ):
            raise Failed(Reason.IO)
        with self._folder.counting() as count:
            used = count.used
        return f"{_gib(used)} of {_gib(self.max_bytes)} GiB, {_gib(self._folder.free())} free on the disk"

    def stats(self) -> StoreStats:
        """See `Store.stats`."""
        with self._lock:
            return copy.deepcopy(self._stats)

    def breakers(self) -> dict[tuple[str, str], str]:
        """See `Store.breakers`. The disk is the only server."""
        return {("disk", "calls"): self._calls.breaker.state}

    def close(self) -> None:
        """See `Store.close`. The files stay."""
        self._closed = True
        self._janitor.close(self.deadline_s)

    def reset_after_fork(self) -> None:
        """See `Forkable`."""
        self._lock = threading.Lock()

    def _run(
        self,
        deadline: Deadline,
        work: Callable[[Call[R]], R],
        dispose: Callable[[R], object] = lambda result: None,
        always: bool = False,
    ) -> R:
        """Make a call to the disk.

        Raises:
            Failed: the store is closed, or the call has no result.
        """
        if self._closed:
            raise Failed(Reason.CLOSED)

        def prepared(call: Call[R]) -> R:
            self._prepare()
            return work(call)

        try:
            return self._calls.run(deadline, prepared, dispose, always)
        except ConfigError as error:  # the disk came later, with other files in the folder
            raise Failed(Reason.GONE) from error

    def _prepare(self) -> None:
        if not self._prepared:
            self._folder.prepare()
            self._in_memory = is_in_memory(self.path)
            self._prepared = True

    def _count_fault(self, reasons: Iterable[Reason]) -> None:
        """Count a failed round trip."""
        if faults := set(reasons) - _NO_FAULT:
            with self._lock:
                self._stats.faults[min(faults)] += 1

    def _now(self) -> int:
        return int(self._clock() * NS)

    def _shift_ns(self, ttl_s: float | None) -> int:
        """How much later than now a value was used that lives for `ttl_s`; its TTL counts from its last use."""
        return 0 if ttl_s is None or self._ttl_ns is None else max(1, int(ttl_s * NS)) - self._ttl_ns

    def _oldest_ns(self) -> int:
        """The last use of a value that has just expired."""
        return -1 if self._ttl_ns is None else self._now() - self._ttl_ns


def _lease_of(holder: str) -> str:
    return os.path.basename(name_of(holder.encode()))


def _checked(path: str | os.PathLike[str]) -> str:
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"expected the path of a folder, got {type(path).__name__}")
    text = os.fspath(path)
    if not isinstance(text, str) or not os.path.isabs(text) or "\0" in text:
        raise ConfigError(f"expected the absolute path of a folder, got {text!r}")
    return os.path.normpath(text)


def _read_now(fd: int, buffer: memoryview, at: int, in_memory: bool) -> int | None:
    """Read what is in memory; None if the first byte is not, or the system cannot tell."""
    if in_memory:  # a tmpfs knows no RWF_NOWAIT
        return os.preadv(fd, [buffer], at)
    if _NO_WAIT is None:
        return None
    try:
        return os.preadv(fd, [buffer], at, _NO_WAIT)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
            return None
        raise


def _read_part(fd: int, size: int, at: int, call: object) -> bytes:
    return os.pread(fd, size, at)


def _read_all(fd: int, size: int) -> bytes | Reason:
    parts: list[bytes] = []
    while (left := size - sum(map(len, parts))) > 0:
        part = os.pread(fd, left, size - left)
        if not part:
            return Reason.IO
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _close(opened: Iterable[Open | Reason]) -> None:
    for file in opened:
        if not isinstance(file, Reason):
            with contextlib.suppress(OSError):
                os.close(file[0])


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
