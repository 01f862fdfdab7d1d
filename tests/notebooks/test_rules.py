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

from kvlab.course.exercises import BY_CONSTANT, Exercise
from tests.harness.builder import ROOT, script

FOLDER = ROOT / "notebooks"
ALLOWED: Mapping[str, Any] = tomllib.loads((Path(__file__).parent / "allowed_tags.toml").read_text(encoding="utf-8"))

MAX_LINES, MEDIAN_LINES = 25, 8
MAX_BYTES = 1_500_000
WORDS_PER_LINE = 5
MAX_WIDTH = 88  # characters that JupyterLab shows at 1280 pixels
VISIBLE_CELLS = range(25, 41)
MAX_DRAWING = 0.10
CELLS_BETWEEN_LOOKS = 8


SOURCE = f"https://github.com/{script.REPOSITORY}/blob/main/"
"""What links to files of this repository begin with: a notebook is also read in work/, in Colab and on web pages."""


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
    def visible_code(self) -> list[NotebookNode]:
        """The code cells that a reader sees without unfolding them."""
        return [cell for cell in self.notebook.cells if script.is_visible_code(cell)]

    @property
    def optional(self) -> bool:
        """Whether it is a second notebook of its lesson."""
        lesson = script.load_course(self.path.parent).lesson(self.path)
        return lesson is not None and lesson.optional

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


def has_narrow_cells(page: Page) -> list[str]:
    """No line of code is cut off at the right of the page."""
    return [
        f"cell {cell.id}: a line has {len(line)} characters, more than {MAX_WIDTH}: {line.strip()[:60]} …"
        for cell in page.lesson_code
        for line in cell.source.splitlines()
        if len(line) > MAX_WIDTH
    ]


def has_a_readable_number_of_cells(page: Page) -> list[str]:
    """A lesson is neither a page of text nor a book. What its goal does not need goes into an optional notebook."""
    count, least = len(page.visible_code), 0 if page.optional else min(VISIBLE_CELLS)
    if least <= count <= max(VISIBLE_CELLS):
        return []
    return [f"{count} code cells are visible, expected {least} to {max(VISIBLE_CELLS)}"]


def draws_little(page: Page) -> list[str]:
    """What a reader sees is the lesson: drawing is in kvlab/course/ or folded (source_hidden)."""
    share = drawing_share(page)
    return [f"{share:.0%} of the visible lines draw, more than {MAX_DRAWING:.0%}"] if share > MAX_DRAWING else []


def drawing_share(page: Page) -> float:
    """Visible lines of code that make or change a plot, by all visible lines."""
    lines = [line for cell in page.visible_code for line in cell.source.splitlines() if line.strip()]
    drawing = [line for line in lines if re.search(r"\b(ax|axes|fig|plt)(\[[^]]*\])?\.|\bplots\.\w+\(|\bax\b", line)]
    return len(drawing) / max(len(lines), 1)


def has_enough_exercises(page: Page) -> list[str]:
    """At least three exercises, at least half of them with something to find out; headers say what a check knows."""
    found = script.exercises_in(page.notebook)
    text = "\n".join(cell.source for cell in page.prose)
    complaints = [
        f"no heading says: {expected}"
        for e in found
        if not re.search(re.escape(expected := _exercise_heading(e)).replace("TITLE", "[^(]+"), text)
    ]
    if page.optional:
        return complaints
    hard = sum(exercise.difficulty >= 3 for exercise in found)
    few = [f"{len(found)} exercises, fewer than 3"] if len(found) < 3 else []
    easy = [f"{hard} of {len(found)} exercises have difficulty 3 or more"] if 2 * hard < len(found) else []
    return [*complaints, *few, *easy]


def _exercise_heading(exercise: Exercise) -> str:
    facts = f"difficulty {exercise.difficulty} of 5, about {exercise.minutes} minutes"
    return f"### Exercise {exercise.number}: TITLE ({facts})"


def has_its_solutions_at_the_end(page: Page) -> list[str]:
    """Nobody sees a solution beside the check: all are folded, in one section before the recap."""
    sources = [cell.source for cell in page.prose]
    begin = next((i for i, source in enumerate(sources) if re.search("^## Solutions$", source, re.MULTILINE)), None)
    early = [source for source in sources[:begin] if "<details><summary>Solution" in source]
    return ["a solution is not in the section Solutions near the end"] if early else []


