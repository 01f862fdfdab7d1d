"""What pins and TTLs do to a trace: what the pinned prefixes gain, what all other requests pay, and what lies idle.

python -m kvlab bench pins --trace conversation_trace.jsonl --json

Two kinds of prefixes are pinned, which a user can name beforehand. "shared": what at least a share of all requests
begin with, such as system prompts and templates. "job": a prompt that comes rarely and should be fast when it comes,
such as a report every ten minutes; it is added to the trace. A pin begins when its blocks are there, and its lease is
renewed with each use. The same requests are replayed without pins beside it, in the order of the trace and without
time, as in `kvlab.lab.replay`.

A TTL takes every block that was not used for so long. It is compared with LRU in the room that the TTL took on the
mean. Hit rates are by blocks: found blocks / all blocks.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from kvlab.core.policies import LRU, POLICIES
from kvlab.errors import InputError
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.replay import ENDLESS, Node, lru_curve
from kvlab.lab.traces import Request, Trace
from kvlab.lab.workloads import WORKLOADS, as_trace

ABOUT: Final = (
    "pins: hit rates by blocks of what is pinned, of all other blocks and of both, without and with pins; pinned: "
    "blocks named; capacity: blocks; idle: the mean share of the room that pins hold with blocks that the policy alone "
    "would not have. ttls: hit rate when all blocks leave that were not used for so long, the blocks held on the mean "
    "over the requests, and the hit rate of LRU in that room"
)
POLICY_NAMES: Final = ("lru", "s3fifo")
ROOMS: Final = (0.01, 0.03, 0.1, 0.3)
"""Capacities, by the distinct blocks of the trace."""
TTLS: Final = (10, 30, 100, 300, 1000, 3000)
MOST_HELD: Final = 0.5
JOB_S: Final = 600.0
JOB_BLOCKS: Final = 29
"""In blocks of 512 tokens a system prompt and tools, those of Claude Code as in `kvlab.lab.workloads.agentic`. The
generated workloads have blocks of 16 tokens and prompts that are smaller, too."""
MADE: Final[dict[str, tuple[dict[str, Any], float]]] = {
    "agentic": ({"sessions": 64, "kinds": 8}, 0.05),
    "chat": ({"sessions": 400}, 0.05),
    "structured": ({"requests": 2000, "templates": 64}, 0.005),
}
"""The generated workloads: their settings, and the share of requests that begin with what is pinned."""


class Pinning:
    """A cache of one tier in which some blocks are pinned while they are used.

    Args:
        named: the blocks to pin, at most `MOST_HELD` of the capacity at the same time.
        lease_s: how long a pin lasts after a use.

    Attributes:
        policy: knows which blocks are here.
    """

    def __init__(self, policy: str, capacity: int, named: Collection[int] = (), lease_s: float = 0.0) -> None:
        self.policy = POLICIES[policy](capacity)
        self._named, self._lease_s, self._most = named, lease_s, int(MOST_HELD * capacity)
        self._ends: OrderedDict[int, float] = OrderedDict()  # in the order of the ends

    @property
    def held(self) -> Collection[int]:
        """The blocks that are pinned."""
        return self._ends.keys()

    def serve(self, request: Request) -> int:
        """Use the blocks of a request; return how many of its leading ones were here."""
        while self._ends and next(iter(self._ends.values())) <= request.at_s:
            self.policy.unpin(self._ends.popitem(False)[0])
        found = next((i for i, key in enumerate(request.blocks) if key not in self.policy), len(request.blocks))
        for key in request.used:
            self.policy.access(key)
            if key in self._named:
                self._hold(key, request.at_s + self._lease_s)
        return found

    def _hold(self, key: int, until_s: float) -> None:
        if key not in self._ends:
            if len(self._ends) >= self._most or key not in self.policy:
                return
            self.policy.pin(key)
        self._ends[key] = until_s
        self._ends.move_to_end(key)


@dataclass(frozen=True)
class Case:
    """A trace, and which of its blocks are pinned."""

    trace: str
    kind: str
    requests: Sequence[Request]
    named: Collection[int]


def shared(requests: Iterable[Request], share: float) -> set[int]:
    """Return the blocks that at least `share` of all requests, and more than one, have in their prompts.

    A block stands for its whole prefix, so with a block all blocks before it are there.
    """
    counts, total = Counter[int](), 0
    for request in requests:
        counts.update(request.blocks)
        total += 1
    return {block for block, count in counts.items() if count > 1 and count >= share * total}


def with_job(requests: Sequence[Request], blocks: int, every_s: float) -> tuple[list[Request], set[int]]:
    """Return the requests with those of a job between them, and the blocks that the job's requests begin with."""
    first, last = requests[0].at_s, requests[-1].at_s
    prompt = [*range(-1, -1 - blocks, -1)]  # the ids of a trace are not negative

    def job() -> Iterator[Request]:
        for number in range(1 + int((last - first) / every_s)):
            own = -1 - blocks - number
            yield Request(first + number * every_s, 0, 1, [*prompt, own])

    return list(heapq.merge(requests, job(), key=lambda request: request.at_s)), set(prompt)


