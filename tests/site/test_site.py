"""The website as it is built: no warning, no dead link, nothing from elsewhere, and usable in a browser."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from scripts.build_site import build
from scripts.repository import BLOB, NAME, ROOT, URL
from scripts.site_source import SiteError, documents_of, notebooks_of
from tests.browser import shots
from tests.site import checks

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow

NOTEBOOKS = notebooks_of(ROOT)
PHONE, DESK = 390, 1440
WIDE = """() => Math.max(  // the theme hides what the page has too much, and lets its column scroll instead
    document.documentElement.scrollWidth - window.innerWidth,
    ...[...document.querySelectorAll('.content')].map(column => column.scrollWidth - column.clientWidth),
)"""
ON_TOP = """() => {
    const box = document.activeElement.getBoundingClientRect();
    return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2) === document.activeElement;
}"""
FOCUSED = "() => document.activeElement.getAttribute('href')"


def html_of(name: str) -> str:
    """The page of a source file."""
    return f"{name.rpartition('.')[0]}.html"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once for all tests; a warning is an error."""
    out = tmp_path_factory.mktemp("site") / "html"
    build(out)
    return out


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[str, checks.Page]:
    """The pages of the site by name."""
    return checks.read(site)


# --- what there is ------------------------------------------------------------------------------
def test_every_document_and_notebook_is_a_page_and_in_the_navigation(pages: Mapping[str, checks.Page]) -> None:
    assert len(NOTEBOOKS) == len(list((ROOT / "notebooks").glob("*.ipynb"))), "a notebook is not in course.toml"
    names = [*NOTEBOOKS, *documents_of(ROOT), "README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
    assert {html_of(name) for name in names} | {"index.html", "search.html"} == set(pages)
    assert {html_of(name) for name in names} <= set(pages["index.html"].links)


def test_every_link_within_the_site_leads_somewhere(site: Path, pages: Mapping[str, checks.Page]) -> None:
    links = list(checks.internal_links(pages))
    assert len(links) > 1000
    assert checks.broken_links(site, pages) == []


def test_links_between_documents_stay_in_the_site(pages: Mapping[str, checks.Page]) -> None:
    """Only a link to a page's own source leads to GitHub."""
    names = {html_of(name): name for name in [*NOTEBOOKS, *documents_of(ROOT), "README.md"]}
    own = {"index.html": "README.md", **names}
    away = [
        (page, link)
        for page in pages
        for link in pages[page].links
        if link.removeprefix(BLOB).partition("#")[0] in names.values() and link != BLOB + own.get(page, "")
    ]
    assert away == []
    assert "../README.html#plug-it-in" in pages["notebooks/09_real_engines.html"].links
    assert "../docs/03_redis_vs_alternatives.html#the-allocator" in pages["notebooks/11b_alternatives.html"].links
    assert "../notebooks/11_gpu_benchmarks.html" in pages["docs/04_production_deployment.html"].links


def test_links_into_the_repository_lead_to_files_of_it(pages: Mapping[str, checks.Page]) -> None:
    paths = {link.partition("#")[0] for link in checks.links_to_repository(pages, URL)}
    assert "docs/results/bench_ttft.json" in paths and "kvlab/core/keys.py" in paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_links_to_others_have_the_form_of_links(pages: Mapping[str, checks.Page]) -> None:
    assert checks.malformed(pages) == []


def test_every_picture_says_what_it_shows(pages: Mapping[str, checks.Page]) -> None:
    assert sum(len(page.pictures) for page in pages.values()) > 100
    assert checks.pictures_without_text(pages) == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_picture_of_a_notebook_is_shown(pages: Mapping[str, checks.Page], name: str) -> None:
    outputs = [out for cell in nbformat.read(ROOT / name, as_version=4).cells for out in cell.get("outputs", [])]
    assert len(pages[html_of(name)].pictures) == sum("image/png" in out.get("data", {}) for out in outputs)


def test_nothing_comes_from_another_host(site: Path, pages: Mapping[str, checks.Page]) -> None:
    assert checks.foreign_parts(site, pages) == []
    assert checks.missing_parts(site, pages) == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_leads_to_its_source_and_to_colab(pages: Mapping[str, checks.Page], name: str) -> None:
    colab = f"https://colab.research.google.com/github/{NAME}/blob/main/{name}"
    assert {BLOB + name, colab} <= set(pages[html_of(name)].links)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_folded_stays_folded(pages: Mapping[str, checks.Page], name: str) -> None:
    cells = nbformat.read(ROOT / name, as_version=4).cells
    folded = sum(bool(cell.metadata.get("jupyter", {}).get("source_hidden")) for cell in cells)
    solutions = sum(cell.source.count("<details>") for cell in cells if cell.cell_type == "markdown")
    html = pages[html_of(name)].html
    assert html.count('<details class="admonition hide above-input">') == folded + 1  # and the set-up on Colab
    assert html.count("<details>") == html.count("<summary>") == solutions > 0
    assert not re.search(r"<details[^>]* open", html)


def test_widgets_are_stills(pages: Mapping[str, checks.Page]) -> None:
    every = "".join(page.html for page in pages.values())
    assert every.count("<strong>Interactive in JupyterLab.</strong>") > 20
    for raw in ("[interactive", "VBox(", "jupyter.widget", "Traceback (most recent call last)"):
        assert raw not in every, raw


def test_the_site_names_no_machine(site: Path) -> None:
    texts = {path: path.read_bytes() for path in site.rglob("*") if path.suffix in {".html", ".js", ".css", ".inv"}}
    for place in (str(ROOT), str(site.parent), sys.prefix, f"{Path.home()}/"):
        assert [str(path) for path, text in texts.items() if place.encode() in text] == [], place


def test_search_knows_words_of_documents_and_of_notebooks(site: Path) -> None:
    index = json.loads((site / "searchindex.js").read_text("utf-8").removeprefix("Search.setIndex(").rstrip(")"))

    def found(stem: str) -> set[str]:
        places = [index[kind].get(stem, []) for kind in ("terms", "titleterms")]
        return {index["docnames"][i] for where in places for i in ([where] if isinstance(where, int) else where)}

    assert "docs/04_production_deployment" in found("sentinel")
    assert "notebooks/05_redis_tier" in found("fakeredi")
    assert "notebooks/07_sharding" in found("rendezv")
    assert "notebooks/00_start_here" not in found("rendezv") | found("sentinel")
    assert "README" in found("conda")


# --- faults that must be found ------------------------------------------------------------------
FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "a page": (lambda cells: cells.append(new_markdown_cell("[x](01_gone.ipynb)")), "01_gone.ipynb, which is not in"),
    "an anchor": (lambda cells: cells.append(new_markdown_cell(f"[x]({BLOB}README.md#gone)")), "'gone'"),
    "a file": (lambda cells: cells.append(new_markdown_cell(f"[x]({BLOB}kvlab/gone.py)")), "kvlab/gone.py, which is"),
    "a text": (lambda cells: cells[1].outputs[0].metadata.clear(), "a picture without an alternative text"),
    "a level": (lambda cells: cells.append(new_markdown_cell("#### Too deep")), "Non-consecutive header level"),
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A repository with one notebook, which has a picture and links to README and to a file."""
    root = tmp_path / "repository"
    (root / "notebooks").mkdir(parents=True)
    (root / "docs").mkdir()
    (root / "docs" / "traces.md").write_text("# Traces\n\nHow.\n")
    (root / "README.md").write_text("# name\n\n## Start here, & now\n\n## The course\n")
    (root / "CHANGELOG.md").write_text("# Changes\n")
    (root / "CONTRIBUTING.md").write_text("# Contributing\n")
    entry = 'file = "00_one"\ntitle = "One"\ngoal = "A goal."\nable = []\nneeds = []\n'
    (root / "notebooks" / "course.toml").write_text(f"[[lesson]]\n{entry}")
    with_text = {"image/png": {"alt": "it rises"}}
    shown = new_output("display_data", {"image/png": "iVBORw0KGgo="}, metadata=with_text)
    text = f"# One\n\n[a]({BLOB}README.md#start-here--now), [b](../docs/traces.md), [c]({BLOB}docs/traces.md#traces)\n"
    cells = [new_markdown_cell(text), new_code_cell("1", outputs=[shown], execution_count=1)]
    nbformat.write(
        new_notebook(cells=cells, metadata={"language_info": {"name": "python"}}), root / "notebooks" / "00_one.ipynb"
    )
    return root


def test_a_small_repository_is_built(small: Path, tmp_path: Path) -> None:
    build(tmp_path / "out", root=small)
    (page,) = (page for name, page in checks.read(tmp_path / "out").items() if "00_one" in name)
    assert {"../README.html#start-here-now", "../docs/traces.html", "../docs/traces.html#traces"} <= set(page.links)
    assert [alt for _, alt in page.pictures] == ["it rises"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "repository"], "the build leaves something"


def test_faults_are_named_and_the_old_site_stays(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.html").write_text("old")
    path = small / "notebooks" / "00_one.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for spoil, _ in FAULTS.values():
        spoil(notebook.cells)
    nbformat.write(notebook, path)
    with pytest.raises(SiteError) as caught:
        build(tmp_path / "out", root=small)
    for says in (says for _, says in FAULTS.values()):
        assert says in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert (tmp_path / "out" / "index.html").read_text() == "old"


# --- in a browser -------------------------------------------------------------------------------
class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a log."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served, on this machine only."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@contextlib.contextmanager
def browser(width: int) -> Iterator[tuple[Page, list[str]]]:
    """A page of a browser, and a list of what is asked of other hosts."""
    asked: list[str] = []
    with shots.browser_page(width) as page:
        page.on("request", lambda request: asked.append(request.url) if "//127.0.0.1" not in request.url else None)
        yield page, asked


@pytest.mark.browser
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_no_page_is_wider_than_the_screen(address: str, pages: Mapping[str, checks.Page], width: int) -> None:
    with browser(width) as (page, asked):
        too_wide = {}
        for name in pages:
            page.goto(address + name, wait_until="load")
            if over := page.evaluate(WIDE):
                too_wide[name] = over
        page.evaluate("document.querySelector('article').innerHTML += '<div style=\"width: 3000px\">wide</div>'")
        assert page.evaluate(WIDE) > 0, "the measurement cannot fail"
    assert too_wide == {}
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == []


@pytest.mark.browser
def test_search_finds_a_word_of_a_notebook(address: str) -> None:
    with browser(DESK) as (page, _):
        page.goto(address)
        page.get_by_placeholder("Search").first.fill("rendezvous")
        page.keyboard.press("Enter")
        page.wait_for_selector("ul.search li a")
        links = page.locator("ul.search li a").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    assert any(link.startswith("notebooks/07_sharding.html") for link in links)
    assert not any(link.startswith("notebooks/00_start_here.html") for link in links)


@pytest.mark.browser
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_keyboard_reaches_content_and_navigation(address: str, width: int) -> None:
    with browser(width) as (page, _):
        page.goto(address)
        page.keyboard.press("Tab")
        assert page.evaluate(FOCUSED) == "#furo-main-content", "the first stop skips the navigation"
        focused = set()
        while html_of(NOTEBOOKS[-1]) not in focused and len(focused) < 60:
            page.keyboard.press("Tab")
            focused.add(page.evaluate(FOCUSED))
        link = page.locator(".sidebar-tree a:focus")
        page.wait_for_function("() => document.activeElement.getBoundingClientRect().left >= 0")
        assert link.get_attribute("href") == html_of(NOTEBOOKS[-1])
        assert page.evaluate(ON_TOP)
    assert {html_of(name) for name in NOTEBOOKS} <= focused


@pytest.mark.browser
def test_a_solution_opens_when_it_is_asked_for(address: str) -> None:
    with browser(PHONE) as (page, _):
        page.goto(address + html_of(NOTEBOOKS[0]))
        solution = page.locator("details:has(> summary:text('Solution'))").first
        code = solution.locator("pre")
        assert not code.is_visible()
        solution.locator("summary").press("Enter")
        assert code.is_visible()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_plots_can_be_read_by_day_and_by_night(address: str, scheme: Any) -> None:
    """WCAG 2.2, 1.4.3: contrast of at least 4.5 to 1."""
    contrast = """selector => {
        const parts = colour => colour.match(/[\\d.]+/g).map(Number);
        const shown = node => {  // the nearest background that is not transparent
            const [r, g, b, a = 1] = parts(getComputedStyle(node).backgroundColor);
            return a > 0 ? [r, g, b] : shown(node.parentElement);
        };
        const light = rgb => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        return [...document.querySelectorAll(selector)].map(node => {
            const [a, b] = [light(parts(getComputedStyle(node).color).slice(0, 3)), light(shown(node))];
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        });
    }"""
    with browser(DESK) as (page, _):
        page.emulate_media(color_scheme=scheme)
        page.goto(address + html_of(NOTEBOOKS[1]))
        for selector in ("article p", "article a", "pre", "pre span", "summary p", "article td", ".sidebar-tree a"):
            found = page.evaluate(contrast, selector)
            assert found and min(found) >= 4.5, selector
        white = page.locator("article img").evaluate_all("all => all.map(img => getComputedStyle(img).backgroundColor)")
    assert set(white) == {"rgb(255, 255, 255)"}
