"""The drawings of notebook 04: bytes as pictures, channels, the header, formats compared, damaged records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from kvlab.core import record
from kvlab.core.record import Format
from kvlab.course import plots
from kvlab.course.widgets import Explorer

HEADER = (
    ("magic", 4),
    ("version, kind, codec,\nprecision, dtype, seal,\nnumber of dims, 0", 8),
    ("key id", 4),
    ("the dims: 8 integers,\nzeros where not used", 32),
    ("payload\nlength", 8),
    ("zeros", 8),
    ("block key", 32),
    ("checksum, 24 zeros", 32),
)
"""The groups of fields of a record's header, and their sizes in bytes."""
CHECKS = ("128 bytes", "magic", "version", "payload length", "checksum", "key", "precision", "dims", "a hit")
"""The checks of a reader, in their order, and what is left after them."""


def byte_map(keys: Tensor, entropy: Mapping[str, Sequence[float]]) -> None:
    """Show keys [T, D] as bytes, fp16 above and bf16 below: as stored, the low bytes alone, the high bytes alone.

    Args:
        entropy: bits of the low byte and of the high byte, for "fp16" and "bf16".
    """
    T, D = keys.shape
    fig, ax = plots.new_figure(f"{T * D:,} numbers of attention keys as bytes: fp16 above, bf16 below", height=3.9)
    gap = np.full((4, 4 * D + 8), np.nan)
    ax.imshow(
        np.vstack([_strip(keys, torch.float16), gap, _strip(keys, torch.bfloat16)]),
        aspect="auto",
        interpolation="nearest",
    )
    ax.set_xticks([D, 2 * D + 4 + D / 2, 3 * D + 8 + D / 2], ["as stored, mixed", "low bytes", "high bytes"])
    ax.set_yticks([T / 2, T + 4 + T / 2], ["fp16", "bf16"])
    ax.grid(visible=False)
    steady = int(((keys > 0).all(0) | (keys < 0).all(0)).sum())
    bits = ", ".join(f"{name} {high:.1f} bits" for name, (_, high) in entropy.items())
    plots.show(
        fig,
        f"high bytes repeat (entropy: {bits}), low bytes do not; {steady} of {D} channels keep their sign.",
    )


def _strip(keys: Tensor, dtype: torch.dtype) -> NDArray[np.float64]:
    T, D = keys.shape
    mixed = keys.contiguous().to(dtype).view(torch.uint8).numpy().reshape(T, 2 * D)
    gap = np.full((T, 4), np.nan)
    return np.hstack([mixed, gap, mixed[:, ::2], gap, mixed[:, 1::2]])


def channel_spread(keys: Tensor) -> None:
    """Show how much each channel of the keys [N, L, H, T, D] varies over texts and tokens, as a map."""
    _, L, H, _, D = keys.shape
    spread = keys.std(dim=(0, 3)).flatten(0, 1)  # [L * H, D]
    fig, ax = plots.new_figure("How much each key channel varies", "channel", f"{H} KV heads each", height=3.4)
    image = ax.imshow(spread, aspect="auto", interpolation="nearest")
    fig.colorbar(image, label="standard deviation")
    ax.set_yticks([H * layer + (H - 1) / 2 for layer in range(L)], [f"layer {layer}" for layer in range(L)])
    ax.set_xticks(range(0, D, 8))
    ax.grid(visible=False)
    ratio = spread.amax(1) / spread.median(1).values
    top = int(ratio.argmax())
    plots.show(
        fig,
        f"a few channels stand out; in head {top % H} of layer {top // H} one varies "
        f"{ratio[top]:.1f} times as much as the median channel.",
    )


