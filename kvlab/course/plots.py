"""Plot style of the course: colours that colour-blind readers can distinguish, fixed sizes, computed captions.

The palette is Okabe and Ito's. Series also differ by marker or hatch, so that they can be
distinguished in a grey print. A caption is a sentence computed from the data. The caption is
printed under the plot for readers without the picture, and the notebook tests compare the captions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
from cycler import cycler
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvlab.lab.streams import accept_any_text

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "ooo", "--")
MAP = "cividis"
WIDTH, HEIGHT = 7.2, 3.2


def use_style() -> None:
    """Set matplotlib's defaults for the course. Every notebook calls this once."""
    plt.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=OKABE_ITO) + cycler(marker=MARKERS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "grid.alpha": 0.3,
            "figure.figsize": (WIDTH, HEIGHT),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "image.cmap": MAP,
            "legend.frameon": False,
            "lines.markersize": 5,
        }
    )


def new_figure(title: str, xlabel: str = "", ylabel: str = "", height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure of the course's width with one titled, labelled plot."""
    fig, ax = plt.subplots(figsize=(WIDTH, height))
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return fig, ax


def lines(
    title: str, x: Sequence[Any], series: Mapping[str, Sequence[Any]], xlabel: str, ylabel: str, caption: str
) -> None:
    """Show one line for each series over the same `x`, from 0 up, with a caption."""
    fig, ax = new_figure(title, xlabel, ylabel)
    for label, y in series.items():
        ax.plot(x, y, label=label)
    ax.set_ylim(bottom=min(0, *(float(v) for y in series.values() for v in y)))
    if len(series) > 1:
        ax.legend()
    show(fig, caption)


def bars(title: str, values: Mapping[str, float], xlabel: str, caption: str, number: str = ",.0f") -> None:
    """Show one horizontal bar for each name, the first on top, with its value beside it, and a caption.

    Args:
        number: how a value is written, as in `format`.
    """
    fig, ax = new_figure(title, xlabel, height=0.9 + 0.36 * len(values))
    for name, colour, hatch in zip(values, cycle(OKABE_ITO), hatches(), strict=False):
        ax.barh(name, values[name], color=colour, hatch=hatch, edgecolor="white")
        ax.annotate(f" {values[name]:{number}}", (values[name], name), va="center")
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.grid(axis="y", visible=False)
    show(fig, caption)


def groups(
    title: str,
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    ylabel: str,
    caption: str,
    number: str | None = None,
) -> None:
    """Show a group of vertical bars for each name, one bar for each series, with a caption.

    Args:
        number: how a value is written above its bar, as in `format`; None: it is not written.
    """
    fig, ax = new_figure(title, ylabel=ylabel)
    width = 0.8 / len(series)
    for i, (label, colour, hatch) in enumerate(zip(series, cycle(OKABE_ITO), hatches(), strict=False)):
        places = [at + (i - (len(series) - 1) / 2) * width for at in range(len(names))]
        ax.bar(places, series[label], width, label=label, color=colour, hatch=hatch, edgecolor="white")
        for place, value in zip(places, series[label] if number is not None else (), strict=False):
            ax.annotate(f"{value:{number}}", (place, value), ha="center", va="bottom", fontsize=8)
    ax.set_xticks(range(len(names)), names)
    ax.grid(axis="x", visible=False)
    ax.margins(y=0.25)  # room for the legend above the bars
    ax.legend(loc="upper center", ncols=len(series))
    show(fig, caption)


def show(fig: Figure, caption: str) -> None:
    """Display a figure once, with its caption below it and as its alternative text."""
    accept_any_text()  # for a notebook that runs as a program in a terminal
    display(fig, metadata={"image/png": {"alt": caption}})  # type: ignore[no-untyped-call]
    plt.close(fig)
    print(f"Figure: {caption}")


def hatches() -> Iterator[str]:
    """Hatches for bars, in the order of the colours."""
    return cycle(HATCHES)


def ink_on(value: float) -> str:
    """Black or white: the readable text colour on the colour map's colour of a value from 0 to 1."""
    return "black" if value > 0.55 else "white"
