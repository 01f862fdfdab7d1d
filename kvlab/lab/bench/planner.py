"""How close the planner comes to the best plan, on a virtual clock.

python -m kvlab bench planner --json

The times are real at one place: the prefill of the shipped model and the unpacking of a block are measured here.
From these and a bandwidth follow the curves of a world in which requests come one after the other. The planner
never sees the curves. It starts with nothing and sees the time of each step that it chose, with a random error of
10 %. After a third of the requests the wire becomes ten times slower, after two thirds computing does.

Regret is the time of the chosen plan divided by that of the best plan of any kind. Threshold rules, which fetch if
at least so many tokens are cached, are judged in the same cells: the 256 tokens of SGLang's HiCache, and for each
world and for all together the best threshold that somebody could have set who knew the curves.
"""

from __future__ import annotations

import itertools
import math
import random
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvlab.cache import DistributedKVCache
from kvlab.engine import generate
from kvlab.engine.pages import PagePool
from kvlab.engine.planner import Plan, Planner, Step
from kvlab.engine.tiers import TieredCache
from kvlab.lab.bench.ttft import model_for
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.timing import Timings, time_rounds
from kvlab.model import Tokenizer, held_out_tokens
from kvlab.stores import MemoryStore, RedisStore
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import RedisServer

ABOUT = (
    "rows: by phase (0 as begun, 1 the wire ten times slower, 2 computing ten times slower as well), bandwidth and "
    "cached tokens: milliseconds of fetching all, of computing all, of the planner's plans (mean), of the best plan; "
    "regret = planned / best. The first 24 requests of a phase are not counted. peers: regret of rules that fetch if "
    "at least so many tokens are cached, over the same cells. timed: requests to the real engine over a real Redis "
    "whose bandwidth a proxy limits; nothing without a redis-server"
)
PREFIXES = (128, 256, 512, 1024, 2048, 4096)
GBPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)  # gigabytes a second
SUFFIX, NOISE, WARM_UP, SLOWER = 16, 0.1, 24, 10.0
PEERS = {
    "SGLang HiCache (prefetch above 256 tokens)": 256,
    "LMCache (min_retrieve_tokens 0), llm-d (minCachedTokenDelta 1), Mooncake (ratio, nothing local): always fetch": 0,
    "llm-d, the value of its guide (minCachedTokenDelta 2048)": 2048,
    "never fetch": 1 << 30,
}
"""What other systems have as a default, read in their source or documents in November 2026: a number of tokens."""
TIMED = tuple(itertools.product((0.01, 0.02, 0.05, 0.1, 0.2), (512, 2048)))
TIMED_ROUNDS, TIMED_WARM_UP = 9, 45
ROUND_TRIP_S = 0.0003
THRESHOLDS = (0, *(n + 1 for n in PREFIXES))


@dataclass(frozen=True)
class Curves:
    """What was measured: seconds of a prefill by its length, and of unpacking a block.

    Attributes:
        call_s: what a prefill costs before its first token.
    """

    lengths: Sequence[int]
    seconds: Sequence[float]
    call_s: float
    unpack_s: float
    block_tokens: int
    block_bytes: int


