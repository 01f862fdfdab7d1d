"""The exercise of notebook 03b, near matches and moved blocks: where a text can be cut and keeps its tokens."""

from __future__ import annotations

from kvlab.course.exercises.engine import Exercise, Wrong


def safe_cut(text: str, limit: int) -> int:
    """The last place up to `limit` before a single space behind a word; 0 if none."""
    for place in range(min(limit, len(text) - 2), 0, -1):
        word = text[place - 1].isalnum() or text[place - 1] == "_"
        if word and text[place] == " " and not text[place + 1].isspace():
            return place
    return 0


def _any_space(text: str, limit: int) -> int:
    return max(text.rfind(" ", 0, limit + 1), 0)


def _behind_the_space(text: str, limit: int) -> int:
    place = safe_cut(text, limit)
    return place + 1 if place else 0


def _behind_a_sign_too(text: str, limit: int) -> int:
    for place in range(min(limit, len(text) - 2), 0, -1):
        if text[place] == " " and not text[place - 1].isspace() and not text[place + 1].isspace():
            return place
    return 0


def _before_a_run_too(text: str, limit: int) -> int:
    for place in range(min(limit, len(text) - 1), 0, -1):
        if text[place] == " " and (text[place - 1].isalnum() or text[place - 1] == "_"):
            return place
    return 0


def _first(text: str, limit: int) -> int:
    return next((i for i in range(1, limit + 1) if safe_cut(text, i) == i), 0)


def _limit_itself_left_out(text: str, limit: int) -> int:
    return safe_cut(text, limit - 1)


def _minus_one(text: str, limit: int) -> int:
    return safe_cut(text, limit) or -1


SAFE_CUT = Exercise(
    name="safe_cut",
    number="03b.1",
    difficulty=3,
    reference=safe_cut,
    cases=(
        ("one two three", 9),
        ("one two three", 7),
        ("find_1 x = 2 + 3\n    return", 22),
        ("end of line \n next", 14),
        ("wide  gap", 8),
        ("nothing", 5),
        ("one", 10),
    ),
    wrong=(
        Wrong(_any_space, "not every space will do: behind a sign, in a run or at a line's end the halves can change"),
        Wrong(_behind_the_space, "the space belongs to the word behind it, so the cut comes before the space"),
        Wrong(_behind_a_sign_too, "the character before the space must be of a word: a letter, a digit or _"),
        Wrong(_before_a_run_too, "a run of spaces is one token, and so are a space and a line break: no cut there"),
        Wrong(_first, "the last such place: a piece should be as long as the limit allows"),
        Wrong(_limit_itself_left_out, "the limit itself is allowed: text[:limit] is not longer than limit"),
        Wrong(_minus_one, "0 if there is no such place, not -1: text[:-1] would cut at the end"),
    ),
    hint="go back from the limit to a place with a word character before it, a space on it and no space behind that",
    after="The same rule lets a program tokenise a long text in pieces, in parallel.",
)
