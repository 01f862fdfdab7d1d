"""A Redis Cluster: which of its masters has a key, and where keys have gone when slots move or masters die.

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
from kvlab.stores.redis.discovery import MAX_SERVERS, SLOTS, Discovered, address_of, is_list, most_telling
from kvlab.stores.redis.node import Node
from kvlab.stores.redis.reasons import works
from kvlab.stores.redis.topology import Shard, Split, SubBatch

_NO_NAME_YET: Final = b"?"  # where servers are to be known by names


class Cluster(Discovered):
    """Sixteen thousand slots, shared among masters; a key's CRC16 says in which it is."""

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
        parts = [SubBatch(self._pick(shard, reading), indices) for shard, indices in by_shard.items() if shard]
        return parts, (reason or Reason.DOWN) if unserved else None

    def redirect(self, part: SubBatch, replies: Sequence[Reply]) -> list[SubBatch]:
        """See `Topology`."""
        parts = dict[tuple[Node, bool], list[int]]()
        for i, reply in zip(part.indices, replies, strict=True):
            if isinstance(reply, AskError) and 0 <= reply.slot_id < SLOTS:
                try:
                    host = reply.host or part.node.name.rpartition(":")[0]
                    node = self._node(*address_of(host.encode(), reply.port))
                except redis.InvalidResponse:
                    continue
                if isinstance(reply, MovedError):
                    self._slots[reply.slot_id] = self._by_master.setdefault(node, Shard(node))
                parts.setdefault((node, not isinstance(reply, MovedError)), []).append(i)
        return [SubBatch(node, indices, asking) for (node, asking), indices in parts.items()]

    def unserved(self) -> int:
        """See `Topology`."""
        return self._slots.count(None)

    def shards(self) -> list[Shard]:
        """See `Topology`."""
        return list(self._by_master.values())

    def _ask(self, deadline: Deadline) -> None:
        errors: list[Exception] = []
        try:
            for host, pool, node in self._who_may_know():
                try:
                    return self._believe(_ranges(pool.ask((b"CLUSTER", b"SLOTS"), deadline.half()), host))
                except Exception as error:
                    error.add_note(f"from {pool.address}")
                    errors.append(error)
                    if node is not None:
                        node.breaker.record(works([error]))
            raise most_telling(errors)
        finally:
            self._forget_unused()

    def _who_may_know(self) -> list[tuple[str, Any, Node | None]]:
        """Host and pool, masters without faults first. In random order: one may be cut off from the others."""
        masters = {shard.master for shard in self.shards()}
        with self._lock:
            known = [(host, node.pool, node) for (host, _), node in self._nodes.items()]
        random.shuffle(known)
        known.sort(key=lambda entry: (entry[2].breaker.faults, entry[2] not in masters))
        seeds = [(seed.host, seed, None) for seed in random.sample(self._seeds, len(self._seeds))]
        healthy = sum(not node.breaker.faults for _, _, node in known)
        return [*known[:healthy], *seeds, *known[healthy:]]

    def _believe(self, ranges: list[tuple[int, int, list[tuple[str, int]]]]) -> None:
        slots: list[Shard | None] = [None] * SLOTS
        by_master: dict[Node, Shard] = {}
        for first, last, addresses in ranges:
            master, *replicas = [self._node(*at) for at in addresses]
            shard = by_master.setdefault(master, Shard(master, tuple(replicas)))
            slots[first : last + 1] = [shard] * (last + 1 - first)
        self._slots, self._by_master = slots, by_master

    def _forget_unused(self) -> None:
        """Let go of servers that have left, and of those that only redirects ever named."""
        used = dict.fromkeys(filter(None, self._slots))  # in the order of their slots
        self._by_master = {shard.master: shard for shard in used}
        self._keep_only(used)


def _ranges(told: Any, host: str) -> list[tuple[int, int, list[tuple[str, int]]]]:
    """What CLUSTER SLOTS says: slots from and to, and the addresses of those who serve them, the master first.

    Args:
        host: of the server that says so; hosts that it does not name are this one.

    Raises:
        ClusterDownError: no server has any slot, as a server says that is in no cluster.
        redis.InvalidResponse: it says something else.
    """
    ranges = []
    if not isinstance(told, list) or len(told) > SLOTS:
        raise redis.InvalidResponse("expected a list of slots")
    for line in told:
        if not is_list(line, 3) or not all(is_list(server, 2) for server in line[2:]):
            raise redis.InvalidResponse("expected slots and their servers")
        first, last, *servers = line
        if not (type(first) is type(last) is int and 0 <= first <= last < SLOTS):
            raise redis.InvalidResponse(f"expected a range of slots, got {str(line[:2])[:40]}")
        if servers[0][0] != _NO_NAME_YET:
            known = [at for at in servers if at[0] != _NO_NAME_YET]
            ranges.append((first, last, [address_of(at[0] or host.encode(), at[1]) for at in known]))
    if not ranges:
        raise ClusterDownError("no server has any slot")
    if len({at for _, _, addresses in ranges for at in addresses}) > MAX_SERVERS:
        raise redis.InvalidResponse(f"expected at most {MAX_SERVERS} servers")
    return ranges
