"""Where a learner's own files are."""

from pathlib import Path

import pytest

from kvlab.course.work import work_dir


def test_the_work_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KVLAB_WORK", raising=False)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert work_dir() == tmp_path / "work"
    monkeypatch.chdir(tmp_path)
    assert work_dir() == tmp_path
    monkeypatch.setenv("KVLAB_WORK", "/elsewhere")
    assert work_dir() == Path("/elsewhere")
