"""Build the course: write generated cells, run each notebook, and do not change the files of unchanged lessons.

    python scripts/build_notebooks.py                          # all notebooks, and the table in README.md
    python scripts/build_notebooks.py notebooks/03_*.ipynb     # only these notebooks
    python scripts/build_notebooks.py --check                  # write nothing; exit 1 and list the files to change
    python scripts/build_notebooks.py --no-run                 # update generated cells and layout without a run
    python scripts/build_notebooks.py --fresh FILE             # replace the stored measurements and pictures

Three cells of a notebook are generated from `notebooks/course.toml`: the first (header), the code
cell after it (set-up on Colab) and the last (navigation). The text between `<!-- course:begin -->`
and `<!-- course:end -->`, in README.md and in any Markdown cell, is generated too. To change these
texts, edit course.toml.

Measured times and pictures differ between runs. A cell keeps its stored outputs under two
conditions: they equal the new outputs after sanitising, and no code up to this cell has changed
since they were made. The sanitising rules of notebooks/sanitize.cfg also apply to `pytest --nbval`.
A second build therefore changes no byte. If the outputs of a cell can vary, its metadata contains a
digest of the code up to this cell.
"""

# nbformat declares itself typed, but many of its functions are not.
# mypy: allow-untyped-calls
from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell
from nbval.kernel import CURRENT_ENV_KERNEL_NAME, NbvalKernelspecManager
from nbval.plugin import coalesce_streams, get_sanitize_patterns

from kvlab.course.exercises import Exercise
from kvlab.course.exercises.registry import BY_CONSTANT
from kvlab.course.kernel import kernel_environment
from kvlab.lab.streams import accept_any_text
from scripts.repository import NAME, URL

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
SANITIZE = NOTEBOOKS / "sanitize.cfg"
REPOSITORY = NAME
CELL_TIMEOUT = 120  # seconds, as for nbval in pyproject.toml
BEGIN, END = "<!-- course:begin -->", "<!-- course:end -->"
GENERATED = ("header", "colab-setup", "footer")  # tags and ids of the generated cells
CELL_METADATA = {"tags", "jupyter", "kvlab"}  # kept; other fields come from editors
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
PICTURES = {"image/png", "image/jpeg"}  # nbval does not compare them
WIDGET = "application/vnd.jupyter.widget-view+json"

COLAB_SETUP = f"""\
# On Google Colab this installs the course; elsewhere it does nothing.
if "google.colab" in str(get_ipython()):
    %pip install -q "kvlab[EXTRAS] @ git+{URL}"
"""


class BuildError(Exception):
    """A notebook cannot be built; the message contains the cell and the reason."""


# --- The course map -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Lesson:
    """One entry of course.toml."""

    file: str
    title: str
    goal: str
    able: Sequence[str]
    needs: Sequence[str]
    minutes: int = 0
    fast: str = ""
    hardware: str = "a CPU is enough"
    optional: bool = False
    extras: str = "course"

    @property
    def number(self) -> str:
        """What the file name begins with: two digits, and a letter for an optional lesson."""
        return self.file.partition("_")[0]

    @property
    def name(self) -> str:
        """The text of links to the lesson."""
        return f"{self.number} · {self.title}"


