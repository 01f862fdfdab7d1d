"""A latch still works after an exception at any point of `wait`; an Event does not. And who has a lease."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from kvlab.stores.latch import Latch, Lease
from tests.stores.redis.scripted import LONG_S, SHORT_S, in_threads


class Interrupt(BaseException):
    """What a signal handler raises."""


def wait_interrupted_after(event: Any, steps: int) -> bool:
    """Wait a moment for `event`, with an exception after so many steps of bytecode. Returns whether it came."""
    left = steps

    def tracer(frame: FrameType, what: str, argument: object) -> Any:
        nonlocal left
        frame.f_trace_opcodes = True
        if what == "opcode":
            if left == 0:
                sys.settrace(None)
                raise Interrupt
            left -= 1
        return tracer

    sys.settrace(tracer)
    try:
        event.wait(1e-4)
    except (Interrupt, RuntimeError):  # an Event may also give back a lock that it does not have
        return True
    finally:
        sys.settrace(None)
    return False


def works(event: Any) -> bool:
    """Whether it can still be set, and waited for, by other threads."""
    seen: list[bool] = []
    for work in (event.set, lambda: seen.append(event.wait(0.2))):
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(0.5)
    return seen == [True]


def broken_after(make: type) -> Iterator[int]:
    """The steps of `wait` after which an exception breaks what `make` makes."""
    steps = 0
    while wait_interrupted_after(event := make(), steps):
        if not works(event):
            yield steps
        steps += 1


def test_an_exception_at_any_step_of_wait_breaks_no_latch() -> None:
    assert list(broken_after(Latch)) == []


def test_it_breaks_an_event() -> None:
    assert next(broken_after(threading.Event)) > 0


def test_a_latch_is_set_once_and_for_all_waits() -> None:
    latch = Latch()
    assert not latch.is_set and not latch.wait(0) and not latch.wait(-1)
    latch.set()
    latch.set()
    assert latch.is_set and latch.wait() and latch.wait(0)


@pytest.mark.parametrize("early", [True, False])
def test_a_latch_lets_a_thread_go_on(early: bool) -> None:
    latch, passed = Latch(), threading.Lock()
    passed.acquire()

    def work() -> None:
        latch.wait()
        passed.release()

    if early:
        latch.set()
    threading.Thread(target=work, daemon=True).start()
    if not early:
        assert not passed.acquire(timeout=0.02)
        latch.set()
    assert passed.acquire(timeout=10)


# --- lease --------------------------------------------------------------------------------------
def test_one_thread_has_the_lease_and_the_next_one_gets_it_when_it_is_given_back() -> None:
    lease, got = Lease(), list[bool]()
    assert lease.take(0, LONG_S) and not lease.take(0, LONG_S)
    waiting = threading.Thread(target=lambda: got.append(lease.take(LONG_S, LONG_S)))
    waiting.start()
    lease.give_back()
    waiting.join()
    assert got == [True] and not lease.take(0, LONG_S)


def test_a_lease_that_is_never_given_back_ends_by_itself() -> None:
    lease = Lease()
    assert lease.take(0, SHORT_S) and not lease.take(SHORT_S / 8, LONG_S)
    assert lease.take(LONG_S, LONG_S)


def test_of_many_threads_one_at_a_time_has_the_lease() -> None:
    lease, holders, most = Lease(), list[int](), list[int]()

    def hold() -> bool:
        assert lease.take(LONG_S, LONG_S)
        holders.append(1)
        most.append(len(holders))
        holders.pop()
        lease.give_back()
        return True

    assert in_threads(16, hold) == [True] * 16 and set(most) == {1}


@pytest.mark.parametrize("waiters", [1, 3])
def test_a_waiter_that_was_interrupted_takes_no_lease_along(waiters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease()
    assert lease.take(0, LONG_S)

    def interrupted(latch: Latch, timeout_s: float | None = None) -> bool:
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(Latch, "wait", interrupted)
        for _ in range(waiters):
            with pytest.raises(Interrupt):
                lease.take(LONG_S, LONG_S)
    lease.give_back()
    assert lease.take(0, LONG_S)
