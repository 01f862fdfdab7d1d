"""The drawings of notebook 10: one server by two clocks, a load curve, strategies, predictions, hit rates, guesses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import inf
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvlab.course import plots
from kvlab.course.claims import CLAIMS, Claim, as_factor
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
"""Of a result of the strategies: a row for each workload and strategy."""
PERCENTS = range(5, 100, 5)
TIERS = {"device": "pages of the worker", "host": "its host memory", "store": "Redis"}
"""Where blocks were found: the name in a result, and the one that is shown."""
METRICS = {
    "tok_per_s": "tokens a second",
    "ttft_p50_ms": "TTFT, median",
    "ttft_p95_ms": "TTFT, 95th percentile",
}
WAITS = ("ttft_p50_ms", "ttft_p95_ms")
"""The metrics that have a real interval, drawn by conversation."""
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
        ax.annotate(f" mean {mean:.1f}", (mean, 60))
        ax.set(title=name, ylabel="requests")
    axes[-1].set_xlabel("milliseconds")
    plots.show(fig, caption)


def load_curve(rows: Sequence[Mapping[str, float]], caption: str) -> None:
    """Show by offered load what was served, what was served in time, and how long an answer took."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(plots.WIDTH, plots.HEIGHT))
    offered = [row["offered"] for row in rows]
    left.plot(offered, offered, color="0.6", linestyle=":", marker="", label="offered")
    left.plot(offered, [row["served"] for row in rows], linestyle="--", label="served")
    left.plot(offered, [row["in_time"] for row in rows], label="served in time (goodput)")
    left.set(title="Served levels off, served in time falls", ylabel="requests, 1: one connection")
    for key, style in (("p95", "--"), ("p50", "-")):
        right.plot(offered, [row[key] for row in rows], linestyle=style, label=key)
    right.axhline(1, color="0.6", linestyle=":")
    right.set(title="Each answer takes longer", ylabel="time of an answer, 1: alone")
    for ax in (left, right):
        ax.set_xlabel("offered load, 1: one connection")
        ax.set_ylim(bottom=0)
        ax.legend(loc="upper left")
    plots.show(fig, caption)


# --- strategies ---------------------------------------------------------------------------------
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


def gains(title: str, rows: Rows, key: str, caption: str) -> None:
    """Show the same as multiples of the first strategy; the title says the largest one."""
    first = _names(rows, "strategy")[0]
    own = [{**row, "gain": row[key] / _row(rows, row["workload"], first)[key]} for row in rows]
    most = max(row["gain"] for row in own)
    by_workload(f"{title}, at most {most:.1f} times {first}", own, "gain", f"÷ {first}", caption)


def ratio(rows: Rows, key: str, first: str, second: str) -> dict[str, float]:
    """For each workload: the value of one strategy ÷ that of another one."""
    kinds = _names(rows, "workload")
    return {kind: _row(rows, kind, first)[key] / _row(rows, kind, second)[key] for kind in kinds}


def close(rows: Rows) -> dict[str, int]:
    """For each metric: how many predictions are within `WITHIN` of what was measured."""
    return {title: sum(abs(row[metric]["ratio"] - 1) <= WITHIN for row in rows) for metric, title in METRICS.items()}


def latencies(rows: Rows, caption: str) -> None:
    """Show for each workload which share of the requests had their first token by then, a curve for each strategy.

    Earlier strategies have thicker lines, so that equal curves are seen behind each other.
    """
    kinds, strategies = _names(rows, "workload"), _names(rows, "strategy")
    fig, axes = plt.subplots(2, 2, figsize=(plots.WIDTH, 5.0), sharey=True)
    for ax, kind in zip(axes.flat, kinds, strict=True):
        for i, (strategy, style) in enumerate(zip(strategies, cycle(("-", "-", "--", "-.", ":")), strict=False)):
            times, width = _row(rows, kind, strategy)["ttft_ms_by_percent"], max(1.2, 5.0 - i)
            ax.plot(times, PERCENTS, linestyle=style, linewidth=width, marker="", label=strategy)
        ax.set(title=kind, xscale="log")
        _plain_ticks(ax)
    for ax in axes[1]:
        ax.set_xlabel("TTFT, milliseconds (log)")
    for ax in axes[:, 0]:
        ax.set_ylabel("% of requests")
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(strategies))
    plots.show(fig, caption)


def tiers(rows: Rows, caption: str) -> None:
    """Show where blocks were found: a bar for each workload and strategy with a cache, cut by tier."""
    cached = [row for row in rows if any(row["hit_rate"][tier] for tier in TIERS)]
    title = "What redis fetches, full finds in the worker"
    fig, ax = plots.new_figure(title, "share of all blocks", height=1.3 + 0.26 * len(cached))
    names = [f"{row['workload']}, {row['strategy']}" for row in cached]
    begins = [0.0] * len(cached)
    for (tier, label), colour, hatch in zip(TIERS.items(), plots.OKABE_ITO, plots.hatches(), strict=False):
        lengths = [row["hit_rate"][tier] for row in cached]
        ax.barh(names, lengths, left=begins, color=colour, hatch=hatch, edgecolor="white", label=label)
        begins = [begin + length for begin, length in zip(begins, lengths, strict=True)]
    ax.set_xlim(0, 1)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    fig.legend(loc="outside lower center", ncols=len(TIERS))
    plots.show(fig, caption)


