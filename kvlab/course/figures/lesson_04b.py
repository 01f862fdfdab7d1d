"""The drawings of notebook 04b: what two readers do with the same values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvlab.course import plots


def verdicts(readers: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """Show what each reader does with each value, as a table with coloured fields.

    Args:
        readers: the names of the columns.
        rows: by the name of a value, "hit" or the reason of the miss, one for each reader.
    """
    hits = np.array([[said == "hit" for said in row] for row in rows.values()])
    fig, ax = plots.new_figure("What a reader does with a value", height=0.9 + 0.34 * len(rows))
    ax.imshow(hits, aspect="auto", vmin=-0.3, vmax=1.3)
    for y, row in enumerate(rows.values()):
        for x, said in enumerate(row):
            colour = plots.ink_on(0.8 * hits[y, x])
            ax.text(x, y, said if said == "hit" else f"miss: {said}", ha="center", va="center", color=colour)
    ax.set_xticks(range(len(readers)), list(readers))
    ax.set_yticks(range(len(rows)), list(rows))
    ax.grid(visible=False)
    counts = ", ".join(f"{name} {column.sum()}" for name, column in zip(readers, hits.T, strict=True))
    plots.show(fig, f"hits among {len(rows)} values: {counts}.")
