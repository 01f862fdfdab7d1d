"""What a simulator pays for eviction: accesses a second of every policy, on the block keys of conversations.

python -m kvlab bench policies --json
python -m kvlab bench policies --trace conversation_trace.jsonl

The keys are made here, from a seed, in the shape of the conversation trace of the Mooncake paper
(FAST '25): every request begins with the same block, the system prompt. 61 % begin a new
conversation, of a log-normal number of blocks (median 10). The others go on with the request that
came a log-normal number of requests ago (median 520): they keep its blocks but the last, which was
not full, or in one of five cases fewer, because history was edited; then they add some (median 4).

So these keys come close to the trace's: 270,000 accesses (288,500 there), three of four keys used
once (as there), and LRU finds .15 of all blocks with room for 5,859 (.14) and .32 with 30,000 (.33).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kvlab.core.policies import POLICIES, Policy
from kvlab.errors import InputError
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.timing import Timings, time_rounds

K = TypeVar("K", int, str)
ABOUT = (
    "rows: accesses_per_s of a loop that calls Policy.access for every block of every request and counts hits, median "
    "over the rounds; hit_rate: the blocks that a request finds before its first miss, by all blocks; blocks of size 1"
)
CAPACITY = 5_859  # blocks: 3 million tokens at the trace's 512 a block
REQUESTS = 12_031  # as the trace has
LONGEST = 247  # blocks of a request


def run(trace: str | None = None, capacity: int = CAPACITY, rounds: int = 9) -> dict[str, Any]:
    """Replay the same requests through every policy, in rounds.

    Args:
        trace: a JSONL file of one `{"hash_ids": [...], ...}` a request, as Mooncake released them;
            without it, `make_requests()`.
        capacity: how many blocks fit.
        rounds: how often each policy replays all requests.

    Returns:
        `rows`: by policy, accesses a second and the hit rate.

    Raises:
        InputError: the file is not such a trace.
    """
    requests = make_requests() if trace is None else read_trace(trace)
    accesses = sum(map(len, requests))
    times = time_rounds({name: _replay(name, capacity, requests) for name in POLICIES}, rounds)
    return {
        "about": ABOUT,
        "keys": "made, seed 0" if trace is None else Path(trace).name,
        "requests": len(requests),
        "accesses": accesses,
        "distinct": len({block for chain in requests for block in chain}),
        "capacity": capacity,
        "rows": [_row(name, times, capacity, requests) for name in POLICIES],
        "aa_ratio": times.aa_ratio,
        "noisy": times.noisy,
        "machine": describe_machine(),
        "versions": versions(),
    }


def replay(policy: Policy[K], requests: Iterable[Iterable[K]]) -> int:
    """Use every block of every request, in order; return how many were found before their request's first miss.

    A hit evicts nothing, so this finds what a look-up of the whole prefix before any insertion would find.
    """
    found = 0
    for chain in requests:
        in_prefix = True
        for block in chain:
            if not policy.access(block):
                in_prefix = False
            elif in_prefix:
                found += 1
    return found


def make_requests(requests: int = REQUESTS, seed: int = 0) -> list[list[int]]:
    """Make the block keys of so many requests of conversations. See the module for their shape."""
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


def read_trace(path: str | Path) -> list[list[int]]:
    """Read the block keys of each request of a trace in Mooncake's format, in the order of the file.

    Raises:
        InputError: a line is not a JSON object with a list `hash_ids` of integers, or there is no block at all.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as lines:
        requests = [_hash_ids(line, f"line {number} of {path}") for number, line in enumerate(lines, 1) if line.strip()]
    if not any(requests):
        raise InputError(f"expected requests with blocks in {path}, found none; give a trace as Mooncake released them")
    return requests


def _hash_ids(line: bytes, place: str) -> list[int]:
    try:
        ids = json.loads(line)["hash_ids"]
    except (ValueError, TypeError, KeyError, RecursionError):
        ids = None
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise InputError(
            f'expected a JSON object with a list "hash_ids" of integers in {place}, '
            f"got {line[:60]!r}; give a trace as Mooncake released them"
        )
    return ids


def _replay(name: str, capacity: int, requests: Sequence[Sequence[int]]) -> Callable[[], int]:
    return lambda: replay(POLICIES[name](capacity), requests)


def _row(name: str, times: Timings, capacity: int, requests: Sequence[Sequence[int]]) -> dict[str, Any]:
    accesses = sum(map(len, requests))
    return {
        "policy": name,
        "accesses_per_s": round(1000 * accesses / times.median_ms(name)),
        "hit_rate": round(_replay(name, capacity, requests)() / accesses, 4),
    }
