"""Which keys go when a cache is full: FIFO, LRU, LFU, S3-FIFO and ARC over keys and sizes.

A policy holds no values. Its holder says what is used (`access`, `hit`, `admit`), what was deleted
(`remove`) and what must stay for now (`pin`, `unpin`). The policy answers which keys were evicted,
and the holder deletes their values. A size counts in any unit, bytes or pages or 1 a block, as long
as the capacity counts in the same one. Bounded tiers, the page pool and the simulator all ask here;
nothing else in kvlab chooses a victim.

The policies differ in a few words:

- FIFO: the oldest arrival goes.
- LRU: the least recently used key goes.
- LFU: the least often used key goes; among equals, the least recently used one.
- S3-FIFO: new keys are on trial in a small queue before a main queue. A key that was evicted there
  and soon comes back enters the main queue at once.
- ARC: one queue for keys used once, one for keys used again. When an evicted key is asked for, the
  queue that it was evicted from was too short, and gets a larger share.

The last two remember some evicted keys as ghosts: the key and its size, without a value.

All keys stand in a `Queue`, an ordered dict of sizes, so a call takes about as long at any capacity.
A pinned key is taken out of its queue, and its last `unpin` makes it the newest there. Who unpins
several keys decides by the order which of them goes first.

`access` is written out in each policy, as few calls as possible: a simulator spends its time there.

Policies are not thread-safe: their holder has a lock already.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from operator import index
from typing import Any, Final, Generic, TypeVar

from kvlab.errors import ConfigError, InputError

K = TypeVar("K", bound=Hashable)


class Queue(Generic[K]):
    """Keys with their sizes, oldest first.

    Attributes:
        sizes: the keys that may be evicted from here, with their sizes.
        used: the sum of these sizes and of the sizes of pinned keys that will return here.
    """

    __slots__ = ("sizes", "used")

    def __init__(self) -> None:
        self.sizes: OrderedDict[K, int] = OrderedDict()
        self.used = 0

    def __contains__(self, key: object) -> bool:
        return key in self.sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def put(self, key: K, size: int) -> None:
        """Add a key that is not here, as the newest."""
        self.sizes[key] = size
        self.used += size

    def drop(self, key: K) -> None:
        """Take out `key`, if it is here."""
        self.used -= self.sizes.pop(key, 0)


@dataclass(slots=True)
class Pinned(Generic[K]):
    """What is known of a pinned key: its size, the queue it will return to, and its number of pins."""

    size: int
    queue: Queue[K]
    pins: int = 0


class Policy(ABC, Generic[K]):
    """Which keys are resident, and which go when there is no room.

    Args:
        capacity: how much fits, in the unit of the sizes. With 0 everything is refused.

    Attributes:
        pinned: the part of `used` that is pinned; the remaining part could be made free.

    Raises:
        ConfigError: the capacity is negative, or not a whole number.

    A simulator's loop, which counts hits:

    >>> policy = LRU[str](capacity=2)
    >>> sum(policy.access(key) for key in "abacab")
    2

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

    _queues: Collection[Queue[K]]
    """The queues that resident keys stand in."""

    def __init__(self, capacity: int) -> None:
        try:
            self.capacity = index(capacity)
        except TypeError:
            raise ConfigError(f"expected a whole number as the capacity, got {capacity!r}; round it down") from None
        if self.capacity < 0:
            raise ConfigError(f"expected a capacity of 0 or above, got {capacity}")
        self.pinned = 0
        self._pins: dict[K, Pinned[K]] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} keys, {self.used} of {self.capacity} used, {self.pinned} pinned)"

    def __contains__(self, key: object) -> bool:
        for queue in self._queues:
            if key in queue.sizes:
                return True
        return key in self._pins

    def __len__(self) -> int:
        return sum(map(len, self._queues)) + len(self._pins)

    @property
    def used(self) -> int:
        """Sum of the sizes of the resident keys, at most `capacity`."""
        return sum(queue.used for queue in self._queues)

    @abstractmethod
    def access(self, key: K, size: int = 1, gone: list[K] | None = None) -> bool:
        """Use `key`, and take it in if it is not resident. A hit evicts nothing.

        A resident key with another size counts as another content: the old one is removed, and
        the new one is a miss.

        Args:
            key: what is asked for.
            size: how much of the capacity it takes.
            gone: a list of the caller's. Keys that had to go for `key` are appended, in the order
                in which they went. `key` itself is appended if it is refused, because it does not
                fit beside the pinned keys; nothing is evicted then.

        Returns:
            Whether it was a hit.

        Raises:
            InputError: `size` is below 1, or differs from the size of a pinned key.
        """

    def admit(self, key: K, size: int = 1) -> list[K]:
        """Do as `access` does, and return the keys that had to go; `[key]` means refused."""
        gone: list[K] = []
        self.access(key, size, gone)
        return gone

    def hit(self, key: K) -> None:
        """Use a resident key.

        Raises:
            InputError: `key` is not resident.
        """
        pinned = self._pins.get(key)
        self.access(key, pinned.size if pinned else self._queue_of(key).sizes[key])

    def remove(self, key: K) -> None:
        """Forget `key` at once, because its value is gone; no error if it is not resident.

        Raises:
            InputError: it is pinned. Who deletes what is in use has a bug.
        """
        if key in self._pins:
            raise self._in_use(key)
        if key in self:
            self._forget(key, self._queue_of(key))

    def pin(self, key: K) -> None:
        """Keep a resident key from being evicted, until each `pin` has had its `unpin`. Not a use.

        Raises:
            InputError: `key` is not resident.
        """
        pinned = self._pins.get(key)
        if pinned is None:
            queue = self._queue_of(key)
            pinned = self._pins[key] = Pinned(queue.sizes.pop(key), queue)
            self.pinned += pinned.size
        pinned.pins += 1

    def unpin(self, key: K) -> None:
        """Undo one `pin`. The last one makes the key the newest of its queue. Not a use.

        Raises:
            InputError: `key` is not resident or not pinned.
        """
        pinned = self._pins.get(key)
        if pinned is None:
            self._queue_of(key)
            raise InputError(f"expected a pinned key to unpin, got {key!r}; each unpin needs a pin before it")
        pinned.pins -= 1
        if not pinned.pins:
            del self._pins[key]
            self.pinned -= pinned.size
            pinned.queue.sizes[key] = pinned.size

    # What the policies share.
    def _special(self, key: K, size: int, gone: list[K] | None) -> bool | None:
        """Access a key that stands in no queue, where that is a hit on a pinned key or a refusal.

        Returns:
            The answer of `access`, or None if the key is to be taken in.
        """
        self._check_size(key, size)
        pinned = self._pins.get(key)
        if pinned is not None:
            if pinned.size != size:
                raise self._in_use(key)
            self._use_pinned(key, pinned)
            return True
        if self.pinned + size > self.capacity:
            if gone is not None:
                gone.append(key)
            return False
        return None

    def _start_over(self, key: K, size: int) -> None:
        """Remove `key`, which stands in a queue with another size than this."""
        self._check_size(key, size)
        self.remove(key)

    def _use_pinned(self, key: K, pinned: Pinned[K]) -> None:
        """Note a use of a pinned key, where it has an effect after the key's last `unpin`."""

    def _forget(self, key: K, queue: Queue[K]) -> None:
        """Drop all that is known of `key`, which stands in `queue`."""
        queue.drop(key)

    def _queue_of(self, key: K) -> Queue[K]:
        """Return the queue that a key stands in, or raise InputError if it is not resident; not for a pinned key."""
        for queue in self._queues:
            if key in queue.sizes:
                return queue
        raise InputError(f"expected a resident key, got {key!r}; admit it first")

    def _in_use(self, key: K) -> InputError:
        pins = self._pins[key].pins
        return InputError(f"expected an unpinned key to remove or resize, got {key!r} with {pins} pins; unpin it first")

    @staticmethod
    def _check_size(key: K, size: int) -> None:
        if not size >= 1:  # NaN too
            raise InputError(f"expected a size of 1 or above, got {size} for {key!r}")


