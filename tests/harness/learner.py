"""`--impl FILE`: the classes of a learner's `mykv.py`, which the contract suites then run on too.

- A `Store` is made by `cls()`; everything is asked of it but TTLs, whose set-up is its own affair.
- A `KVCache` is made by `cls(store=store, model=spec)`, where `store` is any `Store` and `spec` a
  `kvlab.core.keys.KVSpec`. It keeps one value for each block, and offers blocks to the store in the order of
  the prompt. The values that it is given survive fp16 and bf16.
"""

from __future__ import annotations

import inspect

import pytest

from kvlab.errors import InputError

LEARNER = pytest.StashKey[list[type]]()


def learner_classes(path: str | None) -> list[type]:
    """The public classes that a learner's file defines."""
    if path is None:
        return []
    from kvlab.course.exercises import load_answers  # only here: the course is not what most runs test

    try:
        module = load_answers(path)
    except InputError as error:
        raise pytest.UsageError(f"--impl: {error}") from error
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    return [c for c in own if not inspect.isabstract(c) and not c.__name__.startswith("_")]
