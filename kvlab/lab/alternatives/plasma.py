"""Ray's object store (Plasma): bytes in shared memory, and an actor that knows their names.

Plasma has no names, no TTL and no delete: an object lives as long as somebody holds a reference to it, and ends with
the process that made it. So an actor makes each object and holds the references; a put is copied twice.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np

from kvlab.lab.alternatives.base import Adapter, Failed, Got, given
from kvlab.stores.faults import Reason


class Index:
    """References by key, with a TTL for each, and a bound of bytes. An actor."""

    def __init__(self, ttl_s: float | None, max_bytes: int) -> None:
        self._ttl_s, self._max_bytes = ttl_s, max_bytes
        self._held: OrderedDict[bytes, tuple[list[Any], int, float]] = OrderedDict()  # least recently used first
        self._bytes = 0

    def put(self, keys: Sequence[bytes], *values: np.ndarray[Any, Any]) -> int:
        """Copy values into objects of this process."""
        import ray

        for key, value in zip(keys, values, strict=True):
            self._drop(key)
            while self._held and self._bytes + value.nbytes > self._max_bytes:
                self._drop(next(iter(self._held)))
            self._held[key] = [ray.put(value)], value.nbytes, self._expires_at()
            self._bytes += value.nbytes
        return len(keys)

    def find(self, keys: Sequence[bytes]) -> list[list[Any] | None]:
        """Return references, each in a list, so that Ray hands it over instead of the object; renew TTLs."""
        return [self._held[key][0] if self._renew(key) else None for key in keys]

    def have(self, keys: Sequence[bytes], renew: bool) -> list[bool]:
        """Return which keys are held."""
        return [self._renew(key) if renew else self._alive(key) for key in keys]

    def delete(self, keys: Sequence[bytes]) -> int:
        """Let go of objects; return how many there were."""
        alive = [key for key in keys if self._alive(key)]
        for key in alive:
            self._drop(key)
        return len(alive)

    def held(self) -> tuple[int, int]:
        """Return how many objects there are, and their bytes."""
        return len(self._held), self._bytes

    def _alive(self, key: bytes) -> bool:
        if key in self._held and time.monotonic() >= self._held[key][2]:
            self._drop(key)
        return key in self._held

    def _renew(self, key: bytes) -> bool:
        if not self._alive(key):
            return False
        references, size, _ = self._held.pop(key)
        self._held[key] = references, size, self._expires_at()
        return True

    def _drop(self, key: bytes) -> None:
        self._bytes -= self._held.pop(key, ([], 0, 0.0))[1]

    def _expires_at(self) -> float:
        return inf if self._ttl_s is None else time.monotonic() + self._ttl_s


class PlasmaStore(Adapter):
    """A client of an index actor of its own. Ray must have been started in this process.

    Args:
        max_bytes: the index lets go of the least recently used objects above this.
        deadline_s: the limit for a call of the actor.
    """

    CANNOT = (
        "names, TTL, delete and the bound are those of this adapter's actor, not of Plasma",
        "what the actor's process holds ends with it",
        "a full store writes to disk and does not say so",
    )

    def __init__(self, ttl_s: float | None = None, max_bytes: int = 256 << 20, deadline_s: float = 5.0) -> None:
        import ray

        super().__init__(ttl_s)
        self._ray, self._deadline_s = ray, deadline_s
        self._index: Any = ray.remote(Index).options(num_cpus=0).remote(ttl_s, max_bytes)

    def _read(self, keys: Sequence[bytes], out: Sequence[memoryview] | None) -> list[Got]:
        found = self._ask("find", list(keys))
        views = self._get([one[0] for one in found if one is not None])
        return [Reason.ABSENT if one is None else given(next(views), out, i) for i, one in enumerate(found)]

    def _write(self, keys: Sequence[bytes], values: Sequence[bytes]) -> list[Reason | None]:
        self._ask("put", list(keys), *(np.frombuffer(value, np.uint8) for value in values))
        return [None] * len(keys)

    def _have(self, keys: Sequence[bytes], renew: bool) -> list[bool]:
        have: list[bool] = self._ask("have", list(keys), renew)
        return have

    def _remove(self, keys: Sequence[bytes]) -> int:
        return int(self._ask("delete", list(keys)))

    def _describe(self) -> str:
        number, size = self._ask("held")
        return f"Plasma, {number} values, {size >> 20} MiB"

    def _end(self) -> None:
        self._ray.kill(self._index)

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self._wait(getattr(self._index, method).remote(*arguments))

    def _get(self, references: list[Any]) -> Any:
        return iter([memoryview(array) for array in self._wait(references)])

    def _wait(self, references: Any) -> Any:
        try:
            return self._ray.get(references, timeout=self._deadline_s)
        except self._ray.exceptions.GetTimeoutError:
            raise Failed(Reason.TIMEOUT) from None
        except self._ray.exceptions.RayError:
            raise Failed(Reason.CONN) from None