@dataclass(frozen=True)
class Course:
    """The lessons in order, and the folder where their notebooks are. Lessons without a notebook get no links."""

    folder: Path
    lessons: Sequence[Lesson]

    def lesson(self, path: Path) -> Lesson | None:
        """The lesson of a notebook, if it is one of the course."""
        return next((lesson for lesson in self.lessons if lesson.file == path.stem), None)

    def header(self, lesson: Lesson, notebook: NotebookNode) -> str:
        """The Markdown of a notebook's first cell."""
        able = "\n".join(f"- {item}" for item in lesson.able)
        facts = [
            f"**Needs:** {self.needs(lesson)}",
            f"**Time:** {Time.of(notebook)}",
            *([f"**Fast track (20 minutes):** {lesson.fast}"] if lesson.fast else []),
            f"**Hardware:** {lesson.hardware}",
        ]
        return "\n\n".join(
            [
                f"# {lesson.name}" + (" (optional)" if lesson.optional else ""),
                lesson.goal,
                f"**You will be able to**\n\n{able}",
                "  \n".join(facts),
                self.neighbours(lesson),
                "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
                f"({_colab(lesson)}) {self._colab_neighbours(lesson)}".strip(),
            ]
        )

    def footer(self, lesson: Lesson) -> str:
        """The Markdown of a notebook's last cell."""
        return f"---\n\n{self.neighbours(lesson)}"

    def table(self, prefix: str = "") -> str:
        """The index of the course; `prefix` is the path from its page to the notebooks."""
        rows = ["| No. | Lesson | State | Goal | Minutes | Needs |", "|---|---|---|---|---|---|"]
        for lesson in self.lessons:
            title = self._link(lesson, lesson.title, prefix) + (" (optional)" if lesson.optional else "")
            state = f"ready, [Colab]({_colab(lesson)})" if self._exists(lesson) else "planned"
            needs = self.needs(lesson, prefix, short=True)
            cells = (lesson.number, title, state, lesson.goal, str(self.minutes(lesson)), needs)
            rows.append(f"| {' | '.join(cells)} |")
        return "\n".join(rows)

    def minutes(self, lesson: Lesson) -> int:
        """How long a lesson takes: computed from its notebook, or the estimate of one that is planned."""
        if not self._exists(lesson):
            return lesson.minutes
        return Time.of(nbformat.read(self.folder / f"{lesson.file}.ipynb", as_version=4)).total

    def neighbours(self, lesson: Lesson) -> str:
        """Links to the lessons before and after."""
        i = self.lessons.index(lesson)
        parts = [f"Previous: {self._link(self.lessons[i - 1])}"] if i else []
        parts += [f"Next: {self._link(self.lessons[i + 1])}"] if i + 1 < len(self.lessons) else []
        return " | ".join(parts)

    def needs(self, lesson: Lesson, prefix: str = "", short: bool = False) -> str:
        """The prerequisites of a lesson: other lessons as links, knowledge as text."""
        by_number = {other.number: other for other in self.lessons}
        parts = []
        for need in lesson.needs:
            other = by_number.get(need)
            missing = other is not None and not short and not self._exists(other)
            note = " (not written yet; you can go on without it)" if missing else ""
            parts.append(self._link(other, need if short else "", prefix) + note if other else need)
        return ", ".join(parts)

    def _colab_neighbours(self, lesson: Lesson) -> str:
        """Links to the neighbours that work in Colab, where links from one notebook to another do not."""
        i = self.lessons.index(lesson)
        near = (*self.lessons[max(i - 1, 0) : i], *self.lessons[i + 1 : i + 2])
        links = [f"[{other.name}]({_colab(other)})" for other in near if self._exists(other)]
        return f"In Colab, the neighbours are {' and '.join(links)}." if links else ""

    def _exists(self, lesson: Lesson) -> bool:
        return (self.folder / f"{lesson.file}.ipynb").exists()

    def _link(self, lesson: Lesson, text: str = "", prefix: str = "") -> str:
        text = text or lesson.name
        return f"[{text}]({prefix}{lesson.file}.ipynb)" if self._exists(lesson) else text


def _colab(lesson: Lesson) -> str:
    return f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{lesson.file}.ipynb"


@dataclass(frozen=True)
class Time:
    """How long a notebook takes, in minutes: reading and running it, and its exercises.

    Reading goes at 200 words or 12 visible lines of code a minute; an exercise takes what its difficulty says
    (`kvlab.course.exercises.MINUTES`).
    """

    reading: int
    exercises: int

    @classmethod
    def of(cls, notebook: NotebookNode) -> Time:
        """The time of a notebook."""
        own = [cell for cell in notebook.cells if not set(tags(cell)) & set(GENERATED)]
        words = sum(len(outside_code(c.source).split()) for c in own if c.cell_type == "markdown")
        lines = sum(bool(line.strip()) for c in own if is_visible_code(c) for line in c.source.splitlines())
        return cls(round(words / 200 + lines / 12), sum(exercise.minutes for exercise in exercises_in(notebook)))

    @property
    def total(self) -> int:
        """All of it, in steps of five minutes."""
        return max(5, 5 * round((self.reading + self.exercises) / 5))

    def __str__(self) -> str:
        parts = f", {self.exercises} of them for the exercises" if self.exercises else ""
        return f"about {self.total} minutes{parts}"


