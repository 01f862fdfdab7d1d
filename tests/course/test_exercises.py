"""Exercises: never raising, graded unsolved, solved and with each typical wrong answer, kept in mykv.py."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from kvlab.course import exercises
from kvlab.course.exercises import Exercise, check, grade, keep, load_answers
from kvlab.errors import InputError

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
ALL = {e.name: e for e in exercises.ALL}
WRONG = [(e, w) for e in exercises.ALL for w in e.wrong]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVLAB_WORK", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("exercise", exercises.ALL, ids=lambda e: e.name)
def test_unsolved_is_not_started(exercise: Exercise) -> None:
    def stub(*_: object) -> None: ...

    assert grade(exercise, stub).state == "todo"


def test_a_stub_that_raises_is_not_started() -> None:
    def stub(*_: object) -> None:
        raise NotImplementedError

    assert grade(exercises.HIT_RATE, stub).state == "todo"


@pytest.mark.parametrize("exercise", exercises.ALL, ids=lambda e: e.name)
def test_the_solution_passes(exercise: Exercise) -> None:
    verdict = grade(exercise, exercise.reference)
    assert verdict.state == "right", verdict.text
    assert verdict.text.startswith(f"✔ {exercise.number} {exercise.name}: {len(exercise.cases)} of ")


@pytest.mark.parametrize("exercise", exercises.ALL, ids=lambda e: e.name)
def test_at_least_two_typical_wrong_answers_with_hints_of_their_own(exercise: Exercise) -> None:
    hints = [w.hint for w in exercise.wrong]
    assert len(hints) >= 2
    assert len({*hints, exercise.hint}) == len(hints) + 1


@pytest.mark.parametrize(("exercise", "wrong"), WRONG, ids=lambda x: getattr(x, "name", "") or x.answer.__name__)
def test_each_wrong_answer_gets_its_hint(exercise: Exercise, wrong: exercises.Wrong) -> None:
    verdict = grade(exercise, wrong.answer)
    assert verdict.state == "wrong"
    assert verdict.text.startswith("✘")
    assert verdict.text.endswith(f"hint: {wrong.hint}")


def test_an_answer_that_raises_is_told_and_not_raised() -> None:
    verdict = grade(exercises.HIT_RATE, lambda *_: 1 // 0)
    assert verdict.state == "wrong"
    assert "ZeroDivisionError" in verdict.text


def test_an_answer_that_writes_to_its_arguments_spoils_no_other_case() -> None:
    def greedy(a: list[int], b: list[int], block_tokens: int) -> int:
        result = exercises.cacheable_prefix(a, b, block_tokens)
        a.clear()
        return result

    assert grade(exercises.CACHEABLE_PREFIX, greedy).state == "right"
    assert grade(exercises.CACHEABLE_PREFIX, greedy).state == "right"


@pytest.mark.parametrize("result", ["text", [1, 2], {}, object()])
def test_an_answer_of_a_strange_type_is_wrong_and_not_an_error(result: object) -> None:
    for exercise in exercises.ALL:
        assert grade(exercise, lambda *_: result).state == "wrong"


def test_check_falls_back_to_the_reference(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got = check(exercises.HIT_RATE, lambda *_: 0.5)
    assert got is exercises.HIT_RATE.reference
    assert "goes on with the reference" in capsys.readouterr().out
    assert not (work / "mykv.py").exists()


def test_right_answers_accumulate_and_replace_older_ones(work: Path) -> None:
    for exercise in exercises.ALL:
        assert keep(exercise, exercise.reference) == "kept in mykv.py"
    text = (work / "mykv.py").read_text()
    assert keep(exercises.HIT_RATE, exercises.HIT_RATE.reference) == "kept in mykv.py"
    assert (work / "mykv.py").read_text() == text
    answers = load_answers(work / "mykv.py")
    for name, exercise in ALL.items():
        assert grade(exercise, getattr(answers, name)).state == "right"


def test_an_answer_that_leans_on_the_notebook_is_not_kept(work: Path) -> None:
    source = "def hit_rate(p, c, b):\n    return solution(p, c, b)\n"
    namespace = {"solution": exercises.hit_rate}
    file = work / "cell.py"
    file.write_text(source)
    exec(compile(source, str(file), "exec"), namespace)  # what a notebook cell is
    assert "put it inside the function" in keep(exercises.HIT_RATE, namespace["hit_rate"])
    assert not (work / "mykv.py").exists()
    keep(exercises.WEIGHTED_OWNER, exercises.weighted_owner)
    before = (work / "mykv.py").read_text()
    assert "put it inside the function" in keep(exercises.HIT_RATE, namespace["hit_rate"])
    assert (work / "mykv.py").read_text() == before


def test_a_function_of_another_name_is_not_kept_and_told_so(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def my_own(draws: dict[str, float], weights: dict[str, float]) -> str:
        return exercises.weighted_owner(draws, weights)

    assert check(exercises.WEIGHTED_OWNER, my_own) is my_own
    assert "the function is called my_own, expected weighted_owner" in capsys.readouterr().out
    assert not (work / "mykv.py").exists()


def test_an_error_gets_the_hint_of_the_wrong_answer_that_raises_it_and_no_other_error_does() -> None:
    hint = next(w.hint for w in exercises.RING_OWNER.wrong if "% len" in w.hint)

    def falls_off(points: list[int], owners: list[str], at: int) -> str:
        return owners[sum(point < at for point in points)]

    def other(points: list[int], owners: list[str], at: int) -> str:
        return owners[points.index(at)]

    text = grade(exercises.RING_OWNER, falls_off).text
    assert text.endswith(f"IndexError: list index out of range\n  hint: {hint}")
    assert grade(exercises.RING_OWNER, other).text.endswith(f"hint: {exercises.RING_OWNER.hint}")


def test_loading_answers_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found none"):
        load_answers(tmp_path / "none.py")
    (tmp_path / "bad.py").write_text("import does_not_exist")
    with pytest.raises(InputError, match="does not import"):
        load_answers(tmp_path / "bad.py")


IN_MYKV = """\
from kvlab.course.exercises import load_answers
from kvlab.course.work import work_dir

