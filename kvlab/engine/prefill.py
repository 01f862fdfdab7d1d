"""The KV of a prompt, from wherever it is fastest: shared pages, host memory, the store, and the model.

    shared pages | front: computed  | fetched meanwhile | lost block: computed | fetched | tail: computed

With a `TieredCache`, its planner says which blocks to fetch and which to compute. What has not arrived in time, or
is lost, is computed, and only that: a gap does not make the blocks behind it useless. Any other `KVCache` is one
store whose longest prefix is loaded.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlab.cache.base import KVCache
from kvlab.engine.pages import BlockTable
from kvlab.engine.planner import Plan, Planner, Step
from kvlab.engine.tiers import TieredCache
from kvlab.model import Llama


@dataclass
class Prefill:
    """A prompt whose KV is in its table.

    Attributes:
        logits: of the last token.
        sources: tokens by the tier that their KV came from: "device", "host", "store". The others were computed.
        first_to_save: the tokens before it are in the cache already.
    """

    logits: Tensor
    sources: Counter[str]
    first_to_save: int
    plan: Plan | None = None


def make_room(table: BlockTable, tokens: int, cache: KVCache | None) -> None:
    """Give a table room for `tokens` tokens in all. Blocks that are evicted for it go to the host tier.

    Raises:
        PoolExhausted: there is no room; the table has not changed.
    """
    pool = table.pool
    if isinstance(cache, TieredCache) and cache.exclusive:
        copied = pool.page_tokens if len(table.keys) * cache.block_tokens == tokens else 0  # its last token is computed
        for key, kv in pool.evict_for(table, tokens + copied):
            cache.evicted(key, kv)
    pool.grow(table, tokens)


def prefill(model: Llama, prompt: Tensor, table: BlockTable, cache: KVCache | None) -> Prefill:
    """Fill a table with the KV of a prompt.

    Args:
        prompt: [1, T].
        table: with room for T tokens; the blocks of `table.keys` are in their pages.
    """
    T = prompt.shape[1]
    shared = len(table.keys) * table.pool.pages_per_block * table.pool.page_tokens
    tokens = prompt[0].tolist()
    if isinstance(cache, TieredCache):
        return _by_plan(model, prompt, tokens, table, cache, shared)
    loaded = fill_from(cache, tokens, table, shared) if cache else shared
    start = min(loaded, T - 1)  # the logits of the last token are needed, and nobody holds logits
    sources = Counter(device=min(shared, start), store=start - min(shared, start))
    return Prefill(model(prompt[:, start:], table, start, last_only=True), +sources, 0 if shared else start)


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


def _by_plan(
    model: Llama, prompt: Tensor, tokens: Sequence[int], table: BlockTable, cache: TieredCache, shared: int
) -> Prefill:
    """Carry out the plan of the cache's planner, and compute whatever did not come."""
    T, B, planner = len(tokens), cache.block_tokens, cache.planner
    keys = cache.namespace.keys(tokens)
    where = cache.locate(keys, shared // B)
    begin = time.perf_counter()
    plan = planner.plan(["" if tier == "device" else tier for tier in where], T, shared)
    asked = [i for step in plan.fetches for i in range(step.start // B, step.stop // B)]
    places = [Place(table, i * B, (i + 1) * B) for i in asked]
    logits = prompt
    with cache.fetch([keys[i] for i in asked], [where[i] for i in asked], [place.out for place in places]) as fetch:
        for step in plan.front:
            logits = _compute(model, prompt, table, planner, step)
        filled = fetch.finish(cache.wait_s)
    cache.count(fetch, filled)
    for place, there in zip(places, filled, strict=True):
        if there:
            place.write()
    got = {i: where[i] for i, there in zip(asked, filled, strict=True) if there}
    known = [*range(shared // B), *got, *(i for step in plan.front for i in range(step.start // B, step.stop // B))]
    for step in _gaps(known, B, T):
        logits = _compute(model, prompt, table, planner, step)
    planner.finished(plan, time.perf_counter() - begin)
    if plan.probe is not None:
        at = plan.probe.start // B
        cache.prefetch(keys[at : at + 1], where[at : at + 1])
    sources = Counter(["device"] * shared) + Counter(tier for tier in got.values() for _ in range(B))
    if len(keys) * B == T and (tier := got.get(len(keys) - 1, "device" if shared == T else "")):
        sources[tier] -= 1  # the last token was computed in any case
    return Prefill(logits, +sources, 0, plan)


def _compute(model: Llama, prompt: Tensor, table: BlockTable, planner: Planner, step: Step) -> Tensor:
    """Compute the KV of some tokens behind others that are in the table; return the logits of the last one."""
    begin = time.perf_counter()
    logits: Tensor = model(prompt[:, step.start : step.stop], table, step.start, last_only=True)
    if logits.is_cuda:
        torch.cuda.synchronize()
    planner.computed(step.start, step.stop, time.perf_counter() - begin)
    return logits


def _gaps(known: Sequence[int], B: int, T: int) -> list[Step]:
    """The runs of tokens that are in none of the known blocks; the last one is always there, and ends with T."""
    edges = [-1, *sorted(known), -(-T // B)]
    gaps = [Step((a + 1) * B, b * B) for a, b in itertools.pairwise(edges[:-1]) if b > a + 1]
    return [*gaps, Step(min((edges[-2] + 1) * B, T - 1), T)]


class Place:
    """Where the KV of tokens start … stop - 1 goes.

    Attributes:
        out: [L, P, H, stop - start, D], in the pages themselves if these are neighbours.
    """

    def __init__(self, table: BlockTable, start: int, stop: int) -> None:
        self._table, self._start = table, start
        view = table.pool.view(table, start, stop)
        self._is_view = view is not None
        data = table.pool.data
        shape = (*data.shape[:3], stop - start, data.shape[-1])
        self.out = torch.empty(shape, dtype=data.dtype, device=data.device) if view is None else view

    def write(self) -> None:
        """Write the contents of `out` into the pages, if they are elsewhere."""
        if not self._is_view:
            pool = self._table.pool
            pool.write(pool.data, self._table, self.out, self._start)
