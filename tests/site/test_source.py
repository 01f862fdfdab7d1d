"""The source folder of the site: what becomes of README and of a notebook before Sphinx reads them."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from scripts import site_source
from scripts.repository import BLOB
from scripts.site_source import PNG, SiteError, assemble, for_the_site, readable

README = """\
# name

What it is.

## Start

```
## not a heading
```

## The course

| table |

## Find your way

Last words.
"""
COURSE = """\
[[lesson]]
file = "00_one"
title = "One"
goal = "A goal."
able = []
needs = []

[[lesson]]
file = "01_planned"
title = "Planned"
goal = "A goal."
able = []
needs = []
"""


def notebook(*outputs: NotebookNode, source: str = "1", **metadata: object) -> NotebookNode:
    """A notebook with a title and one code cell."""
    cell = new_code_cell(source, outputs=list(outputs), metadata=metadata, execution_count=1)
    return new_notebook(cells=[new_markdown_cell("# 00 · One"), cell])


def picture(plain: str, **metadata: object) -> NotebookNode:
    return new_output("display_data", {PNG: "AAAA", "text/plain": plain}, metadata=metadata)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with what the site is made of."""
    files = {
        "README.md": README,
        "CHANGELOG.md": "# Changes\n",
        "CONTRIBUTING.md": "# Contributing\n",
        "docs/traces.md": "# Traces\n\nHow to trace. More.\n",
        "docs/01_why.md": "# Why\n\nFor whom, e.g. for [all](traces.md)? More.\n\n![three boxes](boxes.png)\n",
        "docs/boxes.png": "",
        "notebooks/course.toml": COURSE,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    nbformat.write(notebook(), tmp_path / "notebooks" / "00_one.ipynb")
    return tmp_path


# --- README -------------------------------------------------------------------------------------
def test_the_pages_are_in_the_order_of_reading(root: Path, tmp_path: Path) -> None:
    names = assemble(root, tmp_path / "source")
    course, documents = ["notebooks/00_one.ipynb"], ["docs/01_why.md", "docs/traces.md"]
    assert names == ["index.md", "README.md", *course, *documents, "CHANGELOG.md", "CONTRIBUTING.md"]
    assert all((tmp_path / "source" / name).is_file() for name in [*names, "docs/boxes.png"])


def test_a_planned_lesson_is_a_page_as_soon_as_its_notebook_is_there(root: Path, tmp_path: Path) -> None:
    assert "01_planned" not in " ".join(assemble(root, tmp_path / "before"))
    nbformat.write(notebook(), root / "notebooks" / "01_planned.ipynb")
    assert "notebooks/01_planned.ipynb" in assemble(root, tmp_path / "after")
    assert "notebooks/01_planned\n" in (tmp_path / "after" / "index.md").read_text()


def test_each_section_of_readme_is_on_one_of_two_pages(root: Path, tmp_path: Path) -> None:
    assemble(root, tmp_path / "source")
    landing, guide = ((tmp_path / "source" / name).read_text() for name in ("index.md", "README.md"))
    assert landing.startswith("# name\n\nWhat it is.\n") and "| table |" in landing
    assert guide.startswith("# Install and use\n\n## Start\n") and "Last words." in guide
    assert "```\n## not a heading\n```" in guide, "the code of a block is cut up"
    assert not [text for text in ("Last words", "## Start") if text in landing] and "| table |" not in guide


def test_the_landing_page_says_what_each_document_is_for(root: Path, tmp_path: Path) -> None:
    assemble(root, tmp_path / "source")
    landing = (tmp_path / "source" / "index.md").read_text()
    assert "| [Traces](docs/traces.md) | How to trace. |" in landing
    assert "| [Why](docs/01_why.md) | For whom, e.g. for [all](docs/traces.md)? |" in landing


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [("README.md", "# name\n\n## Start\n", "The course"), ("docs/traces.md", "No title.\n", "docs/traces.md")],
)
def test_what_is_not_there_is_named(root: Path, tmp_path: Path, name: str, text: str, says: str) -> None:
    (root / name).write_text(text)
    with pytest.raises(SiteError, match=says):
        assemble(root, tmp_path / "source")


