"""The drawings of notebook 11: the roofline, a map of break-even bandwidths, curves against a wire, a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from IPython.display import Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvlab.course import plots
from kvlab.course.figures.lesson_11b import table
from kvlab.course.pictures import Flow, Step
from kvlab.lab.gpu_model import Roof

LOAD = Flow(
    [
        Step("store", "records"),
        Step("pinned memory", "received, checked", marked=True),
        Step("device", "copied, then cast", marked=True),
        Step("pages", "what attention reads"),
    ],
    columns=4,
)
"""The way of KV to a GPU."""
SHOWN = {
    "roofline": ("shape", "what", "bound", "roof_ms", "ms", "share"),
    "load_path": ("shape", "tier", "record", "mib", "gbps", "ratio"),
    "break_even": ("shape", "kv_bytes", "tok_s", "gbps"),
}
"""The columns that are shown of a result of `bench gpu`."""
WIRES = {"25 Gbit/s": 3.1, "100 Gbit/s": 12.5, "400 Gbit/s": 50.0}
"""GB/s of the usual networks."""


def roofline(title: str, roofs: Mapping[str, Roof], points: Mapping[str, tuple[float, float]], caption: str) -> None:
    """Show what devices reach by operations per byte, and where work lies.

    Args:
        points: for each kind of work its operations per byte, and what was reached in operations a second.
    """
    fig, ax = plots.new_figure(title, "operations per byte", "operations a second", height=3.8)
    x = np.geomspace(0.25, 4096, 200)
    for name, roof in roofs.items():
        ax.plot(x, np.minimum(roof.flops_per_s, x * roof.bytes_per_s), marker="", label=name)
        ax.plot([roof.ridge], [roof.flops_per_s], "k|", markersize=12)
    for (name, (at, reached)), marker in zip(points.items(), cycle(plots.MARKERS[1:]), strict=False):
        ax.plot([at], [reached], marker, color="black", label=name, linestyle="")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks([0.25, 1, 4, 16, 64, 256, 1024, 4096], ["¼", "1", "4", "16", "64", "256", "1024", "4096"])
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8.5)
    plots.show(fig, caption)


def saturation(series: Mapping[str, Sequence[float]], batches: Sequence[int], ridges: Mapping[str, float]) -> Figure:
    """Return operations per byte of decode steps by batch, under the ridges of devices."""
    fig, ax = plots.new_figure("A decode step, by batch", "requests in the batch", "operations per byte", height=3.4)
    for label, values in series.items():
        ax.plot(batches, values, label=label)
    for name, ridge in ridges.items():
        ax.axhline(ridge, color="0.4", linestyle=":")
        ax.annotate(f"ridge of the {name}", (batches[-1], ridge * 1.08), fontsize=8, ha="right")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(batches, [str(b) for b in batches])
    _plain(ax)
    ax.legend(fontsize=8.5)
    return fig


def needs(rows: Mapping[str, Mapping[str, float]], caption: str) -> None:
    """Show the break-even bandwidth of each model on each device as a map with numbers."""
    models = list(next(iter(rows.values())))
    values = np.array([[rows[gpu][model] for model in models] for gpu in rows])
    fig, ax = plots.new_figure("GB a second at which fetching is as fast as computing", height=0.9 + 0.45 * len(rows))
    shades = np.log10(values)
    ax.imshow(shades, aspect="auto")
    low, high = shades.min(), shades.max()
    for (i, j), value in np.ndenumerate(values):
        ink = plots.ink_on((shades[i, j] - low) / ((high - low) or 1))
        ax.annotate(f"{value:.2g}", (j, i), ha="center", va="center", color=ink)
    ax.set_xticks(range(len(models)), models)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.grid(visible=False)
    plots.show(fig, caption)


def thresholds(title: str, rows: Mapping[str, Sequence[float | None]], wires: Sequence[float], caption: str) -> None:
    """Show from how many tokens on a fetch wins, by the bandwidth of the wire; None for never within the range."""
    fig, ax = plots.new_figure(title, "GB a second of the wire", "tokens from which on a fetch wins", height=3.6)
    most = max(n for lengths in rows.values() for n in lengths if n)
    for i, ((name, lengths), colour) in enumerate(zip(rows.items(), plots.OKABE_ITO, strict=False)):
        pairs = [(wire, n) for wire, n in zip(wires, lengths, strict=True) if n]
        ax.plot([wire for wire, _ in pairs], [n for _, n in pairs], label=name, color=colour)
        if never := [wire for wire, n in zip(wires, lengths, strict=True) if not n]:
            ax.plot(never, [1.5 * 1.3**i * most] * len(never), "x", color=colour)
    ax.annotate("×: never below 131,072 tokens", (0.99, 0.93), xycoords="axes fraction", ha="right", fontsize=8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    for name, gbps in WIRES.items():
        ax.axvline(gbps, color="0.4", linestyle=":")
        ax.annotate(name, (gbps, 1.05), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
    ax.set_title(title, pad=22)
    ticks = [0.3, 1, 3, 10, 30]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.legend(loc="center right")
    plots.show(fig, caption)


def two_sides(
    title: str, lengths: Sequence[int], lines: Mapping[str, Sequence[float]], points: Mapping[str, Sequence[float]]
) -> Figure:
    """Return milliseconds by length: computed lines, and measured points in the same colour."""
    fig, ax = plots.new_figure(title, "tokens of the prefix", "milliseconds", height=3.4)
    for (name, ms), colour, marker in zip(lines.items(), plots.OKABE_ITO, plots.MARKERS, strict=False):
        ax.plot(lengths, ms, color=colour, marker="", label=name)
        if name in points:
            ax.plot(lengths, points[name], marker, color=colour, label=f"{name}, published")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(lengths, [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths])
    _plain(ax)
    ax.legend(fontsize=8.5)
    return fig


def stages(title: str, ways: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], caption: str) -> None:
    """Show when each stage works on which window.

    Args:
        ways: for each way, for each stage, begin and end in milliseconds of one window after the other.
    """
    rows = [(way, stage) for way in ways for stage in ways[way]]
    fig, ax = plots.new_figure(title, "milliseconds", height=0.9 + 0.3 * len(rows))
    for y, (way, stage) in enumerate(rows):
        for window, (begin, end) in enumerate(ways[way][stage]):
            colour = plots.OKABE_ITO[window % 6]
            ax.barh(y, end - begin, left=begin, color=colour, edgecolor="white", height=0.75)
            if (end - begin) * 40 > max(end for spans in ways[way].values() for _, end in spans):
                ax.annotate(str(window + 1), ((begin + end) / 2, y), ha="center", va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [f"{way}: {stage}" for way, stage in rows])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    plots.show(fig, caption)


def race_figure(lengths: Sequence[int], times: Sequence[float], at: float) -> Figure:
    """Return the time of fetching by that of computing, by length, and where fetching begins to win."""
    title = "Time of fetching ÷ time of computing"
    fig, ax = plots.new_figure(title, "tokens of the prefix", "below 1, a fetch wins", height=3.2)
    ax.plot(lengths, times, marker="")
    ax.axhline(1, color="0.4", linestyle=":")
    if lengths[0] <= at <= lengths[-1]:
        ax.plot([at], [1], "o", color="black")
        ax.annotate(f"{at:,.0f} tokens", (at, 1), xytext=(4, 8), textcoords="offset points", fontsize=8.5)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ticks = [n for n in (256, 1024, 4096, 16384, 65536) if lengths[0] <= n <= lengths[-1]]
    ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
    low, high = min(*times, 0.5), max(*times, 2)
    shown = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low * 0.8 <= tick <= high * 1.2]
    ax.set_ylim(low * 0.8, high * 1.2)
    ax.set_yticks(shown)
    _plain(ax)
    return fig


def held(tried: Mapping[str, Mapping[str, bool]]) -> Markdown:
    """Return a table of conclusions: whether each holds in each case."""
    words = {True: "holds", False: "does not"}
    names = next(iter(tried.values()))
    return table([{"conclusion": name} | {case: words[tried[case][name]] for case in tried} for name in names])


def show_results(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Show what `bench gpu` measured on GPUs: shares of the roof, the load path, break-even bandwidths."""
    for name, result in results.items():
        print(f"measured on {name}: {result['machine']}")
        for rows, columns in SHOWN.items():
            shown = [{column: _short(row[column]) for column in columns} for row in result[rows]]
            if shown:
                display(table(shown))  # type: ignore[no-untyped-call]
    if not results:
        print("There is no GPU result yet: gpu-mine.json would be shown here.")


def _short(value: Any) -> object:
    return f"{value:.3g}" if isinstance(value, float) else value


def _plain(ax: Axes) -> None:
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
