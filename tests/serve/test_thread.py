"""A scheduler in a thread: parts of answers, cancellation, and what happens when a step raises. No Ray."""

from __future__ import annotations

import queue

import pytest

import kvlab
from kvlab.engine.pages import PagePool, PoolExhausted
from kvlab.engine.requests import Busy
from kvlab.engine.scheduler import Scheduler
from kvlab.engine.workers import WorkerError
from kvlab.errors import InputError
from kvlab.serve.thread import SchedulerThread

WAIT_S = 30


@pytest.fixture
def thread(random_model):
    model = random_model()
    thread = SchedulerThread(Scheduler(model, PagePool(model, 32), max_batch=2, max_waiting=2))
    yield thread
    thread.close()
    assert thread.scheduler.pool.free.total == 32


class Sink:
    """Collects the parts of one request."""

    def __init__(self):
        self.parts = queue.SimpleQueue()

    def __call__(self, part):
        self.parts.put(part)

    def all(self):
        tokens, part = [], self.parts.get(timeout=WAIT_S)
        while part.record is None and part.error is None:
            tokens += part.tokens
            part = self.parts.get(timeout=WAIT_S)
        return tokens + part.tokens, part


def start(thread, id, tokens=(1, 2, 3), new=8):
    sink = Sink()
    return thread.submit(id, tokens, new, False, sink).result(WAIT_S), sink


def test_the_tokens_are_those_of_generate_and_the_end_comes_with_the_last_one(thread):
    sinks = {n: start(thread, str(n), [n, 2, 3])[1] for n in range(1, 5)}
    for n, sink in sinks.items():
        tokens, last = sink.all()
        assert tokens == kvlab.generate(thread.scheduler.model, [n, 2, 3], 8, stop_at_eos=False).tokens
        assert last.tokens == tokens[-1:] and last.record.reason == "length"


def test_refusals_reach_the_caller_and_nothing_else_notices(random_model, thread):
    small = SchedulerThread(Scheduler(thread.scheduler.model, PagePool(thread.scheduler.model, 4)))
    with pytest.raises(PoolExhausted):
        start(small, "bad", new=200)
    small.close()
    for tokens, new in (([], 4), ([1], 0), ("text", 4)):
        with pytest.raises(InputError):
            start(thread, "bad", tokens, new)
    assert start(thread, "good")[1].all()[1].record.reason == "length"


def test_a_full_queue_is_busy(thread):
    with pytest.raises(Busy):
        for n in range(20):
            start(thread, str(n), new=200)


def test_a_cancelled_request_ends_and_its_pages_are_free(thread):
    _, sink = start(thread, "a", new=200)
    sink.parts.get(timeout=WAIT_S)
    thread.cancel("a")
    thread.cancel("unknown")
    assert sink.all()[1].record.reason == "cancelled"
    assert thread.call(lambda: thread.scheduler.pool.free.total).result(WAIT_S) == 32


def test_a_sink_that_raises_costs_only_its_own_request(thread):
    def broken(part):
        raise RuntimeError("nobody listens")

    thread.submit("broken", [1, 2], 200, False, broken)
    assert start(thread, "good")[1].all()[1].record.reason == "length"
    assert thread.call(lambda: len(thread.scheduler)).result(WAIT_S) == 0


def test_a_step_that_raises_ends_all_requests_and_refuses_new_ones(thread):
    running = [start(thread, str(n), new=200)[1] for n in range(3)]

    def fail():
        raise RuntimeError("broken")

    thread.call(lambda: setattr(thread.scheduler, "step", fail))
    for sink in running:
        assert "a step of the scheduler failed: RuntimeError: broken" in str(sink.all()[1].error)
    with pytest.raises(WorkerError, match="broken"):
        start(thread, "late")
    assert "broken" in thread.failure


def test_closing_ends_what_runs(thread):
    _, sink = start(thread, "a", new=200)
    thread.close()
    assert "closed" in str(sink.all()[1].error)
    with pytest.raises(WorkerError, match="closed"):
        start(thread, "b")
