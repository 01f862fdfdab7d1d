"""Live where the program is there, a named machine's recording where it is not, the same shape both ways."""

import re
from pathlib import Path

import pytest

from kvlab.course import engines, guesses, recorded
from kvlab.course.claims import CLAIMS
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


# --- copies for readers who have only the package -----------------------------------------------
TRACE = Path(__file__).parents[3] / "shared" / "traces" / "conversation_trace.jsonl"


@pytest.mark.parametrize("name", ["10_strategies", "11b_stores", "11b_peers"])
def test_a_copy_is_that_of_the_result(name: str) -> None:
    made = recorded.SLOW[name]()
    machine = made.pop("machine")
    assert recorded.load_recording(name) == (made, machine), f"python -m kvlab.course.recorded {name}"


def test_the_copied_answers_are_about_those_of_the_notebooks() -> None:
    """About, because a notebook that runs again measures again; twice as much is another answer."""
    made, (copied, _) = recorded.answers(), recorded.load_recording("10_answers")
    assert copied.keys() == made.keys() - {"machine"} <= guesses.QUESTIONS.keys()
    assert {claim.name for claim in CLAIMS if claim.lesson != "10"} <= copied.keys()
    for name, value in copied.items():
        assert value == pytest.approx(made[name], rel=0.5), f"{name}: python -m kvlab.course.recorded 10_answers"


@pytest.mark.slow
@pytest.mark.skipif(not TRACE.exists(), reason="Mooncake's conversation trace does not ship")
def test_the_copied_replay_is_that_of_the_trace() -> None:
    assert recorded.load_recording("10_trace")[0] == recorded.trace(TRACE)


def test_the_copied_replay_has_the_known_hit_rates() -> None:
    result, _ = recorded.load_recording("10_trace")
    assert [round(rate, 3) for rate in result["rates"].values()] == [0.366, 0.374, 0.382, 0.384]
    assert [round(rate, 3) for rate in result["lru"].values()] == [0.044, 0.211, 0.326, 0.355, 0.364, 0.366]
