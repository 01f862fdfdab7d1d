"""Frees room in the folder of a `FileStore`: expired values, what killed writers left, and what a policy evicts.

A sweep reads the whole folder, so it evicts a tenth of the room at once, and takes place in the background as soon as
less than a twentieth is free. The cost of a put is therefore that of a few file names, however many values there are.

What a lease holds is neither evicted nor expired, whichever process has the lease. A file that is used after a sweep
has chosen it stays, so a lease that begins meanwhile counts, too.

Of all processes that share a folder, one sweeps at a time. Uses by others are seen by the times of the files. Several
uses of a value between two sweeps count as one. This matters only to policies that count uses.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from typing import Final

from kvlab.core.policies import POLICIES, Policy
from kvlab.stores.files.folder import Entry, Folder, Stopped, never
from kvlab.stores.fork import reset_in_children
from kvlab.stores.latch import Latch

HIGH: Final = 0.95
LOW: Final = 0.9
"""A sweep begins when more than HIGH of the room is taken, and leaves at most LOW of it."""
BATCH: Final = 64
"""Values that are deleted under one lock."""
NS: Final = 10**9
_WAIT_S: Final = 0.05
logger = logging.getLogger(__name__)


class Janitor:
    """Sweeps a folder that may take `most` bytes. Thread-safe.

    Args:
        ttl_ns: how long a value lives after its last use; None: for ever.
        policy: a name in `kvlab.core.policies.POLICIES`.
        every_s: seconds between two sweeps of a folder that does not fill.
        clock: returns nanoseconds since 1970.

    Attributes:
        evicted, expired, reaped: files deleted by this object: for room, by their TTL, and left-over ones.
    """

    def __init__(
        self, folder: Folder, most: int, ttl_ns: int | None, policy: str, every_s: float, clock: Callable[[], int]
    ) -> None:
        self._folder, self._most, self._ttl_ns, self.every_s, self._clock = folder, most, ttl_ns, every_s, clock
        self._policy_name = policy
        self.evicted = self.expired = self.reaped = 0
        self.reset_after_fork()
        reset_in_children(self)

    def reset_after_fork(self) -> None:
        """See `Forkable`. The child reads the folder anew, and starts a thread of its own when it needs one."""
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._work = Latch()
        self._thread = threading.Thread()  # not started
        self._closed = False
        self._policy: Policy[str] = POLICIES[self._policy_name](self._most)
        self._seen: dict[str, Entry] = {}
        self._held: set[str] = set()
        self._pinned: set[str] = set()  # of these, what the policy knows
        self._overflow: list[str] = []  # evicted by the policy, but still there
        self._has_swept = False

    def wake(self, used: int) -> None:
        """Take note that so many bytes are taken. The first call starts the thread that sweeps in the background."""
        with self._starting:
            if not self._closed and not self._thread.is_alive():
                self._thread = threading.Thread(target=_run, args=(weakref.ref(self),), name="kvlab-sweep", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # the interpreter is ending, or there are too many threads
                    self._thread = threading.Thread()
        if self.is_due(used):
            self._work.set()

    def close(self, timeout_s: float) -> None:
        """End the thread. A sweep that hangs is left alone after `timeout_s`."""
        self._closed = True
        self._work.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _is_closed(self) -> bool:
        return self._closed

    def is_due(self, used: int) -> bool:
        """Return whether the background has to sweep when so many bytes are taken."""
        return used > HIGH * self._most

    def sweep(self, need: int = 0, full_since_ns: int | None = None, stopped: Callable[[], bool] = never) -> None:
        """Free room. Does nothing if there is enough and the last sweep was not long ago.

        Args:
            need: the bytes that are to be free.
            full_since_ns: when the disk was found full, although the folder may take more. A tenth of what is there is
                then evicted, unless a sweep has begun since, or `need` bytes would not fit all the same.

        Raises:
            OSError: the disk refused.
            Stopped: `stopped` returned True.
        """
        while not self._lock.acquire(timeout=_WAIT_S):
            if stopped():
                raise Stopped
        try:
            with self._folder.sweeping(stopped):
                self._sweep(need, full_since_ns, stopped)
        finally:
            self._lock.release()

    def _sweep(self, need: int, full_since_ns: int | None, stopped: Callable[[], bool]) -> None:
        now, full = self._clock(), full_since_ns is not None
        with self._folder.counting(stopped) as count:
            if full_since_ns is not None and count.swept_ns > full_since_ns:
                return  # another process was faster
            if full and need > self._folder.free() + count.used:
                return  # it will never fit
            enough = count.used + need <= self._most and not self.is_due(count.used)
            recent = 0 <= now - count.swept_ns < self.every_s * NS
            if not full and enough and recent and self._has_swept:
                return
            count.swept_ns = now
            before, added = (count.used, count.added), count.added
        used = self._look(now, stopped)
        with self._folder.counting(stopped) as count:
            used += count.added - added  # never too low
            # Others wrote meanwhile, so `used` may be too high. It replaces a lower count once, after a power failure.
            unknown = (count.used, count.added) == before or not self._has_swept
            used = count.used = used if unknown else min(count.used, used)
            self._has_swept = True
        room = min(used, self._most) if full else self._most
        if full or used + need > HIGH * self._most:
            self._evict(used - int(LOW * room) + need, stopped)

    def _look(self, now: int, stopped: Callable[[], bool]) -> int:
        """Read the folder, delete what is expired or left over, and tell the policy; return the bytes of the rest."""
        reaped, used = self._folder.reap(stopped)
        self.reaped += reaped
        self._held = self._folder.held(now, stopped)
        present: dict[str, Entry] = {}
        expired: list[Entry] = []
        for entry in self._folder.entries():
            if stopped():
                raise Stopped
            used += entry.size
            is_old = self._ttl_ns is not None and entry.used_ns + self._ttl_ns <= now
            if is_old and entry.name not in self._held:
                expired.append(entry)
            else:
                present[entry.name] = entry
        deleted, freed = self._delete(expired, stopped)
        self.expired += deleted
        self._pin(set())
        for name in self._seen.keys() - present.keys():
            self._policy.remove(name)
        self._overflow = []
        for entry in sorted(present.values(), key=lambda entry: entry.used_ns):
            known = self._seen.get(entry.name)
            if known is None or entry.used_ns > known.used_ns or entry.name not in self._policy:
                self._policy.access(entry.name, entry.size, self._overflow)
        self._pin(self._held & present.keys())
        self._seen = present
        return used - freed

    def _pin(self, names: set[str]) -> None:
        """Let the policy spare these values, and no others."""
        for name in self._pinned:
            self._policy.unpin(name)
        self._pinned = {name for name in names if name in self._policy}
        for name in self._pinned:
            self._policy.pin(name)

    def _evict(self, wanted: int, stopped: Callable[[], bool]) -> None:
        """Delete values of so many bytes, in the order of the policy. Values that were used meanwhile stay."""
        overflow = [*dict.fromkeys(self._overflow)]
        while wanted > 0:
            batch: list[Entry] = []
            while len(batch) < BATCH and wanted > sum(entry.size for entry in batch):
                name = overflow.pop(0) if overflow else self._policy.evict()
                if name is None:
                    break
                if name in self._seen and name not in self._policy and name not in self._held:
                    batch.append(self._seen.pop(name))
            if not batch:
                return
            deleted, freed = self._delete(batch, stopped)
            self.evicted += deleted
            wanted -= freed

    def _delete(self, entries: list[Entry], stopped: Callable[[], bool]) -> tuple[int, int]:
        """Delete values unless they were used again; return how many, and their bytes."""
        number = size = 0
        for i in range(0, len(entries), BATCH):
            batch = entries[i : i + BATCH]
            deleted = self._folder.delete([e.name for e in batch], [e.used_ns for e in batch], stopped)
            gone = [e for e, when in zip(batch, deleted, strict=True) if when is not None]
            number, size = number + len(gone), size + sum(e.size for e in gone)
        return number, size


def _run(janitor: weakref.ref[Janitor]) -> None:
    """Sweep at once, then when there is need, and now and then, until the janitor is closed or collected."""
    while (this := janitor()) is not None and not this._closed:
        this._work = work = Latch()
        try:
            this.sweep(stopped=this._is_closed)
        except (OSError, Stopped):  # calls of the store count what is wrong with the disk
            pass
        except Exception:
            logger.exception("a sweep failed")
        every_s, closed = this.every_s, this._closed
        del this
        if not closed:
            work.wait(every_s)
