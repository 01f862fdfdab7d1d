"""What a shared tier costs and saves, in one table: nothing is measured here, all is computed from dated prices.

python -m kvlab cost --json
"""

from __future__ import annotations

import statistics
from dataclasses import asdict
from math import inf
from typing import Any, Final

from kvlab.lab.cost import (
    LLAMA_70B,
    Load,
    Node,
    Tier,
    break_even_keep_s,
    cached_input_discount,
    h100,
    prompt_needed,
    roi,
)
from kvlab.lab.costs import LLAMA_8B
from kvlab.lab.prices import GPU, MANAGED, PRICES, RAM, RATES
from kvlab.lab.replay import replay
from kvlab.lab.strategies import AT_SCALE, SCALE_BLOCK, SCALE_CONTEXT
from kvlab.lab.workloads import WORKLOADS, as_trace

ABOUT: Final = (
    "computed from prices, data sheets and made workloads; nothing is measured. rows: a shared tier of 64 GiB against "
    "no cache at all, for each workload on H100s, at the hit rate by tokens of a cache that never evicts, blocks of "
    "16: more than a tier adds to engines with caches of their own. saving_usd a month: low, mid, high over all bands "
    "of prices, GPUs paid by the second; saved_usd_per_month: mid; saving_whole_usd: whole nodes; store_load: the "
    "share of the store's bandwidth that the hits need, above 1 they cannot be fetched; break_even_months: with the "
    "middle prices, none if never. keep: seconds for which the RAM of a prompt's KV costs as much as computing it once "
    "more. prompt_needed: tokens of a prompt from which on 100,000 requests a month save so much, with the best, "
    "middle and worst prices, none if 131,072 are not enough. discounts: share of the input bill that a vendor's cache "
    "saves by hit rate, what is not found being written"
)
REQUESTS: Final = (100_000, 1_000_000, 10_000_000, 100_000_000)
NODES: Final = {"Llama 3.1 8B, one H100": h100(LLAMA_8B), "Llama 3.1 70B, four H100": h100(LLAMA_70B, 4)}
GIB: Final = 64.0
KEPT: Final = 2000
SAVINGS: Final = (5_000, 50_000)
HIT_RATES: Final = (0.0, 0.2, 0.5, 0.8, 0.95)


def run() -> dict[str, Any]:
    """Compute all tables."""
    loads = {kind: _load(kind) for kind in AT_SCALE}
    first, *larger = NODES
    return {
        "about": ABOUT,
        "rows": _rows(first, loads),
        "larger_model": [row for name in larger for row in _rows(name, loads)],
        "keep": [_keep(name, node) for name, node in NODES.items()],
        "prompt_needed": [_needed(name, node, usd) for name, node in NODES.items() for usd in SAVINGS],
        "discounts": [
            {"vendor": vendor, "model": rates.name}
            | {f"hit_rate {rate:g}": cached_input_discount(rates, rate) for rate in HIT_RATES}
            for vendor, rates in RATES.items()
        ],
        "prices": [asdict(price) for price in PRICES.values()],
        "models": [*NODES],
    }


def _load(kind: str) -> Load:
    """A workload with the lengths of its sources, and what an endless cache finds of it."""
    trace = as_trace(WORKLOADS[kind](context=SCALE_CONTEXT, **AT_SCALE[kind]), SCALE_BLOCK)
    rate = replay(trace, SCALE_BLOCK).hits.rates()["tokens"]
    prompt, new = (round(statistics.mean(values)) for values in zip(*((r.tokens, r.new) for r in trace), strict=True))
    return Load(1, prompt, new, rate)


def _rows(name: str, loads: dict[str, Load]) -> list[dict[str, Any]]:
    rows, node = [], NODES[name]
    for kind, one in loads.items():
        for requests in REQUESTS:
            load = Load(requests, one.prompt, one.new, one.hit_rate)
            result = roi(load, node, Tier(GIB))
            rows.append(
                {
                    "model": name,
                    "workload": kind,
                    "requests_per_month": requests,
                    "prompt": load.prompt,
                    "new": load.new,
                    "hit_rate": load.hit_rate,
                    "without_usd": result.fractional.without_usd[1],
                    "saved_usd_per_month": result.fractional.saving_usd[1],
                    "saving_usd": [*result.fractional.saving_usd],
                    "saving_whole_usd": [*result.whole_gpus.saving_usd],
                    "break_even_months": _finite(result.fractional.break_even_months[1]),
                    "store_load": result.store_load,
                }
            )
    return rows


def _keep(name: str, node: Node) -> dict[str, Any]:
    """How long KV is worth its memory, with the middle prices and with the ends that are worst and best for it."""
    ends = [(GPU.low, RAM.high), (GPU.value, RAM.value), (GPU.high, RAM.low), (GPU.value, MANAGED.value)]
    low, mid, high, managed = (break_even_keep_s(node, KEPT, 0, gpu, ram) for gpu, ram in ends)
    return {"model": name, "tokens": KEPT, "low_s": low, "seconds": mid, "high_s": high, "managed_s": managed}


def _needed(name: str, node: Node, usd: int) -> dict[str, Any]:
    best, middle, worst = prompt_needed(usd, Load(REQUESTS[0]), node, Tier(GIB))
    tokens = {"best": _finite(best), "middle": _finite(middle), "worst": _finite(worst)}
    return {"model": name, "saving_usd": usd, **tokens}


def _finite(value: float) -> float | None:
    return None if value == inf else value
