"""Which server has a key: one for all keys, a Redis Cluster, or whoever Sentinel says is the master.

A topology is learned from the servers themselves and is never certain: slots move, masters die,
replicas take over. So it is asked for again when an answer hints that it has changed (MOVED,
READONLY, a server that does not answer), at most twice a second, and once a minute without a hint.
Until the servers have agreed on something new, keys of a lost server are misses.

The rules are those of Redis: https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
and https://redis.io/docs/latest/develop/reference/sentinel-clients/
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
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError

from kvlab.stores.breaker import Breaker
from kvlab.stores.node import Node, Refused, reason_of, verdict_of
from kvlab.stores.wire import Command, Deadline, Link, NoConnection, Reply

SLOTS: Final = REDIS_CLUSTER_HASH_SLOTS
KEEP_S: Final = 60.0  # how long a map is believed without a hint
PAUSE_S: Final = 0.5  # the least time between two questions, however many hints there are
MAX_SERVERS: Final = (
    1000  # of an honest cluster: https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
)
HINTS: Final = frozenset({"moved", "down", "readonly", "conn", "timeout", "protocol", "loading", "breaker"})
"""Reasons that may mean that another server has the keys now."""
_HOST: Final = re.compile(rb"[A-Za-z0-9._:%-]+")  # a name, or an address of either kind
_NO_NAME_YET: Final = b"?"  # where servers are to be known by names


@dataclass(frozen=True, eq=False)
class Shard:
    """A master, and the replicas that follow it."""

    master: Node
    replicas: tuple[Node, ...] = ()


@dataclass(frozen=True)
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
    """One asks at a time. A turn ends by itself: a signal may keep its holder from ever giving it back."""

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


class _Learned(Topology):
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
        self._hinted = False
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
        """Ask, if it is time to; returns why nothing is known, "" if something is."""
        if self._known and self._clock() - self._asked_at < (PAUSE_S if self._hinted else KEEP_S):
            return ""
        if not self._turns.take(0 if self._known else deadline.rest, deadline.rest):
            return "" if self._known else "pool"
        try:
            if self._known and self._clock() - self._asked_at < PAUSE_S:
                return ""  # somebody else has just asked
            if not self._breaker.allow():
                return "" if self._known else "breaker"
            self._ask_and_record(deadline)
        except Exception as error:
            if not self._known:
                return reason_of(error)
            self.faults[reason_of(error)] += 1
        finally:
            self._turns.give_back()
        return ""

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
        except Exception:  # a broken server makes libraries raise anything
            verdict, self._hinted = False, True
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


class Sentinel(_Learned):
    """One master, followed by replicas; when it dies, sentinels make one of them the master.

    Args:
        name: what the sentinels call it.
    """

    def __init__(self, name: str, *args: Any) -> None:
        super().__init__(*args)
        self._name = name.encode()
        self._shard: Shard | None = None

    def split(self, keys: Sequence[bytes], deadline: Deadline, reading: bool = False) -> tuple[list[Part], str]:
        """See `Topology`."""
        why = self._learn(deadline)
        if self._shard is None:
            return [], why
        self._turn += reading
        return [Part(self._pick(self._shard, reading), range(len(keys)))], ""

    def unserved(self) -> int:
        """See `Topology`."""
        return 0 if self._shard else SLOTS

    def shards(self) -> list[Shard]:
        """See `Topology`."""
        return [self._shard] if self._shard else []

    def _ask(self, deadline: Deadline) -> None:
        last: Exception = Refused("conn")
        for sentinel in random.sample(self._seeds, len(self._seeds)):  # one may be cut off from the others
            try:
                self._shard = self._told_by(sentinel, deadline.half())
            except Exception as error:
                last = error
                continue
            self._keep_only([self._shard])
            return
        raise last

    def _told_by(self, sentinel: Link, deadline: Deadline) -> Shard:
        where = sentinel.ask((b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._name), deadline)
        if where is None:
            raise redis.ResponseError(f"Sentinel knows no master called {self._name.decode()!r}")
        if not _is_list(where, 2):
            raise redis.InvalidResponse("expected a host and a port from Sentinel")
        master = self._node(*_address(*where[:2]))
        return Shard(master, self._replicas_told_by(sentinel, deadline) if self._read_replicas else ())

    def _replicas_told_by(self, sentinel: Link, deadline: Deadline) -> tuple[Node, ...]:
        """Those that work, by what the sentinel sees; none if it does not tell: then the master is read."""
        replicas: list[Node] = []
        try:
            for told in sentinel.ask((b"SENTINEL", b"REPLICAS", self._name), deadline)[:MAX_SERVERS]:
                facts = dict(zip(told[::2], told[1::2], strict=True))
                if not {b"s_down", b"o_down", b"disconnected"} & set(facts[b"flags"].split(b",")):
                    replicas.append(self._node(*_address(facts[b"ip"], facts[b"port"])))
        except Exception as error:  # a broken server makes libraries raise anything
            self.faults[reason_of(error)] += 1
        return tuple(replicas)


class Cluster(_Learned):
    """Sixteen thousand slots, shared among masters; a key's CRC16 says in which it is."""

    trials = ((b"ASKING",),)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._slots: list[Shard | None] = [None] * SLOTS
        self._by_master: dict[Node, Shard] = {}

    def split(self, keys: Sequence[bytes], deadline: Deadline, reading: bool = False) -> tuple[list[Part], str]:
        """See `Topology`."""
        why = self._learn(deadline)
        self._turn += reading
        slots, indices = self._slots, dict[Shard | None, list[int]]()
        for i, key in enumerate(keys):
            indices.setdefault(slots[key_slot(key)], []).append(i)
        parts = dict[Node, list[int]]()
        unserved = indices.pop(None, None)
        for shard, its in indices.items():
            if shard is not None:
                parts.setdefault(self._pick(shard, reading), []).extend(its)
        return [Part(node, its) for node, its in parts.items()], (why or "down") if unserved else ""

    def redirect(self, part: Part, replies: Sequence[Reply]) -> list[Part]:
        """See `Topology`."""
        parts = dict[tuple[Node, bool], list[int]]()
        for i, reply in zip(part.indices, replies, strict=True):
            if isinstance(reply, AskError) and 0 <= reply.slot_id < SLOTS:
                try:
                    host = reply.host or part.node.name.rpartition(":")[0]
                    node = self._node(*_address(host.encode(), reply.port))
                except redis.InvalidResponse:
                    continue
                if isinstance(reply, MovedError):
                    self._slots[reply.slot_id] = self._by_master.setdefault(node, Shard(node))
                parts.setdefault((node, not isinstance(reply, MovedError)), []).append(i)
        return [Part(node, its, asking) for (node, asking), its in parts.items()]

    def unserved(self) -> int:
        """See `Topology`."""
        return self._slots.count(None)

    def shards(self) -> list[Shard]:
        """See `Topology`."""
        return list(self._by_master.values())

    def _ask(self, deadline: Deadline) -> None:
        last: Exception = Refused("conn")
        try:
            for host, link, node in self._who_may_know():
                try:
                    return self._believe(_ranges(link.ask((b"CLUSTER", b"SLOTS"), deadline.half()), host))
                except Exception as error:
                    last = error
                    if node is not None:
                        node.breaker.record(verdict_of([error]))
            raise last
        finally:
            self._forget_unused()

    def _who_may_know(self) -> list[tuple[str, Any, Node | None]]:
        """Host and link, masters without faults first. In random order: one may be cut off from the others."""
        masters = {shard.master for shard in self.shards()}
        with self._lock:
            known = [(host, node.link, node) for (host, _), node in self._nodes.items()]
        random.shuffle(known)
        known.sort(key=lambda at: (at[2].breaker.faults, at[2] not in masters))
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
        ClusterDownError: nobody serves any slot, as a server says that is in no cluster.
        redis.InvalidResponse: it says something else.
    """
    ranges = []
    if not isinstance(told, list) or len(told) > SLOTS:
        raise redis.InvalidResponse("expected a list of slots")
    for line in told:
        if not _is_list(line, 3) or not all(_is_list(server, 2) for server in line[2:]):
            raise redis.InvalidResponse("expected slots and their servers")
        first, last, *servers = line
        if not (type(first) is type(last) is int and 0 <= first <= last < SLOTS):
            raise redis.InvalidResponse(f"expected a range of slots, got {str(line[:2])[:40]}")
        if servers[0][0] != _NO_NAME_YET:
            known = [at for at in servers if at[0] != _NO_NAME_YET]
            ranges.append((first, last, [_address(at[0] or host.encode(), at[1]) for at in known]))
    if not ranges:
        raise ClusterDownError("nobody serves any slot")
    if len({at for _, _, addresses in ranges for at in addresses}) > MAX_SERVERS:
        raise redis.InvalidResponse(f"expected at most {MAX_SERVERS} servers")
    return ranges


def _is_list(reply: Any, least: int) -> bool:
    return isinstance(reply, list) and len(reply) >= least


def _address(host: Any, port: Any) -> tuple[str, int]:
    """A server's address as a server gave it.

    Raises:
        redis.InvalidResponse: it is none.
    """
    number = int(port) if isinstance(port, int) or (isinstance(port, bytes) and port.isdigit()) else 0
    if not isinstance(host, bytes) or not _HOST.fullmatch(host) or not 0 < number < 65536:
        raise redis.InvalidResponse(f"expected a server's address, got {str((host, port))[:80]}")
    return host.decode("ascii"), number
