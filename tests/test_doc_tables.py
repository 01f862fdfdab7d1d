"""The tables of docs/03 are those of the committed results."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from scripts import build_tables

ROOT = Path(__file__).parents[1]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page and the results, in a folder of their own."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    monkeypatch.setattr(build_tables, "ROOT", tmp_path)
    return tmp_path / build_tables.PAGE


def test_the_page_has_the_tables_of_the_results() -> None:
    assert build_tables.main(["--check"]) == 0, "run python scripts/build_tables.py"


def test_a_changed_number_is_stale_and_is_written_again(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = copy.read_text("utf-8")
    row = next(line for line in whole.splitlines() if line.startswith("| LMDB, no sync | LMDB"))
    copy.write_text(whole.replace(row, re.sub(r"\d\.\d\d", "9.99", row, count=1)), "utf-8")
    assert copy.read_text("utf-8") != whole
    assert build_tables.main(["--check"]) == 1 and "is stale" in capsys.readouterr().err
    assert build_tables.main([]) == 0 and copy.read_text("utf-8") == whole


def test_a_page_without_a_table_is_refused(copy: Path) -> None:
    copy.write_text(copy.read_text("utf-8").replace("<!-- table:files -->", ""), "utf-8")
    with pytest.raises(ValueError, match=r"expected one mark for each of stores, .*files"):
        build_tables.main([])
