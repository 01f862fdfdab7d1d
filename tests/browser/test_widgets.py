"""Every widget of every notebook, by keyboard: each control has a name, is reached with Tab, and its sentence changes.

A real JupyterLab runs the cells that the widgets need (`slices`). A control that changes no sentence says nothing to a
reader who cannot see the picture.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import pytest

from tests.browser import shots
from tests.browser.slices import is_widget, sliced
from tests.browser.test_lab import NOTEBOOKS

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]
WITH_WIDGETS = [path for path in NOTEBOOKS if any(map(is_widget, nbformat.read(path, 4).cells))]
KINDS = {
    "spinbutton": "input[type=number]",
    "combobox": "select",
    "checkbox": "input[type=checkbox]",
    "textbox": "input[type=text]",
    "button": "button",
}
KEYS = {
    "spinbutton": [["ArrowUp"], ["ArrowDown"]],
    "combobox": [["Space", "ArrowDown", "Enter"]] * 2,  # while the list is closed, JupyterLab itself takes the arrows
    "checkbox": [["Space"]],
    "button": [["Enter"]],
}
"""What moves a control; the second is for one that is at its end, or whose next step gives the same sentence."""
LONGEST_S = 30.0
"""How long a picture may take to be drawn again on a busy machine."""
OUTPUT = "[...document.querySelectorAll('.jp-CodeCell')][i].querySelector('.jp-OutputArea')"
FOCUSED = f"i => {OUTPUT}.contains(document.activeElement)"
BEFORE = """i => {  // the cell itself: Tab goes on from there
    const cell = [...document.querySelectorAll('.jp-CodeCell')][i];
    cell.scrollIntoView();
    cell.focus();
}"""


@dataclass(frozen=True)
class Control:
    """A control that has the focus: its role and its name for a screen reader."""

    role: str
    name: str


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[shots.Lab, Page]]:
    """JupyterLab with the slices of all notebooks that have widgets, and a browser."""
    folder = tmp_path_factory.mktemp("slices")
    for path in WITH_WIDGETS:
        nbformat.write(sliced(nbformat.read(path, 4)), folder / path.name)
    with shots.jupyter_lab(sorted(folder.glob("*.ipynb"))) as lab, shots.browser_page() as page:
        yield lab, page


@pytest.mark.parametrize("path", WITH_WIDGETS, ids=lambda path: path.stem)
def test_each_control_has_a_name_and_changes_its_sentence(course: tuple[shots.Lab, Page], path: Path) -> None:
    lab, page = course
    began = time.monotonic()
    lab.end_kernels()
    shots.open_notebook(page, lab, path.name, "doc")
    shots.choose(page, "Run", "Run All Cells")
    shots.wait_until_idle(page, lab, patience=300)
    assert not page.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()
    ran = time.monotonic()
    cells = page.locator(".jp-CodeCell")
    shown = [i for i in range(cells.count()) if cells.nth(i).locator(".jupyter-widgets.widget-vbox").count()]
    expected = sum(map(is_widget, nbformat.read(path, 4).cells))
    assert len(shown) == expected, "a widget did not come to life"
    moved = {i: walk(page, i) for i in shown}
    for i, controls in moved.items():
        there = [
            e.aria_snapshot()
            for kind in sorted(KINDS)
            for e in cells.nth(i).locator(".jp-OutputArea").get_by_role(kind).all()
        ]
        assert len(controls) == len(there) > 0, f"Tab reaches {controls} of {there}"
    count = sum(map(len, moved.values()))
    print(f"{path.stem}: {ran - began:.0f} s to run, {time.monotonic() - ran:.0f} s for {count} controls")


def there(output: Locator) -> Iterator[Control]:
    """All controls of an output."""
    for kind in KINDS.values():
        yield from map(named, output.locator(kind).all())


def walk(page: Page, i: int) -> list[Control]:
    """Go through the controls of a cell's output with Tab, and move each."""
    page.evaluate(BEFORE, i)
    found: list[Control] = []
    guesses = 0
    for _ in range(60):
        page.keyboard.press("Tab")
        if not page.evaluate(FOCUSED, i):
            if found:
                return found
            continue
        control = named(page.locator(":focus"))
        if control.role == "slider":
            assert found and found[-1].role == "spinbutton", "a slider, which has no name, belongs to a named number"
        if control.role not in KINDS:
            continue
        assert control.name, f"a {control.role} without a name"
        found.append(control)
        if control.role == "textbox":
            page.keyboard.type("4")
            guesses += 1
        else:
            move(page, i, control, guesses)
    raise AssertionError(f"Tab does not leave the widget; it found {found}")


def named(element: Locator) -> Control:
    """The role and the name of an element as a browser tells them to a screen reader."""
    found = re.match(r'- (\w+)(?: "([^"]*)")?', element.aria_snapshot())
    return Control(found[1], found[2] or "") if found else Control("", "")


def move(page: Page, i: int, control: Control, guesses: int) -> None:
    """Press keys until the sentence changes; it must after one of them."""
    status = page.locator(".jp-CodeCell").nth(i).get_by_role("status")
    before = texts(status)
    for keys in KEYS[control.role]:
        for key in keys:
            page.keyboard.press(key)
        if changes(page, status, before):
            break
    else:
        raise AssertionError(f"{control.role} {control.name!r} changes no sentence: {before}")
    if control.role == "button":
        assert f"Kept {guesses} of {guesses}." in " ".join(texts(status))


def texts(status: Locator) -> list[str]:
    return status.all_inner_texts()


def changes(page: Page, status: Locator, before: list[str]) -> bool:
    """Whether the sentence becomes another one."""
    give_up = time.monotonic() + LONGEST_S
    while time.monotonic() < give_up:
        if texts(status) != before:
            return True
        page.wait_for_timeout(100)
    return False