@dataclass(frozen=True)
class World:
    """The curves of one wire and one load."""

    curves: Curves
    bytes_per_s: float
    slower: float = 1.0

    def fetch_s(self, blocks: int) -> float:
        """Seconds to fetch and unpack so many blocks."""
        each = self.curves.block_bytes / self.bytes_per_s + self.curves.unpack_s
        return ROUND_TRIP_S + blocks * each if blocks else 0.0

    def compute_s(self, start: int, stop: int) -> float:
        """Seconds to compute tokens behind `start` others: the difference of two prefills, and a call."""
        if stop <= start:
            return 0.0
        at = np.interp(
            [start, stop], [0, *self.curves.lengths], [0.0, *(s - self.curves.call_s for s in self.curves.seconds)]
        )
        return self.slower * (self.curves.call_s + float(at[1] - at[0]))

    def seconds(self, plan: Plan) -> float:
        """Seconds that a plan takes."""
        blocks = sum(step.stop - step.start for step in plan.fetches) // self.curves.block_tokens
        ahead = sum(self.compute_s(step.start, step.stop) for step in plan.front)
        return max(self.fetch_s(blocks), ahead) + sum(self.compute_s(step.start, step.stop) for step in plan.rest)

    def best_s(self, prefix: int) -> float:
        """Seconds of the best plan: every front and every end."""
        B, tokens = self.curves.block_tokens, prefix + SUFFIX
        ends = [self.compute_s(m * B, tokens) for m in range(prefix // B + 1)]
        fronts = [self.compute_s(0, k * B) for k in range(prefix // B + 1)]
        return min(max(self.fetch_s(m - k), fronts[k]) + end for m, end in enumerate(ends) for k in range(m + 1))

    def rule_s(self, prefix: int, threshold: int) -> float:
        """Seconds of a rule that fetches all if at least `threshold` tokens are cached, and else computes all."""
        B, tokens = self.curves.block_tokens, prefix + SUFFIX
        if prefix < threshold:
            return self.compute_s(0, tokens)
        return self.fetch_s(prefix // B) + self.compute_s(prefix, tokens)


def run(requests: int = 600) -> dict[str, Any]:
    """Measure the curves, let a planner learn in each world, and judge it and the threshold rules.

    Args:
        requests: in each world, a third for each phase.
    """
    curves, times = measure()
    return {
        "about": ABOUT,
        **judge(curves, requests),
        "timed": timed(),
        "prefill_ms": {str(n): 1000 * s for n, s in zip(curves.lengths, curves.seconds, strict=True)},
        "unpack_ms": 1000 * curves.unpack_s,
        "aa_ratio": times.aa_ratio,
        "noisy": times.noisy,
        "machine": describe_machine(),
        "versions": versions(),
    }


def judge(curves: Curves, requests: int, seed: int = 0) -> dict[str, Any]:
    """Let a planner learn in worlds of these curves; return its rows, its regrets and those of the threshold rules."""
    worlds = [phases(curves, gbps) for gbps in GBPS]
    rows = [row for gbps, world in zip(GBPS, worlds, strict=True) for row in _stream(gbps, world, requests, seed)]
    cells = [(world, prefix) for three in worlds for world in three for prefix in PREFIXES]
    hindsight = min(THRESHOLDS, key=lambda threshold: _spread(_regrets(cells, lambda _: threshold))["p95_regret"])
    regrets = [row["regret"] for row in rows]
    return {
        "rows": rows,
        "within_1.1": sum(regret <= 1.1 for regret in regrets) / len(regrets),
        **_spread(regrets),
        "peers": {
            **{name: _spread(_regrets(cells, lambda _, n=n: n)) for name, n in PEERS.items()},  # type: ignore[misc]
            f"the best for all worlds in hindsight, {hindsight} tokens": _spread(_regrets(cells, lambda _: hindsight)),
            "the best for each world in hindsight": _spread(_regrets(cells, _best_threshold)),
        },
    }


def measure(rounds: int = 5) -> tuple[Curves, Timings]:
    """Measure prefill and unpacking of the shipped model, FP32 records."""
    model, text = model_for(PREFIXES[-1] + SUFFIX), held_out_tokens(Tokenizer())
    lengths = [n + SUFFIX for n in PREFIXES]
    text = text * (1 + lengths[-1] // len(text))
    B = 64
    with (
        torch.inference_mode(),
        DistributedKVCache(store=MemoryStore(), model=model, precision="fp32", compress=False) as cache,
    ):
        kv, out = model.new_kv(8 * B), model.new_kv(8 * B)[:, :, 0]
        model(torch.tensor([text[: 8 * B]]), kv, last_only=True)
        cache.save(text[: 8 * B], kv[:, :, 0])
        work: dict[str, Callable[[], object]] = {
            str(n): lambda n=n: model(torch.tensor([text[:n]]), model.new_kv(n), last_only=True)  # type: ignore[misc]
            for n in (SUFFIX, *lengths)
        }
        work["unpack"] = lambda: cache.load(text[: 8 * B], 0, 8 * B, out)
        times = time_rounds(work, rounds)
        bytes_each = cache.stats().bytes_written // 8
    call_s = times.median_ms(str(SUFFIX)) / 1000
    seconds = [times.median_ms(str(n)) / 1000 for n in lengths]
    return Curves(lengths, seconds, call_s, times.median_ms("unpack") / 8000, B, bytes_each), times


def timed(cells: Sequence[tuple[float, int]] = TIMED, rounds: int = TIMED_ROUNDS) -> list[dict[str, Any]]:
    """Let planners serve real requests over real wires of these bandwidths; return what they predicted and measured.

    Returns:
        For each cell the median of the predictions, the median of the times, and their distance from the fastest to
        the slowest. Nothing without a `redis-server`.
    """
    if shutil.which("redis-server") is None:
        return []
    model, text = model_for(PREFIXES[-1]), held_out_tokens(Tokenizer())
    pool = PagePool(model, (max(n for _, n in cells) + SUFFIX) // 16 + 2)
    rows = []
    with RedisServer() as server, FaultProxy(server.port) as proxy:
        for gbps in sorted({gbps for gbps, _ in cells}):
            proxy.bandwidth = 1e9 * gbps
            inner = DistributedKVCache(
                store=RedisStore(proxy.url, deadline_s=60.0), model=model, precision="fp16", compress=False
            )
            with TieredCache(inner, 0) as cache:

                def plan_of(prefix: int, cache: TieredCache = cache) -> Plan:
                    plan = generate(model, text[: prefix + SUFFIX], 1, cache, pool=pool).plan
                    assert plan is not None
                    return plan

                lengths = [n for g, n in cells if g == gbps]
                for number in range(TIMED_WARM_UP):
                    plan_of([64, *lengths][number % (len(lengths) + 1)])
                for prefix in lengths:
                    rows.append(_timed_row(gbps, prefix, [plan_of(prefix) for _ in range(rounds)]))
    return rows


def _timed_row(gbps: float, prefix: int, plans: Sequence[Plan]) -> dict[str, Any]:
    took = [1000 * plan.took_s for plan in plans]
    predicted = 1000 * statistics.median(plan.predicted_s for plan in plans)
    return {
        "gbps": gbps,
        "prefix_tokens": prefix,
        "predicted_ms": predicted,
        "measured_ms": statistics.median(took),
        "spread_ms": max(took) - min(took),
        "within_spread": min(took) <= predicted <= max(took),
        "chosen": plans[-1].why,
    }


def phases(curves: Curves, gbps: float) -> tuple[World, World, World]:
    """Return the world as it begins, with a slower wire, and with slower computing as well."""
    wire = 1e9 * gbps
    return World(curves, wire), World(curves, wire / SLOWER), World(curves, wire / SLOWER, SLOWER)


def _stream(gbps: float, worlds: Sequence[World], requests: int, seed: int) -> list[dict[str, Any]]:
    """Let one planner serve requests in the three phases; return a row for each phase and prefix."""
    B, rng = worlds[0].curves.block_tokens, random.Random(seed + round(1e4 * gbps))
    planner, rows = Planner(B), []
    for phase, world in enumerate(worlds):
        took: dict[int, list[float]] = {prefix: [] for prefix in PREFIXES}
        for number in range(requests // len(worlds)):
            prefix = rng.choice(PREFIXES)
            plan = planner.plan(["store"] * (prefix // B), prefix + SUFFIX)
            _observe(planner, world, plan, rng)
            if number >= WARM_UP:
                took[prefix].append(world.seconds(plan))
        for prefix, seconds in took.items():
            if not seconds:
                continue
            planned, best = statistics.fmean(seconds), world.best_s(prefix)
            rows.append(
                {
                    "phase": phase,
                    "gbps": gbps,
                    "prefix_tokens": prefix,
                    "fetch_ms": 1000 * world.rule_s(prefix, 0),
                    "recompute_ms": 1000 * world.rule_s(prefix, prefix + 1),
                    "planned_ms": 1000 * planned,
                    "best_ms": 1000 * best,
                    "regret": planned / best,
                }
            )
    return rows


def _observe(planner: Planner, world: World, plan: Plan, rng: random.Random) -> None:
    """Tell the planner what the steps of a plan took, with a random error."""

    def seen(seconds: float) -> float:
        return seconds * max(rng.gauss(1, NOISE), 0.1)

    steps: tuple[Step, ...] = (*plan.front, *plan.rest)
    for step in steps:
        planner.computed(step.start, step.stop, seen(world.compute_s(step.start, step.stop)))
    blocks = sum(step.stop - step.start for step in plan.fetches) // world.curves.block_tokens
    planner.fetched("store", blocks, seen(world.fetch_s(blocks)))
    planner.finished(plan, seen(world.seconds(plan)))
    if plan.probe is not None:
        planner.fetched("store", 1, seen(world.fetch_s(1)))


def _best_threshold(world: World) -> int:
    return min(THRESHOLDS, key=lambda threshold: max(world.rule_s(n, threshold) / world.best_s(n) for n in PREFIXES))


def _regrets(cells: Sequence[tuple[World, int]], threshold: Callable[[World], int]) -> list[float]:
    return [world.rule_s(prefix, threshold(world)) / world.best_s(prefix) for world, prefix in cells]


def _spread(regrets: Sequence[float]) -> dict[str, float]:
    ordered = sorted(regrets)
    return {"p95_regret": ordered[math.ceil(0.95 * len(ordered)) - 1], "max_regret": ordered[-1]}
