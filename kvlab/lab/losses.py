"""What is lost when an engine is killed, under each write policy. The engine is a process, the store a real server.

The process serves requests, says so, and gets SIGKILL: no handler runs, nothing is flushed. Then the server's
blocks are counted.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

from kvlab.cache import DistributedKVCache
from kvlab.core.keys import Namespace
from kvlab.engine import generate
from kvlab.engine.tiers import TieredCache
from kvlab.errors import KVLabError
from kvlab.model import Llama, Tokenizer, held_out_tokens, load_model
from kvlab.stores import RedisStore, WriteBehind

PROMPTS, TOKENS, SHARED = 8, 320, 128
DEADLINE_S, START_S = 10.0, 120.0


def prompts() -> list[list[int]]:
    """Eight prompts that begin with the same 128 tokens."""
    text = held_out_tokens(Tokenizer())
    own = TOKENS - SHARED
    return [[*text[:SHARED], *text[SHARED + i * own : SHARED + (i + 1) * own]] for i in range(PROMPTS)]


def lost_blocks(url: str, write: str, behind: bool = False) -> dict[str, Any]:
    """Kill an engine with -9 after eight requests; return how many of its blocks the server has, and how many not.

    Args:
        url: of an empty server. Its keys are deleted at the end.
        write: the write policy, see `TieredCache`.
        behind: whether a `WriteBehind` is in front of the store, which is killed at once after the last request.

    Raises:
        KVLabError: the engine did not start.
    """
    command = [sys.executable, "-m", "kvlab.lab.losses", url, write, "behind" if behind else "now"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as engine:
        give_up = threading.Timer(START_S, engine.kill)
        give_up.start()
        assert engine.stdout is not None
        said = engine.stdout.readline()
        engine.kill()
        give_up.cancel()
    if said != "served\n":
        raise KVLabError(f"expected an engine that serves {PROMPTS} requests, got {said!r}")
    model = load_model()
    with RedisStore(url, deadline_s=DEADLINE_S) as store:
        keys = {key for prompt in prompts() for key in _names(model).keys(prompt)}
        stored = sum(store.touch_many([*keys]))
        store.delete_many([*keys])
    return {"write": write, "blocks": len(keys), "stored": stored, "lost": len(keys) - stored}


def _cache(url: str, model: Llama, write: str, behind: bool) -> TieredCache:
    redis = RedisStore(url, deadline_s=DEADLINE_S)
    store = WriteBehind(redis) if behind else redis
    return TieredCache(DistributedKVCache(store=store, model=model, precision="fp16"), write=write)


def _names(model: Llama) -> Namespace:
    return DistributedKVCache(model=model, precision="fp16").namespace


def _serve(url: str, write: str, behind: str) -> None:
    model = load_model()
    cache = _cache(url, model, write, behind == "behind")
    for prompt in prompts():
        generate(model, prompt, 1, cache)
    sys.stdout.write("served\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