assert set(%r) <= set(vars(load_answers(work_dir() / "mykv.py")))"""


def own_environment() -> dict[str, str]:
    """Without the options of the run that this test is part of: they may name what to collect."""
    return {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}


def cells(path: Path) -> list[nbformat.NotebookNode]:
    return list(nbformat.read(path, 4).cells)


def checked_in(path: Path) -> list[Exercise]:
    names = re.findall(r"exercises\.([A-Z_]+)", "\n".join(c.source for c in cells(path) if c.cell_type == "code"))
    return [getattr(exercises, name) for name in names]


def test_every_exercise_is_in_a_notebook_and_its_number_says_which() -> None:
    found = {e.name: path for path in NOTEBOOKS for e in checked_in(path)}
    assert found.keys() == ALL.keys()
    for name, path in found.items():
        assert ALL[name].number.startswith(path.name[:2])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_folded_solutions_are_the_references(path: Path) -> None:
    text = "\n".join(c.source for c in cells(path) if c.cell_type == "markdown")
    for exercise in checked_in(path):
        assert f"```python\n{inspect.getsource(exercise.reference)}```" in text
        assert f"Exercise {exercise.number}" in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_solved_notebook_passes_strictly_and_keeps_its_answers(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, 4)
    by_name = {e.name: inspect.getsource(e.reference) for e in checked_in(path)}
    for cell in notebook.cells:
        stub = re.match(r"def (\w+)\(.*\n(?s:.*)\n    \.\.\.$", cell.source)
        if cell.cell_type == "code" and stub and stub[1] in by_name:
            cell.source = by_name.pop(stub[1]).rstrip()
    assert not by_name, f"no stub found for {list(by_name)}"
    notebook.cells.append(
        nbformat.v4.new_code_cell(IN_MYKV % sorted(e.name for e in checked_in(path)), execution_count=99)
    )
    solved = tmp_path / path.name
    nbformat.write(notebook, solved)
    command = [sys.executable, "-m", "pytest", "--nbval", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    command += ["--rootdir", ROOT, "--confcutdir", ROOT, "-p", "conftest", solved]
    run = subprocess.run(command, cwd=ROOT, env=own_environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
