"""Stop asking what does not answer: a circuit breaker on a monotonic clock.

A store that hangs costs every caller a whole deadline, again and again. The breaker counts
faults in a row; after a few it opens, and calls are refused at once. When it has cooled down,
one caller may try. If that goes well all may, else it stays open for another cool-down.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kvlab.stores.base import check_clock, check_number
from kvlab.stores.fork import reset_in_children


class Breaker:
    """Closed, open, or half-open (one caller is trying). Safe to use from several threads.

    Args:
        failures: how many faults in a row open it.
        cooldown_s: how long it then refuses everybody.
        clock: seconds that never go back; tests bring their own.

    Raises:
        ConfigError: a setting that is no such number, or no clock.

    >>> now = [0.0]
    >>> breaker = Breaker(failures=2, cooldown_s=1.0, clock=lambda: now[0])
    >>> for _ in range(2):
    ...     breaker.record(ok=False)
    >>> breaker.allow()
    False
    >>> now[0] = 1.5
    >>> breaker.allow(), breaker.allow()  # one caller tries, the next is refused
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
        """See `Forkable`. The child begins with a closed breaker."""
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._opened_at: float | None = None
        self._trying = False

    @property
    def state(self) -> str:
        """closed, open or half-open."""
        with self._lock:
            return "closed" if self._opened_at is None else "half-open" if self._trying else "open"

    @property
    def ready(self) -> bool:
        """Whether `allow` would say yes."""
        with self._lock:
            return self._opened_at is None or not (self._trying or self._clock() - self._opened_at < self.cooldown_s)

    @property
    def faults(self) -> int:
        """Faults in a row."""
        with self._lock:
            return self._in_a_row

    def allow(self) -> bool:
        """Whether to make this call. After True, `record` must follow."""
        with self._lock:
            if self._opened_at is None:
                return True
            if self._trying or self._clock() - self._opened_at < self.cooldown_s:
                return False
            self._trying = True
            return True

    def record(self, ok: bool | None) -> None:
        """How the call went; None when it tells nothing about the other side."""
        with self._lock:
            was_trying, self._trying = self._trying, False
            if ok:
                self._in_a_row, self._opened_at = 0, None
            elif ok is False:
                self._in_a_row += 1
                if was_trying or (self._opened_at is None and self._in_a_row >= self.failures):
                    self._opened_at = self._clock()
