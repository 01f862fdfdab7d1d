"""Kills a process at each step of its work on a disk: before and after every call to the system."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable
from typing import Any

CALLS = (
    "open",
    "close",
    "pread",
    "pwrite",
    "writev",
    "utime",
    "ftruncate",
    "fdatasync",
    "replace",
    "unlink",
    "stat",
    "mkdir",
)


class Killer:
    """Ends this process before or after its n-th call to the disk."""

    def __init__(self, step: int) -> None:
        self._left = step

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._pass()
            result = call(*args, **kwargs)
            self._pass()
            return result

        return wrapped

    def _pass(self) -> None:
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that is killed at a step; return whether it came so far."""
    child = os.fork()
    if child == 0:
        killer = Killer(step)
        for name in CALLS:
            setattr(os, name, killer.wrap(getattr(os, name)))
        fcntl.flock = killer.wrap(fcntl.flock)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
