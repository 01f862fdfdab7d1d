"""The drawings of notebook 05: a load in steps, calls through a circuit breaker, stores that break and recover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from IPython.display import HTML

from kvlab.course import plots
from kvlab.course.pictures import Flow, Step


def load_steps() -> Flow:
    """The steps of a load from Redis."""
    steps = [
        Step("tokens", "64 a block"),
        Step("keys", "chained SHA-256"),
        Step("one round trip", "GET kv:… for each key", marked=True),
        Step("check", "checksum and key"),
        Step("KV", "up to the first miss"),
    ]
    return Flow(steps, columns=5)


def breaker_timeline(seconds: Sequence[float], outcomes: Sequence[str], hung: tuple[float, float]) -> None:
    """Show when calls were hits, waited for the deadline ("timeout") or were refused ("breaker").

    Args:
        hung: from when to when the server did not answer.
    """
    fig, ax = plots.new_figure("Calls to a Redis that hangs for a while", "seconds", height=2.2)
    kinds = ("hit", "timeout", "breaker")
    for y, kind in enumerate(kinds):
        at = [when for when, outcome in zip(seconds, outcomes, strict=True) if outcome == kind]
        ax.plot(at, [y] * len(at), linestyle="")
    ax.axvspan(*hung, color="grey", alpha=0.2, label="server hangs")
    ax.set_yticks(range(len(kinds)), ["hit", "timeout", "refused by\nthe breaker"])
    ax.set_ylim(-0.6, 2.6)
    ax.legend(loc="upper right")
    hits, timeouts, refused = (outcomes.count(kind) for kind in kinds)
    late = [when for when, outcome in zip(seconds, outcomes, strict=True) if outcome != "hit" and when >= hung[1]]
    again = min(when for when, outcome in zip(seconds, outcomes, strict=True) if outcome == "hit" and when >= hung[1])
    plots.show(
        fig,
        f"{hits} hits, {timeouts} timeouts, {refused} calls refused. The server answers again from second "
        f"{hung[1]} on; {len(late)} more calls are refused, and the first hit is at second {again}.",
    )


def fault_table(rows: Mapping[str, Mapping[str, Sequence[str]]]) -> HTML:
    """A table: what a write and a read gave, for each fault (row) and each moment (column)."""
    moments = list(next(iter(rows.values())))
    head = "".join(f"<th>{moment}: write, read</th>" for moment in moments)
    lines = [
        f"<tr><td>{fault}</td>" + "".join(f"<td>{', '.join(row[moment])}</td>" for moment in moments) + "</tr>"
        for fault, row in rows.items()
    ]
    table = f"<table><tr><th>fault</th>{head}</tr>{''.join(lines)}</table>"
    return HTML(table)  # type: ignore[no-untyped-call]
