"""The drawings of notebook 08: a pass of the model, timelines of batches, times to the first token, routers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Literal

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from kvlab.course import plots
from kvlab.course.pictures import Flow, Step

PASS = Flow(
    [
        Step("a | b | c c c c", "new tokens, side by side"),
        Step("weights", "once for all", marked=True),
        Step("attention", "each in its own pages"),
        Step("next tokens", "a, b, c"),
    ],
    columns=4,
)
WORKERS = Flow(
    [
        Step("requests", "tokens"),
        Step("router", "who has what, who does what", marked=True),
        Step("worker 0, worker 1", "model, pages, scheduler"),
        Step("Redis", "blocks of both"),
    ],
    columns=4,
)


def timeline(title: str, steps: Sequence[Mapping[str, int]], caption: str) -> None:
    """Show which requests have tokens in which step: a bar for each request, hatched where a prompt is computed."""
    names = list(dict.fromkeys(name for step in steps for name in step))
    fig, ax = plots.new_figure(title, "step", height=0.9 + 0.3 * len(names))
    kinds = {
        "prompt": Patch(facecolor=plots.OKABE_ITO[1], hatch="///", edgecolor="white", label="prompt"),
        "answer": Patch(facecolor=plots.OKABE_ITO[0], edgecolor="white", label="answer"),
    }
    used = set()
    for name in names:
        at = 0
        for kind, run in groupby("prompt" if n > 1 else "answer" if n else "" for n in (s.get(name, 0) for s in steps)):
            length = len(list(run))
            if kind:
                used.add(kind)
                look = kinds[kind]
                ax.barh(
                    name, length, left=at, color=look.get_facecolor(), hatch=look.get_hatch() or "", edgecolor="white"
                )
            at += length
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    if len(used) > 1:
        ax.legend(handles=[*kinds.values()], loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    plots.show(fig, caption)


def ecdf(
    milliseconds: Mapping[str, Sequence[float]], caption: str, legend: Literal["lower right", "center"] = "lower right"
) -> None:
    """Show for each time which share of the requests had their first token by then; `legend` is the place for it."""
    fig, ax = plots.new_figure("Time to the first token", "milliseconds", "share of requests")
    for (name, values), style in zip(milliseconds.items(), ("-", "--", ":", "-."), strict=False):
        sns.ecdfplot(x=list(values), ax=ax, label=name, linestyle=style, marker="")
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ticks = [t for t in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if low <= t <= high]
    ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
    ax.minorticks_off()
    ax.legend(loc=legend)
    plots.show(fig, caption)


def routers(rows: Sequence[Mapping[str, object]], caption: str) -> None:
    """Show hit rate and imbalance of each router, side by side."""
    plots.show(router_figure(rows), caption)


def in_words(rows: Sequence[Mapping[str, object]]) -> str:
    """Hit rate and imbalance of each router."""
    return ", ".join(f"{row['router']} {row['hit_rate']:.2f} ({row['imbalance']:.2f})" for row in rows)


def router_figure(rows: Sequence[Mapping[str, object]]) -> Figure:
    """Two plots with a bar for each router: hit rate, and work of the busiest worker by the mean."""
    fig, axes = plt.subplots(1, 2, figsize=(plots.WIDTH, 2.6), sharey=True)
    names = [str(row["router"]) for row in rows]
    for ax, key, title in zip(axes, ("hit_rate", "imbalance"), ("Hit rate", "Imbalance"), strict=True):
        for name, row, colour, hatch in zip(names, rows, plots.OKABE_ITO, plots.hatches(), strict=False):
            value = float(str(row[key]))
            ax.barh(name, value, color=colour, hatch=hatch, edgecolor="white")
            ax.annotate(f" {value:.2f}", (value, name), va="center")
        ax.set_title(title)
        ax.margins(x=0.2)
        ax.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return fig
