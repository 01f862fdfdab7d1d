"""Exercises that never stop a notebook.

A learner fills in a stub; one call checks it and gives back something that works:

    hit_rate = exercises.check(exercises.HIT_RATE, hit_rate)

prints `○ not started`, `✘ got … expected … hint: …` or `✔ 4 of 4`, never raises, and
returns the learner's function if it passed, else the reference, so that "Run all" always
reaches the end. A function that passes is written to `mykv.py` in the work folder: answers
accumulate, and `python -m kvlab demo --impl work/mykv.py` runs the learner's system.

Hints come from typical wrong answers. An exercise lists them as functions: when the learner's
results agree with those of a wrong answer, or both raise the same error on the same case, its
hint fits. Tests run each wrong answer through the check and expect exactly its hint. The
exercises themselves are in `lesson_00`, `lesson_01` and so on.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import inspect
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from kvlab.course.work import work_dir
from kvlab.errors import InputError
from kvlab.lab.streams import accept_any_text

F = TypeVar("F", bound=Callable[..., Any])

HEADER = '''"""My distributed KV cache, as far as it goes. The course writes each answer here once it passes.

Run it: python -m kvlab demo --impl work/mykv.py
"""

import bisect
import hashlib
import math
import struct
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
'''


@dataclass(frozen=True)
class Wrong:
    """A typical wrong answer and the hint that it earns."""

    answer: Callable[..., Any]
    hint: str


@dataclass(frozen=True)
class Exercise:
    """One function to write.

    Attributes:
        name: the function's name, also in `mykv.py`.
        number: notebook and running number, "01.2".
        reference: the solution.
        cases: argument tuples that the answer is tried on.
        wrong: typical wrong answers; each differs from the reference on at least one case.
        hint: what to say when no typical wrong answer fits.
    """

    name: str
    number: str
    reference: Callable[..., Any]
    cases: Sequence[tuple[Any, ...]]
    wrong: Sequence[Wrong]
    hint: str


@dataclass(frozen=True)
class Raised:
    """In place of a result: the answer raised an error of this type."""

    error: type[Exception]


@dataclass(frozen=True)
class Verdict:
    """What a check found: "todo", "wrong" or "right", and the lines to print."""

    state: str
    text: str


def grade(exercise: Exercise, answer: Callable[..., Any]) -> Verdict:
    """Try an answer on all cases. Never raises."""
    title = f"{exercise.number} {exercise.name}"
    got: list[Any] = []
    for args in exercise.cases:
        try:
            got.append(answer(*_copied(args)))
        except NotImplementedError:
            return Verdict("todo", f"○ {title}: not started")
        except Exception as error:  # a learner's code may raise anything
            line = f"✘ {title}: {_call(exercise, args)} raised {type(error).__name__}: {error}"
            return Verdict("wrong", f"{line}\n  hint: {_hint(exercise, [*got, Raised(type(error))])}")
    if all(result is None or result is ... for result in got):
        return Verdict("todo", f"○ {title}: not started")
    expected = [exercise.reference(*_copied(args)) for args in exercise.cases]
    right = [_same(g, e) for g, e in zip(got, expected, strict=True)]
    if all(right):
        return Verdict("right", f"✔ {title}: {len(right)} of {len(right)}")
    i = right.index(False)
    lines = [
        f"✘ {title}: {_call(exercise, exercise.cases[i])}",
        f"  got      {_short(got[i])}",
        f"  expected {_short(expected[i])}",
        f"  hint: {_hint(exercise, got)}",
    ]
    return Verdict("wrong", "\n".join(lines))


def check(exercise: Exercise, answer: F) -> F:
    """Print what `grade` finds, keep a right answer in `mykv.py`, and return the answer or else the reference."""
    verdict = grade(exercise, answer)
    accept_any_text()  # not every terminal has a ✔
    print(verdict.text)
    if verdict.state != "right":
        print("  (the notebook goes on with the reference solution)")
        return exercise.reference  # type: ignore[return-value]
    print(f"  {keep(exercise, answer)}")
    return answer


def keep(exercise: Exercise, answer: Callable[..., Any]) -> str:
    """Write a right answer into `mykv.py`, replacing an older one; return a line that says so, or why not."""
    path = work_dir() / "mykv.py"
    called = getattr(answer, "__name__", exercise.name)
    if called != exercise.name:
        return f"not kept in mykv.py: the function is called {called}, expected {exercise.name}"
    try:
        before = path.read_text("utf-8") if path.exists() else HEADER
        after = _replaced(before, exercise.name, inspect.getsource(answer))
        if not _stands_alone(exercise, after):
            return "not kept in mykv.py: the function uses something from this notebook; put it inside the function"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(after, "utf-8")
    except (OSError, TypeError, ValueError, SyntaxError) as error:  # say, a mykv.py of another encoding
        return f"not kept in mykv.py: {error}"
    return "kept in mykv.py"


def _stands_alone(exercise: Exercise, module: str) -> bool:
    """Whether the answer in this text of a `mykv.py` is right without the notebook around it."""
    with tempfile.TemporaryDirectory(prefix="kvlab-") as folder:
        trial = Path(folder) / "mykv.py"
        trial.write_text(module, "utf-8")
        try:
            return grade(exercise, getattr(load_answers(trial), exercise.name)).state == "right"
        except (AttributeError, InputError):
            return False


def load_answers(path: str | Path) -> ModuleType:
    """Import a learner's `mykv.py`. It is their own code, so it is simply run.

    Raises:
        InputError: there is no such file, or it does not import.
    """
    path = Path(path)
    spec = importlib.util.spec_from_file_location("mykv", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"expected a Python file with answers, found none at {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever their code raises is theirs to mend
        raise InputError(f"{path} does not import: {type(error).__name__}: {error}") from error
    return module


def _hint(exercise: Exercise, got: list[Any]) -> str:
    """The hint of the typical wrong answer that gives the same results, else the general one.

    `got` ends with the first case that raised; a wrong answer fits if it raises the same error there.
    """
    for wrong in exercise.wrong:
        if all(_same(g, _outcome(wrong.answer, args)) for g, args in zip(got, exercise.cases, strict=False)):
            return wrong.hint
    return exercise.hint


def _outcome(answer: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return answer(*_copied(args))
    except Exception as error:  # a wrong answer may fail on some case, as a learner's may
        return Raised(type(error))


def _same(got: Any, expected: Any) -> bool:
    """Equal, floats and tensors to a relative 1e-4 (a learner may sum in another order)."""
    try:
        if isinstance(expected, torch.Tensor):
            got = torch.as_tensor(got)
            return got.shape == expected.shape and torch.allclose(got.double(), expected.double(), 1e-4, 1e-5)
        if isinstance(expected, float):
            return bool(abs(float(got) - expected) <= 1e-4 * max(1.0, abs(expected)))
        return bool(got == expected)
    except (TypeError, ValueError, RuntimeError):
        return False


def _copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments that an answer may write to without spoiling the next case."""
    return copy.deepcopy(args)


def _call(exercise: Exercise, args: tuple[Any, ...]) -> str:
    names = inspect.signature(exercise.reference).parameters
    return f"{exercise.name}({', '.join(f'{n}={_short(a)}' for n, a in zip(names, args, strict=False))})"


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        if value.numel() > 6:
            return f"tensor{tuple(value.shape)} beginning {[round(x, 3) for x in value.flatten()[:3].tolist()]}"
        return str(value)
    text = repr(value)
    return text if len(text) <= 90 else f"{text[:87]}..."


def _replaced(module: str, name: str, source: str) -> str:
    """`module` with its function `name` replaced by `source`, or with it at the end."""
    lines = module.rstrip().splitlines()
    for node in ast.parse(module).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            begin = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            return "\n".join([*lines[:begin], source.rstrip(), *lines[node.end_lineno :]]) + "\n"
    return "\n".join([*lines, "", "", source.rstrip()]) + "\n"
