"""The simulator against the real scheduler on this machine: the same requests, predicted and measured.

python -m kvlab bench simulate --json

First the costs are measured: prefills of several lengths, each after a pause, and decode steps of several batches and
contexts, on a scheduler that does nothing else. Then the same load is served by the real scheduler and by a simulated
one with these costs. No number of the load is used for the prediction.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, Final

from kvlab.core.keys import Namespace
from kvlab.engine.pages import PAGE_TOKENS, PagePool
from kvlab.engine.scheduler import Scheduler
from kvlab.lab.calibrate import COLD, CONTEXTS, PAUSE_S, WARM, fitted
from kvlab.lab.costs import Costs
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.replay import Setup
from kvlab.lab.serving import Arrival, hit_rate, latencies, offer_here, skewed, sources
from kvlab.lab.simulate import simulate
from kvlab.lab.trace_ids import trace_ids
from kvlab.lab.traces import Request
from kvlab.model import Llama, Tokenizer, held_out_tokens, load_model
from kvlab.model.fingerprint import spec_of

ABOUT = (
    "the same open-loop load on the real scheduler and on a simulated one, whose costs were measured before on an idle "
    "scheduler; load: requests a second by what the costs allow without hits; hit_rate: prompt tokens found / all; "
    "ttft in milliseconds; ratio: predicted by measured, median over the rounds; costs in milliseconds"
)
BATCHES: Final = (1, 2, 4, 8)
GROUPS: Final = 16
PREFIX: Final = 512
COMMON: Final = 64
OWN: Final = 40
NEW: Final = 16
STEPS: Final = 12
BATCH: Final = 8
CHUNK: Final = 256
PAGES: Final = GROUPS * PREFIX // PAGE_TOKENS // 2 + BATCH * (COMMON + PREFIX + OWN + NEW + 64) // PAGE_TOKENS
"""Room for half of the groups beside what runs."""


def run(loads: Sequence[float] = (0.5, 1.0, 1.5, 2.0), requests: int = 100, rounds: int = 3) -> dict[str, Any]:
    """Measure the costs, then predict and measure each load.

    Args:
        loads: requests a second, by what the measured costs allow without hits.
        requests: of each load and round.
        rounds: loads of other seeds; the medians are shown.
    """
    model = load_model()
    text = held_out_tokens(Tokenizer())
    costs = measure(model, text)
    capacity = 1 / (costs.prefill(COMMON + PREFIX + OWN, 0) + NEW * costs.step(1, COMMON + PREFIX))
    rows = [_row(model, costs, load, load * capacity, requests, rounds) for load in loads]
    return {
        "about": ABOUT,
        "rows": rows,
        "costs": {
            name: 1000 * getattr(costs, name) for name in (field.name for field in fields(costs)) if name.endswith("_s")
        },
        "machine": describe_machine(),
        "versions": versions(),
    }


# --- costs --------------------------------------------------------------------------------------
def measure(model: Llama, text: list[int], rounds: int = 5) -> Costs:
    """Measure what prefills and decode steps of the scheduler cost on this machine, while it is idle."""
    lengths = (*COLD, *WARM)
    prefills = [_median(_first_tokens(model, text, n, past, rounds)) for n, past in lengths]
    steps = [(b, b * c, _median(_steps(model, text, b, c))) for b in BATCHES for c in CONTEXTS]
    return fitted(spec_of(model).kv_bytes_per_token(), lengths, prefills, steps, chunk=CHUNK, batch=BATCH)


def _median(values: Iterator[float]) -> float:
    return statistics.median(list(values)[1:])  # the first one warms up


def _first_tokens(model: Llama, text: list[int], length: int, past: int, rounds: int) -> Iterator[float]:
    """Requests after a pause, each with other blocks: right after another one they would take half as long."""
    with _scheduler(model) as scheduler:
        for number in range(rounds + 1):
            before = text[701 * number :][:past]
            if past:
                offer_here(scheduler, [Arrival(0.0, before, 1)])
            time.sleep(PAUSE_S)
            own = text[20_000 + 97 * number :][:length]
            (served,) = offer_here(scheduler, [Arrival(0.0, before + own, 1)])
            assert sources([served])["device"] == past, "the request found something else than it should"
            yield served.ttft_ms / 1000


def _steps(model: Llama, text: list[int], batch: int, context: int) -> Iterator[float]:
    """Steps in which all of a batch decode, around this context."""
    with _scheduler(model, batch * (context + STEPS + 64)) as scheduler:
        records = [
            scheduler.submit(f"{i}", text[97 * i :][: context - STEPS // 2], STEPS + batch + 1, stop_at_eos=False)
            for i in range(batch)
        ]
        while not all(record.tokens for record in records):
            scheduler.step()
        for _ in range(STEPS):
            begin = time.perf_counter()
            scheduler.step()
            yield time.perf_counter() - begin


# --- loads --------------------------------------------------------------------------------------
def _row(model: Llama, costs: Costs, load: float, per_second: float, requests: int, rounds: int) -> dict[str, Any]:
    results: list[dict[str, float]] = []
    block_tokens = spec_of(model).block_tokens()
    for seed in range(rounds):
        arrivals = skewed(requests, per_second, GROUPS, PREFIX, OWN, NEW, COMMON, seed)
        with _scheduler(model, PAGES * PAGE_TOKENS) as scheduler:
            served = offer_here(scheduler, arrivals)
        real = latencies(served)
        made = [_request(arrival, block_tokens) for arrival in arrivals]
        device = PAGES * PAGE_TOKENS // block_tokens
        predicted = simulate(made, block_tokens, Setup(device=device), costs)
        told = predicted.as_json()
        results.append(
            {
                "hit_rate": hit_rate(served),
                "hit_rate_predicted": told["hit_rate"]["tokens"],
                **{f"ttft_p{p}_ms": real[f"ttft_p{p}_ms"] for p in (50, 95)},
                **{f"ttft_p{p}_ms_predicted": 1000 * told[f"ttft_p{p}_s"] for p in (50, 95)},
            }
        )
    row = {name: statistics.median(result[name] for result in results) for name in results[0]}
    ratios = {
        f"ttft_p{p}_ratio": statistics.median(r[f"ttft_p{p}_ms_predicted"] / r[f"ttft_p{p}_ms"] for r in results)
        for p in (50, 95)
    }
    return {"load": load, "per_second": per_second, **row, **ratios}


def _request(arrival: Arrival, block_tokens: int) -> Request:
    blocks, _ = trace_ids(arrival.tokens, block_tokens)
    return Request(
        arrival.at_s, len(arrival.tokens), arrival.new, blocks, blocks[: len(arrival.tokens) // block_tokens]
    )


def _scheduler(model: Llama, tokens: int = 2048) -> Scheduler:
    """A scheduler whose pages hold so many tokens, and keep the blocks of earlier requests."""
    spec = spec_of(model)
    namespace = Namespace(spec.fingerprint, "fp32", b"", spec.block_tokens())
    pool = PagePool(model, -(-tokens // PAGE_TOKENS) + 16, namespace)
    return Scheduler(model, pool, max_batch=BATCH, max_step_tokens=CHUNK)
