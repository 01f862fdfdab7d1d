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
        "a value is read in two steps, its size and its bytes, and may be replaced in between",
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
        return [self._read_one(key.hex(), out, i) for i, key in enumerate(keys)]

    def _read_one(self, name: str, out: Sequence[memoryview] | None, i: int) -> Got:
        size = self.client.get_size(name)
        if size < 0:
            return Reason.ABSENT if size in _ABSENT else Reason.RESPONSE
        if out is not None and size > out[i].nbytes:
            return Reason.TOO_BIG
        value = self.client.get(name)
        return given(value, out, i) if len(value) == size else Reason.LENGTH

    def _write(self, keys: Sequence[bytes], values: Sequence[bytes]) -> list[Reason | None]:
        codes = [self.client.upsert(key.hex(), value) for key, value in zip(keys, values, strict=True)]
        return [None if code == 0 else Reason.OOM if code == -200 else Reason.RESPONSE for code in codes]

    def _have(self, keys: Sequence[bytes], renew: bool) -> list[bool]:
        return [code == 1 for code in self.client.batch_is_exist([key.hex() for key in keys])]

    def _remove(self, keys: Sequence[bytes]) -> int:
        return sum(code == 0 for code in self.client.batch_remove([key.hex() for key in keys], True))

    def _describe(self) -> str:
        code = self.client.health_check()
        if code:
            raise KVLabError(f"health {code}")
        return "Mooncake Store"

    def _end(self) -> None:
        self.client.close()
