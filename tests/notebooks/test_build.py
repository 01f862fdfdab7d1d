"""The build script and strict runs, on tiny notebooks in a project of their own.

The project has this repository's `conftest.py`, `pyproject.toml`, build script and sanitising
rules, so what is tested is what `pytest --nbval` does here.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tests.harness.builder import ROOT, script

PARTS = ("conftest.py", "pyproject.toml", "scripts/build_notebooks.py", "notebooks/sanitize.cfg")

COURSE = """
[[lesson]]
file = "00_one"
title = "One"
goal = "See the first thing."
able = ["count", "measure"]
needs = ["numbers"]
minutes = 5

[[lesson]]
file = "01_two"
title = "Two"
goal = "See the second thing."
able = ["go on"]
needs = ["00"]
minutes = 10
hardware = "a very large machine"
"""
PRINTS = """\
import os
import random

print(f"recompute: {random.uniform(1, 2000):.1f} ms")
print("at least 5x faster:", random.random() < 2)
print("my answers:", os.listdir(os.environ["KVLAB_WORK"]))"""
SUM = "x = 2 + 2\nprint('sum:', x)"
LINE = "print('the line:', list(range(x)))"
PROBE = """\
import builtins, os, shutil, sys, time, urllib.request

print("interpreter:", sys.flags, sys.warnoptions, sys.stdout.encoding)
print("user code:", hasattr(builtins, "CUSTOMISED"), "STARTED" in globals())
print("machine:", time.tzname, shutil.get_terminal_size(), urllib.request.getproxies())
print("variables:", sorted(os.environ))"""
PLOT = """\
import matplotlib.pyplot as plt

plt.plot([random.random() for _ in range(9)])
plt.show()
print("Figure: nine random numbers.")"""


def write(path: Path, *sources: str, **tags: list[str]) -> Path:
    """Write a notebook with these code cells, not yet run; `tags` by cell id, c0, c1, …"""
    cells = [new_code_cell(source, id=f"c{i}") for i, source in enumerate(sources)]
    for cell in cells:
        cell.metadata["tags"] = tags.get(cell.id, [])
    nbformat.write(new_notebook(cells=[new_markdown_cell("## Text", id="text"), *cells]), path)
    return path


def build(path: Path, **options: Any) -> nbformat.NotebookNode:
    """Build and write a notebook; return it as it is on disk."""
    path.write_bytes(script.build(path, script.load_course(path.parent), **options))
    return nbformat.read(path, as_version=4)


def text_of(notebook: nbformat.NotebookNode, cell_id: str) -> str:
    cell = next(cell for cell in notebook.cells if cell.id == cell_id)
    return "".join(output.get("text", "") for output in cell.outputs)


def picture_of(notebook: nbformat.NotebookNode, cell_id: str) -> str:
    cell = next(cell for cell in notebook.cells if cell.id == cell_id)
    return next(output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))


def edit(path: Path, cell_id: str, source: str) -> None:
    notebook = nbformat.read(path, as_version=4)
    next(cell for cell in notebook.cells if cell.id == cell_id).source = source
    nbformat.write(notebook, path)


# --- building -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built notebook with a random time and a random plot. Copy it before changing it."""
    path = write(tmp_path_factory.mktemp("built") / "tiny.ipynb", PRINTS, SUM, LINE, PLOT)
    build(path)
    return path


@pytest.fixture
def tiny(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(built, tmp_path / "tiny.ipynb"))


def test_a_second_build_changes_no_byte(tiny: Path) -> None:
    before = tiny.read_bytes()
    build(tiny)
    assert tiny.read_bytes() == before


def test_fresh_takes_new_measurements(tiny: Path) -> None:
    old = nbformat.read(tiny, as_version=4)
    new = build(tiny, fresh=True)
    assert text_of(new, "c0") != text_of(old, "c0")
    assert picture_of(new, "c3") != picture_of(old, "c3")


