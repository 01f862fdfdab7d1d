"""Eviction policies over keys and sizes: FIFO, LRU, LFU, S3-FIFO and ARC.

A policy holds no values. Its owner reports uses (`access`, `hit`, `admit`), deletions (`remove`)
and keys that must not be evicted (`pin`, `unpin`). The policy returns the evicted keys, and the
owner deletes their values. Sizes and the capacity have the same unit, for example bytes or blocks.

- FIFO evicts the oldest key.
- LRU evicts the least recently used key.
- LFU evicts the least frequently used key. Of several such keys it evicts the least recently used.
- S3-FIFO adds new keys to a small queue before a main queue. A key that was evicted from the small
  queue and is soon requested again enters the main queue directly.
- ARC has a queue for keys used once and a queue for keys used again. A request for a key that was
  evicted recently increases the share of the queue that the key was evicted from.

S3-FIFO and ARC store ghosts: evicted keys and their sizes, without values.

A `Queue` is an ordered dict of sizes, so the time per call hardly depends on the capacity. A pinned
key leaves its queue, and its last `unpin` makes it the newest key there. Keys of one queue are
therefore evicted in the order of their last `unpin`.

Each policy implements `access` with few function calls, because simulators spend most of their
time in it. Policies are not thread-safe: the owner must hold a lock.
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
        sizes: the keys that may be evicted, with their sizes.
        used: the sum of `sizes`, plus the sizes of the pinned keys that belong to this queue.
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
        """Add a new key as the newest."""
        self.sizes[key] = size
        self.used += size

    def drop(self, key: K) -> None:
        """Remove `key` if it is in the queue."""
        self.used -= self.sizes.pop(key, 0)


@dataclass(slots=True)
class Pinned(Generic[K]):
    """The size of a pinned key, the queue that the key belongs to, and its number of pins."""

    size: int
    queue: Queue[K]
    pins: int = 0


class _Room:
    """A key that `Policy.evict` admits for a moment."""


class Policy(ABC, Generic[K]):
    """The set of resident keys, and the choice of keys to evict when there is no room.

    Args:
        capacity: the largest sum of the sizes. With 0 every key is refused.

    Attributes:
        pinned: the sum of the sizes of the pinned keys. They are part of `used`.

    Raises:
        ConfigError: the capacity is negative or not a whole number.

    A simulator counts hits:

    >>> policy = LRU[str](capacity=2)
    >>> sum(policy.access(key) for key in "abacab")
    2

    The owner of pages deletes evicted pages. Each page has the size 1:

    >>> pages, policy = {}, LRU[str](capacity=2)
    >>> for key in "abac":
    ...     if key in policy:
    ...         policy.hit(key)
    ...     else:
    ...         for evicted in policy.admit(key):
    ...             _ = pages.pop(evicted, None)
    ...         if key in policy:  # not refused
    ...             pages[key] = f"the page of {key}"
    >>> sorted(pages)
    ['a', 'c']
    """

    _queues: Collection[Queue[K]]  # of resident keys

    def __init__(self, capacity: int) -> None:
        try:
            self.capacity = index(capacity)
        except TypeError:
            raise ConfigError(f"expected a whole number as the capacity, got {capacity!r}; round it down") from None
        if self.capacity < 0:
            raise ConfigError(f"expected a capacity of 0 or more, got {capacity}")
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
    def access(self, key: K, size: int = 1, evicted: list[K] | None = None) -> bool:
        """Use `key`, and add it if it is not resident. Return whether this was a hit.

        A hit evicts nothing. Another size means another value: a resident key with another size is
        removed first, and the access is a miss.

        Args:
            evicted: a list to which the evicted keys are appended, in the order of eviction. If
                `key` does not fit beside the pinned keys, it is refused: no key is evicted, and
                `key` itself is appended.

        Raises:
            InputError: `size` is below 1, or `key` is pinned with another size.
        """

    def admit(self, key: K, size: int = 1) -> list[K]:
        """Do the same as `access`, and return the evicted keys. `[key]` means that `key` was refused."""
        evicted: list[K] = []
        self.access(key, size, evicted)
        return evicted

    def evict(self) -> K | None:
        """Evict one key, as if there were no room for another, and return it; None if there is none to evict."""
        room: Any = _Room()
        evicted = self.admit(room, self.capacity - self.used + 1) if self.used else [room]
        if evicted == [room]:
            return None
        self.remove(room)
        return evicted[0]

    def hit(self, key: K) -> None:
        """Use a resident key.

        Raises:
            InputError: `key` is not resident.
        """
        pinned = self._pins.get(key)
        self.access(key, pinned.size if pinned else self._queue_of(key).sizes[key])

    def remove(self, key: K) -> None:
        """Remove `key`, because its value was deleted. A key that is not resident is ignored.

        Raises:
            InputError: `key` is pinned.
        """
        if key in self._pins:
            raise self._in_use(key)
        if key in self:
            self._forget(key, self._queue_of(key))

    def pin(self, key: K) -> None:
        """Protect a resident key from eviction until every `pin` has its `unpin`. A pin is not a use.

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
        """Undo one `pin`. The last `unpin` makes the key the newest of its queue. An unpin is not a use.

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

    # Helpers of all policies.
    def _hit_pinned_or_refuse(self, key: K, size: int, evicted: list[K] | None) -> bool | None:
        """Return the result of `access` for a pinned or refused key, and None for a key to add."""
        self._check_size(key, size)
        pinned = self._pins.get(key)
        if pinned is not None:
            if pinned.size != size:
                raise self._in_use(key)
            self._use_pinned(key, pinned)
            return True
        if self.pinned + size > self.capacity:
            if evicted is not None:
                evicted.append(key)
            return False
        return None

    def _remove_resized(self, key: K, size: int) -> None:
        """Remove `key` from its queue, where its size differs from `size`."""
        self._check_size(key, size)
        self.remove(key)

    def _use_pinned(self, key: K, pinned: Pinned[K]) -> None:
        """Record a use of a pinned key if it affects the key after its last `unpin`."""

    def _forget(self, key: K, queue: Queue[K]) -> None:
        """Remove `key` from `queue`, and delete its counters."""
        queue.drop(key)

    def _queue_of(self, key: K) -> Queue[K]:
        """Return the queue of an unpinned key. Raise InputError if the key is not resident."""
        for queue in self._queues:
            if key in queue.sizes:
                return queue
        raise InputError(f"expected a resident key, got {key!r}; admit it first")

    def _in_use(self, key: K) -> InputError:
        pins = self._pins[key].pins
        return InputError(f"expected an unpinned key to remove or resize, got {key!r} with {pins} pins; unpin it first")

    @staticmethod
    def _check_size(key: K, size: int) -> None:
        if not size >= 1:  # also rejects NaN
            raise InputError(f"expected a size of 1 or above, got {size} for {key!r}")


class FIFO(Policy[K]):
    """First in, first out: evicts the oldest key.

    >>> policy = FIFO[str](2)
    >>> policy.admit("a"), policy.admit("b"), policy.hit("a"), policy.admit("c")
    ([], [], None, ['a'])
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._queue: Queue[K] = Queue()
        self._queues = (self._queue,)
        self._moves_on_use = False

    def access(self, key: K, size: int = 1, evicted: list[K] | None = None) -> bool:
        """See `Policy.access`."""
        queue = self._queue
        sizes = queue.sizes
        if key in sizes:
            if sizes[key] == size:
                if self._moves_on_use:
                    sizes.move_to_end(key)
                return True
            self._remove_resized(key, size)
        if self._pins or not 0 < size <= self.capacity:
            answer = self._hit_pinned_or_refuse(key, size, evicted)
            if answer is not None:
                return answer
        sizes[key] = size
        used = queue.used + size
        while used > self.capacity:
            victim, freed = sizes.popitem(False)
            used -= freed
            if evicted is not None:
                evicted.append(victim)
        queue.used = used
        return False


