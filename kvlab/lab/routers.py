"""Eight routers side by side: the four of `kvlab.engine.router`, and four that other systems have published.

They are written from the formulas in documentation, not from code, and decide from counts of blocks and requests
only. What the real ones do beside that (sessions, filters, learned latencies, disaggregation) is not here. Two of
them were compared with the real programs, see `docs/results`.

    dynamo   the smallest sum of blocks to compute, those of waiting requests included, and blocks that running
             requests hold. Source: NVIDIA Dynamo 1.3, "Routing Concepts"; its defaults, temperature 0
    lmetric  the smallest product of both. Source: the same
    sglang   if one worker has far more requests than another, the one with the fewest; else the one with the longest
             prefix, if it is more than a share of the prompt; else the one with the fewest requests.
             Source: SGLang Model Gateway 0.3, "cache-aware", its defaults. Its documentation says "smallest tree" for
             the last rule; the program (sglang-router 0.3.2) goes by requests
    llmd     the largest weighted sum of matched share, short queue and free memory. Source: llm-d router, its
             default profile
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvlab.engine.router import ROUTERS as OWN
from kvlab.engine.router import Balance, Candidate

SGLANG_SHARE: Final = 0.3
SGLANG_MORE: Final = 64
SGLANG_TIMES: Final = 1.5
LLMD_PREFIX: Final = 3.0
LLMD_QUEUE: Final = 2.0
LLMD_MEMORY: Final = 2.0


@dataclass(frozen=True)
class Seen(Candidate):
    """A worker as a router sees it, with what the published rules need beside `Candidate`.

    Attributes:
        to_compute: blocks of its requests that are not computed yet.
        held: blocks of requests that generate.
        waiting, requests: requests that wait, and all that have not ended.
        memory: the share of its memory that requests hold, 0 … 1.
    """

    to_compute: float = 0.0
    held: float = 0.0
    waiting: int = 0
    requests: int = 0
    memory: float = 0.0


Router = Callable[[int, Sequence[Seen], int], int]
"""From the blocks of a request, the workers, and how many requests were routed before, to a worker."""


def _best(rank: Callable[[Seen], float], workers: Sequence[Seen], routed: int) -> int:
    """The worker of the lowest rank; of equals, the next one from where round robin stands."""
    ranks = [(rank(worker), (place - routed) % len(workers)) for place, worker in enumerate(workers)]
    return workers[ranks.index(min(ranks))].worker


def dynamo(blocks: int, workers: Sequence[Seen], routed: int) -> int:
    """See the text of this module."""
    return _best(lambda w: max(0.0, w.to_compute + blocks - w.matched) + w.held, workers, routed)


def lmetric(blocks: int, workers: Sequence[Seen], routed: int) -> int:
    """See the text of this module."""
    return _best(lambda w: max(0.0, w.to_compute + blocks - w.matched) * (w.held + 1), workers, routed)


def sglang(blocks: int, workers: Sequence[Seen], routed: int) -> int:
    """See the text of this module."""
    requests = [worker.requests for worker in workers]
    most, fewest = max(requests), min(requests)
    if most - fewest > SGLANG_MORE and most > SGLANG_TIMES * fewest:
        return _best(lambda w: w.requests, workers, routed)
    longest = max(workers, key=lambda w: w.matched)
    if longest.matched > SGLANG_SHARE * blocks:
        return _best(lambda w: -w.matched, workers, routed)
    return _best(lambda w: w.requests, workers, routed)


def llmd(blocks: int, workers: Sequence[Seen], routed: int) -> int:
    """See the text of this module."""
    queues = [worker.waiting for worker in workers]
    shortest, span = min(queues), max(queues) - min(queues)

    def score(w: Seen) -> float:
        queue = 1 - (w.waiting - shortest) / span if span else 1.0
        return LLMD_PREFIX * w.matched / blocks + LLMD_QUEUE * queue + LLMD_MEMORY * (1 - w.memory)

    return _best(lambda w: -score(w), workers, routed)


ROUTERS: Final[dict[str, Router]] = {**OWN, "dynamo": dynamo, "lmetric": lmetric, "sglang": sglang, "llmd": llmd}


class Holders:
    """Which workers have which blocks: one bit for each worker, so one look-up serves them all."""

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}

    def note(self, worker: int, cache: Container[int], used: Iterable[int], gone: Iterable[int]) -> None:
        """Take over what `cache` has now of the blocks that were used there and of those that were evicted."""
        for keys in (used, gone):
            for key in keys:
                self.set(worker, key, key in cache)

    def set(self, worker: int, key: int, has: bool) -> None:
        """Note that a worker has a block, or that it does not."""
        before = self._masks.get(key, 0)
        after = before | (1 << worker) if has else before & ~(1 << worker)
        if after:
            self._masks[key] = after
        else:
            self._masks.pop(key, None)

    def matched(self, keys: Sequence[int]) -> Counter[int]:
        """How many leading blocks each worker has, if any."""
        matched: Counter[int] = Counter()
        still = -1
        for depth, key in enumerate(keys):
            mask = still & self._masks.get(key, 0)
            lost = still & ~mask
            if depth:
                _count(matched, lost, depth)
            still = mask
            if not still:
                return matched
        if keys:
            _count(matched, still, len(keys))
        return matched


def _count(matched: Counter[int], workers: int, depth: int) -> None:
    while workers:
        lowest = workers & -workers
        matched[lowest.bit_length() - 1] = depth
        workers ^= lowest


@dataclass
class Running:
    """What a worker has to do now, in blocks and requests; see `Seen`."""

    to_compute: int = 0
    held: int = 0
    waiting: int = 0
    requests: int = 0

    def begin(self, missing: int) -> None:
        """A request waits, with so many blocks to compute."""
        self.to_compute += missing
        self.waiting += 1
        self.requests += 1

    def generate(self, missing: int, blocks: int) -> None:
        """It is computed, holds all its blocks, and generates."""
        self.to_compute -= missing
        self.waiting -= 1
        self.held += blocks

    def end(self, blocks: int) -> None:
        """It has ended."""
        self.held -= blocks
        self.requests -= 1


def seen(
    balance: Balance,
    matched: Mapping[int, int],
    running: Sequence[Running],
    room: float,
) -> list[Seen]:
    """The workers as `ROUTERS` see them.

    Args:
        matched: leading blocks of the request, by worker.
        running: what each worker does.
        room: blocks that the memory of a worker holds.
    """
    workers = []
    for c in balance.candidates(matched):
        now = running[c.worker]
        workers.append(
            Seen(
                c.worker, c.matched, c.load, c.share, now.to_compute, now.held, now.waiting, now.requests,
                min(1.0, (now.held + now.to_compute) / room) if room else 1.0,
            )
        )  # fmt: skip
    return workers
