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


def layers(words: Sequence[str]) -> None:
    """Show the tokens of a prompt in three layers, and what the last one looks at: nothing looks at the last one."""
    fig, ax = plots.new_figure("The last word looks back, in every layer; nobody looks at it", height=2.9)
    T = len(words)
    for layer in range(2):
        for query in range(T):
            new = query == T - 1
            for key in range(query + 1):
                style = {"arrowstyle": "-|>", "color": plots.OKABE_ITO[1] if new else "#9aa5b1", "shrinkB": 11}
                ax.annotate(
                    "", (query, layer + 1), (key, layer), arrowprops={**style, "linewidth": 1.6 if new else 0.8}
                )
    for layer in range(3):
        ax.scatter(range(T - 1), [layer] * (T - 1), s=320, color=plots.OKABE_ITO[0], zorder=3)
        ax.scatter([T - 1], [layer], s=320, marker="s", color=plots.OKABE_ITO[1], zorder=3)
    ax.set_xticks(range(T), words)
    ax.set_yticks(range(3), ["input", "after layer 0", "after layer 1"])
    ax.set(xlim=(-0.4, T - 0.6), ylim=(-0.4, 2.4))
    ax.grid(visible=False)
    plots.show(fig, f"arrows from {T - 1} old words to '{words[-1]}', none from '{words[-1]}' to an old word.")


def blocks_of(requests: Mapping[str, Sequence[str]]) -> None:
    """Show requests as rows of blocks. Equal letters are equal tokens; a block is loaded while all before it agree.

    Args:
        requests: the letters of each request's full blocks. What the requests before it have stored can be loaded.
    """
    fig, ax = plots.new_figure("Three requests in blocks of 64 tokens: outlined blocks are loaded", height=2.2)
    stored: set[tuple[str, ...]] = set()
    loaded = {}
    for row, (name, letters) in enumerate(requests.items()):
        prefixes = [tuple(letters[: i + 1]) for i in range(len(letters))]
        hits = next((i for i, prefix in enumerate(prefixes) if prefix not in stored), len(prefixes))
        loaded[name] = hits
        stored |= set(prefixes)
        for i, letter in enumerate(letters):
            edge = "black" if i < hits else "white"
            colour = plots.OKABE_ITO[4 if letter.isupper() else 5]
            ax.barh(row, 0.9, left=i, height=0.7, color=colour, edgecolor=edge, linewidth=2)
            ax.text(i + 0.45, row, letter, ha="center", va="center", size=9)
    ax.set_yticks(range(len(requests)), list(requests))
    ax.set_xticks([])
    ax.invert_yaxis()
    ax.grid(visible=False)
    plots.show(fig, ", ".join(f"{name}: {hits} of {len(requests[name])} blocks" for name, hits in loaded.items()) + ".")


def conversation(gib: Mapping[str, float]) -> Figure:
    """Bars of the KV of one conversation in GiB for each family of attention, and the memory of a large GPU."""
    fig, ax = plots.new_figure("KV of one conversation", "GiB", height=2.6)
    for name in reversed(list(gib)):
        i = FAMILIES.index(name)
        ax.barh(name, gib[name], color=plots.OKABE_ITO[i], hatch=plots.HATCHES[i], edgecolor="white")
        ax.annotate(f" {gib[name]:.2f}", (gib[name], name), va="center")
    ax.axvline(GPU_GIB, color="black", linestyle="--", marker="")
    ax.text(GPU_GIB, -0.45, f" {GPU_GIB} GiB GPU", va="bottom")
    ax.set_xlim(0, 1.15 * max(GPU_GIB, *gib.values()))
    ax.grid(axis="y", visible=False)
    return fig
