"""`bench simulate`: measured costs, and a load that is predicted and served."""

from __future__ import annotations

import json

import pytest

from kvlab.lab.bench import simulate as bench


def test_bench_simulate_reports_predicted_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COLD", ((16, 0), (128, 0), (256, 0), (512, 0)))
    monkeypatch.setattr(bench, "WARM", ((16, 256), (64, 512)))
    monkeypatch.setattr(bench, "BATCHES", (1, 2))
    monkeypatch.setattr(bench, "CONTEXTS", (64, 256))
    result = bench.run(loads=(0.5,), requests=12, rounds=1)
    (row,) = result["rows"]
    assert row["hit_rate_predicted"] == pytest.approx(row["hit_rate"], abs=0.1)
    for percent in (50, 95):
        measured, predicted = row[f"ttft_p{percent}_ms"], row[f"ttft_p{percent}_ms_predicted"]
        assert measured > 0 < predicted and row[f"ttft_p{percent}_ratio"] == pytest.approx(predicted / measured)
    assert all(cost >= 0 for cost in result["costs"].values()) and result["costs"]["prefill_token_s"] > 0
    assert json.loads(json.dumps(result)) == result
