"""The store in this process: what it does beyond the contract, which is to age by a clock that may be a fake one."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kvlab.errors import ConfigError
from kvlab.stores import MemoryStore
from tests.harness.helpers import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(clock: FakeClock) -> MemoryStore:
    made = MemoryStore(ttl_s=10, clock=clock)
    made.put_many([b"a", b"b"], [b"1", b"2"])
    return made


def test_a_value_lives_for_its_ttl_and_not_a_moment_longer(store: MemoryStore, clock: FakeClock) -> None:
    clock.now += 9.999
    assert store.probe([b"a", b"b"]) == 2
    clock.now += 0.001
    assert store.probe([b"a", b"b"]) == 0 and store.get_many([b"a"]) == [None]
    assert store.delete_many([b"a", b"b"]) == 0


def test_reads_and_touches_let_it_live_as_long_again_and_probes_do_not(store: MemoryStore, clock: FakeClock) -> None:
    for _ in range(5):
        clock.now += 6
        assert store.get_many([b"a"]) == [b"1"] and store.touch_many([b"a", b"x"]) == [True, False]
    assert store.probe([b"b"]) == 0
    clock.now += 6
    assert store.probe([b"a"]) == 1
    clock.now += 4
    assert store.probe([b"a"]) == 0


def test_without_a_ttl_nothing_ages(clock: FakeClock) -> None:
    store = MemoryStore(clock=clock)
    store.put_many([b"a"], [b"1"])
    clock.now += 1e12
    assert store.get_many([b"a"]) == [b"1"]


@pytest.mark.parametrize(
    "settings",
    [{"ttl_s": ttl_s} for ttl_s in (0, -1, math.nan, math.inf, True, "60", [60])]
    + [{"clock": clock} for clock in (None, 0.0, "now")],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected (a TTL|clock)"):
        MemoryStore(**settings)


def test_closing_forgets_the_values(store: MemoryStore) -> None:
    assert "2 values" in repr(store) and store.health().detail == "memory, 2 values"
    store.close()
    assert "0 values" in repr(store) and store.get_many([b"a"]) == [None]
    assert store.stats().misses == {"closed": 1}
