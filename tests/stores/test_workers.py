"""Workers run jobs side by side, and go on after an exception at any point of `submit`; an executor does not."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from kvlab.stores import workers
from kvlab.stores.workers import Workers

LONG_S = 10.0
ROOT = Path(__file__).parents[2]


class Interrupt(BaseException):
    """What a signal handler raises."""


def submit_interrupted_after(crew: Any, steps: int) -> bool:
    """Submit a job, with an exception after so many steps of bytecode. Returns whether it came.

    Steps count in the code under test and in the Python code of locks. Starting a thread is no business of either.
    """
    left = steps

    def tracer(frame: FrameType, what: str, argument: object) -> Any:
        nonlocal left
        name = frame.f_code.co_qualname
        ours = frame.f_code.co_filename == workers.__file__ or name.startswith(("Semaphore.", "Condition.__"))
        frame.f_trace_opcodes = ours
        if ours and what == "opcode":
            if left == 0:
                sys.settrace(None)
                raise Interrupt
            left -= 1
        return tracer

    sys.settrace(tracer)
    try:
        crew.submit(lambda: None)
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def works(crew: Any) -> bool:
    """Whether another thread can still hand over a job, and the job runs."""
    done = threading.Event()
    threading.Thread(target=lambda: crew.submit(done.set), daemon=True).start()
    return done.wait(0.5)


def broken_after(make: Any) -> Iterator[int]:
    """The steps of `submit` after which an exception breaks what `make` makes."""
    for idle in (False, True):  # with and without a thread that waits for work
        steps = 0
        while True:
            crew = make()
            if idle:
                assert works(crew)
            if not submit_interrupted_after(crew, steps):
                break
            if not works(crew):
                yield steps
            steps += 1
        assert steps > 5, "nothing was interrupted"


def test_an_exception_at_any_point_of_submit_breaks_nothing() -> None:
    assert not list(broken_after(lambda: Workers(2, "test")))


@pytest.mark.slow
def test_an_executor_breaks() -> None:
    """Why a node has no `ThreadPoolExecutor`. In another process, because a broken one also blocks every fork."""
    program = (
        "import os; from concurrent.futures import ThreadPoolExecutor as E; from tests.stores.test_workers import *\n"
        "print('breaks:', next(broken_after(lambda: E(2)), None) is not None, flush=True); os._exit(0)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout == "breaks: True\n", run.stderr


def test_jobs_run_side_by_side_and_never_more_than_allowed() -> None:
    crew, lock, now, most = Workers(3, "test"), threading.Lock(), [0], [0]
    together, left = threading.Barrier(3, timeout=LONG_S), threading.Semaphore(0)

    def job() -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.wait()
        with lock:
            now[0] -= 1
        left.release()

    for _ in range(30):
        crew.submit(job)
    assert all(left.acquire(timeout=LONG_S) for _ in range(30))
    assert most[0] == 3


def test_a_job_never_waits_behind_another_while_a_thread_may_be_started() -> None:
    for _ in range(300):
        crew, go_on, quick = Workers(2, "test"), threading.Event(), threading.Event()
        crew.submit(lambda: None)
        crew.submit(lambda: go_on.wait(LONG_S))  # noqa: B023
        crew.submit(quick.set)
        assert quick.wait(LONG_S / 2), "it waited for the hung one"
        go_on.set()


def test_threads_end_with_their_workers() -> None:
    crew = Workers(4, "test of the end")
    done = threading.Barrier(5, timeout=LONG_S)
    for _ in range(4):
        crew.submit(done.wait)
    done.wait()
    del crew
    gc.collect()
    end = time.monotonic() + LONG_S
    while any(t.name == "test of the end" for t in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.01)
    assert not [t for t in threading.enumerate() if t.name == "test of the end"]


def test_where_no_thread_can_be_started_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    crew, busy = Workers(2, "test"), Workers(2, "test")
    done = threading.Event()
    busy.submit(done.set)
    assert done.wait(LONG_S)
    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError, match="can't start"):
        crew.submit(lambda: None)
    again = threading.Event()
    busy.submit(again.set)
    assert again.wait(LONG_S), "the thread that is there does it"
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    with pytest.raises(RuntimeError, match="interpreter is ending"):
        busy.submit(lambda: None)
