"""`mykv.py` is a whole cache after every answer, and what the learner writes into it stays."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path

import pytest

from kvlab.course import exercises, minikv
from kvlab.course.exercises import mykv
from kvlab.errors import InputError

HIT_RATE = exercises.HIT_RATE.reference
PARTS = [(name, inspect.getsource(getattr(minikv, name))) for name in mykv.PARTS]


def imported(text: str) -> list[str]:
    """The functions that a file takes from the course."""
    assert text.count(mykv.IMPORT) <= 1 and max(map(len, text.splitlines())) <= 120
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
    return [alias.name for node in imports if node.module == minikv.__name__ for alias in node.names]


def loaded(text: str, folder: Path) -> object:
    (folder / "mykv.py").write_text(text, "utf-8")
    return mykv.load_answers(folder / "mykv.py")


def test_after_each_answer_the_file_is_a_whole_cache(tmp_path: Path) -> None:
    text, written = mykv.HEADER, []
    for name, source in PARTS:
        text = mykv.with_function(text, name, source)
        written.append(name)
        assert imported(text) == [part for part in mykv.PARTS if part not in written]
        module = loaded(text, tmp_path)
        assert issubclass(vars(module)["MiniCache"], minikv.KVCache)
        assert [n for n in mykv.PARTS if vars(module)[n].__module__ == "mykv"] == written
    assert mykv.NOT_YET not in text


def test_an_answer_given_twice_changes_nothing() -> None:
    for name, source in PARTS:
        once = mykv.with_function(mykv.HEADER, name, source)
        assert mykv.with_function(once, name, source) == once


def test_what_the_learner_writes_stays(tmp_path: Path) -> None:
    text = mykv.with_function(mykv.HEADER, *PARTS[0])
    text = text.replace("class MiniCache(KVCache):\n", "class MiniCache(KVCache):\n    mine = 7\n\n")
    text = text.replace("import zlib\n", "import zlib\nimport json\n") + "\n\nANSWER = json.loads('42')\n"
    for name, source in PARTS[1:]:
        text = mykv.with_function(text, name, source)
    module = loaded(text, tmp_path)
    assert (vars(module)["MiniCache"].mine, vars(module)["ANSWER"]) == (7, 42)
    assert text.count("class MiniCache") == 1


def test_an_older_answer_is_replaced_with_its_decorators(tmp_path: Path) -> None:
    old = '@functools.cache\ndef hit_rate(a, b, c):\n    return "old"\n'
    text = mykv.with_function(mykv.HEADER.replace("import copy", "import copy\nimport functools"), "hit_rate", old)
    text = mykv.with_function(text, "hit_rate", 'def hit_rate(a, b, c):\n    return "new"\n')
    assert '"old"' not in text and "functools.cache" not in text
    assert vars(loaded(text, tmp_path))["hit_rate"](1, 2, 3) == "new"


def test_a_file_of_an_earlier_course_becomes_whole(tmp_path: Path) -> None:
    before = '"""Answers."""\n\nimport struct\n\n\ndef mine():\n    return 1\n'
    assert "MiniCache" in (text := mykv.with_function(mykv.HEADER + "\n\n" + before[16:], *PARTS[0]))
    assert vars(loaded(text, tmp_path))["mine"]() == 1


def test_a_file_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    work.mkdir()
    elsewhere.mkdir()
    (work / "mykv.py").write_text("x = 1\n", "utf-8")
    monkeypatch.chdir(elsewhere)
    with pytest.raises(InputError, match=r"found none at work/mykv\.py or "):
        mykv.find("work/mykv.py")
    monkeypatch.setenv("KVLAB_WORK", str(work))
    assert mykv.find("work/mykv.py") == work / "mykv.py"
    monkeypatch.chdir(tmp_path)
    assert mykv.find("work/mykv.py") == Path("work/mykv.py")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("import nosuchthing\n", "the file does not import: ModuleNotFoundError: No module named 'nosuchthing'"),
        ("def f((a)):\n    pass\n", "(mykv.py, line 1)"),
    ],
)
def test_a_broken_file_is_the_reason_that_is_told(
    file: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVLAB_WORK", str(tmp_path))
    (tmp_path / "mykv.py").write_text(file, "utf-8")
    kept = exercises.keep(exercises.HIT_RATE, HIT_RATE)
    assert kept.startswith("not kept in mykv.py: ") and kept.endswith(said)
    assert (tmp_path / "mykv.py").read_text("utf-8") == file


def test_a_function_that_was_defined_indented_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLAB_WORK", str(tmp_path))
    (tmp_path / "cell.py").write_text("if True:\n" + textwrap.indent(inspect.getsource(HIT_RATE), "    "), "utf-8")
    answer = mykv.load_answers(tmp_path / "cell.py").hit_rate
    assert exercises.keep(exercises.HIT_RATE, answer).startswith("kept in ")


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLAB_WORK", str(tmp_path))
    assert exercises.keep(exercises.HIT_RATE, exercises.HIT_RATE.reference).startswith("kept in ")
    before = (tmp_path / "mykv.py").read_bytes()

    def crash(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", crash)
    assert exercises.keep(exercises.BLOCK_KEYS, exercises.BLOCK_KEYS.reference) == "not kept in mykv.py: no space left"
    assert (tmp_path / "mykv.py").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["mykv.py"]
