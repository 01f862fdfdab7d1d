"""Helpers of the scheduler's tests: stores that block, and a run that checks everything after each step."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvlab.engine import generate
from kvlab.engine.pages import PagePool
from kvlab.engine.requests import Output, Record
from kvlab.engine.scheduler import Scheduler
from kvlab.engine.tiers import TieredCache
from kvlab.stores import MemoryStore
from tests.engine.test_tiers import MODEL, WAIT_S, B, words

Prompt = list[int]


@functools.cache
def _plain(prompt: tuple[int, ...], new: int, stop_at_eos: bool) -> list[int]:
    return generate(MODEL, list(prompt), new, stop_at_eos=stop_at_eos).tokens


def plain(prompt: Sequence[int], new: int, stop_at_eos: bool = False) -> list[int]:
    """What the model says to a prompt alone, without any cache."""
    return list(_plain(tuple(prompt), new, stop_at_eos))


def serving(pages: int = 80, cache: TieredCache | None = None, page_tokens: int = B, **settings: Any) -> Scheduler:
    """A scheduler with a pool of its own."""
    if cache is not None:
        return Scheduler(MODEL, PagePool(MODEL, pages, cache.namespace, page_tokens), cache, **settings)
    return Scheduler(MODEL, PagePool(MODEL, pages, None, page_tokens), **settings)


def submit(scheduler: Scheduler, lengths: Sequence[int], new: int) -> dict[str, list[int]]:
    """Submit a prompt of each length; return the answers that are right."""
    expected = {}
    for i, length in enumerate(lengths):
        scheduler.submit(str(i), words(length, seed=i), new, stop_at_eos=False)
        expected[str(i)] = plain(words(length, seed=i), new)
    return expected


def check(scheduler: Scheduler) -> None:
    """What holds between any two steps."""
    scheduler.pool.check_integrity()
    cache = scheduler.cache
    if cache is not None:
        cache.host.check_integrity()
        cache.stats().check()
    assert len(scheduler._active) <= scheduler.max_batch
    assert len(scheduler) == len(scheduler._waiting) + len(scheduler._active)
    saves = [] if scheduler._saver is None else scheduler._saver._saves
    tables = [r.table for r in scheduler._active] + [save.table for save in saves]
    assert scheduler.pool.tables == set(tables), "a table of nobody"
    assert all(r.table is r.job is r.todo is None and not r.known for r in scheduler._waiting)


class Stream:
    """What came out of steps: checked to be each request's tokens in order, once, then its end."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, Record] = {}

    def take(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            assert output.id not in self.ended, "something after the end"
            answer = self.tokens.setdefault(output.id, [])
            assert output.index == len(answer)
            if output.token is None:
                assert output.record is not None and output.record.tokens == answer
                self.ended[output.id] = output.record
            else:
                assert output.record is None
                answer.append(output.token)


def until(
    scheduler: Scheduler, done: Callable[[], bool], stream: Stream | None = None, seconds: float = WAIT_S
) -> Stream:
    """Do steps until something is so, and check everything after each."""
    stream = stream or Stream()
    give_up = time.monotonic() + seconds
    while not done():
        stream.take(scheduler.step())
        check(scheduler)
        assert time.monotonic() < give_up, "it takes too long"
        if scheduler.is_waiting:
            time.sleep(0.0005)
    return stream


def to_the_end(scheduler: Scheduler, stream: Stream | None = None) -> Stream:
    """Do steps until no request is left."""
    return until(scheduler, lambda: not len(scheduler) and not scheduler._outputs, stream)


def all_pages_back(scheduler: Scheduler) -> bool:
    """Close a scheduler; return whether every page of its pool can be had again."""
    scheduler.close()
    pool = scheduler.pool
    pool.check_integrity()
    assert not pool.tables
    with pool.new_table(capacity=len(pool.refs) * pool.page_tokens):
        return not pool.index.blocks


def at_once(cache: TieredCache) -> TieredCache:
    """The same tiers without threads for look-ups and fetches: who is in which step is always the same."""
    cache._outer.readers.submit = lambda job: job()  # type: ignore[method-assign, assignment, return-value]
    return cache


class HungStore(MemoryStore):
    """Its calls named in `hangs` wait until the test sets `gate`. `began`: the first one has come."""

    def __init__(self, *hangs: str) -> None:
        super().__init__()
        self.hangs = set(hangs)
        self.gate, self.began = threading.Event(), threading.Event()

    def _maybe(self, call: str) -> None:
        if call in self.hangs:
            self.began.set()
            assert self.gate.wait(WAIT_S)

    def get_many(self, keys: Sequence[bytes], out: Any = None, reasons: Any = None) -> list[Any]:
        self._maybe("get")
        return super().get_many(keys, out, reasons)

    def put_many(self, keys: Sequence[bytes], values: Sequence[Any]) -> int:
        self._maybe("put")
        return super().put_many(keys, values)

    def touch_many(self, keys: Sequence[bytes]) -> list[bool]:
        self._maybe("touch")
        return super().touch_many(keys)
