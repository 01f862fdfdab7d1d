"""The soak, short: `python tests/faults/soak.py` runs it for a minute and prints figures."""

from __future__ import annotations

import pytest

from tests.faults.soak import run


@pytest.mark.redis
@pytest.mark.slow
def test_threads_and_processes_on_one_store_never_get_a_wrong_value() -> None:
    result = run(seconds=3, processes=2, threads=16, deadline_s=30)
    assert result["wrong"] == 0 and result["raised"] == {}
    assert result["loads"] > 20 and result["hits"] > 0 and result["evicted_keys"] > 0
    assert result["most_connections"] <= result["connections_allowed"] + 1
