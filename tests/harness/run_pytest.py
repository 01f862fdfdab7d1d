"""Runs pytest in a separate process, for tests of the test harness."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_pytest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run pytest without this run's `PYTEST_…` variables."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=line", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**own, **environment}, capture_output=True, text=True)
