"""What every committed notebook keeps to. Each rule is a function from a notebook to a list of complaints.

The second half tests the rules: a notebook that keeps them all, and for each rule one that breaks it.
"""

from __future__ import annotations

import copy
import itertools
import re
import statistics
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.harness.builder import ROOT, script

FOLDER = ROOT / "notebooks"
ALLOWED: Mapping[str, Any] = tomllib.loads((Path(__file__).parent / "allowed_tags.toml").read_text(encoding="utf-8"))

MAX_LINES, MEDIAN_LINES = 25, 8
MAX_BYTES = 1_500_000
WORDS_PER_LINE = 5
CELLS_BETWEEN_LOOKS = 8


@dataclass(frozen=True)
class Page:
    """A notebook as it is on disk."""

    path: Path
    content: bytes

    @property
    def notebook(self) -> NotebookNode:
        return nbformat.reads(self.content.decode(), as_version=4)

    @property
    def lesson_code(self) -> list[NotebookNode]:
        """The code cells that an author wrote."""
        return [cell for cell in script.code_cells(self.notebook) if "colab-setup" not in script.tags(cell)]

    @property
    def prose(self) -> list[NotebookNode]:
        """The Markdown cells that an author wrote."""
        cells = (cell for cell in self.notebook.cells if cell.cell_type == "markdown")
        return [cell for cell in cells if not set(script.tags(cell)) & set(script.GENERATED)]


# --- rules --------------------------------------------------------------------------------------
def is_as_the_build_writes_it(page: Page) -> list[str]:
    """Valid, and laid out as the build script lays it out: no state of an editor, no widget state."""
    nbformat.validate(page.notebook)
    if script.encode(page.notebook) == page.content:
        return []
    return ["it was saved by an editor; run scripts/build_notebooks.py on it"]


def was_run_from_top_to_bottom(page: Page) -> list[str]:
    """Every code cell ran, in order, in one go."""
    counts = [cell.execution_count for cell in script.code_cells(page.notebook)]
    if counts == list(range(1, len(counts) + 1)):
        return []
    return [f"execution counts are {counts}; run scripts/build_notebooks.py on it"]


def shows_no_unexpected_error(page: Page) -> list[str]:
    """Errors stand only in cells tagged raises-exception."""
    return [
        f"cell {cell.id} shows {output.ename}: {output.evalue}"
        for cell in script.code_cells(page.notebook)
        for output in cell.outputs
        if output.output_type == "error" and "raises-exception" not in script.tags(cell)
    ]


def has_only_allowed_tags(page: Page) -> list[str]:
    """Tags are plain ones, or listed with their reason; nbval's comment markers are not used at all."""
    complaints = []
    for cell in page.notebook.cells:
        for tag in script.tags(cell):
            listed = any(_fits(entry, page, cell, tag) for entry in ALLOWED["exceptions"])
            if tag not in ALLOWED["plain"] and not listed:
                line = f'{{ notebook = "{page.path.stem}", cell = "{cell.id}", tag = "{tag}", reason = "…" }},'
                complaints.append(f"if it must be, add to allowed_tags.toml: {line}")
        if re.search(r"^\s*#\s*(NBVAL_|PYTEST_VALIDATE)", cell.source, re.MULTILINE):
            complaints.append(f"cell {cell.id} has an nbval comment marker; use a tag")
    return complaints


def _fits(entry: Mapping[str, str], page: Page, cell: NotebookNode, tag: str) -> bool:
    return (entry["notebook"], entry["cell"], entry["tag"]) == (page.path.stem, cell.id, tag)


def has_short_cells(page: Page) -> list[str]:
    """No code cell is long, and most are short."""
    complaints = [
        f"cell {cell.id} has {len(cell.source.splitlines())} lines, more than {MAX_LINES}"
        for cell in page.lesson_code
        if len(cell.source.splitlines()) > MAX_LINES
    ]
    median = statistics.median(len(cell.source.splitlines()) for cell in page.lesson_code)
    return complaints + ([f"the median cell has {median} lines, more than {MEDIAN_LINES}"] * (median > MEDIAN_LINES))


def has_alternative_texts(page: Page) -> list[str]:
    """Every picture in the text says what it shows, for readers who do not see it."""
    return [
        f"cell {cell.id}: {picture} has no alt text"
        for cell in page.notebook.cells
        for text in _texts(cell)
        for picture in re.findall(r"<img\b[^>]*>|!\[[^\]]*\]\(.*?\)", text)
        if not re.search(r"""\balt=["'][^"']+["']|!\[\s*[^\s\]]""", picture)
    ]


