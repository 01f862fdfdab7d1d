"""The rows of `bench gpu`, the time and the memory that remain, and what was left out for which reason."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from kvlab.lab.timing import Timings, time_rounds

Rows = list[dict[str, Any]]
NO_MEMORY: Final = ("out of memory", "can't allocate memory", "not enough memory")
logger = logging.getLogger(__name__)


@dataclass
class Report:
    """What was measured.

    Attributes:
        device: "cuda" or "cpu".
        rounds: of every measurement, if there is time.
        deadline: no step begins after it, by the clock of `time.monotonic`, and no round.
        step_s: seconds after which a step ends with the rounds that it has.
        tables: rows by table.
        skipped, failed: steps without rows, each with its reason. What was loaded and is not what was stored has
            failed.
        times: the step of each measurement, and its rounds.
    """

    device: str
    rounds: int
    deadline: float
    step_s: float
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    times: list[tuple[str, Timings]] = field(default_factory=list)
    _step: str = ""
    _step_ends: float = math.inf

    def add(self, table: str, what: str, step: Callable[[], Rows], need: float = 0, host_need: float = 0) -> None:
        """Run a step and keep its rows, if there is time and memory for it.

        Args:
            need, host_need: bytes on the device, and in the memory of the machine.
        """
        begin, rows = time.monotonic(), Rows()
        self._step, self._step_ends = f"{table} {what}".strip(), begin + self.step_s
        try:
            if reason := self.too_late() or self.no_room(need) or self.no_room(host_need, "cpu"):
                self.skipped.append(f"{self._step}: {reason}")
                return
            rows = step()
            self.tables.setdefault(table, []).extend(rows)
        except Exception as error:  # the other steps can still be measured, and a machine is lent for minutes
            if any(said in str(error).lower() for said in NO_MEMORY) or isinstance(error, MemoryError):
                self.skipped.append(f"{self._step}: out of memory")
            else:
                logger.exception("%s failed", self._step)
                self.failed.append(f"{self._step}: {type(error).__name__}: {error}")
        finally:
            self._step_ends = math.inf
        # outside of `except`: there, the error's frames would still hold its tensors
        self.clean()
        # these lines are there, whatever ends this process before its result is printed
        logger.info("%s: %.1f s %s", self._step, time.monotonic() - begin, json.dumps(rows))

    def time(
        self, contenders: Mapping[str, Callable[[], object]], seconds_of: Callable[[Any], float] | None = None
    ) -> Timings:
        """Time contenders in rounds, each with an idle device before it and after it.

        Args:
            seconds_of: takes what a contender returned, and returns its seconds; it then waits for the device itself.
        """
        work = {name: self._waited_for(run) for name, run in contenders.items()}
        times = time_rounds(work, self.rounds, seconds_of, self.enough)
        self.times.append((self._step, times))
        return times

    def too_late(self) -> str:
        """Return why no further step begins, or ""."""
        return "no time left" if time.monotonic() > self.deadline else ""

    def no_room(self, need: float, device: str = "") -> str:
        """Return why so many bytes do not fit, or ""."""
        free = free_bytes(device or self.device)
        return f"needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free" if need > free else ""

    def clean(self) -> None:
        """Give back memory that nothing refers to."""
        gc.collect()
        if self.device == "cuda":
            with contextlib.suppress(RuntimeError):  # after some errors a device does nothing any more
                torch.cuda.empty_cache()

    def sync(self) -> None:
        """Wait until the device has nothing to do."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def enough(self) -> bool:
        """Return whether a step has had its time, so that it should end."""
        return time.monotonic() > min(self.deadline, self._step_ends)

    def _waited_for(self, run: Callable[[], object]) -> Callable[[], object]:
        def waited() -> object:
            result = run()
            self.sync()
            return result

        self.sync()
        return waited


def free_bytes(device: str) -> float:
    """Return the bytes that can be allocated on a device; infinity if the system does not say."""
    if device == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return float(torch.cuda.mem_get_info()[0] + unused)
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf
