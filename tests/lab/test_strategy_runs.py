"""Runs of the strategies: one small real run, and the tables from results that are made by hand."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvlab.engine.requests import Record
from kvlab.errors import InputError
from kvlab.lab import strategies, strategy_runs, tables
from kvlab.lab.calibrate import Calibrated
from kvlab.lab.costs import Costs
from kvlab.lab.serving import Arrival, Served
from kvlab.lab.strategies import MADE, PAIRS, STRATEGIES
from kvlab.lab.strategy_runs import Cell, run

SLOW = Costs(kv_bytes=6144, prefill_token_s=1e-4, step_s=3e-3, batch=4)
NAMES = [strategy.name for strategy in STRATEGIES]
SMALL = {"structured": {"requests": 8, "scale": 0.2, "templates": 2}, "chat": {"sessions": 2, "scale": 0.1}}


@pytest.fixture
def predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of small loads, predicted from costs that were not measured."""
    monkeypatch.setattr(strategies, "calibrate", lambda settings, workers: Calibrated(SLOW, SLOW))
    for kind, made in SMALL.items():
        monkeypatch.setitem(MADE, kind, made)
    monkeypatch.setattr(strategies, "AT_SCALE", {"structured": {"requests": 10, "scale": 0.2}})
    monkeypatch.setattr(strategy_runs, "computed", lambda: strategies.computed(kinds=["structured"]))
    file = tmp_path / "predicted.json"
    file.write_text(json.dumps(strategies.predict(1, [*SMALL])), "utf-8")
    return file


@pytest.mark.redis
def test_all_strategies_serve_the_loads_that_were_predicted(predictions: Path) -> None:
    result = run(str(predictions))
    assert [(row["workload"], row["strategy"]) for row in result["rows"]] == [(k, n) for k in SMALL for n in NAMES]
    for row in result["rows"]:
        assert row["requests"] > 0 < row["tok_per_s"] and row["latency_p50_ms"] >= row["ttft_p50_ms"] > 0
        low, high = row["ttft_p50_ms_interval"]
        assert low <= row["ttft_p50_ms"] <= high and len(row["ttft_ms_by_percent"]) == 19
        assert set(row["hit_rate"]) == {"blocks", "tokens", "full_blocks", "requests", "device", "host", "store"}
        assert row["ttft_p99_ms"] is None, "of a few requests nothing can be said about one in a hundred"
        written, read = row["bytes"]["written"], row["bytes"]["read"]
        assert (written > 0) == (row["strategy"] in ("redis", "full")) and (read == 0 or written > 0)
        assert row["other_answers"] <= 1, "the model says the same alone and in a batch"
    by_name = {row["strategy"]: row for row in result["rows"] if row["workload"] == "structured"}
    assert by_name["no cache"]["hit_rate"]["tokens"] == 0 == by_name["no cache"]["time_saved_s"]
    assert by_name["full"]["hit_rate"]["tokens"] > 0.3
    redis = by_name["redis"]
    assert redis["hit_rate"]["store"] > 0 < redis["bytes"]["read"], "workers find what others have computed"
    assert tables.text(result)
    assert len(result["order"]) == len(SMALL) * len(PAIRS) * 3 and len(result["computed"]) == len(NAMES)
    for row in result["predicted"]:
        tokens = row["tok_per_s"]
        assert tokens["ratio"] == pytest.approx(tokens["predicted"] / tokens["measured"])
        assert row["slower"] > 0
    assert json.loads(json.dumps(result)) == result


def test_predictions_of_other_loads_are_refused(predictions: Path) -> None:
    content = json.loads(predictions.read_text("utf-8"))
    content["loads"][0]["working_set"] += 1
    predictions.write_text(json.dumps(content), "utf-8")
    with pytest.raises(InputError, match="the loads that were predicted, got another one of structured, 0"):
        run(str(predictions))


