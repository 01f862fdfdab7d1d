"""Flow charts of the course: steps in boxes, connected by arrows.

Plots of data are in `plots`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

WIDTH, HEIGHT = 0.84, 0.76  # of a box, in columns and rows
INK, PLAIN, MARKED = "#1b1b1b", "#eef3f8", "#fbe3d3"


@dataclass(frozen=True)
class Step:
    """One box of a flow chart. A marked box has another colour."""

    title: str
    detail: str = ""
    marked: bool = False


REQUEST = (
    Step("prompt", "text to tokens"),
    Step("block keys", "chained SHA-256, 64 tokens each"),
    Step("match", "which blocks are stored?"),
    Step("load", "their KV comes from the store", True),
    Step("prefill", "only what was not stored", True),
    Step("decode", "token by token"),
    Step("save", "new full blocks go to the store"),
    Step("next request", "finds them there"),
)
"""The steps of a request through the system."""

TIERED_REQUEST = (
    Step("prompt", "text to tokens"),
    Step("block keys", "chained SHA-256, 64 tokens each"),
    Step("locate", "pages, host memory, store?"),
    Step("plan", "fetch or compute?"),
    Step("fetch", "records, in windows, and blocks", True),
    Step("prefill", "meanwhile, and what did not come", True),
    Step("decode", "token by token"),
    Step("save", "new full blocks, by the write policy"),
)
"""The steps of a request through three tiers."""


class Flow:
    """Boxes connected by arrows, `columns` per row. The plain text is one line with arrows.

    The picture is a PNG, because JupyterLab shows no SVG of a notebook that has not run on this machine.
    """

    def __init__(self, steps: Sequence[Step], columns: int = 4) -> None:
        self.steps, self.columns = steps, columns

    def __repr__(self) -> str:
        return "Figure: " + " -> ".join(step.title for step in self.steps)

    def _repr_png_(self) -> bytes:
        return self.png()

    def png(self) -> bytes:
        """The flow chart as a PNG."""
        rows = -(-len(self.steps) // self.columns)
        fig = Figure(figsize=(2.3 * self.columns, 1.05 * rows), dpi=100)
        fig.set_layout_engine("none")  # overrides the course's plot style: the axes fill the picture
        ax = fig.add_axes((0, 0, 1, 1))
        ax.set(xlim=(-0.1, self.columns + 0.1), ylim=(rows - 0.1, -0.1))
        ax.axis("off")
        for i, step in enumerate(self.steps):
            self._box(ax, i, step)
        for i in range(len(self.steps) - 1):
            self._arrow(ax, i)
        file = io.BytesIO()
        fig.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()

    def _box(self, ax: Axes, i: int, step: Step) -> None:
        row, column = divmod(i, self.columns)
        shape = FancyBboxPatch(
            (column + 0.08, row + 0.17), WIDTH - 0.06, HEIGHT - 0.14, boxstyle="round,pad=0.03,rounding_size=0.06"
        )
        shape.set(facecolor=MARKED if step.marked else PLAIN, edgecolor=INK)
        ax.add_patch(shape)
        middle = column + 0.05 + WIDTH / 2
        ax.text(middle, row + 0.36, step.title, ha="center", va="center", size=11, weight="bold", color=INK)
        ax.text(middle, row + 0.6, step.detail, ha="center", va="center", size=7.5, color=INK)

    def _arrow(self, ax: Axes, i: int) -> None:
        (r1, c1), (r2, c2) = divmod(i, self.columns), divmod(i + 1, self.columns)
        style = {"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0}
        middle = 0.05 + WIDTH / 2
        if r1 == r2:
            ax.annotate("", (c2 + 0.04, r2 + 0.48), (c1 + 0.06 + WIDTH, r1 + 0.48), arrowprops=style)
            return
        below = r1 + 0.97  # down and back to the left
        ax.plot([c1 + middle, c1 + middle, c2 + middle], [r1 + 0.84, below, below], color=INK, linewidth=1, marker="")
        ax.annotate("", (c2 + middle, r2 + 0.13), (c2 + middle, below), arrowprops=style)
