"""The part of the contract that the adapters share: checks, copies into buffers, counters, closing."""

from __future__ import annotations

import copy
import hashlib
import threading
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from kvlab.stores.base import (
    MAX_VALUE_BYTES,
    Health,
    Store,
    StoreStats,
    Value,
    check_buffers,
    check_keys,
    check_own_ttl,
    check_ttl,
    check_values,
    joined,
)
from kvlab.stores.faults import Reason


class Failed(Exception):
    """A whole call failed; the reason counts for each of its keys."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


Got = bytes | memoryview | Reason
"""A value, or why there is none."""


class Adapter(Store):
    """A store of another project. Its methods below may raise `Failed`."""

    CANNOT: ClassVar[tuple[str, ...]] = ()
    """Clauses of the contract that the store does not keep."""

    def __init__(self, ttl_s: float | None = None) -> None:
        check_ttl(ttl_s)
        self._ttl_s = ttl_s
        self._stats = StoreStats()
        self._lock = threading.Lock()
        self._closed = False

    # --- what an adapter does -------------------------------------------------------------------
    @abstractmethod
    def _read(self, keys: Sequence[bytes], out: Sequence[memoryview] | None) -> list[Got]:
        """Return a value or a reason for each key; `given` delivers a value."""

    @abstractmethod
    def _write(self, keys: Sequence[bytes], values: Sequence[bytes]) -> list[Reason | None]:
        """Store values; return why each was dropped, or None."""

    @abstractmethod
    def _have(self, keys: Sequence[bytes], renew: bool) -> list[bool]:
        """Return which keys are present, and restart their TTLs if `renew` is set."""

    @abstractmethod
    def _remove(self, keys: Sequence[bytes]) -> int:
        """Delete different keys; return how many were present."""

    @abstractmethod
    def _describe(self) -> str:
        """Describe the store. An exception means that it does not work."""

    @abstractmethod
    def _end(self) -> None:
        """Close the connections."""

    # --- the contract ---------------------------------------------------------------------------
    def get_many(
        self, keys: Sequence[bytes], out: Sequence[memoryview] | None = None, reasons: list[str] | None = None
    ) -> list[bytes | memoryview | None]:
        """See `Store.get_many`."""
        check_buffers(keys, out)
        try:
            self._check_open()
            got = self._read(keys, out) if keys else []
        except Failed as failed:
            got = [failed.reason] * len(keys)
        missed = [value for value in got if isinstance(value, Reason)]
        with self._lock:
            self._stats.requested += len(keys)
            self._stats.hits += len(keys) - len(missed)
            self._stats.misses.update(missed)
            self._stats.bytes_out += sum(len(value) for value in got if not isinstance(value, Reason))
        if reasons is not None:
            reasons += [value if isinstance(value, Reason) else "" for value in got]
        return [None if isinstance(value, Reason) else value for value in got]

    def put_many(self, keys: Sequence[bytes], values: Sequence[Value], ttl_s: float | None = None) -> int:
        """See `Store.put_many`. Values with a TTL of their own are refused."""
        check_values(keys, values)
        check_own_ttl(ttl_s, self.ttl_s)
        whole = [joined(value) for value in values]
        fits = [i for i, value in enumerate(whole) if len(value) <= MAX_VALUE_BYTES]
        try:
            self._check_open()
            done = self._write([keys[i] for i in fits], [whole[i] for i in fits]) if fits else []
            too_big = Reason.TOO_BIG
        except Failed as failed:
            done = [failed.reason] * len(fits)
            too_big = Reason.CLOSED if self._closed else Reason.TOO_BIG
        stored = [i for i, reason in zip(fits, done, strict=True) if reason is None]
        with self._lock:
            self._stats.offered += len(keys)
            self._stats.stored += len(stored)
            self._stats.drops.update(reason for reason in done if reason)
            self._stats.drops.update([too_big] * (len(keys) - len(fits)))
            self._stats.bytes_in += sum(len(whole[i]) for i in stored)
        return len(stored)

    def probe(self, keys: Sequence[bytes]) -> int:
        """See `Store.probe`."""
        have = self._advice(keys, renew=False)
        return have.index(False) if False in have else len(have)

    def touch_many(self, keys: Sequence[bytes], ttl_s: float | None = None) -> list[bool]:
        """See `Store.touch_many`. The TTL is always that of the store."""
        return self._advice(keys, renew=True)

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """See `Store.delete_many`."""
        check_keys(keys)
        try:
            self._check_open()
            return self._remove([*dict.fromkeys(keys)]) if keys else 0
        except Failed as failed:
            self._count(failed)
            return 0

    def health(self) -> Health:
        """See `Store.health`."""
        try:
            self._check_open()
            return Health(True, self._describe())
        except Exception as error:
            return Health(False, str(error))

    def stats(self) -> StoreStats:
        """See `Store.stats`."""
        with self._lock:
            return copy.deepcopy(self._stats)

    def close(self) -> None:
        """See `Store.close`."""
        if not self._closed:
            self._closed = True
            self._end()

    def _advice(self, keys: Sequence[bytes], renew: bool) -> list[bool]:
        check_keys(keys)
        try:
            self._check_open()
            return self._have(keys, renew) if keys else []
        except Failed as failed:
            self._count(failed)
            return [False] * len(keys)

    def _check_open(self) -> None:
        if self._closed:
            raise Failed(Reason.CLOSED)

    def _count(self, failed: Failed) -> None:
        if failed.reason != Reason.CLOSED:
            with self._lock:
                self._stats.faults[failed.reason] += 1


def given(value: bytes | memoryview, out: Sequence[memoryview] | None, i: int) -> Got:
    """Deliver the value of key number `i`: as `bytes`, or in its buffer."""
    if out is None:
        return bytes(value)
    if len(value) > out[i].nbytes:
        return Reason.TOO_BIG
    target = out[i].cast("B")[: len(value)]
    target[:] = value
    return target


def hashed(key: bytes) -> str:
    """Return a printable name of 40 characters, for stores that do not take every key."""
    return hashlib.blake2b(key, digest_size=20).hexdigest()
