"""A learner's `mykv.py` after each lesson: the demo runs the whole of it, and says what is whose."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from kvlab.course import capstone, exercises, own
from kvlab.course.exercises import mykv, registry
from kvlab.testbed.server import RedisServer


def solve(lesson: ModuleType) -> None:
    """Keep the solutions of a lesson, as its check cells do."""
    for exercise in vars(lesson).values():
        if isinstance(exercise, exercises.Exercise):
            said = mykv.keep(exercise.name, inspect.getsource(exercise.reference), lambda _: True)
            assert said.startswith("kept in "), said


@pytest.mark.slow
@pytest.mark.redis
def test_after_each_lesson_the_demo_runs_and_says_what_is_whose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer
) -> None:
    monkeypatch.setenv("KVLAB_WORK", str(tmp_path))
    monkeypatch.setattr(own, "PREFIXES", (128,))
    solved: set[str] = set()
    for lesson in registry.LESSONS:
        solve(lesson)
        solved |= {e.name for e in vars(lesson).values() if isinstance(e, exercises.Exercise)}
        said: list[str] = []
        result = own.run("mykv.py", redis_server.url, said.append)
        assert result["ok"], "\n".join(said)
        assert set(result["checks"]) == solved and set(result["checks"].values()) == {"right"}
        whose = {line.partition(":")[0]: line for line in said if line.startswith(("yours:", "checked:", "ours:"))}
        for name in mykv.PARTS:
            assert name in whose["yours" if name in solved else "ours"], f"{lesson.__name__}: {name}"
        assert all(name in whose["yours"] + whose["checked"] for name in solved)
    assert "ours:    none" in said
    yours = {name for name, count in result["calls"].items() if count}
    assert yours == {*mykv.PARTS, *own.BESIDE}, "what the demo runs is what docs/exercises.md says"
    assert any(re.match(r"lesson 07: of 16 records .* [1-9]\d* are missing .* all values right: True", s) for s in said)


def test_the_demo_runs_the_first_cache_of_lesson_01(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with one function of the three, whose prints do not stand between the demo's lines."""
    monkeypatch.setenv("KVLAB_WORK", str(tmp_path))
    monkeypatch.setattr(own, "PREFIXES", (128,))
    source = inspect.getsource(exercises.find("keep").reference)
    head, body = source.split('"""\n', 1)
    mykv.keep("keep", f'{head}"""\n    print("keeps")\n{body}', lambda _: True)
    said: list[str] = []
    assert own.run("mykv.py", "fakeredis://", said.append)["ok"], "\n".join(said)
    assert "lesson 01: a dict as cache loads 512 of 528 tokens of a second prompt, same token: True" in said
    assert "yours:   keep (2 calls)" in said
    assert "(your functions printed 2 lines, which are not shown here)" in said
    assert not any("keeps" in line for line in said)


@pytest.mark.slow
@pytest.mark.redis
def test_the_finished_file_keeps_both_contracts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLAB_WORK", str(tmp_path))
    for lesson in registry.LESSONS:
        solve(lesson)
    file = tmp_path / "mykv.py"
    assert "from kvlab.course.minikv import" not in file.read_text("utf-8")
    said: list[str] = []
    assert capstone.run(file, said.append).ok, "\n".join(said)