def pinned(case: Case, policy: str, capacity: int, lease_s: float) -> dict[str, Any]:
    """Replay a case without and with pins.

    Returns:
        A row of `pins`, see `ABOUT`.
    """
    caches = Pinning(policy, capacity), Pinning(policy, capacity, case.named, lease_s)
    hits = [[0, 0], [0, 0]]  # without and with pins: of pinned and of other blocks
    asked, idle = [0, 0], 0
    for request in case.requests:
        own = sum(block in case.named for block in request.blocks)
        asked[0] += own
        asked[1] += len(request.blocks) - own
        for cache, found in zip(caches, hits, strict=True):
            count = cache.serve(request)
            found[0] += min(count, own)
            found[1] += max(0, count - own)
        idle += sum(block not in caches[0].policy for block in caches[1].held)
    asked.append(sum(asked))
    rates = [[_ratio(n, of) for n, of in zip([*found, sum(found)], asked, strict=True)] for found in hits]
    return {
        "trace": case.trace,
        "pins": case.kind,
        "pinned": len(case.named),
        "policy": policy,
        "capacity": capacity,
        "pinned_without": rates[0][0],
        "pinned_with": rates[1][0],
        "others_without": rates[0][1],
        "others_with": rates[1][1],
        "all_without": rates[0][2],
        "all_with": rates[1][2],
        "idle": _ratio(idle, capacity * len(case.requests)),
    }


def expiring(requests: Sequence[Request], ttls: Sequence[float] = TTLS) -> list[dict[str, Any]]:
    """Return for each TTL its hit rate, the blocks that it held on the mean, and the hit rate of LRU in that room."""
    blocks, curve, rows = sum(len(request.blocks) for request in requests), lru_curve(requests), []
    for ttl_s in ttls:
        node, found, held = Node(LRU(ENDLESS), ttl_s=ttl_s), 0, 0
        for request in requests:
            found += sum(node.serve(request))
            held += len(node.device)
        mean = round(held / len(requests))
        row = {"ttl_s": ttl_s, "hit_rate": _ratio(found, blocks), "mean_blocks": mean}
        rows.append(row | {"lru_hit_rate": _ratio(curve[min(mean, len(curve) - 1)], blocks)})
    return rows


def run(trace: str | None = None, share: float = 0.1, lease: float = 3600.0, every: float = JOB_S) -> dict[str, Any]:
    """Judge pins and TTLs on generated workloads, and on a trace.

    Args:
        trace: a file that `kvlab.lab.traces` reads.
        share: what so many of its requests begin with is pinned.
        lease: seconds that a pin lasts after a use.
        every: seconds between two requests of the job.

    Raises:
        InputError: the file is not a trace, or a number is not above 0.
    """
    if not (0 < share <= 1 and lease > 0 and every > 0):
        raise InputError(f"expected a share of at most 1, and times above 0, got {share}, {lease} and {every}")
    traces = {name: (partial(_made, name), own) for name, (_, own) in MADE.items()}
    if trace is not None:
        traces = {Path(trace).name: (partial(list, Trace(trace)), share), **traces}
    pins: list[dict[str, Any]] = []
    ttls: list[dict[str, Any]] = []
    for name, (load, own_share) in traces.items():
        requests = load()
        job = with_job(requests, JOB_BLOCKS, every)
        cases = Case(name, "shared", requests, shared(requests, own_share)), Case(name, "job", *job)
        distinct = len({block for request in requests for block in request.used})
        rooms = [round(room * distinct) for room in ROOMS]
        pins += [pinned(case, policy, room, lease) for case in cases for policy in POLICY_NAMES for room in rooms]
        ttls += [{"trace": name, **row} for row in expiring(requests)]
    settings = {"share": share if trace else None, "lease_s": lease, "every_s": every, "most_held": MOST_HELD}
    machine = {"machine": describe_machine(), "versions": versions()}
    return {"about": ABOUT, **settings, "pins": pins, "ttls": ttls, **machine}


def _made(name: str) -> list[Request]:
    """Return a generated workload, with small numbers as ids."""
    ids: dict[int, int] = {}

    def small(blocks: Iterable[int]) -> list[int]:
        return [ids.setdefault(block, len(ids)) for block in blocks]

    requests = as_trace(WORKLOADS[name](**MADE[name][0]), 16)
    return [replace(r, blocks=small(r.blocks), kept=small(r.used)) for r in requests]


def _ratio(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0
