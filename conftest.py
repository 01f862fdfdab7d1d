"""Strict notebook runs: `pytest --nbval`, with no further option and from any folder.

What the options in pyproject.toml cannot say is said here: where the sanitising rules are, in which
environment kernels start, that a notebook without outputs fails, and that one broken cell is one
failure. Without `--nbval` no notebook is collected and none of this does anything.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from kvlab.course.kernel import kernel_environment

ROOT = Path(__file__).parent
SANITIZE = ROOT / "notebooks" / "sanitize.cfg"
FAILED = pytest.StashKey[str]()  # of a notebook: the name of its first failing cell
REBUILD = "if the new outputs are right: python scripts/build_notebooks.py"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give nbval the rules by an absolute path: it opens them from wherever pytest was started."""
    given = config.getoption("nbval_sanitize_with", None) or SANITIZE
    config.option.nbval_sanitize_with = str((config.invocation_params.dir / given).resolve())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before a cell: skip it if an earlier one failed; see to a clean environment for the notebook's kernel."""
    if not _is_cell(item):
        return
    notebook = item.parent
    if failed := notebook.stash.get(FAILED, ""):
        pytest.skip(f"{failed} of this notebook failed")
    item.output_timeout = 60  # nbval's 5 seconds are too few on a busy machine, and it has no option for them
    if notebook.kernel is None and "setup" not in vars(notebook):
        folder = tempfile.TemporaryDirectory(prefix="kvlab-nbval-", ignore_cleanup_errors=True)
        item.config.add_cleanup(folder.cleanup)
        threads = {"OMP_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {}  # others want a core too
        notebook.setup = partial(_in_environment, kernel_environment(Path(folder.name), **threads), notebook.setup)


def _in_environment(variables: dict[str, str], start_kernel: Callable[[], None]) -> None:
    """Start a notebook's kernel as when the notebook was built, without what pytest itself sets for a test."""
    with _environment(variables):
        start_kernel()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Fail a cell that was never run: nbval has nothing to compare there, and would pass it."""
    if _is_cell(item) and item.options["check"] and item.cell.source.strip() and item.cell.execution_count is None:
        pytest.fail(f"{item.name} is stored without having been run: python scripts/build_notebooks.py", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Remember a notebook's first failing cell, and say how to accept its outputs."""
    report = yield
    if _is_cell(item) and report.failed:
        item.parent.stash.setdefault(FAILED, item.name)
        report.sections.append(("Measured numbers and how to print them", str(SANITIZE.relative_to(ROOT))))
        report.sections.append(("To accept", f"{REBUILD} {os.path.relpath(item.path, ROOT)}"))
    return report


def _is_cell(item: pytest.Item) -> bool:
    return item.path.suffix == ".ipynb"


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Exactly these environment variables, for a while."""
    saved = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(variables)
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)
