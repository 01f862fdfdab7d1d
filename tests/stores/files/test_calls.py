"""Calls to a disk that may hang: a deadline, a bound on abandoned threads, and a breaker."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator

import pytest

from kvlab.errors import ConfigError
from kvlab.stores.deadline import BYTES_PER_S, Deadline
from kvlab.stores.faults import Reason
from kvlab.stores.files.calls import THREADS, Call, Calls, Failed, reason_of
from kvlab.stores.files.folder import Gone, Stopped
from tests.faults.kit import wait_for

LONG_S = 30.0
SHORT_S = 0.3  # long enough for a thread to start on a busy machine


@pytest.fixture
def disk() -> Iterator[threading.Event]:
    """Set when the disk answers again."""
    event = threading.Event()
    yield event
    event.set()


def why(calls: Calls, work: Callable[[Call[int]], int], seconds: float = LONG_S, **options: bool) -> str:
    with pytest.raises(Failed) as failed:
        calls.run(Deadline(seconds), work, **options)
    return failed.value.reason


def raising(error: Exception) -> Callable[[Call[int]], int]:
    def work(call: Call[int]) -> int:
        raise error

    return work


def hanging(disk: threading.Event) -> Callable[[Call[int]], int]:
    return lambda call: int(disk.wait(LONG_S))


def test_a_result_comes_back() -> None:
    assert Calls().run(Deadline(LONG_S), lambda call: 7) == 7


def test_a_call_may_extend_its_deadline(disk: threading.Event) -> None:
    deadline = Deadline(SHORT_S)

    def work(call: Call[int]) -> int:
        deadline.extend(int(LONG_S * BYTES_PER_S))
        disk.wait(2 * SHORT_S)
        return 7

    assert Calls().run(deadline, work) == 7


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "oom"),
        (errno.EDQUOT, "oom"),
        (errno.EROFS, "readonly"),
        (errno.EACCES, "auth"),
        (errno.EPERM, "auth"),
        (errno.EIO, "io"),
        (errno.ESTALE, "io"),
        (errno.EMFILE, "error"),
    ],
)
def test_errors_of_the_disk_have_reasons(number: int, reason: str) -> None:
    assert why(Calls(), raising(OSError(number, "no"))) == reason


def test_other_errors_have_reasons() -> None:
    assert reason_of(Gone(errno.ENOENT, "gone")) == reason_of(ConfigError("foreign")) == "gone"
    assert reason_of(Stopped()) == "timeout" and reason_of(Failed(Reason.POOL)) == "pool"
    assert why(Calls(), raising(ValueError("a mistake"))) == "error"


def test_a_folder_that_a_store_cannot_have_is_an_error_of_the_caller() -> None:
    with pytest.raises(ConfigError, match="foreign"):
        Calls().run(Deadline(LONG_S), raising(ConfigError("foreign")))


def test_a_call_that_hangs_ends_at_its_deadline(disk: threading.Event) -> None:
    calls = Calls()
    assert why(calls, hanging(disk), SHORT_S) == "timeout"
    assert calls.run(Deadline(LONG_S), lambda call: 7) == 7  # the other threads work


def test_the_breaker_opens_after_three_and_a_trial_may_close_it(
    disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls()
    now = [0.0]
    calls.breaker._clock = lambda: now[0]
    assert [why(calls, hanging(disk), SHORT_S) for _ in range(4)] == ["timeout"] * 3 + ["breaker"]
    assert calls.run(Deadline(LONG_S), lambda call: 7, always=True) == 7  # health asks in any case
    assert [why(calls, raising(OSError(errno.EIO, "no"))) for _ in range(3)] == ["io"] * 3
    assert why(calls, lambda call: 7) == "breaker"
    now[0] += 1.1
    assert calls.run(Deadline(LONG_S), lambda call: 7) == 7
    assert calls.run(Deadline(LONG_S), lambda call: 7) == 7


def test_faults_that_cost_no_time_leave_the_breaker_closed() -> None:
    calls = Calls()
    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES) * 3:
        why(calls, raising(OSError(number, "no")))
    assert calls.run(Deadline(LONG_S), lambda call: 7) == 7


def test_while_all_threads_hang_the_breaker_refuses_calls(disk: threading.Event) -> None:
    calls = Calls()
    for _ in range(THREADS):
        assert why(calls, hanging(disk), SHORT_S, always=True) == "timeout"
    ran = []
    assert why(calls, lambda call: ran.append(1) or 1, SHORT_S, always=True) == "pool"
    assert why(calls, lambda call: ran.append(1) or 1) == "breaker"
    assert calls._threads._crew.count == THREADS
    disk.set()
    wait_for(lambda: _tried(calls) == "")
    assert ran == []


def _tried(calls: Calls) -> str:
    try:
        calls.run(Deadline(LONG_S), lambda call: 7, always=True)
    except Failed as failed:
        return failed.reason
    return ""


def test_a_call_that_never_began_says_so_and_does_nothing(disk: threading.Event) -> None:
    calls = Calls()
    busy = [threading.Thread(target=_tried_with, args=(calls, hanging(disk))) for _ in range(THREADS)]
    for thread in busy:
        thread.start()
    wait_for(lambda: calls._threads._crew.count == THREADS and not calls._threads._crew.idle)
    ran = []
    assert why(calls, lambda call: ran.append(1) or 1, SHORT_S) == "pool"
    disk.set()
    for thread in busy:
        thread.join()
    assert calls.run(Deadline(LONG_S), lambda call: 7) == 7
    assert ran == []


def _tried_with(calls: Calls, work: Callable[[Call[int]], int]) -> None:
    calls.run(Deadline(LONG_S), work)


def test_a_result_that_comes_too_late_is_disposed_of(disk: threading.Event) -> None:
    calls, late = Calls(), list[int]()
    with pytest.raises(Failed):
        calls.run(Deadline(SHORT_S), hanging(disk), dispose=late.append)
    assert late == []
    disk.set()
    wait_for(lambda: late == [1])


def test_an_exception_in_the_caller_abandons_the_call(disk: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C does."""
    calls, seen = Calls(), list[Call[int]]()

    def work(call: Call[int]) -> int:
        seen.append(call)
        return int(disk.wait(LONG_S))

    class Interrupted(Deadline):
        @property
        def remaining(self) -> float:
            wait_for(lambda: bool(seen))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calls.run(Interrupted(LONG_S), work)
    assert seen[0].abandoned
    assert calls.run(Deadline(LONG_S), lambda call: 7) == 7


def test_an_exception_in_the_trial_of_the_breaker_does_not_keep_it_open(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, now = Calls(), [0.0]
    monkeypatch.setattr(calls.breaker, "_clock", lambda: now[0])
    for _ in range(3):
        why(calls, raising(OSError(errno.EIO, "no")))
    now[0] += 1.1

    class Interrupted(Deadline):
        @property
        def remaining(self) -> float:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calls.run(Interrupted(LONG_S), lambda call: 7)
    assert calls.run(Deadline(LONG_S), lambda call: 7) == 7