# --- notebooks ----------------------------------------------------------------------------------
def test_a_notebook_is_not_changed() -> None:
    own = notebook(picture("Figure: a -> b"), jupyter={"source_hidden": True})
    before = nbformat.writes(own)
    for_the_site(own, "notebooks/00_one.ipynb")
    assert nbformat.writes(own) == before


@pytest.mark.parametrize("metadata", [{"jupyter": {"source_hidden": True}}, {"tags": ["colab-setup"]}])
def test_folded_cells_stay_folded(metadata: dict[str, object]) -> None:
    (_, cell) = for_the_site(notebook(**metadata), "x").cells
    assert "hide-input" in cell.metadata["tags"]


def test_other_cells_are_not_folded() -> None:
    (_, cell) = for_the_site(notebook(tags=["nbval-ignore-output"]), "x").cells
    assert "hide-input" not in cell.metadata["tags"]


def test_the_badge_becomes_links_to_colab_and_to_the_source() -> None:
    own = notebook()
    own.cells[0].source = "[![Open in Colab](https://host/badge.svg)](https://colab/x.ipynb) In Colab, the neighbours"
    link = f"[Open in Colab](https://colab/x.ipynb) | [This notebook on GitHub]({BLOB}notebooks/x.ipynb)"
    assert for_the_site(own, "notebooks/x.ipynb").cells[0].source == link


def test_the_last_cell_goes() -> None:
    own = notebook()
    own.cells.append(new_markdown_cell("Next", metadata={"tags": ["footer"]}))
    assert len(for_the_site(own, "x").cells) == 2


def test_a_flow_chart_has_its_steps_as_alternative_text() -> None:
    (shown,) = readable(picture("Figure: a -> b"))
    assert shown.metadata[PNG]["alt"] == "a -> b"


def test_a_plot_keeps_its_alternative_text() -> None:
    own = picture("<Figure size 720x320>", **{PNG: {"alt": "it rises from 1 to 2"}})
    assert list(readable(own)) == [own]


def test_a_widget_is_a_still_with_a_sentence() -> None:
    still, sentence = readable(picture("[interactive: run this cell to use it] Two nodes, *a_b* <b>"))
    assert still.data == {PNG: "AAAA"} and still.metadata[PNG]["alt"] == "Two nodes, *a_b* <b>"
    shown = r"**Interactive in JupyterLab.** Two nodes\, \*a\_b\* \<b\>"
    assert sentence.data["text/markdown"] == shown


def test_a_widget_without_a_picture_is_its_sentence() -> None:
    plain = {"text/plain": "[interactive: run this cell to use it] Guess:\n1. How many?"}
    (sentence,) = readable(new_output("execute_result", plain, execution_count=1))
    assert sentence.data["text/markdown"] == "**Interactive in JupyterLab.** Guess\\:  \n1\\. How many\\?"


def test_captions_are_sentences_and_the_rest_is_printed() -> None:
    printed = "one\ntwo\nFigure: it rises to 2_000\nthree\n"
    before, caption, after = readable(new_output("stream", name="stdout", text=printed))
    assert (before.text, after.text) == ("one\ntwo\n", "three\n")
    assert caption.data["text/markdown"] == r"*Figure:* it rises to 2\_000"


def test_alternative_texts_are_found_by_the_bytes_of_their_pictures() -> None:
    own = for_the_site(notebook(picture("Figure: a -> b"), picture("no text")), "x")
    assert list(site_source.alternative_texts(own)) == [("AAAA", "a -> b")]


def test_links_between_the_two_parts_of_readme_lead_from_page_to_page() -> None:
    readme = README.replace("Last words.", "[a](#the-course) [b](#start)").replace("| table |", "[c](#find-your-way)")
    assert "[a](index.md#the-course) [b](#start)" in site_source.guide(readme)
    assert "[c](README.md#find-your-way)" in site_source.landing(readme, {}, [])
