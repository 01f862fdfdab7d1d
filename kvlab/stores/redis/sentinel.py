"""A master that sentinels monitor, and the replica that they promote when the master fails.

https://redis.io/docs/latest/develop/reference/sentinel-clients/
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import redis

from kvlab.stores.deadline import Deadline
from kvlab.stores.faults import Reason
from kvlab.stores.redis.discovery import MAX_SERVERS, SLOTS, Discovered, address_of, is_list, most_informative
from kvlab.stores.redis.node import Node
from kvlab.stores.redis.pool import Pool
from kvlab.stores.redis.reasons import reason_of
from kvlab.stores.redis.topology import Shard, Split, SubBatch


class Sentinel(Discovered):
    """One master with replicas. If the master fails, the sentinels promote a replica.

    Args:
        name: the name of the master in Sentinel.
    """

    def __init__(self, name: str, *args: Any) -> None:
        super().__init__(*args)
        self._name = name.encode()
        self._shard: Shard | None = None

    def split(self, names: Sequence[bytes], deadline: Deadline, reading: bool = False) -> Split:
        """See `Topology`."""
        reason = self._learn(deadline)
        if self._shard is None:
            return [], reason or Reason.DOWN
        self._next_replica += reading
        return [SubBatch(self._pick(self._shard, reading), range(len(names)))], None

    def unserved(self) -> int:
        """See `Topology`."""
        return 0 if self._shard else SLOTS

    def shards(self) -> list[Shard]:
        """See `Topology`."""
        return [self._shard] if self._shard else []

    def _request_map(self, deadline: Deadline) -> None:
        errors: list[Exception] = []
        for sentinel in random.sample(self._seeds, len(self._seeds)):  # one may be cut off from the others
            try:
                self._shard = self._shard_from(sentinel, deadline.half())
            except Exception as error:
                error.add_note(f"from the sentinel at {sentinel.address}")
                errors.append(error)
            else:
                return self._keep_only([self._shard])
        raise most_informative(errors)

    def _shard_from(self, sentinel: Pool, deadline: Deadline) -> Shard:
        reply = sentinel.request((b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._name), deadline)
        if reply is None:
            raise redis.ResponseError(f"Sentinel knows no master called {self._name.decode()!r}")
        if not is_list(reply, 2):
            raise redis.InvalidResponse("expected a host and a port from Sentinel")
        master = self._node(*address_of(*reply[:2]))
        return Shard(master, self._replicas_from(sentinel, deadline) if self._read_replicas else ())

    def _replicas_from(self, sentinel: Pool, deadline: Deadline) -> tuple[Node, ...]:
        """Return the replicas that the sentinel reports as working. A fault is counted and ends the list."""
        replicas: list[Node] = []
        try:
            for fields in sentinel.request((b"SENTINEL", b"REPLICAS", self._name), deadline)[:MAX_SERVERS]:
                facts = dict(zip(fields[::2], fields[1::2], strict=True))
                if not {b"s_down", b"o_down", b"disconnected"} & set(facts[b"flags"].split(b",")):
                    replicas.append(self._node(*address_of(facts[b"ip"], facts[b"port"])))
        except Exception as error:  # a broken server can cause any exception in a library
            self.faults[reason_of(error)] += 1
        return tuple(replicas)