def asks_for_a_guess(page: Page) -> list[str]:
    """The reader guesses before the main measurement, and is told afterwards what came out."""
    code = "\n".join(cell.source for cell in page.lesson_code)
    missing = [call for call in ("Guesses(", "came_out(") if call not in code]
    return [] if page.optional else [f"no cell calls {call}…)" for call in missing]


def has_a_fast_track(page: Page) -> list[str]:
    """The header says what to read with 20 minutes."""
    lesson = script.load_course(page.path.parent).lesson(page.path)
    if lesson is None or lesson.optional or lesson.fast:
        return []
    return ["course.toml has no `fast` for it"]


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
    cells = [cell.id for cell in page.prose if re.search(r"^# ", script.outside_code(cell.source), re.MULTILINE)]
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
            for groups in re.findall(pattern, script.outside_code(cell.source)):
                target = "".join(groups).partition("#")[0]
                local = target and not re.match(r"[a-z]+:", target)
                if local and not (page.path.parent / target).exists():
                    complaints.append(f"cell {cell.id}: link to {target} leads nowhere")
                elif local and ("/" in target or not target.endswith(".ipynb")) and not target.startswith("images/"):
                    complaints.append(f"cell {cell.id}: {target} is not in work/; begin the link with {SOURCE}")
                elif target.startswith(SOURCE) and not (ROOT / target.removeprefix(SOURCE)).exists():
                    complaints.append(f"cell {cell.id}: link to {target} leads nowhere in this repository")
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
    words = sum(len(script.outside_code(cell.source).split()) for cell in page.prose)
    lines = sum(bool(line.strip()) for cell in page.lesson_code for line in cell.source.splitlines())
    return words / max(lines, 1)


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
    has_narrow_cells,
    has_a_readable_number_of_cells,
    draws_little,
    has_enough_exercises,
    has_its_solutions_at_the_end,
    asks_for_a_guess,
    has_a_fast_track,
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
SOLVED = [constant for constant, exercise in BY_CONSTANT.items() if exercise.difficulty >= 3][:3]
EASY = next(constant for constant, exercise in BY_CONSTANT.items() if exercise.difficulty < 3)
EXERCISES = "\n\n".join(_exercise_heading(BY_CONSTANT[c]).replace("TITLE", "find it ") for c in SOLVED)
PROSE = f"""\
## About

{"word " * 200}

![a box](00_x.ipynb), [a link](00_x.ipynb#there), [a file]({SOURCE}README.md)

> **Takeaway.** So.

{EXERCISES}
"""
SOLUTIONS = "## Solutions\n\n<details><summary>Solution</summary></details>"
LESSON = """
[[lesson]]
file = "00_x"
title = "X"
goal = "Do."
able = ["do"]
needs = ["hands"]
fast = "all"
"""


def page_in(folder: Path, spoil: Callable[[NotebookNode], object]) -> Page:
    """A notebook that keeps all rules, unless `spoil` changes that."""
    plot = new_output("display_data", {"image/png": "AAAA", "text/plain": "<Figure size 1x1 with 1 Axes>"})
    caption = new_output("stream", name="stdout", text="Figure: a line.\n")
    still = new_output("display_data", {"image/png": "AAAA", "text/plain": "[interactive: run this cell] Text."})
    checks = [f"exercises.check(exercises.{constant}, f)" for constant in SOLVED]
    sources = [*checks, "3 + 1", 'Guesses("x")', 'came_out("x", 1)', *(f"{i} + 1" for i in range(6, 21))]
    plain = [new_code_cell(source, id=f"c{i}") for i, source in enumerate(sources)]
    looks = [new_code_cell("widget()", id=f"look{i}", outputs=[still]) for i in range(3)]
    cells = [
        new_markdown_cell(PROSE, id="prose"),
        new_code_cell("draw()", id="plot", outputs=[plot, caption]),
        *[cell for i in range(3) for cell in (*plain[7 * i : 7 * i + 7], looks[i])],
        new_markdown_cell(SOLUTIONS, id="solutions"),
    ]
    path = folder / "00_x.ipynb"
    nbformat.write(new_notebook(), path)
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


def more(notebook: NotebookNode, i: int) -> None:
    """Spoils by one more cell."""
    notebook.cells.insert(5, new_code_cell("1", id=f"more{i}"))


