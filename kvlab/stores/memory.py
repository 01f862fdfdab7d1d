"""A store in this process: a dict with a lock. For tests and learning, and the reference for other stores.

Entries expire by a clock that tests can replace. Nothing is evicted, and the number of entries is not bounded.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Sequence

from kvlab.stores.base import (
    MAX_VALUE_BYTES,
    Health,
    Store,
    StoreStats,
    Value,
    check_buffers,
    check_clock,
    check_keys,
    check_own_ttl,
    check_ttl,
    check_values,
    deliver,
    joined,
)
from kvlab.stores.faults import Reason
from kvlab.stores.fork import reset_in_children


class MemoryStore(Store):
    """Values in a dict, each with its expiry time.

    >>> store = MemoryStore()
    >>> store.put_many([b"a", b"b"], [b"one", b"two"])
    2
    >>> store.get_many([b"a", b"x"])
    [b'one', None]

    Raises:
        ConfigError: the TTL is not positive or exceeds 100 years, or `clock` is not callable.
    """

    def __init__(self, ttl_s: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        check_ttl(ttl_s)
        check_clock(clock)
        self.ttl_s = ttl_s
        self._clock = clock
        self._entries: dict[bytes, tuple[bytes, float]] = {}
        self._stats = StoreStats()
        self._closed = False
        self.reset_after_fork()
        reset_in_children(self)

    def __repr__(self) -> str:
        return f"MemoryStore({len(self._entries)} values)"

    def get_many(
        self, keys: Sequence[bytes], out: Sequence[memoryview] | None = None, reasons: list[str] | None = None
    ) -> list[bytes | memoryview | None]:
        """See `Store.get_many`. A hit also restarts the TTL of the entry."""
        check_buffers(keys, out)
        with self._lock:
            key_reasons: list[str] = []
            got = [self._get(key, None if out is None else out[i], key_reasons) for i, key in enumerate(keys)]
        if reasons is not None:
            reasons += key_reasons
        return got

    def put_many(self, keys: Sequence[bytes], values: Sequence[Value], ttl_s: float | None = None) -> int:
        """See `Store.put_many`."""
        check_values(keys, values)
        check_own_ttl(ttl_s, self.ttl_s)
        with self._lock:
            self._stats.offered += len(keys)
            if self._closed:
                self._stats.drops[Reason.CLOSED] += len(keys)
                return 0
            stored = 0
            for key, value in zip(keys, values, strict=True):
                data = joined(value)
                if len(data) > MAX_VALUE_BYTES:
                    self._stats.drops[Reason.TOO_BIG] += 1
                    continue
                stored += 1
                self._entries[key] = (data, self._expires_at(ttl_s))
                self._stats.stored += 1
                self._stats.bytes_in += len(data)
            return stored

    def probe(self, keys: Sequence[bytes]) -> int:
        """See `Store.probe`."""
        check_keys(keys)
        with self._lock:
            for i, key in enumerate(keys):
                if self._alive(key) is None:
                    return i
            return len(keys)

    def touch_many(self, keys: Sequence[bytes], ttl_s: float | None = None) -> list[bool]:
        """See `Store.touch_many`."""
        check_keys(keys)
        check_ttl(ttl_s)
        with self._lock:
            return [self._refresh(key, ttl_s) for key in keys]

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """See `Store.delete_many`."""
        check_keys(keys)
        with self._lock:
            alive = [key for key in set(keys) if self._alive(key) is not None]
            for key in alive:
                del self._entries[key]
            return len(alive)

    def health(self) -> Health:
        """See `Store.health`."""
        with self._lock:
            return Health(not self._closed, "closed" if self._closed else f"memory, {len(self._entries)} values")

    def stats(self) -> StoreStats:
        """See `Store.stats`."""
        with self._lock:
            return copy.deepcopy(self._stats)

    def close(self) -> None:
        """See `Store.close`. Deletes the values."""
        with self._lock:
            self._entries.clear()
            self._closed = True

    def reset_after_fork(self) -> None:
        """See `Forkable`. The child has a copy of the values."""
        self._lock = threading.Lock()

    def _get(self, key: bytes, out: memoryview | None, key_reasons: list[str]) -> bytes | memoryview | None:
        self._stats.requested += 1
        value = self._alive(key)
        got = None if value is None else deliver(value, out)
        if value is None or got is None:
            reason = Reason.CLOSED if self._closed else Reason.ABSENT if value is None else Reason.TOO_BIG
            key_reasons.append(reason)
            self._stats.misses[reason] += 1
            return None
        key_reasons.append("")
        self._refresh(key)
        self._stats.hits += 1
        self._stats.bytes_out += len(value)
        return got

    def _refresh(self, key: bytes, ttl_s: float | None = None) -> bool:
        value = self._alive(key)
        if value is not None:
            self._entries[key] = (value, max(self._entries[key][1], self._expires_at(ttl_s)))
        return value is not None

    def _alive(self, key: bytes) -> bytes | None:
        value, expires_at = self._entries.get(key, (None, 0.0))
        if value is not None and self._clock() >= expires_at:
            del self._entries[key]
            return None
        return value

    def _expires_at(self, ttl_s: float | None = None) -> float:
        ttl_s = self.ttl_s if ttl_s is None else ttl_s
        return float("inf") if ttl_s is None else self._clock() + ttl_s
