"""Groups of scripted workers, which start at once and misbehave on demand (`tests/engine/scripted_worker.py`)."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvlab.engine import workers
from kvlab.engine.worker import WorkerSettings
from kvlab.engine.workers import WorkerGroup
from tests.engine.scripted_worker import next_token

SCRIPT = Path(__file__).with_name("scripted_worker.py")
LONG_S = 60.0
Groups = Callable[..., WorkerGroup]


def expected(prompt: list[int], new: int) -> list[int]:
    known = list(prompt)
    for _ in range(new):
        known.append(next_token(known))
    return known[len(prompt) :]


def wait_for(there: Callable[[], Any], seconds: float = LONG_S) -> Any:
    give_up = time.monotonic() + seconds
    while not (found := there()):
        assert time.monotonic() < give_up, "it did not come about"
        time.sleep(0.01)
    return found


def threads_of_groups() -> list[str]:
    names = ("kvlab-worker", "kvlab-watch")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]


def pipes_of_this_process() -> int:
    if sys.platform != "linux":
        return 0
    names = []
    for file in Path("/proc/self/fd").iterdir():
        try:
            names.append(str(file.readlink()))
        except OSError:
            continue
    return sum(name.startswith("pipe:") for name in names)


def loads(group: WorkerGroup) -> dict[int, float]:
    """What each worker has yet to do, as the router is told."""
    return {candidate.worker: candidate.load for candidate in group._balance.candidates({})}


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[Groups]:
    """Makes groups. When the test ends, nothing of them may be left: no process, no thread, no pipe."""
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, "-S", "-E", str(SCRIPT)])
    before, open_pipes = {p.pid for p in psutil.Process().children()}, pipes_of_this_process()
    made: list[WorkerGroup] = []

    def make(count: int = 2, script: dict[str, Any] | None = None, **options: Any) -> WorkerGroup:
        made.append(WorkerGroup(count, WorkerSettings(tiers=script or {}), **options))
        return made[-1]

    yield make
    for group in made:
        group.close(timeout_s=5)
        assert not group._asked and not group._parked
    wait_for(lambda: not threads_of_groups())
    wait_for(lambda: {p.pid for p in psutil.Process().children()} <= before)  # a zombie would be a child too
    wait_for(lambda: pipes_of_this_process() <= open_pipes)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
