"""Counters of the connector, for vLLM's log and for Prometheus.

Requests are counted by outcome, when they get their first blocks:

    hit       all blocks before the last token were on the device or in the store
    partial   some were in the store
    local     none was asked for: the device had them
    short     the prompt has no whole block before its last token
    absent    the store has none of the blocks that are asked for
    refused   the first record was not usable: damaged, forged, or of another version
    failed    the store did not answer
    shadow    the blocks were there, and are computed to be compared
    skipped   vLLM reads no cache for this request, for example for the log-probabilities of its prompt
    excluded  the content of its LoRA adapter is not known
    aborted   it ended before its load did

A request that continues after a preemption is not counted again: its blocks were computed before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

COUNTERS = {
    "requests": "Requests by outcome of the look-up.",
    "lookup_seconds": "Time that look-ups took, in threads.",
    "held_seconds": "Time that look-ups held up the scheduler.",
    "lookup_tokens": "Prompt tokens of the requests that were looked up.",
    "local_tokens": "Prompt tokens whose KV was on the device.",
    "hit_tokens": "Prompt tokens whose KV was loaded from the store.",
    "loaded_blocks": "Blocks that were loaded and verified, of all workers.",
    "loaded_bytes": "Bytes of the fetched records, unusable ones included.",
    "load_seconds": "Time from the request for blocks until they were fetched and verified, in the background.",
    "copy_seconds": "Time that copies to and from the KV cache held up the worker.",
    "failed_blocks": "Blocks that could not be loaded, by reason; their requests computed them.",
    "saved_blocks": "Blocks that were queued to be written.",
    "saved_bytes": "Bytes of the queued records.",
    "dropped_blocks": "Blocks that were not written, by reason.",
    "shadow_blocks": "Stored blocks that were compared with computed ones.",
    "shadow_different": "Stored blocks that differed from the computed ones: wrong KV.",
}
"""By name. `requests`, `failed_blocks` and `dropped_blocks` have a reason after a colon, as in "requests:absent"."""
BY_REASON = {"requests": "outcome", "failed_blocks": "reason", "dropped_blocks": "reason"}


class Counters(KVConnectorStats):  # type: ignore[misc]
    """Numbers by name since the last `take`."""

    data: dict[str, float]

    def add(self, **amounts: float) -> None:
        """Add to counters without a reason."""
        for name, amount in amounts.items():
            self.data[name] = self.data.get(name, 0) + amount

    def count(self, name: str, reason: str, amount: int = 1) -> None:
        """Add to a counter with a reason."""
        self.add(**{f"{name}:{reason}": amount})

    def take(self) -> Counters | None:
        """Return what was counted since the last call, or None for nothing."""
        if not self.data:
            return None
        taken, self.data = Counters(self.data), {}
        return taken

    def reset(self) -> None:
        """Forget everything."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> Counters:
        """Add the counters of another interval or worker."""
        self.add(**other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return the line for the log, with the share of the prompt tokens that came from the store first."""
        line: dict[str, int | float] = {}
        if asked := self.data.get("lookup_tokens"):
            line["store_token_hit_rate"] = round(self.data.get("hit_tokens", 0) / asked, 3)
        for name, amount in sorted(self.data.items()):
            line[name] = round(amount, 4) if isinstance(amount, float) else amount
        return line

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data


class PromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The counters as vllm:kvlab_NAME_total, with the label `outcome` or `reason` where there is one."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._metrics = {
            name: self._counter_cls(
                f"vllm:kvlab_{name}", text, [*self._labelnames, *([BY_REASON[name]] if name in BY_REASON else [])]
            )
            for name, text in COUNTERS.items()
        }
        self._plain = {
            name: create_metric_per_engine(metric, self.per_engine_labelvalues)
            for name, metric in self._metrics.items()
            if name not in BY_REASON
        }

    def observe(self, transfer_stats_data: Mapping[str, float], engine_idx: int = 0) -> None:
        """Add what was counted in an interval."""
        for key, amount in transfer_stats_data.items():
            name, _, reason = key.partition(":")
            if name not in self._metrics:
                continue
            if name in BY_REASON:
                self._metrics[name].labels(*self.per_engine_labelvalues[engine_idx], reason).inc(amount)
            else:
                self._plain[name][engine_idx].inc(amount)
