"""How far a learner is: every exercise of the course, and what the function in their `mykv.py` is worth now."""

from __future__ import annotations

from pathlib import Path

from kvlab.course.exercises import engine, mykv, registry
from kvlab.course.work import work_dir
from kvlab.errors import InputError

MARKS = {"right": "✔", "wrong": "✘", "todo": "○"}


def states(path: str | Path) -> dict[engine.Exercise, str]:
    """The state of each exercise, "right", "wrong" or "todo", in the order of the course. Checks each function now.

    Raises:
        InputError: the file does not import.
    """
    module = mykv.load_answers(path)
    return {exercise: _state(exercise, mykv.own_function(module, exercise.name)) for exercise in registry.ALL}


def report(path: str | Path | None = None) -> str:
    """A line for each lesson with exercises, and one that says how many are solved.

    Args:
        path: the learner's file; by default `mykv.py`, which need not exist yet.

    Raises:
        InputError: the named file does not exist, or the file does not import.
    """
    try:
        file: Path | None = mykv.find(path or "mykv.py")
    except InputError:
        if path is not None:
            raise
        file = None
    state = dict.fromkeys(registry.ALL, "todo") if file is None else states(file)
    lessons: dict[str, list[str]] = {}
    for exercise, now in state.items():
        lessons.setdefault(exercise.number.partition(".")[0], []).append(
            f"{MARKS[now]} {exercise.number} {exercise.name}"
        )
    solved = sum(now == "right" for now in state.values())
    lines = [f"{lesson}  {'   '.join(entries)}" for lesson, entries in lessons.items()]
    where = f"no mykv.py yet; it will be {work_dir() / 'mykv.py'}" if file is None else f"in {file}"
    if "wrong" in state.values():
        lines.append(f"why ✘: python -m kvlab demo --impl {file}")
    return "\n".join([*lines, f"{solved} of {len(state)} solved (✔ right, ✘ wrong, ○ not started), {where}"])


def _state(exercise: engine.Exercise, function: object) -> str:
    return "todo" if not callable(function) else engine.grade(exercise, function).state
