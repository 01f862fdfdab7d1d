"""Mooncake Store over TCP: objects in the memory of its clients, found by a master."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvlab.errors import KVLabError
from kvlab.lab.alternatives.base import Adapter, Got, given
from kvlab.stores.faults import Reason

_ABSENT = (-703, -704)


class MooncakeStore(Adapter):
    """A client of the master at `master`, which lends `segment_bytes` of its memory to all clients.

    Args:
        master: host and port.
        segment_bytes, local_bytes: memory for objects, and for what is under way.

    Raises:
        KVLabError: the master does not answer.
    """

    CANNOT = (
        "values have a lease and no TTL",
        "an empty value is refused (-600)",
        "`put` keeps the older value of an existing key and returns success; this adapter calls `upsert`",
        "of two puts of one key at the same time one may be refused (OBJECT_NOT_FOUND)",
        "while the master hangs a call takes 30 s: there is no deadline",
        "nothing is evicted within a lease: writes are refused (-200)",
    )

    def __init__(self, master: str, segment_bytes: int = 512 << 20, local_bytes: int = 128 << 20) -> None:
        from mooncake.store import MooncakeDistributedStore

        super().__init__(None)
        self.client: Any = MooncakeDistributedStore()
        code = self.client.setup("127.0.0.1", "P2PHANDSHAKE", segment_bytes, local_bytes, "tcp", "", master)
        if code:
            raise KVLabError(f"the Mooncake master at {master} does not answer: {code}")

    def _read(self, keys: Sequence[bytes], out: Sequence[memoryview] | None) -> list[Got]:
        return [self._read_one(named(key), out, i) for i, key in enumerate(keys)]

    def _read_one(self, name: str, out: Sequence[memoryview] | None, i: int) -> Got:
        value = self.client.get(name)
        if value:
            return given(value, out, i)
        code = self.client.get_size(name)  # what is absent and what failed are both empty
        return Reason.ABSENT if code in _ABSENT or code >= 0 else Reason.RESPONSE

    def _write(self, keys: Sequence[bytes], values: Sequence[bytes]) -> list[Reason | None]:
        codes = [self.client.upsert(named(key), value) for key, value in zip(keys, values, strict=True)]
        return [None if code == 0 else Reason.OOM if code == -200 else Reason.RESPONSE for code in codes]

    def _have(self, keys: Sequence[bytes], renew: bool) -> list[bool]:
        return [code == 1 for code in self.client.batch_is_exist([*map(named, keys)])]

    def _remove(self, keys: Sequence[bytes]) -> int:
        return sum(code == 0 for code in self.client.batch_remove([*map(named, keys)], True))

    def _describe(self) -> str:
        code = self.client.health_check()
        if code:
            raise KVLabError(f"health {code}")
        return "Mooncake Store"

    def _end(self) -> None:
        self.client.close()


def named(key: bytes) -> str:
    """Return the name of a key; Mooncake takes no empty one."""
    return f"kv:{key.hex()}"
