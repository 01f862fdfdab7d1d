"""The inputs of a decision: the model, and each number with its band, exact where it was given.

Bands of money are in `kvlab.lab.prices`; here are those of what `decide` assumes when it is not told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Final

from kvlab.core.precisions import GROUP, PRECISIONS, layout
from kvlab.errors import InputError
from kvlab.lab.cost import h100
from kvlab.lab.costs import Model
from kvlab.lab.gpu_model import LLAMA_1B, LLAMA_8B, QWEN_05B, Shape
from kvlab.lab.prices import HOURS, PRICES, Interval, Price, given
from kvlab.lab.reuse import Reuse

SHAPES: Final = {shape.name.lower(): shape for shape in (LLAMA_8B, LLAMA_1B, QWEN_05B)}
"""By the names that `--shape` takes."""
USED: Final = ("gpu", "ram", "engineer", "utilisation", "stall")
"""The prices that the decision depends on."""
GPU_BYTES: Final = 80e9 - 8e9
"""Of an H100, for weights and KV. The 8 GB for other things are assumed."""
HOST_BYTES: Final = 192 * 2**30
"""The host memory behind each engine that is assumed at most."""
REACHED: Final = (0.6, 1.4)
"""The band of a computed prefill: .3 to .7 of a data sheet's operations a second instead of .5 (assumed)."""
FALLING: Final = ("prefill", "own", "ram", "engineer", "utilisation", "stall")
"""Inputs of which more is worse for the tier. Of the others, more is better."""


COMMANDS: Final = {
    "prefill": "`vllm bench latency --input-len N --output-len 1` on one engine: N x batch / seconds; of the published "
    "shapes `python -m kvlab bench gpu`. Then --prefill",
    "own": "vllm:prefix_cache_hits_total / vllm:prefix_cache_queries_total of all engines, over a day; or full_blocks "
    "of `python -m kvlab replay TRACE --nodes N --tiers DEVICE,HOST --router cost` (both in blocks). Then --own",
    "utilisation": "`avg(avg_over_time((vllm:num_requests_running > bool 0)[7d:1m]))` in Prometheus, over all GPUs "
    "that are paid for. Then --prices",
    "stall": "`vllm bench serve` at full load with the tier warm and with it off, r1 and r0 requests/s; for a request "
    "(hit tokens / prefill + 1/r1 - 1/r0) / fetch seconds. Then --prices",
    "gpu": "your contract: USD a GPU-hour. Then --prices",
    "ram": "your contract: USD of a server a month / GiB of its maxmemory. Then --prices",
    "engineer": "your payroll: USD an hour, of 160 hours once and 8 a month. Then --prices",
    "wire": "`python -m kvlab bench wire --store URL`, from as many workers at once as you have. Then --wire",
}
"""How each input is measured."""


