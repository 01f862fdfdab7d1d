"""The book of faults and its tests belong together: every number has a test, every row was written by one."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.faults import book
from tests.faults.book import Row, open_book

FAULTS = range(1, 48)


def numbers_of_tests() -> set[int]:
    """The numbers in the markers of the tests in this folder."""
    trees = [ast.parse(file.read_text("utf-8")) for file in Path(__file__).parent.glob("test_*.py")]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    marks = [call for call in calls if ast.unparse(call.func) == "pytest.mark.fault"]
    return {
        keyword.value.value for mark in marks for keyword in mark.keywords if isinstance(keyword.value, ast.Constant)
    }


def test_every_fault_has_a_test_and_a_row() -> None:
    rows = json.loads(book.RESULTS.read_text("utf-8"))["rows"]
    assert numbers_of_tests() == {row["row"] for row in rows} == set(FAULTS)
    assert all(row["ok"] for row in rows)


def test_a_row_is_kept_when_its_block_ends_well() -> None:
    kept: list[Row] = []
    with open_book([4], kept)("hung", injected="SIGSTOP", expected="timeout") as row:
        row.seen = {"timeout": 3}
    assert [(row.row, row.fault, row.seen, row.ok) for row in kept] == [(4, "hung", {"timeout": 3}, True)]
    with pytest.raises(ZeroDivisionError), open_book([4], kept)("hung", injected="", expected="") as row:
        row.seen = 1 / 0
    with pytest.raises(AssertionError, match="say what it saw"), open_book([4], kept)("", injected="", expected=""):
        pass
    assert len(kept) == 1


@pytest.mark.parametrize(("numbers", "number"), [([], None), ([4, 5], None), ([4], 5)])
def test_a_row_has_one_of_the_numbers_of_its_test(numbers: list[int], number: int | None) -> None:
    with (
        pytest.raises((AssertionError, ValueError)),
        open_book(numbers, [])("", injected="", expected="", number=number) as row,
    ):
        row.seen = "something"


def test_recording_replaces_rows_of_the_same_fault_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book, "RESULTS", tmp_path / "faults.json")
    book.record([Row(4, "hung", "a", "b", 1, True), Row(2, "killed", "a", "b", 1, True)])
    book.record([Row(4, "hung", "a", "b", {("x", 1): [2.0]}, True, 1.23)])
    rows = json.loads((tmp_path / "faults.json").read_text())["rows"]
    assert [(row["row"], row["seen"], row["added_ms"]) for row in rows] == [(2, 1, None), (4, {"x, 1": [2.0]}, 1.2)]
