"""Every exercise: unsolved, solved and with each typical wrong answer; its notebook shows its solution."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from kvlab.course import exercises
from kvlab.course.exercises import Exercise, grade

ROOT = Path(__file__).parents[3]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
ALL = {e.name: e for e in exercises.ALL}
WRONG = [(e, w) for e in exercises.ALL for w in e.wrong]


@pytest.mark.parametrize("exercise", exercises.ALL, ids=lambda e: e.name)
def test_unsolved_is_not_started(exercise: Exercise) -> None:
    def stub(*_: object) -> None: ...

    assert grade(exercise, stub).state == "todo"


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


@pytest.mark.parametrize("result", ["text", [1, 2], {}, object()])
def test_an_answer_of_a_strange_type_is_wrong_and_not_an_error(result: object) -> None:
    for exercise in exercises.ALL:
        assert grade(exercise, lambda *_: result).state == "wrong"


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
    code = "\n".join(c.source for c in cells(path) if c.cell_type == "code")
    return [getattr(exercises, name) for name in re.findall(r"exercises\.([A-Z][A-Z0-9_]*)", code)]


def first_version(exercise: Exercise) -> str:
    """What a notebook gives of a hunt: the faulty function under the name of the exercise."""
    assert exercise.given is not None
    return (
        inspect.getsource(exercise.given).replace(f"def {exercise.given.__name__}(", f"def {exercise.name}(").rstrip()
    )


def test_every_exercise_is_in_a_notebook_and_its_number_says_which() -> None:
    found = {e.name: path for path in NOTEBOOKS for e in checked_in(path)}
    assert found.keys() == ALL.keys()
    for name, path in found.items():
        assert ALL[name].number.partition(".")[0] == path.name.partition("_")[0]


@pytest.mark.parametrize("exercise", [e for e in exercises.ALL if e.given], ids=lambda e: e.name)
def test_a_hunt_is_given_as_it_is_checked_and_its_faults_have_hints(exercise: Exercise) -> None:
    (path,) = [path for path in NOTEBOOKS if exercise in checked_in(path)]
    assert first_version(exercise) in [cell.source for cell in cells(path)]
    assert exercise.given is not None
    results = [exercise.run(exercise.given, args) for args in exercise.cases]
    assert results != [exercise.run(exercise.reference, args) for args in exercise.cases], "it is not faulty"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_folded_solutions_are_the_references(path: Path) -> None:
    text = "\n".join(c.source for c in cells(path) if c.cell_type == "markdown")
    for exercise in checked_in(path):
        assert f"```python\n{inspect.getsource(exercise.reference)}```" in text
        assert f"Exercise {exercise.number}" in text


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_solved_notebook_passes_strictly_and_keeps_its_answers(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, 4)
    by_name = {e.name: inspect.getsource(e.reference) for e in checked_in(path)}
    for cell in notebook.cells:
        stub = re.match(r"def (\w+)\(.*\n(?s:.*)\n    \.\.\.$", cell.source)
        hunt = next((e for e in exercises.ALL if e.given and cell.source == first_version(e)), None)
        name = stub[1] if stub else hunt.name if hunt else ""
        if cell.cell_type == "code" and name in by_name:
            cell.source = by_name.pop(name).rstrip()
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
