"""`--impl FILE`: the contract suites also run on the classes of a learner's `mykv.py`.

- A `Store` is created by `cls()`, or, if it has a parameter `client`, by `cls(client)`: once with fakeredis, once with
  a client of a real server. The suites do not test its TTLs, because each class configures TTLs differently.
- A `KVCache` is created by `cls(store=store, model=spec)`, where `store` is any `Store` and `spec` a
  `kvlab.core.keys.KVSpec`. The cache must store one value per block, and put blocks in the order of the
  prompt. fp16 and bf16 represent all values of the tests exactly. If its constructor has `salt=` and `block_tokens=`,
  the suite tests that caches with other ones share nothing.

`--rules FILE` (with `--impl`) runs only these tests and writes what became of each to a file; see `rules`.
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
    from kvlab.course.exercises import load_answers  # imported here, because most runs do not need the course

    try:
        module = load_answers(path)
    except InputError as error:
        raise pytest.UsageError(f"--impl: {error}") from error
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    return [c for c in own if not inspect.isabstract(c) and not c.__name__.startswith("_")]