class FIFO(Policy[K]):
    """First in, first out. Uses do not count.

    >>> policy = FIFO[str](2)
    >>> policy.admit("a"), policy.admit("b"), policy.hit("a"), policy.admit("c")
    ([], [], None, ['a'])
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._queue: Queue[K] = Queue()
        self._queues = (self._queue,)
        self._moves_on_use = False

    def access(self, key: K, size: int = 1, gone: list[K] | None = None) -> bool:
        """See `Policy.access`."""
        queue = self._queue
        sizes = queue.sizes
        if key in sizes:
            if sizes[key] == size:
                if self._moves_on_use:
                    sizes.move_to_end(key)
                return True
            self._start_over(key, size)
        if (self._pins or not 0 < size <= self.capacity) and (answer := self._special(key, size, gone)) is not None:
            return answer
        sizes[key] = size
        used = queue.used + size
        while used > self.capacity:
            victim, freed = sizes.popitem(False)
            used -= freed
            if gone is not None:
                gone.append(victim)
        queue.used = used
        return False


class LRU(FIFO[K]):
    """Least recently used goes first: a FIFO queue in which a use counts as an arrival.

    >>> policy = LRU[str](2)
    >>> policy.admit("a"), policy.admit("b"), policy.hit("a"), policy.admit("c")
    ([], [], None, ['b'])
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._moves_on_use = True


