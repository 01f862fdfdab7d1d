"""How far a learner is: every exercise of the course, and what the function in their `mykv.py` is worth now."""

from __future__ import annotations

from pathlib import Path

from kvlab.course.exercises import engine, mykv, registry
from kvlab.course.work import work_dir
from kvlab.errors import InputError

MARKS = {"right": "✔", "wrong": "✘", "todo": "○"}
NOT_STARTED = engine.Verdict("todo", "")


def verdicts(path: str | Path) -> dict[engine.Exercise, engine.Verdict]:
    """The verdict on each exercise, in the order of the course. Checks each function now.

    Raises:
        InputError: the file does not import.
    """
    module = mykv.load_answers(path)
    return {exercise: _verdict(exercise, mykv.own_function(module, exercise.name)) for exercise in registry.ALL}


def report(path: str | Path | None = None) -> str:
    """A line for each lesson with exercises, why wrong answers are wrong, and a line that says how many are solved.

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
    found = dict.fromkeys(registry.ALL, NOT_STARTED) if file is None else verdicts(file)
    lessons: dict[str, list[str]] = {}
    for exercise, verdict in found.items():
        lesson = exercise.number.partition(".")[0]
        lessons.setdefault(lesson, []).append(f"{MARKS[verdict.state]} {exercise.number} {exercise.name}")
    lines = [f"{lesson}  {'   '.join(entries)}" for lesson, entries in lessons.items()]
    lines += [verdict.text for verdict in found.values() if verdict.state == "wrong"]
    solved = sum(verdict.state == "right" for verdict in found.values())
    where = f"no mykv.py yet; it will be {work_dir() / 'mykv.py'}" if file is None else f"in {file}"
    return "\n".join([*lines, f"{solved} of {len(found)} solved (✔ right, ✘ wrong, ○ not started), {where}"])


def _verdict(exercise: engine.Exercise, function: object) -> engine.Verdict:
    return NOT_STARTED if not callable(function) else engine.grade(exercise, function)
