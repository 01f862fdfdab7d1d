"""Laws that a simulator of a cache must keep, whatever its numbers are. A broken one means that it cannot be trusted.

A simulator is hard to test by its results, because nobody knows them before. But how two results compare is known:
more hits never make a request wait longer, a cache of no blocks is no cache, twice the bandwidth is never slower. A
well-known simulator broke one of these: its cache size changed the hit rate from .077 to .367 and no latency at all
(BLIS, pull request 1702).

The laws that compare single requests hold for requests of one new token on fixed nodes. With more, a request that
begins sooner generates beside another one's prefill and slows it down, in reality too; then the means are compared.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

from kvlab.errors import KVLabError
from kvlab.lab.costs import Costs, Link
from kvlab.lab.replay import Setup, replay
from kvlab.lab.simulate import Simulated, simulate
from kvlab.lab.traces import Request

Simulate = Callable[..., Simulated]
"""As `simulate`."""
B: Final = 32
WORLDS: Final = 12
EPSILON: Final = 1e-9
COSTS: Final = Costs(
    kv_bytes=1000,
    prefill_s=1e-3,
    prefill_token_s=1e-4,
    prefill_past_s=1e-6,
    prefill_pair_s=1e-7,
    step_s=2e-3,
    step_request_s=3e-4,
    step_token_s=1e-7,
    chunk=128,
    batch=8,
    host=Link(1e-4, 1e8),
    store=Link(1e-3, 2e7),
)


class LawBroken(KVLabError):
    """A simulator breaks a law."""


def requests(seed: int, count: int = 80, shared: float = 0.7, new: int = 1, per_second: float = 20.0) -> list[Request]:
    """Requests at random times. With a larger `shared`, each has more in common with an earlier one, or as much.

    All else is the same for the same seed: times and lengths.
    """
    rng, fresh = random.Random(seed), itertools.count()
    made: list[Request] = []
    at = 0.0
    for _ in range(count):
        at += rng.expovariate(per_second)
        size, other, share = rng.randint(1, 30), rng.randrange(max(1, len(made))), rng.random()
        tokens = size * B - rng.randrange(B)
        before = made[other].blocks if made else []
        kept = before[: int(min(len(before), size) * shared * share)]
        blocks = [*kept, *itertools.islice(fresh, size - len(kept))]
        made.append(Request(at, tokens, new, blocks))
    return made


def worlds(new: int = 1) -> Iterator[tuple[list[Request], Setup]]:
    """Small worlds that differ in all that a law should not depend on."""
    for seed in range(WORLDS):
        setup = Setup(
            device=(20, 200, None)[seed % 3],
            host=(None, 100)[seed % 2],
            mode=("inclusive", "exclusive")[seed % 2 and seed // 2 % 2],
            store=(None, 1000, 50)[seed // 3 % 3],
            nodes=1 + seed % 4,
        )
        yield requests(seed, per_second=(5.0, 20.0, 60.0)[seed % 3], new=new), setup


def check_off_is_nothing(simulate: Simulate = simulate) -> None:
    """Tiers without room are the same as no tiers, and both as requests that have nothing in common."""
    for seed in range(WORLDS):
        some, none = requests(seed, new=5), requests(seed, shared=0.0, new=5)
        without = simulate(none, B, Setup(nodes=2), COSTS).ttft_s
        for setup in (Setup(device=0, nodes=2), Setup(device=0, host=0, store=0, nodes=2)):
            _expect(simulate(some, B, setup, COSTS).ttft_s == without, "a cache of no blocks is no cache")


def check_hits_never_cost(simulate: Simulate = simulate) -> None:
    """Requests that have more in common do not wait longer, and those that share long prefixes wait less."""
    for seed in range(WORLDS):
        for new in (1, 12):
            less, more = (
                simulate(requests(seed, shared=shared, new=new), B, Setup(), COSTS).ttft_s for shared in (0.4, 0.95)
            )
            _expect(sum(more) < sum(less), "more hits save time")
            if new == 1:
                _expect_never_later(more, less, "more hits never cost time")


def check_bandwidth_never_costs(simulate: Simulate = simulate) -> None:
    """With twice the bandwidth, to the host or to the store, no request waits longer, and some wait less.

    It holds where all are admitted when they come. Else who is admitted sooner may look for a block too early.
    """
    for link in ("host", "store"):
        path: Link = getattr(COSTS, link)
        changed: dict[str, Any] = {link: Link(path.latency_s, 2 * path.bytes_per_s)}
        faster, saved = replace(COSTS, **changed), 0.0
        for made, setup in worlds():
            before, after = (simulate(made, B, setup, costs, plan=False).ttft_s for costs in (COSTS, faster))
            _expect_never_later(after, before, f"twice the bandwidth of the {link} is never slower")
            saved += sum(before) - sum(after)
        _expect(saved > 0, f"the bandwidth of the {link} matters")


def check_hits_change_latency(simulate: Simulate = simulate) -> None:
    """Another capacity changes the latencies if it changes the hits, and only then."""
    for seed in range(WORLDS):
        made = requests(seed, new=5)
        results = [simulate(made, B, Setup(device=device), COSTS) for device in (10, 40, 160, 640, 2560, 5120)]
        for small, large in itertools.pairwise(results):
            same = [job.found for job in small.jobs] == [job.found for job in large.jobs]
            _expect(same == (small.ttft_s == large.ttft_s), "latencies change if and only if hits do")


def check_time_scales(simulate: Simulate = simulate) -> None:
    """If everything takes twice as long and comes half as often, all waits double: no time is built in."""
    for made, setup in worlds(new=7):
        slow = [replace(request, at_s=2 * request.at_s) for request in made]
        before, after = simulate(made, B, setup, COSTS).ttft_s, simulate(slow, B, setup, COSTS.times(2)).ttft_s
        _expect(all(abs(2 * a - b) < EPSILON for a, b in zip(before, after, strict=True)), "times scale together")


def check_alone_is_exact(simulate: Simulate = simulate) -> None:
    """A request that meets no other one takes its fetches and its prefill, to the last digit."""
    setup = Setup(device=30, host=30, store=1000, nodes=1)
    made = requests(0, per_second=0.1, new=4)
    made.append(replace(made[-1], at_s=made[-1].at_s + 10))  # all of it is there
    for job in simulate(made, B, setup, COSTS, plan=False).jobs:
        device, host, store = job.found
        tokens, size = job.request.tokens, COSTS.kv_bytes * B
        past = min((device + host + store) * B, tokens - 1)
        waits = [0.0]
        for link, first, blocks in ((COSTS.host, device, host), (COSTS.store, device + host, store)):
            carried = min(blocks * size, COSTS.kv_bytes * (tokens - first * B))
            waits.append(link.latency_s + carried / link.bytes_per_s if blocks else 0.0)
        expected = max(waits) + COSTS.prefill(tokens - past, past)
        _expect(abs(job.ttft_s - expected) < EPSILON, f"alone, a request takes {expected:.6f} s, got {job.ttft_s:.6f}")


def check_queue(simulate: Simulate = simulate) -> None:
    """Requests of one length that come at random wait as long as queueing theory says.

    With arrivals at rate r and a service of s seconds, u = r s, the mean wait is u s / (2 (1 - u)).
    Source: the Pollaczek-Khinchine formula for an M/D/1 queue.
    """
    rng, at, made = random.Random(0), 0.0, []
    service = COSTS.prefill(4 * B, 0)
    for number in range(20_000):
        at += rng.expovariate(0.7 / service)
        made.append(Request(at, 4 * B, 1, range(4 * number, 4 * number + 4)))
    waits = [ttft - service for ttft in simulate(made, B, Setup(), COSTS).ttft_s]
    expected, got = 0.7 * service / (2 * 0.3), sum(waits) / len(waits)
    _expect(abs(got / expected - 1) < 0.1, f"a queue at 70 % waits {expected:.4f} s in the mean, got {got:.4f}")


def check_replay_agrees(simulate: Simulate = simulate) -> None:
    """On one node without a store, time changes no hit: the requests are computed in the order of a replay."""
    for made, setup in worlds(new=9):
        alone = replace(setup, nodes=1, store=None)
        got, expected = simulate(made, B, alone, COSTS).hits.by_source, replay(made, B, alone).hits.by_source
        _expect(got == expected, f"the hits are those of a replay: {dict(expected)}, got {dict(got)}")


def check_work_is_kept(simulate: Simulate = simulate) -> None:
    """Without answers, each node works for exactly as long as its prefills take, and on one at a time."""
    for made, setup in worlds():
        result = simulate(made, B, setup, COSTS)
        for node, busy in enumerate(result.busy_s):
            jobs = [job for job in result.jobs if job.node == node]
            times = [COSTS.prefill(job.compute, job.past) for job in jobs]
            _expect(abs(busy - sum(times)) < EPSILON, f"node {node} works {sum(times):.6f} s, got {busy:.6f}")
            for (one, time), other in zip(zip(jobs, times, strict=True), jobs[1:], strict=False):
                begin = other.first_at - COSTS.prefill(other.compute, other.past)
                _expect(one.first_at <= begin + EPSILON and time > 0, "one prefill at a time, in order")


LAWS: Final[dict[str, Callable[[Simulate], None]]] = {
    "off is nothing": check_off_is_nothing,
    "hits never cost": check_hits_never_cost,
    "bandwidth never costs": check_bandwidth_never_costs,
    "hits change latency": check_hits_change_latency,
    "time scales": check_time_scales,
    "alone is exact": check_alone_is_exact,
    "queue": check_queue,
    "replay agrees": check_replay_agrees,
    "work is kept": check_work_is_kept,
}
"""All laws by name. Each raises `LawBroken` for a simulator that breaks it."""


def _expect(kept: bool, law: str) -> None:
    if not kept:
        raise LawBroken(f"a law is broken: {law}")


def _expect_never_later(after: list[float], before: list[float], law: str) -> None:
    for number, (a, b) in enumerate(zip(after, before, strict=True)):
        _expect(a <= b + EPSILON, f"{law}; request {number} waits {a:.6f} s after {b:.6f} s")
