"""Requests to the engine: time to first token by tier, and what the planner chooses over slower and faster wires."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvlab.engine import Generation, generate
from kvlab.engine.pages import PAGE_TOKENS, PagePool
from kvlab.errors import KVLabError
from kvlab.lab.bench.gpu.compute import prompt_of
from kvlab.lab.bench.gpu.moving import host_bytes, spec_of, tiers
from kvlab.lab.bench.gpu.plan import Plan
from kvlab.lab.bench.gpu.report import Report, Rows
from kvlab.lab.gpu_model import Shape, break_even_gbps
from kvlab.model import Llama
from kvlab.stores import MemoryStore

SUFFIX = 15
"""Tokens behind the prefix. With fewer than a page they are in no block, so they are always computed."""


def ttft(report: Report, plan: Plan, shape: Shape, model: Llama, prefix: int) -> Rows:
    """The same prompt, cold and with its prefix from each tier."""
    prompt = prompt_of(model, prefix + SUFFIX)
    pages = -(-(len(prompt) + 1) // PAGE_TOKENS)
    store, spec, record = MemoryStore(), spec_of(shape, model), plan.precision
    with (
        tiers(shape, model, record, store, host_bytes(spec, prefix, record)) as host,
        tiers(shape, model, record, store) as outer,
    ):
        pool = PagePool(model, pages)
        request = functools.partial(generate, model, prompt, 1)
        contenders: dict[str, Callable[[], Generation]] = {
            "cold": functools.partial(request, pool=pool),
            "device": functools.partial(request, pool=PagePool(model, 2 * pages, host.namespace)),
            "host": functools.partial(request, host, pool=pool),
            "store": functools.partial(request, outer, pool=pool),
        }
        for tier in ("device", "host"):  # the store has then what the host tier wrote through
            contenders[tier]()
        for tier, run in contenders.items():
            if (found := dict(run().sources)) != ({} if tier == "cold" else {tier: prefix}):
                raise KVLabError(f"expected {prefix} tokens from {tier}, got {found}")
        times = report.time(contenders, seconds_of=lambda result: result.ttft_s)
    cold = times.median_ms("cold")
    return [
        {
            "shape": shape.name,
            "tier": tier,
            "prefix_tokens": prefix,
            "cold_ms": cold,
            "warm_ms": times.median_ms(tier),
            "speedup": times.ratio("cold", tier),
        }
        for tier in ("device", "host", "store")
    ]


class PacedStore(MemoryStore):
    """A store whose values come at a bandwidth, as over a wire that all readers share."""

    def __init__(self, bytes_per_s: float) -> None:
        super().__init__()
        self.bytes_per_s = bytes_per_s
        self._free_at = 0.0

    def get_many(
        self, keys: Sequence[bytes], out: Sequence[memoryview] | None = None, reasons: list[str] | None = None
    ) -> list[bytes | memoryview | None]:
        """See `Store.get_many`."""
        begin = time.perf_counter()
        got = super().get_many(keys, out, reasons)
        size = sum(len(value) for value in got if value is not None)
        with self._lock:
            self._free_at = max(begin, self._free_at) + size / self.bytes_per_s
            wait = self._free_at - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        return got


def choices(report: Report, plan: Plan, shape: Shape, model: Llama, factor: float) -> Rows:
    """What the planner chooses over a wire that is `factor` times as fast as the break-even, and what that costs.

    Its regret is the time of its plan by that of the better one of two rules, always to fetch and always to compute. It
    can be below 1, because a plan may do both at the same time.
    """
    text = prompt_of(model, max(plan.planned) + SUFFIX)
    pool = PagePool(model, -(-(len(text) + 1) // PAGE_TOKENS))

    def cold(tokens: int) -> Generation:
        return generate(model, text[:tokens], 1, pool=pool)

    cold(len(text))
    computed = cold(len(text)).ttft_s
    gbps = factor * break_even_gbps(shape.kv_bytes(plan.dtype.itemsize), len(text), computed)
    store = PacedStore(1e9 * gbps)
    rows = []
    with (
        tiers(shape, model, plan.precision, store) as always,
        tiers(shape, model, plan.precision, store, planner=True) as planned,
    ):
        generate(model, text, 1, always, pool=pool)  # fills the store
        lengths = [prefix + SUFFIX for prefix in plan.planned]
        for number, tokens in enumerate([*lengths] * plan.learning):
            if number < len(lengths) or not report.enough():  # requests that find nothing, and that have a choice
                planned.planner.computed(0, tokens, cold(tokens).ttft_s)
                generate(model, text[:tokens], 1, planned, pool=pool)
        for prefix, tokens in zip(plan.planned, lengths, strict=True):
            chosen: list[str] = []

            def by_plan(tokens: int = tokens, chosen: list[str] = chosen) -> Generation:
                result = generate(model, text[:tokens], 1, planned, pool=pool)
                chosen.append("" if result.plan is None else result.plan.why)
                return result

            contenders: dict[str, Callable[[], Generation]] = {
                "compute": functools.partial(cold, tokens),
                "fetch": functools.partial(generate, model, text[:tokens], 1, always, pool=pool),
                "planned": by_plan,
            }
            times = report.time(contenders, seconds_of=lambda result: result.ttft_s)
            ms: dict[str, Any] = {f"{name}_ms": times.median_ms(name) for name in contenders}
            best = min(("compute", "fetch"), key=times.median_ms)
            rows.append(
                {
                    "shape": shape.name,
                    "gbps": gbps,
                    "prefix_tokens": prefix,
                    **ms,
                    "chosen": chosen[-1],
                    "regret": times.ratio("planned", best),
                }
            )
    return rows
