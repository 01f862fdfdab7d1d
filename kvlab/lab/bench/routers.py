"""Eight routers on the same trace: hits, balance and waiting, with an exact index and with what events tell.

python -m kvlab bench routers --json
python -m kvlab bench routers --trace conversation_trace.jsonl

Ten nodes of 5,859 blocks. Times are simulated, with costs computed for Llama 3.1 8B on an H100; they are exact, so
nothing here depends on this machine but `scaling`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from kvlab.lab.bench.policies import CAPACITY, make_requests
from kvlab.lab.costs import COSTS
from kvlab.lab.indexes import Events, Exact, Faults, Index, Naive, Sent
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.replay import Setup, replay
from kvlab.lab.routers import ROUTERS
from kvlab.lab.simulate import simulate
from kvlab.lab.traces import Request, Trace, from_blocks, spread

ABOUT = (
    "untimed: hits and imbalance when each request ends before the next one comes; routers: with time, by speed (how "
    "many times as fast as recorded the requests come); hit_rate: found blocks / all; imbalance: blocks that the "
    "busiest node computed, by the mean; ttft in seconds; indexes: the same at one speed, by what the router knows: "
    "exact; sent: what it sent; events: numbered, with snapshots after a gap; naive: events used whenever they come; "
    "faulty: events take 1 s, 5 % are lost, 5 % come again after 60 s; scaling: an untimed replay with the cost router"
)
NODES: Final = 10
BLOCK_TOKENS: Final = 512
BUCKET_S: Final = 3.0
SPEEDS: Final = (1.0, 3.0, 4.0)
FAULTY: Final = Faults(lag_s=1.0, lost=0.05, repeated=0.05, late_s=60.0)
LENGTHS: Final = (0.25, 0.5, 1.0)
NEW: Final = 343
"""Tokens of an answer where the trace is made: the mean of Mooncake's conversation trace."""
BLIND: Final = ("round_robin", "least_loaded", "longest_prefix")
"""Routers whose index is not compared: two do not use it, and one sends all to one node."""


def run(
    trace: str | None = None, speeds: Sequence[float] = SPEEDS, sizes: Sequence[int] = (1, 10, 100, 1000)
) -> dict[str, Any]:
    """Send the same requests through all routers.

    Args:
        trace: a file that `kvlab.lab.traces` reads; by default, requests are made in the shape of Mooncake's.
        speeds: how many times as fast the requests come; indexes are compared at the second one.
        sizes: numbers of nodes whose replay is timed.

    Raises:
        InputError: the file is not a trace.
    """
    file = None if trace is None else Trace(trace)
    block_tokens = BLOCK_TOKENS if file is None else file.block_tokens
    requests = made() if file is None else list(spread(file, BUCKET_S))
    timed = partial(_timed, requests, block_tokens)
    indexes: dict[str, Callable[[], Index]] = {
        "exact": Exact,
        "sent": partial(Sent, CAPACITY),
        "events": Events,
        "events, faulty": partial(Events, FAULTY),
        "naive": Naive,
        "naive, faulty": partial(Naive, FAULTY),
    }
    compared = speeds[min(1, len(speeds) - 1)]
    return {
        "about": ABOUT,
        "trace": "made, seed 0" if trace is None else Path(trace).name,
        "nodes": NODES,
        "capacity": CAPACITY,
        "costs": "llama8b_h100, computed",
        "pool": replay(requests, block_tokens, Setup(device=NODES * CAPACITY)).hits.rates()["blocks"],
        "untimed": [_untimed(requests, block_tokens, name) for name in ROUTERS],
        "routers": [timed(name, speed, "exact", Exact) for speed in speeds for name in ROUTERS],
        "indexes": [
            timed(name, compared, index, make)
            for index, make in indexes.items()
            for name in ROUTERS
            if name not in BLIND
        ],
        "scaling": [_scaled(requests, block_tokens, nodes, length) for nodes in sizes for length in LENGTHS],
        "machine": describe_machine(),
        "versions": versions(),
    }


def made() -> list[Request]:
    """Requests in the shape of Mooncake's conversation trace, with its rate and its mean answer."""
    requests = from_blocks(make_requests(), BLOCK_TOKENS)
    return [replace(request, at_s=0.3 * request.at_s, new=NEW) for request in requests]


def _untimed(requests: Sequence[Request], block_tokens: int, router: str) -> dict[str, Any]:
    result = replay(requests, block_tokens, Setup(device=CAPACITY, nodes=NODES, router=router))
    return {"router": router, "hit_rate": result.hits.rates()["blocks"], "imbalance": result.imbalance}


def _timed(
    requests: Sequence[Request], block_tokens: int, router: str, speed: float, index: str, make: Callable[[], Index]
) -> dict[str, Any]:
    setup = Setup(device=CAPACITY, nodes=NODES, router=router)
    result = simulate(spread(requests, 0.0, speed), block_tokens, setup, COSTS["llama8b_h100"], make())
    told = result.as_json()
    return {
        "router": router,
        "index": index,
        "speed": speed,
        "hit_rate": told["hit_rate"]["blocks"],
        **{name: told[name] for name in ("imbalance", "ttft_mean_s", "ttft_p50_s", "ttft_p95_s", "ttft_p99_s")},
    }


def _scaled(requests: Sequence[Request], block_tokens: int, nodes: int, length: float) -> dict[str, Any]:
    some = requests[: max(1, round(length * len(requests)))]
    begin = time.perf_counter()
    result = replay(some, block_tokens, Setup(device=CAPACITY, nodes=nodes, router="cost"))
    seconds = time.perf_counter() - begin
    return {
        "nodes": nodes,
        "requests": len(some),
        "seconds": seconds,
        "us_per_request": 1e6 * seconds / len(some),
        "hit_rate": result.hits.rates()["blocks"],
    }