def easier(notebook: NotebookNode, i: int) -> None:
    """Spoils by replacing an exercise by an easy one."""
    cell_of(notebook, f"c{i}").source = f"exercises.check(exercises.{EASY}, f)"


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
    (has_narrow_cells, changed("c3", source=f"x = '{'-' * 83}'")),
    (has_a_readable_number_of_cells, lambda notebook: notebook.cells.pop(3)),
    (has_a_readable_number_of_cells, lambda notebook: [more(notebook, i) for i in range(16)]),
    (has_a_readable_number_of_cells, changed("c3", metadata=NotebookNode(jupyter={"source_hidden": True}))),
    (draws_little, changed("c3", source="fig, ax = plt.subplots()\nax.plot(x)\nplots.show(fig)")),
    (has_enough_exercises, changed("c0", source="1")),
    (has_enough_exercises, changed("prose", source=PROSE.replace("difficulty", "about difficulty"))),
    (has_enough_exercises, lambda notebook: [easier(notebook, i) for i in range(2)]),
    (has_its_solutions_at_the_end, prose("<details><summary>Solution</summary></details>")),
    (asks_for_a_guess, changed("c4", source="1")),
    (asks_for_a_guess, changed("c5", source="1")),
    (has_alternative_texts, prose("![](00_x.ipynb)")),
    (has_alternative_texts, prose('<img src="course.toml">')),
    (has_alternative_texts, changed("c3", outputs=[HTML])),
    (has_a_caption_under_each_plot, changed("plot", outputs=[PLOT])),
    (has_a_caption_under_each_plot, changed("plot", outputs=[PLOT, TEXT])),
    (has_something_to_look_at, lambda notebook: [more(notebook, i) for i in range(2)]),
    (has_something_to_look_at, lambda notebook: [c.update(outputs=[]) for c in script.code_cells(notebook)]),
    (has_a_takeaway, changed("prose", source=PROSE.replace("Takeaway", "Note"))),
    (has_one_title, prose("# Another title")),
    (is_small, changed("c3", outputs=[new_output("stream", name="stdout", text="x" * 1_500_000)])),
    (has_links_that_resolve, prose("[next](01_gone.ipynb#part)")),
    (has_links_that_resolve, prose('<a href="../docs/gone.md">docs</a>')),
    (has_links_that_resolve, prose("[docs](../README.md)")),
    (has_links_that_resolve, prose("[map](course.toml)")),
    (has_links_that_resolve, prose(f"[docs]({SOURCE}docs/gone.md)")),
    (names_no_machine, changed("c3", outputs=[PATH])),
    (names_no_machine, changed("c3", source=f"open('{ROOT}/x')")),
    (has_prose_around_its_code, changed("c3", source="x = 1\n" * 60)),
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


def test_a_notebook_without_a_fast_track_is_found(tmp_path: Path) -> None:
    page = page_in(tmp_path, lambda notebook: None)
    (tmp_path / "course.toml").write_text(LESSON.replace('fast = "all"', ""))
    assert has_a_fast_track(page)


def test_an_optional_notebook_may_be_short_and_without_exercises(tmp_path: Path) -> None:
    page = page_in(tmp_path, lambda notebook: [notebook.cells.pop(5) for _ in range(10)])
    rules = (has_a_readable_number_of_cells, asks_for_a_guess, has_a_fast_track)
    assert all(rule(page) for rule in rules[:2])
    (tmp_path / "course.toml").write_text(LESSON + "optional = true\n")
    assert not [complaint for rule in rules for complaint in rule(page)]


def test_what_an_editor_leaves_behind_is_found(tmp_path: Path) -> None:
    page = page_in(tmp_path, lambda notebook: None)
    notebook = page.notebook
    notebook.metadata["widgets"] = {"state": {}}
    assert is_as_the_build_writes_it(Page(page.path, nbformat.writes(notebook).encode()))


def test_every_rule_is_tested() -> None:
    assert {rule for rule, _ in SPOILT} | {is_as_the_build_writes_it, has_a_fast_track} == set(RULES)


def test_code_and_links_in_code_are_not_prose() -> None:
    assert script.outside_code("a\n```python\n# title\nb\n```\n`[x](y)` c").split() == ["a", "code", "c"]
