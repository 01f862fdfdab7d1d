"""Figures of notebook 03: how names are made and used, which keys stay after a change, what a clock says."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvlab.course import plots
from kvlab.course.pictures import INK, PLAIN, WIDTH, Flow, Step
from kvlab.course.widgets import Explorer

KEPT, NEW = plots.OKABE_ITO[5], plots.OKABE_ITO[4]
WORDS_FIT = 16
"""Up to so many blocks in a row, a word fits into the box of a block."""

BlockKeys = Callable[[list[int], bytes, int], list[bytes]]

CHAIN = Flow(
    [
        Step("root", "all but the tokens"),
        Step("key 0", "root + tokens 0 … 63"),
        Step("key 1", "key 0 + tokens 64 … 127"),
        Step("key 2", "key 1 + tokens 128 … 191"),
    ]
)
"""How names are made."""
CACHE = Flow(
    [
        Step("keys", "one for each full block"),
        Step("load", "what can be used", marked=True),
        Step("write", "compute the rest, answer"),
        Step("store", "the blocks that are new", marked=True),
    ]
)
"""How a small cache answers a prompt."""
ATTACK = Flow(
    [
        Step("attacker", "asks first, forged file"),
        Step("store", "keeps the KV under the hash", marked=True),
        Step("victim", "asks, honest file"),
    ],
    columns=3,
)
"""How a forged name is used."""
LEAK = Flow(
    [
        Step("victim", "sends a secret prompt"),
        Step("shared cache", "keeps its blocks", marked=True),
        Step("attacker", "a hit answers sooner"),
    ],
    columns=3,
)
"""How a clock tells what somebody else has sent."""


class Inputs(Flow):
    """Parallel inputs in a row, without arrows between them, and below the row what is made of all of them."""

    def __repr__(self) -> str:
        *inputs, result = [step.title for step in self.steps]
        return f"Figure: {', '.join(inputs)} -> {result}"

    def _box(self, ax: Axes, i: int, step: Step) -> None:
        if i < self.columns:
            super()._box(ax, i, step)
            return
        style = {"boxstyle": "round,pad=0.7,rounding_size=0.4", "facecolor": PLAIN, "edgecolor": INK}
        words = f"{step.title}: {step.detail}"
        ax.text(self.columns / 2, 1.5, words, ha="center", va="center", size=9, color=INK, bbox=style)

    def _arrow(self, ax: Axes, i: int) -> None:
        style = {"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0}
        middle = self.columns / 2
        start, end = i + 0.05 + WIDTH / 2, middle + (i + 0.5 - middle) * 0.3
        ax.annotate("", (end, 1.28), (start, 0.86), arrowprops=style)


ROOT = Inputs(
    [
        Step("fingerprint", "which model?"),
        Step("precision", "how exact are the numbers?"),
        Step("salt", "whose blocks?"),
        Step("block size", "how many tokens?"),
        Step("root", "SHA-256 over all four"),
    ]
)
"""What goes into the root."""


def key_map(title: str, rows: Mapping[str, Sequence[bool]]) -> None:
    """Show a row for each change and a box for each block: is its key one of the old keys?"""
    counts = ", ".join(f"{change} {sum(row)} of {len(row)}" for change, row in rows.items())
    plots.show(_key_map(title, rows), f"keys kept: {counts}.")


def one_colour_bars(title: str, values: Mapping[str, float], xlabel: str, caption: str) -> None:
    """Show one horizontal bar for each name, all in one colour, because the names are cases of one measurement."""
    fig, ax = plots.new_figure(title, xlabel, height=0.9 + 0.36 * len(values))
    ax.barh(list(values), list(values.values()), color=NEW, edgecolor="white")
    for name, value in values.items():
        ax.annotate(f" {value:.0f}", (value, name), va="center")
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.grid(axis="y", visible=False)
    plots.show(fig, caption)


def clock(times: Mapping[str, Sequence[float]], caption: str) -> None:
    """Show one dot for each time in milliseconds, a row for each name. Two names that belong together follow."""
    fig, ax = plots.new_figure("What the attacker's clock says", "time to first token, milliseconds", height=3.2)
    spread = random.Random(0)
    for y, milliseconds in enumerate(times.values()):
        rows = [y + spread.uniform(-0.25, 0.25) for _ in milliseconds]
        ax.scatter(milliseconds, rows, s=14, marker=plots.MARKERS[y % 2], color=plots.OKABE_ITO[y % 2])
    ax.set_yticks(range(len(times)), list(times))
    ax.set_xlim(left=0)
    ax.invert_yaxis()
    plots.show(fig, caption)


def edit_explorer(block_keys: BlockKeys, prompt: list[int], root: bytes) -> Explorer:
    """A key map of a prompt with one changed token, and controls for the token and the size of a block."""

    def kept(changed_token: int, block_tokens: int) -> list[bool]:
        edited = [7 if i == changed_token else token for i, token in enumerate(prompt)]
        old = block_keys(prompt, root, block_tokens)
        return [key in old for key in block_keys(edited, root, block_tokens)]

    def draw(changed_token: int, block_tokens: int) -> Figure:
        row = {"keys": kept(changed_token, block_tokens)}
        return _key_map(f"Keys of {len(prompt)} tokens after one change", row)

    def describe(changed_token: int, block_tokens: int) -> str:
        row = kept(changed_token, block_tokens)
        return f"Token {changed_token} changed, blocks of {block_tokens} tokens: {sum(row)} of {len(row)} keys stay."

    return Explorer(draw, describe, changed_token=(300, 0, len(prompt) - 1), block_tokens=[64, 16, 32, 128])


def _key_map(title: str, rows: Mapping[str, Sequence[bool]]) -> Figure:
    fig, ax = plots.new_figure(title, "block", height=0.9 + 0.32 * len(rows))
    for y, row in enumerate(rows.values()):
        for x, same in enumerate(row):
            _box(ax, x, y, same, words=len(row) <= WORDS_FIT)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_xticks(range(0, max(map(len, rows.values())), 2))
    ax.grid(visible=False)
    ax.invert_yaxis()
    return fig


def _box(ax: Axes, x: int, y: int, same: bool, words: bool) -> None:
    hatch = "" if same or words else "///"
    ax.barh(y, 0.92, left=x - 0.46, height=0.8, color=KEPT if same else NEW, hatch=hatch, edgecolor="white")
    if words:
        ax.text(x, y, "kept" if same else "new", ha="center", va="center", size=8)
