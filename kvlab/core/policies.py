"""Who has to go when a cache is full: FIFO, LRU, LFU, S3-FIFO and ARC over keys and sizes.

A policy holds no values. It is told what is used (`hit`), taken in (`admit`), deleted
(`remove`) and in use right now (`pin`, `unpin`); it answers which keys have to go, and whoever
holds their values deletes those. A size counts in any unit, bytes or pages or 1 a block, as
long as the capacity counts in the same one. Bounded tiers, the page pool and the simulator
all ask here; nothing else in kvlab chooses a victim.

Every policy is one or two lines of keys (`Line`), each in the order in which they would go.
What makes them differ is a few words long:

- FIFO: by arrival. A hit changes nothing.
- LRU: by last use.
- LFU: by number of uses, then by last use.
- S3-FIFO: a short line on trial before a long one. Who is evicted while on trial and soon comes
  back goes straight into the long one.
- ARC: one line for keys seen once and one for keys seen again. What was evicted from which line
  and is asked for again says which of the two should be longer.

The last two remember keys that they evicted (`Ghosts`), without values and never more than
their capacity could hold.

Policies are not thread-safe: their holder has a lock already.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from typing import Any, Final, Generic, TypeVar

from kvlab.errors import ConfigError, InputError

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True, eq=False)
class Entry(Generic[K]):
    """One resident key. `line` is where it stands, by `rank`, None once it is gone."""

    key: K
    size: int
    line: Line[K] | None = None
    rank: Any = None
    uses: int = 0
    pins: int = 0


class Line(Generic[K]):
    """Entries in the order in which they go: lowest rank first, pinned ones not at all.

    A heap that is corrected late. Ranks only rise, so what lies in the heap is a lower bound:
    a use costs one assignment, and the entry is moved when it comes up. One that is pinned or
    gone is dropped when it comes up; `unpin` brings it back to the place that its rank gives it.

    Attributes:
        used: sum of the sizes of its entries, pinned ones too.
    """

    def __init__(self) -> None:
        self.used = 0
        self._length = 0
        self._heap: list[tuple[Any, Entry[K]]] = []

    def __len__(self) -> int:
        return self._length

    def put(self, entry: Entry[K], rank: Any) -> None:
        """Take `entry` in, out of the line it stands in; `rank` is above any that it had, and no other's."""
        entry.rank = rank
        if entry.line is self:
            return
        if entry.line is not None:
            entry.line.drop(entry)
        entry.line = self
        self.used += entry.size
        self._length += 1
        self.offer(entry)

    def drop(self, entry: Entry[K]) -> None:
        """Let go of `entry`, which stands here."""
        entry.line = None
        self.used -= entry.size
        self._length -= 1

    def offer(self, entry: Entry[K]) -> None:
        """Make `entry`, which stands here, one that `first` can find: it is new, or no longer pinned."""
        heappush(self._heap, (entry.rank, entry))
        if len(self._heap) > 2 * self._length + 64:  # mostly entries that are gone: start over
            alive = {e for _, e in self._heap if e.line is self and not e.pins}
            self._heap = [(e.rank, e) for e in alive]
            heapify(self._heap)

    def first(self) -> Entry[K] | None:
        """The entry that goes next; None if all are pinned."""
        heap = self._heap
        while heap:
            rank, entry = heap[0]
            if entry.line is not self or entry.pins:
                heappop(heap)
            elif entry.rank != rank:
                heapreplace(heap, (entry.rank, entry))
            else:
                return entry
        return None


class Ghosts(Generic[K]):
    """Keys that were evicted, with the sizes they had, oldest first.

    Attributes:
        used: sum of these sizes.
    """

    def __init__(self) -> None:
        self.used = 0
        self._sizes: OrderedDict[K, int] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, entry: Entry[K]) -> None:
        """Remember an evicted entry, as the newest."""
        self._sizes[entry.key] = entry.size
        self.used += entry.size

    def discard(self, key: K) -> None:
        """Forget `key`, if it is here."""
        self.used -= self._sizes.pop(key, 0)

    def shrink(self, limit: int) -> None:
        """Forget the oldest until `used` is at most `limit`, or none is left."""
        while self.used > limit and self._sizes:
            self.used -= self._sizes.popitem(last=False)[1]


