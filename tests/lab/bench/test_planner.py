"""`bench planner`: the planner's regret on curves without a measurement, and that the judge is no friend of it."""

from __future__ import annotations

import itertools
import json

import pytest

from kvlab.engine.planner import Plan, Step
from kvlab.lab.bench import planner as bench
from kvlab.lab.bench.planner import PREFIXES, SUFFIX, Curves, World


def smooth(bump: float = 0.0) -> Curves:
    """Curves of the shape that was measured; with a bump they are not those that the planner fits."""
    lengths = [n + SUFFIX for n in PREFIXES]
    seconds = [(5 + 0.08 * n + 1.2e-5 * n * n) / 1000 * (1 + bump * (-1) ** i) for i, n in enumerate(lengths)]
    return Curves(lengths, seconds, 0.005, 0.0001, 64, 393_344)


@pytest.mark.slow
@pytest.mark.parametrize("bump", [0.0, 0.1])
def test_the_planner_is_near_the_best_plan_and_better_than_any_threshold(bump: float) -> None:
    result = bench.judge(smooth(bump), requests=600)
    assert len(result["rows"]) == 3 * len(bench.GBPS) * len(PREFIXES)
    assert result["within_1.1"] >= 0.95 and result["max_regret"] <= 1.25
    assert all(row["regret"] >= 0.999 for row in result["rows"]), "nothing is better than the best"
    assert all(result["p95_regret"] < peer["p95_regret"] for peer in result["peers"].values())
    json.dumps(result)


def test_the_best_plan_is_the_best_of_all_fronts_and_ends() -> None:
    world = World(smooth(), 1e8)
    B, prefix = 64, 512
    times = []
    for k, m in itertools.combinations_with_replacement(range(prefix // B + 1), 2):
        ahead = (Step(0, k * B),) if k else ()
        fetch = (Step(k * B, m * B, "store"),) if m > k else ()
        times.append(world.seconds(Plan(ahead, fetch, (Step(m * B, prefix + SUFFIX),), 0.0, "")))
    assert world.best_s(prefix) == pytest.approx(min(times))
    assert world.best_s(prefix) < min(world.rule_s(prefix, 0), world.rule_s(prefix, prefix + 1))


def test_a_slower_wire_and_slower_computing_are_slower() -> None:
    begin, wire, both = bench.phases(smooth(), 0.1)
    assert wire.fetch_s(8) > 9 * begin.fetch_s(8) and wire.compute_s(0, 512) == begin.compute_s(0, 512)
    assert both.compute_s(0, 512) == pytest.approx(10 * begin.compute_s(0, 512))


@pytest.mark.redis
def test_real_requests_over_a_real_wire_are_predicted_and_timed() -> None:
    rows = bench.timed([(0.2, 128), (0.2, 256)], rounds=2)
    assert [(row["gbps"], row["prefix_tokens"]) for row in rows] == [(0.2, 128), (0.2, 256)]
    assert all(row["predicted_ms"] > 0 and row["measured_ms"] > 0 for row in rows)
    json.dumps(rows)
