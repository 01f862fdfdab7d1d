"""An exercise is found by its constant, its name and its number."""

import pytest

from kvlab.course import exercises
from kvlab.course.exercises import registry
from kvlab.errors import InputError


def test_the_order_is_the_courses_and_no_exercise_is_left_out() -> None:
    numbers = [exercise.number for exercise in exercises.ALL]
    assert numbers == sorted(set(numbers))
    for lesson in registry.LESSONS:
        name = lesson.__name__.rpartition("_")[2]  # "03", or "03b" for an optional second notebook
        own = [number for number in numbers if number.partition(".")[0] == name]
        assert own == [f"{name}.{i}" for i in range(1, len(own) + 1)] and len(own) >= (2 if name.isdigit() else 1)


def test_constant_name_and_number_are_the_same_exercise() -> None:
    assert exercises.HIT_RATE is exercises.find("hit_rate") is exercises.find("00.2")
    for constant in registry.BY_CONSTANT:
        exercise = getattr(exercises, constant)
        assert exercises.find(exercise.name) is exercises.find(exercise.number) is exercise
    assert set(registry.BY_CONSTANT) <= set(dir(exercises))


def test_an_exercise_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"got 'hitrate' \(there are: 00\.1 cacheable_prefix, "):
        exercises.find("hitrate")
    with pytest.raises(AttributeError, match="no exercise is called HITRATE"):
        _ = exercises.HITRATE
