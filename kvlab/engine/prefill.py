"""The KV of a prompt, from wherever it is fastest: shared pages, host memory, the store, and the model.

    shared pages | front: computed  | fetched meanwhile | lost block: computed | fetched | tail: computed

With a `TieredCache`, its planner says which blocks to fetch and which to compute. What has not arrived in time, or
is lost, is computed, and only that: a gap does not make the blocks behind it useless. Any other `KVCache` is one
store whose longest prefix is loaded.

`filling` is a coroutine that never calls the model: it asks for what is to be computed. `prefill` answers it at once,
for one request; a scheduler answers many of them in turn.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from kvlab.cache.base import KVCache
from kvlab.engine.pages import BlockTable
from kvlab.engine.planner import Plan, Step
from kvlab.engine.tiers import TieredCache
from kvlab.errors import InputError
from kvlab.model import Llama


@dataclass
class Prefill:
    """A prompt whose KV is in its table.

    Attributes:
        logits: of the last token.
        sources: tokens by the tier that their KV came from: "device", "host", "store". The others were computed.
        first_to_save: the tokens before it are in the cache already.
        probe_s, fetch_s: seconds until the tiers had said what they have, and from then on until the blocks were
            there. If a front is computed meanwhile, `fetch_s` includes it.
    """

    logits: Tensor
    sources: Counter[str]
    first_to_save: int
    plan: Plan | None = None
    probe_s: float = 0.0
    fetch_s: float = 0.0


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


Filling = Generator[Step | None, Tensor | None, Prefill]
"""See `filling`."""


def prefill(model: Llama, prompt: Tensor, table: BlockTable, cache: KVCache | None) -> Prefill:
    """Fill a table with the KV of a prompt, and wait for whatever it takes.

    Args:
        prompt: [1, T].
        table: with room for T tokens; the blocks of `table.keys` are in their pages.
    """
    job = filling(prompt[0].tolist(), table, cache)
    logits: Tensor | None = None
    while True:
        try:
            step = job.send(logits)
        except StopIteration as end:
            return cast(Prefill, end.value)
        assert step is not None, "a job that may wait does so itself"
        begin = time.perf_counter()
        logits = model(prompt[:, step.start : step.stop], table, step.start, last_only=True)[:, -1]
        note_computed(cache, step, logits, begin)


def note_computed(cache: KVCache | None, step: Step, logits: Tensor, begin: float, share: float = 1.0) -> None:
    """Tell the planner how long the model took for some tokens.

    Args:
        share: of the time since `begin`, what these tokens took.
    """
    if isinstance(cache, TieredCache):
        if logits.is_cuda:
            torch.cuda.synchronize()
        cache.planner.computed(step.start, step.stop, share * (time.perf_counter() - begin))


def filling(
    tokens: Sequence[int], table: BlockTable, cache: KVCache | None, waits: bool = True, counts: bool = True
) -> Filling:
    """Fill a table with the KV of a prompt, as a coroutine: it says what to compute, and does everything else.

    Args:
        table: with room for all tokens; the blocks of `table.keys` are in their pages.
        waits: whether it may wait for a store. If not, the cache is a `TieredCache` or None.
        counts: whether the cache counts what it finds; not for a request that is prefilled a second time.

    Yields:
        Tokens whose KV is to be computed into the table, to be answered with the logits [1, vocab] of the last one.
        None: something is on its way; to be asked again.

    Returns:
        What came from where.
    """
    T = len(tokens)
    shared = len(table.keys) * table.pool.pages_per_block * table.pool.page_tokens
    if isinstance(cache, TieredCache):
        return (yield from _by_plan(tokens, table, cache, shared, waits, counts))
    loaded = fill_from(cache, tokens, table, shared) if cache else shared
    start = min(loaded, T - 1)  # the logits of the last token are needed, and nobody holds logits
    sources = Counter(device=min(shared, start), store=start - min(shared, start))
    return Prefill(_answer((yield Step(start, T))), +sources, 0 if shared else start)


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
    tokens: Sequence[int], table: BlockTable, cache: TieredCache, shared: int, waits: bool, counts: bool
) -> Filling:
    """Carry out the plan of the cache's planner, and compute whatever did not come."""
    T, B, planner = len(tokens), cache.block_tokens, cache.planner
    keys = cache.namespace.keys(tokens)
    asked_at = time.perf_counter()
    found = cache.locating(keys, shared // B, waits, counts)
    while (where := found()) is None:
        yield None
    begin = time.perf_counter()
    plan = planner.plan(["" if tier == "device" else tier for tier in where], T, shared)
    asked = [i for step in plan.fetches for i in range(step.start // B, step.stop // B)]
    places = [Place(table, i * B, (i + 1) * B) for i in asked]
    logits: Tensor | None = None
    with cache.fetch([keys[i] for i in asked], [where[i] for i in asked], [place.out for place in places]) as fetch:
        for step in plan.front:
            logits = yield step
        while not waits and not fetch.poll(cache.wait_s):
            yield None
        filled = fetch.finish(cache.wait_s)
    fetched = time.perf_counter()
    if counts:
        cache.count(fetch, filled, asked)
    for place, there in zip(places, filled, strict=True):
        if there:
            place.write()
    got = {i: where[i] for i, there in zip(asked, filled, strict=True) if there}
    known = [*range(shared // B), *got, *(i for step in plan.front for i in range(step.start // B, step.stop // B))]
    for step in _gaps(known, B, T):
        logits = yield step
    planner.finished(plan, time.perf_counter() - begin)
    if plan.probe is not None:
        at = plan.probe.start // B
        cache.prefetch(keys[at : at + 1], where[at : at + 1])
    sources = Counter(["device"] * shared) + Counter(tier for tier in got.values() for _ in range(B))
    if len(keys) * B == T and (tier := got.get(len(keys) - 1, "device" if shared == T else "")):
        sources[tier] -= 1  # the last token was computed in any case
    return Prefill(_answer(logits), +sources, 0, plan, begin - asked_at, fetched - begin if asked else 0.0)


def _answer(logits: Tensor | None) -> Tensor:
    if logits is None:
        raise InputError("expected the logits of the tokens that were asked for, got None")
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
