"""The deadline of a call, shared by everything that the call does."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Final

GRACE_S: Final = 0.05  # to receive replies that arrived while this process was paused
BYTES_PER_S: Final = 50e6  # large values extend a deadline at this rate; below it, computing is faster than loading


class Deadline:
    """The time at which a call must end. Connecting and waiting count.

    Args:
        seconds: the time from now. `extend` adds time for the bytes that the call transfers.
    """

    __slots__ = ("_ends_at", "_grace")

    def __init__(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + seconds
        self._grace = 0.0

    def extend(self, nbytes: int) -> None:
        """Add the time that `nbytes` may take."""
        self._ends_at += nbytes / BYTES_PER_S

    def copy(self) -> Deadline:
        """Return another deadline with the same end. Each server of a call gets one."""
        made = Deadline(0)
        made._ends_at = self._ends_at
        return made

    def half(self) -> Deadline:
        """Return another deadline with half of the remaining time."""
        return Deadline((self._ends_at - time.monotonic()) / 2)

    def extend_to(self, others: Iterable[Deadline]) -> None:
        """End no earlier than the latest of `others`."""
        self._ends_at = max([self._ends_at, *(other._ends_at for other in others)])

    def abandon(self) -> None:
        """End now, because no caller waits for the call any more."""
        self._ends_at = -math.inf

    @property
    def abandoned(self) -> bool:
        """Whether the call was abandoned. A missing reply is then not a fault of the server."""
        return self._ends_at == -math.inf

    @property
    def remaining(self) -> float:
        """Seconds until the deadline; 0 once it has passed."""
        return max(0.0, self._ends_at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self._ends_at

    def remaining_to_connect(self) -> float:
        """Return the seconds until the deadline, more than 0: the timeout for an operation that starts now.

        Raises:
            TimeoutError: the deadline has passed.
        """
        remaining = self._ends_at - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the deadline of the call has passed")
        return remaining

    def remaining_to_receive(self) -> float:
        """Return the timeout for the next receive in seconds, more than 0.

        If the deadline has passed and no receive has timed out, this process was paused (a full garbage
        collection takes 0.5 s with four million objects), and the server has probably replied in time.
        The thread then gets `GRACE_S` once. Without this grace, one pause would be a fault of every current
        call, and would open breakers.

        Raises:
            TimeoutError: the deadline and the grace have passed.
        """
        remaining = self._ends_at - time.monotonic()
        if remaining <= 0 and not self.abandoned:
            self._grace = self._grace or GRACE_S - remaining
            remaining += self._grace
        if remaining <= 0:
            raise TimeoutError("the deadline of the call has passed")
        return remaining