@pytest.mark.parametrize("content", [None, "", "[]", '{"loads": []}', "{"])
def test_a_file_without_predictions_is_refused(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "predicted.json"
    if content is not None:
        file.write_text(content, "utf-8")
    with pytest.raises(InputError, match=r"a file with predictions, got .*predicted.json"):
        run(str(file))


# --- tables -------------------------------------------------------------------------------------
def cell(ttft_s: float, tok_per_s: float, strategy: int = 0, requests: int = 30, **sources: int) -> Cell:
    """A cell in which each request of 128 tokens has its first token after so long, and its last a second later."""
    made = Cell(STRATEGIES[strategy], "chat", 64)
    for number in range(requests):
        record = Record("r", 128, sources=Counter(sources or {"computed": 128}))
        arrival = Arrival(float(number), [1] * 128, 2, number % 5)
        made.served.append(Served(arrival, 0, 10.0, [10.0 + ttft_s, 11.0 + ttft_s], [7, 7], record))
        made.groups.append((0, number % 5))
    made.bursts = [0.9 * tok_per_s, tok_per_s, 1.2 * tok_per_s]
    made.usd = [(1.0, 2.0, 3.0), (1.0, 4.0, 9.0), (2.0, 3.0, 5.0)]
    made.paces = [0.1, 0.1]
    return made


def test_a_row_has_medians_of_rounds_and_latencies_from_the_arrival() -> None:
    bare, found = cell(0.5, 100), cell(0.2, 150, 3, device=64, store=63, computed=1)
    row = strategy_runs._row(found, bare, 0.1)
    assert (row["tok_per_s"], row["tok_per_s_interval"]) == (150, [135, 180])
    assert row["ttft_p50_ms"] == pytest.approx(200) and row["latency_p95_ms"] == pytest.approx(1200)
    assert row["time_saved_s"] == pytest.approx(30 * 0.3)
    assert (row["usd_per_mtok"], row["usd_per_mtok_band"]) == (3.0, [1.0, 5.0])
    assert row["hit_rate"] == {
        "blocks": 1, "tokens": 1, "full_blocks": 1, "requests": 1, "device": 0.5, "host": 0, "store": 0.5,
    }  # fmt: skip
    assert not row["noisy"]


def test_a_cell_is_noisy_if_the_machine_was_slower_beside_it() -> None:
    made = cell(0.5, 100)
    assert strategy_runs._row(made, made, 0.1)["noisy"] is False
    made.paces.append(0.112)
    assert strategy_runs._row(made, made, 0.1)["noisy"] is True


def test_p99_is_said_of_a_thousand_requests() -> None:
    many = cell(0.5, 100, requests=1000)
    assert strategy_runs._row(many, many, 0.1)["ttft_p99_ms"] == pytest.approx(500)


def ordered(slow: Cell, fast: Cell) -> dict[tuple[str, str, str], dict[str, Any]]:
    poor = {("chat", name): replace(slow, strategy=STRATEGIES[i]) for i, name in enumerate(NAMES)}
    rows = strategy_runs._order("chat", poor | {("chat", "full"): fast})
    return {(row["from"], row["to"], row["metric"]): row for row in rows}


def test_the_order_says_better_worse_or_nothing() -> None:
    rows = ordered(cell(0.4, 100), cell(0.2, 90, 3))
    assert rows["redis", "full", "ttft_p50_ms"]["said"] == "better"
    assert rows["no cache", "full", "ttft_p95_ms"]["times_better"] == pytest.approx(2)
    assert rows["redis", "full", "tok_per_s"]["said"] == "worse"
    assert {row["ends"] for row in rows.values() if row["metric"] == "tok_per_s"} == {"rounds"}
    assert rows["no cache", "local pages", "tok_per_s"]["said"] == "no difference shown"
    assert rows["local pages", "redis", "ttft_p50_ms"]["times_better"] == pytest.approx(1)


def test_a_prediction_is_within_a_fifth_in_both_numbers_or_not() -> None:
    row = {"strategy": "full", "workload": "chat", "tok_per_s": 118, "ttft_p50_ms": 590.0, "ttft_p95_ms": 9.0}
    row["hit_rate"] = {"tokens": 0.5}
    good = strategy_runs._compared(row, cell(0.5, 100))
    assert good["within"] and good["ttft_p50_ms"]["ratio"] == pytest.approx(1.18)
    assert not strategy_runs._compared({**row, "tok_per_s": 121}, cell(0.5, 100))["within"]
    assert not strategy_runs._compared({**row, "ttft_p50_ms": 390}, cell(0.5, 100))["within"]
