"""Greedy generation over pages, with a KV cache before the prefill.

    pages in the pool -> match -> load -> prefill the rest -> decode -> save

The generated tokens are the same for an empty, partly filled, slow or broken cache, and for any contents of
the pool, if model, pool and cache use fp32. This module runs one request at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvlab.cache.base import KVCache
from kvlab.engine.pages import PAGE_TOKENS, BlockTable, PagePool
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
        saved_blocks: the result of `KVCache.save`.
    """

    tokens: list[int]
    prompt_tokens: int
    cached_tokens: int
    ttft_s: float
    total_s: float
    saved_blocks: int = 0
    shared_tokens: int = 0


@torch.inference_mode()
def generate(
    model: Llama,
    tokens: Sequence[int],
    max_new_tokens: int = 32,
    cache: KVCache | None = None,
    stop_at_eos: bool = True,
    pool: PagePool | None = None,
) -> Generation:
    """Continue `tokens` greedily.

    Args:
        pool: pages that requests share; without one, the request gets pages of its own.

    Raises:
        InputError: the prompt is empty or too long, a token is not in the vocabulary, or cache and pool do not
            fit each other.
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
    with pool.new_table(pool.keys(tokens), T) as table:
        shared = len(table.keys) * pool.pages_per_block * pool.page_tokens
        filled = fill_from(cache, tokens, table, shared) if cache else shared
        cached = min(filled, T - 1)  # the logits of the last token are needed, and nobody holds logits
        logits = model(prompt[:, cached:], table, cached, last_only=True)
        new = [int(logits.argmax())]
        ttft = time.perf_counter() - begin
        while len(new) < max_new_tokens and not (stop_at_eos and new[-1] in model.config.eos_token_ids):
            step = torch.tensor([[new[-1]]], device=model.device)
            pool.grow(table, T + len(new))
            new.append(int(model(step, table, T + len(new) - 1, last_only=True).argmax()))
        total = time.perf_counter() - begin
        known = [*tokens, *new[:-1]]  # the KV of the last token was not computed
        pool.publish(table, pool.keys(known))
        saved = cache.save(known, table.read(len(known)), 0 if shared else cached) if cache else 0
    return Generation(new, T, cached, ttft, total, saved, min(shared, cached))


def fill_from(cache: KVCache, tokens: Sequence[int], table: BlockTable, start: int) -> int:
    """Load the longest cached prefix of `tokens` into a table that has the KV of the first `start` tokens.

    Returns:
        The position before which the table is filled, `start` or more.
    """
    found = cache.match(tokens)
    if found <= start:
        return start
    pool = table.pool
    out = table.read(found)[:, :, :, start:]
    stop = cache.load(tokens, start, found, out)
    if not table.is_run:  # `out` is a copy
        pool.write(pool.data, table, out[:, :, :, : stop - start], start)
    return stop


def _check_fit(pool: PagePool, cache: KVCache | None) -> None:
    names = pool.namespace
    if cache is None or names is None:
        return
    if (names.block_tokens, names.precision) != (cache.block_tokens, cache.precision):
        got = f"blocks of {names.block_tokens} at {names.precision} and {cache.block_tokens} at {cache.precision}"
        raise InputError(f"expected a pool and a cache of the same blocks, got {got}; give the pool cache.namespace")
