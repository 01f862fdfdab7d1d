"""SGLang's router between a trace in Mooncake's format and eight workers that only wait. It prints JSON.

    .venv-alternatives/bin/python scripts/alternatives/sglang_replay.py conversation_trace.jsonl

The router is the real one, a Rust program that knows of the workers only what it sent them. A block becomes eight
characters of text, so equal leading blocks are equal leading text. A worker has an LRU of blocks, computes one request
at a time, and takes a time for each block that it lacks. From which worker got which request follow the hit rate and
the balance. All sockets are on loopback.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prefix_lru import BLOCK_TOKENS, Cache, Use, main

from kvlab.errors import KVLabError
from kvlab.lab import replay, traces
from kvlab.lab.traces import Request
from kvlab.testbed.server import HOST, free_port

WORKERS = 8
CAPACITIES = (5_859, 4_000)
IN_FLIGHT = (1, 64, 128)
S_PER_BLOCK = 0.0005
READY_S = 30.0
POLICIES: dict[str, dict[str, Any]] = {
    "cache_aware": {"policy": "cache_aware"},
    "cache_aware, low thresholds": {
        "policy": "cache_aware",
        "balance_abs_threshold": 4,
        "balance_rel_threshold": 1.1,
    },
    "round_robin": {"policy": "round_robin"},
    "power_of_two": {"policy": "power_of_two"},
}
ROUTER = """
import ctypes, json, sys
from sglang_router.router import Router
from sglang_router.router_args import RouterArgs
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: end with the parent
Router.from_args(RouterArgs(**json.loads(sys.argv[1]))).start()
"""
ABOUT = (
    f"{WORKERS} workers. in_flight: so many requests at a time, in the order of the file, without its times; "
    "rate_5859, rate_4000: found leading blocks / all blocks, a last one that is not full counts like the others, for "
    "workers of so many blocks of 512 tokens; imbalance: blocks that the busiest worker computes / mean, and "
    "most_requests its requests, for the larger capacity; wall_s: a worker computes one request at a time, .5 ms a "
    "block, and with one in flight at once. Low thresholds: one worker has over 4 requests more than another, and over "
    "1.1 times as many; the defaults are 64 and 1.5. kvlab: the same requests one after another in kvlab's replay"
)


class Worker(ThreadingHTTPServer):
    """A server that answers like an engine of SGLang, but after a time for each block that it lacks."""

    daemon_threads = True
    request_queue_size = max(IN_FLIGHT)

    def __init__(self, s_per_block: float) -> None:
        super().__init__((HOST, 0), _Handler)
        self.served: list[Sequence[int]] = []
        self._s_per_block, self._cache, self._one = s_per_block, Cache(CAPACITIES[0]), threading.Lock()

    def compute(self, blocks: list[int]) -> None:
        """Serve a request, after those that came before it."""
        with self._one:
            self.served.append(blocks)
            time.sleep(self._s_per_block * _missing(self._cache, blocks))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits for a delayed acknowledgement
    server: Worker

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer(200 if self.path in ("/health", "/server_info", "/model_info") else 404, {"model_path": "none"})

    def do_POST(self) -> None:
        self.server.compute(_from_text(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]))
        self._answer(200, {"text": ""})

    def _answer(self, status: int, value: dict[str, str]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def measure(file: Path) -> dict[str, Any]:
    """Send the trace through each policy, with three numbers of requests in flight."""
    requests = list(traces.Trace(file))
    blocks = [request.blocks for request in requests]
    return {
        "about": ABOUT,
        "requests": len(requests),
        "blocks": sum(map(len, blocks)),
        "runs": [_run(blocks, name, in_flight) for name in POLICIES for in_flight in IN_FLIGHT],
        "kvlab": [_kvlab(requests, router) for router in ("round_robin", "sglang", "cost")],
    }


def _run(requests: list[Sequence[int]], policy: str, in_flight: int) -> dict[str, Any]:
    s_per_block = S_PER_BLOCK if in_flight > 1 else 0.0  # one after another, a delay would change nothing
    with _workers(s_per_block) as workers, _router(POLICIES[policy], workers) as port:
        begin = time.perf_counter()
        _send([_text(blocks) for blocks in requests], port, in_flight)
        seconds = time.perf_counter() - begin
        served = [worker.served for worker in workers]
    if sum(map(len, served)) != len(requests):
        raise KVLabError(f"expected {len(requests)} requests at the workers, got {sum(map(len, served))}")
    computed = {capacity: [_computed(queue, capacity) for queue in served] for capacity in CAPACITIES}
    blocks = sum(map(len, requests))
    return {
        "policy": policy,
        "in_flight": in_flight,
        **{f"rate_{capacity}": round(1 - sum(by_worker) / blocks, 4) for capacity, by_worker in computed.items()},
        "imbalance": round(max(computed[CAPACITIES[0]]) * WORKERS / sum(computed[CAPACITIES[0]]), 2),
        "most_requests": max(map(len, served)),
        "wall_s": round(seconds, 1),
    }


def _kvlab(requests: list[Request], router: str) -> dict[str, Any]:
    row: dict[str, Any] = {"router": router}
    for capacity in CAPACITIES:
        setup = replay.Setup(device=capacity, nodes=WORKERS, router=router)
        replayed = replay.replay(requests, BLOCK_TOKENS, setup)
        row[f"rate_{capacity}"] = round(replayed.hits.rates()["blocks"], 4)
        row.setdefault("imbalance", round(replayed.imbalance, 2))
    return row


def _text(blocks: Sequence[int]) -> str:
    """Eight characters a block, the lowest digit first: texts of different blocks differ early."""
    return "".join(f"{block:07x}"[::-1] + " " for block in blocks)


def _from_text(text: str) -> list[int]:
    return [int(digits[::-1], 16) for digits in text.split()]


def _missing(cache: Cache, blocks: Sequence[int]) -> int:
    return len(blocks) - cache.serve(Use(blocks, blocks, len(blocks)))


def _computed(served: list[Sequence[int]], capacity: int) -> int:
    cache = Cache(capacity)
    return sum(_missing(cache, blocks) for blocks in served)


# --- processes and sockets ----------------------------------------------------------------------
@contextlib.contextmanager
def _workers(s_per_block: float) -> Iterator[list[Worker]]:
    workers = [Worker(s_per_block) for _ in range(WORKERS)]
    for worker in workers:
        threading.Thread(target=worker.serve_forever, daemon=True).start()
    try:
        yield workers
    finally:
        for worker in workers:
            worker.shutdown()
            worker.server_close()


@contextlib.contextmanager
def _router(options: dict[str, Any], workers: list[Worker]) -> Iterator[int]:
    urls = [f"http://{HOST}:{worker.server_port}" for worker in workers]
    settings = {**options, "worker_urls": urls, "host": HOST, "port": (port := free_port()), "log_level": "error"}
    settings |= {"prometheus_host": HOST, "prometheus_port": free_port()}
    process = subprocess.Popen([sys.executable, "-c", ROUTER, json.dumps(settings)], stdout=subprocess.DEVNULL)
    try:
        _wait_until_ready(process, port)
        yield port
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    give_up = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < give_up:
        with contextlib.suppress(OSError, KeyError), contextlib.closing(http.client.HTTPConnection(HOST, port)) as link:
            link.request("GET", "/workers")
            if sum(worker["is_healthy"] for worker in json.load(link.getresponse())["workers"]) == WORKERS:
                return
        time.sleep(0.1)
    raise KVLabError(f"expected SGLang's router to know {WORKERS} workers within {READY_S:.0f} s; see above")


def _send(texts: list[str], port: int, in_flight: int) -> None:
    local = threading.local()

    def send(text: str) -> None:
        if not hasattr(local, "link"):
            local.link = http.client.HTTPConnection(HOST, port, 60)
        local.link.request("POST", "/generate", json.dumps({"text": text}), {"Content-Type": "application/json"})
        answer = local.link.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise KVLabError(f"expected an answer of SGLang's router, got {answer.status}: {body[:200]!r}")

    with ThreadPoolExecutor(in_flight) as senders:
        list(senders.map(send, texts))


if __name__ == "__main__":
    main(measure)
