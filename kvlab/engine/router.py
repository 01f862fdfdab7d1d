"""Which worker gets a request? Routers, and the two accounts that they judge by: who has what, and who does what.

A router is advice: a worker looks up its blocks itself. A wrong entry costs a detour, never a wrong answer.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Final

from kvlab.errors import InputError

LOAD: Final = 0.1
SHARE: Final = 0.02
"""What a block of load, and of share, counts beside a block to compute.

Simulated on the Mooncake conversation trace, 10 workers of 5,859 blocks: `cost` hits .358 of all blocks, one worker
with all the memory .359, round robin .104. With SHARE 0 and no queues one worker gets all requests. With LOAD 1, the
shortest wait for this request, and workers busy for 90 % of the time, it hits .25, and all wait 13 times as long.
"""
HALF_LIFE: Final = 100  # requests for each worker, after which work that was given counts half
EXPECT_S: Final = 2.0


@dataclass(frozen=True)
class Candidate:
    """A worker, for one request. All but its name is in blocks."""

    worker: int
    matched: int = 0  # the leading blocks of the request that it has, on its device or in its host memory
    load: float = 0.0  # work that it has yet to do
    share: float = 0.0  # work that it was given lately, beyond that of the worker with the least


Router = Callable[[int, Sequence[Candidate], int], int]
"""From the blocks of a request, the candidates, and how many requests were routed before, to a worker."""


def _least(rank: Callable[..., tuple[float, ...]], blocks: int, candidates: Sequence[Candidate], routed: int) -> int:
    """The worker of the lowest rank; of equals, the next one from where round robin stands."""
    if not candidates:
        raise InputError("expected at least one worker to route to, got none: add one")
    ranks = [(*rank(blocks, c), (place - routed) % len(candidates)) for place, c in enumerate(candidates)]
    return candidates[ranks.index(min(ranks))].worker


ROUTERS: Final[dict[str, Router]] = {
    "round_robin": partial(_least, lambda blocks, c: ()),
    "least_loaded": partial(_least, lambda blocks, c: (c.load,)),
    "longest_prefix": partial(_least, lambda blocks, c: (-c.matched, c.load)),  # all to one if all begin alike
    "cost": partial(_least, lambda blocks, c: (blocks - c.matched + LOAD * c.load + SHARE * c.share, c.load)),
}


class _Known:
    def __init__(self) -> None:
        self.seq = self.heard = 0  # the last event used, and the latest heard of; if they differ, events are missing
        self.keys: set[bytes] = set()  # after event `seq`
        self.expected: dict[bytes, float] = {}  # other keys, until when

    def advance(self, seq: int, named: set[bytes]) -> None:
        self.seq, self.heard = seq, max(self.heard, seq)
        self.expected = {key: until for key, until in self.expected.items() if key not in named}

    def matched(self, keys: Sequence[bytes], now: float) -> int:
        return sum(1 for _ in takewhile(lambda key: key in self.keys or self.expected.get(key, now) > now, keys))


class BlockIndex:
    """Which worker has which blocks, from the worker's events 1, 2, 3, … A worker that starts again needs a new id.

    While events are missing, what is known stays in use: most of it is right. Without it every request would miss.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._workers = clock, defaultdict[int, _Known](_Known)

    def apply(self, worker: int, seq: int, added: Collection[bytes], removed: Collection[bytes]) -> bool:
        """Use an event, if it is the next one. A late repeat is ignored, so it brings no removed block back.

        Returns False if events are missing. Then the caller asks for them, in order, or for a snapshot.
        """
        known = self._workers[worker]
        if seq == known.seq + 1:
            known.keys -= set(removed)
            known.keys |= set(added)  # last: evicted and computed again
            known.advance(seq, {*added, *removed})
        known.heard = max(known.heard, seq)
        return known.heard == known.seq

    def reset(self, worker: int, seq: int, keys: Iterable[bytes]) -> bool:
        """Use a snapshot: all that the worker has after event `seq`. An old one is ignored. Returns as `apply` does."""
        known = self._workers[worker]
        if seq >= known.seq:
            known.keys = set(keys)
            known.advance(seq, known.keys)
        return known.heard == known.seq

    def expect(self, worker: int, keys: Iterable[bytes]) -> None:
        """Count blocks as there for `EXPECT_S`, or until news of them: a request that has them was just sent."""
        known, now = self._workers[worker], self._clock()
        known.expected = {key: until for key, until in known.expected.items() if until > now}
        known.expected |= dict.fromkeys(set(keys) - known.keys, now + EXPECT_S)

    def matched(self, keys: Sequence[bytes]) -> Counter[int]:
        """How many leading blocks of `keys` each worker has; 0 for an unknown worker."""
        return Counter({worker: known.matched(keys, self._clock()) for worker, known in self._workers.items()})

    def forget(self, worker: int) -> None:
        """Drop a worker that is gone. News of it that arrives later would start a new account."""
        self._workers.pop(worker, None)

    def check_integrity(self) -> None:
        """Assert that the accounts are consistent."""
        for known in self._workers.values():
            assert 0 <= known.seq <= known.heard, "an event was used that was not heard of"
            assert known.keys.isdisjoint(known.expected), "a block is expected that is there"


class Balance:
    """The workers, what each has yet to do, and what it was given lately, in blocks.

    Load alone keeps no balance: if each request ends before the next one comes, all loads are 0. So work counts after
    its end too, and fades with the number of requests, not with time: at any rate of requests the choices are the same.
    """

    def __init__(self, workers: Iterable[int]) -> None:
        self._given = dict.fromkeys(workers, 0.0)
        self._remaining: dict[Hashable, tuple[int, int]] = {}  # by request: its worker and its blocks

    def add(self, worker: int) -> None:
        """Add a worker. It starts level with the one with the least, or it would get every request for a while."""
        self._given.setdefault(worker, min(self._given.values(), default=0.0))

    def remove(self, worker: int) -> list[Hashable]:
        """Remove a worker, and return its requests that have not ended, which others must do."""
        self._given.pop(worker, None)
        lost = [request for request, (w, _) in self._remaining.items() if w == worker]
        return [request for request in lost if self._remaining.pop(request)]

    def give(self, worker: int, request: Hashable, blocks: int) -> None:
        """Note a request that was sent: its blocks to compute, plus those to decode as the caller weighs them.

        Raises:
            InputError: there is no such worker, or this request has not ended.
        """
        if worker not in self._given or request in self._remaining:
            raise InputError(f"expected a new request and a worker of {[*self._given]}, got {request!r} and {worker}")
        kept = 0.5 ** (1 / (HALF_LIFE * len(self._given)))
        self._given = {w: work * kept + blocks * (w == worker) for w, work in self._given.items()}
        self._remaining[request] = worker, blocks

    def report(self, request: Hashable, remaining: int) -> None:
        """Note how many blocks of a request remain to do; with 0 it has ended. An unknown request is ignored."""
        worker, _ = self._remaining.pop(request, (None, 0))
        if worker is not None and remaining:
            self._remaining[request] = worker, remaining

    def candidates(self, matched: Mapping[int, int]) -> list[Candidate]:
        """The workers as routers see them, in the order in which they were added."""
        load = Counter[int]()
        for worker, blocks in self._remaining.values():
            load[worker] += blocks
        least = min(self._given.values(), default=0.0)
        return [Candidate(w, matched.get(w, 0), load[w], work - least) for w, work in self._given.items()]
