"""Strict notebook runs: `pytest --nbval`, without further options and from any folder.

These hooks do what options in pyproject.toml cannot do. They set the path of the sanitising rules and the
environment of the kernels, fail a cell that has never run, and skip the cells after a failed cell.
Without `--nbval` no notebook is collected, and the hooks do nothing for notebooks.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvlab.course.kernel import kernel_environment

ROOT = Path(__file__).parent
SANITIZE = ROOT / "notebooks" / "sanitize.cfg"
NEEDS = {  # for doctests, pytest imports every module; these cannot be imported without their engine
    "transformers": [
        "kvlab/connectors/hf_models.py",
        "kvlab/connectors/transformers.py",
        "kvlab/lab/deepspeed_engine.py",
        "kvlab/lab/deepspeed_tries.py",
    ],
    "prometheus_client": ["kvlab/engine/metrics.py"],
    "ray": ["kvlab/serve/router.py", "tests/serve/routers.py"],
    "vllm": ["kvlab/connectors/vllm", "kvlab/lab/naive_connector.py", "tests/engines/sides.py"],
}
collect_ignore = [path for engine, paths in NEEDS.items() if not find_spec(engine) for path in paths]
FAILED = pytest.StashKey[str]()  # the name of a notebook's first failing cell
REBUILD = "if the new outputs are correct, run: python scripts/build_notebooks.py"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Pass the absolute path of the rules to nbval, which opens a relative path from the current folder."""
    given = config.getoption("nbval_sanitize_with", None) or SANITIZE
    config.option.nbval_sanitize_with = str((config.invocation_params.dir / given).resolve())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a cell if an earlier cell of its notebook failed; give the notebook's kernel a clean environment."""
    if not _is_cell(item):
        return
    notebook = item.parent
    if failed := notebook.stash.get(FAILED, ""):
        pytest.skip(f"{failed} of this notebook failed")
    item.output_timeout = 60  # nbval's 5 seconds are too short on a busy machine, and no option changes them
    if notebook.kernel is None and "setup" not in vars(notebook):
        folder = tempfile.TemporaryDirectory(prefix="kvlab-nbval-", ignore_cleanup_errors=True)
        item.config.add_cleanup(folder.cleanup)
        threads = {"OMP_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {}  # one core per worker
        notebook.setup = partial(_in_environment, kernel_environment(Path(folder.name), **threads), notebook.setup)


def _in_environment(variables: dict[str, str], start_kernel: Callable[[], None]) -> None:
    """Start a notebook's kernel in the environment of the build, without the variables that pytest sets."""
    with _environment(variables):
        start_kernel()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Fail a cell that has never run: without stored outputs, nbval would pass it."""
    if _is_cell(item) and item.options["check"] and item.cell.source.strip() and item.cell.execution_count is None:
        pytest.fail(f"{item.name} was never run; run: python scripts/build_notebooks.py", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Record a notebook's first failing cell, and report how to accept its outputs."""
    report = yield
    if _is_cell(item) and report.failed:
        item.parent.stash.setdefault(FAILED, item.name)
        report.sections.append(("Forms of measured numbers that are not compared", str(SANITIZE.relative_to(ROOT))))
        report.sections.append(("To accept", f"{REBUILD} {os.path.relpath(item.path, ROOT)}"))
    return report


def _is_cell(item: pytest.Item) -> bool:
    return item.path.suffix == ".ipynb"


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set exactly these environment variables for a `with` block."""
    saved = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(variables)
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)
