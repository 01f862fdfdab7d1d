"""Exercises never raise; right answers are kept in mykv.py; wrong ones get the hint that fits."""

import contextlib
import inspect
import linecache
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kvlab.course import exercises
from kvlab.course.exercises import Exercise, check, grade, keep, limits, load_answers
from kvlab.errors import InputError
from kvlab.lab import demo
from kvlab.model import attention

ALL = {e.name: e for e in exercises.ALL}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVLAB_WORK", str(tmp_path))
    return tmp_path


def test_a_stub_that_raises_is_not_started() -> None:
    def stub(*_: object) -> None:
        raise NotImplementedError

    assert grade(exercises.HIT_RATE, stub).state == "todo"


def test_an_answer_that_raises_is_told_and_not_raised() -> None:
    verdict = grade(exercises.HIT_RATE, lambda *_: 1 // 0)
    assert verdict.state == "wrong"
    assert "ZeroDivisionError" in verdict.text


def test_an_answer_that_writes_to_its_arguments_spoils_no_other_case() -> None:
    def greedy(a: list[int], b: list[int], block_tokens: int) -> int:
        result = exercises.CACHEABLE_PREFIX.reference(a, b, block_tokens)
        a.clear()
        return result

    assert grade(exercises.CACHEABLE_PREFIX, greedy).state == "right"
    assert grade(exercises.CACHEABLE_PREFIX, greedy).state == "right"


def test_check_falls_back_to_the_reference(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got = check(exercises.HIT_RATE, lambda *_: 0.25)
    assert got([(1040, 512)], 64) == exercises.HIT_RATE.reference([(1040, 512)], 64) == 0.5
    assert "goes on with the reference" in capsys.readouterr().out
    assert not (work / "mykv.py").exists()


def stub(*_: object) -> None: ...


def half(*_: object) -> float:
    return 0.5


@pytest.mark.parametrize(("answer", "mark"), [(stub, "○"), (half, "✘")])
@pytest.mark.parametrize("exercise", exercises.ALL, ids=lambda e: e.name)
def test_checking_again_never_passes_what_did_not_and_keeps_nothing(
    exercise: exercises.Exercise, answer: Any, mark: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A notebook rebinds the learner's name to what the check returns: the next run of the cell gets that."""
    first = capsys.readouterr().out if (got := check(exercise, answer)) else ""
    for _ in range(3):
        got = check(exercise, got)
        again = capsys.readouterr().out
        assert again.startswith(f"{mark} {exercise.number}") and "checked again as it was" in again, first
    assert not (work / "mykv.py").exists()


def test_an_answer_that_is_mended_after_a_check_passes(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(exercises.HIT_RATE, check(exercises.HIT_RATE, half))
    answer = mykv_function(work)
    assert check(exercises.HIT_RATE, answer) is answer
    assert check(exercises.HIT_RATE, answer) is answer
    assert capsys.readouterr().out.count(f"✔ 00.2 hit_rate: 6 of 6\n  kept in {work / 'mykv.py'}\n") == 2


def mykv_function(folder: Path) -> Any:
    """The solution of 00.2 as a learner's function, from a file outside the package."""
    (folder / "cell.py").write_text(inspect.getsource(exercises.HIT_RATE.reference), "utf-8")
    return load_answers(folder / "cell.py").hit_rate


@pytest.mark.parametrize("ours", [exercises.HIT_RATE.reference, demo.hit_rate], ids=["reference", "package"])
def test_a_function_of_the_package_is_no_answer(ours: Any, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got = check(exercises.HIT_RATE, ours)
    assert capsys.readouterr().out.startswith("○ 00.2 hit_rate: not started (this is the course's solution)")
    check(exercises.HIT_RATE, got)
    assert "✔" not in capsys.readouterr().out
    assert not (work / "mykv.py").exists()


def test_a_function_that_prints_instead_of_returning_is_told_so() -> None:
    def printing(requests: list[tuple[int, int]], block_tokens: int) -> None:
        print(exercises.HIT_RATE.reference(requests, block_tokens))

    verdict = grade(exercises.HIT_RATE, printing)
    assert verdict.state == "wrong"
    assert "returned None" in verdict.text and "is there a `return`?" in verdict.text


def no_body(*_: object) -> None:
    """A docstring alone."""


def only_pass(*_: object) -> None:
    pass


def returns_dots(*_: object) -> Any:
    return ...


@pytest.mark.parametrize("empty", [no_body, only_pass, returns_dots, stub])
def test_every_way_to_leave_a_body_empty_is_not_started(empty: Any) -> None:
    assert grade(exercises.HIT_RATE, empty).state == "todo"


def spins(*_: object) -> None:
    while True:
        pass


def spins_and_catches(*_: object) -> None:
    while True:
        with contextlib.suppress(Exception):
            int("x")


@pytest.mark.parametrize("endless", [spins, spins_and_catches])
def test_a_loop_that_never_ends_is_stopped(endless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.call, "__defaults__", ("", 0.2))
    before = threading.active_count()
    verdict = grade(exercises.HIT_RATE, endless)
    assert verdict.state == "wrong" and "had no result after" in verdict.text and "does every loop end?" in verdict.text
    assert threading.active_count() == before


def test_an_answer_that_ends_the_program_is_told() -> None:
    verdict = grade(exercises.HIT_RATE, lambda *_: sys.exit(3))
    assert verdict.state == "wrong" and "SystemExit" in verdict.text


fused = F.scaled_dot_product_attention
SPELLINGS: dict[str, Any] = {
    "is_causal": lambda q, k, v, start: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    "attn_mask": lambda q, k, v, start: F.scaled_dot_product_attention(
        q, k, v, attn_mask=causal_mask(q.shape[2], k.shape[2], start), enable_gqa=True
    ),
    "another name": lambda q, k, v, start: fused(q, k, v, enable_gqa=True),
    "built name": lambda q, k, v, start: getattr(F, "scaled_dot" + "_product_attention")(q, k, v, enable_gqa=True),
    "torch._C": lambda q, k, v, start: torch._C._nn.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "torch.ops": lambda q, k, v, start: torch.ops.aten.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "math": lambda q, k, v, start: torch._scaled_dot_product_attention_math(q, k, v, enable_gqa=True)[0],
    "multi-head": lambda q, k, v, start: torch.nn.MultiheadAttention(8, 1, batch_first=True)(q[0], q[0], q[0])[0],
    "kvlab": lambda q, k, v, start: attention(q, k, v, start),
}


def causal_mask(T: int, S: int, start: int) -> torch.Tensor:
    return torch.arange(S) <= start + torch.arange(T)[:, None]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_is_forbidden_is_forbidden_in_every_spelling(spelling: str) -> None:
    verdict = grade(exercises.CAUSAL_ATTENTION, SPELLINGS[spelling])
    assert verdict.state == "wrong"
    assert "which is what this exercise builds" in verdict.text


def test_right_answers_accumulate_and_replace_older_ones(work: Path) -> None:
    for exercise in exercises.ALL:
        assert keep(exercise, exercise.reference) == f"kept in {work / 'mykv.py'}"
    text = (work / "mykv.py").read_text("utf-8")
    assert keep(exercises.HIT_RATE, exercises.HIT_RATE.reference) == f"kept in {work / 'mykv.py'}"
    assert (work / "mykv.py").read_text("utf-8") == text
    answers = load_answers(work / "mykv.py")
    for name, exercise in ALL.items():
        assert grade(exercise, getattr(answers, name)).state == "right"


def test_an_answer_that_leans_on_the_notebook_is_not_kept(work: Path) -> None:
    source = "def hit_rate(r, b):\n    return solution(r, b)\n"
    namespace = {"solution": exercises.HIT_RATE.reference}
    file = work / "cell.py"
    file.write_text(source, "utf-8")
    exec(compile(source, str(file), "exec"), namespace)  # what a notebook cell is
    said = keep(exercises.HIT_RATE, namespace["hit_rate"])
    assert said.endswith("uses solution from this notebook; put it inside the function")
    assert not (work / "mykv.py").exists()
    keep(exercises.SHARE_MOVED, exercises.SHARE_MOVED.reference)
    before = (work / "mykv.py").read_text("utf-8")
    assert "put it inside the function" in keep(exercises.HIT_RATE, namespace["hit_rate"])
    assert (work / "mykv.py").read_text("utf-8") == before


def test_a_file_of_an_older_course_is_not_called_a_fault_of_the_function(work: Path) -> None:
    (work / "mykv.py").write_text("class MiniCache(NoSuchBase):\n    pass\n", "utf-8")
    said = keep(exercises.HIT_RATE, exercises.HIT_RATE.reference)
    assert "does not fit this version of the course (name 'NoSuchBase' is not defined)" in said


def test_a_function_of_another_name_is_not_kept_and_told_so(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def my_own(before: int, after: int) -> float:
        return exercises.SHARE_MOVED.reference(before, after)

    assert check(exercises.SHARE_MOVED, my_own) is my_own
    assert "the function is called my_own, expected share_moved" in capsys.readouterr().out
    assert not (work / "mykv.py").exists()


def test_an_error_gets_the_hint_of_the_wrong_answer_that_raises_it_and_no_other_error_does() -> None:
    hint = next(w.hint for w in exercises.RING_NODES.wrong if "% len" in w.hint)

    def falls_off(points: list[int], owners: list[str], at: int, count: int) -> list[str]:
        found, i = [], sum(point < at for point in points)
        while len(found) < count:
            found += [owners[i]] if owners[i] not in found else []
            i += 1
        return found

    def other(points: list[int], owners: list[str], at: int, count: int) -> list[str]:
        return [owners[points.index(at)]]

    text = grade(exercises.RING_NODES, falls_off).text
    assert text.endswith(f"IndexError: list index out of range\n  hint: {hint}")
    assert grade(exercises.RING_NODES, other).text.endswith(f"hint: {exercises.RING_NODES.hint}")


def test_loading_answers_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found none"):
        load_answers(tmp_path / "none.py")
    (tmp_path / "bad.py").write_text("import does_not_exist")
    with pytest.raises(InputError, match="does not import"):
        load_answers(tmp_path / "bad.py")


def test_an_answer_file_that_ends_the_program_is_told(tmp_path: Path) -> None:
    (tmp_path / "mykv.py").write_text("raise SystemExit", "utf-8")
    with pytest.raises(InputError, match="does not import: SystemExit"):
        load_answers(tmp_path / "mykv.py")


def test_an_answer_file_of_another_encoding_is_left_alone(work: Path) -> None:
    (work / "mykv.py").write_bytes("# grün\n".encode("latin-1"))
    assert keep(exercises.HIT_RATE, exercises.HIT_RATE.reference).startswith("not kept in mykv.py: 'utf-8'")
    assert (work / "mykv.py").read_bytes() == "# grün\n".encode("latin-1")


HAS_SIGNS = '''\
def cacheable_prefix(a, b, block_tokens):
    """The prefix that can be cached: ≤ both, größer als nichts … 前"""
    same = [x == y for x, y in zip(a, b)] + [False]
    return same.index(False) // block_tokens * block_tokens
'''
CHECK = """\
import sys
from pathlib import Path
from kvlab.course import exercises
answers = exercises.load_answers(sys.argv[1])
assert exercises.check(exercises.CACHEABLE_PREFIX, answers.cacheable_prefix) is answers.cacheable_prefix
exercises.check(exercises.HIT_RATE, lambda *_: chr(0x2718))
assert answers.cacheable_prefix.__doc__ in (Path(sys.argv[1]).parent / "work" / "mykv.py").read_bytes().decode()
"""


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", "cp1252"])
def test_marks_and_answers_with_signs_in_any_terminal(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "answers.py").write_text(HAS_SIGNS, "utf-8")
    environment = {
        **os.environ,
        **{"KVLAB_WORK": str(tmp_path / "work"), "PYTHONIOENCODING": encoding},
        **{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},  # open() without an encoding is ASCII here
    }
    command = [sys.executable, "-c", CHECK, tmp_path / "answers.py"]
    run = subprocess.run(command, env=environment, capture_output=True, encoding=encoding)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"00.1 cacheable_prefix: 5 of 5\n  kept in {tmp_path / 'work' / 'mykv.py'}\n" in run.stdout
    assert run.stdout[0] == ("✔" if encoding == "utf-8" else "\\")


def test_a_function_that_was_changed_by_hand_is_not_lost(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    assert keep(exercises.HIT_RATE, exercises.HIT_RATE.reference) == "kept in mykv.py"
    mine = (work / "mykv.py").read_text("utf-8").replace("full = ", "mine = 1\n    full = ")
    (work / "mykv.py").write_text(mine, "utf-8")
    said = keep(exercises.HIT_RATE, exercises.HIT_RATE.reference)
    assert said == "kept in mykv.py; the file as it was is mykv.py.before"
    assert (work / "mykv.py.before").read_text("utf-8") == mine


def test_what_an_answer_prints_is_shown_with_the_verdict_and_not_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    def loud(requests: list[tuple[int, int]], block_tokens: int) -> float:
        print("looking at", len(requests))
        return 2.0

    check(exercises.HIT_RATE, loud)
    said = capsys.readouterr().out
    assert said.startswith("✘ 00.2 hit_rate")
    assert said.count("  it printed: looking at") == 3
    assert "  it printed: looking at 1\n" in said and "\n  (and 3 more lines)\n" in said


def test_a_check_says_where_arguments_are_that_it_cannot_show_whole(capsys: pytest.CaptureFixture[str]) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return v

    check(exercises.ATTEND, attend)
    place = next(line for line in capsys.readouterr().out.splitlines() if "its arguments: " in line)
    expression = place.partition(": ")[2]
    arguments = eval(expression, {"exercises": exercises})  # as a learner pastes it
    assert not torch.equal(attend(*arguments), exercises.ATTEND.reference(*arguments))

    def hit_rate(requests: list[tuple[int, int]], block_tokens: int) -> float:
        return 2.0

    check(exercises.HIT_RATE, hit_rate)
    assert "its arguments" not in capsys.readouterr().out, "these are shown whole"


def test_a_check_of_the_same_function_says_so(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A typo in the name of a new version leaves the old one in place, and that one passes."""

    def version() -> Callable[[int], int]:
        def double(x: int) -> int:
            return 2 * x

        return double

    double, other = version(), version()
    exercise = Exercise("double", "00.9", 3, lambda x: 2 * x, ((3,),), (), "multiply")
    again = "the same function as at the last check"
    said = []
    for answer in (double, double, other, double):
        check(exercise, answer)
        said.append(again in capsys.readouterr().out)
    assert said == [False, True, False, False]


def test_a_hunt_begins_with_faulty_code_that_is_not_started_until_it_is_changed() -> None:
    def given(x: int) -> int:
        """Twice x, it says."""
        return x + 1

    def other_name(x: int) -> int:
        return x + 1

    def mended(x: int) -> int:
        return x + x

    hunt = Exercise("double", "00.9", 3, lambda x: 2 * x, ((3,), (5,)), (), "multiply", given=given)
    assert grade(hunt, given).state == "todo"
    assert grade(hunt, given).text.startswith("○ 00.9 double: not changed yet. double(")
    assert "  expected 6" in grade(hunt, given).text and "hint" not in grade(hunt, given).text
    assert grade(hunt, lambda x: x + 2).state == "wrong"
    assert grade(hunt, mended).state == "right"
    assert grade(hunt, other_name).state == "wrong", "its constants differ: it has no docstring"


@pytest.mark.parametrize("hunt", [e for e in exercises.ALL if e.given], ids=lambda e: e.name)
def test_a_hunt_is_recognised_in_a_cell_that_imports_nothing(hunt: Exercise) -> None:
    assert hunt.given is not None
    source = inspect.getsource(hunt.given)
    name = f"<cell of {hunt.name}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    cell = dict(hunt.given.__globals__)  # type: ignore[attr-defined]
    exec(compile(source, name, "exec"), cell)
    verdict = grade(hunt, cell[hunt.given.__name__])
    assert verdict.state == "todo" and verdict.text.startswith(f"○ {hunt.number} {hunt.name}: not changed yet. ")
