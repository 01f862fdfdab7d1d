"""A learner's guesses, and what came out: one number each, kept in the work folder for notebook 10.

Each notebook asks for one guess before its main measurement (`widgets.Guesses`) and says afterwards what
was measured (`came_out`). Notebook 10 plots the guesses against the measurements.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from kvlab.course.claims import CLAIMS
from kvlab.course.work import work_dir
from kvlab.errors import InputError
from kvlab.lab.streams import accept_any_text


@dataclass(frozen=True)
class Question:
    """A question whose answer is one number, and the unit of that number."""

    name: str
    text: str
    unit: str


QUESTIONS = {
    question.name: question
    for question in (
        *(Question(claim.name, claim.question, claim.unit) for claim in CLAIMS),
        Question("first_cache", "How much sooner does the first token come with your dict?", "times"),
        Question("best_order", "What share of a prompt's blocks hits when its parts are in the best order?", "percent"),
        Question("int8_error", "By how much does int8 KV change the probability of the next token?", "percent"),
        Question(
            "one_round_trip",
            "On one machine, how much sooner do 32 blocks of 384 KiB come in one round trip than in 32?",
            "times",
        ),
        Question("keys_moved", "What share of keys moves when a fourth node joins three on a ring?", "percent"),
    )
}
"""The claims' questions and one question for each further notebook, by name."""


def find(name: str) -> Question:
    """The question with this name.

    Raises:
        InputError: there is none.
    """
    if name not in QUESTIONS:
        raise InputError(f"expected the name of a question, got {name!r} (there are: {', '.join(QUESTIONS)})")
    return QUESTIONS[name]


def read_guess(question: Question, text: str) -> float:
    """The number in a learner's text.

    Raises:
        InputError: the text is no number, or one that cannot be the answer.
    """
    highest = 100.0 if question.unit.startswith("percent") else math.inf
    bound = "from 0 to 100" if highest == 100 else "of 0 or more"
    try:
        number = float(text.strip().rstrip("%x "))
    except ValueError:
        number = math.nan
    if not 0 <= number <= highest or math.isinf(number):
        raise InputError(f"expected a number {bound}, got {text!r}")
    return number


def came_out(name: str, value: float) -> None:
    """Keep what was measured for a question, and print it beside the learner's guess.

    The printed line begins with "measured:". Strict runs of the notebooks do not compare such lines.
    """
    question = find(name)
    _keep("measured.json", {**_kept("measured.json"), name: float(value)})
    guess = load_guesses().get(name)
    said = "you made no guess" if guess is None else f"you guessed {guess:g}"
    accept_any_text()
    print(f"measured: {value:.3g} {question.unit} ({said})")


def load_guesses() -> Mapping[str, float]:
    """The saved guesses by question; empty if there is no file or its content is not valid."""
    return _kept("guesses.json")


def load_measured() -> Mapping[str, float]:
    """What came out, by question; empty if there is no file or its content is not valid."""
    return _kept("measured.json")


def keep_guesses(guesses: Mapping[str, float]) -> None:
    """Save guesses. Those for other questions stay."""
    _keep("guesses.json", {**load_guesses(), **guesses})


def _kept(file: str) -> dict[str, float]:
    try:
        kept = json.loads((work_dir() / file).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(kept, dict):
        return {}
    return {k: float(v) for k, v in kept.items() if isinstance(v, int | float)}


def _keep(file: str, numbers: Mapping[str, float]) -> None:
    path = work_dir() / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers, indent=2) + "\n", "utf-8")
