"""Strategies and their loads: the same memory in reality and in the simulator, and predictions from given costs."""

from __future__ import annotations

from typing import Any

import pytest

from kvlab.engine import generate
from kvlab.errors import InputError
from kvlab.lab import strategies as module
from kvlab.lab.calibrate import Calibrated
from kvlab.lab.conversations import Turn
from kvlab.lab.costs import Costs
from kvlab.lab.prices import VM
from kvlab.lab.strategies import (
    STRATEGIES,
    Load,
    computed,
    light_speed,
    make_load,
    predicted_row,
    simulated,
    usd_per_mtok,
)
from kvlab.model import load_model

NAMES = [strategy.name for strategy in STRATEGIES]
SLOW = Costs(kv_bytes=6144, prefill_token_s=1e-3, step_s=1e-3, batch=4)
BOTH = Calibrated(SLOW, SLOW)


def load(requests: int = 12, prompt: int = 200, groups: int = 3) -> Load:
    """Requests of groups with the same first 128 tokens, one a second."""
    turns = []
    for number in range(requests):
        group = number % groups
        tokens = [
            *range(1000 * group, 1000 * group + 128),
            *range(9000 + 100 * number, 9000 + 100 * number + prompt - 128),
        ]
        turns.append(Turn(float(number), tokens, [1] * 10, number, 0))
    return Load("structured", 0, turns, 64, 6144)


def test_a_worker_has_the_same_memory_in_reality_and_in_the_simulator() -> None:
    made = load(requests=400, groups=100)
    assert made.working_set == 100 * 2 + 400, "two blocks of each group, and one of each request"
    assert (made.pool_blocks, made.host_blocks, made.store_blocks) == (60, 180, 600)
    for strategy in STRATEGIES:
        settings, setup = strategy.settings(made, "redis://here"), strategy.setup(made)
        assert settings.pages * 16 == made.pool_blocks * 64, "without a cache too: requests need them"
        assert setup.device == (settings.pages * 16 // 64 if strategy.pages else 0)
        assert settings.host_bytes == (setup.host or 0) * 64 * 6144
        assert (settings.store is None) == (setup.store is None) == (not strategy.redis)
        assert setup.router == strategy.router and setup.nodes == 2
        assert settings.prefix_caching == (strategy.name != "no cache")


def test_a_small_pool_still_holds_the_longest_request() -> None:
    assert load().pool_blocks == 2048 // 64 + 1


def test_arrivals_are_faster_by_the_speed_and_all_at_once_in_a_burst() -> None:
    made = load(4)
    assert [a.at_s for a in made.arrivals(2.0)] == [0, 0.5, 1, 1.5] == [r.at_s for r in made.requests(2.0)]
    assert [a.at_s for a in made.arrivals(float("inf"))] == [0] * 4
    assert [(a.tokens, a.new, a.group) for a in made.arrivals(1.0)] == [
        (turn.tokens, 10, turn.session) for turn in made.turns
    ]


def test_a_light_load_is_half_of_what_can_be_served_without_a_cache() -> None:
    made = load(40)
    speed = light_speed(made, BOTH)
    burst = simulated(made, STRATEGIES[0], SLOW, float("inf"))
    assert speed == pytest.approx(0.5 * 40 / burst.seconds), "one comes each second"


def test_richer_strategies_find_more_in_a_simulation() -> None:
    made = load(60, groups=12)
    rates = [predicted_row(strategy, [(made, 1.0)], BOTH)["hit_rate"]["tokens"] for strategy in STRATEGIES]
    assert rates[0] == 0 < rates[1] <= rates[2] <= rates[3]
    assert rates[3] == pytest.approx((60 - 12) * 128 / (60 * 200))


def test_a_predicted_row_has_the_numbers_of_its_simulations() -> None:
    made = load(8)
    row = predicted_row(STRATEGIES[0], [(made, 0.01), (made, 0.01)], BOTH)
    assert row["ttft_p50_ms"] == pytest.approx(200) and row["latency_p50_ms"] == pytest.approx(209)
    burst = simulated(made, STRATEGIES[0], SLOW, float("inf"))
    assert row["tok_per_s"] == pytest.approx(80 / burst.seconds)
    assert row["hit_rate"] == dict.fromkeys(row["hit_rate"], 0)


def test_a_prediction_measures_first_and_names_its_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def calibrate(settings: Any, workers: int) -> Calibrated:
        asked.append(settings.store)
        return BOTH

    monkeypatch.setattr(module, "calibrate", calibrate)
    monkeypatch.setattr(module, "RedisServer", FakeServer)
    monkeypatch.setattr(module, "MADE", {"structured": {"requests": 6, "scale": 0.1}})
    result = module.predict(2, ["structured"])
    assert asked == ["redis://fake", None]
    assert [(told["workload"], told["seed"], told["requests"]) for told in result["loads"]] == [
        ("structured", 0, 6), ("structured", 1, 6),
    ]  # fmt: skip
    assert [row["strategy"] for row in result["rows"]] == NAMES
    assert set(result["costs"]) == {"without a store", "with a store"}
    for told in result["loads"]:
        assert told["per_second"] > 0 < told["working_set"]


class FakeServer:
    """Nothing that could be asked."""

    url = "redis://fake"

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_answers_of_conversations_are_those_of_the_model() -> None:
    model = load_model()
    made = make_load("chat", 0, model, sessions=2, scale=0.2)
    assert made.turns
    for turn in made.turns:
        assert turn.answer == generate(model, turn.tokens, len(turn.answer), stop_at_eos=False).tokens


def test_money_counts_the_machine_and_the_memory_of_redis() -> None:
    made = load(400, groups=100)
    bare, redis = (usd_per_mtok(1000.0, strategy, made, VM) for strategy in (STRATEGIES[0], STRATEGIES[-1]))
    assert bare == pytest.approx([usd / 3.6 for usd in (VM.low, VM.value, VM.high)])
    assert all(a < b < 1.2 * a for a, b in zip(bare, redis, strict=True)), "a quarter of a GiB is cheap"
    assert usd_per_mtok(2000.0, STRATEGIES[0], made, VM)[1] == pytest.approx(bare[1] / 2)


def test_a_model_that_is_not_here_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_SCALE", {"structured": {"requests": 20, "scale": 0.2, "templates": 2}})
    rows = computed(kinds=["structured"])
    assert [row["strategy"] for row in rows] == NAMES
    assert rows[-1]["tok_per_s"] >= rows[0]["tok_per_s"] > 0
    low, high = rows[0]["usd_per_mtok_band"]
    assert low < rows[0]["usd_per_mtok"] < high


def test_unknown_and_empty_workloads_are_refused() -> None:
    with pytest.raises(InputError, match="one of the workloads agentic, chat, structured, unique, got 'poems'"):
        make_load("poems", 0, load_model())
    with pytest.raises(InputError, match="with requests, got none of chat"):
        Load("chat", 0, [], 64, 6144)
