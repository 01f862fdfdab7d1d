"""Which server has a key: what all kinds of topology have in common, and the simplest, one for all keys.

A topology is learned from the servers themselves and is never certain: slots move, masters die,
replicas take over. So it is asked for again when an answer hints that it has changed (MOVED,
READONLY, a server that does not answer), at most twice a second, and once a minute without a hint.
A hint is worth half of a call's time, for its keys are about to be missed. A map that is only old
is not: the call goes by it, and a thread asks. Until the servers have agreed on something new, keys
of a lost server are misses.
"""

from __future__ import annotations

import math
import random
import re
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS

from kvlab.stores.breaker import Breaker
from kvlab.stores.redis.connection import Command, Deadline, Link, NoConnection, Reply
from kvlab.stores.redis.node import Node, reason_of

SLOTS: Final = REDIS_CLUSTER_HASH_SLOTS
KEEP_S: Final = 60.0  # how long a map is believed without a hint
PAUSE_S: Final = 0.5  # the least time between two questions, however many hints there are
ASKER: Final = "kvlab map"  # the thread that asks
MAX_SERVERS: Final = 1000  # more no cluster is meant to have, says its specification
HINTS: Final = frozenset({"moved", "down", "readonly", "conn", "timeout", "protocol", "loading", "breaker"})
"""Reasons that may mean that another server has the keys now."""
_HOST: Final = re.compile(rb"[A-Za-z0-9._:%-]+")  # a name, or an address of either kind


@dataclass(frozen=True, eq=False)
class Shard:
    """A master, and the replicas that follow it."""

    master: Node
    replicas: tuple[Node, ...] = ()


@dataclass(slots=True)
class Part:
    """The share of a batch that one server is asked for.

    Attributes:
        indices: of the keys in the batch.
        asking: the slot is on its way to this server (ASK).
    """

    node: Node
    indices: Sequence[int]
    asking: bool = False


class Topology(ABC):
    """Which node has a key. Safe to use from several threads.

    Attributes:
        many: whether there can be several servers.
        trials: commands that `health` tries on each server besides the store's own.
        faults: questions for the map that failed while an older one was there, by reason.
    """

    many = True
    trials: tuple[Command, ...] = ()

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()

    @abstractmethod
    def split(self, keys: Sequence[bytes], deadline: Deadline, reading: bool = False) -> tuple[list[Part], str]:
        """Divide a batch among the nodes.

        Args:
            keys: as the servers see them.
            reading: a replica will do.

        Returns:
            the parts, and why keys are in none of them: "" if all are.
        """

    @abstractmethod
    def shards(self) -> list[Shard]:
        """All shards that are known."""

    @abstractmethod
    def ask(self, deadline: Deadline) -> list[Shard]:
        """All shards, asked for now.

        Raises:
            Exception: nobody tells.
        """

    @abstractmethod
    def unserved(self) -> int:
        """How many slots nobody serves."""

    def hint(self, reasons: Iterable[str]) -> None:
        """What became of an exchange: it may mean that the map is old."""
        return None

    def redirect(self, part: Part, replies: Sequence[Reply]) -> list[Part]:
        """Where its server says that keys have gone. Remembers what is said for good (MOVED, not ASK)."""
        return []

    @abstractmethod
    def renew(self) -> None:
        """See `Node.renew`."""

    @abstractmethod
    def close(self) -> None:
        """Close all nodes."""


class Alone(Topology):
    """One server has all keys."""

    many = False
    trials = ((b"INFO", b"cluster"),)

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._node = node

    def split(self, keys: Sequence[bytes], deadline: Deadline, reading: bool = False) -> tuple[list[Part], str]:
        """See `Topology`."""
        return [Part(self._node, range(len(keys)))], ""

    def shards(self) -> list[Shard]:
        """See `Topology`."""
        return [Shard(self._node)]

    def ask(self, deadline: Deadline) -> list[Shard]:
        """See `Topology`. Needs nobody's answer."""
        return self.shards()

    def unserved(self) -> int:
        """See `Topology`."""
        return 0

    def renew(self) -> None:
        """See `Topology`."""
        self._node.renew()

    def close(self) -> None:
        """See `Topology`."""
        self._node.close()