def _texts(cell: NotebookNode) -> Iterator[str]:
    """A cell's Markdown and HTML, outputs included."""
    if cell.cell_type == "markdown":
        yield cell.source
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        yield from (data[mime] for mime in ("text/html", "text/markdown") if mime in data)


def has_a_caption_under_each_plot(page: Page) -> list[str]:
    """Under each plot stands a sentence that begins with "Figure"; a widget's stand-in has one of its own."""
    return [
        f'cell {cell.id}: nothing that begins with "Figure" follows the plot; use kvlab.course.plots.show'
        for cell in script.code_cells(page.notebook)
        for i, output in enumerate(cell.outputs)
        if "image/png" in output.get("data", {}) and not _has_caption(cell.outputs, i)
    ]


def _has_caption(outputs: list[NotebookNode], i: int) -> bool:
    own = outputs[i].data.get("text/plain", "")
    below = outputs[i + 1] if i + 1 < len(outputs) else NotebookNode()
    data = below.get("data", {})
    text = below.get("text") or data.get("text/markdown") or data.get("text/plain", "")
    return own.startswith(("[interactive", "Figure: ")) or text.lstrip("*_> ").startswith("Figure")


def has_something_to_look_at(page: Page) -> list[str]:
    """From the first picture, widget or table to the last, the next one is never far."""
    return gaps([_is_a_look(cell) for cell in page.lesson_code])


def gaps(looks: list[bool], most: int = CELLS_BETWEEN_LOOKS) -> list[str]:
    """Complaints about too many code cells in a row without a look, between the first look and the last."""
    places = [i for i, look in enumerate(looks) if look]
    if not places:
        return ["no code cell shows a picture, a widget or a table"]
    return [
        f"between the looks of code cells {a + 1} and {b + 1} (the set-up cell not counted) are {b - a - 1} cells "
        f"without one; show something at least every {most} cells"
        for a, b in itertools.pairwise(places)
        if b - a > most
    ]


def _is_a_look(cell: NotebookNode) -> bool:
    for output in cell.outputs:
        data = output.get("data", {})
        if any(mime.startswith("image/") for mime in data) or script.WIDGET in data:
            return True
        if data.get("text/plain", "").startswith("[interactive"):
            return True
        if re.search("<(table|svg)", data.get("text/html", "")):
            return True
    return False


def has_a_takeaway(page: Page) -> list[str]:
    """At least one box says what to take away."""
    everything = [text for cell in page.notebook.cells for text in _texts(cell)]
    return [] if any("**Takeaway" in text for text in everything) else ["no **Takeaway** anywhere"]


def has_one_title(page: Page) -> list[str]:
    """The generated header has the only heading of the first level."""
    cells = [cell.id for cell in page.prose if re.search(r"^# ", _without_code(cell.source), re.MULTILINE)]
    return [f"cell {cell} has a heading of the first level; the header has the title" for cell in cells]


def is_small(page: Page) -> list[str]:
    """Cloning the course stays quick."""
    return [f"{len(page.content):,} bytes, more than {MAX_BYTES:,}"] if len(page.content) > MAX_BYTES else []


def has_links_that_resolve(page: Page) -> list[str]:
    """Links into this repository lead to files that exist."""
    pattern = r"""\]\(\s*<?([^)\s>]+)|(?:href|src)=["']([^"']+)["']"""
    complaints = []
    for cell in page.notebook.cells:
        if cell.cell_type == "markdown":
            for groups in re.findall(pattern, _without_code(cell.source)):
                target = "".join(groups).partition("#")[0]
                local = target and not re.match(r"[a-z]+:", target)
                if local and not (page.path.parent / target).exists():
                    complaints.append(f"cell {cell.id}: link to {target} leads nowhere")
    return complaints


def names_no_machine(page: Page) -> list[str]:
    """No absolute path of the machine that built it, in sources or outputs."""
    text = page.content.decode()
    pattern = r"(?<![\w.:/-])/(?:home|root|Users|tmp/ipykernel_\d+)/[\w./-]*|[A-Z]:\\\\+Users\\\\+\w+"
    found = set(re.findall(pattern, text)) | ({str(ROOT)} if f"{ROOT}/" in text else set())
    return [f"it contains {path}" for path in sorted(found)]


def has_prose_around_its_code(page: Page) -> list[str]:
    """A lesson explains: so many words for each line of code."""
    ratio = words_per_code_line(page)
    return [] if ratio >= WORDS_PER_LINE else [f"{ratio:.1f} words a line of code, fewer than {WORDS_PER_LINE}"]


