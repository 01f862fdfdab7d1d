"""Planners on a virtual clock: the same requests, over a wire that becomes slow, against the best fronts.

A planner here has the two calls of `minikv.MiniPlanner`: `front(blocks)` and `saw(…)`. It never sees the curves
of the world, only the times of what it chose, with a random error of 5 %.
"""

from __future__ import annotations

import math
import random
from typing import Protocol

from kvlab.engine.planner import Planner

BLOCK_TOKENS, REQUESTS, NOISE = 64, 80, 0.05
SIZES = (2, 4, 8, 16, 32)  # blocks of a prompt


class Fronts(Protocol):
    """A planner that chooses how many leading blocks are computed while the others are fetched."""

    def front(self, blocks: int) -> int:
        """How many of so many blocks to compute."""
        ...

    def saw(self, fetched: int, fetch_s: float, computed: int, compute_s: float) -> None:
        """Take note of a request: blocks and seconds of its fetch, and of its front."""
        ...


class OurPlanner:
    """kvlab's planner, with the calls of a `Fronts`."""

    def __init__(self) -> None:
        self._planner = Planner(BLOCK_TOKENS)

    def front(self, blocks: int) -> int:
        """See `Fronts.front`. What the planner would compute behind the fetched blocks counts as front here."""
        if math.isnan(self._planner.compute_s(0, BLOCK_TOKENS)):
            return blocks // 2  # in an engine, the end of a prompt is always computed, so something was seen
        plan = self._planner.plan(["store"] * blocks, blocks * BLOCK_TOKENS + 1)
        return blocks - sum(step.stop - step.start for step in plan.fetches) // BLOCK_TOKENS

    def saw(self, fetched: int, fetch_s: float, computed: int, compute_s: float) -> None:
        """See `Fronts.saw`."""
        self._planner.fetched("store", fetched, fetch_s)
        self._planner.computed(0, computed * BLOCK_TOKENS, compute_s)


def fetch_s(blocks: int, slower: float) -> float:
    """Seconds of a fetch: 15 ms for the call and 1 ms for each block, times `slower`."""
    return (0.015 + 0.001 * blocks) * slower if blocks else 0.0


def compute_s(blocks: int) -> float:
    """Seconds of a prefill: 6 ms for each block, and a little more for each further one."""
    return 0.006 * blocks + 0.00005 * blocks**2


def race(planner: Fronts) -> float:
    """Seconds of a planner's choices by those of the best ones. The wire is fast, then slow, then fast again.

    The first ten requests after each change do not count.
    """
    rng, took, best = random.Random(0), 0.0, 0.0
    for number in range(3 * REQUESTS):
        slower = (1.0, 6.0, 1.0)[number // REQUESTS]
        blocks = rng.choice(SIZES)
        front = min(max(int(planner.front(blocks)), 0), blocks)
        seconds = fetch_s(blocks - front, slower), compute_s(front)
        seen = [t * max(0.5, rng.gauss(1, NOISE)) for t in seconds]
        planner.saw(blocks - front, seen[0], front, seen[1])
        if number % REQUESTS >= 10:
            took += max(seconds)
            best += min(max(fetch_s(blocks - k, slower), compute_s(k)) for k in range(blocks + 1))
    return took / best