def test_a_changed_cell_gets_new_outputs_and_so_do_the_measurements_after_it(tiny: Path) -> None:
    old = nbformat.read(tiny, as_version=4)
    edit(tiny, "c1", "x = 3\nprint('sum:', x)")
    new = build(tiny)
    assert text_of(new, "c1") == "sum: 3\n"
    assert text_of(new, "c2") == "the line: [0, 1, 2]\n"
    assert text_of(new, "c0") == text_of(old, "c0"), "the measurement before the change stays"
    assert picture_of(new, "c3") != picture_of(old, "c3"), "the picture after the change is new"


def test_what_is_stored_is_clean(built: Path) -> None:
    notebook = nbformat.read(built, as_version=4)
    assert notebook.metadata == script.METADATA
    assert [cell.id for cell in notebook.cells] == ["text", "c0", "c1", "c2", "c3"]
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == [1, 2, 3, 4]
    assert all(set(cell.metadata) <= {"tags", "kvlab"} for cell in notebook.cells)
    assert text_of(notebook, "c0").endswith("at least 5x faster: True\nmy answers: []\n")
    assert [output.output_type for output in notebook.cells[-1].outputs] == ["display_data", "stream"]


def test_a_learners_answers_do_not_leak_in(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tiny.parent / "mykv.py").write_text("")
    monkeypatch.setenv("KVLAB_WORK", str(tiny.parent))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    before = tiny.read_bytes()
    build(tiny)
    assert tiny.read_bytes() == before


def test_cells_without_an_id_get_the_same_one_each_time(tmp_path: Path) -> None:
    path = write(tmp_path / "x.ipynb", "1", "2", "2")
    raw = path.read_text().replace('"id": "c0",', "").replace('"c2"', '"c1"')
    path.write_text(raw)
    ids = [cell.id for cell in script.read(path).cells]
    assert ids == [cell.id for cell in script.read(path).cells]
    assert len(set(ids)) == 4
    assert ids[0] == "text" and ids[2] == "c1"


def test_streams_are_joined_but_keep_their_place_among_pictures() -> None:
    def stream(text: str, name: str = "stdout") -> nbformat.NotebookNode:
        return nbformat.v4.new_output("stream", name=name, text=text)

    picture = nbformat.v4.new_output("display_data", {"image/png": "AAAA", script.WIDGET: {"model_id": "1"}})
    pieces = [stream("a\n"), stream("b 1%\rb 2%\n"), picture, stream("c\n"), stream("!", "stderr")]
    joined = script.portable(pieces)
    assert [output.get("text") for output in joined] == ["a\nb 2%\n", None, "c\n", "!"]
    assert list(joined[1].data) == ["image/png"]


def test_an_error_stops_with_notebook_cell_source_and_traceback(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.ipynb", "x = 1", "y = 0\nx / y", "print('later')")
    with pytest.raises(script.BuildError) as caught:
        build(path)
    message = str(caught.value)
    assert "bad.ipynb: cell 3 of 4 (code cell 2, id c1)" in message
    assert "2 | x / y" in message
    assert "ZeroDivisionError: division by zero" in message
    assert "\x1b" not in message


def test_a_cell_that_hangs_or_kills_its_kernel_stops_the_build(tmp_path: Path) -> None:
    path = write(tmp_path / "dead.ipynb", "import os\nos._exit(1)")
    with pytest.raises(script.BuildError, match=r"dead.ipynb: cell 2 of 2 .*its kernel died"):
        build(path)
    notebook = script.read(write(tmp_path / "slow.ipynb", "import time\ntime.sleep(60)"))
    with pytest.raises(script.BuildError, match=r"slow.ipynb: cell 2 of 2 .*timed out after 1 seconds"):
        script.execute(notebook, path.with_name("slow.ipynb"), timeout=1)


def test_an_expected_error_is_stored_without_this_machines_paths(tmp_path: Path) -> None:
    path = write(tmp_path / "ok.ipynb", "import json\njson.loads('{')", c0=["raises-exception"])
    notebook = build(path)
    assert notebook.cells[1].outputs[0].ename == "JSONDecodeError"
    assert not any(place in path.read_text() for place in (str(ROOT), sys.prefix, sys.base_prefix + "/lib"))


def test_an_expected_error_that_does_not_come_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "ok.ipynb", "print(1)", c0=["raises-exception"])
    with pytest.raises(script.BuildError, match="raised nothing"):
        build(path)


