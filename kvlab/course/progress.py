"""How far a learner is: every exercise of the course, and what the function in their `mykv.py` is worth now."""

from __future__ import annotations

from pathlib import Path

from kvlab.course.exercises import engine, mykv, registry
from kvlab.errors import InputError

MARKS = {"right": "✔", "wrong": "✘", "todo": "○"}


def states(path: str | Path) -> dict[engine.Exercise, str]:
    """The state of each exercise, "right", "wrong" or "todo", in the order of the course. Checks each function now.

    Raises:
        InputError: the file does not import.
    """
    try:
        module = mykv.load_answers(mykv.find(path))
    except InputError as error:
        if "found none" not in str(error):
            raise
        return dict.fromkeys(registry.ALL, "todo")  # no file yet
    return {exercise: _state(exercise, mykv.own_function(module, exercise.name)) for exercise in registry.ALL}


def report(path: str | Path) -> str:
    """A line for each lesson with exercises, and one that says how many are solved."""
    state = states(path)
    lessons: dict[str, list[str]] = {}
    for exercise, now in state.items():
        lessons.setdefault(exercise.number[:2], []).append(f"{MARKS[now]} {exercise.number} {exercise.name}")
    solved = sum(now == "right" for now in state.values())
    lines = [f"{lesson}  {'   '.join(entries)}" for lesson, entries in lessons.items()]
    return "\n".join([*lines, f"{solved} of {len(state)} solved (✔ right, ✘ wrong, ○ not started)"])


def _state(exercise: engine.Exercise, function: object) -> str:
    return "todo" if not callable(function) else engine.grade(exercise, function).state
