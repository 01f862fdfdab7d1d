"""Writes that nobody waits for: a bounded queue in front of a store, emptied by one thread."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Sequence

from kvlab.errors import ConfigError
from kvlab.stores.base import (
    Health,
    Store,
    StoreStats,
    Value,
    check_buffers,
    check_keys,
    check_number,
    check_values,
    joined,
    place,
)
from kvlab.stores.faults import Reason
from kvlab.stores.fork import reset_in_children

BATCH_BYTES = 4 << 20
logger = logging.getLogger(__name__)


class WriteBehind(Store):
    """Another store whose `put_many` returns at once.

    Values are copied into a queue and written in order of arrival. When the queue is full, or
    the store is slower than its writers for long, writes are dropped ("queue_full"): a cache
    may forget, it must not stop its engine. A newer value for a key that is still waiting takes
    the older one's place ("collapsed"). Reads see what waits.

    `put_many` returns how many were queued; whether they were stored is in `stats()` later, and
    a cache in front counts as saved what was queued.

    Args:
        store: where the writes go; closed together with this.
        max_bytes: of all values that wait, the batch being written included.

    Raises:
        ConfigError: no store, but a URL, say; or `max_bytes` is no positive whole number.
    """

    def __init__(self, store: Store, max_bytes: int = 64 << 20) -> None:
        if not isinstance(store, Store):
            raise ConfigError(f"expected a store, such as RedisStore(url), got {type(store).__name__}")
        check_number("max_bytes", max_bytes, 0, 1 << 60, "bytes", whole=True)
        self.store = store
        self.max_bytes = max_bytes
        self._own = StoreStats()
        self._closed = False
        self._thread: threading.Thread
        self.reset_after_fork()
        reset_in_children(self)

    def __repr__(self) -> str:
        return f"WriteBehind({self.store!r})"

    def put_many(self, keys: Sequence[bytes], values: Sequence[Value]) -> int:
        """See `Store.put_many`. Copies the values and returns."""
        check_values(keys, values)
        queued = 0
        with self._changed:
            for key, value in zip(keys, values, strict=True):
                data = joined(value)
                older = self._waiting.get(key)
                room = self.max_bytes - self._bytes + (0 if older is None else len(older))
                if self._closed or len(data) > room:
                    self._drop(Reason.CLOSED if self._closed else Reason.QUEUE_FULL)
                    continue
                if older is not None:
                    self._drop(Reason.COLLAPSED)
                    self._bytes -= len(older)
                    del self._waiting[key]  # the newer value waits at the end
                self._waiting[key] = data
                self._bytes += len(data)
                queued += 1
            if queued and not self._thread.is_alive():
                self._thread = threading.Thread(target=self._write, name="kvlab-write-behind", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return queued

    def get_many(
        self, keys: Sequence[bytes], out: Sequence[memoryview] | None = None, reasons: list[str] | None = None
    ) -> list[bytes | memoryview | None]:
        """See `Store.get_many`."""
        check_buffers(keys, out)
        got: list[bytes | memoryview | None] = [None] * len(keys)
        why = [""] * len(keys)
        asked = []
        with self._changed:
            for i, key in enumerate(keys):
                value = self._pending(key)
                if value is None:
                    asked.append(i)
                    continue
                got[i] = placed = place(value, None if out is None else out[i])
                self._own.requested += 1
                if placed is None:
                    why[i] = Reason.TOO_BIG
                    self._own.misses[Reason.TOO_BIG] += 1
                else:
                    self._own.hits += 1
                    self._own.bytes_out += len(value)
        if asked:
            inner: list[str] = []
            answers = self.store.get_many([keys[i] for i in asked], out and [out[i] for i in asked], inner)
            for i, answer, reason in zip(asked, answers, inner, strict=True):
                got[i], why[i] = answer, reason
        if reasons is not None:
            reasons += why
        return got

    def probe(self, keys: Sequence[bytes]) -> int:
        """See `Store.probe`."""
        check_keys(keys)
        at = 0
        while at < len(keys):
            with self._changed:
                run = next((i for i, key in enumerate(keys[at:]) if self._pending(key) is None), len(keys) - at)
            at += run
            stored = self.store.probe(keys[at:])
            at += stored
            if not stored:
                break
        return at

    def touch_many(self, keys: Sequence[bytes]) -> list[bool]:
        """See `Store.touch_many`."""
        check_keys(keys)
        with self._changed:
            waiting = [self._pending(key) is not None for key in keys]
        return [w or there for w, there in zip(waiting, self.store.touch_many(keys), strict=True)]

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """See `Store.delete_many`. Waits for the batch that is being written."""
        check_keys(keys)
        with self._changed:
            gone = 0
            for key in set(keys):
                value = self._waiting.pop(key, None)
                if value is not None:
                    gone += 1
                    self._bytes -= len(value)
                    self._drop(Reason.DELETED)
            self._changed.wait_for(lambda: not self._writing.keys() & set(keys))
        return gone + self.store.delete_many(keys)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing waits; False if that took longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waiting or self._writing), timeout_s)

    def health(self) -> Health:
        """See `Store.health`: that of the store."""
        return self.store.health()

    def stats(self) -> StoreStats:
        """See `Store.stats`. A write counts when it is decided: stored, or dropped by the store or by the queue."""
        with self._changed:
            own = copy.deepcopy(self._own)
        inner = self.store.stats()
        return StoreStats(**{name: getattr(inner, name) + getattr(own, name) for name in vars(inner)})

    def close(self) -> None:
        """See `Store.close`. Writes what waits first, for as long as the store takes writes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self.store.close()

    def reset_after_fork(self) -> None:
        """See `Forkable`. The queue stays the parent's: it writes what is in it."""
        self._changed = threading.Condition()
        self._waiting: dict[bytes, bytes] = {}  # in order of arrival
        self._writing: dict[bytes, bytes] = {}
        self._bytes = 0
        self._thread = threading.Thread()  # not started: the first write does that

    def _pending(self, key: bytes) -> bytes | None:
        return self._waiting.get(key, self._writing.get(key))

    def _drop(self, reason: Reason) -> None:
        self._own.offered += 1
        self._own.drops[reason] += 1

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                self._take_batch()
            try:
                self.store.put_many(list(self._writing), list(self._writing.values()))
            except Exception:  # a store that breaks its contract must not stop the writes to come
                logger.exception("a store raised in put_many")
                with self._changed:
                    for _ in self._writing:
                        self._drop(Reason.ERROR)
            with self._changed:
                self._bytes -= sum(map(len, self._writing.values()))
                self._writing = {}
                self._changed.notify_all()

    def _take_batch(self) -> None:
        size = 0
        while self._waiting and size < BATCH_BYTES:
            key = next(iter(self._waiting))
            self._writing[key] = self._waiting.pop(key)
            size += len(self._writing[key])
