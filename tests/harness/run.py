"""Runs every check of this repository, as `make test` and CI do, and prints a table of the results.

python -m tests.harness.run            # lint, types, then all tests and notebooks in two phases at the same time
python -m tests.harness.run --quick    # lint, types, and the quick lanes without slow tests: minutes
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.harness.lanes import LANES, Lane, table
from tests.harness.phases import SERVERS, TOGETHER

CHECKS = {
    "lint": [["ruff", "check", "--quiet", "."], ["ruff", "format", "--quiet", "--check", "."]],
    "types": [["mypy", "--no-error-summary"]],
}
ON_ALL_CORES = ("-n", "auto", "--maxprocesses", "8", "--dist", "loadfile", "--no-loadscope-reorder")
ALONE = ("-n", "1", "--dist", "loadfile", "--no-loadscope-reorder")  # deadlines are fractions of a second
WHOLE = {
    TOGETHER: ("--nbval", "--phase", TOGETHER, *ON_ALL_CORES),
    SERVERS: ("--phase", SERVERS, *ALONE),
}
QUICK_LANES = [word for lane in ("units", "doctests", "contracts") for word in ("--lane", lane)]
QUICK = {"quick": ("-m", "not slow and not cluster", *QUICK_LANES, "--phase", TOGETHER, *ON_ALL_CORES)}


# The tests of servers wait most of the time, and their deadlines are fractions of a second. So the others run
# beside them and get what is left of the processor.
LOWEST_PRIORITY = 19


def run_all(phases: dict[str, tuple[str, ...]]) -> int:
    """Run the checks, then the phases of tests; print the table; return the exit status."""
    minutes: dict[str, float] = {}
    lanes = {name: Lane() for name in LANES}
    failed = [name for name, commands in CHECKS.items() if not _timed(minutes, name, commands)]
    if not failed:
        failed = _run_phases(minutes, lanes, phases)
    print(f"\n{table({name: lane for name, lane in lanes.items() if lane != Lane()})}\n")
    print("minutes: " + ", ".join(f"{name} {spent:.1f}" for name, spent in minutes.items()))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def _run_phases(minutes: dict[str, float], lanes: dict[str, Lane], phases: dict[str, tuple[str, ...]]) -> list[str]:
    """Run all phases at the same time, and print the output of each when it ends. Returns the names of failed ones."""
    print(f"--- {' and '.join(phases)}: started", flush=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        runs = {
            name: pool.submit(_tests, Path(folder) / name, options, LOWEST_PRIORITY if name == TOGETHER else 0)
            for name, options in phases.items()
        }
        failed = []
        for name, run in sorted(runs.items(), key=lambda entry: entry[0] == TOGETHER):  # the shorter one first
            good, minutes[name], counted = run.result()
            print(f"--- {name}\n{(Path(folder) / name).read_text('utf-8', 'replace')}", flush=True)
            failed += [] if good else [name]
            for lane, counts in counted.items():
                lanes[lane].add(counts)
    return failed


def _tests(log: Path, options: Sequence[str], niceness: int) -> tuple[bool, float, dict[str, Any]]:
    """Run one phase with its output in `log`. Returns whether all tests passed, minutes, and counts by lane."""
    began, tally = time.monotonic(), log.with_suffix(".json")
    command = [sys.executable, "-m", "pytest", *options, "--tally", str(tally)]
    with log.open("wb") as output:
        started = subprocess.Popen(command, env=_environment(), stdout=output, stderr=subprocess.STDOUT)
        os.setpriority(os.PRIO_PROCESS, started.pid, niceness)  # before it starts workers, which inherit it
        status = started.wait()
    counted = json.loads(tally.read_text("utf-8")) if tally.exists() else {}
    return status == 0, (time.monotonic() - began) / 60, counted


def _timed(minutes: dict[str, float], name: str, commands: Sequence[Sequence[str]]) -> bool:
    """Run Python modules one after another until one fails. Returns whether all succeeded."""
    print(f"--- {name}", flush=True)
    began = time.monotonic()
    good = all(subprocess.run([sys.executable, "-m", *c], env=_environment()).returncode == 0 for c in commands)
    minutes[name] = (time.monotonic() - began) / 60
    return good


def _environment() -> dict[str, str]:
    """The environment of a check: one thread per process, because there is one process per core."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="units, doctests and contracts, without the slow ones")
    raise SystemExit(run_all(QUICK if parser.parse_args().quick else WHOLE))
