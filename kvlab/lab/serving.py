"""A load for schedulers and workers, and what came of it.

Arrivals are open-loop: a request comes when it comes, whether or not the others are done, and its latency counts
from its intended arrival. A closed loop would wait with the next request while the system is slow, and so not
measure what its users meet (Gil Tene calls this coordinated omission).
"""

from __future__ import annotations

import itertools
import random
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from kvlab.engine.requests import Record
from kvlab.engine.scheduler import IDLE_S, Scheduler
from kvlab.engine.worker import WorkerSettings
from kvlab.engine.workers import Answer, WorkerGroup
from kvlab.lab.machine import describe_machine
from kvlab.lab.reachable import open_reachable
from kvlab.model import Tokenizer, held_out_tokens
from kvlab.testbed.server import RedisServer

DECODE: Final = 8
"""A decoded token takes about as long as so many tokens of a prompt (`bench serve` prints the measured number)."""

PREFIX: Final = 1024
PAGES: Final = 256
HOST_BYTES: Final = 14 << 20
"""Of each worker: room for some of the groups only, so that every tier is used."""
ABOUT: Final = (
    "requests of sixteen groups come at random times, --rate of them a second, whether or not others are done; "
    "latencies count from then. Those of a group begin with the same 1,024 tokens, and some groups are popular. "
    "computed, device, host, store: prompt tokens by where their KV came from; hit_rate: share of them that was not "
    "computed; work: tokens computed, those of answers count 8 times; imbalance: the work of the busiest worker "
    "divided by the mean, 1 is even; ttft: time to the first token; itl: time between two tokens; tok_per_s: of this "
    "load, which --rate limits"
)


@dataclass(frozen=True)
class Arrival:
    """A request that comes `at_s` seconds after the begin. Requests of one group begin alike."""

    at_s: float
    tokens: list[int]
    new: int
    group: int = 0


def skewed(
    requests: int,
    per_second: float,
    groups: int = 16,
    prefix: int = 512,
    own: int = 40,
    new: int = 16,
    common: int = 0,
    seed: int = 0,
) -> list[Arrival]:
    """Requests of groups, the first of which is the most popular: the k-th one has a share of 1 / k (Zipf).

    Args:
        per_second: of a Poisson process.
        prefix, own: tokens that a group's requests have in common, and those of each request.
        new: tokens to generate.
        common: tokens that all requests begin with, before the group's.
    """
    rng, text = random.Random(seed), held_out_tokens(Tokenizer())
    system = text[:common]
    starts = [rng.randrange(len(text) - prefix) for _ in range(groups)]
    shares = [1 / (1 + group) for group in range(groups)]
    at, arrivals = 0.0, []
    for _ in range(requests):
        at += rng.expovariate(per_second)
        (group,) = rng.choices(range(groups), shares)
        tail = rng.randrange(len(text) - own)
        arrivals.append(Arrival(at, system + text[starts[group] :][:prefix] + text[tail : tail + own], new, group))
    return arrivals


@dataclass(frozen=True)
class Served:
    """How one request was served.

    Attributes:
        worker: the number of the last worker that had it.
        arrived_at: when it should have come; the other times are when its tokens were there.
        record: the scheduler's; None if it was lost with its worker.
    """

    arrival: Arrival
    worker: int
    arrived_at: float
    token_at: list[float]
    tokens: list[int]
    record: Record | None

    @property
    def ttft_ms(self) -> float:
        """Milliseconds from its intended arrival to its first token."""
        return 1000 * (self.token_at[0] - self.arrived_at)

    @property
    def itl_ms(self) -> list[float]:
        """Milliseconds between its tokens."""
        return [1000 * (b - a) for a, b in itertools.pairwise(self.token_at)]


def offer(group: WorkerGroup, arrivals: Sequence[Arrival]) -> list[Served]:
    """Send requests to workers at their times, and wait until all have ended.

    Raises:
        KVLabError: a request failed.
    """
    begin = time.perf_counter()
    answers: list[Answer] = []
    for arrival in arrivals:
        time.sleep(max(0.0, begin + arrival.at_s - time.perf_counter()))
        answers.append(group.submit(arrival.tokens, arrival.new, stop_at_eos=False))
    tokens = [answer.result() for answer in answers]  # before their workers and records are looked at
    return [
        Served(arrival, answer.workers[-1], begin + arrival.at_s, answer.token_at, new, answer.record)
        for arrival, answer, new in zip(arrivals, answers, tokens, strict=True)
    ]


def offer_here(scheduler: Scheduler, arrivals: Sequence[Arrival]) -> list[Served]:
    """Serve requests in this process, at their times, until all have ended."""
    begin = time.perf_counter()
    waiting = list(reversed(arrivals))
    records: list[Record] = []
    while waiting or len(scheduler):
        while waiting and time.perf_counter() - begin >= waiting[-1].at_s:
            arrival = waiting.pop()
            records.append(scheduler.submit(f"{len(records)}", arrival.tokens, arrival.new, stop_at_eos=False))
        if not scheduler.step() and scheduler.is_waiting:
            time.sleep(IDLE_S)
    return [
        Served(arrival, 0, begin + arrival.at_s, record.token_at, record.tokens, record)
        for arrival, record in zip(arrivals, records, strict=True)
    ]


