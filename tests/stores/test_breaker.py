"""The circuit breaker, on a clock that only the test moves."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest

from kvlab.errors import ConfigError
from kvlab.stores.breaker import Breaker
from tests.harness.helpers import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def breaker(clock: FakeClock) -> Breaker:
    return Breaker(failures=3, cooldown_s=1.0, clock=clock)


def fail(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        assert breaker.allow()
        breaker.record(ok=False)


@pytest.mark.parametrize(
    "settings",
    [
        *({"failures": wrong} for wrong in (0, -1, 2.5, math.nan, math.inf, True, "3", None)),
        *({"cooldown_s": wrong} for wrong in (0, -1, math.nan, math.inf, True, "1", None)),
        *({"clock": wrong} for wrong in (None, 0.0, "now")),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"expected {next(iter(settings))} as"):
        Breaker(**settings)


def test_it_opens_after_so_many_faults_in_a_row(breaker: Breaker) -> None:
    fail(breaker, 2)
    assert breaker.state == "closed"
    fail(breaker, 1)
    assert breaker.state == "open" and not breaker.allow()


def test_a_success_between_starts_the_count_again(breaker: Breaker) -> None:
    fail(breaker, 2)
    assert breaker.allow()
    breaker.record(ok=True)
    fail(breaker, 2)
    assert breaker.state == "closed"


def test_what_tells_nothing_changes_nothing(breaker: Breaker) -> None:
    fail(breaker, 2)
    for _ in range(10):
        breaker.record(ok=None)
    assert breaker.state == "closed"
    fail(breaker, 1)
    assert breaker.state == "open"


def test_it_stays_open_until_it_has_cooled_down(breaker: Breaker, clock: FakeClock) -> None:
    fail(breaker, 3)
    clock.now += 0.999
    assert not breaker.allow()
    clock.now += 0.001
    assert breaker.allow() and breaker.state == "half-open"


def test_one_caller_tries_and_the_others_wait_for_how_that_went(breaker: Breaker, clock: FakeClock) -> None:
    fail(breaker, 3)
    clock.now += 2
    assert [breaker.allow() for _ in range(5)] == [True, False, False, False, False]
    breaker.record(ok=True)
    assert breaker.state == "closed" and breaker.allow()


def test_a_failed_trial_opens_it_for_another_cool_down(breaker: Breaker, clock: FakeClock) -> None:
    fail(breaker, 3)
    for _ in range(4):
        clock.now += 0.9
        assert not breaker.allow()
        clock.now += 0.1
        assert breaker.allow()
        breaker.record(ok=False)


def test_a_trial_that_told_nothing_leaves_the_next_one_free(breaker: Breaker, clock: FakeClock) -> None:
    fail(breaker, 3)
    clock.now += 1
    assert breaker.allow()
    breaker.record(ok=None)
    assert breaker.allow()


def test_faults_of_calls_that_were_under_way_do_not_prolong_it(breaker: Breaker, clock: FakeClock) -> None:
    fail(breaker, 3)
    clock.now += 0.9
    breaker.record(ok=False)
    clock.now += 0.1
    assert breaker.allow()


def test_a_clock_that_stands_still_or_is_far_off_keeps_it_safe(clock: FakeClock) -> None:
    clock.now = -1e9
    breaker = Breaker(failures=1, cooldown_s=5, clock=clock)
    fail(breaker, 1)
    assert not breaker.allow()
    clock.now += 5
    assert breaker.allow()


def test_ready_says_what_allow_would_and_changes_nothing(breaker: Breaker, clock: FakeClock) -> None:
    fail(breaker, 2)
    assert breaker.ready
    fail(breaker, 1)
    assert not breaker.ready
    clock.now += 0.999
    assert not breaker.ready
    clock.now += 0.001
    assert breaker.ready and breaker.ready and breaker.state == "open"
    assert breaker.allow() and not breaker.ready
    breaker.record(ok=False)
    assert not breaker.ready
    clock.cool_down()
    assert breaker.ready and breaker.allow()
    breaker.record(ok=None)
    assert breaker.ready
    breaker.record(ok=True)
    assert breaker.ready and breaker.state == "closed"


def test_faults_are_those_in_a_row(breaker: Breaker, clock: FakeClock) -> None:
    assert breaker.faults == 0
    fail(breaker, 2)
    breaker.record(ok=None)
    assert breaker.faults == 2
    breaker.record(ok=True)
    assert breaker.faults == 0
    fail(breaker, 3)
    clock.cool_down()
    fail(breaker, 1)
    assert breaker.faults == 4
    breaker.reset_after_fork()
    assert breaker.faults == 0 and breaker.ready


def test_of_many_threads_exactly_one_tries(breaker: Breaker, clock: FakeClock) -> None:
    fail(breaker, 3)
    clock.now += 1
    allowed: list[bool] = []
    gate = threading.Barrier(16)

    def ask() -> None:
        gate.wait()
        allowed.append(breaker.allow())

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(allowed) == 1
