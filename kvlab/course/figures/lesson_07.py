"""Drawings of notebook 07, sharding: blocks on nodes, the ring, and how keys are missed while a node is lost."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvlab.course import plots

RING = 2**64
"""Length of the ring: points and keys are numbers below it."""


def blocks_on_nodes(names: Sequence[bytes], nodes: str, owners: Sequence[str]) -> None:
    """Show which node has each block of one prompt."""
    fig, ax = plots.new_figure(f"{len(names)} blocks of a prompt on {len(nodes)} nodes", height=2.6)
    for i, (name, owner) in enumerate(zip(names, owners, strict=True)):
        n = nodes.index(owner)
        ax.plot([i, _place(n, len(nodes), len(names))], [1, 0], color=plots.OKABE_ITO[n], marker=plots.MARKERS[n])
        ax.text(i, 1.12, f"block {i}\n{name[-32:].hex()[:4]}…", ha="center", size=8)
    for n, node in enumerate(nodes):
        ax.text(_place(n, len(nodes), len(names)), -0.12, f"node {node}", ha="center", va="top", weight="bold")
    ax.set(xlim=(-0.6, len(names) - 0.4), ylim=(-0.35, 1.5))
    ax.axis("off")
    of_node = {node: ", ".join(str(i) for i, owner in enumerate(owners) if owner == node) for node in nodes}
    listed = "; ".join(f"node {node} has blocks {blocks}" for node, blocks in of_node.items())
    plots.show(fig, f"Of the {len(names)} blocks {listed}.")


def ring(points: Sequence[int], owners: Sequence[str], marks: Sequence[int] = ()) -> None:
    """Show a ring with the shares of its nodes; `marks` are the numbers of blocks, drawn inside."""
    nodes = len(set(owners))
    title = f"{nodes} nodes, {len(points) // nodes} points each"
    shares = ", ".join(f"{node} {share:.0%}" for node, share in sorted(ring_shares(points, owners).items()))
    of_marks = [owners[bisect.bisect_left(points, mark) % len(points)] for mark in marks]
    blocks = f" Blocks 0 to {len(marks) - 1} are on {' '.join(of_marks)}." if marks else ""
    plots.show(ring_figure(points, owners, title, marks), f"The nodes' shares of the ring: {shares}.{blocks}")


def ring_shares(points: Sequence[int], owners: Sequence[str]) -> dict[str, float]:
    """The share of the ring that belongs to each node."""
    shares = dict.fromkeys(owners, 0.0)
    for before, point, owner in _arcs(points, owners):
        shares[owner] += (point - before) / RING
    return shares


def ring_figure(points: Sequence[int], owners: Sequence[str], title: str, marks: Sequence[int] = ()) -> Figure:
    """A ring: a dot for each point of a node, an arc before it that belongs to this node, and blocks inside."""
    fig, ax = plots.new_figure(title, height=3.6)
    nodes = sorted(set(owners))
    for before, point, owner in _arcs(points, owners):
        style: dict[str, Any] = {"color": plots.OKABE_ITO[nodes.index(owner)], "linewidth": 7, "solid_capstyle": "butt"}
        ax.plot(*_xy(np.linspace(float(before), float(point), 40)), marker="", **style)
        ax.plot(*_xy(float(point)), "k.", markersize=8 if len(points) < 40 else 3, zorder=3)
        if point - before > RING / 25:
            ax.text(*_xy((before + point) / 2, 1.17), owner, ha="center", va="center")
    _draw_marks(ax, marks)
    ax.set(xlim=(-2.8, 2.8), ylim=(-1.35, 1.35), aspect="equal")
    ax.axis("off")
    return fig


def balance(spread: Mapping[int, Sequence[float]], even: Mapping[str, float]) -> None:
    """Show how full the fullest node is.

    Args:
        spread: by the points of each node of a ring, keys on the fullest node by the mean, for several rings.
        even: the same for rules that are no ring, by their names.
    """
    middle = [statistics.median(ratios) for ratios in spread.values()]
    series: dict[str, Sequence[float]] = {
        "ring, the worst": [max(ratios) for ratios in spread.values()],
        "ring, the median": middle,
        "the mean": [1.0] * len(spread),
    }
    few, many = min(spread), max(spread)
    others = ", ".join(f"{way} {ratio:.2f}" for way, ratio in even.items())
    caption = (
        f"A ring's fullest node has {middle[0]:.2f} times the mean with {few} point each, {middle[-1]:.2f} times with "
        f"{many}. The other rules: {others}."
    )
    points = [str(each) for each in spread]
    plots.lines("Keys on the fullest node", points, series, "points of each node", "times the mean", caption)


def after_a_loss(
    nodes: Sequence[int], there: Sequence[float], usable: Sequence[float], formula: Sequence[float]
) -> None:
    """Show which share of the blocks is there and which can be used after one of so many nodes is lost."""
    off = max(abs(measured - expected) for measured, expected in zip(usable, formula, strict=True))
    series = {"still there": there, "usable": usable}
    few, many = nodes.index(3), len(nodes) - 1
    caption = (
        f"With 3 nodes {there[few]:.0%} of the blocks are there and {usable[few]:.0%} usable, with {nodes[many]} nodes "
        f"{there[many]:.0%} and {usable[many]:.0%}. The formula is at most {100 * off:.1f} points away."
    )
    plots.lines("After one node is lost", nodes, series, "nodes", "share of the blocks", caption)


def outage(runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Show for each run what reading a lost node's keys gave, by quarters of a second.

    Args:
        runs: by what happened ("killed"): `quarters`, from seconds as text to counts by reason ("" is found), and
            `back_s`, after how many seconds all keys were found again.
    """
    fig, axes = plt.subplots(1, len(runs), figsize=(plots.WIDTH, 3.0), sharex=True, sharey=True, squeeze=False)
    reasons = sorted({reason for run in runs.values() for counts in run["quarters"].values() for reason in counts})
    for ax, (what, run) in zip(axes[0], runs.items(), strict=True):
        _draw_quarters(ax, run["quarters"], reasons)
        ax.axvline(0, color="black", linestyle="--", linewidth=2, marker="")
        ax.set(title=f"Node {what}", xlabel="seconds (dashed: it happens)")
    axes[0, 0].set_ylabel("percent of its keys")
    fig.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside right center")
    times = ", ".join(f"{what} {run['back_s']:.1f} s" for what, run in runs.items())
    plots.show(fig, f"The keys of a lost node are misses until its replica has taken over: {times}.")


