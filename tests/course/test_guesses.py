"""Guesses: which numbers are taken, and what is said when the measurement is there."""

import json
from pathlib import Path

import pytest

from kvlab.course import guesses
from kvlab.course.claims import CLAIMS
from kvlab.errors import InputError
from kvlab.lab.timing import Timings

TIMES, PERCENT = guesses.find("latency"), guesses.find("cost")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVLAB_WORK", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("text", "number"), [("4", 4), (" 4.5 x", 4.5), ("50 %", 50), ("1e2", 100), ("0", 0)])
def test_a_number_is_read_with_or_without_its_unit(text: str, number: float) -> None:
    assert guesses.read_guess(PERCENT, text) == number


@pytest.mark.parametrize("text", ["", "much", "-1", "nan", "inf", "4,5", "1e999"])
def test_what_cannot_be_the_answer_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a number of 0 or more"):
        guesses.read_guess(TIMES, text)


@pytest.mark.parametrize("text", ["-50 %", "101"])
def test_a_share_is_from_0_to_100(text: str) -> None:
    with pytest.raises(InputError, match="from 0 to 100"):
        guesses.read_guess(PERCENT, text)


def test_what_came_out_is_said_beside_the_guess_and_kept(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guesses.came_out("latency", 11.72)
    guesses.keep_guesses({"latency": 4})
    guesses.came_out("latency", 12.3)
    guesses.came_out("cost", 3)
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first == "measured: 11.7 times (you made no guess)"
    assert second == "measured: 12.3 times (you guessed 4)"
    assert guesses.load_measured() == {"latency": guesses.Measured(12.3), "cost": guesses.Measured(3.0)}
    assert json.loads((work / "guesses.json").read_text()) == {"latency": 4}


def test_a_time_of_a_busy_machine_is_kept_as_such(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = Timings({"a": [1.0] * 5}, aa_ratio=1.0)
    busy = Timings({"a": [1.0] * 5}, aa_ratio=1.2)
    guesses.came_out("latency", 2, quiet)
    guesses.came_out("hashing", 3, quiet, busy)
    first, second = capsys.readouterr().out.splitlines()
    assert "busy" not in first and second == "measured: 3 microseconds on a busy machine (you made no guess)"
    kept = guesses.load_measured()
    assert (kept["latency"].busy, kept["hashing"].busy) == (False, True)
    (work / "measured.json").write_text('{"latency": 3.0, "hashing": {"value": "much"}, "cost": {"value": 1}}')
    assert guesses.load_measured() == {}, "entries of another form are left out"


def test_every_claim_is_a_question_and_an_unknown_one_is_told() -> None:
    assert {claim.name for claim in CLAIMS} <= guesses.QUESTIONS.keys()
    with pytest.raises(InputError, match=r"'x'.*latency, throughput"):
        guesses.came_out("x", 1)
