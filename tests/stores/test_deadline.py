"""Deadlines, on a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvlab.stores.deadline import GRACE_S, Deadline


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time that deadlines see."""
    moment = [1000.0]
    monkeypatch.setattr("kvlab.stores.deadline.time.monotonic", lambda: moment[0])
    yield moment
    monkeypatch.undo()


def test_a_deadline_counts_down_and_passes(now: list[float]) -> None:
    deadline = Deadline(2.0)
    assert (deadline.remaining_to_connect(), deadline.passed) == (2.0, False)
    now[0] += 1.5
    assert (deadline.remaining_to_connect(), deadline.passed) == (0.5, False)
    for _ in range(2):
        now[0] += 0.5
        assert deadline.passed
        with pytest.raises(TimeoutError, match="deadline"):
            deadline.remaining_to_connect()


def test_who_did_not_wait_for_the_deadline_to_pass_gets_a_moment_more_once(now: list[float]) -> None:
    deadline = Deadline(2.0)
    now[0] += 1.5
    assert deadline.remaining_to_receive() == 0.5
    now[0] += 7.0  # stood still
    assert deadline.remaining_to_receive() == pytest.approx(GRACE_S) and deadline.passed
    now[0] += GRACE_S / 2
    assert deadline.remaining_to_receive() == pytest.approx(GRACE_S / 2)
    now[0] += GRACE_S
    for _ in range(2):
        with pytest.raises(TimeoutError, match="deadline"):
            deadline.remaining_to_receive()
    with pytest.raises(TimeoutError):
        deadline.remaining_to_connect()


@pytest.mark.parametrize("waited", [False, True])
def test_who_was_abandoned_gets_no_moment_more(now: list[float], waited: bool) -> None:
    deadline = Deadline(2.0)
    if waited:
        now[0] += 3.0
        deadline.remaining_to_receive()
    deadline.abandon()
    with pytest.raises(TimeoutError):
        deadline.remaining_to_receive()


def test_a_copy_ends_at_the_same_moment_and_is_stretched_alone(now: list[float]) -> None:
    deadline = Deadline(2.0)
    now[0] += 1
    copy = deadline.copy()
    assert copy.remaining_to_connect() == deadline.remaining_to_connect() == 1.0
    copy.extend(50_000_000)
    assert (copy.remaining_to_connect(), deadline.remaining_to_connect()) == (2.0, 1.0)
    deadline.abandon()
    assert deadline.passed and copy.remaining_to_connect() == 2.0


def test_half_a_deadline_is_half_of_what_remains(now: list[float]) -> None:
    deadline = Deadline(4.0)
    assert deadline.half().remaining_to_connect() == 2.0
    now[0] += 2
    half = deadline.half()
    assert (half.remaining_to_connect(), half.half().remaining_to_connect(), deadline.remaining_to_connect()) == (
        1.0,
        0.5,
        2.0,
    )
    now[0] += 3
    assert deadline.half().passed and half.passed


def test_a_deadline_waits_for_the_last_of_others_and_never_ends_earlier(now: list[float]) -> None:
    deadline = Deadline(2.0)
    deadline.extend_to([])
    assert deadline.remaining_to_connect() == 2.0
    deadline.extend_to([Deadline(1.0), Deadline(5.0), Deadline(3.0)])
    assert deadline.remaining_to_connect() == 5.0
    deadline.extend_to(iter([Deadline(4.0)]))
    assert deadline.remaining_to_connect() == 5.0


def test_what_remains_is_never_less_than_nothing(now: list[float]) -> None:
    deadline = Deadline(2.0)
    now[0] += 0.5
    assert deadline.remaining == 1.5
    now[0] += 7.0
    assert deadline.remaining == 0.0
    other = Deadline(2.0)
    other.abandon()
    assert other.remaining == 0.0 and (other.abandoned, deadline.abandoned) == (True, False)


def test_what_has_expired_stays_so_whatever_it_moves(now: list[float]) -> None:
    deadline = Deadline(2.0)
    deadline.abandon()
    assert deadline.passed
    now[0] = 1.0  # a machine that has just been started
    deadline.extend(150_000_000)
    assert deadline.passed
