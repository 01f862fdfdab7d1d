"""Time to first token, with a prefix that is computed or comes from each of the three tiers.

python -m kvlab bench ttft --json

Every contender is a call of `generate` with the same prompt, over one pool of pages. "cold" computes it all.
"device" shares pages, in a run or scattered. "host" copies blocks out of host memory. "redis" fetches records from
a real server over TCP, checks them and unpacks them. The last 16 tokens are always computed.

The model is the shipped one. Its context is extended here, which changes no time: it has learned 1,024 tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from kvlab.cache import DistributedKVCache
from kvlab.core.keys import Namespace
from kvlab.engine import Generation, generate
from kvlab.engine.pages import PAGE_TOKENS, PagePool
from kvlab.engine.tiers import TieredCache
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.reachable import open_reachable
from kvlab.lab.timing import Timings, time_rounds
from kvlab.model import Llama, Tokenizer, held_out_tokens, load_model
from kvlab.stores import MemoryStore, Store
from kvlab.testbed.server import RedisServer

ABOUT = (
    "rows: milliseconds to the first token of a prompt of prefix_tokens + 16, FP32 compute. cold: all computed; "
    "device: pages shared; host: FP16 blocks copied from host memory; redis: raw FP16 records, of `bytes` bytes in "
    "all. speedup_…: cold by the tier, median of the ratios of each round; …_scattered: the pages are not "
    "neighbours. others: other precisions and codecs, at the longest prefix of at most 2,048. growth: how many "
    "milliseconds more than `device` a tier takes for each MiB that moves, between the shortest and the longest prefix"
)
PREFIXES = (128, 256, 512, 1024, 2048, 4096)
SUFFIX = 16
OTHERS = {
    "fp16 zstd": ("fp16", True),
    "fp32 raw": ("fp32", False),
    "int8 raw": ("int8", False),
    "int8 zstd": ("int8", True),
    "int4 zstd": ("int4", True),
}
DEADLINE_S = 10.0
TTL_S = 600  # of the records, which an interrupted benchmark does not delete
MIB = 1 << 20


def run(store: str | None = None, prefixes: tuple[int, ...] = PREFIXES, rounds: int = 9) -> dict[str, Any]:
    """Measure with the server with this URL; without one, with a server that the benchmark starts.

    Args:
        rounds: timed repetitions.

    Raises:
        ConfigError: the URL is not a store URL.
        KVLabError: the store does not work, or there is no `redis-server` to start.
    """
    model = model_for(max(prefixes) + SUFFIX + 1)
    text = held_out_tokens(Tokenizer())
    with ExitStack() as stack:
        url = store or stack.enter_context(RedisServer()).url
        rows, times = zip(*(_row(model, text[: n + SUFFIX], url, rounds) for n in prefixes), strict=True)
        longest = max((n for n in prefixes if n <= 2048), default=min(prefixes))
        others, other_times = _others(model, text[: longest + SUFFIX], url, rounds)
    all_times: tuple[Timings, ...] = (*times, *other_times)
    return {
        "about": ABOUT,
        "rows": list(rows),
        "others": others,
        "growth": {tier: _growth(rows, tier) for tier in ("host", "redis")},
        "threads": torch.get_num_threads(),
        "aa_ratio": max((t.aa_ratio for t in all_times), key=lambda ratio: abs(ratio - 1)),
        "noisy": any(t.noisy for t in all_times),
        "machine": describe_machine(),
        "versions": versions(),
    }


def model_for(context: int) -> Llama:
    """The shipped model with room for `context` tokens."""
    model = load_model()
    if context <= model.config.max_position_embeddings:
        return model
    longer = Llama(dataclasses.replace(model.config, max_position_embeddings=context))
    longer.load_state_dict(model.state_dict())
    return longer.requires_grad_(False).eval()


def _row(model: Llama, prompt: list[int], url: str, rounds: int) -> tuple[dict[str, Any], Timings]:
    with _tiers(model, prompt, url, "fp16", False) as (host, redis):
        contenders: dict[str, Callable[[], Generation]] = {
            "cold": functools.partial(_first_token, model, prompt, None, _pool(model, prompt)),
            "device": _device(model, prompt, host.namespace, scattered=False),
            "device_scattered": _device(model, prompt, host.namespace, scattered=True),
            "host": functools.partial(_first_token, model, prompt, host, _pool(model, prompt)),
            "redis": functools.partial(_first_token, model, prompt, redis, _pool(model, prompt)),
        }
        times = time_rounds(contenders, rounds, seconds_of=lambda result: result.ttft_s)
        loads = redis.stats().sources["store"] // (len(prompt) // redis.block_tokens)
        row = {
            "prefix_tokens": len(prompt) - SUFFIX,
            **{f"{name}_ms": times.median_ms(name) for name in ("cold", "device", "host", "redis")},
            **{f"speedup_{name}": times.ratio("cold", name) for name in contenders if name != "cold"},
            "bytes": redis.stats().bytes_read // loads,
        }
    return row, times


def _others(model: Llama, prompt: list[int], url: str, rounds: int) -> tuple[dict[str, Any], list[Timings]]:
    rows, all_times = {}, []
    for name, (precision, compress) in OTHERS.items():
        with _tiers(model, prompt, url, precision, compress) as (host, redis):
            tiers: dict[str, TieredCache | None] = {"cold": None, "host": host, "redis": redis}
            contenders: dict[str, Callable[[], Generation]] = {
                tier: functools.partial(_first_token, model, prompt, cache, _pool(model, prompt))
                for tier, cache in tiers.items()
            }
            times = time_rounds(contenders, rounds, seconds_of=lambda result: result.ttft_s)
            rows[name] = {
                "prefix_tokens": len(prompt) - SUFFIX,
                **{f"{tier}_ms": times.median_ms(tier) for tier in tiers},
                **{f"speedup_{tier}": times.ratio("cold", tier) for tier in ("host", "redis")},
                "bytes": redis.store.stats().bytes_written,
            }
        all_times.append(times)
    return rows, all_times


@contextmanager
def _tiers(
    model: Llama, prompt: list[int], url: str, precision: str, compress: bool
) -> Iterator[tuple[TieredCache, TieredCache]]:
    """A host tier and a store that have the prefix, and nothing else that could give it. The records are deleted."""

    def over(store: Store, host_bytes: int) -> TieredCache:
        inner = DistributedKVCache(store=store, model=model, precision=precision, compress=compress, describe=False)
        return TieredCache(inner, host_bytes, planner=False, write="through" if not host_bytes else "back")

    with (
        open_reachable(url, ttl_s=TTL_S, deadline_s=DEADLINE_S) as server,
        over(MemoryStore(), 512 * MIB) as host,
        over(server, 0) as redis,
    ):
        for cache in (host, redis):
            _first_token(model, prompt, cache, None)
        try:
            yield host, redis
        finally:
            server.delete_many(redis.namespace.keys(prompt))


def _first_token(model: Llama, prompt: list[int], cache: TieredCache | None, pool: PagePool | None) -> Generation:
    return generate(model, prompt, 1, cache, pool=pool)


def _pool(model: Llama, prompt: list[int]) -> PagePool:
    """Pages that remember nothing, so that a contender's pages are not new memory each time."""
    return PagePool(model, -(-(len(prompt) + 1) // PAGE_TOKENS))


def _device(model: Llama, prompt: list[int], namespace: Namespace, scattered: bool) -> Callable[[], Generation]:
    """A request whose prefix is in the pool already, in neighbouring pages or in pages of which no two are."""
    pages = -(-(len(prompt) + 1) // PAGE_TOKENS)
    pool = PagePool(model, 2 * pages + 2, namespace)
    if scattered:
        tables = [pool.new_table(capacity=PAGE_TOKENS) for _ in range(2 * pages + 2)]
        for table in tables[::2]:
            pool.close(table)
    _first_token(model, prompt, None, pool)
    return functools.partial(_first_token, model, prompt, None, pool)


def _growth(rows: tuple[dict[str, Any], ...], tier: str) -> float:
    """Milliseconds for each further MiB, beyond what the same request takes with shared pages."""
    first, last = rows[0], rows[-1]
    more = (last[f"{tier}_ms"] - last["device_ms"]) - (first[f"{tier}_ms"] - first["device_ms"])
    return float(more / max((last["bytes"] - first["bytes"]) / MIB, 1e-9))
