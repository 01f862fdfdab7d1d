"""One enum of reasons: each is its own text, wherever it is counted, compared or printed."""

from __future__ import annotations

import json
import re
from collections import Counter

from kvlab.stores.faults import Reason


def test_each_reason_is_its_own_text() -> None:
    for reason in Reason:
        assert reason == reason.value == str(reason) == f"{reason}" == reason.name.lower()
        assert re.fullmatch(r"[a-z_]+", reason) and repr(reason) == repr(reason.value)


def test_counters_by_reason_and_by_text_meet() -> None:
    counted = Counter([Reason.TIMEOUT, "timeout", Reason.OOM])
    assert counted == Counter(timeout=2, oom=1) and counted["timeout"] == counted[Reason.TIMEOUT] == 2
    assert json.loads(json.dumps(counted)) == {"timeout": 2, "oom": 1}
    assert str(counted) == "Counter({'timeout': 2, 'oom': 1})"