# --- generated cells ----------------------------------------------------------------------------
@pytest.fixture
def course(tmp_path: Path) -> Any:
    (tmp_path / "course.toml").write_text(COURSE)
    write(tmp_path / "00_one.ipynb", "print('hello')")
    return script.load_course(tmp_path)


def test_generated_cells_come_from_the_course_map(course: Any) -> None:
    notebook = build(course.folder / "00_one.ipynb", run=False)
    header, setup, *_, footer = notebook.cells
    assert [header.id, setup.id, footer.id] == ["header", "colab-setup", "footer"]
    assert header.source.startswith(
        "# 00 · One\n\nSee the first thing.\n\n**You will be able to**\n\n- count\n- measure"
    )
    assert "**Needs:** numbers" in header.source and "about 5 minutes" in header.source
    assert "[![Open in Colab](" in header.source
    assert setup.metadata.tags == ["colab-setup"]
    assert len(setup.source.splitlines()) <= 4
    assert footer.source.endswith("Next: 01 · Two"), "no link to a notebook that does not exist"


def test_links_appear_with_the_notebooks_and_building_twice_changes_nothing(course: Any) -> None:
    second = write(course.folder / "01_two.ipynb", "1")
    notebook = build(course.folder / "00_one.ipynb", run=False)
    assert "Next: [01 · Two](01_two.ipynb)" in notebook.cells[0].source
    assert build(course.folder / "00_one.ipynb", run=False) == notebook
    other = build(second, run=False)
    assert "**Needs:** [00 · One](00_one.ipynb)" in other.cells[0].source
    assert "a very large machine" in other.cells[0].source
    assert "Previous: [00 · One](00_one.ipynb)" in other.cells[-1].source


def test_the_colab_cell_prints_nothing_here(course: Any) -> None:
    notebook = build(course.folder / "00_one.ipynb")
    assert notebook.cells[1].execution_count == 1
    assert notebook.cells[1].outputs == []


def test_the_course_table_is_put_between_its_markers(course: Any) -> None:
    page = f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n"
    filled = script.refill(page, course.table("notebooks/"))
    colab = "https://colab.research.google.com/github/kvlab/kvlab/blob/main/notebooks/00_one.ipynb"
    link = "[One](notebooks/00_one.ipynb)"
    assert f"| 00 | {link} | ready, [Colab]({colab}) | See the first thing. | 5 | numbers |" in filled
    assert "| 01 | Two | planned | See the second thing. | 10 | [00](notebooks/00_one.ipynb) |" in filled
    assert filled.startswith("before\n") and filled.endswith("after\n") and "old" not in filled
    assert script.refill(filled, course.table("notebooks/")) == filled
    assert script.refill("no markers", course.table()) == "no markers"