class _Turns:
    """One asks at a time. A turn ends by itself: a signal may keep its holder from ever giving it back.

    Whoever takes a turn may have another thread give it back.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._until = -math.inf

    def take(self, wait_s: float, lease_s: float) -> bool:
        """Wait for a turn that lasts so long; False if none came."""
        with self._free:
            give_up = time.monotonic() + wait_s
            while (now := time.monotonic()) < self._until:
                if now >= give_up:
                    return False
                self._free.wait(min(give_up, self._until) - now)
            self._until = time.monotonic() + lease_s
            return True

    def give_back(self) -> None:
        """Let the next one have it."""
        with self._free:
            self._until = -math.inf
            self._free.notify()


class Learned(Topology):
    """What Cluster and Sentinel have in common: servers that tell which servers there are.

    Args:
        seeds: the servers that are asked first.
        make_node: a node for a host and a port.
        read_replicas: read from replicas while one works.
    """

    def __init__(
        self,
        seeds: Sequence[Link],
        make_node: Callable[[str, int], Node],
        read_replicas: bool,
        clock: Callable[[], float],
    ) -> None:
        super().__init__()
        self._seeds = seeds
        self._make_node = make_node
        self._read_replicas = read_replicas
        self._clock = clock
        self._breaker = Breaker(clock=clock)  # for when nobody tells
        self._nodes: dict[tuple[str, int], Node] = {}
        self._known = False
        self._hinted = False  # an answer says that the map may be wrong
        self._failed = False  # nobody answered the last question
        self._asked_at = float("-inf")
        self._turn = random.randrange(1 << 16)  # which replica is next
        self.renew()

    @abstractmethod
    def _ask(self, deadline: Deadline) -> None:
        """Learn the map.

        Raises:
            Exception: nobody tells.
        """

    def _learn(self, deadline: Deadline) -> str:
        """See to it that there is a map, and that it does not get old; returns why there is none, "" if there is."""
        if self._known:
            self._refresh(deadline)
            return ""
        if not self._turns.take(deadline.rest, deadline.rest):
            return "pool"
        try:
            if self._known:
                return ""  # somebody else has just asked
            if not self._breaker.allow():
                return "breaker"
            self._ask_and_record(deadline)
        except Exception as error:
            return reason_of(error)
        finally:
            self._turns.give_back()
        return ""

    def _refresh(self, deadline: Deadline) -> None:
        """Ask for a newer map, if it is time to: for a hint in half of the call's time, else by a thread."""
        if not (self._due and self._breaker.ready and self._turns.take(0, deadline.rest)):
            return
        if self._hinted:
            self._ask_in_turn(deadline.half())
            return
        asker = threading.Thread(target=self._ask_in_turn, args=(deadline.copy(),), name=ASKER, daemon=True)
        try:
            asker.start()
        except RuntimeError:  # no thread to be had, or the interpreter is ending
            self._turns.give_back()

    @property
    def _due(self) -> bool:
        """Whether the map is old, or may be wrong."""
        return self._clock() - self._asked_at >= (PAUSE_S if self._hinted or self._failed else KEEP_S)

    def _ask_in_turn(self, deadline: Deadline) -> None:
        """Ask with a turn that was taken, and give it back. Failures are counted: the old map goes on."""
        try:
            if self._due and self._breaker.allow():
                self._ask_and_record(deadline)
        except Exception as error:
            self.faults[reason_of(error)] += 1
        finally:
            self._turns.give_back()

    def ask(self, deadline: Deadline) -> list[Shard]:
        """See `Topology`."""
        if not self._turns.take(deadline.rest, deadline.rest):
            raise NoConnection("others kept asking")
        try:
            self._ask_and_record(deadline)
        finally:
            self._turns.give_back()
        return self.shards()

    def _ask_and_record(self, deadline: Deadline) -> None:
        verdict: bool | None = None
        try:
            self._hinted = False  # before asking: what comes in meanwhile counts again
            self._ask(deadline)
            self._known = verdict = True
            self._failed = False
        except Exception as error:  # a broken server makes libraries raise anything
            verdict, self._failed = False, True
            if reason_of(error) == "response":  # this is not the kind of server that the URL says
                raise redis.InvalidResponse(str(error)) from error
            raise
        finally:
            self._asked_at = self._clock()
            self._breaker.record(verdict)

    def hint(self, reasons: Iterable[str]) -> None:
        """See `Topology`."""
        if not HINTS.isdisjoint(reasons):
            self._hinted = True

    def _node(self, host: str, port: int) -> Node:
        """The node at an address; the same one as before, with what its breakers know."""
        with self._lock:
            if (host, port) not in self._nodes:
                self._nodes[host, port] = self._make_node(host, port)
            return self._nodes[host, port]

    def _keep_only(self, shards: Iterable[Shard]) -> None:
        """Close servers that have gone."""
        used = {node for shard in shards for node in (shard.master, *shard.replicas)}
        with self._lock:
            gone = [at for at, node in self._nodes.items() if node not in used]
            for at in gone:
                self._nodes.pop(at).close()

    def _pick(self, shard: Shard, reading: bool) -> Node:
        """The master; for reading a replica, if that is wanted and one is not known to be broken."""
        if reading and self._read_replicas:
            for i in range(len(shard.replicas)):
                replica = shard.replicas[(self._turn + i) % len(shard.replicas)]
                if replica.breaker.ready:
                    return replica
        return shard.master

    def renew(self) -> None:
        """See `Topology`."""
        self._lock = threading.Lock()  # guards `_nodes`
        self._turns = _Turns()
        self._breaker.renew()
        for node in self._nodes.values():
            node.renew()

    def close(self) -> None:
        """See `Topology`."""
        with self._lock:
            for node in self._nodes.values():
                node.close()


def most_telling(errors: Sequence[Exception]) -> Exception:
    """Of the servers that were asked in vain, what one has said; else the last that did not answer."""
    return next((error for error in errors if reason_of(error) not in ("conn", "timeout")), errors[-1])


def is_list(reply: Any, least: int) -> bool:
    """Whether a server's answer is a list of at least so many."""
    return isinstance(reply, list) and len(reply) >= least


def address_of(host: Any, port: Any) -> tuple[str, int]:
    """A server's address as a server gave it.

    Raises:
        redis.InvalidResponse: it is none.
    """
    number = int(port) if isinstance(port, int) or (isinstance(port, bytes) and port.isdigit()) else 0
    if not isinstance(host, bytes) or not _HOST.fullmatch(host) or not 0 < number < 65536:
        raise redis.InvalidResponse(f"expected a server's address, got {str((host, port))[:80]}")
    return host.decode("ascii"), number
