"""Two real faults, a real Prometheus: the alert of each fires, and no other. All of them: scripts/alert_drill.py."""

from __future__ import annotations

import dataclasses

import pytest

from scripts.alert_drill import FAULTS, drill

SHORT_S = 4.0


@pytest.mark.redis
@pytest.mark.prometheus
@pytest.mark.slow
@pytest.mark.parametrize("name", ["store killed", "records damaged"])
def test_the_alert_of_a_real_fault_fires_and_no_other(name: str) -> None:
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    row = drill(dataclasses.replace(fault, warm_s=SHORT_S), SHORT_S)
    assert row["fired"] == [fault.alert] and row["ok"], row
