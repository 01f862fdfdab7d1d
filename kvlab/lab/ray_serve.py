"""What Ray Serve does with kvlab's scheduler: seconds to ready, tokens, the shared store, a replica that is killed.

.venv-ray/bin/python -m kvlab.lab.ray_serve

It needs Ray (`make test-ray` makes the environment) and a `redis-server`, and prints JSON. Ray starts processes and
reads its settings once, so notebooks run this in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from typing import Any

from kvlab.engine import generate
from kvlab.model import Tokenizer, held_out_tokens, load_model
from kvlab.serve import Stream, WorkerSettings, application, deploy, private_ray
from kvlab.testbed.server import RedisServer

REQUESTS, PROMPT, NEW = 6, 160, 120
AFTER = 20  # tokens of the first answer, until its replica is killed


def run() -> dict[str, Any]:
    """Start all of it, serve the same requests twice, kill a replica in the second half.

    Raises:
        KVLabError: Ray or `redis-server` is missing, or a replica cannot be made.
    """
    model, text = load_model(), held_out_tokens(Tokenizer())
    prompts = [text[i * 200 :][:PROMPT] for i in range(REQUESTS)]
    expected = [generate(model, prompt, NEW, stop_at_eos=False).tokens for prompt in prompts]
    with RedisServer() as redis:
        begin = time.perf_counter()
        with private_ray():
            handle = deploy(application(WorkerSettings(store=redis.url), replicas=2, cpus=0.5))
            ready_s = time.perf_counter() - begin
            first = asyncio.run(_serve(handle, prompts))
            again = asyncio.run(_serve(handle, prompts, kill=True))
    return {
        "ready_s": round(ready_s, 1),
        "replicas": 2,
        "same_tokens": [[stream.tokens for stream in streams] == expected for streams in (first, again)],
        "sources": [dict(_sources(streams)) for streams in (first, again)],
        "lost": sum(stream.lost for stream in again),
    }


async def _serve(handle: Any, prompts: list[list[int]], kill: bool = False) -> list[Stream]:
    streams = [Stream(handle, prompt, NEW, stop_at_eos=False) for prompt in prompts]

    async def drain(stream: Stream, victim: bool) -> None:
        async for _ in stream:
            if victim and len(stream.tokens) == AFTER:
                busy = [await handle.status.remote() for _ in range(4)]
                os.kill(max(busy, key=lambda status: status["requests"])["pid"], signal.SIGKILL)

    await asyncio.gather(*(drain(stream, kill and i == 0) for i, stream in enumerate(streams)))
    return streams


def _sources(streams: list[Stream]) -> Counter[str]:
    total: Counter[str] = Counter()
    for stream in streams:
        total += Counter((stream.record or {}).get("sources", {}))
    return total


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run()) + "\n")
