"""The cells that a widget needs, found by the names that they bind and read."""

from __future__ import annotations

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tests.browser.slices import WIDGET, effects, sliced


@pytest.mark.parametrize(
    ("source", "reads", "binds", "sets"),
    [
        ("import numpy as np, os.path\nx = np.ones(2)", set(), {"np", "os", "x"}, set()),
        ("x = x + 1", {"x"}, {"x"}, set()),
        ("def f(a, b=c):\n    d = a\n    return d + e", {"c", "e"}, {"f"}, set()),
        ("for i in items:\n    print(i)", {"items", "print"}, {"i"}, set()),
        ("[n for n in names]", {"names"}, set(), set()),
        ("module.part, table[0] = mine, 1", {"module", "table", "mine"}, set(), {"module", "table"}),
        ("%pip install x\ny = 1", set(), {"y"}, set()),
        ("with open(p) as f:\n    t = f.read()", {"open", "p"}, {"f", "t"}, set()),
    ],
)
def test_what_a_cell_reads_binds_and_sets(source: str, reads: set[str], binds: set[str], sets: set[str]) -> None:
    assert effects(source) == (reads, binds, sets)


def test_a_slice_has_the_last_cells_that_bind_what_is_needed_and_no_others() -> None:
    cells = [
        "x = slow()",
        "x = 1",
        "table = {}",
        "other = x",
        "table['a'] = x",
        "def draw():\n    return table",
        "Explorer(draw)",
        "later = 1",
    ]
    notebook = new_notebook(cells=[new_code_cell(source) for source in cells])
    shown = notebook.cells[6]
    shown.outputs = [new_output("display_data", {"text/plain": f"{WIDGET} to use it] a sentence"})]
    assert [cell.source for cell in sliced(notebook).cells] == [cells[i] for i in (1, 2, 4, 5, 6)]
    assert shown.outputs == []
