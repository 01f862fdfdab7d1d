"""The drawings and tables of notebook 12: drills, servers by prompt length, bands of money, advice, phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from IPython.display import Markdown
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kvlab.course import plots
from kvlab.course.figures.lesson_11b import table
from kvlab.course.pictures import Flow, Step
from kvlab.lab.decide import Row
from kvlab.lab.recommend import Choice

__all__ = ["GATED", "PHASES", "advice", "drilled", "drills", "money", "servers", "table"]

Answers = Sequence[Sequence[Any]]
"""Of each request of a drill: the tokens that came from the cache, and whether the answer is right."""
PHASES = Flow(
    [
        Step("local", "drills, your own trace"),
        Step("staging", "write only, then shadow reads"),
        Step("5 % of the workers", "hits are used", marked=True),
        Step("all", "alerts, and a way back"),
    ],
    columns=4,
)
"""The way into production."""
GATED = ("local", "staging", "5 % of the workers")
"""The phases after which there is a gate."""
FOLLOWS = ("breaker", "down", "gap")
"""Reasons that only follow from another one, sooner or later: a table that is compared leaves them out."""
PARTS = (
    "verdict",
    "measure first",
    "router",
    "host memory",
    "shared store",
    "planner",
    "salt",
    "encryption_keys",
    "epoch",
)
"""The parts of a deployment that `advice` shows."""


def drilled(before: Answers, during: Answers, after: Answers, reasons: Mapping[str, int]) -> dict[str, Any]:
    """Return a drill as a row: tokens found in each part; which answers were wrong; what was counted."""
    everything = [*before, *during, *after]
    wrong = sum(not right for _, right in everything)
    return {
        "before": min(found for found, _ in before),
        "during": [found for found, _ in during],
        "after": [found for found, _ in after],
        "wrong": [i for i, (_, right) in enumerate(everything) if not right],
        "right": "all" if not wrong else f"{len(everything) - wrong} of {len(everything)}",
        "counted": sorted(str(reason) for reason, count in reasons.items() if count and reason not in FOLLOWS),
    }


def drills(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Show for each drill the tokens that its requests found, the right answers, and what was counted."""
    most = [max(len(row[part]) for row in rows.values()) for part in ("during", "after")]
    columns = ["before", *["during"] * most[0], *["after"] * most[1]]
    fig, ax = plots.new_figure("Tokens that came from the cache", height=1.0 + 0.45 * len(rows))
    for y, row in enumerate(rows.values()):
        places = [0, *range(1, 1 + len(row["during"])), *range(1 + most[0], 1 + most[0] + len(row["after"]))]
        found = [row["before"], *row["during"], *row["after"]]
        for i, (x, tokens) in enumerate(zip(places, found, strict=True)):
            share, mark = tokens / row["before"], " ✘" * (i in row["wrong"])
            ax.add_patch(Rectangle((x - 0.48, y - 0.42), 0.96, 0.84, color=colormaps[plots.MAP](share)))
            ax.annotate(f"{tokens}{mark}", (x, y), ha="center", va="center", color=plots.ink_on(share))
        ax.annotate(f"{_answers(row)}\n{_counted(row)}", (len(columns) - 0.4, y), va="center", fontsize=8.5)
    ax.set_xlim(-0.6, len(columns) + 1.6)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.grid(visible=False)
    plots.show(fig, "; ".join(f"{name}: {_in_words(row)}" for name, row in rows.items()) + ".")


def _in_words(row: Mapping[str, Any]) -> str:
    during, after = (", ".join(map(str, row[part])) for part in ("during", "after"))
    return f"{row['before']} tokens found before, {during} during, {after} after, {_answers(row)}, {_counted(row)}"


def _answers(row: Mapping[str, Any]) -> str:
    return "all answers right" if row["right"] == "all" else f"✘ wrong, {row['right']} right"


def _counted(row: Mapping[str, Any]) -> str:
    return f"counted: {', '.join(row['counted']) or 'nothing'}"


def servers(own_tokens: Sequence[int], counts: Sequence[int], chosen: int, at: int) -> Figure:
    """Return servers by the tokens of a user, and a point for the chosen length."""
    fig, ax = plots.new_figure("Servers for all users' blocks", "own tokens of each user", "servers")
    ax.plot(own_tokens, counts)
    ax.plot([at], [chosen], "k*", markersize=12)
    ax.annotate(f"{chosen}", (at, chosen), (-8, 8), textcoords="offset points", ha="right")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(own_tokens, [f"{tokens:,}" for tokens in own_tokens])
    ax.set_yticks(powers := [2**i for i in range(11)], [f"{count}" for count in powers])
    ax.set_ylim(0.8, 1.3 * max(*counts, chosen))
    return fig


def money(rows: Sequence[Row]) -> Figure:
    """Return the band of the net gain by capacity."""
    fig, ax = plots.new_figure("Net gain a month, over all bands", "US dollars a month", height=0.9 + 0.5 * len(rows))
    for i, row in enumerate(rows):
        low, middle, high = row.net_usd
        colour = plots.OKABE_ITO[2] if low > 0 else plots.OKABE_ITO[1] if high <= 0 else plots.OKABE_ITO[0]
        said = "pays" if low > 0 else "loses" if high <= 0 else "depends"
        ax.plot([low, high], [i, i], "-|", color=colour, linewidth=3, markersize=12)
        ax.plot([middle], [i], "o", color=colour)
        ax.annotate(f" {said}", (high, i), va="center")
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(rows)), [f"{row.gib:g} GiB" for row in rows])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    return fig


def advice(advised: Mapping[str, Sequence[Choice]]) -> Markdown:
    """Return what each reader should take, part by part, as a table."""
    takes = {who: {choice.part: choice.take for choice in choices} for who, choices in advised.items()}
    parts = [part for part in PARTS if any(part in taken for taken in takes.values())]
    return table([{"part": part} | {who: taken.get(part, "–") for who, taken in takes.items()} for part in parts])
