"""Each test is in exactly one phase, and what belongs together runs in one process, in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = [tmp_path / f"test_{name}.py" for name in ("a", "b")]
    for file in made:
        file.write_text(TESTS)
    return made


def run(files: list[Path], *options: str) -> str:
    settings = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(files[0].parent), "-p", "tests.conftest")
    return run_pytest(*settings, "--color=no", "-vv", *options, *map(str, files)).stdout


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
    files[1].write_text(TESTS.replace("@pytest.mark.parametrize", "@pytest.mark.slow\n@pytest.mark.parametrize"))
    said = run(files, "--phase", "together")
    assert said.index("test_b.py::test_plain[0]") < said.index("test_a.py::test_plain[0]")


def test_lanes_can_be_chosen(files: list[Path]) -> None:
    assert "8 passed, 2 deselected" in run(files, "--lane", "units")
