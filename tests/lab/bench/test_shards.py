"""`bench shards` reports what it says."""

from __future__ import annotations

import pytest

from kvlab.lab.bench import shards as bench_shards


@pytest.mark.cluster
def test_bench_shards_asks_each_node_once_and_a_hung_one_alone_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_shards, "SIZES", (16 << 10,))
    monkeypatch.setattr(bench_shards, "HUNG_DEADLINE_S", 1.0)  # a busy machine must not turn a hit into a miss
    result = bench_shards.run(scale=0.01)
    (row,) = result["rows"]
    assert row["value_kib"] == 16 and row["get_vs_one"] > 0
    keys = result["round_trips"].pop("keys")
    assert sum(keys) == bench_shards.RECORDS and min(keys) > 0
    assert result["round_trips"] == {call: [1, 1, 1] for call in ("load", "save", "probe")}
    hung = result["hung"]
    lost = hung["keys_of_the_hung_node"]
    assert hung["hits"] == [bench_shards.RECORDS - lost] * bench_shards.HUNG_CALLS
    assert hung["misses"] == {"timeout": 3 * lost, "breaker": (bench_shards.HUNG_CALLS - 3) * lost}
    assert hung["open_breakers"] == ["hung"]
