"""Check cells in a live kernel, run twice: an answer that is missing or wrong never passes and is never kept.

After the first run the learner's name holds a stand-in that calls the reference; the second run must not take
it for an answer. In one process the rest of the suite does the same; here it is the kernel that JupyterLab uses.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

from kvlab.course import exercises
from kvlab.course.exercises import registry
from kvlab.course.kernel import kernel_environment

pytestmark = pytest.mark.slow

BEGIN = """\
import importlib.util
from kvlab.course import exercises


def answers_in(path):
    spec = importlib.util.spec_from_file_location("answers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
Run = Callable[[str], str]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def run(work: Path) -> Iterator[Run]:
    """Runs one cell in the kernel and returns what it printed."""
    manager, client = start_new_kernel(env=kernel_environment(work), cwd=str(work), startup_timeout=120)

    def run(source: str) -> str:
        printed: list[str] = []

        def hear(message: dict[str, dict[str, str]]) -> None:
            content = message["content"]
            printed.append(content.get("text") or "\n".join(content.get("traceback", [])))

        client.execute_interactive(source, timeout=120, output_hook=hear)
        return "".join(printed)

    try:
        assert run(BEGIN) == ""
        yield run
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def copy_of(module: object, folder: Path) -> Path:
    """A lesson's module outside the package, where its wrong answers count as a learner's."""
    source = Path(inspect.getfile(module))  # type: ignore[arg-type]
    path = folder / f"answers_{source.name}"
    path.write_text(source.read_text("utf-8"), "utf-8")
    return path


def check_twice(run: Run, constant: str, name: str, definition: str) -> int:
    """Run a definition once and its check cell twice; complain about a ✔. Returns how often ✔ could have come."""
    assert run(definition) == ""
    check = f"{name} = exercises.check(exercises.{constant}, {name})"
    for _ in range(2):
        said = run(check)
        assert said.startswith(("○ ", "✘ ")), f"{definition}\n{said}"
        assert "kept in" not in said and "Traceback" not in said
    return 2


@pytest.mark.parametrize("lesson", registry.LESSONS, ids=lambda m: m.__name__.rpartition(".")[2])
def test_a_second_check_never_passes_and_never_keeps(
    lesson: object, run: Run, work: Path, record_property: Callable[[str, object], None]
) -> None:
    run(f"answers = answers_in({str(copy_of(lesson, work))!r})")
    checks = 0
    own = {constant: e for constant, e in vars(lesson).items() if isinstance(e, exercises.Exercise)}
    for constant, exercise in own.items():
        stub = f"def {exercise.name}(*args):\n    ..."
        checks += check_twice(run, constant, exercise.name, stub)
        if exercise.given:
            checks += check_twice(run, constant, exercise.name, f"{exercise.name} = answers.{constant}.given")
        for i in range(len(exercise.wrong)):
            wrong = f"{exercise.name} = answers.{constant}.wrong[{i}].answer"
            named = f"{wrong}\n{exercise.name}.__name__ = {exercise.name!r}"  # as if the learner had written it
            checks += check_twice(run, constant, exercise.name, named)
    record_property("checks that must not pass", checks)
    print(f"{len(own)} exercises, {checks} checks in a live kernel, none passed", file=sys.stderr)
    assert not list(work.rglob("mykv.py")), "a wrong answer was kept"


def test_a_right_answer_passes_and_is_kept_in_the_same_kernel(run: Run, work: Path) -> None:
    """What the test above relies on: the kernel keeps what is right."""
    run("%%writefile right.py\n" + inspect.getsource(exercises.HIT_RATE.reference))
    run("hit_rate = answers_in('right.py').hit_rate")
    for _ in range(2):
        assert run("hit_rate = exercises.check(exercises.HIT_RATE, hit_rate)").startswith("✔ 00.2 hit_rate")
    assert len(list(work.rglob("mykv.py"))) == 1
