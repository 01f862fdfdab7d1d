"""Live where the program is there, a named machine's recording where it is not, the same shape both ways."""

import re
from pathlib import Path

import pytest

from kvlab.course import engines, recorded
from kvlab.course.recorded import live_or_recorded
from kvlab.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(recorded, "RECORDED", tmp_path)
    monkeypatch.delenv("KVLAB_RECORD", raising=False)
    return tmp_path


def test_recorded_once_then_shown_where_the_program_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVLAB_RECORD", "1")
    live = live_or_recorded("x", lambda: {"n": 3}, needs="sh")
    assert capsys.readouterr().out == "source: measured on this machine\n"
    shown = live_or_recorded("x", lambda: pytest.fail("not run"), needs="no-such-program")
    assert shown == live
    assert capsys.readouterr().out.startswith("source: recorded on ")


def test_a_recording_keeps_every_character(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLAB_RECORD", "1")
    monkeypatch.setattr(recorded, "describe_machine", lambda: "Prozessor für Größe™ 前")
    live = live_or_recorded("x", lambda: {"größer": "≥ 3 …"}, needs="sh")
    assert recorded.load_recording("x") == (live, "Prozessor für Größe™ 前")
    assert "größer" in (folder / "x.json").read_bytes().decode("utf-8")


def test_what_no_notebook_measures_has_a_way_to_be_made() -> None:
    assert set(recorded.SLOW) <= {file.stem for file in recorded.RECORDED.glob("*.json")}


def test_live_leaves_no_recording_unless_asked(folder: Path) -> None:
    live_or_recorded("x", lambda: {"n": 3}, needs="sh")
    assert not list(folder.iterdir())


def test_a_missing_recording_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no recording called 'x'"):
        live_or_recorded("x", dict, needs="no-such-program")


def test_the_notebooks_recordings_are_committed() -> None:
    text = "\n".join(p.read_text("utf-8") for p in (Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
    names = set(re.findall(r'(?:live_or|load)_record(?:ed|ing)\(\\"(\w+)\\"', text))
    assert names | {engines.NAME, engines.RAY} == {file.stem for file in recorded.RECORDED.glob("*.json")}
    for name in names:
        result, machine = recorded.load_recording(name)
        assert result and "cores" in machine
