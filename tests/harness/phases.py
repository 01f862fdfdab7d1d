"""The two parts of a whole run: what may share the machine, and what waits for servers.

`--phase together`: everything that is only work, on all cores. `--phase servers`: tests that freeze and kill
servers, with deadlines in fractions of a second, one after the other: beside each other they would share the blame.
Either runs under pytest-xdist with `--dist loadfile --no-loadscope-reorder`: the cells of a notebook and the
tests of a file run in one process, in order. Without the option all tests run, as they stand, in one process.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOGETHER, SERVERS = "together", "servers"
SECONDS = {
    "tests/engine/test_generate.py": 190,
    "tests/course/exercises/test_lessons.py": 130,
    "tests/test_cli.py": 70,
    "tests/notebooks/test_build.py": 60,
    "tests/lab/test_demo.py": 25,
    "tests/browser/test_lab.py": 25,
    "tests/harness/test_learner.py": 15,
    "tests/stores/redis/test_store.py": 15,
    "tests/model/test_digests.py": 15,
}
"""About how long the longest files take. Only their order depends on it; a notebook counts as 20."""


def phase_of(item: pytest.Item) -> str:
    """The phase of a test."""
    kills = item.path.parent.name == "faults" or item.get_closest_marker("cluster")
    return SERVERS if kills else TOGETHER


def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of one phase, the files that take longest first: a long one at the end would run alone."""
    phase = config.getoption("phase")
    if phase is None:
        return
    kept = [item for item in items if phase_of(item) == phase]
    config.hook.pytest_deselected(items=[item for item in items if phase_of(item) != phase])
    items[:] = sorted(kept, key=lambda item: -_seconds(item.path))  # stable: within a file they stay as they stand


def _seconds(file: Path) -> int:
    named = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name
    return SECONDS.get(named, 20 if file.suffix == ".ipynb" else 0)