def run(
    workers: int = 2,
    router: str = "cost",
    store: str | None = None,
    requests: int = 64,
    rate: float = 8.0,
    metrics_port: int | None = None,
    metrics_address: str = "127.0.0.1",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Serve a skewed load with worker processes and a store that they share.

    Args:
        store: its URL; without one, a `redis-server` is started if there is one, else each worker has only its pages.
        requests, rate: how many, and how many a second.
        metrics_port, metrics_address: see `WorkerGroup`.
        say: gets a line with the addresses of the metrics, once all workers answer.

    Raises:
        KVLabError: a port is taken, the store does not answer, a worker did not start, or a request failed.
    """
    arrivals = skewed(requests, rate, prefix=PREFIX)
    told = "none: no redis-server was found, and no --store given; each worker has its pages only"
    with ExitStack() as stack:
        if store is not None:
            open_reachable(store).close()
            alone = store.startswith(("memory:", "fakeredis:"))
            told = "one in the memory of each worker: nothing is shared" if alone else "shared"
        elif shutil.which("redis-server"):
            store = stack.enter_context(RedisServer()).url
            told = "shared: a redis-server that was started for this run"
        begin = time.perf_counter()
        settings = WorkerSettings(store=store, pages=PAGES, host_bytes=HOST_BYTES)
        group = stack.enter_context(
            WorkerGroup(workers, settings, router=router, metrics_port=metrics_port, metrics_address=metrics_address)
        )
        ready_s = time.perf_counter() - begin
        if metrics_port:
            last = metrics_port + workers
            say(f"metrics: http://{metrics_address}:{metrics_port}/metrics (the group), {metrics_port + 1} to {last}")
        served = offer(group, arrivals)
    return {
        "about": ABOUT,
        "workers": table(served),
        "all": {
            "hit_rate": hit_rate(served),
            "imbalance": imbalance(served, workers),
            "tok_per_s": tokens_per_second(served),
            **latencies(served),
        },
        "router": router,
        "store": told,
        "ready_s": ready_s,
        "machine": describe_machine(),
    }


# --- summaries ----------------------------------------------------------------------------------
def sources(served: Iterable[Served]) -> Counter[str]:
    """Prompt tokens by where their KV came from."""
    total: Counter[str] = Counter()
    for request in served:
        if request.record is not None:
            total += request.record.sources
    return total


def hit_rate(served: Iterable[Served], near: bool = False) -> float:
    """Share of the prompt tokens whose KV was not computed.

    Args:
        near: count only what was on the worker's device or in its host memory, not what came from the store.
    """
    found = sources(served)
    hits = found["device"] + found["host"] + (0 if near else found["store"])
    return hits / found.total() if found.total() else 0.0


def work(served: Iterable[Served]) -> Counter[int]:
    """What each worker computed: prompt tokens, and `DECODE` for each token of an answer."""
    done: Counter[int] = Counter()
    for request in served:
        computed = request.record.sources["computed"] if request.record is not None else len(request.arrival.tokens)
        done[request.worker] += computed + DECODE * len(request.tokens)
    return done


def imbalance(served: Iterable[Served], workers: int) -> float:
    """The work of the busiest worker divided by the mean: 1 is best, `workers` the worst."""
    done = work(served)
    return max(done.values()) * workers / done.total()


def table(served: Sequence[Served]) -> list[dict[str, Any]]:
    """A row for each worker: its requests, and where the KV of their prompts came from, in tokens."""
    rows = []
    for worker in sorted({request.worker for request in served}):
        own = [request for request in served if request.worker == worker]
        found = sources(own)
        by_source = {source: found[source] for source in ("computed", "device", "host", "store")}
        rows.append(
            {"worker": worker, "requests": len(own), **by_source, "hit_rate": hit_rate(own), "work": work(own)[worker]}
        )
    return rows


def tokens_per_second(served: Sequence[Served]) -> float:
    """New tokens of all requests, by the time from the first arrival to the last token."""
    begin, end = min(s.arrived_at for s in served), max(s.token_at[-1] for s in served)
    return sum(len(s.tokens) for s in served) / (end - begin)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of all values do not exceed, interpolated."""
    if len(values) < 2:
        return values[0]
    return statistics.quantiles(values, n=1000, method="inclusive")[min(round(percent * 10), 999) - 1]


def latencies(served: Sequence[Served]) -> dict[str, float]:
    """TTFT and ITL in milliseconds, at the median and near the end."""
    ttft = [request.ttft_ms for request in served]
    itl = [gap for request in served for gap in request.itl_ms] or [0.0]
    return {
        "ttft_p50_ms": percentile(ttft, 50),
        "ttft_p95_ms": percentile(ttft, 95),
        "itl_p50_ms": percentile(itl, 50),
        "itl_p99_ms": percentile(itl, 99),
    }
