"""The source folder of the website: copies of README, documents and notebooks, made ready for Sphinx.

The folder has the layout of the repository, so that a link from one page to another is the same in both. What differs:
README is split into a landing page and a guide; notebooks get the tags, alternative texts and captions that myst-nb
does not find by itself. Nothing here needs Sphinx, and nothing is executed.
"""

# nbformat declares itself typed, but many of its functions are not.
# mypy: allow-untyped-calls
from __future__ import annotations

import copy
import posixpath
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_output

from scripts.build_notebooks import load_course, tags
from scripts.repository import BLOB

LANDING: Final = "index.md"
GUIDE: Final = "README.md"
GUIDE_TITLE: Final = "Install and use"
COURSE: Final = "The course"  # README's section that is on the landing page; the others are in the guide
LAST: Final = ("CHANGELOG.md", "CONTRIBUTING.md")
INTERACTIVE: Final = "[interactive: run this cell to use it] "
FIGURE: Final = "Figure: "
PNG: Final = "image/png"
BADGE: Final = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\(([^)]*)\).*")


class SiteError(Exception):
    """The site cannot be built; the message contains the file and the reason."""


# --- The folder ---------------------------------------------------------------------------------
def assemble(root: Path, target: Path) -> list[str]:
    """Write the source folder `target` of the repository `root`; return the names of its pages, in their order.

    Raises:
        SiteError: README has no section about the course, or a document has no title.
    """
    documents = documents_of(root)
    notebooks = notebooks_of(root)
    readme = _read(root / GUIDE)
    pages = {GUIDE: guide(readme), **{name: _read(root / name) for name in (*documents, *LAST)}}
    pages[LANDING] = landing(readme, {name: pages[name] for name in documents}, notebooks)
    for name, text in pages.items():
        _write(target / name, text)
    for name in notebooks:
        notebook = for_the_site(nbformat.read(root / name, as_version=4), name)
        _write(target / name, nbformat.writes(notebook))
    for name in sorted({name for text in pages.values() for name in _pictures(text)}):
        _copy_picture(root, target, name)
    return [LANDING, GUIDE, *notebooks, *documents, *LAST]


def documents_of(root: Path) -> list[str]:
    """The documents: those with a number first, then the others."""
    names = [path.relative_to(root).as_posix() for path in (root / "docs").glob("*.md")]
    return sorted(names, key=lambda name: (not Path(name).name[0].isdigit(), name))


def notebooks_of(root: Path) -> list[str]:
    """The notebooks in the order of the course map; planned lessons have none."""
    course = load_course(root / "notebooks")
    names = [f"notebooks/{lesson.file}.ipynb" for lesson in course.lessons]
    return [name for name in names if (root / name).exists()]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _pictures(markdown: str) -> Iterator[str]:
    """The files of a page's pictures, without those of the web."""
    return (name for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", markdown) if "://" not in name)


def _copy_picture(root: Path, target: Path, name: str) -> None:
    """Copy a picture that pages name by its place from the root, or from docs/."""
    for place in (name, f"docs/{name}"):
        if (root / place).is_file():
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / place, target / place)


# --- README -------------------------------------------------------------------------------------
def landing(readme: str, documents: Mapping[str, str], notebooks: Sequence[str]) -> str:
    """The landing page: how README begins, its course table, the documents, and the site's navigation.

    Args:
        documents: text by name.
    """
    opening, sections = split(readme)
    if COURSE not in sections:
        raise SiteError(f"{GUIDE}: expected a section {COURSE!r}, got {', '.join(sections)}")
    rows = [f"| [{title(name, text)}]({name}) | {first_sentence(name, text)} |" for name, text in documents.items()]
    table = "\n".join(["| document | what it says |", "|---|---|", *rows])
    trees = [
        _toctree("Begin", [GUIDE]),
        _toctree("Course", notebooks),
        _toctree("Documents", documents),
        _toctree("Project", LAST),
    ]
    course = to_the_other_part(sections[COURSE], readme, GUIDE)
    parts = [opening, f"How to start: [{GUIDE_TITLE}]({GUIDE}).", course, f"## Documents\n\n{table}", *trees]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def guide(readme: str) -> str:
    """The rest of README: what is not on the landing page."""
    sections = [text for name, text in split(readme)[1].items() if name != COURSE]
    text = "\n\n".join([f"# {GUIDE_TITLE}", *(text.strip() for text in sections)]) + "\n"
    return to_the_other_part(text, readme, LANDING)


def to_the_other_part(part: str, readme: str, page: str) -> str:
    """A part of README whose links to headings of the other part lead to the page of that one."""
    elsewhere = anchors(readme) - anchors(part)
    return re.sub(r"\]\(#([^)]+)\)", lambda link: f"]({page}{link[0][2:]}" if link[1] in elsewhere else link[0], part)


