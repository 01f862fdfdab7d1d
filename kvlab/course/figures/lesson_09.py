"""The drawings of notebook 09: where a cache fits in, the calls of a vLLM connector, time to the first token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvlab.course import plots
from kvlab.course.pictures import Flow, Step

SEAM = Flow(
    [
        Step("prompt", "token ids"),
        Step("model(ids, cache)", "reads and extends the cache"),
        Step("cache object", "keys and values by layer", marked=True),
        Step("next call", "passes it again"),
    ],
    columns=4,
)
GENERATE = Flow(
    [
        Step("look up", "which blocks are stored?"),
        Step("load", "into a DynamicCache", marked=True),
        Step("generate", "all ids, a mask of ones"),
        Step("save", "new whole blocks", marked=True),
    ],
    columns=4,
)
CALLS = Flow(
    [
        Step("look up", "scheduler: what is stored?", marked=True),
        Step("set aside", "the request gets blocks"),
        Step("fetch, check", "worker: in threads", marked=True),
        Step("copy in", "worker: between two steps", marked=True),
        Step("run", "computes what did not come"),
        Step("copy out", "worker: whole blocks", marked=True),
        Step("queue", "written in the background", marked=True),
        Step("next engine", "finds them"),
    ],
    columns=4,
)


def ttft(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Show the time to the first token, computed and out of Redis, for each model."""
    series = {
        "computed": [row["cold_ms"] for row in rows.values()],
        "out of Redis": [row["loaded_ms"] for row in rows.values()],
    }
    sooner = all(row["loaded_ms"] < row["cold_ms"] for row in rows.values())
    tokens = {row["tokens"] for row in rows.values()}
    caption = f"a prompt of {tokens.pop():,} tokens in vLLM; out of Redis sooner for every model: {sooner}."
    plots.groups("Time to the first token", [*rows], series, "milliseconds", caption)