def words_per_code_line(page: Page) -> float:
    """Words of the author's prose (solutions in code fences not counted) by non-blank lines of code."""
    words = sum(len(_without_code(cell.source).split()) for cell in page.prose)
    lines = sum(bool(line.strip()) for cell in page.lesson_code for line in cell.source.splitlines())
    return words / max(lines, 1)


def _without_code(markdown: str) -> str:
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"^ *```.*?^ *```", "", markdown, flags=re.MULTILINE | re.DOTALL))


def has_the_generated_cells(page: Page) -> list[str]:
    """Header, set-up and footer say what course.toml says."""
    course = script.load_course(page.path.parent)
    lesson = course.lesson(page.path)
    if lesson is None:
        return ["it has no entry in notebooks/course.toml"]
    should = script.with_generated_cells(page.notebook, lesson, course).cells
    if [(c.id, c.source) for c in should] == [(c.id, c.source) for c in page.notebook.cells]:
        return []
    return ["generated cells differ from course.toml; run scripts/build_notebooks.py --no-run"]


RULES: list[Callable[[Page], list[str]]] = [
    is_as_the_build_writes_it,
    was_run_from_top_to_bottom,
    shows_no_unexpected_error,
    has_only_allowed_tags,
    has_short_cells,
    has_alternative_texts,
    has_a_caption_under_each_plot,
    has_something_to_look_at,
    has_a_takeaway,
    has_one_title,
    is_small,
    has_links_that_resolve,
    names_no_machine,
    has_prose_around_its_code,
    has_the_generated_cells,
]
name = lambda thing: getattr(thing, "stem", None) or getattr(thing, "__name__", None)  # noqa: E731


@pytest.mark.parametrize("rule", RULES, ids=name)
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=name)
def test_every_notebook_keeps_the_rules(
    path: Path, rule: Callable[[Page], list[str]], record_property: Callable[[str, object], None]
) -> None:
    page = Page(path, path.read_bytes())
    if rule is has_prose_around_its_code:
        record_property("words per line of code", round(words_per_code_line(page), 1))
        print(f"{path.stem}: {words_per_code_line(page):.1f} words a line of code")
    assert not (complaints := rule(page)), "\n".join([f"{path.name}:", *complaints])


def test_every_exception_is_still_needed() -> None:
    used = {
        (path.stem, cell.id, tag)
        for path in FOLDER.glob("*.ipynb")
        for cell in nbformat.read(path, as_version=4).cells
        for tag in script.tags(cell)
    }
    listed = [(entry["notebook"], entry["cell"], entry["tag"]) for entry in ALLOWED["exceptions"]]
    assert not [entry for entry in listed if entry not in used], "these fit no cell any more"
    assert len(set(listed)) == len(listed)
    assert all(len(entry["reason"].split()) >= 3 for entry in ALLOWED["exceptions"])


def test_the_readme_shows_the_course() -> None:
    page = ROOT / "README.md"
    if not page.exists() or script.BEGIN not in (text := page.read_text(encoding="utf-8")):
        pytest.skip("README.md has no markers for the course table yet")
    table = script.load_course(FOLDER).table("notebooks/")
    assert script.refill(text, table) == text, "run scripts/build_notebooks.py --no-run"


# --- the rules themselves -----------------------------------------------------------------------
PROSE = f"## About\n\n{'word ' * 60}\n\n![a box](course.toml), [a link](course.toml#there)\n\n> **Takeaway.** So."
LESSON = """
[[lesson]]
file = "00_x"
title = "X"
goal = "Do."
able = ["do"]
needs = ["hands"]
minutes = 1
"""


def page_in(folder: Path, spoil: Callable[[NotebookNode], object]) -> Page:
    """A notebook that keeps all rules, unless `spoil` changes that."""
    plot = new_output("display_data", {"image/png": "AAAA", "text/plain": "<Figure size 1x1 with 1 Axes>"})
    caption = new_output("stream", name="stdout", text="Figure: a line.\n")
    still = new_output("display_data", {"image/png": "AAAA", "text/plain": "[interactive: run this cell] Text."})
    cells = [
        new_markdown_cell(PROSE, id="prose"),
        new_code_cell("draw()", id="plot", outputs=[plot, caption]),
        *(new_code_cell(f"{i} + 1", id=f"c{i}") for i in range(CELLS_BETWEEN_LOOKS - 1)),
        new_code_cell("widget()", id="widget", outputs=[still]),
    ]
    path = folder / "00_x.ipynb"
    path.touch()
    (folder / "course.toml").write_text(LESSON)
    course = script.load_course(folder)
    notebook = script.with_generated_cells(new_notebook(cells=cells), course.lessons[0], course)
    for i, cell in enumerate(script.code_cells(notebook), 1):
        cell.execution_count = i
    spoil(notebook)
    return Page(path, script.encode(notebook))