class LRU(FIFO[K]):
    """Least recently used: a FIFO queue in which a use makes a key the newest.

    >>> policy = LRU[str](2)
    >>> policy.admit("a"), policy.admit("b"), policy.hit("a"), policy.admit("c")
    ([], [], None, ['b'])
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._moves_on_use = True


class LFU(Policy[K]):
    """Least frequently used: evicts the key with the fewest uses.

    Each number of uses has its queue. A use moves a key to the end of the next queue, and the oldest
    key of the lowest queue is evicted. Evicted keys lose their number of uses. Source: Shah, Mitra and
    Matani, 2010, "An O(1) algorithm for implementing the LFU cache eviction scheme".

    >>> policy = LFU[str](2)
    >>> policy.admit("a"), policy.hit("a"), policy.admit("b"), policy.admit("c")
    ([], None, [], ['b'])
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._used = 0
        self._uses: dict[K, int] = {}  # by resident key
        self._by_uses: dict[int, Queue[K]] = {}  # a queue is deleted with its last key
        self._counts: list[int] = []  # the keys of `_by_uses`, ascending
        self._queues = self._by_uses.values()

    def __contains__(self, key: object) -> bool:
        return key in self._uses

    @property
    def used(self) -> int:
        """Sum of the sizes of the resident keys, at most `capacity`."""
        return self._used

    def access(self, key: K, size: int = 1, evicted: list[K] | None = None) -> bool:
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
            self._remove_resized(key, size)
        if self._pins or not 0 < size <= self.capacity:
            answer = self._hit_pinned_or_refuse(key, size, evicted)
            if answer is not None:
                return answer
        if self._used + size > self.capacity:
            self._make_room(size, evicted)
        self._used += size
        self._uses[key] = 1
        self._with_uses(1).put(key, size)
        return False

    def _make_room(self, size: int, evicted: list[K] | None) -> None:
        """Evict keys until `size` fits."""
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
            if evicted is not None:
                evicted.append(victim)

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
        """Return the queue of this number of uses."""
        queue = self._by_uses.get(uses)
        if queue is None:
            queue = self._by_uses[uses] = Queue()
            insort(self._counts, uses)
        return queue

    def _delete(self, uses: int) -> None:
        """Delete the queue of this number of uses, which no key belongs to."""
        del self._by_uses[uses]
        del self._counts[bisect_left(self._counts, uses)]


