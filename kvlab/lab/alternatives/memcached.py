"""Memcached through pymemcache, the client that is kept up best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kvlab.lab.alternatives.base import Adapter, Failed, Got, given, hashed
from kvlab.stores.faults import Reason

MAX_RELATIVE_S = 30 * 86400
"""Memcached reads a larger TTL as a date."""
PREFIX = b"kv:"


class MemcachedStore(Adapter):
    """Values in one memcached server.

    Args:
        host, port: the address.
        ttl_s: rounded up to whole seconds, at most 30 days.
        deadline_s: for each operation, not for a call: pymemcache has no deadline for a batch.
    """

    CANNOT = (
        "a TTL has whole seconds, and a value with one second may end after half of it",
        "the deadline is that of each operation, not of a call",
        "a probe and a touch take a round trip for each key: pymemcache sends no batch of these",
        "the largest value is the server's -I, by default 1 MiB with its header",
    )

    def __init__(
        self, host: str = "127.0.0.1", port: int = 11211, ttl_s: float | None = None, deadline_s: float = 1.0
    ) -> None:
        from pymemcache.client.base import PooledClient

        super().__init__(ttl_s)
        self._expire = 0 if ttl_s is None else min(math.ceil(ttl_s), MAX_RELATIVE_S)
        self.client: Any = PooledClient(
            (host, port),
            timeout=deadline_s,
            connect_timeout=deadline_s,
            no_delay=True,
            default_noreply=False,
            key_prefix=PREFIX,
        )

    def _read(self, keys: Sequence[bytes], out: Sequence[memoryview] | None) -> list[Got]:
        found = self._call("get_many", [*dict.fromkeys(map(hashed, keys))])
        if self._expire:
            self._have([key for key in dict.fromkeys(keys) if hashed(key) in found], renew=True)
        return [
            given(found[name], out, i) if (name := hashed(key)) in found else Reason.ABSENT
            for i, key in enumerate(keys)
        ]

    def _write(self, keys: Sequence[bytes], values: Sequence[bytes]) -> list[Reason | None]:
        done: list[Reason | None] = []
        for key, value in zip(keys, values, strict=True):  # set_many would lose which of two values of a key is last
            try:
                self._call("set", hashed(key), value, self._expire)
                done.append(None)
            except Failed as failed:
                done.append(failed.reason)
        return done

    def _have(self, keys: Sequence[bytes], renew: bool) -> list[bool]:
        if renew:
            return [bool(self._call("touch", hashed(key), self._expire)) for key in keys]
        # "mg" without flags asks for no value (memcached 1.6; doc/protocol.txt, "Meta Commands")
        return [self._call("raw_command", b"mg " + PREFIX + hashed(key).encode()) == b"HD" for key in keys]

    def _remove(self, keys: Sequence[bytes]) -> int:
        return sum(bool(self._call("delete", hashed(key))) for key in keys)

    def _describe(self) -> str:
        return f"memcached {self.client.version().decode()}"

    def _end(self) -> None:
        self.client.close()

    def _call(self, method: str, *arguments: Any) -> Any:
        from pymemcache.exceptions import MemcacheError

        try:
            return getattr(self.client, method)(*arguments)
        except TimeoutError:
            raise Failed(Reason.TIMEOUT) from None
        except OSError:
            raise Failed(Reason.CONN) from None
        except MemcacheError as error:
            said = str(error)
            reason = Reason.TOO_BIG if "too large" in said else Reason.OOM if "memory" in said else Reason.RESPONSE
            raise Failed(reason) from None
