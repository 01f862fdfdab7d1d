"""docs/exercises.md has every exercise, as the exercises and the notebooks have it now."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvlab.course import own
from kvlab.course.exercises import mykv, registry
from scripts import build_exercises

ROOT = Path(__file__).parents[1]


def test_the_index_is_that_of_the_exercises() -> None:
    assert build_exercises.main(["--check"]) == 0, "run python scripts/build_exercises.py"


def test_each_exercise_has_a_row_with_its_place_and_its_part() -> None:
    page = build_exercises.page()
    rows = [line for line in page.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [row.split(" | ")[0][2:] for row in rows] == [exercise.number for exercise in registry.ALL]
    for exercise, row in zip(registry.ALL, rows, strict=True):
        *_, where, difficulty, minutes, kind, part = row.strip("| ").split(" | ")
        assert (ROOT / "docs" / where.partition("](")[2].partition(")")[0]).is_file()
        assert (difficulty, minutes) == (str(exercise.difficulty), str(exercise.minutes))
        assert kind == ("mend" if exercise.given else "write")
        assert (part == "checked only") == (exercise.name not in {*mykv.PARTS, *own.BESIDE})


def test_a_renamed_section_makes_the_page_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("docs", "notebooks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(build_exercises, "ROOT", tmp_path)
    assert build_exercises.main(["--check"]) == 0
    notebook = tmp_path / "notebooks" / "05_redis_tier.ipynb"
    text = notebook.read_text("utf-8")
    assert "### Exercise 05.1: write a batch" in text
    notebook.write_text(text.replace("### Exercise 05.1: write a batch", "### Exercise 05.1: store a batch"), "utf-8")
    assert build_exercises.main(["--check"]) == 1 and "is stale" in capsys.readouterr().err
    assert build_exercises.main([]) == 0 == build_exercises.main(["--check"])
