"""Which server has a key: the interface of all topologies, and the simplest one, a single server."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvlab.stores.deadline import Deadline
from kvlab.stores.faults import Reason
from kvlab.stores.redis.connection import Command, Reply
from kvlab.stores.redis.node import Node


@dataclass(frozen=True, eq=False)
class Shard:
    """A master and its replicas."""

    master: Node
    replicas: tuple[Node, ...] = ()


@dataclass(slots=True)
class SubBatch:
    """The part of a batch for one server.

    Attributes:
        indices: the positions of its keys in the batch, ascending.
        asking: the slots of the keys are being migrated to this server (ASK).
    """

    node: Node
    indices: Sequence[int]
    asking: bool = False


Split = tuple[list[SubBatch], Reason | None]
"""The sub-batches of a batch, and the reason why some names are in none of them, or None."""


class Topology(ABC):
    """Which node has a key. Thread-safe.

    Attributes:
        multi_node: whether there can be several servers.
        health_commands: commands that `health` tries in addition to the commands of the store.
        faults: failed requests for a newer map or for the replicas in Sentinel, by reason.
        secrets: texts that messages about the map must not contain.
    """

    multi_node = True
    health_commands: tuple[Command, ...] = ()
    secrets: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()

    @abstractmethod
    def split(self, names: Sequence[bytes], deadline: Deadline, reading: bool = False) -> Split:
        """Divide a batch among the nodes. `reading`: a replica may be used."""

    @abstractmethod
    def shards(self) -> list[Shard]:
        """Return all known shards."""

    def refresh(self, deadline: Deadline) -> list[Shard]:
        """Request the map now and return all shards; raise an exception if no server returns a map."""
        return self.shards()

    def unserved(self) -> int:
        """Return how many slots have no server."""
        return 0

    def hint(self, reasons: Iterable[Reason]) -> None:
        """Take the reasons of a failed round trip. They may mean that the map is out of date."""
        return None

    def redirect(self, sub_batch: SubBatch, replies: Sequence[Reply]) -> list[SubBatch]:
        """Return sub-batches for the keys that the server redirected. MOVED changes the map, ASK does not."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Close all nodes."""


class SingleServer(Topology):
    """One server that has all keys."""

    multi_node = False

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._node = node

    def split(self, names: Sequence[bytes], deadline: Deadline, reading: bool = False) -> Split:
        """See `Topology`."""
        return [SubBatch(self._node, range(len(names)))], None

    def shards(self) -> list[Shard]:
        """See `Topology`."""
        return [Shard(self._node)]

    def close(self) -> None:
        """See `Topology`."""
        self._node.close()
