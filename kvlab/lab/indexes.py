"""What a router knows of the nodes' caches: everything, what it sent there, or what events told it."""

from __future__ import annotations

import heapq
import itertools
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvlab.core.policies import LRU
from kvlab.engine.router import BlockIndex
from kvlab.lab.routers import Holders


class Index(ABC):
    """The blocks of each node, as a router knows them. Times are in seconds and never go back."""

    @abstractmethod
    def matched(self, now: float, keys: Sequence[int]) -> Counter[int]:
        """How many leading blocks each node has, as far as is known now."""

    def sent(  # noqa: B027 (an index need not listen)
        self, now: float, node: int, keys: Sequence[int], cache: Container[int], gone: Sequence[int]
    ) -> None:
        """A request was sent to a node.

        Args:
            keys: all its blocks.
            cache: what the node will have when it has computed them. Only an exact index looks at it.
            gone: blocks that may have left the cache.
        """

    def changed(  # noqa: B027
        self, now: float, node: int, added: Sequence[int], removed: Sequence[int]
    ) -> None:
        """A node has computed blocks, and evicted others. It says so now."""


class Exact(Index):
    """Knows what each node has, and what it will have when it has done what was sent to it."""

    def __init__(self) -> None:
        self._holders = Holders()

    def matched(self, now: float, keys: Sequence[int]) -> Counter[int]:
        """See `Index`."""
        return self._holders.matched(keys)

    def sent(self, now: float, node: int, keys: Sequence[int], cache: Container[int], gone: Sequence[int]) -> None:
        """See `Index`."""
        self._holders.note(node, cache, keys, gone)


class Sent(Index):
    """Remembers what was sent to each node, the last `room` blocks of it. Nodes tell it nothing."""

    def __init__(self, room: int = 1 << 20) -> None:
        self._room = room
        self._kept: dict[int, LRU[int]] = {}
        self._holders = Holders()

    def matched(self, now: float, keys: Sequence[int]) -> Counter[int]:
        """See `Index`."""
        return self._holders.matched(keys)

    def sent(self, now: float, node: int, keys: Sequence[int], cache: Container[int], gone: Sequence[int]) -> None:
        """See `Index`."""
        kept = self._kept.setdefault(node, LRU(self._room))
        forgotten: list[int] = []
        for key in keys:
            kept.access(key, 1, forgotten)
        self._holders.note(node, kept, keys, forgotten)


@dataclass(frozen=True)
class Faults:
    """What happens to events on their way.

    Attributes:
        lag_s: how long each takes.
        lost: the share of them that never comes.
        repeated, late_s: the share of them that comes again so much later.
    """

    lag_s: float = 0.0
    lost: float = 0.0
    repeated: float = 0.0
    late_s: float = 30.0


class Events(Index):
    """Is told by events, each with a number, of what nodes computed and evicted. The rules are those of `BlockIndex`.

    While events are missing it asks for a snapshot, which takes as long as two events.
    """

    def __init__(self, faults: Faults = Faults(), seed: int = 0) -> None:
        self._faults, self._rng = faults, random.Random(seed)
        self._now = 0.0
        self._arriving: list[tuple[float, int, Callable[[], Any]]] = []  # a heap
        self._order = itertools.count()
        self._seq: Counter[int] = Counter()
        self._has: dict[int, set[int]] = {}
        self._index: Any = BlockIndex(lambda: self._now)  # of any keys, though it says bytes

    def matched(self, now: float, keys: Sequence[int]) -> Counter[int]:
        """See `Index`."""
        while self._arriving and self._arriving[0][0] <= now:
            self._now, _, use = heapq.heappop(self._arriving)
            use()
        self._now = now
        return self._matched(keys)

    def sent(self, now: float, node: int, keys: Sequence[int], cache: Container[int], gone: Sequence[int]) -> None:
        """See `Index`."""
        self._expect(node, keys)

    def changed(self, now: float, node: int, added: Sequence[int], removed: Sequence[int]) -> None:
        """See `Index`."""
        self._seq[node] += 1
        has, seq = self._has.setdefault(node, set()), self._seq[node]
        has.update(added)
        has.difference_update(removed)
        for at in self._arrivals(now):
            self._later(at, lambda: self._apply(node, seq, added, removed))

    def _arrivals(self, now: float) -> list[float]:
        faults, at = self._faults, now + self._faults.lag_s
        times = [] if self._rng.random() < faults.lost else [at]
        return [*times, at + faults.late_s] if self._rng.random() < faults.repeated else times

    def _later(self, at: float, use: Callable[[], Any]) -> None:
        heapq.heappush(self._arriving, (at, next(self._order), use))

    def _matched(self, keys: Sequence[int]) -> Counter[int]:
        matched: Counter[int] = self._index.matched(keys)
        return matched

    def _expect(self, node: int, keys: Sequence[int]) -> None:
        self._index.expect(node, keys)

    def _apply(self, node: int, seq: int, added: Sequence[int], removed: Sequence[int]) -> None:
        if not self._index.apply(node, seq, added, removed):
            self._later(self._now + self._faults.lag_s, lambda: self._answer(node))

    def _answer(self, node: int) -> None:
        """A node that was asked sends all that it has."""
        seq, has = self._seq[node], [*self._has[node]]
        self._later(self._now + self._faults.lag_s, lambda: self._index.reset(node, seq, has))


class Naive(Events):
    """Is told by the same events, and uses each of them whenever it comes: a late repeat brings removed blocks back.

    Source of the mistake: Mooncake, pull request 4159.
    """

    def __init__(self, faults: Faults = Faults(), seed: int = 0) -> None:
        super().__init__(faults, seed)
        self._holders = Holders()

    def _matched(self, keys: Sequence[int]) -> Counter[int]:
        return self._holders.matched(keys)

    def _expect(self, node: int, keys: Sequence[int]) -> None:
        """Expect nothing."""

    def _apply(self, node: int, seq: int, added: Sequence[int], removed: Sequence[int]) -> None:
        for key in removed:
            self._holders.set(node, key, False)
        for key in added:
            self._holders.set(node, key, True)


INDEXES: Final[dict[str, Callable[[], Index]]] = {"exact": Exact, "sent": Sent, "events": Events, "naive": Naive}
"""By name, with their defaults: without faults."""
