"""Minutes of mixed load on two workers over one Redis: are answers right, memory flat, pages back, connections bounded?

python -m tests.faults.soak_workers --minutes 10 [--json]

Clients submit prompts of three kinds (short, with a shared start, long), stream some answers, cancel some, and send
some that are refused. Every answer is compared with that of `generate`. Samples are taken meanwhile.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch

from kvlab.engine import generate
from kvlab.engine.pages import PoolExhausted
from kvlab.engine.worker import WorkerSettings
from kvlab.engine.workers import WorkerGroup
from kvlab.errors import InputError
from kvlab.lab.machine import describe_machine, versions
from kvlab.testbed.server import RedisServer
from tests.engine.test_generate import words
from tests.harness.helpers import attentive_model, save_folder

PAGES, CLIENTS, PROMPTS, NEW, CONTEXT = 96, 6, 48, 12, 1024
SAMPLE_S = 1.0
HOST_BYTES = 1 << 20  # full after a few seconds, so that growth after that would be a leak
SERVER = ("--maxmemory", "6mb", "--maxmemory-policy", "allkeys-lru")


def prompt_of(number: int) -> list[int]:
    """Short ones, some that begin alike, and long ones."""
    if number % 3 == 0:
        return words(9 + number, seed=number)
    if number % 3 == 1:
        return words(256, seed=number % 4) + words(20 + number, seed=number)
    return words(500 + 4 * number, seed=number)


class Load:
    """What the clients do, and what came of it."""

    def __init__(self, group: WorkerGroup) -> None:
        self.group, self.counts, self.wrong = group, Counter[str](), []  # type: ignore[var-annotated]
        self.sources: Counter[str] = Counter()
        self._model = attentive_model(context=CONTEXT)
        self._right: dict[int, list[int]] = {}
        self._lock, self.stop = threading.Lock(), threading.Event()

    def right(self, number: int) -> list[int]:
        """The answer, computed in this process."""
        with self._lock:
            if number not in self._right:
                self._right[number] = generate(self._model, prompt_of(number), NEW, stop_at_eos=False).tokens
            return self._right[number]

    def client(self, seed: int) -> None:
        """One after the other, until it is to stop."""
        rng = random.Random(seed)
        while not self.stop.is_set():
            try:
                self.once(rng)
            except Exception as error:
                with self._lock:
                    self.wrong.append(repr(error))

    def once(self, rng: random.Random) -> None:
        """One request."""
        kind = rng.choices(["whole", "streamed", "cancelled", "refused"], [6, 3, 2, 1])[0]
        number = rng.randrange(PROMPTS)
        right, got = self.right(number), []
        if kind == "refused":
            tokens, error = rng.choice([([], InputError), ([97], InputError)])
            try:
                self.group.submit(tokens, NEW).result(60)
            except (error, PoolExhausted):
                got = right
        else:
            answer = self.group.submit(prompt_of(number), NEW, stop_at_eos=False)
            if kind == "whole":
                got = answer.result(60)
            elif kind == "streamed":
                got = [*answer]
            else:
                time.sleep(rng.random() * 0.05)
                answer.cancel()
                got = answer.result(60)
                right = right[: len(got)]
            if answer.record is not None:
                with self._lock:
                    self.sources += answer.record.sources
        with self._lock:
            self.counts[kind] += 1
            if got != right:
                self.wrong.append((kind, number, got))


def run(seconds: float) -> dict[str, Any]:
    """The load for so long; what was right, and the samples."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, RedisServer(*SERVER) as server:
        model = save_folder(attentive_model(context=CONTEXT), Path(folder) / "model")
        settings = WorkerSettings(
            str(model),
            server.url,
            pages=PAGES,
            host_bytes=HOST_BYTES,
            tiers={"planner": False},  # a model as small as this one computes faster than any store answers
            max_batch=4,
            max_step_tokens=128,
        )
        with WorkerGroup(2, settings) as group:
            return _loaded(group, server, seconds)


def _loaded(group: WorkerGroup, server: RedisServer, seconds: float) -> dict[str, Any]:
    load, client = Load(group), server.client()
    for number in range(PROMPTS):
        load.right(number)
    threads = [threading.Thread(target=load.client, args=(seed,), daemon=True) for seed in range(CLIENTS)]
    processes = {"here": psutil.Process()} | {f"worker {n}": psutil.Process(pid) for n, pid in group.pids.items()}
    rss: dict[str, list[float]] = {name: [] for name in processes}
    connections: list[int] = []
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    while time.monotonic() < begin + seconds:
        time.sleep(SAMPLE_S)
        connections.append(client.info("clients")["connected_clients"] - 1)
        for name, process in processes.items():
            rss[name].append(process.memory_info().rss / 2**20)
    load.stop.set()
    for thread in threads:
        thread.join(60)
    time.sleep(1.0)  # the last saves
    stats = group.stats()
    third = max(1, len(connections) // 3)
    return {
        "seconds": seconds,
        "requests": dict(load.counts),
        "wrong": len(load.wrong),
        "first_wrong": load.wrong[:3],
        "hanging_clients": sum(thread.is_alive() for thread in threads),
        "sources": dict(load.sources),
        "preemptions": sum(s["scheduler"].get("preemptions", 0) for s in stats.values()),
        "evicted_keys": client.info("stats")["evicted_keys"],
        "pages_missing": sum(s["pool"]["pages"] - s["pool"]["free"] - s["pool"]["idle"] for s in stats.values()),
        "tables": sum(s["pool"]["tables"] for s in stats.values()),
        "requests_left": sum(s["requests"] for s in stats.values())
        + sum(len(process.answers) for process in group._processes.values()),
        "load_left": sum(c.load for c in group._balance.candidates({})),
        "workers": [*stats],
        "connections_first_third": max(connections[:third]),
        "connections_most": max(connections),
        "rss_mib_second_third": {name: round(statistics.median(s[third : 2 * third]), 1) for name, s in rss.items()},
        "rss_mib_last_third": {name: round(statistics.median(s[2 * third :]), 1) for name, s in rss.items()},
        "machine": describe_machine(),
        "versions": versions(),
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = run(60 * args.minutes)
    print(json.dumps(result, indent=1) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
