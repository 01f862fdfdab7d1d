"""When a call must be over: one deadline for all that the call does."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Final

GRACE_S: Final = 0.05  # for what arrived while this process itself stood still
BYTES_PER_S: Final = 50e6  # a slower wire loses against computing; large values stretch a deadline by this


class Deadline:
    """The moment at which a call must be over, connecting and waiting included.

    Args:
        seconds: from now. What the call moves may add to them, see `extend`.
    """

    __slots__ = ("_ends_at", "_grace")

    def __init__(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + seconds
        self._grace = 0.0

    def extend(self, nbytes: int) -> None:
        """Add the time that so many bytes may take."""
        self._ends_at += nbytes / BYTES_PER_S

    def copy(self) -> Deadline:
        """Another deadline that ends at the same moment: one for each server of a call."""
        made = Deadline(0)
        made._ends_at = self._ends_at
        return made

    def half(self) -> Deadline:
        """Another deadline, half as far away."""
        return Deadline((self._ends_at - time.monotonic()) / 2)

    def cover(self, others: Iterable[Deadline]) -> None:
        """End no earlier than any of these."""
        self._ends_at = max([self._ends_at, *(other._ends_at for other in others)])

    def abandon(self) -> None:
        """End now: nobody waits for the call any more."""
        self._ends_at = -math.inf

    @property
    def abandoned(self) -> bool:
        """Whether the call was abandoned. Then nobody is to blame for what did not come."""
        return self._ends_at == -math.inf

    @property
    def remaining(self) -> float:
        """Seconds until the deadline; 0 once it has passed."""
        return max(0.0, self._ends_at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether no time remains."""
        return time.monotonic() >= self._ends_at

    def remaining_to_connect(self) -> float:
        """Seconds until the deadline, more than 0: a timeout for what begins now.

        Raises:
            TimeoutError: the deadline has passed.
        """
        remaining = self._ends_at - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the deadline of the call has passed")
        return remaining

    def remaining_to_receive(self) -> float:
        """Seconds to wait for what is on its way, more than 0.

        A thread that finds the deadline passed without having waited gets `GRACE_S`, once: this process
        stood still (a full garbage collection takes 0.5 s with four million objects), and the server
        answered long ago. Without the grace such a pause is a fault of every call at once, and opens
        breakers.

        Raises:
            TimeoutError: the deadline has passed, and the grace with it.
        """
        remaining = self._ends_at - time.monotonic()
        if remaining <= 0 and not self.abandoned:
            self._grace = self._grace or GRACE_S - remaining
            remaining += self._grace
        if remaining <= 0:
            raise TimeoutError("the deadline of the call has passed")
        return remaining
