"""LMDB: a B+tree in one file that is mapped into memory. One writer at a time; a batch is a transaction."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any

from kvlab.lab.alternatives.base import Adapter, Failed, Got, given, hashed
from kvlab.stores.faults import Reason

_HEAD = struct.Struct("<d")  # seconds since 1970 at which the value expires


class LmdbStore(Adapter):
    """Values in one LMDB environment. Several processes may share it.

    Args:
        folder: its folder.
        map_bytes: the most that the file may take; it cannot grow later while others have it open.
        sync: whether a batch is on the disk when a put returns.
    """

    CANNOT = (
        "nothing is evicted: a full map drops writes",
        "renewing a TTL writes the whole value again",
        "expired values stay in the file until they are replaced",
        "a call that hangs cannot be given up: there is no deadline",
    )

    def __init__(
        self,
        folder: str,
        ttl_s: float | None = None,
        map_bytes: int = 2 << 30,
        sync: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        import lmdb

        super().__init__(ttl_s)
        self._lmdb, self._clock = lmdb, clock
        self._environment: Any = lmdb.open(folder, map_size=map_bytes, sync=sync, metasync=sync, max_readers=512)

    def _read(self, keys: Sequence[bytes], out: Sequence[memoryview] | None) -> list[Got]:
        got: list[Got] = []
        with self._transaction(write=False) as transaction:
            for i, key in enumerate(keys):
                held = self._alive(transaction, key)
                got.append(Reason.ABSENT if held is None else given(held[_HEAD.size :], out, i))
        if self._ttl_s is not None:
            self._have([key for key, value in zip(keys, got, strict=True) if not isinstance(value, Reason)], True)
        return got

    def _write(self, keys: Sequence[bytes], values: Sequence[bytes]) -> list[Reason | None]:
        head = _HEAD.pack(self._expires_at())
        with self._transaction(write=True) as transaction:
            for key, value in zip(keys, values, strict=True):
                transaction.put(hashed(key).encode(), head + value)
        return [None] * len(keys)

    def _have(self, keys: Sequence[bytes], renew: bool) -> list[bool]:
        renew = renew and self._ttl_s is not None
        head = _HEAD.pack(self._expires_at())
        have = []
        with self._transaction(write=renew) as transaction:
            for key in keys:
                held = self._alive(transaction, key)
                have.append(held is not None)
                if renew and held is not None:
                    transaction.put(hashed(key).encode(), head + bytes(held[_HEAD.size :]))
        return have

    def _remove(self, keys: Sequence[bytes]) -> int:
        with self._transaction(write=True) as transaction:
            alive = [self._alive(transaction, key) is not None for key in keys]
            for key in keys:
                transaction.delete(hashed(key).encode())
        return sum(alive)

    def _describe(self) -> str:
        size, entries = self._environment.info()["map_size"], self._environment.stat()["entries"]
        return f"lmdb, a map of {size >> 20} MiB, {entries} values"

    def _end(self) -> None:
        self._environment.close()

    @contextmanager
    def _transaction(self, write: bool) -> Iterator[Any]:
        try:
            with self._environment.begin(write=write, buffers=True) as transaction:
                yield transaction
        except self._lmdb.MapFullError:
            raise Failed(Reason.OOM) from None
        except self._lmdb.Error:
            raise Failed(Reason.ERROR) from None

    def _alive(self, transaction: Any, key: bytes) -> memoryview | None:
        held: memoryview | None = transaction.get(hashed(key).encode())
        return None if held is None or _HEAD.unpack_from(held)[0] <= self._clock() else held

    def _expires_at(self) -> float:
        return inf if self._ttl_s is None else self._clock() + self._ttl_s
