"""A scheduler in a thread of its own: requests go in from any thread, and their tokens come out as they are made."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import attrgetter
from queue import Empty, SimpleQueue
from typing import TypeVar

from kvlab.engine.requests import Output, Record
from kvlab.engine.scheduler import IDLE_S, Scheduler
from kvlab.engine.workers import WorkerError

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """What one step made of a request.

    Attributes:
        record: at the end.
        error: instead of the end, if the scheduler failed or was closed.
    """

    tokens: list[int] = field(default_factory=list)
    record: Record | None = None
    error: WorkerError | None = None


Sink = Callable[[Part], object]
"""Gets the parts of one request, in the scheduler's thread, so it must not wait."""


class SchedulerThread:
    """Runs a scheduler until it is closed or a step raises. Then all requests end with an error, and so do new ones.

    Attributes:
        failure: why it takes no more requests; empty while it does.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.failure = ""
        self._inbox: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._lock = threading.Lock()  # after `failure` is set, nothing is put into the inbox
        self._thread = threading.Thread(target=self._run, name="kvlab-scheduler", daemon=True)
        self._thread.start()

    def submit(
        self, id: str, tokens: Sequence[int], max_new_tokens: int, stop_at_eos: bool, sink: Sink
    ) -> Future[Record]:
        """See `Scheduler.submit`. The future has its errors, or a `WorkerError`."""

        def work() -> Record:
            record = self.scheduler.submit(id, tokens, max_new_tokens, stop_at_eos)
            self._sinks[id] = sink
            return record

        return self.call(work)

    def cancel(self, id: str) -> None:
        """See `Scheduler.cancel`. Nothing happens if the request has ended."""
        self.call(lambda: self.scheduler.cancel(id))

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Do something between two steps, in the scheduler's thread."""
        future: Future[T] = Future()
        with self._lock:
            if not self.failure:
                self._inbox.put(partial(_fulfil, future, work))
            else:
                future.set_exception(WorkerError(self.failure))
        return future

    def close(self) -> None:
        """End all requests, close the scheduler, and wait for that."""
        self.call(self._stop)
        if threading.current_thread() is not self._thread:  # the last reference may be gone in there
            self._thread.join()

    def _stop(self) -> None:
        self._fail("the worker was closed")

    def _run(self) -> None:
        while not self.failure:
            self._obey()
            if not self.failure:
                try:
                    outputs = self.scheduler.step()
                except BaseException as error:  # whatever it is, nobody may wait for this thread any more
                    logger.exception("a step of the scheduler failed")
                    self._fail(f"a step of the scheduler failed: {type(error).__name__}: {error}")
                else:
                    self._give_out(outputs)
        try:
            self.scheduler.close()
        except Exception:
            logger.exception("the scheduler could not be closed")

    def _obey(self) -> None:
        """Do what has come; wait for something if there is nothing to compute."""
        block = not len(self.scheduler)
        wait_s = IDLE_S if self.scheduler.is_waiting else 0.0
        while True:
            try:
                work = self._inbox.get(block or wait_s > 0, None if block else wait_s)
            except Empty:
                return
            work()
            block, wait_s = False, 0.0

    def _give_out(self, outputs: Sequence[Output]) -> None:
        for id, group in groupby(outputs, attrgetter("id")):  # the last token and the end in one part
            own = [*group]
            sink = self._sinks[id] if own[-1].record is None else self._sinks.pop(id)
            self._tell(id, sink, Part([o.token for o in own if o.token is not None], own[-1].record))

    def _tell(self, id: str, sink: Sink, part: Part) -> None:
        try:
            sink(part)
        except Exception:  # nobody listens any more
            logger.exception("a part of an answer could not be given out")
            self.scheduler.cancel(id)

    def _fail(self, failure: str) -> None:
        with self._lock:
            self.failure = failure
        while not self._inbox.empty():
            self._inbox.get()()
        for id, sink in self._sinks.items():
            self._tell(id, sink, Part(error=WorkerError(failure)))
        self._sinks.clear()


def _fulfil(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
