"""The drawings of notebook 06: the tiers, where a request's time goes, curves of fetching and computing, a timeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvlab.course import plots
from kvlab.course.pictures import Flow, Step
from kvlab.engine.fetch import Span

TIERS = Flow(
    [
        Step("device", "pages, shared", marked=True),
        Step("host memory", "blocks, copied"),
        Step("store", "records, fetched and checked"),
        Step("nowhere", "computed"),
    ],
    columns=4,
)
STAGES = ("fetch", "unpack", "copy")


def waterfall(requests: Mapping[str, Mapping[str, float]], claims: str) -> None:
    """Show where the time to the first token goes: a bar for each request, cut into stages in milliseconds."""
    fig, ax = plots.new_figure("Where the time goes", "milliseconds", height=0.9 + 0.42 * len(requests))
    last = [[*parts][-1] for parts in requests.values()]
    stages = dict.fromkeys([stage for parts in requests.values() for stage in parts if stage not in last] + last)
    for stage, colour, hatch in zip(stages, plots.OKABE_ITO, plots.hatches(), strict=False):
        begins = [_before(parts, stage) for parts in requests.values()]
        lengths = [parts.get(stage, 0.0) for parts in requests.values()]
        ax.barh([*requests], lengths, left=begins, color=colour, hatch=hatch, edgecolor="white", label=stage)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend(loc="upper right")
    plots.show(fig, claims)


def _before(parts: Mapping[str, float], stage: str) -> float:
    """Milliseconds of the stages before one."""
    total = 0.0
    for name, length in parts.items():
        if name == stage:
            break
        total += length
    return total


def crossing(tokens: Sequence[int], seconds: Mapping[str, Sequence[float]], caption: str) -> None:
    """Show seconds over prompt lengths, both on logarithmic axes."""
    fig, ax = plots.new_figure("Fetch or compute", "tokens of the prefix", "milliseconds")
    for name, marker in zip(seconds, "osd^", strict=False):
        ax.plot(tokens, [1000 * t for t in seconds[name]], marker=marker, label=name)
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(list(tokens), [f"{n:,}" for n in tokens])
    ax.minorticks_off()
    ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1))  # inside it would lie on a curve
    plots.show(fig, caption)


def timeline(trace: Sequence[Span]) -> None:
    """Show what each stage of a fetch did when, window by window."""
    begin = min(span.begin for span in trace)
    fig, ax = plots.new_figure("One fetch, in windows", "milliseconds", height=2.4)
    for span in trace:
        y = STAGES.index(span.stage)
        left, width = 1000 * (span.begin - begin), 1000 * (span.end - span.begin)
        ax.barh(y, width, left=left, color=plots.OKABE_ITO[span.window % 6], edgecolor="white", height=0.7)
        if span.stage == "fetch":
            ax.text(left + width / 2, y, str(span.window + 1), ha="center", va="center", size=8)
    ax.set_yticks(range(len(STAGES)), STAGES)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    windows = 1 + max(span.window for span in trace)
    total, elapsed = sum(span.end - span.begin for span in trace), max(span.end for span in trace) - begin
    told = f"one stage after the other {1000 * total:.0f} ms, overlapped {1000 * elapsed:.0f} ms"
    plots.show(fig, f"{windows} windows; {told}; two stages at once: {overlaps(trace)}.")


def overlaps(trace: Sequence[Span]) -> bool:
    """Whether a window was being unpacked or copied while a later one was being fetched."""
    fetches = [span for span in trace if span.stage == "fetch"]
    others = [span for span in trace if span.stage != "fetch"]
    return any(
        later.window > earlier.window and max(later.begin, earlier.begin) < min(later.end, earlier.end)
        for later in fetches
        for earlier in others
    )
