"""The drawings of notebook 10: one server by two clocks, four strategies, predictions, hit rates, guesses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvlab.course import plots
from kvlab.course.claims import CLAIMS
from kvlab.course.guesses import QUESTIONS
from kvlab.course.pictures import Flow, Step

BENCH = Flow(
    [
        Step("load", "which requests, and when?", marked=True),
        Step("server", "what is measured"),
        Step("clock", "from when to when?", marked=True),
        Step("summary", "which number, of what?", marked=True),
    ],
    columns=4,
)
Rows = Sequence[Mapping[str, Any]]
"""Of a result of the four strategies: a row for each workload and strategy."""
PERCENTS = range(5, 100, 5)
TIERS = ("device", "host", "store")
METRICS = {
    "tok_per_s": "tokens a second",
    "ttft_p50_ms": "TTFT, median",
    "ttft_p95_ms": "TTFT, 95th percentile",
}
WITHIN = 0.2
"""Of a prediction that is called close, see `kvlab.lab.strategy_runs`."""
SAID = {"better": ("o", 2), "worse": ("X", 1), "no difference shown": ("|", 6)}
"""Marker and colour by what an interval says."""


def in_words(values: Mapping[str, float], form: str) -> str:
    """Names with their values, each written as in `format`: what captions consist of."""
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())


# --- clocks and percentiles ---------------------------------------------------------------------
def one_server(due: Sequence[float], begins: Sequence[float], ends: Sequence[float], caption: str) -> None:
    """Show when each request was due, began and ended on a server that works on one at a time."""
    fig, ax = plots.new_figure("One server, one stall", "milliseconds", "request", height=3.0)
    waits = [begin - at for at, begin in zip(due, begins, strict=True)]
    served = [end - begin for begin, end in zip(begins, ends, strict=True)]
    colours = plots.OKABE_ITO
    ax.barh(range(len(due)), waits, left=list(due), color=colours[4], hatch="///", edgecolor="white", label="waits")
    ax.barh(range(len(due)), served, left=list(begins), color=colours[0], edgecolor="white", label="is served")
    ax.set_yticks(range(len(due)))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower left")
    plots.show(fig, caption)


def heaps(systems: Mapping[str, Mapping[float, int]], caption: str) -> None:
    """Show how many requests of each system took how long, with a line at the mean."""
    fig, axes = plt.subplots(len(systems), 1, figsize=(plots.WIDTH, 1.5 * len(systems)), sharex=True, sharey=True)
    widest = max(max(counts) for counts in systems.values())
    for ax, (name, counts), colour, hatch in zip(axes, systems.items(), plots.OKABE_ITO, plots.hatches(), strict=False):
        mean = sum(value * count for value, count in counts.items()) / sum(counts.values())
        ax.bar([*counts], [*counts.values()], width=widest / 60, color=colour, hatch=hatch, edgecolor="white")
        ax.axvline(mean, color="black", linestyle="--")
        ax.annotate(f" mean {mean:.0f}", (mean, 60))
        ax.set(title=name, ylabel="requests")
    axes[-1].set_xlabel("milliseconds")
    plots.show(fig, caption)


# --- four strategies ----------------------------------------------------------------------------
def by_workload(title: str, rows: Rows, key: str, ylabel: str, caption: str) -> None:
    """Show a group of bars for each workload, a bar with its interval for each strategy. A star: a noisy row."""
    fig, ax = plots.new_figure(title, ylabel=ylabel)
    kinds, strategies = _names(rows, "workload"), _names(rows, "strategy")
    width = 0.8 / len(strategies)
    for i, (strategy, colour, hatch) in enumerate(
        zip(strategies, cycle(plots.OKABE_ITO), plots.hatches(), strict=False)
    ):
        own = [_row(rows, kind, strategy) for kind in kinds]
        places = [at + (i - (len(strategies) - 1) / 2) * width for at in range(len(kinds))]
        values = [row[key] for row in own]
        ends = [row.get(f"{key}_interval") or row.get(f"{key}_band") or [row[key]] * 2 for row in own]
        low = [max(0.0, value - end[0]) for value, end in zip(values, ends, strict=True)]
        high = [max(0.0, end[1] - value) for value, end in zip(values, ends, strict=True)]
        ax.bar(places, values, width, color=colour, hatch=hatch, edgecolor="white", label=strategy)
        if any(high):
            ax.errorbar(places, values, [low, high], fmt="none", ecolor="black", elinewidth=1, capsize=2)
        for place, row, value, up in zip(places, own, values, high, strict=True):
            if row.get("noisy"):
                ax.annotate("*", (place, value + up), ha="center")
    ax.set_xticks(range(len(kinds)), kinds)
    ax.grid(axis="x", visible=False)
    ax.margins(y=0.3)  # room for the legend above the bars
    ax.legend(loc="upper center", ncols=len(strategies))
    plots.show(fig, caption)


def latencies(rows: Rows, caption: str) -> None:
    """Show for each workload which share of the requests had their first token by then, a curve for each strategy."""
    kinds = _names(rows, "workload")
    fig, axes = plt.subplots(2, 2, figsize=(plots.WIDTH, 4.6), sharey=True)
    for ax, kind in zip(axes.flat, kinds, strict=True):
        for row, style in zip([row for row in rows if row["workload"] == kind], ("-", "--", "-.", ":"), strict=False):
            ax.plot(row["ttft_ms_by_percent"], PERCENTS, linestyle=style, marker="", label=row["strategy"])
        ax.set(title=kind, xscale="log")
        _plain_ticks(ax)
    axes[0][0].legend(loc="lower right", fontsize=8)
    for ax in axes[1]:
        ax.set_xlabel("TTFT, milliseconds")
    for ax in axes[:, 0]:
        ax.set_ylabel("% of requests")
    plots.show(fig, caption)


def tiers(rows: Rows, caption: str) -> None:
    """Show where blocks were found: a bar for each workload and strategy with a cache, cut by tier."""
    cached = [row for row in rows if any(row["hit_rate"][tier] for tier in TIERS)]
    fig, ax = plots.new_figure("Found blocks by tier", "share of all blocks", height=1.1 + 0.26 * len(cached))
    names = [f"{row['workload']}, {row['strategy']}" for row in cached]
    begins = [0.0] * len(cached)
    for tier, colour, hatch in zip(TIERS, plots.OKABE_ITO, plots.hatches(), strict=False):
        lengths = [row["hit_rate"][tier] for row in cached]
        ax.barh(names, lengths, left=begins, color=colour, hatch=hatch, edgecolor="white", label=tier)
        begins = [begin + length for begin, length in zip(begins, lengths, strict=True)]
    ax.set_xlim(0, 1)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower right")
    plots.show(fig, caption)


def order(rows: Rows, caption: str) -> None:
    """Show how many times better each strategy is than the one before it, with intervals, a plot for each metric."""
    fig, axes = plt.subplots(1, len(METRICS), figsize=(plots.WIDTH, 4.4), sharey=True)
    for ax, (metric, title) in zip(axes, METRICS.items(), strict=True):
        own = [row for row in rows if row["metric"] == metric]
        names = [f"{row['workload']}: {row['to']}" for row in own]
        for name, row in zip(names, own, strict=True):
            marker, colour = SAID[row["said"]]
            ax.plot([row["low"], row["high"]], [name] * 2, color=plots.OKABE_ITO[colour], marker="")
            ax.plot([row["times_better"]], [name], color=plots.OKABE_ITO[colour], marker=marker, markersize=7)
        ax.axvline(1, color="black", linewidth=1)
        ax.set(title=title, xscale="log", xlabel="times better")
        _plain_ticks(ax)
    axes[0].invert_yaxis()
    plots.show(fig, caption)


def predictions(rows: Rows, caption: str) -> None:
    """Show predicted by measured for each workload and strategy, a marker for each metric."""
    names = [f"{row['workload']}, {row['strategy']}" for row in rows]
    fig, ax = plots.new_figure("The simulator against reality", "predicted / measured", height=4.4)
    ax.axvspan(1 - WITHIN, 1 + WITHIN, color="0.9")
    ax.axvline(1, color="black", linewidth=1)
    for metric, marker, colour in zip(METRICS, "osx", plots.OKABE_ITO, strict=False):
        ratios = [row[metric]["ratio"] for row in rows]
        ax.plot(ratios, names, linestyle="", marker=marker, color=colour, label=METRICS[metric])
    ax.set_xscale("log")
    _plain_ticks(ax)
    ax.invert_yaxis()
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    plots.show(fig, caption)


# --- hit rates ----------------------------------------------------------------------------------
def work_figure(curves: Mapping[str, Sequence[float]], at: float) -> Figure:
    """How many times less work there is, by hit rate from 0 on in percent; a line at the hit rate that was chosen."""
    fig, ax = plots.new_figure("What a hit rate saves", "hit rate by tokens, percent", "times less work")
    for (name, times), style in zip(curves.items(), ("--", "-"), strict=False):
        ax.plot(range(len(times)), times, linestyle=style, marker="", label=name)
    ax.axvline(at, color="black", linewidth=1, linestyle=":")
    ax.set_ylim(0, 22)
    ax.legend(loc="upper left")
    return fig


def ranges(found: Mapping[str, Mapping[str, float]], fixed: Mapping[str, Sequence[str]], caption: str) -> None:
    """Show the hit rate of each setting of each workload. Full markers: the same requests in another layout."""
    fig, ax = plots.new_figure("One cache, four workloads, and what users do", "hit rate", height=2.6)
    for y, (kind, rates) in enumerate(found.items()):
        for setting, rate in rates.items():
            same, colour = setting in fixed[kind], plots.OKABE_ITO[y]
            ax.plot(rate, y, color=colour, marker=plots.MARKERS[y], fillstyle="full" if same else "none", markersize=8)
        low, high = (f(rates[setting] for setting in fixed[kind]) for f in (min, max))
        ax.plot([low, high], [y, y], color=plots.OKABE_ITO[y], marker="")
    ax.set_yticks(range(len(found)), [*found])
    ax.set(xlim=(-0.03, 1.03), ylim=(len(found) - 0.5, -0.5))
    plots.show(fig, caption)


def curve(rows: Rows, caption: str) -> None:
    """Show the hit rate of an LRU cache by its capacity."""
    fig, ax = plots.new_figure("How large must the cache be?", "blocks (log)", "hit rate by blocks")
    ax.plot([row["capacity"] for row in rows], [row["hit_rate"] for row in rows])
    ax.set(xscale="log", ylim=(0, 1))
    _plain_ticks(ax)
    plots.show(fig, caption)


# --- guesses ------------------------------------------------------------------------------------
def guesses(came_out: Mapping[str, float], guessed: Mapping[str, float], caption: str) -> None:
    """Show each guess and each claim as a multiple of what came out."""
    source = {claim.name: claim.source for claim in CLAIMS}
    names = [name for name in QUESTIONS if name in came_out and (name in source or name in guessed)]
    fig, ax = plots.new_figure(
        "What was said, by what came out", "times what came out (log)", height=1.2 + 0.3 * len(names)
    )
    ax.axvline(1, color="black", linewidth=1)
    for said_by, numbers, marker, colour in (("source document", source, "s", 1), ("you", guessed, "o", 0)):
        own = [name for name in names if name in numbers and numbers[name] > 0 and came_out[name] > 0]
        times = [numbers[name] / came_out[name] for name in own]
        ax.plot(times, own, linestyle="", marker=marker, color=plots.OKABE_ITO[colour], markersize=8, label=said_by)
    ax.set_yticks(range(len(names)), names)
    ax.set_xscale("log")
    _plain_ticks(ax)
    ax.invert_yaxis()
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    plots.show(fig, caption)


def _names(rows: Rows, key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _row(rows: Rows, kind: str, strategy: str) -> Mapping[str, Any]:
    return next(row for row in rows if (row["workload"], row["strategy"]) == (kind, strategy))


def _plain_ticks(ax: Axes) -> None:
    """Whole or short numbers on a logarithmic axis, as many as fit."""
    low, high = ax.get_xlim()
    widths = ((5, (1, 1.2, 1.5, 2, 3, 5, 7, 8)), (60, (1, 2, 5)), (1000, (1, 3)))
    steps = next((steps for width, steps in widths if high / low < width), (1,))
    ticks = [step * 10.0**power for power in range(-3, 8) for step in steps if low <= step * 10.0**power <= high]
    ax.set_xticks(ticks, [f"{tick:,.10g}" for tick in ticks])
    ax.set_xlim(low, high)
    ax.minorticks_off()
