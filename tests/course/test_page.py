"""What a page shows besides plots and pictures."""

import pytest

from kvlab.course.page import machine_check, takeaway
from kvlab.lab.timing import Timings

QUIET = Timings({"a": [1.0, 1.1, 1.0], "b": [2.0, 2.0, 2.1]}, aa_ratio=1.02)


def test_a_takeaway_is_marked() -> None:
    assert takeaway("It is 3.").data == "> **Takeaway.** It is 3."


def test_a_quiet_machine_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    machine_check("the plot", QUIET)
    assert capsys.readouterr().out == "machine: quiet (the same work measured twice differs by 2%)\n"


@pytest.mark.parametrize(
    "busy", [Timings(QUIET.seconds, aa_ratio=1.3), Timings({"a": [0.084, 0.525, 0.09, 0.4]}, aa_ratio=1.01)]
)
def test_a_busy_one_says_what_not_to_trust(busy: Timings, capsys: pytest.CaptureFixture[str]) -> None:
    machine_check("the plot", QUIET, busy)
    said = capsys.readouterr().out
    assert said.startswith("machine: BUSY.") and "Do not trust the plot:" in said
    assert said.count("\n") == 1, "strict runs leave out one line"
