"""`bench failover` reports what it says."""

from __future__ import annotations

import pytest

from kvlab.lab.bench import failover as bench_failover


@pytest.mark.cluster
@pytest.mark.slow
def test_bench_failover_finds_the_keys_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_failover, "NODE_TIMEOUTS_MS", (1000,))
    result = bench_failover.run(rounds=1)
    assert len(result["killed"]["1000"]) == len(result["frozen"]["2000"]) == 1
    assert result["killed"]["1000"][0] > 0 and result["others"]["hit"] > 0
