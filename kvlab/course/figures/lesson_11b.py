"""The drawings of notebook 11b: the job, two orders of a race, fields of a table, stores beside Redis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown
from matplotlib.figure import Figure

from kvlab.course import plots
from kvlab.course.pictures import Flow, Step

JOB = Flow(
    [
        Step("16 values", "of 384 KiB, the same for all"),
        Step("put", "under keys", marked=True),
        Step("get", "all of them", marked=True),
        Step("compare", "every byte"),
        Step("ratio", "to Redis, in the same round"),
    ],
    columns=5,
)
"""What every store has to do in the race."""
Row = Mapping[str, Any]
"""Of docs/results/bench_stores.json."""


def table(rows: Sequence[Mapping[str, object]]) -> Markdown:
    """Rows as a table; the keys of the first row are its head."""
    lines = ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    head = "| " + " | ".join(rows[0]) + " |"
    return Markdown("\n".join([head, "|---" * len(rows[0]) + "|", *lines]))  # type: ignore[no-untyped-call]


def two_orders(orders: Mapping[str, Sequence[tuple[str, float]]], caption: str) -> None:
    """Show pieces of work one after another on a time line, one line for each order.

    Args:
        orders: for each order, in which order which contender worked, and for how long.
    """
    fig, ax = plots.new_figure("The same ten pieces of work, in two orders", "milliseconds", height=2.2)
    names = sorted({name for work in orders.values() for name, _ in work})
    style = dict(zip(names, zip(plots.OKABE_ITO, plots.hatches(), strict=False), strict=False))
    for order, work in orders.items():
        begin = 0.0
        for name, took in work:
            colour, hatch = style[name]
            ax.barh(order, took, left=begin, height=0.55, color=colour, hatch=hatch, edgecolor="white")
            ax.annotate(name, (begin + took / 2, order), ha="center", va="center", color="white", weight="bold")
            begin += took
    ax.axvspan(5, begin, color="0.5", alpha=0.15)
    ax.annotate("the machine is busy", (5.1, 0.5), va="center", fontsize=9)
    ax.set_xlim(0, begin)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    plots.show(fig, caption)


def fields(
    title: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[str]],
    caption: str,
    good: Callable[[str], bool],
) -> None:
    """Show a table of words, the good ones on a light field, the others on a dark one."""
    fig, ax = plots.new_figure(title, height=0.9 + 0.36 * len(rows))
    fine = np.array([[good(word) for word in row] for row in rows.values()])
    ax.imshow(fine, aspect="auto", vmin=-0.3, vmax=1.3)
    for y, row in enumerate(rows.values()):
        for x, word in enumerate(row):
            ax.text(x, y, word, ha="center", va="center", color=plots.ink_on(0.8 * fine[y, x]), fontsize=9)
    ax.set_xticks(range(len(columns)), list(columns))
    ax.set_yticks(range(len(rows)), list(rows))
    ax.grid(visible=False)
    plots.show(fig, caption)


def beside_redis(title: str, rows: Sequence[Row], band: tuple[float, float], out: Mapping[str, str]) -> Figure:
    """Draw puts and gets of each store as multiples of Redis' speed, over the band of no difference.

    A row whose reference was noisy has hollow marks.

    Args:
        out: stores that do not come into question, with the reason. They are written and not drawn.
    """
    fig, ax = plots.new_figure(title, "speed ÷ that of Redis over TCP (log)", height=0.9 + 0.28 * len(rows))
    ax.axvspan(*band, color="0.5", alpha=0.2, label="within a tenth")
    ax.axvline(1, color="black", linewidth=1)
    for key, label, marker, colour in (("put", "put", "s", 1), ("get", "get", "o", 0)):
        for y, row in enumerate(rows):
            if row["store"] not in out:
                ink = plots.OKABE_ITO[colour]
                face = "white" if row["noisy"] else ink
                ax.plot([row[f"{key}_vs_redis"]], [y], marker, color=ink, markerfacecolor=face, markersize=7)
        ax.plot([], [], marker, color=plots.OKABE_ITO[colour], label=label, markersize=7)
    for y, row in enumerate(rows):
        if row["store"] in out:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            ax.text(1, y, out[row["store"]], ha="center", va="center", fontsize=9, style="italic", bbox=box)
    values = [row[f"{key}_vs_redis"] for row in rows for key in ("put", "get")]
    ax.set(xscale="log", xlim=(min(values) / 1.5, max(values) * 1.5))
    low, high = ax.get_xlim()
    ticks = [tick for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low <= tick <= high]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_yticks(range(len(rows)), [row["store"] for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def faults(rounds: Mapping[str, Sequence[float]], expected: int, caption: str) -> None:
    """Show how many pages the kernel gave in each round, with a line at the expected number."""
    fig, ax = plt.subplots(figsize=(plots.WIDTH, 2.6))
    for (label, counts), hatch, i in zip(rounds.items(), plots.hatches(), range(9), strict=False):
        at = [number + 0.4 * i for number in range(len(counts))]
        ax.bar(at, counts, 0.38, label=label, color=plots.OKABE_ITO[i], hatch=hatch, edgecolor="white")
        for x, count in zip(at, counts, strict=True):
            ax.annotate(f"{count:,.0f}", (x, count), ha="center", va="bottom", fontsize=8)
    ax.axhline(expected, color="black", linestyle="--", linewidth=1, label="by hand")
    ax.set_xticks([n + 0.2 for n in range(len(counts))], [f"round {n + 1}" for n in range(len(counts))])
    ax.set(title="Page faults of 64 values of 1 MiB", ylabel="page faults")
    ax.margins(y=0.35)
    ax.grid(axis="x", visible=False)
    ax.legend(loc="upper right", ncols=len(rounds) + 1)
    plots.show(fig, caption)
