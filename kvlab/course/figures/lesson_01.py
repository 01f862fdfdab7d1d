"""The drawings of notebook 01: who looks at whom, where two requests part, and the size of one conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from torch import Tensor

from kvlab.course import plots

FAMILIES = ("MHA", "GQA", "MQA", "MLA")
GPU_GIB = 80


def attention_map(weights: Tensor, words: Sequence[str], caption: str) -> None:
    """Show the attention weights [T, T] of a few words: a row for each query, a column for each key."""
    fig, ax = plots.new_figure("Who looks at whom", "key and value of", "query of", height=3.4)
    image = ax.imshow(weights, vmin=0, vmax=1)
    ax.set_xticks(range(len(words)), words)
    ax.set_yticks(range(len(words)), words)
    ax.grid(False)
    for row in range(len(words)):
        for column in range(row + 1):
            weight = float(weights[row, column])
            ax.text(column, row, f"{weight:.2f}", ha="center", va="center", color=plots.ink_on(weight))
    fig.colorbar(image, label="attention weight")
    plots.show(fig, caption)


def parting(apart: Sequence[float], at: int, caption: str) -> None:
    """Show how far the KV of two requests is apart at each position; their tokens differ from position `at` on."""
    fig, ax = plots.new_figure(f"KV of two requests that share {at} tokens", "position", "largest difference")
    ax.plot(apart, marker="")
    ax.axvline(at, color="black", linestyle="--", marker="")
    ax.text(at - 3, max(apart) * 0.9, "here they part", ha="right")
    plots.show(fig, caption)


def conversation(gib: Mapping[str, float]) -> Figure:
    """Bars of the KV of one conversation in GiB for each family of attention, and the memory of a large GPU."""
    fig, ax = plots.new_figure("KV of one conversation", "GiB", height=2.6)
    for name in reversed(list(gib)):
        i = FAMILIES.index(name)
        ax.barh(name, gib[name], color=plots.OKABE_ITO[i], hatch=plots.HATCHES[i], edgecolor="white")
    ax.axvline(GPU_GIB, color="black", linestyle="--", marker="")
    ax.set_xscale("log")
    ax.set_xlim(0.01, 2000)
    ax.grid(axis="y", visible=False)
    return fig