# --- the model ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sizes:
    """What the bytes of a model's KV depend on; its other sizes are known if it is a published one."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    published: Shape | None = None

    def kv_bytes(self, precision: str = "bf16") -> int:
        """Return the bytes of KV of a token, scales of the integer precisions included.

        >>> sizes("32x8x128").kv_bytes(), sizes("Llama-3.1-8B").kv_bytes("int8")
        (131072, 67584)
        """
        if precision not in PRECISIONS:
            raise InputError(f"expected one of {', '.join(PRECISIONS)} as the precision, got {precision!r}")
        parts = layout(precision, (self.layers, 2, self.kv_heads, GROUP, self.head_dim), 1)
        return ceil(sum(prod(shape) * dtype.itemsize for dtype, shape in parts) / GROUP)

    def prefill_tok_s(self, tokens: float, gpus: int) -> float:
        """Return the prompt tokens a second of H100s at this length, computed from data sheets."""
        if self.published is None:
            raise InputError(f"expected --prefill with the shape {self.name}: its weights are not known")
        s, length = self.published, max(1, round(tokens))
        costs = h100(Model(s.parameters, s.layers, s.heads, s.kv_heads, s.head_dim), gpus).costs
        return length / costs.prefill(length, 0)

    def engine_bytes(self, gpus: int) -> float:
        """Return the bytes that an engine on H100s has for KV; half of what there is, if the weights are not known."""
        room = gpus * GPU_BYTES
        return room / 2 if self.published is None else max(0.0, room - 2 * self.published.parameters)


def sizes(shape: str) -> Sizes:
    """Return the sizes of a published shape, or of layers x KV heads x head dim.

    Raises:
        InputError: it is neither.
    """
    if known := SHAPES.get(shape.lower()):
        return Sizes(known.name, known.layers, known.kv_heads, known.head_dim, known)
    if not re.fullmatch("[1-9][0-9]{0,5}(x[1-9][0-9]{0,5}){2}", shape, re.IGNORECASE | re.ASCII):
        names = ", ".join(SHAPES)
        raise InputError(f"expected a shape of {names}, or layers x KV heads x head dim as 32x8x128, got {shape!r:.60}")
    layers, heads, dim = map(int, shape.lower().split("x"))
    return Sizes(shape.lower(), layers, heads, dim)


# --- the numbers ---------------------------------------------------------------------------------
def inputs_of(
    model: Sizes,
    trace: Reuse,
    prefill_tok_s: float | None,
    wire_gbps: float,
    prices: Mapping[str, Price],
    gpus: int | None,
    tp: int,
    own: float | None,
    requests_per_month: float | None,
) -> dict[str, Price]:
    """Return all inputs by name: exact where they are given, else with a band."""
    inputs = {
        "requests": _requests(trace, requests_per_month),
        "prefill": _prefill(model, trace, prefill_tok_s, tp),
        "wire": _exact("wire", "GB/s", wire_gbps),
    } | {name: prices.get(name, PRICES[name]) for name in USED}
    engines = engines_for(trace, inputs) if gpus is None else gpus / tp
    known = _own(trace, model, engines, tp) if own is None else _exact("own hit rate", "full blocks", own)
    return {"own": known, **inputs}


def _exact(name: str, unit: str, value: float) -> Price:
    return given(Price(name, unit, value, value, value, "", "", ""), value)


def _assumed(name: str, unit: str, values: Interval, band: str, source: str = "computed") -> Price:
    low, value, high = values
    return Price(name, unit, value, low, high, band, "now", source)


def _requests(trace: Reuse, requests: float | None) -> Price:
    """All of the trace, over and over. Without a span there is no rate, and without hits none is needed."""
    if requests is None and not trace.span_s and trace.hit_rate():
        raise InputError("expected a trace that takes longer than 0 s, or --requests-per-month")
    by_rate = trace.requests / trace.span_s * HOURS * 3600 if trace.span_s else 0.0
    return _exact("requests", "a month", by_rate if requests is None else requests)


def _prefill(model: Sizes, trace: Reuse, tok_s: float | None, tp: int) -> Price:
    if tok_s is not None:
        return _exact("prefill", "tokens/s", tok_s)
    value = model.prefill_tok_s(trace.tokens / trace.requests, tp)
    ends = (value * REACHED[0], value, value * REACHED[1])
    return _assumed("prefill", "tokens/s", ends, "H100 at the mean prompt; .3 to .7 of its operations a second")


def busy(trace: Reuse, inputs: Mapping[str, Price]) -> float:
    """Return how many engines computing all prompts keeps busy."""
    tokens_s = inputs["requests"].value * trace.tokens / trace.requests / (HOURS * 3600)
    return tokens_s / inputs["prefill"].value


def engines_for(trace: Reuse, inputs: Mapping[str, Price]) -> int:
    """Return how many engines it takes to compute all prompts, if they have work for the middle share of the time."""
    return max(1, ceil(busy(trace, inputs) / inputs["utilisation"].value))


def _own(trace: Reuse, model: Sizes, engines: float, tp: int) -> Price:
    """Low: as if each engine had no more than its own; mid: all GPU memory as one; high: with host memory, too."""
    room, block = model.engine_bytes(tp), model.kv_bytes() * trace.block_tokens
    totals = (room, engines * room, engines * (room + HOST_BYTES))
    low, mid, high = (trace.hit_rate(total // block) for total in totals)
    about = f"{room / 2**30:.0f} GiB of one engine; of all; with {HOST_BYTES >> 30} GiB of host memory each"
    return _assumed("own hit rate", "full blocks", (low, mid, high), about)


def points(inputs: Mapping[str, Price]) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """The worst ends of all bands, their middles, and the best ends. The money is monotonic in each input."""
    worst = {name: price.high if name in FALLING else price.low for name, price in inputs.items()}
    best = {name: price.low if name in FALLING else price.high for name, price in inputs.items()}
    return worst, {name: price.value for name, price in inputs.items()}, best