def header() -> None:
    """Show the header of a record: four rows of 32 bytes."""
    fig, ax = plots.new_figure("The header: four rows of 32 bytes", "byte in the row", height=3.2)
    at = 0
    for number, (name, size) in enumerate(HEADER):
        row, column = divmod(at, 32)
        for begin in range(at, at + size, 16):
            piece = min(16, at + size - begin)
            colour = plots.OKABE_ITO[number % 6]
            ax.barh(begin // 32, piece, left=begin % 32, height=0.9, color=colour, alpha=0.45)
        ax.text(
            column + min(size, 32 - column) / 2,
            row,
            name,
            ha="center",
            va="center",
            size=7 if name.count("\n") > 1 else 9,
        )
        at += size
    ax.set_yticks(range(at // 32), [f"from byte {32 * row}" for row in range(at // 32)])
    ax.set_xticks(range(0, 33, 4))
    ax.set_xlim(0, 32)
    ax.invert_yaxis()
    ax.grid(visible=False)
    half = sum(size for name, size in HEADER if name in ("block key", "checksum, 24 zeros"))
    plots.show(fig, f"{len(HEADER)} groups of fields fill {at} bytes; block key and checksum take {half} of them.")


def front(results: Mapping[str, tuple[float, float]], best: Sequence[str]) -> None:
    """Show formats by bytes per token and by the change of the next token's probability.

    Args:
        results: bytes per token and change in percent, by format, for example "int8 zstd".
        best: the formats on the Pareto front, smallest first.
    """
    fig, ax = plots.new_figure("Smaller, or closer", "bytes per token", "change of probability, %", height=3.8)
    sizes, changes = [results[name][0] for name in best], [results[name][1] for name in best]
    ax.plot(sizes, changes, color="grey", marker="")
    precisions = list(dict.fromkeys(name.split()[0] for name in results))
    for name, (size, change) in results.items():
        style = precisions.index(name.split()[0])
        ax.plot(size, change, plots.MARKERS[style], color=plots.OKABE_ITO[style], markersize=8)
        place, align = ((-8, -12), "right") if name in best else ((8, -14 if "gzip" in name else 6), "left")
        ax.annotate(name, (size, change), place, textcoords="offset points", ha=align)
    ax.set_yscale("log")
    ax.set_xlim(0, 1.2 * max(size for size, _ in results.values()))
    ax.set_ylim(min(changes) / 3, 3 * max(changes))
    plots.show(fig, f"nothing is both smaller and closer than: {', '.join(best)}.")


def hit_times(gbit: Sequence[float], times: Mapping[str, Sequence[float]], recompute: float) -> None:
    """Show the time of a hit in milliseconds over the speed of the network, for each format, beside recomputing."""
    fig, ax = plots.new_figure("A hit of 512 tokens", "network, Gbit/s", "network + decode, ms", 3.8)
    for name, milliseconds in times.items():
        ax.plot(gbit, milliseconds, label=name)
    ax.axhline(recompute, color="black", linestyle="--", marker="", label="recompute")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(list(gbit), [f"{speed:g}" for speed in gbit])
    ax.legend(ncols=2)
    first, last = (min(times, key=lambda name: times[name][at]) for at in (0, -1))
    plots.show(
        fig,
        f"at {gbit[0]:g} Gbit/s {first} is first with {times[first][0]:.0f} ms; "
        f"at {gbit[-1]:g} Gbit/s a hit takes {times[last][-1]:.1f} ms at best.",
    )


def damage(reasons: Mapping[str, str], values: Mapping[str, bytes]) -> None:
    """Show how far each value gets through the checks of a reader.

    Args:
        reasons: why the value is a miss, or "a hit", by the value's name.
        values: the values, by the same names.
    """
    stage = {name: _stage(reason, values[name]) for name, reason in reasons.items()}
    order = sorted(stage, key=lambda name: CHECKS.index(stage[name]))
    fig, ax = plots.new_figure("How far each value gets", "checks, in their order", height=3.2)
    for y, name in enumerate(order):
        x, hit = CHECKS.index(stage[name]), stage[name] == "a hit"
        ax.plot([-0.5, x], [y, y], color="grey", marker="")
        ax.plot(x, y, "o" if hit else "X", color=plots.OKABE_ITO[2 if hit else 1], markersize=10)
    ax.set_xticks(range(len(CHECKS)), [check.replace(" ", "\n") for check in CHECKS], size=8)
    ax.set_yticks(range(len(order)), order)
    ax.invert_yaxis()
    hits = [name for name in order if reasons[name] == "a hit"]
    plots.show(fig, f"first to be stopped: {order[0]}; a hit: {', '.join(hits)}.")


def _stage(reason: str, value: bytes) -> str:
    """The check that gives this reason; two of them say "length"."""
    if reason == "length":
        return "128 bytes" if len(value) < record.HEADER_BYTES else "payload length"
    return reason


def payload_explorer(block: Tensor) -> Explorer:
    """Controls for precision, codec and padding of a block [L, P, H, B, D], with its payload as a picture."""

    def packed(precision: str, codec: str, padding: int) -> tuple[bytes, float]:
        padded, key = block.clone(), bytes(32)
        padded[:, :, :, block.shape[3] - padding :] = 0
        fmt = Format(precision, codec)
        value = b"".join(record.encode(padded, key, fmt))
        back = record.decode(value, key, fmt, padded.shape)
        return value[record.HEADER_BYTES :], (back - padded).abs().max().item()

    def draw(precision: str, codec: str, padding: int) -> Figure:
        fig, ax = plots.new_figure(f"The first 4,096 bytes: raw, and {codec}", height=2.6)
        raw, chosen = (_square(packed(precision, way, padding)[0]) for way in ("raw", codec))
        ax.imshow(np.hstack([raw, np.full((32, 8), np.nan), chosen]), aspect="auto", vmin=0, vmax=255)
        ax.axis("off")
        return fig

    def describe(precision: str, codec: str, padding: int) -> str:
        payload, worst = packed(precision, codec, padding)
        size = len(payload) + record.HEADER_BYTES
        return (
            f"{precision} {codec}, {padding} of {block.shape[3]} tokens empty: ≈{block.nbytes / size:.1f}x smaller "
            f"than float32 (≈{100 * (1 - size / block.nbytes):.0f}% saved), worst error ≈{worst:.4f}."
        )

    return Explorer(
        draw,
        describe,
        precision=["bf16", "fp32", "fp16", "int8", "int4"],
        codec=["zstd", "gzip", "raw"],
        padding=(0, 0, block.shape[3] - 1),
    )


def _square(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data[:4096].ljust(4096, b"\0"), np.uint8).reshape(32, 128)