def anchors(markdown: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def split(markdown: str) -> tuple[str, dict[str, str]]:
    """What comes before the first heading of level 2, and the text of each of its sections, heading included."""
    starts = [match.start() for match in re.finditer(r"^## ", without_code(markdown), re.MULTILINE)]
    parts = [markdown[a:b] for a, b in zip(starts, [*starts[1:], len(markdown)], strict=True)]
    return markdown[: starts[0] if starts else None], {part.partition("\n")[0][3:].strip(): part for part in parts}


def without_code(markdown: str) -> str:
    """Markdown with its blocks of code blank, and everything else where it was."""
    blank = lambda match: re.sub(r"[^\n]", " ", match[0])  # noqa: E731
    return re.sub(r"^ *(```+).*?^ *\1 *$", blank, markdown, flags=re.MULTILINE | re.DOTALL)


def title(name: str, markdown: str) -> str:
    """The text of a page's first heading."""
    found = re.match(r"# (.+)", markdown)
    if not found:
        raise SiteError(f"{name}: expected a title in its first line")
    return found[1].strip()


def first_sentence(name: str, markdown: str) -> str:
    """The first sentence after the title, which says what a document is for; its links from the root."""
    paragraph = markdown.partition("\n")[2].strip().partition("\n")[0]
    sentence = re.split(r"(?<=[.!?]) (?=[A-Z\[*`])", paragraph)[0]
    folder = posixpath.dirname(name)
    return re.sub(r"\]\((?![a-z]+:|#)([^)]+)\)", lambda link: f"]({posixpath.join(folder, link[1])})", sentence)


def _toctree(caption: str, names: Iterable[str]) -> str:
    entries = "\n".join(name.rpartition(".")[0] for name in names)
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```"


# --- Notebooks ----------------------------------------------------------------------------------
def for_the_site(notebook: NotebookNode, name: str) -> NotebookNode:
    """A copy of a notebook for myst-nb: links to its source, folded cells, texts beside its pictures.

    The last cell goes, because each page of the site has links to its neighbours.
    """
    result: NotebookNode = copy.deepcopy(notebook)
    result.cells = [cell for cell in result.cells if "footer" not in tags(cell)]
    for cell in result.cells:
        if cell.cell_type == "markdown":
            cell.source = BADGE.sub(rf"[Open in Colab](\1) | [This notebook on GitHub]({BLOB}{name})", cell.source)
        elif cell.cell_type == "code":
            _fold(cell)
            cell.outputs = [part for output in cell.outputs for part in readable(output)]
    return result


def _fold(cell: NotebookNode) -> None:
    """Tag a cell whose code is folded in JupyterLab, or matters only in Colab, for myst-nb."""
    if cell.metadata.get("jupyter", {}).get("source_hidden") or "colab-setup" in tags(cell):
        cell.metadata["tags"] = [*tags(cell), "hide-input"]


def readable(output: NotebookNode) -> Iterator[NotebookNode]:
    """An output as the site shows it: a picture with its alternative text, a caption as a sentence below it."""
    if output.output_type == "stream":
        yield from _captions(output)
        return
    data, plain = output.get("data", {}), str(output.get("data", {}).get("text/plain", ""))
    if plain.startswith(INTERACTIVE):
        sentence = plain.removeprefix(INTERACTIVE)
        if PNG in data:
            yield _picture(output, sentence)
        yield _paragraph(f"**Interactive in JupyterLab.** {_escaped(sentence)}")
    elif PNG in data and plain.startswith(FIGURE):
        yield _picture(output, plain.removeprefix(FIGURE))
    else:
        yield output


def _captions(stream: NotebookNode) -> Iterator[NotebookNode]:
    """A stream in parts: its captions as paragraphs, and the lines between them as they are."""
    lines: list[str] = []
    for line in stream.text.splitlines(keepends=True):
        if not line.startswith(FIGURE):
            lines.append(line)
            continue
        yield from _stream(stream, lines)
        lines = []
        yield _paragraph(f"*Figure:* {_escaped(line.removeprefix(FIGURE))}")
    yield from _stream(stream, lines)


def _stream(like: NotebookNode, lines: Sequence[str]) -> Iterator[NotebookNode]:
    if "".join(lines).strip():
        yield new_output("stream", name=like.name, text="".join(lines))


def _picture(output: NotebookNode, text: str) -> NotebookNode:
    """A picture with an alternative text, if it has none."""
    own = output.get("metadata", {}).get(PNG, {})
    return _display({PNG: output.data[PNG]}, {PNG: {"alt": _one_line(text), **own}})


def _paragraph(markdown: str) -> NotebookNode:
    return _display({"text/markdown": markdown, "text/plain": markdown}, {})


def _display(data: Mapping[str, str], metadata: Mapping[str, Any]) -> NotebookNode:
    output: NotebookNode = new_output("display_data", data, metadata=metadata)
    return output


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _escaped(text: str) -> str:
    """Plain text as Markdown, with its line breaks. CommonMark: a backslash works before all ASCII punctuation."""
    lines = (re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", line.strip()) for line in text.strip().splitlines())
    return "  \n".join(lines)


def alternative_texts(notebook: NotebookNode) -> Iterator[tuple[str, str]]:
    """Each picture of a notebook's outputs that has an alternative text: its data in base64, and the text."""
    outputs: Iterator[Mapping[str, Any]] = (out for cell in notebook.cells for out in cell.get("outputs", []))
    for output in outputs:
        text = output.get("metadata", {}).get(PNG, {}).get("alt")
        if text and PNG in output.get("data", {}):
            yield output["data"][PNG], text
