"""NVIDIA Dynamo's offline replay of a trace in Mooncake's format, beside kvlab's. It prints JSON.

    .venv-alternatives/bin/python scripts/alternatives/dynamo_replay.py conversation_trace.jsonl

Dynamo's replay is a mock engine with a clock. Requests come when the trace says, wait, are computed together in
batches, and hold their blocks while they run. What it calls `prefix_cache_reused_ratio` is

    tokens in the leading full blocks that a request found when it was admitted / all tokens of the prompts.

kvlab's replay has no clock. So that both can be equal, Dynamo also runs with one request at a time, and with answers
of one token; kvlab and a small LRU of its own also run by Dynamo's rules (`prefix_lru.as_dynamo`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from operator import mul
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("DYN_LOG", "error")  # read at import; else a line for every routed request

from dynamo._core import KvRouterConfig, run_mocker_trace_replay
from prefix_lru import BLOCK_TOKENS, Cache, as_dynamo, main

from kvlab.lab import replay, traces
from kvlab.lab.traces import Request

ENDLESS = 400_000
"""Blocks: more than the trace has, those of the answers included."""
CAPACITIES = (ENDLESS, 5_859, 10_000, 30_000)
WORKERS, OF_EIGHT = 8, 4_000
ROUNDS = 3
ENGINE = {"block_size": BLOCK_TOKENS, "max_num_batched_tokens": 8192, "max_num_seqs": 256}
ROUTED: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "KV router": ({}, {}),
    "KV router, no credit for found blocks": ({"overlap_score_credit": 0.0}, {}),
    "KV router, events 100 ms late": ({}, {"kv_event_lag_ms": 100.0}),
    "KV router, events 2 s late": ({}, {"kv_event_lag_ms": 2_000.0}),
    "KV router, events 20 s late": ({}, {"kv_event_lag_ms": 20_000.0}),
    "KV router, no events": ({"use_kv_events": False}, {}),
}
SAME_RULE = (("round_robin", "round_robin"), ("kv_router", "dynamo"))
"""Dynamo's name of a router, and kvlab's."""
ABOUT = (
    "Rates: tokens in found leading blocks / all tokens of the prompts, blocks of 512 tokens. alone: one request at a "
    "time; short: alone, and every answer has one token. one_worker: dynamo: with the times of the trace; running, "
    "held: the mean number of requests that run, and of blocks that they hold, a shared one counted for each; kvlab: "
    "its replay by its own rules, and kvlab_alone by Dynamo's; lru_differs: tokens that a small LRU finds by Dynamo's "
    "rules, less those that Dynamo finds alone; apart: dynamo less kvlab. "
    f"eight_workers: of {OF_EIGHT} blocks each, with the times of the trace, median of {ROUNDS} runs and their spread: "
    "the KV router does not choose the same in each. Times are those of Dynamo's model of an engine; wall_s: what a "
    "run takes here. eight_workers_alone: the same router in both"
)


def measure(file: Path) -> dict[str, Any]:
    """Replay a trace with one worker of four capacities, and with eight workers under seven routers."""
    requests = list(traces.Trace(file))
    with tempfile.TemporaryDirectory() as folder:
        short = Path(folder) / "short.jsonl"
        traces.write((dataclasses.replace(request, new=1) for request in requests), short, BLOCK_TOKENS, "mooncake")
        log = Path(folder) / "requests.jsonl"
        one_worker = [_one_worker(file, short, log, requests, blocks) for blocks in CAPACITIES]
    kv = {name: {"router_config": KvRouterConfig(**config), **options} for name, (config, options) in ROUTED.items()}
    routed = [_rounds(name, file, router_mode="kv_router", **options) for name, options in kv.items()]
    return {
        "about": ABOUT,
        "engine": {**ENGINE, "timing": "Dynamo's default model", "temperature": 0},
        "one_worker": one_worker,
        "eight_workers": [_rounds("round robin", file), *routed],
        "eight_workers_alone": [_alone(file, requests, *names) for names in SAME_RULE],
    }


def _one_worker(file: Path, short: Path, log: Path, requests: list[Request], blocks: int) -> dict[str, Any]:
    timed = _run(file, blocks, report_jsonl_path=log, capture_per_request=True)
    alone = _run(file, blocks, replay_concurrency=1)
    shortened = _run(short, blocks, replay_concurrency=1)
    ours = _kvlab(requests, blocks)
    return {
        "blocks": blocks,
        "dynamo": round(timed["rate"], 4),
        **_running(log, timed["duration_ms"]),
        "alone": round(alone["rate"], 4),
        "lru_differs": _lru(requests, blocks) - alone["found"],
        "kvlab_alone": round(_kvlab(_by_dynamos_rules(requests), blocks), 4),
        "short": round(shortened["rate"], 4),
        "lru_short_differs": _lru(requests, blocks, answers=False) - shortened["found"],
        "kvlab": round(ours, 4),
        "apart": round(timed["rate"] - ours, 4),
    }


def _rounds(name: str, file: Path, **options: Any) -> dict[str, Any]:
    runs = [_run(file, OF_EIGHT, num_workers=WORKERS, **options) for _ in range(ROUNDS)]
    rates = [run["rate"] for run in runs]
    return {
        "router": name,
        "rate": round(median(rates), 4),
        "spread": round(max(rates) - min(rates), 4),
        **{key: round(median(run[key] for run in runs)) for key in ("mean_ttft_ms", "p95_ttft_ms", "p99_ttft_ms")},
        "wall_s": round(median(run["wall_s"] for run in runs), 1),
    }


def _alone(file: Path, requests: list[Request], theirs: str, ours: str) -> dict[str, Any]:
    alone = _run(file, OF_EIGHT, num_workers=WORKERS, router_mode=theirs, replay_concurrency=1)
    return {
        "router": theirs,
        "alone": round(alone["rate"], 4),
        "kvlab_alone": round(_kvlab(_by_dynamos_rules(requests), OF_EIGHT, WORKERS, ours), 4),
        "kvlab": round(_kvlab(requests, OF_EIGHT, WORKERS, ours), 4),
    }


def _run(file: Path, blocks: int, **options: Any) -> dict[str, Any]:
    begin = time.perf_counter()
    engine = {"engine": {**ENGINE, "num_gpu_blocks": blocks}}
    summary = run_mocker_trace_replay([str(file)], engine, trace_block_size=BLOCK_TOKENS, **options).summary
    rate = summary["prefix_cache_reused_ratio"]
    found = round(rate * summary["total_input_tokens"])
    return {**summary, "rate": rate, "found": found, "wall_s": time.perf_counter() - begin}


def _running(log: Path, replay_ms: float) -> dict[str, float]:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    ran = [(row["last_token_ms"] - row["first_admit_ms"]) / replay_ms for row in rows]
    blocks = [(row["input_length"] + row["output_length"]) / BLOCK_TOKENS for row in rows]
    return {"running": round(sum(ran), 1), "held": round(sum(map(mul, ran, blocks)))}


def _lru(requests: list[Request], blocks: int, answers: bool = True) -> int:
    """Return how many tokens of the prompts a small LRU finds: only full blocks, so there is nothing to cut off."""
    return BLOCK_TOKENS * sum(map(Cache(blocks).serve, as_dynamo(requests, answers)))


def _by_dynamos_rules(requests: list[Request]) -> list[Request]:
    uses = zip(requests, as_dynamo(requests), strict=True)
    return [dataclasses.replace(request, blocks=use.looked_up, kept=use.kept) for request, use in uses]


def _kvlab(requests: list[Request], blocks: int, workers: int = 1, router: str = "round_robin") -> float:
    setup = replay.Setup(device=blocks, nodes=workers, router=router)
    return replay.replay(requests, BLOCK_TOKENS, setup).hits.rates()["tokens"]


if __name__ == "__main__":
    main(measure)