class Policy(ABC, Generic[K]):
    """Which keys are resident, and which go when there is no room. O(log n) a call at worst, amortised.

    Args:
        capacity: how much fits, in the unit of the sizes. With 0 everything is refused.

    Attributes:
        used: sum of the sizes of the resident keys, at most `capacity`.
        pinned: the part of `used` that is pinned; the rest could be made free.

    Raises:
        ConfigError: the capacity is negative.

    A holder's loop, here with pages of size 1:

    >>> pages, policy = {}, LRU[str](capacity=2)
    >>> for key in "abac":
    ...     if key in policy:
    ...         policy.hit(key)
    ...     else:
    ...         for gone in policy.admit(key):
    ...             _ = pages.pop(gone, None)
    ...         if key in policy:  # not refused
    ...             pages[key] = f"the page of {key}"
    >>> sorted(pages)
    ['a', 'c']
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ConfigError(f"expected a capacity of 0 or above, got {capacity}")
        self.capacity = capacity
        self.used = 0
        self.pinned = 0
        self._entries: dict[K, Entry[K]] = {}
        self._clock = count()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} keys, {self.used} of {self.capacity} used, {self.pinned} pinned)"

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def hit(self, key: K) -> None:
        """Note one use of a resident key.

        Raises:
            InputError: `key` is not resident.
        """
        self._use(self._resident(key))

    def admit(self, key: K, size: int = 1) -> list[K]:
        """Take `key` in and return the keys that had to go for it, in the order in which they went.

        No returned key is resident any more. `[key]` means refused: it does not fit beside the
        pinned keys, so nothing was evicted in vain. For a resident key of this size the call is
        a `hit`. Another size is another content: the old one is removed, the new one starts over.

        Raises:
            InputError: `size` is below 1, or differs from the size of a pinned key.
        """
        if size < 1:
            raise InputError(f"expected a size of 1 or above, got {size} for {key!r}")
        if key in self._entries:
            if self._entries[key].size == size:
                self.hit(key)
                return []
            self.remove(key)
        if self.pinned + size > self.capacity:
            return [key]
        self._meet(key, size)
        gone = []
        while self.used + size > self.capacity:  # used > pinned then: someone can go
            gone.append(self._evict(key).key)
        self._entries[key] = entry = Entry(key, size)
        self.used += size
        self._enter(entry)
        return gone

    def remove(self, key: K) -> None:
        """Forget `key` at once, because its value is gone; no error if it is not resident.

        Raises:
            InputError: it is pinned. Who deletes what is in use has a bug.
        """
        entry = self._entries.get(key)
        if entry is None:
            return
        if entry.pins:
            raise InputError(
                f"expected an unpinned key to remove or resize, got {key!r} with {entry.pins} pins; unpin it first"
            )
        self._forget(entry)

    def pin(self, key: K) -> None:
        """Keep a resident key from being evicted, until each `pin` has had its `unpin`. Not a use.

        Raises:
            InputError: `key` is not resident.
        """
        entry = self._resident(key)
        self.pinned += 0 if entry.pins else entry.size
        entry.pins += 1

    def unpin(self, key: K) -> None:
        """Undo one `pin`. The last one puts the key back where it would stand had it never been pinned.

        Raises:
            InputError: `key` is not resident or not pinned.
        """
        entry = self._resident(key)
        if not entry.pins:
            raise InputError(f"expected a pinned key to unpin, got {key!r}; each unpin needs a pin before it")
        entry.pins -= 1
        if not entry.pins:
            self.pinned -= entry.size
            self._line(entry).offer(entry)

    # What a policy decides.
    @abstractmethod
    def _use(self, entry: Entry[K]) -> None:
        """A resident entry was used."""

    @abstractmethod
    def _enter(self, entry: Entry[K]) -> None:
        """Put a new entry into its line; there is room."""

    @abstractmethod
    def _evict(self, key: K) -> Entry[K]:
        """Choose one that is not pinned to make room for `key`, `_forget` it and return it. There is one."""

    def _meet(self, key: K, size: int) -> None:
        """`key` will be taken in, and nothing was evicted for it yet."""

    def _resident(self, key: K) -> Entry[K]:
        try:
            return self._entries[key]
        except KeyError:
            raise InputError(f"expected a resident key, got {key!r}; admit it first") from None

    def _forget(self, entry: Entry[K]) -> None:
        del self._entries[entry.key]
        self.used -= entry.size
        self._line(entry).drop(entry)

    @staticmethod
    def _line(entry: Entry[K]) -> Line[K]:
        assert entry.line is not None, "a resident entry stands in a line"
        return entry.line


class _OneLine(Policy[K]):
    """A policy that is an order: who ranks lowest goes."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._all: Line[K] = Line()

    def _use(self, entry: Entry[K]) -> None:
        self._all.put(entry, self._rank(entry))

    def _enter(self, entry: Entry[K]) -> None:
        self._all.put(entry, self._rank(entry))

    def _evict(self, key: K) -> Entry[K]:
        entry = self._all.first()
        assert entry is not None, "admit makes sure that someone can go"
        self._forget(entry)
        return entry

    @abstractmethod
    def _rank(self, entry: Entry[K]) -> Any:
        """Where it stands after this use; above where it stood."""


