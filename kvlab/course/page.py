"""What a notebook page shows besides plots: the takeaway box and flow pictures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from IPython.display import Markdown

BOX_WIDTH, BOX_HEIGHT, GAP = 168, 58, 30
INK, PLAIN, MARKED = "#1b1b1b", "#eef3f8", "#fbe3d3"


@dataclass(frozen=True)
class Step:
    """One box of a flow picture. A marked one is where the saving happens."""

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
"""The way of a request through the system."""


class Flow:
    """Boxes joined by arrows, a few in a row, drawn as SVG; in plain text a line with arrows."""

    def __init__(self, steps: Sequence[Step], columns: int = 4) -> None:
        self.steps, self.columns = steps, columns

    def __repr__(self) -> str:
        return " -> ".join(step.title for step in self.steps)

    def _repr_svg_(self) -> str:
        return self.svg()

    def svg(self) -> str:
        """The picture, with its text as the accessible description."""
        rows = -(-len(self.steps) // self.columns)
        width = self.columns * (BOX_WIDTH + GAP)
        height = rows * (BOX_HEIGHT + GAP) + 10
        parts = [self._box(i, step) for i, step in enumerate(self.steps)]
        parts += [self._arrow(i) for i in range(len(self.steps) - 1)]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-label="{html.escape(repr(self))}" font-family="sans-serif">'
            f"<title>{html.escape(repr(self))}</title>"
            '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="4" orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>'
            f'<rect width="{width}" height="{height}" fill="white"/>{"".join(parts)}</svg>'
        )

    def _corner(self, i: int) -> tuple[int, int]:
        row, column = divmod(i, self.columns)
        return 10 + column * (BOX_WIDTH + GAP), 10 + row * (BOX_HEIGHT + GAP)

    def _box(self, i: int, step: Step) -> str:
        x, y = self._corner(i)
        middle = x + BOX_WIDTH / 2
        return (
            f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8" '
            f'fill="{MARKED if step.marked else PLAIN}" stroke="{INK}"/>'
            f'<text x="{middle}" y="{y + 25}" text-anchor="middle" font-size="15" font-weight="bold" '
            f'fill="{INK}">{html.escape(step.title)}</text>'
            f'<text x="{middle}" y="{y + 44}" text-anchor="middle" font-size="10.5" fill="{INK}">'
            f"{html.escape(step.detail)}</text>"
        )

    def _arrow(self, i: int) -> str:
        (x1, y1), (x2, y2) = self._corner(i), self._corner(i + 1)
        half = BOX_HEIGHT / 2
        if y1 == y2:
            path = f"M{x1 + BOX_WIDTH},{y1 + half} L{x2 - 2},{y2 + half}"
        else:  # down and back to the left
            low = y1 + BOX_HEIGHT + GAP / 2
            middle = x2 + BOX_WIDTH / 2
            path = f"M{x1 + BOX_WIDTH / 2},{y1 + BOX_HEIGHT} V{low} H{middle} V{y2 - 2}"
        return f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#tip)"/>'


def takeaway(sentence: str) -> Markdown:
    """The box that ends a section: one sentence whose number the cell above computed."""
    return Markdown(f"> **Takeaway.** {sentence}")  # type: ignore[no-untyped-call]
