"""The exercises: how an answer is checked (`engine`), and what is asked (`sets`)."""

from kvlab.course.exercises.engine import *  # noqa: F403
from kvlab.course.exercises.sets import *  # noqa: F403
