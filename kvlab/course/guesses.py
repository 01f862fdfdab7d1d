"""A learner's guesses, and what came out: one number each, kept in the work folder for notebook 10.

Each notebook asks for one guess before its main measurement (`widgets.Guesses`) and says afterwards what
was measured (`came_out`). Notebook 10 plots the guesses against the measurements.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvlab.course.claims import CLAIMS
from kvlab.course.work import work_dir
from kvlab.errors import InputError
from kvlab.lab.streams import accept_any_text
from kvlab.lab.timing import Timings


@dataclass(frozen=True)
class Question:
    """A question whose answer is one number, the unit of that number, and the notebook that measures it."""

    name: str
    text: str
    unit: str
    lesson: str


@dataclass(frozen=True)
class Measured:
    """What came out for a question, and whether the machine was busy while it was measured."""

    value: float
    busy: bool = False


QUESTIONS = {
    question.name: question
    for question in (
        *(Question(claim.name, claim.question, claim.unit, claim.lesson) for claim in CLAIMS),
        Question("first_cache", "How much sooner does the first token come with your dict?", "times", "01"),
        Question(
            "paging_waste",
            "A chat server reserves room for the longest possible answer. What share of that memory holds no token?",
            "percent",
            "02",
        ),
        Question(
            "best_order", "What share of a prompt's blocks hits when its parts are in the best order?", "percent", "03"
        ),
        Question("int8_error", "By how much does int8 KV change the probability of the next token?", "percent", "04"),
        Question(
            "one_round_trip",
            "On one machine, how much sooner do 32 blocks of 384 KiB come in one round trip than in 32?",
            "times",
            "05",
        ),
        Question(
            "host_tier",
            "How much sooner is the KV of 1,024 tokens copied from host memory than computed?",
            "times",
            "06",
        ),
        Question(
            "batch_of_eight",
            "How many times the tokens a second does a batch of eight decode, compared with one request?",
            "times",
            "08",
        ),
        Question(
            "vllm_ttft",
            "How much sooner does vLLM's first token come if 1,504 of 1,536 tokens are in Redis?",
            "times",
            "09",
        ),
        Question(
            "gpu_break_even",
            "How many gigabytes a second must a wire carry, so that the KV of an 8B model is fetched as fast as an "
            "H100 computes it?",
            "GB/s",
            "11",
        ),
        Question(
            "file_get",
            "How many times as fast as from Redis over TCP does a value of 1 MiB come from a local file "
            "that the kernel has in memory?",
            "times",
            "11b",
        ),
        Question("faults_wrong", "In how many of the ten drills below does an answer change?", "drills", "12"),
        Question("keys_moved", "What share of keys moves when a fourth node joins three on a ring?", "percent", "07"),
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


def came_out(name: str, value: float, *timings: Timings, how: str = "measured") -> None:
    """Keep what came out for a question, and print it beside the learner's guess.

    Strict runs of the notebooks do not compare the printed line.

    Args:
        how: "measured" or "computed".
        timings: where the number comes from, if it is a time. It is kept with whether the machine was busy.
    """
    question = find(name)
    busy = any(timing.noisy or timing.unsteady for timing in timings)
    kept = {**load_measured(), name: Measured(float(value), busy)}
    _write("measured.json", {name: dataclasses.asdict(measured) for name, measured in kept.items()})
    guess = load_guesses().get(name)
    said = "you made no guess" if guess is None else f"you guessed {guess:g}"
    accept_any_text()
    print(f"{how}: {value:.3g} {question.unit}{' on a busy machine' if busy else ''} ({said})")


def load_guesses() -> Mapping[str, float]:
    """The saved guesses by question; empty if there is no file or its content is not valid."""
    return {name: float(guess) for name, guess in _read("guesses.json").items() if isinstance(guess, int | float)}


def load_measured() -> Mapping[str, Measured]:
    """What came out, by question; empty if there is no file or its content is not valid."""
    measured = {}
    for name, content in _read("measured.json").items():
        with contextlib.suppress(TypeError, KeyError, ValueError):  # an entry of another form is left out
            measured[name] = Measured(float(content["value"]), bool(content["busy"]))
    return measured


def keep_guesses(guesses: Mapping[str, float]) -> None:
    """Save guesses. Those for other questions stay."""
    _write("guesses.json", {**load_guesses(), **guesses})


def _read(file: str) -> dict[str, Any]:
    try:
        content = json.loads((work_dir() / file).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(file: str, content: Mapping[str, object]) -> None:
    path = work_dir() / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
