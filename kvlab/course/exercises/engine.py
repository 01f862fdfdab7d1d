"""Exercises that never stop a notebook.

A learner fills in a stub; one call checks it and gives back something that works:

    hit_rate = exercises.check(exercises.HIT_RATE, hit_rate)

prints `○ not started`, `✘ got … expected … hint: …` or `✔ 4 of 4`, never raises, and returns the
learner's function if it passed. Otherwise it returns a stand-in that calls the reference, so that
"Run all" reaches the end. The stand-in remembers the learner's function: checking it again checks
that function again, and never passes. A function that passes is written to `mykv.py` (see `mykv`).

Hints come from typical wrong answers. An exercise lists them as functions. If the learner's results
agree with those of a wrong answer, or both raise the same error on the same case, its hint is shown.
Tests run each wrong answer through the check and expect exactly its hint. The exercises themselves
are in `lesson_00`, `lesson_01` and so on.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dis
import functools
import inspect
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

import kvlab
from kvlab.course.exercises import mykv
from kvlab.course.exercises.differences import differences, same, short, short_text
from kvlab.course.exercises.limits import SECONDS, Forbidden, TooLong, call
from kvlab.lab.streams import accept_any_text

F = TypeVar("F", bound=Callable[..., Any])
_passed: dict[Exercise, Callable[..., Any]] = {}  # what passed last

_PACKAGE = Path(kvlab.__file__).parent
_RETURNS_NONE = ({"LOAD_CONST", "RETURN_VALUE"}, {"RETURN_CONST"}, {"RETURN_VALUE", "LOAD_COMMON_CONSTANT"})


MINUTES = {1: 3, 2: 6, 3: 12, 4: 20, 5: 35}
"""Minutes that an exercise takes, by its difficulty: 1 a line that the text gives, 2 a rule to apply, 3 a rule
with a trap, 4 several rules together, 5 a small program."""

PRINTED = 3
"""Lines that are shown of what a wrong answer prints."""


@dataclass(frozen=True)
class Wrong:
    """A typical wrong answer and the hint that it earns."""

    answer: Callable[..., Any]
    hint: str


@dataclass(frozen=True, eq=False)
class Exercise:
    """One function to write.

    Attributes:
        name: the function's name, also in `mykv.py`.
        number: notebook and running number, "01.2".
        difficulty: 1 to 5, see `MINUTES`.
        reference: the solution.
        cases: argument tuples that the answer is tried on.
        wrong: typical wrong answers; each differs from the reference on at least one case.
        hint: the hint if no typical wrong answer fits.
        forbidden: a part of the names of torch operations that the answer must not use; "" for none.
        after: what to say once the answer is right.
        given: for a hunt, the faulty function that the notebook gives instead of a stub. Unchanged it counts as
            not started, and the check shows where it fails.
        observe: for an answer that acts on its arguments: from what it returned and the arguments to what is
            compared. By default what it returned.
    """

    name: str
    number: str
    difficulty: int
    reference: Callable[..., Any]
    cases: Sequence[tuple[Any, ...]]
    wrong: Sequence[Wrong]
    hint: str
    forbidden: str = ""
    after: str = ""
    given: Callable[..., Any] | None = None
    observe: Callable[[Any, tuple[Any, ...]], Any] = lambda result, args: result

    @property
    def minutes(self) -> int:
        """Minutes that the exercise takes, see `MINUTES`."""
        return MINUTES[self.difficulty]

    def run(self, answer: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """What an answer does with one case. It gets copies, so that it cannot spoil the next case."""
        args = copy.deepcopy(args)
        return self.observe(answer(*args), args)


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
    """Try an answer on all cases. Never raises. What the answer prints is part of a wrong verdict's text."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        verdict = _grade(exercise, answer)
    lines = printed.getvalue().splitlines()
    if verdict.state != "wrong" or not lines:
        return verdict
    shown = [f"  it printed: {short_text(line)}" for line in lines[:PRINTED]]
    more = [f"  (and {len(lines) - PRINTED} more lines)"] if len(lines) > PRINTED else []
    return Verdict("wrong", "\n".join([verdict.text, *shown, *more]))


