"""The drawings of notebook 02: reserved room, memory as strips, block tables over a pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from kvlab.course import plots

FREE, SHARED = "#eceff3", "#E69F00"


def reservations(lengths: Sequence[int], reserved: int) -> None:
    """Show for each request the room that is reserved for it, and the part that holds its tokens."""
    fig, ax = plots.new_figure("A server that reserves for the longest answer", "tokens", "request")
    rows = range(1, len(lengths) + 1)
    ax.barh(rows, [reserved] * len(rows), color=FREE, edgecolor="grey", label="reserved")
    ax.barh(rows, list(lengths), color=plots.OKABE_ITO[0], label="tokens")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    used, room = sum(lengths), reserved * len(lengths)
    plots.show(fig, f"{len(lengths)} requests have {used:,} tokens in room for {room:,}: {used / room:.0%} of it.")


def strips(memories: Mapping[str, Sequence[int | None]], per_row: int = 64) -> None:
    """Show memories as strips of slots, one colour for each owner; free slots are empty."""
    height = sum(-(-len(memory) // per_row) for memory in memories.values()) + len(memories)
    fig, ax = plots.new_figure("Who has which slot: the number is the request's", height=0.5 + 0.27 * height)
    y, ticks = 0, []
    for name, memory in memories.items():
        ticks.append((y + (-(-len(memory) // per_row) - 1) / 2, name))
        for i, owner in enumerate(memory):
            row, column = divmod(i, per_row)
            colour = FREE if owner is None else plots.OKABE_ITO[owner % 6]
            ax.barh(y + row, 0.94, left=column, height=0.86, color=colour, align="center")
            if owner is not None and (i % per_row == 0 or memory[i - 1] != owner):
                ax.text(column + 0.1, y + row, str(owner), size=6, va="center", clip_on=True)
        y += -(-len(memory) // per_row) + 1
    ax.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    ax.set_xticks([])
    ax.set(xlim=(0, per_row), ylim=(y - 1.4, -0.6))
    ax.grid(visible=False)
    free = ", ".join(f"{name} {sum(owner is None for owner in memory)}" for name, memory in memories.items())
    holes = ", ".join(f"{name} {longest_hole(memory)}" for name, memory in memories.items())
    plots.show(fig, f"free slots: {free}; the longest row of free slots: {holes}.")


def longest_hole(memory: Sequence[int | None]) -> int:
    """The number of slots in the longest run of free ones."""
    longest = run = 0
    for owner in memory:
        run = run + 1 if owner is None else 0
        longest = max(longest, run)
    return longest


def block_tables(tables: Mapping[str, Sequence[int]], lengths: Mapping[str, int], pages: int, size: int) -> Figure:
    """The pages of a pool, and above them the block tables of requests, whose entries point to them.

    Args:
        tables: page numbers in the order of the tokens, by request.
        lengths: tokens of each request.
        pages: pages of the pool.
        size: tokens in a page.
    """
    refs = Counter(page for table in tables.values() for page in table)
    shared = " (orange: in several tables)" if max(refs.values(), default=0) > 1 else ""
    fig, ax = plots.new_figure(f"Block tables and a pool of {pages} pages of {size} tokens{shared}", height=3.4)
    for page in range(pages):
        colour = SHARED if refs[page] > 1 else plots.OKABE_ITO[5] if refs[page] else FREE
        ax.barh(0, 0.9, left=page, height=0.8, color=colour, edgecolor="grey")
        ax.text(page + 0.45, 0, f"{page}", ha="center", va="center", size=7)
    top = len(tables)
    for row, (name, table) in enumerate(tables.items()):
        y = 1.6 + (top - row - 1) * 0.9
        ax.text(-0.3, y, name, ha="right", va="center")
        for i, page in enumerate(table):
            filled = min(size, lengths[name] - i * size) / size
            ax.barh(y, 0.9, left=i, height=0.6, color=FREE, edgecolor="grey")
            ax.barh(y, 0.9 * filled, left=i, height=0.6, color=SHARED if refs[page] > 1 else plots.OKABE_ITO[5])
            ax.text(i + 0.45, y, str(page), ha="center", va="center", size=7)
            ax.plot([i + 0.45, page + 0.45], [y - 0.32, 0.42], color="#b8c0cc", linewidth=0.6, marker="", zorder=0)
    ax.text(-0.3, 0, "pool", ha="right", va="center")
    ax.set(xlim=(-0.2, pages), ylim=(-0.6, 1.2 + top * 0.9))
    ax.axis("off")
    return fig


def show_block_tables(tables: Mapping[str, Sequence[int]], lengths: Mapping[str, int], pages: int, size: int) -> None:
    """Show `block_tables` with a caption."""
    refs = Counter(page for table in tables.values() for page in table)
    shared = sum(count > 1 for count in refs.values())
    text = f"pages in use: {len(refs)} of {pages}; pages in more than one table: {shared}."
    plots.show(block_tables(tables, lengths, pages, size), text)
