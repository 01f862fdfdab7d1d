"""The exercises: how an answer is checked (`engine`) and kept (`mykv`), and the exercises of each lesson (`lesson_…`).

A notebook says `exercises.check(exercises.HIT_RATE, hit_rate)`: the constants of the lessons are
attributes of this package.
"""

from kvlab.course.exercises.engine import MINUTES, Exercise, Verdict, Wrong, check, grade, keep
from kvlab.course.exercises.mykv import load_answers
from kvlab.course.exercises.registry import ALL, BY_CONSTANT, find

__all__ = ["ALL", "MINUTES", "Exercise", "Verdict", "Wrong", "check", "find", "grade", "keep", "load_answers"]


def __getattr__(constant: str) -> Exercise:
    try:
        return BY_CONSTANT[constant]
    except KeyError:
        raise AttributeError(f"no exercise is called {constant} (there are: {', '.join(BY_CONSTANT)})") from None


def __dir__() -> list[str]:
    return [*__all__, *BY_CONSTANT]
