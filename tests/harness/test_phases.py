"""Each test is in exactly one phase, and the tests of a file run in one process, in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.harness import phases
from tests.harness.run_pytest import ROOT, run_pytest

TESTS = """
import os
import pytest

@pytest.mark.parametrize("i", range(4))
def test_plain(i):
    with open(__file__ + ".log", "a") as log:
        print(__name__, os.getpid(), file=log)

@pytest.mark.cluster
def test_cluster():
    pass
"""


CONFTEST = """
from tests.harness import phases

def pytest_addoption(parser):
    parser.addoption("--phase")

def pytest_collection_modifyitems(config, items):
    phases.choose(config, items)
"""


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    (tmp_path / "conftest.py").write_text(CONFTEST)  # importing torch in the real one takes seconds
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = cluster\n")
    made = [tmp_path / f"test_{name}.py" for name in ("a", "b")]
    for file in made:
        file.write_text(TESTS)
    return made


def run(files: list[Path], *options: str) -> str:
    plain = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # loading nbval takes seconds
    settings = ("-c", str(files[0].with_name("pytest.ini")), "-p", "xdist", "--color=no", "-vv")
    return run_pytest(*settings, *options, *map(str, files), **plain).stdout


def test_each_test_is_in_one_phase(files: list[Path]) -> None:
    together, servers, all_of_them = run(files, "--phase", "together"), run(files, "--phase", "servers"), run(files)
    assert "8 passed, 2 deselected" in together and "test_cluster" not in together
    assert re.search(r"2 (passed|skipped), 8 deselected", servers), servers
    assert re.search(r"10 passed|8 passed, 2 skipped", all_of_them), all_of_them


def test_the_tests_of_a_file_share_a_process(files: list[Path]) -> None:
    said = run(files, "--phase", "together", "-n", "2", "--dist", "loadfile")
    assert "8 passed" in said
    processes = [set(file.with_suffix(".py.log").read_text().split("\n")[:-1]) for file in files]
    assert [len(of_file) for of_file in processes] == [1, 1] and not processes[0] & processes[1]


def test_long_files_begin_first(files: list[Path]) -> None:
    (files[0].parent / "conftest.py").write_text(f"{CONFTEST}\nphases.SECONDS['test_b.py'] = 30\n")
    said = run(files, "--phase", "together")
    assert said.index("test_b.py::test_plain[0]") < said.index("test_a.py::test_plain[0]")


def test_the_files_that_are_said_to_take_long_exist() -> None:
    assert [name for name in phases.SECONDS if not (ROOT / name).exists()] == []