def cell_of(notebook: NotebookNode, cell_id: str) -> NotebookNode:
    return next(cell for cell in notebook.cells if cell.id == cell_id)


def prose(text: str) -> Callable[[NotebookNode], object]:
    """Spoils by a Markdown cell with this text."""
    return lambda notebook: notebook.cells.insert(2, new_markdown_cell(text, id="bad"))


def changed(cell_id: str, **values: Any) -> Callable[[NotebookNode], object]:
    """Spoils by setting fields of one cell."""
    return lambda notebook: cell_of(notebook, cell_id).update(copy.deepcopy(values))


ERROR = new_output("error", ename="ValueError", evalue="no", traceback=[])
HTML = new_output("display_data", {"text/html": "<img src='x.png'>", "text/plain": "x"})
PATH = new_output("stream", name="stdout", text="/home/someone/kvlab/x.py\n")
PLOT = new_output("display_data", {"image/png": "AAAA", "text/plain": "<Figure size 1x1 with 1 Axes>"})
TEXT = new_output("stream", name="stdout", text="done\n")
LONG = "\n".join(["x = 1"] * 26)

SPOILT = [
    (was_run_from_top_to_bottom, changed("c3", execution_count=99)),
    (was_run_from_top_to_bottom, changed("c3", execution_count=None)),
    (shows_no_unexpected_error, changed("c3", outputs=[ERROR])),
    (has_only_allowed_tags, changed("c3", metadata=NotebookNode(tags=["nbval-skip"]))),
    (has_only_allowed_tags, changed("c3", source="# NBVAL_IGNORE_OUTPUT\n1")),
    (has_short_cells, changed("c3", source=LONG)),
    (has_short_cells, lambda notebook: [c.update(source="x = 1\n" * 9) for c in script.code_cells(notebook)]),
    (has_alternative_texts, prose("![](course.toml)")),
    (has_alternative_texts, prose('<img src="course.toml">')),
    (has_alternative_texts, changed("c3", outputs=[HTML])),
    (has_a_caption_under_each_plot, changed("plot", outputs=[PLOT])),
    (has_a_caption_under_each_plot, changed("plot", outputs=[PLOT, TEXT])),
    (has_something_to_look_at, lambda notebook: notebook.cells.insert(5, new_code_cell("2", id="more"))),
    (has_something_to_look_at, lambda notebook: [c.update(outputs=[]) for c in script.code_cells(notebook)]),
    (has_a_takeaway, changed("prose", source=PROSE.replace("Takeaway", "Note"))),
    (has_one_title, prose("# Another title")),
    (is_small, changed("c3", outputs=[new_output("stream", name="stdout", text="x" * 1_500_000)])),
    (has_links_that_resolve, prose("[next](01_gone.ipynb#part)")),
    (has_links_that_resolve, prose('<a href="../docs/gone.md">docs</a>')),
    (names_no_machine, changed("c3", outputs=[PATH])),
    (names_no_machine, changed("c3", source=f"open('{ROOT}/x')")),
    (has_prose_around_its_code, changed("c3", source="x = 1\n" * 25)),
    (has_the_generated_cells, changed("header", source="# 00 · Mine")),
    (has_the_generated_cells, lambda notebook: notebook.cells.pop()),
]


def test_a_good_notebook_keeps_all_rules(tmp_path: Path) -> None:
    page = page_in(tmp_path, lambda notebook: None)
    assert [complaint for rule in RULES for complaint in rule(page)] == []


@pytest.mark.parametrize(("rule", "spoil"), SPOILT, ids=name)
def test_a_rule_finds_what_breaks_it(
    tmp_path: Path, rule: Callable[[Page], list[str]], spoil: Callable[[NotebookNode], object]
) -> None:
    assert rule(page_in(tmp_path, spoil))


def test_what_an_editor_leaves_behind_is_found(tmp_path: Path) -> None:
    page = page_in(tmp_path, lambda notebook: None)
    notebook = page.notebook
    notebook.metadata["widgets"] = {"state": {}}
    assert is_as_the_build_writes_it(Page(page.path, nbformat.writes(notebook).encode()))


def test_every_rule_is_tested() -> None:
    assert {rule for rule, _ in SPOILT} | {is_as_the_build_writes_it} == set(RULES)


def test_code_and_links_in_code_are_not_prose() -> None:
    assert _without_code("a\n```python\n# title\nb\n```\n`[x](y)` c").split() == ["a", "code", "c"]
