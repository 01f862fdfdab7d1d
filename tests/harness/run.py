"""Runs every check of this repository, as `make test` and CI do, and prints a table of the results.

python -m tests.harness.run            # lint, types, then all tests and notebooks: together, then servers
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
from pathlib import Path

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


def run_all(phases: dict[str, tuple[str, ...]]) -> int:
    """Run the checks, then the phases of tests; print the table; return the exit status."""
    minutes: dict[str, float] = {}
    lanes = {name: Lane() for name in LANES}
    failed = [name for name, commands in CHECKS.items() if not _timed(minutes, name, commands)]
    if not failed:
        failed = [name for name, options in phases.items() if not _tests(minutes, lanes, name, options)]
    print(f"\n{table({name: lane for name, lane in lanes.items() if lane != Lane()})}\n")
    print("minutes: " + ", ".join(f"{name} {spent:.1f}" for name, spent in minutes.items()))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def _tests(minutes: dict[str, float], lanes: dict[str, Lane], name: str, options: Sequence[str]) -> bool:
    """Run one phase and add its results to `lanes`. Returns whether all tests passed."""
    with tempfile.TemporaryDirectory() as folder:
        tally = Path(folder) / "tally.json"
        good = _timed(minutes, name, [["pytest", *options, "--tally", str(tally)]])
        counted = json.loads(tally.read_text("utf-8")) if tally.exists() else {}
    for lane, counts in counted.items():
        lanes[lane].add(counts)
    return good


def _timed(minutes: dict[str, float], name: str, commands: Sequence[Sequence[str]]) -> bool:
    """Run Python modules one after another until one fails. Returns whether all succeeded."""
    print(f"--- {name}", flush=True)
    began = time.monotonic()
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # per process: pytest runs one process per core
    good = all(subprocess.run([sys.executable, "-m", *command], env=one_thread).returncode == 0 for command in commands)
    minutes[name] = (time.monotonic() - began) / 60
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="units, doctests and contracts, without the slow ones")
    raise SystemExit(run_all(QUICK if parser.parse_args().quick else WHOLE))
