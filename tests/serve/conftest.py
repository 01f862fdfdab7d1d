"""Where Ray is installed, its environment is set before a test imports it. Figures that tests measure are listed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest

from kvlab.serve.private import prepare

if find_spec("ray") is not None:
    prepare()

FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    return request.config.stash.setdefault(FIGURES, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if figures := config.stash.get(FIGURES, []):
        terminalreporter.section("measured")
        for figure in figures:
            terminalreporter.write_line(figure)
