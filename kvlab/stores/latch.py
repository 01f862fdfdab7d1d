"""Two ways for threads to wait that stay usable when a signal handler raises in the middle of them.

`threading.Event` and `threading.Condition` are Python code around a lock. A signal handler may raise (that of
Ctrl-C does) after they have acquired the lock and before the block that releases it. Then the lock stays
acquired, and every later `wait` and `set` hangs. A `Latch` makes one call of the interpreter's own lock.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time


class Latch:
    """An event that is set once and that one thread waits for. `wait` may be called again after an exception."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self.is_set = False

    def set(self) -> None:
        """Wake the waiting thread. May be called again, also after an exception in it."""
        self.is_set = True
        with contextlib.suppress(RuntimeError):  # the lock is free: it was set before
            self._lock.release()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the latch is set, at most `timeout_s`. Returns whether it is set."""
        if not self.is_set:
            self._lock.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s))
        return self.is_set


class Lease:
    """The right to do something. One thread has it at a time.

    A lease expires, because a signal may keep its holder from giving it back. Any thread may give it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expires_at = -math.inf
        self._waiting: list[Latch] = []

    def take(self, wait_s: float, lease_s: float) -> bool:
        """Wait at most `wait_s` for the lease, and take it for `lease_s`; return False if it did not become free."""
        give_up = time.monotonic() + wait_s
        while True:
            with self._lock:
                now = time.monotonic()
                if now >= self._expires_at:
                    self._expires_at = now + lease_s
                    return True
                if now >= give_up:
                    return False
                free, wait_s = Latch(), min(give_up, self._expires_at) - now
                self._waiting.append(free)
            free.wait(wait_s)

    def give_back(self) -> None:
        """End the lease, and wake all waiting threads. The first of them takes it."""
        with self._lock:
            self._expires_at = -math.inf
            waiting, self._waiting = self._waiting, []
        for free in waiting:
            free.set()
