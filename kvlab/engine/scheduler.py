"""Continuous batching: many requests over one page pool, in steps.

    submit -> waiting -> filling (probe, fetch, prefill in chunks) -> decoding -> finished
                 ^                                                       |
                 +------------ preempted: the pool is full --------------+

A step is one pass of the model (`kvlab.engine.batch`): the next token of every request that decodes, and as many
prompt tokens of the others as fit into the budget. So a request joins or leaves between two steps, and a long prompt
does not stop the answers of the others for longer than a chunk takes. A step waits for no store: look-ups, fetches
and saves are under way in other threads meanwhile. There is one exception: with exclusive tiers and write-back, a block
that leaves the device may displace one in host memory that must be written first.

A request that lacks mostly what another one is being filled with waits for that, and lets those behind it pass.

When the pool is full, the request that was admitted last gives its pages back and starts again later, with the
tokens it already has. What it then finds or computes a second time is no hit, and `Record.recomputed` counts it.

Sources: Yu et al., 2022 (Orca: iteration-level scheduling); Agrawal et al., 2024 (Sarathi-Serve: chunked prefills).
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvlab.engine.batch import Row, forward
from kvlab.engine.pages import BlockTable, PagePool, PoolExhausted
from kvlab.engine.planner import Step
from kvlab.engine.prefill import Filling, Prefill, filling, make_room, note_computed
from kvlab.engine.requests import Busy, Output, Record, Totals
from kvlab.engine.saver import Saver, check_retention
from kvlab.engine.tiers import TieredCache
from kvlab.errors import ConfigError, InputError
from kvlab.model import Llama

AHEAD_PAGES: Final = 8
"""Pages that a request gets ahead of need, where many are free: then its pages are neighbours, and read in place."""
IDLE_S: Final = 0.0005
"""How long `run` sleeps when there is nothing to compute, because everything is on its way."""


@dataclass(eq=False)
class _Request:
    """A request that has not ended.

    Attributes:
        limit: the most new tokens.
        table: while it is admitted.
        job: the prefill, while it is not done.
        keys: of its full blocks, from the first attempt to admit it on.
        todo: what the job wants computed, as far as that was not done; None while it waits for a store.
        known: leading tokens whose KV is in the table.
        saved: leading blocks that were offered to the cache.
    """

    record: Record
    prompt: list[int]
    limit: int
    stop_at_eos: bool
    ttl_s: float | None = None
    table: BlockTable | None = None
    job: Filling | None = None
    keys: Sequence[bytes] = ()
    todo: Step | None = None
    known: int = 0
    saved: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.record.tokens


class Scheduler:
    """Serves requests over one model and one pool. Not thread-safe: one thread calls it.

    Args:
        pool: the pages; nobody else uses the pool. With a cache, it needs the cache's namespace.
        cache: the tiers behind the pool.
        max_batch: requests that are worked on at the same time.
        max_step_tokens: the most tokens of one step; prompts are cut into chunks accordingly.
        max_waiting: requests that wait to be admitted. One more is refused.
        max_saves: prompts on their way into the cache. Of more, the new blocks are not saved.
        save: whether new blocks are saved.
        clock: returns seconds. Can be replaced in tests.

    Attributes:
        counts: steps, preemptions, and saves begun, dropped and failed.
        totals: tokens by source, ends and times to the first token.

    Raises:
        ConfigError: a number is not a whole number of at least 1, pool and cache do not fit each other, or the pool
            has a scheduler already.
    """

    def __init__(
        self,
        model: Llama,
        pool: PagePool,
        cache: TieredCache | None = None,
        *,
        max_batch: int = 16,
        max_step_tokens: int = 256,
        max_waiting: int = 256,
        max_saves: int = 8,
        save: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        sizes = {"max_batch": max_batch, "max_step_tokens": max_step_tokens, "max_waiting": max_waiting}
        for name, size in {**sizes, "max_saves": max_saves}.items():
            if type(size) is not int or size < 1:
                raise ConfigError(f"expected {name} as a whole number of at least 1, got {size!r}")
        if max_step_tokens < max_batch:
            raise ConfigError(f"expected max_step_tokens of at least max_batch ({max_batch}), got {max_step_tokens}")
        if cache is not None and (not isinstance(cache, TieredCache) or cache.namespace != pool.namespace):
            raise ConfigError("expected a TieredCache, and a pool with its namespace: PagePool(…, cache.namespace)")
        if cache is not None and not pool.prefix_caching:
            raise ConfigError("expected a pool with prefix_caching for a cache: it would never save anything")
        if pool.tables or (pool.owner is not None and pool.owner() is not None):
            raise ConfigError("expected a pool that nobody uses; each scheduler has a pool of its own")
        pool.owner = weakref.ref(self)
        self.model, self.pool, self.cache = model, pool, cache
        self.max_batch, self.max_step_tokens, self.max_waiting = max_batch, max_step_tokens, max_waiting
        self._clock = clock
        self.counts: Counter[str] = Counter()
        self.totals = Totals()
        self._waiting: deque[_Request] = deque()
        self._active: list[_Request] = []  # in the order of their admission
        self._by_id: dict[str, _Request] = {}
        self._outputs: list[Output] = []  # that no step has returned yet; an exception in a step loses none
        self._refused = ("", 0)  # who was not admitted last, with how many pages
        self._saver = None if cache is None or not save else Saver(pool, cache, max_saves, self.counts)
        self._closed = False

    # --- requests -------------------------------------------------------------------------------
    def submit(
        self,
        id: str,
        tokens: Sequence[int],
        max_new_tokens: int = 32,
        stop_at_eos: bool = True,
        ttl_s: float | None = None,
    ) -> Record:
        """Queue a request; return its record, which the steps fill in.

        Args:
            ttl_s: how long the store keeps its blocks, see `DistributedKVCache.save`.

        Raises:
            ConfigError: `ttl_s` is no TTL, or there is no store with a TTL to keep it.
            Busy: too many requests wait.
            InputError: `id` is that of a request that has not ended, the prompt is empty, too long or has unknown
                tokens, or `max_new_tokens` is not a whole number of at least 1.
            PoolExhausted: the pool is too small for this request even when nothing else runs.
        """
        if self._closed:
            raise InputError("expected an open scheduler; it was closed")
        if not isinstance(id, str) or id in self._by_id:
            raise InputError(f"expected the id of a new request as a string, got {id!r}")
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise InputError(f"expected max_new_tokens as a whole number of at least 1, got {max_new_tokens!r}")
        check_retention(self.cache, ttl_s)
        prompt = self.model.check_tokens(tokens, max_new_tokens)[0].tolist()
        pages = -(-(len(prompt) + max_new_tokens) // self.pool.page_tokens) + 1  # one to copy a shared page into
        if pages > len(self.pool.refs):
            raise PoolExhausted(f"the request needs up to {pages} pages, and the pool has {len(self.pool.refs)}")
        if len(self._waiting) >= self.max_waiting:
            raise Busy(f"{len(self._waiting)} requests are waiting, as many as allowed; try again later")
        record = Record(id, len(prompt), submitted_at=self._clock())
        request = _Request(record, prompt, max_new_tokens, stop_at_eos, ttl_s)
        self._waiting.append(request)
        self._by_id[id] = request
        return record

    def cancel(self, id: str) -> bool:
        """End a request, with what it has; return whether there was such a request. The next step gives out its end."""
        request, now = self._by_id.get(id), self._clock()
        if request is None:
            return False
        if request in self._active:
            self._active.remove(request)
            self._release(request)  # the pages are free now
        else:
            self._waiting.remove(request)
        self._finish(request, "cancelled", now)
        return True

    @property
    def load(self) -> int:
        """Tokens that are yet to be computed for the requests that are here, if each answer is as long as it may be."""
        return sum(len(r.prompt) + r.limit - 1 - r.known for r in self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    # --- steps ----------------------------------------------------------------------------------
    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Do one pass of the model, if there is something to compute; return what came out."""
        if self._saver is not None:
            self._saver.collect()
        self._admit()
        rows = self._rows()
        if rows:
            self.counts["steps"] += 1
            begin = time.perf_counter()
            logits = forward(self.model, self.pool, [*rows.values()])
            tokens = logits.argmax(-1).tolist()
            self._note_times(rows, logits, begin)
            for i, (request, row) in enumerate(rows.items()):
                request.known = row.stop
                if request.job is None:
                    self._emit(request, tokens[i])
                elif request.todo is not None and row.stop < request.todo.stop:
                    request.todo = Step(row.stop, request.todo.stop)
                else:
                    self._go_on(request, logits[i : i + 1])
        for request in [r for r in self._active if r.job is not None and r.todo is None]:
            self._go_on(request, None)
        outputs, self._outputs = self._outputs, []
        return outputs

    def _admit(self) -> None:
        """Give requests their pages, in the order in which they came, as long as there are enough."""
        while self._waiting and len(self._active) < self.max_batch:
            request = self._next()
            if request is None:
                return
            room = self.pool.free.total + self.pool.index.idle
            if self._refused == (request.record.id, room):  # nothing has changed; asking is a use of its blocks
                return
            keys = request.keys
            table = self.pool.new_table(keys, counts=False)
            try:
                self._make_room(request, table, len(request.tokens))
                self._keep_headroom()
            except BaseException as error:
                self.pool.close(table)
                if not isinstance(error, PoolExhausted):
                    raise
                if self.is_waiting and self._saver is not None and self._saver.revoke():
                    continue  # nothing else would give pages back before the store answers
                self._refused = request.record.id, room
                return
            request.table = table
            first_time = not request.record.preemptions
            request.job = filling(request.tokens, table, self.cache, waits=False, counts=first_time)
            self._waiting.remove(request)
            self._active.append(request)
            if first_time:
                self.pool.counts += Counter(requested=len(keys), hits=len(table.keys))
                request.record.admitted_at = self._clock()
            self._go_on(request, None)

    def _next(self) -> _Request | None:
        """The first request that waits, without those that lack mostly what others are being filled with."""
        coming = {key for r in self._active if r.job is not None for key in r.keys}
        for request in itertools.islice(self._waiting, self.max_batch):
            request.keys = request.keys or self.pool.keys(request.tokens)
            missing = [*itertools.dropwhile(self.pool.index.__contains__, request.keys)]
            found_later = sum(1 for _ in itertools.takewhile(coming.__contains__, missing))
            if not (found_later and self.pool.prefix_caching) or 2 * found_later < len(missing):
                return request
        return None

    def _make_room(self, request: _Request, table: BlockTable, tokens: int) -> None:
        """Give a table room for `tokens` tokens, and some pages ahead if many are free.

        Else the pages behind a prompt belong to the next one, and a table that is no run of neighbours is copied
        together for every token.

        Raises:
            PoolExhausted: there is no room; the table has not changed.
        """
        grows = tokens > table.capacity
        make_room(table, tokens, self.cache)
        if grows and self.pool.free.total > self.max_batch * AHEAD_PAGES:
            end = len(request.prompt) + request.limit
            self.pool.grow(table, min(end, tokens + AHEAD_PAGES * self.pool.page_tokens))

    def _keep_headroom(self) -> None:
        """Leave a page for each request that runs and for the new one, or it would be preempted soon.

        Raises:
            PoolExhausted: there are too few.
        """
        if self.pool.free.total + self.pool.index.idle <= len(self._active):
            raise PoolExhausted(f"{len(self._active) + 1} requests may soon need a page each")

    def _rows(self) -> dict[_Request, Row]:
        """The tokens of the next pass: one for each request that decodes, then chunks of prompts."""
        rows: dict[_Request, Row] = {}
        budget = self.max_step_tokens
        decoding = [r for r in self._active if r.job is None]
        for request in [*decoding, *(r for r in self._active if r.job is not None)]:
            if request.job is None:
                stop = len(request.tokens)
                start = stop - 1
            elif request.todo is not None:
                start, stop = request.todo.start, min(request.todo.stop, request.todo.start + budget)
            else:
                continue
            if stop > start and self._has_room(request, start, stop, rows):
                assert request.table is not None
                rows[request] = Row(request.table, request.tokens[start:stop], start)
                budget -= stop - start
        return rows

    def _has_room(self, request: _Request, start: int, stop: int, rows: dict[_Request, Row]) -> bool:
        """Get the pages for some tokens; if need be, from the requests that were admitted last, itself included."""
        while request.table is not None:
            try:
                self._make_room(request, request.table, stop)
                self.pool.make_writable(request.table, start, stop)
                return True
            except PoolExhausted:
                if self._saver is not None and self._saver.revoke():
                    continue
                victim = self._active[-1]
                rows.pop(victim, None)
                self._preempt(victim)
        return False

    def _preempt(self, request: _Request) -> None:
        """Take a request's pages, and let it start again before all others that wait."""
        self.counts["preemptions"] += 1
        request.record.preemptions += 1
        self._publish(request)  # what nobody needs until then, it finds again
        self._active.remove(request)
        self._release(request)
        request.keys = ()  # there are more tokens now
        self._waiting.appendleft(request)

    def _go_on(self, request: _Request, logits: Tensor | None) -> None:
        """Let a prefill go on until it wants something computed, waits, or is done.

        A job that an exception has ended (Ctrl-C may, anywhere) says nothing of the KV: its request starts again.
        """
        assert request.job is not None
        try:
            request.todo = request.job.send(logits)
            return
        except StopIteration as end:
            filled: Prefill | None = end.value
        if filled is None:  # an exception had ended it
            self._preempt(request)
            return
        record, known = request.record, len(request.tokens)
        if record.tokens:
            record.recomputed += known
            self.totals.recomputed += known
        else:
            record.sources = filled.sources + Counter(computed=known - filled.sources.total())
            self.totals.sources += record.sources
        record.probe_s += filled.probe_s
        record.fetch_s += filled.fetch_s
        request.job, request.todo, request.known = None, None, known
        self._publish(request)
        self._save(request)  # now: a request right behind it, on another worker, finds the prefix
        self._emit(request, int(filled.logits.argmax()))

    def _emit(self, request: _Request, token: int) -> None:
        """Add a token to an answer; end the request if it was the last one."""
        record, now = request.record, self._clock()
        is_eos = request.stop_at_eos and token in self.model.config.eos_token_ids
        is_last = is_eos or len(record.tokens) + 1 >= request.limit
        if is_last:  # first of all: if an exception comes here, the next step computes the token again
            self._publish(request)
            self._save(request)
        if not record.tokens:
            record.first_token_at = now
            self.totals.ttft[record.sources["computed"] < record.prompt_tokens].observe(now - record.submitted_at)
        record.tokens.append(token)
        record.token_at.append(now)
        self._outputs.append(Output(record.id, len(record.tokens) - 1, token))
        if is_last:
            self._active.remove(request)
            self._release(request)
            self._finish(request, "eos" if is_eos else "length", now)

    def _finish(self, request: _Request, reason: str, now: float) -> None:
        record = request.record
        record.reason, record.finished_at = reason, now
        self.totals.ended[reason] += 1
        del self._by_id[record.id]
        self._outputs.append(Output(record.id, len(record.tokens), None, record))

    def _release(self, request: _Request) -> None:
        if request.job is not None:
            request.job.close()  # ends what is under way
        if request.table is not None:
            self.pool.close(request.table)
        request.job = request.todo = request.table = None
        request.known = 0

    def _note_times(self, rows: dict[_Request, Row], logits: Tensor, begin: float) -> None:
        took = time.perf_counter() - begin
        prefilled = sum(len(row.tokens) for request, row in rows.items() if request.job is not None)
        for request, row in rows.items():
            if request.job is None:
                request.record.decode_s += took
            else:
                request.record.prefill_s += took
                share = len(row.tokens) / prefilled  # the planner is to know how long a request waits for a chunk
                note_computed(self.cache, Step(row.start, row.stop), logits, begin, share)

    # --- blocks ---------------------------------------------------------------------------------
    def _publish(self, request: _Request) -> None:
        """Put the full blocks of a request whose prefill is done into the index of the pool."""
        if request.table is not None and request.job is None:
            self.pool.publish(request.table, self.pool.keys(request.tokens[: request.known]))
            if self.cache is not None:
                self.cache.on_device(request.table.keys)

    def _save(self, request: _Request) -> None:
        """Begin to save the blocks that are new since the last time."""
        table = request.table
        if self._saver is not None and table is not None and len(table.keys) > request.saved:
            self._saver.begin(table, request.tokens, request.saved, request.ttl_s)
            request.saved = len(table.keys)

    def run(self) -> Iterator[Output]:
        """Do steps until no request is left."""
        while self._by_id or self._outputs:
            outputs = self.step()
            yield from outputs
            if not outputs and self.is_waiting:
                time.sleep(IDLE_S)

    @property
    def is_waiting(self) -> bool:
        """Whether there is nothing to compute now: everything is on its way from a store, or nothing is to be done."""
        return not any(r.todo is not None or r.job is None for r in self._active)

    def close(self) -> None:
        """Cancel all requests, wait for the saves, and give all pages back. The pool and the cache stay open."""
        for id in list(self._by_id):
            self.cancel(id)
        self._outputs.clear()
        if self._saver is not None:
            self._saver.close()
        if not self._closed:  # later the pool may be another one's
            self._closed, self.pool.owner = True, None

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