def load_course(folder: Path) -> Course:
    """Read `course.toml` in a folder of notebooks; without this file the course is empty."""
    file = folder / "course.toml"
    entries = tomllib.loads(file.read_text(encoding="utf-8"))["lesson"] if file.exists() else []
    return Course(folder, [Lesson(**entry) for entry in entries])


def refill(text: str, table: str) -> str:
    """`text` with the course's table between the markers; unchanged if it has no markers."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", text)


# --- Notebooks as data --------------------------------------------------------------------------
def tags(cell: NotebookNode) -> list[str]:
    """A cell's tags."""
    return list(cell.metadata.get("tags", []))


def code_cells(notebook: NotebookNode) -> Iterator[NotebookNode]:
    """The code cells, in order."""
    return (cell for cell in notebook.cells if cell.cell_type == "code")


def is_visible_code(cell: NotebookNode) -> bool:
    """Whether a cell is code that a reader sees: neither folded nor the set-up on Colab."""
    folded = cell.metadata.get("jupyter", {}).get("source_hidden", False)
    return cell.cell_type == "code" and not folded and "colab-setup" not in tags(cell)


def exercises_in(notebook: NotebookNode) -> list[Exercise]:
    """The exercises that a notebook checks, in its order."""
    code = "\n".join(cell.source for cell in code_cells(notebook))
    names = re.findall(r"exercises\.check\(\s*exercises\.([A-Z][A-Z0-9_]*)", code)
    return [BY_CONSTANT[name] for name in names if name in BY_CONSTANT]


def outside_code(markdown: str) -> str:
    """Markdown without its blocks of code; a piece of code in a sentence becomes one word."""
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"^ *```.*?^ *```", "", markdown, flags=re.MULTILINE | re.DOTALL))


def read(path: Path) -> NotebookNode:
    """Read a notebook; cells without a valid id of their own get an id derived from their text."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    taken: set[str] = set()
    for cell in raw["cells"]:
        cell["id"] = _free_id(cell, taken)
        taken.add(cell["id"])
    raw["nbformat"], raw["nbformat_minor"] = 4, 5
    notebook: NotebookNode = nbformat.reads(json.dumps(raw), as_version=4)
    return notebook


def _free_id(cell: Mapping[str, Any], taken: set[str]) -> str:
    """The cell's own id if it is valid and free, else one derived from its source."""
    own = cell.get("id", "")
    if re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", own) and own not in taken:
        return str(own)
    digest = hashlib.sha256("".join(cell["source"]).encode()).hexdigest()[:8]
    return next(name for name in (digest, *(f"{digest}-{i}" for i in range(2, 1000))) if name not in taken)


def with_generated_cells(notebook: NotebookNode, lesson: Lesson, course: Course) -> NotebookNode:
    """A copy with the header, Colab set-up, footer and course tables that follow from course.toml."""
    result = copy.deepcopy(notebook)
    old = {tag: cell for cell in result.cells for tag in GENERATED if tag in tags(cell)}
    setup = old.get("colab-setup") or new_code_cell()
    setup.source = COLAB_SETUP.replace("EXTRAS", lesson.extras).rstrip()
    ends = new_markdown_cell(course.header(lesson, notebook)), setup, new_markdown_cell(course.footer(lesson))
    for cell, tag in zip(ends, GENERATED, strict=True):
        cell.id, cell.metadata = tag, NotebookNode(tags=[tag])
    body = [cell for cell in result.cells if not set(tags(cell)) & set(GENERATED)]
    for cell in body:
        if cell.cell_type == "markdown":
            cell.source = refill(cell.source, course.table())
    result.cells = [ends[0], ends[1], *body, ends[2]]
    return result


def encode(notebook: NotebookNode) -> bytes:
    """The bytes of the file: valid, with fixed metadata and without the metadata of editors."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k in CELL_METADATA})
    nbformat.validate(notebook)
    text: str = nbformat.writes(notebook)
    return (text.rstrip("\n") + "\n").encode()


# --- Outputs ------------------------------------------------------------------------------------
def sanitiser(rules: Path = SANITIZE) -> Callable[[Any], Any]:
    """A function that replaces text that differs between runs, as nbval does, and does not change other values."""
    pairs = get_sanitize_patterns(rules.read_text(encoding="ascii"))

    def sanitise(value: Any) -> Any:
        for pattern, replacement in pairs:
            value = re.sub(pattern, replacement, value) if isinstance(value, str) else value
        return value

    return sanitise


def comparable(outputs: Sequence[NotebookNode], sanitise: Callable[[Any], Any]) -> dict[str, list[Any]]:
    """The part of a cell's outputs that nbval compares: sanitised values by stream name, MIME type or "error"."""
    found: dict[str, list[Any]] = defaultdict(list)
    for output in coalesce_streams(copy.deepcopy(list(outputs))):
        if output.output_type == "stream":
            found[output.name].append(sanitise(output.text))
        elif output.output_type == "error":
            found["error"].append((output.ename, sanitise(output.evalue)))
        else:
            for mime, value in output.data.items():
                if mime not in PICTURES | {WIDGET}:
                    found[mime].append(sanitise(value))
    return dict(found)