def _grade(exercise: Exercise, answer: Callable[..., Any]) -> Verdict:
    verdict = _tried(exercise, answer)
    if not _is_given(exercise, answer):
        return verdict
    fails = [line for line in verdict.text.removeprefix("✘ ").splitlines() if not line.startswith("  hint: ")]
    return Verdict("todo", "\n".join(["○ " + fails[0].replace(": ", ": not changed yet. ", 1), *fails[1:]]))


def _tried(exercise: Exercise, answer: Callable[..., Any]) -> Verdict:
    title = f"{exercise.number} {exercise.name}"
    todo = Verdict("todo", f"○ {title}: not started")
    if _is_stub(answer):
        return todo
    got: list[Any] = []
    for i, args in enumerate(exercise.cases):
        try:
            got.append(call(exercise.run, (answer, args), exercise.forbidden))
        except NotImplementedError:
            return todo
        except Forbidden as error:
            return _wrong(f"{title}: used {error}, which is what this exercise builds", [], "write the steps yourself")
        except TooLong:
            said = f"{title}: {_call(exercise, args)} had no result after {SECONDS:g} s"
            return _wrong(said, _place(exercise, i), "does every loop end?")
        except Exception as error:  # a learner's code may raise anything
            said = f"{title}: {_call(exercise, args)} raised {_kind(error)}: {error}"
            return _wrong(said, _place(exercise, i), _hint(exercise, [*got, Raised(type(error))]))
    if all(result is ... for result in got):
        return todo
    expected = [exercise.run(exercise.reference, args) for args in exercise.cases]
    right = [same(g, e) for g, e in zip(got, expected, strict=True)]
    if all(right):
        return Verdict("right", f"✔ {title}: {len(right)} of {len(right)}")
    at = right.index(False)
    place = _place(exercise, at)
    if got[at] is None and all(result is None for result in got):
        said = f"{title}: {_call(exercise, exercise.cases[at])} returned None"
        return _wrong(said, place, "is there a `return`? What a function prints is not what it returns")
    said = f"{title}: {_call(exercise, exercise.cases[at])}"
    lines = differences(got[at], expected[at])
    if isinstance(expected[at], list) and all(isinstance(line, str) for line in expected[at]):
        lines[0] = re.sub(r" at index \d+$", "", lines[0])  # each of these says what it is
    return _wrong(said, [*lines, *place], _hint(exercise, got))


def check(exercise: Exercise, answer: F) -> F:
    """Print what `grade` finds and keep a right answer in `mykv.py`.

    Returns:
        The answer if it is right, else a stand-in that calls the reference.
    """
    accept_any_text()  # not every terminal has a ✔
    again = getattr(answer, "kvlab_answer", None)
    verdict = grade(exercise, again or answer)
    if _is_ours(again or answer):
        verdict = Verdict("todo", f"○ {exercise.number} {exercise.name}: not started (this is the course's solution)")
    print(verdict.text)
    if verdict.state == "right" and again is None:
        print(f"  {keep(exercise, answer)}")
        if _passed.get(exercise) is answer:
            print("  (the same function as at the last check; a new one must have this name)")
        _passed[exercise] = answer
        if exercise.after:
            print(f"  {exercise.after}")
        return answer
    if again is not None:
        print("  (checked again as it was: to check another one, run the cell that defines it, under the same name)")
    print("  (the notebook goes on with the reference solution)")
    return _stand_in(exercise, again or answer)  # type: ignore[return-value]


