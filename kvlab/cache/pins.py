"""Pins: a prefix that is kept until a lease ends, in each tier as strongly as the tier can.

    held       eviction spares the blocks until the lease ends: host memory, a `FileStore`
    refreshed  their TTL lasts until then, but eviction can take them: Redis and all other stores

What holds is bounded: a lease by `max_lease_s`, the blocks by a share of the tier's room. A pin keeps what is there
when it begins or is renewed, from the first block on. A process that ends without a release holds nothing for longer
than its lease. Keys contain the salt, so nobody pins the blocks of another tenant.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from kvlab.stores.base import check_number

MAX_LEASE_S: Final = 3600.0
"""The longest lease, unless a cache says otherwise."""


@dataclass
class Kept:
    """Blocks that the tiers keep for a pin.

    Attributes:
        held: by tier ("host", "store"), blocks that eviction spares.
        refreshed: by tier, blocks whose TTL was refreshed, which eviction can take.
    """

    held: dict[str, int] = field(default_factory=dict)
    refreshed: dict[str, int] = field(default_factory=dict)

    def note(self, tier: str, blocks: int, is_held: bool) -> None:
        """Add what a tier keeps."""
        if blocks:
            (self.held if is_held else self.refreshed)[tier] = blocks


class Pin:
    """A lease on a prefix, from `pin` of a cache. A context manager that releases it on exit.

    Attributes:
        wanted: the full blocks of the prefix.
        held, refreshed: see `Kept`. Less than `wanted`: the others were not there, or there was no room to hold them.
        expires_at: when the lease ends, in seconds of `time.time`.
    """

    def __init__(
        self,
        wanted: int,
        lease_s: float,
        max_lease_s: float,
        begin: Callable[[float, str], Kept],
        end: Callable[[str], None],
    ) -> None:
        self.wanted = wanted
        self._max_lease_s, self._begin, self._end = max_lease_s, begin, end
        self._holder = uuid.uuid4().hex
        self.renew(lease_s)

    def __repr__(self) -> str:
        return f"Pin({self.wanted} blocks, held {self.held}, refreshed {self.refreshed})"

    def renew(self, lease_s: float) -> None:
        """Begin the lease anew, for the blocks that are there now. It may become shorter.

        Raises:
            ConfigError: `lease_s` is not a positive number, or exceeds `max_lease_s` of the cache.
        """
        check_number("lease_s", lease_s, 0, self._max_lease_s, "seconds")
        begin = time.time()  # the tiers count from later on
        kept = self._begin(lease_s, self._holder)
        self.held, self.refreshed, self.expires_at = kept.held, kept.refreshed, begin + lease_s

    def release(self) -> None:
        """End the lease. The blocks stay as long as policies and TTLs let them. May be called twice."""
        self._end(self._holder)
        self.held, self.refreshed, self.expires_at = {}, {}, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()
