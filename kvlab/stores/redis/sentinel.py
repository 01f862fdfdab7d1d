"""A master that sentinels watch, and the replica that they make the master when it dies.

https://redis.io/docs/latest/develop/reference/sentinel-clients/
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import redis

from kvlab.stores.deadline import Deadline
from kvlab.stores.faults import Reason
from kvlab.stores.redis.discovery import MAX_SERVERS, SLOTS, Discovered, address_of, is_list, most_telling
from kvlab.stores.redis.node import Node
from kvlab.stores.redis.pool import Pool
from kvlab.stores.redis.reasons import reason_of
from kvlab.stores.redis.topology import Shard, Split, SubBatch


class Sentinel(Discovered):
    """One master, followed by replicas; when it dies, sentinels make one of them the master.

    Args:
        name: what the sentinels call it.
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

    def _ask(self, deadline: Deadline) -> None:
        errors: list[Exception] = []
        for sentinel in random.sample(self._seeds, len(self._seeds)):  # one may be cut off from the others
            try:
                self._shard = self._told_by(sentinel, deadline.half())
            except Exception as error:
                error.add_note(f"from the sentinel at {sentinel.address}")
                errors.append(error)
                continue
            self._keep_only([self._shard])
            return
        raise most_telling(errors)

    def _told_by(self, sentinel: Pool, deadline: Deadline) -> Shard:
        where = sentinel.ask((b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._name), deadline)
        if where is None:
            raise redis.ResponseError(f"Sentinel knows no master called {self._name.decode()!r}")
        if not is_list(where, 2):
            raise redis.InvalidResponse("expected a host and a port from Sentinel")
        master = self._node(*address_of(*where[:2]))
        return Shard(master, self._replicas_told_by(sentinel, deadline) if self._read_replicas else ())

    def _replicas_told_by(self, sentinel: Pool, deadline: Deadline) -> tuple[Node, ...]:
        """Those that work, by what the sentinel sees; none if it does not tell: then the master is read."""
        replicas: list[Node] = []
        try:
            for told in sentinel.ask((b"SENTINEL", b"REPLICAS", self._name), deadline)[:MAX_SERVERS]:
                facts = dict(zip(told[::2], told[1::2], strict=True))
                if not {b"s_down", b"o_down", b"disconnected"} & set(facts[b"flags"].split(b",")):
                    replicas.append(self._node(*address_of(facts[b"ip"], facts[b"port"])))
        except Exception as error:  # a broken server makes libraries raise anything
            self.faults[reason_of(error)] += 1
        return tuple(replicas)
