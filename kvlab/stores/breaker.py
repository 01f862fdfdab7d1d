"""A circuit breaker refuses calls to a server that fails repeatedly. It uses a monotonic clock.

Each call to a hung store would wait for its whole deadline. The breaker counts consecutive faults.
After `failures` faults it opens and refuses calls immediately. After the cool-down it allows one
trial call. If the trial succeeds, the breaker closes; otherwise it stays open for another cool-down.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kvlab.stores.base import check_clock, check_number
from kvlab.stores.fork import reset_in_children


class Breaker:
    """Closed, open, or half-open (a trial call is running). Thread-safe.

    Args:
        failures: how many consecutive faults open the breaker.
        cooldown_s: how many seconds an open breaker refuses all calls.
        clock: returns monotonic seconds; tests pass their own.

    Raises:
        ConfigError: a number is out of range, or `clock` is not callable.

    >>> now = [0.0]
    >>> breaker = Breaker(failures=2, cooldown_s=1.0, clock=lambda: now[0])
    >>> for _ in range(2):
    ...     breaker.record(ok=False)
    >>> breaker.allow()
    False
    >>> now[0] = 1.5
    >>> breaker.allow(), breaker.allow()  # the trial call is allowed, the next call is refused
    (True, False)
    """

    def __init__(self, failures: int = 3, cooldown_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        check_number("failures", failures, 0, 1 << 30, whole=True)
        check_number("cooldown_s", cooldown_s, 0, 86400, "seconds")
        check_clock(clock)
        self.failures = failures
        self.cooldown_s = cooldown_s
        self._clock = clock
        self.reset_after_fork()
        reset_in_children(self)

    def reset_after_fork(self) -> None:
        """See `Forkable`. The breaker of the child is closed."""
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._opened_at: float | None = None
        self._trying = False

    @property
    def state(self) -> str:
        """The state as text: "closed", "open" or "half-open"."""
        with self._lock:
            return "closed" if self._opened_at is None else "half-open" if self._trying else "open"

    @property
    def ready(self) -> bool:
        """Whether `allow` would return True."""
        with self._lock:
            return self._opened_at is None or not (self._trying or self._clock() - self._opened_at < self.cooldown_s)

    @property
    def faults(self) -> int:
        """The number of consecutive faults."""
        with self._lock:
            return self._in_a_row

    def allow(self) -> bool:
        """Return whether the call may be made. After True, the caller must call `record`."""
        with self._lock:
            if self._opened_at is None:
                return True
            if self._trying or self._clock() - self._opened_at < self.cooldown_s:
                return False
            self._trying = True
            return True

    def record(self, ok: bool | None) -> None:
        """Record the outcome of a call: True, False, or None if it says nothing about the server."""
        with self._lock:
            was_trying, self._trying = self._trying, False
            if ok:
                self._in_a_row, self._opened_at = 0, None
            elif ok is False:
                self._in_a_row += 1
                if was_trying or (self._opened_at is None and self._in_a_row >= self.failures):
                    self._opened_at = self._clock()
