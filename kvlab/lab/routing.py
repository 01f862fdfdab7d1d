"""Routers on a stream of requests, without a model and without time: only block keys move.

Each worker has an LRU cache of blocks. A request goes to the worker that the router names; what that worker lacks
counts as computed there. There are no queues: requests come so slowly that each ends before the next one.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from kvlab.core.policies import POLICIES, Policy
from kvlab.engine.router import Balance, Router

Chain = list[Hashable]
"""The keys of a request's blocks. A key stands for its whole prefix."""


@dataclass(frozen=True)
class Routed:
    """What came of a stream of requests.

    Attributes:
        hit_rate: blocks that the chosen workers had / all blocks.
        imbalance: blocks that the busiest worker computed, by the mean.
        requests: of each worker.
    """

    hit_rate: float
    imbalance: float
    requests: list[int]


def route(requests: Sequence[Chain], router: Router, workers: int, blocks: int) -> Routed:
    """Send requests to `workers` workers with room for `blocks` blocks each."""
    caches: list[Policy[Any]] = [POLICIES["lru"](blocks) for _ in range(workers)]
    balance, hits = Balance(range(workers)), 0
    computed, count = [0] * workers, [0] * workers
    for number, chain in enumerate(requests):
        matched = {w: _leading(cache, chain) for w, cache in enumerate(caches)}
        chosen = router(len(chain), balance.candidates(matched), number)
        missing = len(chain) - matched[chosen]
        balance.give(chosen, number, missing)
        balance.report(number, 0)
        hits += matched[chosen]
        computed[chosen] += missing
        count[chosen] += 1
        for key in chain:
            caches[chosen].access(key)
    total = sum(map(len, requests))
    return Routed(hits / total, max(computed) * workers / sum(computed), count)


def _leading(cache: Policy[Any], chain: Chain) -> int:
    return next((i for i, key in enumerate(chain) if key not in cache), len(chain))


def groups(
    requests: int, groups: int = 16, shared: int = 8, own: int = 1, common: int = 1, skew: float = 1.0, seed: int = 0
) -> list[Chain]:
    """Requests of groups: `common` blocks that all begin with, `shared` blocks of the group, `own` blocks.

    Args:
        skew: the k-th group has a share of 1 / k to this power.
    """
    rng = random.Random(seed)
    shares = [1 / (1 + group) ** skew for group in range(groups)]
    chosen = rng.choices(range(groups), shares, k=requests)
    return [
        [*range(common), *((group, i) for i in range(shared)), *((group, number, i) for i in range(own))]
        for number, group in enumerate(chosen)
    ]
