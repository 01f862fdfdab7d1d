"""Every exercise of the course, by its name, its number or its constant.

An exercise is written in one place, the module of its lesson (`lesson_07` for notebook 07). There
stand the reference solution, the typical wrong answers with their hints, and the cases. A new
lesson is one more entry of `LESSONS`.

The solution that a notebook shows in its folded block is the reference's source; a test keeps
them equal.
"""

from __future__ import annotations

from kvlab.course.exercises import (
    lesson_00,
    lesson_01,
    lesson_02,
    lesson_03,
    lesson_03b,
    lesson_04,
    lesson_04b,
    lesson_05,
    lesson_06,
    lesson_07,
    lesson_08,
    lesson_09,
    lesson_10,
    lesson_11,
    lesson_11b,
    lesson_12,
)
from kvlab.course.exercises.engine import Exercise
from kvlab.errors import InputError

LESSONS = (
    lesson_00,
    lesson_01,
    lesson_02,
    lesson_03,
    lesson_03b,
    lesson_04,
    lesson_04b,
    lesson_05,
    lesson_06,
    lesson_07,
    lesson_08,
    lesson_09,
    lesson_10,
    lesson_11,
    lesson_11b,
    lesson_12,
)
BY_CONSTANT = {name: e for lesson in LESSONS for name, e in vars(lesson).items() if isinstance(e, Exercise)}
"""The exercises by the constants that hold them: what `exercises.HIT_RATE` means in a notebook."""
ALL = tuple(sorted(BY_CONSTANT.values(), key=lambda exercise: exercise.number))
"""The exercises in the order of the course."""


def find(name_or_number: str) -> Exercise:
    """The exercise called "hit_rate", or the one with the number "00.2".

    Raises:
        InputError: there is none.
    """
    for exercise in ALL:
        if name_or_number in (exercise.name, exercise.number):
            return exercise
    known = ", ".join(f"{exercise.number} {exercise.name}" for exercise in ALL)
    raise InputError(f"expected the name or the number of an exercise, got {name_or_number!r} (there are: {known})")
