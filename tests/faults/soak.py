"""Many threads and processes on one server for a while: is every value right, are connections and memory bounded?

python tests/faults/soak.py --seconds 60 --json > docs/results/soak.json

Each worker loads and saves blocks of prompts that all of them share, so that they meet; a
small server evicts under them. Every value that comes back is compared with what it must be.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from kvlab.cache import DistributedKVCache
from kvlab.core.keys import KVSpec
from kvlab.lab.machine import describe_machine, versions
from kvlab.stores import RedisStore
from kvlab.testbed.server import RedisServer

B, BLOCKS, PROMPTS = 16, 8, 40
SPEC = KVSpec(layers=4, heads=2, head_dim=32, dtype=torch.float32, fingerprint=b"soak" * 8)
CONNECTIONS = 16
SAMPLE_S = 1.0


def kv_of(prompt: int) -> torch.Tensor:
    """What this prompt's KV is, whoever asks: 512 KiB."""
    shape = (SPEC.layers, 2, SPEC.heads, B * BLOCKS, SPEC.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(prompt))


def tokens_of(prompt: int) -> list[int]:
    """This prompt's tokens; nothing shared, so that every block has one right content."""
    return [prompt * 1000 + i for i in range(B * BLOCKS)]


def work(url: str, threads: int, seconds: float, deadline_s: float) -> dict[str, Any]:
    """One process: so many threads over one store."""
    torch.set_num_threads(1)
    store = RedisStore(url, ttl_s=600, deadline_s=deadline_s, max_connections=CONNECTIONS)
    cache = DistributedKVCache(precision="fp32", store=store, model=SPEC, block_tokens=B, compress=False)
    right = [kv_of(prompt) for prompt in range(PROMPTS)]
    end = time.monotonic() + seconds
    wrong, raised, loads = [0], Counter[str](), [0]

    def one_thread(seed: int) -> None:
        order = torch.randint(PROMPTS, (100_000,), generator=torch.Generator().manual_seed(seed)).tolist()
        out = torch.empty_like(right[0])
        for prompt in order:
            if time.monotonic() > end:
                return
            try:
                stop = cache.load(tokens_of(prompt), 0, B * BLOCKS, out)
                wrong[0] += not torch.equal(out[:, :, :, :stop], right[prompt][:, :, :, :stop])
                loads[0] += 1
                if stop < B * BLOCKS:
                    cache.save(tokens_of(prompt), right[prompt], stop)
            except Exception as error:
                raised[repr(error)] += 1

    workers = [
        threading.Thread(target=one_thread, args=(multiprocessing.current_process().pid * 100 + i,))
        for i in range(threads)
    ]
    for worker in workers:
        worker.start()
    rss = []
    while any(worker.is_alive() for worker in workers):
        time.sleep(SAMPLE_S / 2)
        rss.append(_rss_mib())
    stats = store.stats()
    stats.check()
    cache.stats().check()
    store.close()
    third = max(1, len(rss) // 3)
    return {
        "loads": loads[0],
        "wrong": wrong[0],
        "raised": dict(raised),
        "requested": stats.requested,
        "hits": stats.hits,
        "misses": dict(stats.misses),
        "drops": dict(stats.drops),
        "rss_mib_after_a_third": max(rss[:third]),
        "rss_mib_at_the_end": rss[-1],
    }


def _rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if sys.platform == "linux" else 0
    return pages * resource.getpagesize() / 2**20


def run(seconds: float, processes: int = 8, threads: int = 8, deadline_s: float = 5.0) -> dict[str, Any]:
    """`processes` times `threads` threads; what they saw together, and what the server did."""
    with RedisServer("--maxmemory", "16mb", "--maxmemory-policy", "allkeys-lru") as server:
        jobs = [(server.url, threads, seconds, deadline_s)] * processes
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            pending = pool.starmap_async(work, jobs)
            watched = _watch(server, pending)
            results: Sequence[dict[str, Any]] = pending.get()
    together = {name: sum(r[name] for r in results) for name in ("loads", "wrong", "requested", "hits")}
    counters = {
        name: dict(sum((Counter(r[name]) for r in results), Counter())) for name in ("raised", "misses", "drops")
    }
    return {
        "seconds": seconds,
        "processes": processes,
        "threads_each": threads,
        **together,
        **counters,
        **watched,
        "connections_allowed": processes * CONNECTIONS,
        "rss_mib_after_a_third": [round(r["rss_mib_after_a_third"], 1) for r in results],
        "rss_mib_at_the_end": [round(r["rss_mib_at_the_end"], 1) for r in results],
        "machine": describe_machine(),
        "versions": versions(),
    }


def _watch(server: RedisServer, pending: Any) -> dict[str, Any]:
    client = server.client()
    connections, used = [], []
    while not pending.ready():
        connections.append(client.info("clients")["connected_clients"] - 1)
        used.append(client.info("memory")["used_memory"] / 2**20)
        time.sleep(SAMPLE_S)
    return {
        "most_connections": max(connections),
        "server_mib_most": round(max(used), 1),
        "evicted_keys": client.info("stats")["evicted_keys"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = run(args.seconds, args.processes, args.threads)
    print(json.dumps(result, indent=1) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