# --- sanitising ---------------------------------------------------------------------------------
MEASURED = [
    ("recompute: 14.2 ms", "recompute:  114.7 ms"),
    ("load 980 µs, hash 7us", "load 1.2 ms, hash 12us"),
    ("took 0.3 s.", "took 1 min 12 s."),
    ("mean 12.3 ± 0.4 ms", "mean 9 ± 0.35 ms"),
    ("wait 14 to 16 ms", "wait 3 to 20 ms"),
    ("1,234 tok/s", "987.5 tok/s"),
    ("store: 980 kB/s", "store: 1.2 GB/s"),
    ("1,234 prompt tokens per second", "98 prompt tokens per second"),
    ("the warm request is 17.4x faster", "the warm request is 9 times faster"),
    ("takes 38 % of the time", "takes 4% of the time"),
    ("speed-up: 3.2", "speed-up: 12.9"),
    ("A/A ratio 1.02, noisy: False", "A/A ratio 1.31, noisy: True"),
    ("  512   14.2 ms    3.1 ms    17.4x      1,048,576", "  512    4.2 ms   13.1 ms     0.3x      1,048,576"),
    ('{"cold_ms": 14.2, "seconds": 0.1, "n": 3}', '{"cold_ms": 3, "seconds": 12.5, "n": 3}'),
    ("about ≈1.37 of it", "about ≈0.99 of it"),
    ("source: measured on this machine", "source: recorded on a large machine (redis-server is not installed here)"),
    ("<object at 0x7f0123456789>", "<object at 0x7fabcdefabcd>"),
    ("saved in /tmp/kvlab-a1b2/x.bin", "saved in /tmp/kvlab-zzzz/x.bin"),
    ("redis://127.0.0.1:41234/0", "redis://127.0.0.1:33333/0"),
    ("Python 3.11.7, torch 2.13.0+cpu", "Python 3.13.1, torch 2.14.1"),
    ("<td>14.2 ms</td>", "<td>3 ms</td>"),
]
COMPARED = [
    ("at least 5x faster: True", "at least 6x faster: True"),
    ("at least 5x faster: True", "at least 5x faster: False"),
    ("At least 15 times faster", "At least 25 times faster"),
    ("under 10 ms: True", "under 20 ms: True"),
    ("more than 1,000 tok/s: True", "more than 2,000 tok/s: True"),
    ("delivers > 5 GB/s: True", "delivers > 6 GB/s: True"),
    ("<td>at least 5x faster</td>", "<td>at least 7x faster</td>"),
    ("1.9x smaller", "1.8x smaller"),
    ("hit rate rises from 0.00 to 0.80", "hit rate rises from 0.00 to 0.81"),
    ("14.2 ms for 3 blocks", "14.2 ms for 4 blocks"),
    ("blocks: 3\nmin: 5", "blocks: 4\nmin: 5"),
    ("3 slots, 7 servers", "4 slots, 7 servers"),
    ("redis: 0.85", "redis: 0.84"),
    ("24,576 bytes", "24,577 bytes"),
    ("key 0x1f2e3d4c", "key 0x1f2e3d4d"),
]


@pytest.mark.parametrize(("one", "other"), MEASURED)
def test_measurements_may_differ(one: str, other: str) -> None:
    sanitise = script.sanitiser()
    assert sanitise(one) == sanitise(other)


@pytest.mark.parametrize(("one", "other"), COMPARED)
def test_claims_and_counts_may_not(one: str, other: str) -> None:
    sanitise = script.sanitiser()
    assert sanitise(one) != sanitise(other)


# --- strict runs --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the files that make notebook runs strict, one built notebook, and altered copies of it."""
    root = tmp_path_factory.mktemp("project")
    for part in PARTS:
        (root / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / part, root / part)
    (root / "tests").mkdir()
    (root / "tests" / "test_plain.py").write_text("def test_plain():\n    pass\n")
    good = build(write(root / "notebooks" / "good.ipynb", PRINTS, SUM, LINE))
    build(write(root / "notebooks" / "probe.ipynb", PROBE))

    def altered(name: str, change: Any) -> None:
        notebook = copy.deepcopy(good)
        change(notebook.cells)
        nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")

    def replace_output(cell: Any, old: str, new: str) -> None:
        assert old in cell.outputs[0].text
        cell.outputs[0].text = cell.outputs[0].text.replace(old, new)

    altered("number", lambda cells: replace_output(cells[2], "4", "5"))
    altered("time", lambda cells: replace_output(cells[1], " ms", "999 ms"))
    altered("claim", lambda cells: replace_output(cells[1], "5x faster: True", "5x faster: False"))
    altered("bound", lambda cells: replace_output(cells[1], "at least 5x", "at least 4x"))
    altered("unrun", lambda cells: cells[2].update(execution_count=None, outputs=[]))
    altered("fault", lambda cells: cells[1].update(source="1 / 0"))
    return root


def run_pytest(cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Pytest in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", *arguments]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        command, cwd=cwd, env={**own, **environment}, capture_output=True, text=True, encoding="utf-8", timeout=600
    )


