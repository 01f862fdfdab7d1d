"""The figure of notebook 03b: requests as a tree of their tokens."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from kvlab.course import plots
from kvlab.course.overlap import RadixTree

ROOM = 30
"""An edge of so many tokens has room for its label."""


def tree(found: RadixTree, titles: Sequence[str], caption: str) -> None:
    """Show tokens from left to right and requests from top to bottom; a box is an edge, as high as its requests.

    Args:
        titles: the requests from top to bottom, as the tree has them: those that share a beginning are neighbours.
    """
    fig, ax = plots.new_figure(f"{len(titles)} requests as a tree", "tokens from the beginning", height=3)
    next_row = {0: 0}  # where an edge begins, in tokens -> the row of the next edge there
    for depth, node in found.walk():
        row, tokens = next_row[depth], len(node.tokens)
        next_row[depth] = row + node.requests
        next_row[depth + tokens] = row
        _edge(ax, depth, tokens, row, node.requests)
    ax.set_yticks([row + 0.5 for row in range(len(titles))], titles)
    ax.invert_yaxis()
    ax.grid(visible=False)
    plots.show(fig, caption)


def _edge(ax: Axes, left: int, tokens: int, row: int, requests: int) -> None:
    alone = requests == 1
    colour, hatch = plots.OKABE_ITO[4 if alone else 5], plots.HATCHES[int(alone)]
    middle = row + requests / 2
    ax.barh(middle, tokens, requests * 0.92, left=left, color=colour, hatch=hatch, edgecolor="white")
    if tokens > ROOM:
        style = {"ha": "center", "va": "center", "size": 8, "backgroundcolor": "white"}
        ax.text(left + tokens / 2, middle, f"{tokens} × {requests}", style)
