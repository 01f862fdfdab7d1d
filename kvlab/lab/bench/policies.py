"""Accesses per second of every eviction policy, on the block keys of conversations.

python -m kvlab bench policies --json
python -m kvlab bench policies --trace conversation_trace.jsonl

The keys are generated from a seed. Their distribution is modelled on the conversation trace of the
Mooncake paper (FAST '25). Every request begins with the same block, the system prompt. 61 % of the
requests begin a new conversation with a log-normal number of blocks (median 10). The others continue
an earlier request, at a log-normal distance (median 520 requests). 80 % of these keep all blocks of
the earlier request except the last, which was not full. 20 % keep a random number of its blocks, as
after an edit of the history. Then they add a log-normal number of blocks (median 4).

The generated keys are close to the trace (its values in parentheses): 270,000 accesses (288,500),
three of four keys used once (the same). LRU finds .15 (.14) of all blocks with a capacity of 5,859
blocks, and .32 (.33) with 30,000.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

from kvlab.core.policies import POLICIES
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.replay import Replayed, Setup, replay
from kvlab.lab.timing import Timings, time_rounds
from kvlab.lab.traces import Trace, from_blocks

ABOUT = (
    "rows: accesses_per_s of a replay that uses every block of every request and counts hits, median "
    "over the rounds; hit_rate: share of all blocks that requests find before their first miss; every block has size 1"
)
CAPACITY = 5_859  # blocks: 3 million tokens at 512 tokens per block, as in the trace
REQUESTS = 12_031  # as in the trace
LONGEST = 247  # most blocks per request


def run(trace: str | None = None, capacity: int = CAPACITY, rounds: int = 9) -> dict[str, Any]:
    """Replay the same requests through every policy, in rounds.

    Args:
        trace: a file that `kvlab.lab.traces` reads; by default, `make_requests()` is replayed.
        capacity: capacity of each policy in blocks.
        rounds: number of timed replays per policy.

    Returns:
        `rows`: by policy, accesses per second and the hit rate.

    Raises:
        InputError: the file is not a trace.
    """
    requests = from_blocks(make_requests()) if trace is None else list(Trace(trace))
    accesses = sum(len(request.blocks) for request in requests)
    work = {name: partial(replay, requests, 1, Setup(name, capacity)) for name in POLICIES}
    times = time_rounds(work, rounds, lambda result: result.seconds)
    return {
        "about": ABOUT,
        "keys": "made, seed 0" if trace is None else Path(trace).name,
        "requests": len(requests),
        "accesses": accesses,
        "distinct": len({block for request in requests for block in request.blocks}),
        "capacity": capacity,
        "rows": [_row(name, times, accesses, work[name]()) for name in POLICIES],
        "aa_ratio": times.aa_ratio,
        "noisy": times.noisy,
        "machine": describe_machine(),
        "versions": versions(),
    }


def make_requests(requests: int = REQUESTS, seed: int = 0) -> list[list[int]]:
    """Generate the block keys of conversation requests. The module's docstring describes their distribution."""
    rng = random.Random(seed)
    chains: list[list[int]] = []
    new_key = 1
    for number in range(requests):
        back = max(1, round(rng.lognormvariate(6.25, 0.98)))
        if rng.random() < 0.61 or back > number:
            start, added = [0], rng.lognormvariate(2.34, 1.21)
        else:
            before = chains[number - back]
            kept = len(before) - 1 if rng.random() < 0.8 else round(rng.random() * len(before))
            start, added = before[: max(1, kept)], rng.lognormvariate(1.51, 0.92)
        stop = new_key + max(1, round(added) - 1)
        chains.append([*start, *range(new_key, stop)][:LONGEST])
        new_key = stop
    return chains


def _row(name: str, times: Timings, accesses: int, replayed: Replayed) -> dict[str, Any]:
    return {
        "policy": name,
        "accesses_per_s": round(1000 * accesses / times.median_ms(name)),
        "hit_rate": round(replayed.hits.rates()["blocks"], 4),
    }