def varies(outputs: Sequence[NotebookNode], sanitise: Callable[[Any], Any]) -> bool:
    """Whether outputs may differ between runs: they contain pictures or text that sanitising changes."""
    pictures = any(PICTURES & set(output.get("data", {})) for output in outputs)
    return pictures or comparable(outputs, sanitise) != comparable(outputs, lambda value: value)


def portable(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Outputs as they are stored: adjacent stream outputs joined, without widget ids and paths of this machine."""
    result: list[NotebookNode] = []
    for output in copy.deepcopy(list(outputs)):
        last = result[-1] if result else None
        if output.output_type == "stream" and last and last.get("name") == output.name:
            last.text += output.text
            continue
        if output.output_type == "error":
            output.traceback = [_without_paths(line) for line in output.traceback]
        output.get("data", {}).pop(WIDGET, None)
        result.append(output)
    return [coalesce_streams([o])[0] for o in result]  # applies \r and \b, as a terminal does


def _without_paths(text: str) -> str:
    places = {str(ROOT): ".", sys.prefix: "<env>", sys.base_prefix: "<python>", str(Path.home()): "~"}
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, places[place])
    return text


def settle(new: NotebookNode, old: NotebookNode, sanitise: Callable[[Any], Any], fresh: bool = False) -> None:
    """Decide for each cell of the executed `new` whether the outputs of `old` are kept."""
    before = {cell.id: cell for cell in code_cells(old)}
    chain = hashlib.sha256()
    for cell in code_cells(new):
        chain.update(cell.source.encode() + b"\0")
        made_by = chain.hexdigest()[:12]
        cell.outputs = portable(cell.outputs)
        kept = before.get(cell.id)
        if kept and not fresh and _stays(kept, cell, made_by, sanitise):
            cell.outputs = [_renumbered(output, cell.execution_count) for output in portable(kept.outputs)]
        cell.metadata.pop("kvlab", None)
        if varies(cell.outputs, sanitise):
            cell.metadata["kvlab"] = {"made_by": made_by}


def _stays(kept: NotebookNode, cell: NotebookNode, made_by: str, sanitise: Callable[[Any], Any]) -> bool:
    same_code = kept.metadata.get("kvlab", {}).get("made_by") == made_by
    return same_code and comparable(kept.outputs, sanitise) == comparable(cell.outputs, sanitise)


def _renumbered(output: NotebookNode, count: int | None) -> NotebookNode:
    if output.output_type == "execute_result":
        output.execution_count = count
    return output


# --- Running ------------------------------------------------------------------------------------
class ThisPython(AsyncKernelManager):
    """Starts kernels with the Python that runs this script and ignores kernels that the user has installed."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(kernel_spec_manager=NbvalKernelspecManager(), **kwargs)


def execute(notebook: NotebookNode, path: Path, timeout: int = CELL_TIMEOUT) -> None:
    """Run all code cells in a fresh kernel, in the notebook's folder, and store their outputs in place.

    Raises:
        BuildError: a cell failed or timed out, a cell tagged `raises-exception` did not fail, or the kernel died.
    """
    reached = [0]
    recording = {"KVLAB_RECORD": "1"} if os.environ.get("KVLAB_RECORD") else {}  # see kvlab.course.recorded
    client = NotebookClient(
        notebook,
        kernel_manager_class=ThisPython,
        kernel_name=CURRENT_ENV_KERNEL_NAME,
        timeout=timeout,
        iopub_timeout=timeout,
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_execute=lambda cell, cell_index: reached.append(cell_index),
    )
    with tempfile.TemporaryDirectory(prefix="kvlab-build-", ignore_cleanup_errors=True) as folder:
        try:
            client.execute(env=kernel_environment(Path(folder), **recording), stderr=subprocess.DEVNULL)
        except CellExecutionError:
            raise BuildError(_failure(notebook, path, reached[-1])) from None
        except CellTimeoutError:
            raise BuildError(_failure(notebook, path, reached[-1], f"timed out after {timeout} seconds")) from None
        except DeadKernelError:
            raise BuildError(_failure(notebook, path, reached[-1], "its kernel died")) from None
    _check_expected_errors(notebook, path)


def _check_expected_errors(notebook: NotebookNode, path: Path) -> None:
    """Check that cells tagged `raises-exception` raised; nbval alone would accept a tagged cell that does not."""
    for i, cell in enumerate(notebook.cells):
        raised = any(output.output_type == "error" for output in cell.get("outputs", []))
        if "raises-exception" in tags(cell) and not raised:
            raise BuildError(_failure(notebook, path, i, "tagged raises-exception, but it raised nothing"))


def _failure(notebook: NotebookNode, path: Path, index: int, reason: str = "failed") -> str:
    """The message for a failed notebook: file, cell, reason, numbered source and the traceback, if any."""
    cell = notebook.cells[index]
    code = sum(c.cell_type == "code" for c in notebook.cells[: index + 1])
    where = f"{path}: cell {index + 1} of {len(notebook.cells)} (code cell {code}, id {cell.id}): {reason}"
    source = "\n".join(f"{n:5} | {line}" for n, line in enumerate(cell.source.splitlines(), 1))
    errors = [output for output in cell.get("outputs", []) if output.output_type == "error"]
    traceback = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(errors[-1].traceback)) if errors else ""
    return f"{where}\n\n{source}\n\n{traceback}".rstrip()


