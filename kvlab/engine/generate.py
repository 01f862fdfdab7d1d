"""Greedy generation over pages, with the tiers before the prefill.

    pages in the pool -> where are the other blocks -> plan -> fetch and compute -> decode -> save

The generated tokens are the same for an empty, partly filled, slow or broken cache, and for any contents of
the pool, if model, pool and cache use fp32. This module runs one request at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvlab.cache.base import KVCache
from kvlab.engine.pages import PAGE_TOKENS, BlockTable, PagePool
from kvlab.engine.planner import Plan
from kvlab.engine.prefill import Prefill, make_room, prefill
from kvlab.engine.saver import check_retention
from kvlab.engine.tiers import TieredCache
from kvlab.errors import InputError
from kvlab.model import Llama


@dataclass(frozen=True)
class Generation:
    """The result of one request.

    Attributes:
        tokens: the new tokens.
        prompt_tokens: the length of the prompt.
        cached_tokens: the number of prompt tokens whose KV was not computed: `shared_tokens`, and those loaded
            from the cache.
        shared_tokens: the number of prompt tokens whose pages were in the pool.
        ttft_s: seconds from the call to the first new token, including cache look-up and load.
        total_s: seconds from the call to the last new token, without the save.
        saved_blocks: the result of `KVCache.save`; with tiers, blocks that are in any of them.
        sources: the cached tokens by tier: "device" (`shared_tokens`), "host", "store". A plain cache is a store.
        plan: what a planner chose, if there was one to choose.
    """

    tokens: list[int]
    prompt_tokens: int
    cached_tokens: int
    ttft_s: float
    total_s: float
    saved_blocks: int = 0
    shared_tokens: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    plan: Plan | None = None


@torch.inference_mode()
def generate(
    model: Llama,
    tokens: Sequence[int],
    max_new_tokens: int = 32,
    cache: KVCache | None = None,
    stop_at_eos: bool = True,
    pool: PagePool | None = None,
    ttl_s: float | None = None,
) -> Generation:
    """Continue `tokens` greedily.

    Args:
        pool: pages that requests share; without one, the request gets pages of its own.
        ttl_s: see `DistributedKVCache.save`.

    Raises:
        InputError: the prompt is empty or too long, a token is not in the vocabulary, or cache and pool do not
            fit each other.
        ConfigError: `ttl_s` is no TTL, or cannot be kept.
        PoolExhausted: the pool has too few pages for the request. The pool is as if it had not been made.
    """
    begin = time.perf_counter()
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise InputError(f"expected max_new_tokens as a whole number of at least 1, got {max_new_tokens!r}")
    prompt = model.check_tokens(tokens, max_new_tokens)
    tokens = prompt[0].tolist()  # a copy, so that block keys and KV belong to the same tokens
    T = prompt.shape[1]
    pool = pool or PagePool(model, -(-(T + max_new_tokens) // PAGE_TOKENS))
    _check_fit(pool, cache)
    check_retention(cache, ttl_s)
    with pool.new_table(pool.keys(tokens)) as table:
        make_room(table, T, cache)
        filled = prefill(model, prompt, table, cache)
        new = [int(filled.logits.argmax())]
        ttft = time.perf_counter() - begin
        while len(new) < max_new_tokens and not (stop_at_eos and new[-1] in model.config.eos_token_ids):
            step = torch.tensor([[new[-1]]], device=model.device)
            make_room(table, T + len(new), cache)
            new.append(int(model(step, table, T + len(new) - 1, last_only=True).argmax()))
        total = time.perf_counter() - begin
        known = [*tokens, *new[:-1]]  # the KV of the last token was not computed
        pool.publish(table, pool.keys(known))
        saved = _save(cache, known, table, filled, ttl_s) if cache else 0
    return Generation(
        new, T, filled.sources.total(), ttft, total, saved, filled.sources["device"], dict(filled.sources), filled.plan
    )


def _save(cache: KVCache, known: Sequence[int], table: BlockTable, filled: Prefill, ttl_s: float | None) -> int:
    if isinstance(cache, TieredCache):
        cache.on_device(table.keys)
    kv, first = table.read(len(known)), filled.first_to_save
    return cache.save(known, kv, first, **({} if ttl_s is None else {"ttl_s": ttl_s}))


def _check_fit(pool: PagePool, cache: KVCache | None) -> None:
    names = pool.namespace
    if isinstance(cache, TieredCache) and cache.exclusive and names is None:
        raise InputError(
            "expected a pool with a namespace for exclusive tiers, which keep on the device what it has: "
            "PagePool(model, pages=…, namespace=cache.namespace)"
        )
    if cache is None or names is None:
        return
    whole = getattr(cache, "namespace", names)  # a learner's cache has none
    if (names.block_tokens, names.precision) != (cache.block_tokens, cache.precision):
        got = f"blocks of {names.block_tokens} at {names.precision} and {cache.block_tokens} at {cache.precision}"
        raise InputError(f"expected a pool and a cache of the same blocks, got {got}; give the pool cache.namespace")
    if names != whole:
        raise InputError("expected a pool and a cache of the same model and salt; give the pool cache.namespace")
