"""`bench routers`: what its rows say, on a small trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvlab.lab.bench import routers
from kvlab.lab.routers import ROUTERS
from kvlab.lab.traces import write


def test_bench_routers_reports_every_router_and_index(tmp_path: Path) -> None:
    made = routers.made()[:150]
    write(made, tmp_path / "t.jsonl", routers.BLOCK_TOKENS)
    result = routers.run(str(tmp_path / "t.jsonl"), speeds=(1.0, 2.0), sizes=(1, 20))
    assert [row["router"] for row in result["untimed"]] == list(ROUTERS)
    assert [(row["speed"], row["router"]) for row in result["routers"]] == [
        (speed, name) for speed in (1.0, 2.0) for name in ROUTERS
    ]
    assert {row["speed"] for row in result["indexes"]} == {2.0}
    assert {row["index"] for row in result["indexes"]} == {
        *("exact", "sent", "events", "events, faulty", "naive", "naive, faulty"),
    }
    exact = {row["router"]: row for row in result["indexes"] if row["index"] == "exact"}
    assert exact["cost"] == next(r for r in result["routers"] if r["speed"] == 2.0 and r["router"] == "cost")
    for row in (*result["untimed"], *result["routers"], *result["indexes"]):
        assert 0 <= row["hit_rate"] <= result["pool"] and 1 <= row["imbalance"] <= routers.NODES
    assert [(row["nodes"], row["requests"]) for row in result["scaling"]] == [
        *((1, 38), (1, 75), (1, 150), (20, 38), (20, 75), (20, 150)),
    ]
    assert json.loads(json.dumps(result)) == result


def test_made_requests_come_as_often_as_those_of_the_trace() -> None:
    made = routers.made()
    assert len(made) / made[-1].at_s == pytest.approx(3.3, abs=0.1)
    assert {request.new for request in made} == {343}
