"""Serving: what a batch gains, what saving costs, and what routers do to hits and balance.

python -m kvlab bench serve --json

`rows` decode in one process, without a cache. `mixed` serves requests of many lengths in three ways. `saves` compares
the same load with and without saving to a real Redis. `routers` sends a skewed load to two worker processes with
pages of their own, and to one worker with the memory of both.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch

from kvlab.cache import DistributedKVCache
from kvlab.engine import generate
from kvlab.engine.pages import PAGE_TOKENS, PagePool
from kvlab.engine.requests import Record
from kvlab.engine.router import ROUTERS
from kvlab.engine.scheduler import Scheduler
from kvlab.engine.tiers import TieredCache
from kvlab.engine.worker import WorkerSettings
from kvlab.engine.workers import WorkerGroup
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.padded import generate_padded
from kvlab.lab.serving import (
    Arrival,
    hit_rate,
    imbalance,
    latencies,
    offer,
    offer_here,
    percentile,
    skewed,
    sources,
)
from kvlab.lab.timing import NOISY_BEYOND, time_rounds
from kvlab.model import Llama, Tokenizer, held_out_tokens, load_model
from kvlab.stores import RedisStore
from kvlab.testbed.server import RedisServer

ABOUT = (
    "rows: decoding at a context, FP32. tok_per_s: all requests of the batch together; speedup_vs_sequential: by "
    "one at a time through `generate`, median of the ratios of each round; the latencies are of an open-loop load at "
    "70 % of that batch's measured capacity, counted from the intended arrival. mixed: requests of 16 to 128 prompt "
    "tokens and 4 to 64 new ones, seconds for all. saves: the same cold requests with and without saving to Redis; "
    "decode_cost_percent: more seconds of decoding, itl_p99: with by without, medians of rounds. routers: Zipf groups, "
    "workers without a store; hit_rate: prompt tokens not computed; imbalance: work of the busiest worker by "
    "the mean, work = computed prompt tokens + 8 for each new token"
)
BATCHES: Final = (1, 2, 4, 8, 16)
CONTEXTS: Final = (128, 1024)
GROUPS: Final = 16
PREFIX: Final = 512
COMMON: Final = 64  # a block that all requests begin with, a system prompt
PAGES_PER_GROUP: Final = PREFIX // PAGE_TOKENS


def run(
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = CONTEXTS,
    rounds: int = 7,
    steps: int = 24,
    open_requests: int = 40,
    routed: int = 160,
    per_second: float = 8.0,
) -> dict[str, Any]:
    """Measure on this machine.

    Args:
        rounds: timed repetitions.
        steps: tokens that each request decodes in a round.
        open_requests: of the open-loop load of each row.
        routed, per_second: requests for each router, and their rate.

    Raises:
        KVLabError: there is no `redis-server` to start.
    """
    model = load_model()
    text = held_out_tokens(Tokenizer())
    rows, ratios = [], []
    for context in contexts:
        for batch in batches:
            row, aa_ratio = _row(model, text, batch, context, rounds, steps, open_requests)
            rows.append(row)
            ratios.append(aa_ratio)
    aa_ratio = max(ratios, key=lambda ratio: abs(ratio - 1))
    return {
        "about": ABOUT,
        "rows": rows,
        "mixed": _mixed(model, text, rounds),
        "saves": _saves(model, text, rounds),
        "routers": _routers(routed, per_second),
        "decode_by_prefill_token": _decode_by_prefill(model, text, rounds),
        "threads": torch.get_num_threads(),
        "aa_ratio": aa_ratio,
        "noisy": abs(aa_ratio - 1) > NOISY_BEYOND,
        "machine": describe_machine(),
        "versions": versions(),
    }


# --- a batch ------------------------------------------------------------------------------------
def _row(
    model: Llama, text: list[int], batch: int, context: int, rounds: int, steps: int, open_requests: int
) -> tuple[dict[str, Any], float]:
    prompts = _prompts(text, batch, context)
    times = time_rounds(
        {
            "sequential": partial(_decode_one_by_one, model, prompts, steps),
            "batch": partial(_decode_together, model, prompts, steps),
        },
        rounds,
        seconds_of=float,
    )
    tok_per_s = batch * steps / statistics.median(times.seconds["batch"])
    return {
        "batch": batch,
        "context": context,
        "tok_per_s": tok_per_s,
        "speedup_vs_sequential": times.ratio("sequential", "batch"),
        **_under_load(model, text, batch, context, steps, tok_per_s, open_requests),
    }, times.aa_ratio


def _prompts(text: list[int], count: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [text[at : at + length] for at in (rng.randrange(len(text) - length) for _ in range(count))]


def _pool(model: Llama, tokens: int) -> PagePool:
    """A pool with twice the room: a server that has no more than its requests need preempts them."""
    return PagePool(model, -(-2 * tokens // PAGE_TOKENS) + 256)


def _decode_one_by_one(model: Llama, prompts: Sequence[list[int]], steps: int) -> float:
    """Seconds of decoding, without the prefills."""
    done = [generate(model, prompt, steps + 1, stop_at_eos=False) for prompt in prompts]
    return sum(one.total_s - one.ttft_s for one in done)


def _decode_together(model: Llama, prompts: Sequence[list[int]], steps: int) -> float:
    """Seconds of decoding, after one step that has prefilled all prompts."""
    total = sum(map(len, prompts))
    pool = _pool(model, total + len(prompts) * (steps + 3 * PAGE_TOKENS))
    with Scheduler(model, pool, max_batch=len(prompts), max_step_tokens=total) as scheduler:
        for i, prompt in enumerate(prompts):
            scheduler.submit(f"{i}", prompt, steps + 1, stop_at_eos=False)
        scheduler.step()
        begin = time.perf_counter()
        for _ in range(steps):
            scheduler.step()
        assert not len(scheduler), "all requests have ended now"
        return time.perf_counter() - begin


def _under_load(
    model: Llama, text: list[int], batch: int, context: int, steps: int, tok_per_s: float, requests: int
) -> dict[str, float]:
    """Latencies of an open-loop load at 70 % of what the batch can do, prefills included."""
    (prompt,) = _prompts(text, 1, context)
    begin = time.perf_counter()
    generate(model, prompt, 1)
    prefill_s = time.perf_counter() - begin
    per_second = 0.7 / (prefill_s + steps / tok_per_s)
    rng, at = random.Random(1), 0.0
    arrivals = []
    for tokens in _prompts(text, requests, context, seed=2):
        at += rng.expovariate(per_second)
        arrivals.append(Arrival(at, tokens, steps))
    pool = _pool(model, (batch + 1) * (context + steps + 3 * PAGE_TOKENS))
    with Scheduler(model, pool, max_batch=batch, max_waiting=requests) as scheduler:
        return latencies(offer_here(scheduler, arrivals))


# --- requests of many lengths -------------------------------------------------------------------
def _mixed(model: Llama, text: list[int], rounds: int, requests: int = 16, batch: int = 8) -> dict[str, float]:
    rng = random.Random(3)
    prompts = [_prompts(text, 1, rng.randrange(16, 129), seed)[0] for seed in range(requests)]
    new = [rng.choice((4, 8, 16, 32, 64)) for _ in prompts]
    contenders: dict[str, Callable[[], object]] = {
        "sequential": lambda: [generate(model, p, n, stop_at_eos=False) for p, n in zip(prompts, new, strict=True)],
        "padded": lambda: [
            generate_padded(model, prompts[at : at + batch], new[at : at + batch]) for at in range(0, requests, batch)
        ],
        "continuous": partial(_continuous, model, prompts, new, batch),
    }
    times = time_rounds(contenders, rounds)
    return {
        **{f"{name}_s": times.median_ms(name) / 1000 for name in contenders},
        "padded_vs_sequential": times.ratio("sequential", "padded"),
        "continuous_vs_sequential": times.ratio("sequential", "continuous"),
        "continuous_vs_padded": times.ratio("padded", "continuous"),
    }


def _continuous(model: Llama, prompts: Sequence[list[int]], new: Sequence[int], batch: int) -> list[Record]:
    pool = _pool(model, batch * (max(map(len, prompts)) + max(new) + 2 * PAGE_TOKENS))
    with Scheduler(model, pool, max_batch=batch) as scheduler:
        records = [
            scheduler.submit(f"{i}", prompt, n, stop_at_eos=False)
            for i, (prompt, n) in enumerate(zip(prompts, new, strict=True))
        ]
        for _ in scheduler.run():
            pass
        return records


# --- saves --------------------------------------------------------------------------------------
def _saves(
    model: Llama, text: list[int], rounds: int, requests: int = 24, batch: int = 8, context: int = 256, new: int = 32
) -> dict[str, float]:
    """The same cold requests, with and without saves; every round has other prompts, so that none is found."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    p99: dict[bool, list[float]] = {True: [], False: []}
    saved = 0
    with RedisServer() as server, _a_core_is_left() as threads:  # for the saves, as `WorkerSettings.threads` does
        for number in range(rounds + 1):
            prompts = _prompts(text, requests, context, seed=100 + number)
            for save in (True, False) if number % 2 else (False, True):
                inner = DistributedKVCache(store=RedisStore(server.url), model=model, precision="fp32", compress=False)
                with TieredCache(inner, 0, planner=False) as cache:
                    pool = PagePool(model, batch * (context + new) // PAGE_TOKENS + 64, cache.namespace)
                    with Scheduler(model, pool, cache, max_batch=batch, max_saves=64, save=save) as scheduler:
                        served = offer_here(scheduler, [Arrival(0.0, prompt, new) for prompt in prompts])
                    saved += cache.stats().stored
                    assert not sources(served)["store"], "a request was not cold"
                if number:
                    decoding = sum(s.token_at[-1] - s.token_at[0] for s in served)
                    seconds[save].append(decoding)
                    p99[save].append(percentile([gap for s in served for gap in s.itl_ms], 99))
                with server.client() as client:
                    client.flushall()
    ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    return {
        "decode_cost_percent": 100 * (statistics.median(ratios) - 1),
        "itl_p99_ms_with": statistics.median(p99[True]),
        "itl_p99_ms_without": statistics.median(p99[False]),
        "blocks_saved": saved,
        "threads": threads,
    }


@contextmanager
def _a_core_is_left() -> Iterator[int]:
    """PyTorch uses a thread less in the block; gives how many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield max(1, threads - 1)
    finally:
        torch.set_num_threads(threads)


# --- routers ------------------------------------------------------------------------------------
def _routers(requests: int, per_second: float) -> list[dict[str, Any]]:
    """Each worker has room for half the groups, one worker alone for all of them."""
    arrivals = skewed(requests, per_second, GROUPS, PREFIX, common=COMMON)
    rows = []
    for router, workers in [("one worker", 1), *((name, 2) for name in ROUTERS)]:
        pages = GROUPS * PAGES_PER_GROUP // workers + 16 * 4
        settings = WorkerSettings(pages=pages)
        with WorkerGroup(workers, settings, router=router if workers > 1 else "round_robin") as group:
            served = offer(group, arrivals)
        rows.append(
            {
                "router": router,
                "hit_rate": hit_rate(served, near=True),
                "imbalance": imbalance(served, workers),
                "requests": list(Counter(s.worker for s in served).values()),
                **latencies(served),
            }
        )
    return rows


def _decode_by_prefill(model: Llama, text: list[int], rounds: int) -> float:
    """A token decoded in a batch of 8 at 128 tokens, by a token of a prompt of 1,024: what `lab.serving.DECODE` is."""
    prompts, (long,) = _prompts(text, 8, 128), _prompts(text, 1, 1024)
    decode = [_decode_together(model, prompts, 8) / 64 for _ in range(rounds)]
    prefill = [generate(model, long, 1).ttft_s / 1024 for _ in range(rounds)]
    return statistics.median(decode) / statistics.median(prefill)
