"""The two phases of a full run: tests that run in parallel, and tests of server faults that run one after another.

`--phase servers`: tests in `tests/faults/` and tests with the marker `cluster`. These tests freeze and kill servers
and have deadlines of fractions of a second; in parallel they would disturb each other. `--phase together`: all other
tests, on all cores. `run` starts both at the same time, the second with the lowest priority. Both phases use
pytest-xdist with `--dist loadfile --no-loadscope-reorder`, so that the cells of a notebook and the tests of a file run
in one process, in order. Without `--phase` all tests run in one process.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOGETHER, SERVERS = "together", "servers"
SECONDS = {
    "tests/engine/test_generate.py": 190,
    "tests/browser/test_widgets.py": 180,
    "tests/course/exercises/test_lessons.py": 130,
    "tests/test_cli.py": 70,
    "tests/notebooks/test_build.py": 60,
    "tests/course/test_capstone.py": 45,
    "tests/lab/test_demo.py": 25,
    "tests/site/test_site.py": 50,
    "tests/browser/test_lab.py": 25,
    "tests/harness/test_learner.py": 15,
    "tests/stores/redis/test_store.py": 15,
    "tests/model/test_digests.py": 15,
}
"""Approximate seconds of the longest files, which determine only the order. A notebook counts as 20."""


def phase_of(item: pytest.Item) -> str:
    """The phase of a test."""
    kills = item.path.parent.name == "faults" or item.get_closest_marker("cluster")
    return SERVERS if kills else TOGETHER


def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of one phase, with the longest files first: at the end, a long file would use one core alone."""
    phase = config.getoption("phase")
    if phase is None:
        return
    kept = [item for item in items if phase_of(item) == phase]
    config.hook.pytest_deselected(items=[item for item in items if phase_of(item) != phase])
    items[:] = sorted(kept, key=lambda item: -_seconds(item.path))  # stable: the order within a file stays


def _seconds(file: Path) -> int:
    named = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name
    return SECONDS.get(named, 20 if file.suffix == ".ipynb" else 0)