def outcomes(report: Path) -> dict[str, Counter[str]]:
    """Per notebook, how many cells passed, failed and were skipped."""
    found: dict[str, Counter[str]] = {}
    for case in ET.parse(report).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        name = (case.get("classname") or "").removesuffix(".ipynb").rpartition(".")[2]
        found.setdefault(name, Counter())[outcome] += 1
    return found


@pytest.fixture(scope="module")
def strict(project: Path) -> tuple[dict[str, Counter[str]], str]:
    """One strict run over all notebooks of the project, with nothing but `--nbval`."""
    run = run_pytest(project, "--nbval", "--junitxml=report.xml")
    return outcomes(project / "report.xml"), run.stdout


@pytest.mark.parametrize("name", ["good", "time"])
def test_an_unchanged_lesson_passes_whatever_its_times(strict: Any, name: str) -> None:
    assert strict[0][name] == {"passed": 3}


@pytest.mark.parametrize(("name", "passed"), [("number", 1), ("claim", 0), ("bound", 0), ("unrun", 1), ("fault", 0)])
def test_a_changed_output_fails_once_and_skips_the_rest(strict: Any, name: str, passed: int) -> None:
    assert strict[0][name] == Counter(passed=passed, failure=1, skipped=2 - passed)


def test_a_failure_says_how_to_accept_the_new_outputs(strict: Any) -> None:
    assert "python scripts/build_notebooks.py notebooks/number.ipynb" in strict[1]
    assert "was never run; run: python scripts/build_notebooks.py" in strict[1]


def test_strict_runs_work_from_any_folder_and_in_a_hostile_environment(project: Path, tmp_path: Path) -> None:
    (tmp_path / "mykv.py").write_text("")
    (tmp_path / "startup.py").write_text("STARTED = True")
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.CUSTOMISED = True")
    hostile = {
        **{"PYTHONWARNINGS": "default", "PYTHONDEVMODE": "1", "PYTHONHASHSEED": "3", "PYTHONUTF8": "0", "LC_ALL": "C"},
        **{"PYTHONSTARTUP": str(tmp_path / "startup.py"), "PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "latin-1"},
        **{"TZ": "Asia/Kathmandu", "COLUMNS": "37", "NO_COLOR": "1", "HTTPS_PROXY": "http://127.0.0.1:1"},
        **{"MPLBACKEND": "Agg", "KVLAB_WORK": str(tmp_path), "KVLAB_STORE": "redis://127.0.0.1:1"},
    }
    files = [str(project / "notebooks" / f"{name}.ipynb") for name in ("good", "number", "probe")]
    number = {"passed": 1, "failure": 1, "skipped": 1}
    for cwd in (project / "tests", tmp_path):
        report = tmp_path / "report.xml"
        run = run_pytest(cwd, "--nbval", f"--junitxml={report}", *files, **hostile)
        assert outcomes(report) == {"good": {"passed": 3}, "number": number, "probe": {"passed": 1}}, run


@pytest.mark.slow
def test_a_lesson_passes_though_the_user_wants_to_see_every_warning() -> None:
    lesson = ROOT / "notebooks" / "01_attention_by_hand.ipynb"
    run = run_pytest(ROOT, "--nbval", "-q", str(lesson), PYTHONWARNINGS="default")
    assert run.returncode == 0, run.stdout


def test_without_nbval_no_notebook_is_collected(project: Path) -> None:
    run = run_pytest(project, "-q")
    assert run.returncode == 0, run.stdout
    assert "1 passed" in run.stdout


def test_check_names_what_would_change_and_writes_nothing(project: Path) -> None:
    def check(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "scripts/build_notebooks.py", "--check", f"notebooks/{name}.ipynb"]
        return subprocess.run(command, cwd=project, capture_output=True, text=True, encoding="utf-8")

    before = (project / "notebooks" / "number.ipynb").read_bytes()
    assert check("good").returncode == 0
    run = check("number")
    assert run.returncode == 1
    assert "would change: number.ipynb" in run.stderr
    assert (project / "notebooks" / "number.ipynb").read_bytes() == before
