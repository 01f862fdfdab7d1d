"""A Redis Cluster: which master has a key, also after slots have moved or a replica has replaced its master.

https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final

import redis
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError

from kvlab.stores.deadline import Deadline
from kvlab.stores.faults import Reason
from kvlab.stores.redis.connection import Reply
from kvlab.stores.redis.discovery import MAX_SERVERS, SLOTS, Discovered, address_of, is_list, most_informative
from kvlab.stores.redis.node import Node
from kvlab.stores.redis.reasons import server_works
from kvlab.stores.redis.topology import Shard, Split, SubBatch

_UNKNOWN_HOST: Final = b"?"  # reported in place of a host name that is not known yet


class Cluster(Discovered):
    """16,384 slots, divided among masters. The CRC16 of a key determines its slot."""

    health_commands = ((b"ASKING",),)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._slots: list[Shard | None] = [None] * SLOTS
        self._by_master: dict[Node, Shard] = {}

    def split(self, names: Sequence[bytes], deadline: Deadline, reading: bool = False) -> Split:
        """See `Topology`."""
        reason = self._learn(deadline)
        self._next_replica += reading
        slots, by_shard = self._slots, dict[Shard | None, list[int]]()
        for i, name in enumerate(names):
            by_shard.setdefault(slots[key_slot(name)], []).append(i)
        unserved = by_shard.pop(None, None)
        sub_batches = [SubBatch(self._pick(shard, reading), indices) for shard, indices in by_shard.items() if shard]
        return sub_batches, (reason or Reason.DOWN) if unserved else None

    def redirect(self, sub_batch: SubBatch, replies: Sequence[Reply]) -> list[SubBatch]:
        """See `Topology`."""
        sub_batches = dict[tuple[Node, bool], list[int]]()
        for i, reply in zip(sub_batch.indices, replies, strict=True):
            if isinstance(reply, AskError) and 0 <= reply.slot_id < SLOTS:
                try:
                    host = reply.host or sub_batch.node.name.rpartition(":")[0]
                    node = self._node(*address_of(host.encode(), reply.port))
                except redis.InvalidResponse:
                    continue
                if isinstance(reply, MovedError):
                    self._slots[reply.slot_id] = self._by_master.setdefault(node, Shard(node))
                sub_batches.setdefault((node, not isinstance(reply, MovedError)), []).append(i)
        return [SubBatch(node, indices, asking) for (node, asking), indices in sub_batches.items()]

    def unserved(self) -> int:
        """See `Topology`."""
        return self._slots.count(None)

    def shards(self) -> list[Shard]:
        """See `Topology`."""
        return list(self._by_master.values())

    def _request_map(self, deadline: Deadline) -> None:
        errors: list[Exception] = []
        try:
            for host, pool, node in self._map_sources():
                try:
                    return self._use_map(_ranges(pool.request((b"CLUSTER", b"SLOTS"), deadline.half()), host))
                except Exception as error:
                    error.add_note(f"from {pool.address}")
                    errors.append(error)
                    if node is not None:
                        node.breaker.record(server_works([error]))
            raise most_informative(errors)
        finally:
            self._forget_unused()

    def _map_sources(self) -> list[tuple[str, Any, Node | None]]:
        """Return host, pool and node of each source: nodes without faults (masters first), seeds, other nodes.

        Equal sources are in random order, because one of them may be cut off from the others.
        """
        masters = {shard.master for shard in self.shards()}
        with self._lock:
            known = [(host, node.pool, node) for (host, _), node in self._nodes.items()]
        random.shuffle(known)
        known.sort(key=lambda entry: (entry[2].breaker.faults, entry[2] not in masters))
        seeds = [(seed.host, seed, None) for seed in random.sample(self._seeds, len(self._seeds))]
        healthy = sum(not node.breaker.faults for _, _, node in known)
        return [*known[:healthy], *seeds, *known[healthy:]]

    def _use_map(self, ranges: list[tuple[int, int, list[tuple[str, int]]]]) -> None:
        slots: list[Shard | None] = [None] * SLOTS
        by_master: dict[Node, Shard] = {}
        for first, last, addresses in ranges:
            master, *replicas = [self._node(*at) for at in addresses]
            shard = by_master.setdefault(master, Shard(master, tuple(replicas)))
            slots[first : last + 1] = [shard] * (last + 1 - first)
        self._slots, self._by_master = slots, by_master

    def _forget_unused(self) -> None:
        """Close the nodes that serve no slot: they have left the cluster, or only redirects named them."""
        used = dict.fromkeys(filter(None, self._slots))  # in the order of the slots
        self._by_master = {shard.master: shard for shard in used}
        self._keep_only(used)


def _ranges(reply: Any, host: str) -> list[tuple[int, int, list[tuple[str, int]]]]:
    """Parse the reply to CLUSTER SLOTS: first slot, last slot and addresses per range, the master first.

    `host` is the host of the server that replied. An address without a host is on this server.

    Raises:
        ClusterDownError: no slot is assigned, for example because the server is in no cluster.
        redis.InvalidResponse: the reply has another form.
    """
    ranges = []
    if not isinstance(reply, list) or len(reply) > SLOTS:
        raise redis.InvalidResponse("expected a list of slots")
    for line in reply:
        if not is_list(line, 3) or not all(is_list(server, 2) for server in line[2:]):
            raise redis.InvalidResponse("expected a range of slots with its servers")
        first, last, *servers = line
        if not (type(first) is type(last) is int and 0 <= first <= last < SLOTS):
            raise redis.InvalidResponse(f"expected a range of slots, got {str(line[:2])[:40]}")
        if servers[0][0] != _UNKNOWN_HOST:
            known = [at for at in servers if at[0] != _UNKNOWN_HOST]
            ranges.append((first, last, [address_of(at[0] or host.encode(), at[1]) for at in known]))
    if not ranges:
        raise ClusterDownError("no slot has a server")
    if len({at for _, _, addresses in ranges for at in addresses}) > MAX_SERVERS:
        raise redis.InvalidResponse(f"expected at most {MAX_SERVERS} servers")
    return ranges
