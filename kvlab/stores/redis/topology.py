"""Which server has a key: what all kinds of topology have in common, and the simplest, one server for all keys."""

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
    """A master, and the replicas that follow it."""

    master: Node
    replicas: tuple[Node, ...] = ()


@dataclass(slots=True)
class SubBatch:
    """The share of a batch that one server is asked for.

    Attributes:
        indices: of its keys in the batch, ascending.
        asking: their slots are on the way to this server (ASK).
    """

    node: Node
    indices: Sequence[int]
    asking: bool = False


Split = tuple[list[SubBatch], Reason | None]
"""A batch divided among servers, and why some names are in no part of it: None if all are."""


class Topology(ABC):
    """Which node has a key. Safe to use from several threads.

    Attributes:
        multi_node: whether there can be several servers.
        health_commands: what `health` tries on each server besides the store's own commands.
        faults: questions for the map that failed while an older one was there, by reason.
        secrets: what messages about those who tell the map must not show.
    """

    multi_node = True
    health_commands: tuple[Command, ...] = ()
    secrets: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()

    @abstractmethod
    def split(self, names: Sequence[bytes], deadline: Deadline, reading: bool = False) -> Split:
        """Divide a batch among the nodes.

        Args:
            names: keys as the servers see them.
            reading: a replica will do.
        """

    @abstractmethod
    def shards(self) -> list[Shard]:
        """All shards that are known."""

    def ask(self, deadline: Deadline) -> list[Shard]:
        """All shards, asked for now.

        Raises:
            Exception: no server tells.
        """
        return self.shards()

    def unserved(self) -> int:
        """How many slots no server has."""
        return 0

    def hint(self, reasons: Iterable[Reason]) -> None:
        """What became of a round trip: it may mean that the map is old."""
        return None

    def redirect(self, part: SubBatch, replies: Sequence[Reply]) -> list[SubBatch]:
        """Where the server says that keys have gone. Remembers what is said for good (MOVED, not ASK)."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Close all nodes."""


class SingleServer(Topology):
    """One server has all keys."""

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