def order(rows: Rows, caption: str) -> None:
    """Show how many times shorter the waits of each strategy are than those of one that has less, with intervals."""
    pairs = list(dict.fromkeys(f"{row['workload']}: {row['from']} → {row['to']}" for row in rows))
    fig, axes = plt.subplots(1, len(WAITS), figsize=(plots.WIDTH, 1.4 + 0.22 * len(pairs)), sharey=True)
    for ax, metric in zip(axes, WAITS, strict=True):
        for row in rows:
            if row["metric"] == metric:
                at = pairs.index(f"{row['workload']}: {row['from']} → {row['to']}")
                marker, colour = SAID[row["said"]]
                ax.plot([row["low"], row["high"]], [at, at], color=plots.OKABE_ITO[colour], marker="")
                ax.plot([row["times_better"]], [at], color=plots.OKABE_ITO[colour], marker=marker, markersize=7)
        ax.axvline(1, color="black", linewidth=1)
        ax.set(title=METRICS[metric], xscale="log", xlabel="times better (log)")
        _plain_ticks(ax)
    axes[0].set_yticks(range(len(pairs)), pairs, fontsize=8)
    axes[0].invert_yaxis()
    handles = [
        Line2D([], [], color=plots.OKABE_ITO[colour], marker=marker, label=said)
        for said, (marker, colour) in SAID.items()
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(SAID))
    plots.show(fig, caption)


def predictions(rows: Rows, caption: str) -> None:
    """Show predicted ÷ measured for each workload and strategy, a marker for each metric."""
    names = [f"{row['workload']}, {row['strategy']}" for row in rows]
    title, height = f"Grey: within {WITHIN:.0%} of what was measured", 1.3 + 0.22 * len(rows)
    fig, ax = plots.new_figure(title, "predicted ÷ measured (log)", height=height)
    ax.axvspan(1 - WITHIN, 1 + WITHIN, color="0.9")
    ax.axvline(1, color="black", linewidth=1)
    for metric, marker, colour in zip(METRICS, "osx", plots.OKABE_ITO, strict=False):
        ratios = [row[metric]["ratio"] for row in rows]
        ax.plot(ratios, names, linestyle="", marker=marker, color=colour, label=METRICS[metric])
    ax.set_xscale("log")
    _plain_ticks(ax)
    ax.invert_yaxis()
    fig.legend(loc="outside lower center", ncols=len(METRICS))
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


def ranges(title: str, found: Mapping[str, Mapping[str, float]], caption: str) -> None:
    """Show the hit rate of each layout of each workload, a line and a label for each."""
    rows = [(kind, layout, rate) for kind, rates in found.items() for layout, rate in rates.items()]
    fig, ax = plots.new_figure(title, "hit rate by full blocks", height=1.0 + 0.24 * len(rows))
    for kind, colour, marker in zip(found, plots.OKABE_ITO, plots.MARKERS, strict=False):
        for y, (own, _, rate) in enumerate(rows):
            if own == kind:
                ax.plot([0, rate], [y, y], color=colour, marker="")
                ax.plot([rate], [y], color=colour, marker=marker, markersize=8)
                ax.annotate(f"  {rate:.2f}", (rate, y), va="center", fontsize=9)
    ax.set_yticks(range(len(rows)), [f"{kind}: {layout}" for kind, layout, _ in rows])
    ax.set(xlim=(-0.03, 1.1), ylim=(len(rows) - 0.5, -0.5))
    plots.show(fig, caption)


def curve(title: str, rows: Rows, caption: str) -> None:
    """Show the hit rate of an LRU cache by its capacity."""
    fig, ax = plots.new_figure(title, "blocks (log)", "hit rate by blocks")
    ax.plot([row["capacity"] for row in rows], [row["hit_rate"] for row in rows])
    ax.set(xscale="log", ylim=(0, 1))
    _plain_ticks(ax)
    plots.show(fig, caption)


# --- guesses ------------------------------------------------------------------------------------
def too_much(came_out: Mapping[str, float]) -> dict[str, float]:
    """How many times what came out the source document says, for each claim; percents saved as factors."""
    return {name: _times(name, claim.source, came_out[name]) for name, claim in _claims().items()}


def guesses(came_out: Mapping[str, float], guessed: Mapping[str, float], caption: str) -> None:
    """Show each guess and each claim as a multiple of what came out. Nobody's mark is in the legend without one."""
    source = {name: claim.source for name, claim in _claims().items()}
    said: dict[str, Mapping[str, float]] = {"source document": source, "you": guessed}
    names = [name for name in QUESTIONS if name in came_out and any(name in own for own in said.values())]
    fig, ax = plots.new_figure(
        "What was said ÷ what came out", "times what came out (log)", height=1.2 + 0.3 * len(names)
    )
    ax.axvline(1, color="black", linewidth=1)
    for (said_by, numbers), marker, colour in zip(said.items(), "so", (1, 0), strict=True):
        own = {name: _times(name, numbers[name], came_out[name]) for name in names if name in numbers}
        shown = {name: times for name, times in own.items() if 0 < times < inf}
        if shown:
            at = [names.index(name) for name in shown]
            style: dict[str, Any] = {"marker": marker, "color": plots.OKABE_ITO[colour], "markersize": 8}
            ax.plot([*shown.values()], at, linestyle="", label=said_by, **style)
    ax.set_yticks(range(len(names)), names)
    ax.set_xscale("log")
    _plain_ticks(ax)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    plots.show(fig, caption)


def _claims() -> dict[str, Claim]:
    return {claim.name: claim for claim in CLAIMS}


def _times(name: str, said: float, came_out: float) -> float:
    """`said` ÷ `came_out`, both as factors; 0 where nothing came out."""
    unit = QUESTIONS[name].unit
    return as_factor(unit, said) / as_factor(unit, came_out) if came_out > 0 else 0.0


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
