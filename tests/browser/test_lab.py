"""The course as a learner meets it: a notebook opened in JupyterLab and run from the menu."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, writes

from tests.browser import shots

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SLIDER = """\
import ipywidgets
slider = ipywidgets.IntSlider(value=3)
slider"""


def keep(files: list[Path]) -> None:
    """Copy pictures to where the environment asks for them."""
    if folder := os.environ.get("KVLAB_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(file, folder)


def errors(notebook: dict[str, Any]) -> list[str]:
    """Names of the errors in a notebook's outputs, where none was promised."""
    cells = [cell for cell in notebook["cells"] if "raises-exception" not in cell["metadata"].get("tags", [])]
    return [out["ename"] for cell in cells for out in cell.get("outputs", []) if out["output_type"] == "error"]


def test_the_first_notebook_runs_in_jupyterlab(tmp_path: Path) -> None:
    if not NOTEBOOKS:
        pytest.skip("there is no notebook yet")
    name = NOTEBOOKS[0].name
    with shots.jupyter_lab(NOTEBOOKS) as lab, shots.browser_page() as page:
        shots.open_notebook(page, lab, name)
        prompts = shots.run_all(page, lab)
        notebook = shots.saved(page, lab, name)
        live = page.locator(".jp-OutputArea .jupyter-widgets").count()
        keep(shots.screens(page, tmp_path, Path(name).stem))
    assert errors(notebook) == []
    assert prompts == [f"[{i}]:" for i in range(1, len(prompts) + 1)]
    assert len(prompts) == sum(cell["cell_type"] == "code" for cell in notebook["cells"])
    assert live > 0 or "[interactive" not in str(notebook), "its widgets did not come to life"
    assert list(tmp_path.glob("*.png"))


def test_an_error_is_seen_and_a_widget_lives(tmp_path: Path) -> None:
    """What the test above relies on."""
    cells = [new_markdown_cell("# Two cells"), *map(new_code_cell, (SLIDER, "1 / 0"))]
    path = tmp_path / "two.ipynb"
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
    path.write_text(writes(new_notebook(cells=cells, metadata={"kernelspec": kernel})))
    with shots.jupyter_lab([path]) as lab, shots.browser_page() as page:
        shots.open_notebook(page, lab, path.name)
        assert shots.run_all(page, lab) == ["[1]:", "[2]:"]
        assert errors(shots.saved(page, lab, path.name)) == ["ZeroDivisionError"]
        slider = page.get_by_role("slider")
        slider.press("ArrowRight")
        assert float(slider.get_attribute("aria-valuenow") or 0) == 4
        assert len(shots.screens(page, tmp_path / "shots", "two")) == 1