class LFU(Policy[K]):
    """Least often used goes first; among equals the least recently used. An evicted key's count is lost.

    One queue for each number of uses: a use moves a key to the end of the next queue, and victims
    come from the lowest queue (Shah, Mitra and Matani, "An O(1) algorithm for implementing the LFU
    cache eviction scheme", 2010).

    >>> policy = LFU[str](2)
    >>> policy.admit("a"), policy.hit("a"), policy.admit("b"), policy.admit("c")
    ([], None, [], ['b'])
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._used = 0
        self._uses: dict[K, int] = {}  # of all resident keys
        self._by_uses: dict[int, Queue[K]] = {}  # a queue to which no key belongs, not even a pinned one, is deleted
        self._counts: list[int] = []  # the keys of `_by_uses`, ascending
        self._queues = self._by_uses.values()

    def __contains__(self, key: object) -> bool:
        return key in self._uses

    @property
    def used(self) -> int:
        """Sum of the sizes of the resident keys, at most `capacity`."""
        return self._used

    def access(self, key: K, size: int = 1, gone: list[K] | None = None) -> bool:
        """See `Policy.access`."""
        uses = self._uses.get(key, 0)
        if uses and key in (queue := self._by_uses[uses]).sizes:
            if queue.sizes[key] == size:
                queue.drop(key)
                if not queue.used:
                    self._delete(uses)
                self._uses[key] = uses + 1
                self._with_uses(uses + 1).put(key, size)
                return True
            self._start_over(key, size)
        if (self._pins or not 0 < size <= self.capacity) and (answer := self._special(key, size, gone)) is not None:
            return answer
        if self._used + size > self.capacity:
            self._make_room(size, gone)
        self._used += size
        self._uses[key] = 1
        self._with_uses(1).put(key, size)
        return False

    def _make_room(self, size: int, gone: list[K] | None) -> None:
        """Evict until `size` fits."""
        while self._used + size > self.capacity:
            step = 0
            while not (queue := self._by_uses[self._counts[step]]).sizes:  # all its keys are pinned
                step += 1
            victim, freed = queue.sizes.popitem(False)
            queue.used -= freed
            self._used -= freed
            if not queue.used:
                self._delete(self._uses[victim])
            del self._uses[victim]
            if gone is not None:
                gone.append(victim)

    def _forget(self, key: K, queue: Queue[K]) -> None:
        self._used -= queue.sizes[key]
        queue.drop(key)
        if not queue.used:
            self._delete(self._uses[key])
        del self._uses[key]

    def _use_pinned(self, key: K, pinned: Pinned[K]) -> None:
        uses = self._uses[key]
        pinned.queue.used -= pinned.size
        if not pinned.queue.used:
            self._delete(uses)
        self._uses[key] = uses + 1
        pinned.queue = self._with_uses(uses + 1)
        pinned.queue.used += pinned.size

    def _queue_of(self, key: K) -> Queue[K]:
        uses = self._uses.get(key)
        return self._by_uses[uses] if uses else super()._queue_of(key)

    def _with_uses(self, uses: int) -> Queue[K]:
        """Return the queue for so many uses."""
        queue = self._by_uses.get(uses)
        if queue is None:
            queue = self._by_uses[uses] = Queue()
            insort(self._counts, uses)
        return queue

    def _delete(self, uses: int) -> None:
        """Delete the queue for so many uses: no key belongs to it any more."""
        del self._by_uses[uses]
        del self._counts[bisect_left(self._counts, uses)]


class S3FIFO(Policy[K]):
    """Three FIFO queues: a small one on trial, the main one, and ghosts of those that failed.

    Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, Algorithm 1. A new
    key enters `small`, or `main` if its ghost is still there. A hit only counts, up to 3. To make
    room, while `small` has a tenth of the capacity or more, its oldest key is looked at: hit twice
    or more, it moves to `main` and its count starts at 0 again; otherwise it is evicted and leaves
    a ghost. Else the oldest key of `main` is looked at: with a count above 0 it goes round once
    more for one less; with 0 it is evicted. Ghosts have at most the size that `main` is meant to
    have.

    Whatever is used once, such as a scan, passes through a tenth of the cache only.

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
        self.small: Queue[K] = Queue()
        self.main: Queue[K] = Queue()
        self.ghosts: Queue[K] = Queue()
        self._queues = (self.small, self.main)
        self._trial = max(1, self.capacity // 10)
        self._most_ghosts = self.capacity - self._trial
        self._hits: dict[K, int] = {}  # of resident keys, where they are above 0

    def access(self, key: K, size: int = 1, gone: list[K] | None = None) -> bool:
        """See `Policy.access`."""
        small, main, ghosts = self.small, self.main, self.ghosts
        queue = small if key in small.sizes else main
        if key in queue.sizes:
            if queue.sizes[key] == size:
                hits = self._hits.get(key, 0)
                if hits < self._MOST:
                    self._hits[key] = hits + 1
                return True
            self._start_over(key, size)
        if (self._pins or not 0 < size <= self.capacity) and (answer := self._special(key, size, gone)) is not None:
            return answer
        room = self.capacity - small.used - main.used - size
        if room < 0:
            self._make_room(room, gone)
        if key in ghosts.sizes:
            ghosts.drop(key)
            main.put(key, size)
        else:
            small.sizes[key] = size
            small.used += size
        while ghosts.used > self._most_ghosts:  # not earlier: its own eviction may not cost it its ghost
            ghosts.used -= ghosts.sizes.popitem(False)[1]
        return False

    def _make_room(self, room: int, gone: list[K] | None) -> None:
        """Evict until `room`, which is negative, is 0 or more."""
        small, main, ghosts, hits = self.small, self.main, self.ghosts, self._hits
        while room < 0:
            if small.sizes and (small.used >= self._trial or not main.sizes):
                key, size = small.sizes.popitem(False)
                small.used -= size
                if key in hits and hits.pop(key) >= self._ENOUGH:
                    main.put(key, size)
                    continue
                ghosts.sizes[key] = size
                ghosts.used += size
            else:
                key, size = main.sizes.popitem(False)
                if key in hits:  # round once more, for one hit
                    main.sizes[key] = size
                    hits[key] -= 1
                    if not hits[key]:
                        del hits[key]
                    continue
                main.used -= size
            room += size
            if gone is not None:
                gone.append(key)

    def _use_pinned(self, key: K, pinned: Pinned[K]) -> None:
        self._hits[key] = min(self._hits.get(key, 0) + 1, self._MOST)

    def _forget(self, key: K, queue: Queue[K]) -> None:
        super()._forget(key, queue)
        self._hits.pop(key, None)


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
    paper's algorithm. Where all keys of a queue are pinned, the other queue gives.

    >>> policy = ARC[str](2)
    >>> policy.admit("a"), policy.hit("a"), policy.admit("b"), policy.admit("c")
    ([], None, [], ['b'])
    >>> policy.admit("b"), policy.p  # b is remembered: more room for what was seen once
    (['a'], 1.0)
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.p = 0.0
        self.t1: Queue[K] = Queue()
        self.t2: Queue[K] = Queue()
        self.b1: Queue[K] = Queue()
        self.b2: Queue[K] = Queue()
        self._queues = (self.t1, self.t2)

    def access(self, key: K, size: int = 1, gone: list[K] | None = None) -> bool:
        """See `Policy.access`."""
        t1, t2, capacity = self.t1, self.t2, self.capacity
        queue = t2 if key in t2.sizes else t1
        if key in queue.sizes:
            if queue.sizes[key] == size:
                if queue is t1:
                    t1.drop(key)
                    t2.put(key, size)
                else:
                    t2.sizes.move_to_end(key)
                return True
            self._start_over(key, size)
        if (self._pins or not 0 < size <= capacity) and (answer := self._special(key, size, gone)) is not None:
            return answer
        b1, b2 = self.b1, self.b2
        queue, in_b2 = t1, False
        if key in b1.sizes or key in b2.sizes:
            queue, in_b2 = t2, self._recall(key, size)
        room = capacity - t1.used - t2.used - size
        while room < 0:
            if t1.sizes and (t1.used > self.p or (in_b2 and t1.used == self.p) or not t2.sizes):
                victim, freed = t1.sizes.popitem(False)
                t1.used -= freed
                b1.sizes[victim] = freed
                b1.used += freed
            else:
                victim, freed = t2.sizes.popitem(False)
                t2.used -= freed
                b2.sizes[victim] = freed
                b2.used += freed
            room += freed
            if gone is not None:
                gone.append(victim)
        queue.sizes[key] = size
        queue.used += size
        most = capacity - t1.used
        while b1.used > most:
            b1.used -= b1.sizes.popitem(False)[1]
        most = capacity + room - b1.used
        while b2.used > most:
            b2.used -= b2.sizes.popitem(False)[1]
        return False

    def _recall(self, key: K, size: int) -> bool:
        """Move the border because a ghost remembers `key`, and let the ghost go. Return whether it was in `b2`."""
        b1, b2 = self.b1, self.b2
        if key in b1.sizes:
            self.p = min(self.capacity, self.p + size * max(1, b2.used / b1.used))
            b1.drop(key)
            return False
        self.p = max(0.0, self.p - size * max(1, b1.used / b2.used))
        b2.drop(key)
        return True

    def _use_pinned(self, key: K, pinned: Pinned[K]) -> None:
        pinned.queue.used -= pinned.size
        pinned.queue = self.t2
        self.t2.used += pinned.size


POLICIES: Final[dict[str, type[Policy[Any]]]] = {"fifo": FIFO, "lru": LRU, "lfu": LFU, "s3fifo": S3FIFO, "arc": ARC}
"""All policies by the name that settings and tables use."""