# --- Building -----------------------------------------------------------------------------------
def build(path: Path, course: Course, run: bool = True, fresh: bool = False, rules: Path = SANITIZE) -> bytes:
    """The new content of a notebook's file.

    Args:
        run: execute the notebook; otherwise only the generated cells and the layout are updated.
        fresh: use the new outputs even if the stored outputs are equivalent.

    Raises:
        BuildError: see `execute`.
    """
    old = read(path)
    lesson = course.lesson(path)
    new = with_generated_cells(old, lesson, course) if lesson else copy.deepcopy(old)
    if run:
        execute(new, path)
        settle(new, old, sanitiser(rules), fresh)
    return encode(new)


def main(argv: Sequence[str] | None = None) -> int:
    """Build the notebooks of the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="notebooks to build; default: all of notebooks/")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if a file would change")
    parser.add_argument("--no-run", action="store_true", help="update generated cells and layout only")
    parser.add_argument("--fresh", action="store_true", help="use new outputs even if the stored ones are equivalent")
    args = parser.parse_args(argv)
    accept_any_text()
    files = [path.resolve() for path in args.files or sorted(NOTEBOOKS.glob("*.ipynb"))]
    try:
        changed = [path.name for path in files if _build_one(path, args)]
    except BuildError as error:
        print(f"\n\n{error}", file=sys.stderr)
        return 1
    if any(path.parent == NOTEBOOKS for path in files) and _write_index(ROOT / "README.md", args.check):
        changed.append("README.md")
    if args.check and changed:
        print(f"would change: {', '.join(changed)}. Run: python scripts/build_notebooks.py", file=sys.stderr)
        return 1
    return 0


def _build_one(path: Path, args: argparse.Namespace) -> bool:
    """Build one notebook, print the result, and return whether its bytes differ."""
    began = time.monotonic()
    print(f"{path.name} …", end=" ", flush=True)
    content = build(path, load_course(path.parent), not args.no_run, args.fresh)
    differs = content != path.read_bytes()
    if differs and not args.check:
        path.write_bytes(content)
    what = ("would change" if args.check else "written") if differs else "unchanged"
    print(f"{what} ({time.monotonic() - began:.0f} s, {len(content) / 1e3:.0f} KB)")
    return differs


def _write_index(page: Path, check: bool) -> bool:
    """Write the course table between the markers of a page; return whether its text differs."""
    if not page.exists():
        return False
    old = page.read_text(encoding="utf-8")
    new = refill(old, load_course(NOTEBOOKS).table("notebooks/"))
    if new != old and not check:
        page.write_text(new, encoding="utf-8")
    return new != old


if __name__ == "__main__":
    sys.exit(main())