class FIFO(_OneLine[K]):
    """First in, first out. Uses do not count.

    >>> policy = FIFO[str](2)
    >>> policy.admit("a"), policy.admit("b"), policy.hit("a"), policy.admit("c")
    ([], [], None, ['a'])
    """

    def _use(self, entry: Entry[K]) -> None:
        pass

    def _rank(self, entry: Entry[K]) -> int:
        return next(self._clock)


class LRU(_OneLine[K]):
    """Least recently used goes first.

    >>> policy = LRU[str](2)
    >>> policy.admit("a"), policy.admit("b"), policy.hit("a"), policy.admit("c")
    ([], [], None, ['b'])
    """

    def _rank(self, entry: Entry[K]) -> int:
        return next(self._clock)


class LFU(_OneLine[K]):
    """Least often used goes first; among equals the least recently used. An evicted key's count is lost.

    >>> policy = LFU[str](2)
    >>> policy.admit("a"), policy.hit("a"), policy.admit("b"), policy.admit("c")
    ([], None, [], ['b'])
    """

    def _rank(self, entry: Entry[K]) -> tuple[int, int]:
        entry.uses += 1
        return entry.uses, next(self._clock)


class S3FIFO(Policy[K]):
    """Three FIFO queues: a small one on trial, the main one, and ghosts of those that failed.

    Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, Algorithm 1. A new
    key enters `small`, or `main` if its ghost is still there. A hit only counts, up to 3. To make
    room, while `small` has a tenth of the capacity or more, its oldest is looked at: hit twice or
    more, it moves to `main` and its count starts at 0 again; otherwise it is evicted and leaves a
    ghost. Else the oldest of `main` is looked at: with a count above 0 it goes round once more
    for one less; with 0 it is evicted. Ghosts have at most the size that `main` is meant to have.

    Whatever comes through once, such as a scan, passes through a tenth of the cache only.

    >>> policy = S3FIFO[str](10)
    >>> [policy.admit(key) for key in "abcdefghij"][-1], policy.hit("a"), policy.hit("a")
    ([], None, None)
    >>> policy.admit("k"), policy.admit("b"), policy.main.used  # a passed, b failed and was back soon
    (['b'], ['c'], 2)
    """

    _ENOUGH = 2  # hits on trial that pass it
    _MOST = 3  # what two bits can count

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.small: Line[K] = Line()
        self.main: Line[K] = Line()
        self.ghosts: Ghosts[K] = Ghosts()
        self._trial = max(1, capacity // 10)

    def _use(self, entry: Entry[K]) -> None:
        if entry.uses < self._MOST:
            entry.uses += 1

    def _enter(self, entry: Entry[K]) -> None:
        known = entry.key in self.ghosts
        self.ghosts.discard(entry.key)
        self.ghosts.shrink(self.capacity - self._trial)  # not earlier: its own eviction may not cost it its ghost
        (self.main if known else self.small).put(entry, next(self._clock))

    def _evict(self, key: K) -> Entry[K]:
        while True:
            on_trial, settled = self.small.first(), self.main.first()
            if on_trial and (self.small.used >= self._trial or not settled):
                if on_trial.uses < self._ENOUGH:
                    self._forget(on_trial)
                    self.ghosts.add(on_trial)
                    return on_trial
                on_trial.uses = 0
                self.main.put(on_trial, next(self._clock))
            else:
                assert settled is not None, "admit makes sure that someone can go"
                if not settled.uses:
                    self._forget(settled)
                    return settled
                settled.uses -= 1
                self.main.put(settled, next(self._clock))


class ARC(Policy[K]):
    """Adaptive replacement: recency against frequency, with a border that moves where it misses.

    Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003, Figure 4.
    `t1` has keys used once, `t2` keys used again, both by last use; `b1` and `b2` are ghosts of
    what was evicted from them. A miss that `b1` remembers says that `t1` is too short, so `p`, the
    size it should have, grows; one in `b2` lets it shrink; either key then enters `t2`. The oldest
    of `t1` goes if `t1` is above `p`, else the oldest of `t2`.

    Adapted to sizes: lengths are sums of sizes, a miss moves `p` by its own size times the paper's
    factor, one arrival may evict several, and ghosts are cut to the paper's bounds (t1 + b1 at
    most the capacity, all four at most twice) after the arrival. With all sizes 1 this is the
    paper's algorithm. A pinned key is passed over for the next of its line, then the other line.

    >>> policy = ARC[str](2)
    >>> policy.admit("a"), policy.hit("a"), policy.admit("b"), policy.admit("c")
    ([], None, [], ['b'])
    >>> policy.admit("b"), policy.p  # b is remembered: more room for what was seen once
    (['a'], 1.0)
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.p = 0.0
        self.t1: Line[K] = Line()
        self.t2: Line[K] = Line()
        self.b1: Ghosts[K] = Ghosts()
        self.b2: Ghosts[K] = Ghosts()

    def _use(self, entry: Entry[K]) -> None:
        self.t2.put(entry, next(self._clock))

    def _meet(self, key: K, size: int) -> None:
        if key in self.b1:
            self.p = min(self.capacity, self.p + size * max(1, self.b2.used / self.b1.used))
        elif key in self.b2:
            self.p = max(0.0, self.p - size * max(1, self.b1.used / self.b2.used))

    def _enter(self, entry: Entry[K]) -> None:
        known = entry.key in self.b1 or entry.key in self.b2
        self.b1.discard(entry.key)
        self.b2.discard(entry.key)
        (self.t2 if known else self.t1).put(entry, next(self._clock))
        self.b1.shrink(self.capacity - self.t1.used)
        self.b2.shrink(2 * self.capacity - self.used - self.b1.used)

    def _evict(self, key: K) -> Entry[K]:
        once, again = self.t1.first(), self.t2.first()
        above = self.t1.used > self.p or (self.t1.used == self.p and key in self.b2)
        if once and (above or not again):
            self._forget(once)
            self.b1.add(once)
            return once
        assert again is not None, "admit makes sure that someone can go"
        self._forget(again)
        self.b2.add(again)
        return again


POLICIES: Final[dict[str, type[Policy[Any]]]] = {"fifo": FIFO, "lru": LRU, "lfu": LFU, "s3fifo": S3FIFO, "arc": ARC}
"""All policies by the name that settings and tables use."""