class S3FIFO(Policy[K]):
    """Three FIFO queues: a small queue for new keys, a main queue, and ghosts of the small queue.

    A new key enters `small`, or `main` if it has a ghost. A hit increases a counter, up to 3. To
    make room, S3-FIFO takes the oldest key of `small` if `small` uses a tenth of the capacity or
    more, and otherwise the oldest key of `main`. A key of `small` with 2 hits or more moves to
    `main`, and its counter is reset; with fewer hits it is evicted and becomes a ghost. A key of
    `main` with hits becomes the newest of `main`, and its counter decreases by 1; without hits it
    is evicted. The sum of ghost sizes is at most the capacity minus this tenth.

    Keys that are used only once, in a scan for example, evict few keys from `main`.

    Source: Yang et al., 2023, "FIFO queues are all you need for cache eviction", Algorithm 1.

    >>> policy = S3FIFO[str](10)
    >>> [policy.admit(key) for key in "abcdefghij"][-1], policy.hit("a"), policy.hit("a")
    ([], None, None)
    >>> policy.admit("k"), policy.admit("b"), policy.main.used  # a moved to main, and b had a ghost
    (['b'], ['c'], 2)
    """

    _HITS_TO_PROMOTE = 2  # from `small` to `main`
    _MAX_HITS = 3  # a counter has two bits

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.small: Queue[K] = Queue()
        self.main: Queue[K] = Queue()
        self.ghosts: Queue[K] = Queue()
        self._queues = (self.small, self.main)
        self._small_capacity = max(1, self.capacity // 10)
        self._ghost_capacity = self.capacity - self._small_capacity
        self._hits: dict[K, int] = {}  # by resident key, without zeros

    def access(self, key: K, size: int = 1, evicted: list[K] | None = None) -> bool:
        """See `Policy.access`."""
        small, main, ghosts = self.small, self.main, self.ghosts
        queue = small if key in small.sizes else main
        if key in queue.sizes:
            if queue.sizes[key] == size:
                hits = self._hits.get(key, 0)
                if hits < self._MAX_HITS:
                    self._hits[key] = hits + 1
                return True
            self._remove_resized(key, size)
        if self._pins or not 0 < size <= self.capacity:
            answer = self._hit_pinned_or_refuse(key, size, evicted)
            if answer is not None:
                return answer
        room = self.capacity - small.used - main.used - size
        if room < 0:
            self._make_room(room, evicted)
        if key in ghosts.sizes:
            ghosts.drop(key)
            main.put(key, size)
        else:
            small.sizes[key] = size
            small.used += size
        while ghosts.used > self._ghost_capacity:  # after the look-up: evictions may delete this key's ghost
            ghosts.used -= ghosts.sizes.popitem(False)[1]
        return False

    def _make_room(self, room: int, evicted: list[K] | None) -> None:
        """Evict keys until `room`, which is negative, is 0 or more."""
        small, main, ghosts, hits = self.small, self.main, self.ghosts, self._hits
        while room < 0:
            if small.sizes and (small.used >= self._small_capacity or not main.sizes):
                key, size = small.sizes.popitem(False)
                small.used -= size
                if key in hits and hits.pop(key) >= self._HITS_TO_PROMOTE:
                    main.put(key, size)
                    continue
                ghosts.sizes[key] = size
                ghosts.used += size
            else:
                key, size = main.sizes.popitem(False)
                if key in hits:  # becomes the newest again, for one hit
                    main.sizes[key] = size
                    hits[key] -= 1
                    if not hits[key]:
                        del hits[key]
                    continue
                main.used -= size
            room += size
            if evicted is not None:
                evicted.append(key)

    def _use_pinned(self, key: K, pinned: Pinned[K]) -> None:
        self._hits[key] = min(self._hits.get(key, 0) + 1, self._MAX_HITS)

    def _forget(self, key: K, queue: Queue[K]) -> None:
        super()._forget(key, queue)
        self._hits.pop(key, None)


class ARC(Policy[K]):
    """Adaptive replacement cache: two LRU queues with shares that adapt to recency or frequency.

    `t1` holds keys used once, and `t2` holds keys used again. `b1` and `b2` hold the ghosts of the
    keys evicted from `t1` and `t2`. `p` is the target size of `t1`. A miss whose ghost is in `b1`
    increases `p`, and one whose ghost is in `b2` decreases it; the key then enters `t2`. The oldest
    key of `t1` is evicted if `t1` exceeds `p`, otherwise the oldest key of `t2`. If all keys of one
    queue are pinned, the other queue's oldest key is evicted.

    The original algorithm has only keys of size 1, for which this one is identical. Here a length
    is a sum of sizes, and a miss changes `p` by its size times the ratio of the ghost lengths, or
    by its size if that is more. One insertion may evict several keys. After it, ghosts are deleted
    until t1 + b1 is at most the capacity, and all four queues are at most twice the capacity.

    Source: Megiddo and Modha, 2003, "ARC: a self-tuning, low overhead replacement cache", Figure 4.

    >>> policy = ARC[str](2)
    >>> policy.admit("a"), policy.hit("a"), policy.admit("b"), policy.admit("c")
    ([], None, [], ['b'])
    >>> policy.admit("b"), policy.p  # the ghost of b is in b1, so p grows
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

    def access(self, key: K, size: int = 1, evicted: list[K] | None = None) -> bool:
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
            self._remove_resized(key, size)
        if self._pins or not 0 < size <= capacity:
            answer = self._hit_pinned_or_refuse(key, size, evicted)
            if answer is not None:
                return answer
        b1, b2 = self.b1, self.b2
        queue, in_b2 = t1, False
        if key in b1.sizes or key in b2.sizes:
            queue, in_b2 = t2, self._adapt(key, size)
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
            if evicted is not None:
                evicted.append(victim)
        queue.sizes[key] = size
        queue.used += size
        most = capacity - t1.used
        while b1.used > most:
            b1.used -= b1.sizes.popitem(False)[1]
        most = capacity + room - b1.used
        while b2.used > most:
            b2.used -= b2.sizes.popitem(False)[1]
        return False

    def _adapt(self, key: K, size: int) -> bool:
        """Change `p` for a key with a ghost, and delete the ghost. Return whether it was in `b2`."""
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
"""All policies by name."""
