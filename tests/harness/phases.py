"""The two parts of a whole run: what may share the machine, and what waits for servers.

`--phase together`: everything that is only work, on all cores. `--phase servers`: tests that freeze and kill
servers, with deadlines in fractions of a second, one after the other: beside each other they would share the blame.
Either runs under pytest-xdist with `--dist loadfile --no-loadscope-reorder`: the cells of a notebook and the
tests of a file run in one process, in order. Without the option all tests run, as they stand, in one process.
"""

from __future__ import annotations

from collections import Counter

import pytest

TOGETHER, SERVERS = "together", "servers"


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
    long = Counter(item.path for item in kept if item.get_closest_marker("slow") or _is_first_cell(item))
    items[:] = sorted(kept, key=lambda item: -long[item.path])  # stable: within a file they stay as they stand


def _is_first_cell(item: pytest.Item) -> bool:
    return item.path.suffix == ".ipynb" and item.name == "Cell 0"
