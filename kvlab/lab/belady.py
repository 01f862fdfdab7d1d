"""Belady's MIN: evict what is used again last. It knows the future, so it is a bound for policies, not one of them."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

from kvlab.lab.traces import Request


class Belady:
    """A cache of blocks that is told all requests before the first one.

    A block that is not used again is not kept, and one that would be evicted next does not enter. All blocks of a
    request are used at the same time, so ties are common: then the deepest block goes. With that rule no block stays
    whose prefix is gone, and the result is a bound. Without it, blocks stay that nobody can use.
    Source: Belady, 1966, "A study of replacement algorithms for a virtual-storage computer".

    >>> from kvlab.lab.traces import from_blocks
    >>> cache = Belady(2, chains := [[1, 2], [3], [1, 2]])
    >>> [cache.serve(request) for request in from_blocks(chains)]
    [(0,), (0,), (2,)]
    """

    def __init__(self, capacity: int, requests: Sequence[Sequence[int]]) -> None:
        self.capacity = capacity
        self._uses: dict[int, deque[int]] = {}
        for number, keys in enumerate(requests):
            for key in keys:
                self._uses.setdefault(key, deque()).append(number)
        self._next: dict[int, int] = {}  # of the blocks that are there: the request that uses them next
        self._last_first: list[tuple[int, int, int]] = []  # a heap of (-next, -depth, key); old entries stay in it

    def serve(self, request: Request) -> tuple[int]:
        """Use the blocks of the next request. Return how many of its leading blocks were there."""
        keys = request.blocks
        found = next((i for i, key in enumerate(keys) if key not in self._next), len(keys))
        for depth, key in enumerate(keys):
            uses = self._uses[key]
            uses.popleft()
            if uses:
                self._next[key] = uses[0]
                heapq.heappush(self._last_first, (-uses[0], -depth, key))
            else:
                self._next.pop(key, None)
        while len(self._next) > self.capacity:
            use, _, key = heapq.heappop(self._last_first)
            if self._next.get(key) == -use:
                del self._next[key]
        return (found,)
