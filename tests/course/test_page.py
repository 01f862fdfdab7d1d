"""What a page shows besides plots and pictures."""

from kvlab.course.page import takeaway


def test_a_takeaway_is_marked() -> None:
    assert takeaway("It is 3.").data == "> **Takeaway.** It is 3."