def keep(exercise: Exercise, answer: Callable[..., Any]) -> str:
    """Write a right answer into `mykv.py`, replacing an older one; return a line that says so, or why not."""
    called = getattr(answer, "__name__", exercise.name)
    if called != exercise.name:
        return f"not kept in mykv.py: the function is called {called}, expected {exercise.name}"
    try:
        source = inspect.getsource(answer)
        return mykv.keep(exercise.name, source, lambda kept: grade(exercise, kept).state == "right")
    except (OSError, TypeError, ValueError, SyntaxError) as error:  # say, a mykv.py of another encoding
        return f"not kept in mykv.py: {error}"


def _stand_in(exercise: Exercise, answer: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does what the reference does, and remembers the learner's."""

    @functools.wraps(exercise.reference)
    def stand_in(*args: Any, **settings: Any) -> Any:
        return exercise.reference(*args, **settings)

    stand_in.kvlab_answer = answer  # type: ignore[attr-defined]
    return stand_in


def _is_stub(answer: Callable[..., Any]) -> bool:
    """Whether a function has no body yet: nothing but a docstring, `...` or `pass`."""
    code = getattr(answer, "__code__", None)
    if code is None:
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("RESUME", "NOP")]
    names, values = {step.opname for step in steps}, [step.argval for step in steps if "CONST" in step.opname]
    return names in _RETURNS_NONE and values == [None]


def _is_given(exercise: Exercise, answer: Callable[..., Any]) -> bool:
    """Whether a function is the faulty one that the exercise begins with, not changed yet."""
    own, given = getattr(answer, "__code__", None), getattr(exercise.given, "__code__", None)
    if exercise.given is None or own is None or given is None:
        return False
    if _content(own) == _content(given):
        return True
    # Where a module's import stands in the same file, Python compiles calls of it to other bytes than in a cell.
    text = _text(answer)
    return text is not None and text == _text(exercise.given)


def _text(function: Callable[..., Any]) -> str | None:
    """What a function's source says, without its name, comments and layout; None if there is no source."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, ValueError, SyntaxError):
        return None
    if isinstance(node, ast.FunctionDef):
        node.name = ""
    return ast.dump(node)


def _content(code: CodeType) -> tuple[Any, ...]:
    """What a function does, without its name and its place in a file."""
    constants = tuple(_content(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.co_code, constants, code.co_names, code.co_varnames


def _is_ours(answer: Callable[..., Any]) -> bool:
    """Whether a function is part of this package, and so no learner's answer."""
    code = getattr(answer, "__code__", None)
    return code is not None and Path(code.co_filename).is_relative_to(_PACKAGE)


def _wrong(said: str, lines: Sequence[str], hint: str) -> Verdict:
    return Verdict("wrong", "\n".join([f"✘ {said}", *(f"  {line}" for line in lines), f"  hint: {hint}"]))


def _hint(exercise: Exercise, got: list[Any]) -> str:
    """The hint of the typical wrong answer that gives the same results, else the general one.

    `got` ends with the first case that raised; a wrong answer fits if it raises the same error there.
    """
    for wrong in exercise.wrong:
        if all(same(g, _outcome(exercise, wrong.answer, args)) for g, args in zip(got, exercise.cases, strict=False)):
            return wrong.hint
    return exercise.hint


def _outcome(exercise: Exercise, answer: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return exercise.run(answer, args)
    except Exception as error:  # a wrong answer may fail on some case, as a learner's may
        return Raised(type(error))


def _kind(error: Exception) -> str:
    """The name of an error's type; with its module where the name alone says nothing, as in struct.error."""
    name = type(error).__name__
    return f"{type(error).__module__}.{name}" if name == "error" else name


def _place(exercise: Exercise, i: int) -> list[str]:
    """A line that says where the arguments of a case are, if `_call` shows them shortened."""
    args = exercise.cases[i]
    if all(short(arg) == repr(arg) for arg in args):
        return []
    return [f"its arguments: exercises.find({exercise.name!r}).cases[{i}]"]


def _call(exercise: Exercise, args: tuple[Any, ...]) -> str:
    names = inspect.signature(exercise.reference).parameters
    return f"{exercise.name}({', '.join(f'{n}={short(a)}' for n, a in zip(names, args, strict=False))})"