def node_timeouts(seconds: Mapping[str, Sequence[float]]) -> None:
    """Show how long a killed node's keys are missing, by cluster-node-timeout in ms, for several runs each."""
    timeouts = [int(timeout_ms) / 1000 for timeout_ms in seconds]
    series = {
        "slowest run": [max(runs) for runs in seconds.values()],
        "fastest run": [min(runs) for runs in seconds.values()],
        "the timeout itself": timeouts,
    }
    times = ", ".join(f"{max(runs):.1f} s with {t:.0f} s" for t, runs in zip(timeouts, seconds.values(), strict=True))
    caption = f"By cluster-node-timeout, the slowest run found its key again after {times}."
    plots.lines("How long keys are missing", timeouts, series, "cluster-node-timeout in s", "seconds", caption)


def _draw_quarters(ax: Axes, quarters: Mapping[str, Mapping[str, int]], reasons: Sequence[str]) -> None:
    starts = sorted(quarters, key=float)
    totals = [sum(quarters[start].values()) for start in starts]
    below = np.zeros(len(starts))
    for i, reason in enumerate(reasons):
        counts = [quarters[start].get(reason, 0) for start in starts]
        percent = 100 * np.array(counts) / np.array(totals)
        style: dict[str, Any] = {
            "color": plots.OKABE_ITO[i],
            "hatch": plots.HATCHES[i],
            "edgecolor": "white",
            "linewidth": 0,
        }
        ax.bar([float(s) + 0.125 for s in starts], percent, 0.25, bottom=below, label=reason or "found", **style)
        below += percent


def _place(n: int, nodes: int, blocks: int) -> float:
    """Where node n stands under a row of blocks."""
    return (n + 0.5) * blocks / nodes - 0.5


def _arcs(points: Sequence[int], owners: Sequence[str]) -> list[tuple[int, int, str]]:
    """Begin, end and node of each arc."""
    return list(zip([points[-1] - RING, *points[:-1]], points, owners, strict=True))


def _xy(number: Any, radius: Any = 1.0) -> tuple[Any, Any]:
    """The place of a number on the ring, clockwise from the top."""
    angle = np.pi / 2 - 2 * np.pi * number / RING
    return radius * np.cos(angle), radius * np.sin(angle)


def _draw_marks(ax: Axes, marks: Sequence[int]) -> None:
    """Dots inside the ring, each with its index; neighbours' indices stand at two depths."""
    for rank, (number, i) in enumerate(sorted((number, i) for i, number in enumerate(marks))):
        inner = 0.74 - 0.2 * (rank % 2)
        x, y = _xy(float(number), np.array([0.92, inner + 0.07]))
        ax.plot(x, y, "o-", color="grey", linewidth=0.8, markersize=4, markevery=[0])
        ax.text(*_xy(float(number), inner), str(i), ha="center", va="center", size=8)
