"""Asynchronous writes: a bounded queue in front of a store. One thread writes the queue to the store."""

from __future__ import annotations

import copy
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from kvlab.errors import ConfigError
from kvlab.stores.base import (
    Health,
    Store,
    StoreStats,
    Value,
    check_buffers,
    check_clock,
    check_keys,
    check_number,
    check_own_ttl,
    check_ttl,
    check_values,
    deliver,
    joined,
    pieces,
)
from kvlab.stores.faults import Reason
from kvlab.stores.fork import reset_in_children
from kvlab.stores.latch import Latch

BATCH_BYTES = 4 << 20
HOLD_S = 0.05
FADE = 0.5
"""How much a batch counts for the pace of the store, compared with the one after it."""
logger = logging.getLogger(__name__)


class WriteBehind(Store):
    """A wrapper for another store. Its `put_many` returns immediately.

    Values are copied into a queue and written in order of arrival. A cache may lose values, but it must not block
    its engine, so new values are dropped, before they are copied, if the queue is full ("queue_full") or the store
    too slow ("pressure"): if, at the pace of its last batches, writing what is queued would take longer than
    `patience_s`. Single small writes say nothing about a pace, so it counts from the first whole batch on
    (BATCH_BYTES). An empty queue takes a value in any case, which measures the pace anew: a store that has recovered
    gets values again as soon as the queue has been written. Reads go first: while one is running, the next batch
    waits for it, for HOLD_S at most. A newer value for a queued key replaces the older value
    ("collapsed"). Reads also return queued values.

    `put_many` returns how many values were queued. `stats()` later shows whether they were stored. A
    cache in front counts queued values as saved.

    Args:
        store: the store that the queue is written to. `close` closes it, too.
        max_bytes: the limit for all queued values, including the batch that is being written.
        patience_s: the most seconds that writing the queue may take.
        clock: returns seconds. Can be replaced in tests.

    Raises:
        ConfigError: `store` is not a store (a URL, for example), `max_bytes` is not a positive whole number,
            `patience_s` is not a positive number, or the clock cannot be called.
    """

    def __init__(
        self,
        store: Store,
        max_bytes: int = 64 << 20,
        patience_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not isinstance(store, Store):
            raise ConfigError(f"expected a store, such as RedisStore(url), got {type(store).__name__}")
        check_number("max_bytes", max_bytes, 0, 1 << 60, "bytes", whole=True)
        check_number("patience_s", patience_s, 0, 1e9, "seconds")
        check_clock(clock)
        self.store = store
        self.deadline_s, self.ttl_s = store.deadline_s, store.ttl_s
        self.max_bytes, self.patience_s, self.clock = max_bytes, patience_s, clock
        self._own = StoreStats()
        self._closed = False
        self._thread: threading.Thread
        self.reset_after_fork()
        reset_in_children(self)

    def __repr__(self) -> str:
        return f"WriteBehind({self.store!r})"

    def put_many(self, keys: Sequence[bytes], values: Sequence[Value], ttl_s: float | None = None) -> int:
        """See `Store.put_many`. Copies the values into the queue and returns. `ttl_s` begins when they are written."""
        check_values(keys, values)
        check_own_ttl(ttl_s, self.ttl_s)
        queued = 0
        with self._lock:
            for key, value in zip(keys, values, strict=True):
                older = self._waiting.get(key)
                refusal = self._refusal(_size(value) - (0 if older is None else len(older)))
                if refusal is not None:
                    self._drop(refusal)
                    continue
                data = joined(value)
                if older is not None:
                    self._drop(Reason.COLLAPSED)
                    self._bytes -= len(older)
                    del self._waiting[key]  # the newer value goes to the end of the queue
                self._waiting[key] = data
                self._ttls[key] = self.ttl_s if ttl_s is None else ttl_s
                self._bytes += len(data)
                queued += 1
            if queued and not self._thread.is_alive():
                self._thread = threading.Thread(target=self._write, name="kvlab-write-behind", daemon=True)
                self._thread.start()
            self._work.set()
        return queued

    def get_many(
        self, keys: Sequence[bytes], out: Sequence[memoryview] | None = None, reasons: list[str] | None = None
    ) -> list[bytes | memoryview | None]:
        """See `Store.get_many`."""
        check_buffers(keys, out)
        got: list[bytes | memoryview | None] = [None] * len(keys)
        key_reasons = [""] * len(keys)
        not_queued = []
        with self._lock:
            for i, key in enumerate(keys):
                value = self._pending(key)
                if value is None:
                    not_queued.append(i)
                    continue
                got[i] = delivered = deliver(value, None if out is None else out[i])
                self._own.requested += 1
                if delivered is None:
                    key_reasons[i] = Reason.TOO_BIG
                    self._own.misses[Reason.TOO_BIG] += 1
                else:
                    self._own.hits += 1
                    self._own.bytes_out += len(value)
        if not_queued:
            inner: list[str] = []
            answers = self._read([keys[i] for i in not_queued], out and [out[i] for i in not_queued], inner)
            for i, answer, reason in zip(not_queued, answers, inner, strict=True):
                got[i], key_reasons[i] = answer, reason
        if reasons is not None:
            reasons += key_reasons
        return got

    def probe(self, keys: Sequence[bytes]) -> int:
        """See `Store.probe`."""
        check_keys(keys)
        at = 0
        while at < len(keys):
            with self._lock:
                run = next((i for i, key in enumerate(keys[at:]) if self._pending(key) is None), len(keys) - at)
            at += run
            stored = self.store.probe(keys[at:])
            at += stored
            if not stored:
                break
        return at

    def touch_many(self, keys: Sequence[bytes], ttl_s: float | None = None) -> list[bool]:
        """See `Store.touch_many`. A queued value gets the longest of its TTLs when it is written."""
        check_keys(keys)
        check_ttl(ttl_s)
        with self._lock:
            waiting = [self._pending(key) is not None for key in keys]
            wanted_s = self.ttl_s if ttl_s is None else ttl_s
            for key in self._waiting.keys() & set(keys):
                own_s = self._ttls[key]
                self._ttls[key] = None if own_s is None or wanted_s is None else max(own_s, wanted_s)
        stored = self.store.touch_many(keys) if ttl_s is None else self.store.touch_many(keys, ttl_s)
        return [w or there for w, there in zip(waiting, stored, strict=True)]

    def hold_many(self, keys: Sequence[bytes], lease_s: float, holder: str) -> tuple[int, bool]:
        """See `Store.hold_many`. What is queued is not held."""
        return self.store.hold_many(keys, lease_s, holder)

    def release(self, holder: str) -> None:
        """See `Store.release`."""
        self.store.release(holder)

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """See `Store.delete_many`. Waits while a batch that contains one of the keys is being written."""
        check_keys(keys)
        with self._lock:
            deleted = 0
            for key in set(keys):
                value = self._waiting.pop(key, None)
                if value is not None:
                    del self._ttls[key]
                    deleted += 1
                    self._bytes -= len(value)
                    self._drop(Reason.DELETED)
        self._wait_for(lambda: not self._writing.keys() & set(keys))
        return deleted + self.store.delete_many(keys)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until the queue is empty; return False if that takes longer than `timeout_s`."""
        return self._wait_for(lambda: not (self._waiting or self._writing), timeout_s)

    def health(self) -> Health:
        """See `Store.health`. Returns the health of the wrapped store."""
        return self.store.health()

    def stats(self) -> StoreStats:
        """See `Store.stats`. A write is counted once it is stored, or dropped by the store or by the queue."""
        with self._lock:
            own = copy.deepcopy(self._own)
        inner = self.store.stats()
        return StoreStats(**{name: getattr(inner, name) + getattr(own, name) for name in vars(inner)})

    def breakers(self) -> dict[tuple[str, str], str]:
        """See `Store.breakers`. Returns those of the wrapped store."""
        return self.store.breakers()

    def close(self) -> None:
        """See `Store.close`. First waits until the store has stored or dropped every queued value."""
        with self._lock:
            self._closed = True
            self._work.set()
        if self._thread.is_alive():
            self._thread.join()
        self.store.close()

    def reset_after_fork(self) -> None:
        """See `Forkable`. The child starts with an empty queue; the parent writes its own queue."""
        self._lock = threading.Lock()
        self._work = Latch()  # the thread waits for it when the queue is empty
        self._after_batch: list[Latch] = []  # callers that wait for the thread
        self._waiting: dict[bytes, bytes] = {}  # in order of arrival
        self._ttls: dict[bytes, float | None] = {}  # of those that wait
        self._ttl_s: float | None = None  # of those that are being written
        self._writing: dict[bytes, bytes] = {}
        self._bytes = 0
        self._reading = 0  # reads of the store that are running
        self._calm = Latch()  # the thread waits for it while there are some
        self._seconds, self._written = 0.0, 0.0  # of the last batches; older ones count less
        self._thread = threading.Thread()  # not started; the first write starts one

    def _wait_for(self, done: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until `done` returns True after a batch of the thread. `done` is called with the lock held."""
        give_up = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                if done():
                    return True
                batch = Latch()
                self._after_batch.append(batch)
                self._work.set()
            remaining = give_up - time.monotonic()
            if remaining <= 0:
                return False
            batch.wait(None if timeout_s is None else remaining)

    def _refusal(self, more: int) -> Reason | None:
        """Why the queue does not take so many bytes more; None if it does."""
        if self._closed:
            return Reason.CLOSED
        if self._bytes + more > self.max_bytes:
            return Reason.QUEUE_FULL
        pace = self._seconds / self._written if self._written >= BATCH_BYTES else 0.0
        return Reason.PRESSURE if self._bytes and (self._bytes + more) * pace > self.patience_s else None

    def _read(
        self, keys: list[bytes], out: Sequence[memoryview] | None, reasons: list[str]
    ) -> list[bytes | memoryview | None]:
        with self._lock:
            self._reading += 1
        try:
            return self.store.get_many(keys, out, reasons)
        finally:  # skipped by a signal handler that raises just before: then each batch waits for HOLD_S
            with self._lock:
                self._reading -= 1
                calm = None if self._reading else self._calm
            if calm is not None:
                calm.set()

    def _pending(self, key: bytes) -> bytes | None:
        return self._waiting.get(key, self._writing.get(key))

    def _drop(self, reason: Reason) -> None:
        self._own.offered += 1
        self._own.drops[reason] += 1

    def _write(self) -> None:
        while True:
            with self._lock:
                work = self._work = Latch()
                if not self._waiting and self._closed:
                    return
                calm = self._calm = Latch()
                hold = bool(self._reading and self._waiting)
            if hold:
                calm.wait(HOLD_S)
            with self._lock:
                self._take_batch()
            if not self._writing:
                work.wait()
                continue
            begin = self.clock()
            try:
                self._put([*self._writing], [*self._writing.values()])
            except Exception:  # an exception from the store must not stop later writes
                logger.exception("the store raised an exception in put_many")
                with self._lock:
                    for _ in self._writing:
                        self._drop(Reason.ERROR)
            took = self.clock() - begin
            with self._lock:
                size = sum(map(len, self._writing.values()))
                self._seconds = FADE * self._seconds + max(0.0, took)
                self._written = FADE * self._written + size
                self._bytes -= size
                self._writing = {}
                waiting, self._after_batch = self._after_batch, []
            for latch in waiting:
                latch.set()

    def _put(self, keys: list[bytes], values: list[bytes]) -> None:
        if self._ttl_s == self.ttl_s:  # the store may be one that knows no other TTL
            self.store.put_many(keys, values)
        else:
            self.store.put_many(keys, values, self._ttl_s)

    def _take_batch(self) -> None:
        """Take values of one TTL."""
        size = 0
        while self._waiting and size < BATCH_BYTES:
            key = next(iter(self._waiting))
            if self._writing and self._ttls[key] != self._ttl_s:
                return
            self._ttl_s = self._ttls.pop(key)
            self._writing[key] = self._waiting.pop(key)
            size += len(self._writing[key])


def _size(value: Value) -> int:
    return sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in pieces(value))
