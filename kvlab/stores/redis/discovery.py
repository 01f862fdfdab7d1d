"""What Cluster and Sentinel have in common: servers that tell which servers there are.

A map is learned from the servers themselves and is never certain: slots move, masters die, replicas
take over. So it is asked for again when an answer hints that it has changed (MOVED, READONLY, a server
that does not answer), at most twice a second, and once a minute without a hint. A hint is worth half of
a call's time, for its keys are about to be missed. A map that is only old is not: the call goes by it,
and a thread asks. Until the servers have agreed on something new, keys of a lost server are misses.
"""

from __future__ import annotations

import math
import random
import re
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS

from kvlab.stores.breaker import Breaker
from kvlab.stores.deadline import Deadline
from kvlab.stores.faults import Reason
from kvlab.stores.fork import reset_in_children
from kvlab.stores.redis.node import Node
from kvlab.stores.redis.pool import NoConnection, Pool
from kvlab.stores.redis.reasons import HINTS, reason_of
from kvlab.stores.redis.topology import Shard, Topology

SLOTS: Final = REDIS_CLUSTER_HASH_SLOTS
MAP_AGE_S: Final = 60.0  # how long a map is believed without a hint
PAUSE_S: Final = 0.5  # the least time between two questions, however many hints there are
ASKER: Final = "kvlab map"  # the name of the thread that asks
MAX_SERVERS: Final = 1000  # more no cluster is meant to have, says its specification
_HOST: Final = re.compile(rb"[A-Za-z0-9._:%-]+")  # a name, or an address of either kind


class Lease:
    """Who may refresh the map now: one at a time.

    A lease ends by itself, because a signal may keep its holder from ever giving it back. Another thread
    than the holder may give it back.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._expires_at = -math.inf

    def take(self, wait_s: float, lease_s: float) -> bool:
        """Wait at most `wait_s` for a lease that lasts `lease_s`; False if none came free."""
        with self._free:
            give_up = time.monotonic() + wait_s
            while (now := time.monotonic()) < self._expires_at:
                if now >= give_up:
                    return False
                self._free.wait(min(give_up, self._expires_at) - now)
            self._expires_at = time.monotonic() + lease_s
            return True

    def give_back(self) -> None:
        """Let the next one have it."""
        with self._free:
            self._expires_at = -math.inf
            self._free.notify()


class Discovered(Topology):
    """A topology that its servers tell.

    Args:
        seeds: the servers that are asked first.
        make_node: a node for a host and a port.
        read_replicas: read from replicas while one works.
    """

    def __init__(
        self,
        seeds: Sequence[Pool],
        make_node: Callable[[str, int], Node],
        read_replicas: bool,
        clock: Callable[[], float],
    ) -> None:
        super().__init__()
        self._seeds = seeds
        self.secrets = tuple({secret for seed in seeds for secret in seed.secrets})
        self._make_node = make_node
        self._read_replicas = read_replicas
        self._clock = clock
        self._breaker = Breaker(clock=clock)  # for when no server tells
        self._nodes: dict[tuple[str, int], Node] = {}
        self._known = False
        self._hinted = False  # an answer says that the map may be wrong
        self._failed = False  # no server answered the last question
        self._asked_at = float("-inf")
        self._next_replica = random.randrange(1 << 16)
        self.reset_after_fork()
        reset_in_children(self)

    def reset_after_fork(self) -> None:
        """See `Forkable`."""
        self._lock = threading.Lock()  # guards `_nodes`
        self._lease = Lease()

    @abstractmethod
    def _ask(self, deadline: Deadline) -> None:
        """Learn the map.

        Raises:
            Exception: no server tells.
        """

    def ask(self, deadline: Deadline) -> list[Shard]:
        """See `Topology`."""
        if not self._lease.take(deadline.remaining, deadline.remaining):
            raise NoConnection("others kept asking")
        try:
            self._ask_and_record(deadline)
        finally:
            self._lease.give_back()
        return self.shards()

    def hint(self, reasons: Iterable[Reason]) -> None:
        """See `Topology`."""
        if not HINTS.isdisjoint(reasons):
            self._hinted = True

    def close(self) -> None:
        """See `Topology`."""
        with self._lock:
            for node in self._nodes.values():
                node.close()

    def _learn(self, deadline: Deadline) -> Reason | None:
        """See to it that there is a map, and that it does not get old; why there is none, None if there is."""
        if self._known:
            self._refresh(deadline)
            return None
        if not self._lease.take(deadline.remaining, deadline.remaining):
            return Reason.POOL
        try:
            if self._known:
                return None  # another thread has just asked
            if not self._breaker.allow():
                return Reason.BREAKER
            self._ask_and_record(deadline)
        except Exception as error:
            return reason_of(error)
        finally:
            self._lease.give_back()
        return None

    def _refresh(self, deadline: Deadline) -> None:
        """Ask for a newer map, if one is due: for a hint in half of the call's time, else by a thread."""
        if not (self._due and self._breaker.ready and self._lease.take(0, deadline.remaining)):
            return
        if self._hinted:
            self._ask_with_lease(deadline.half())
            return
        asker = threading.Thread(target=self._ask_with_lease, args=(deadline.copy(),), name=ASKER, daemon=True)
        try:
            asker.start()
        except RuntimeError:  # no thread to be had, or the interpreter is ending
            self._lease.give_back()

    @property
    def _due(self) -> bool:
        """Whether the map is old, or may be wrong."""
        return self._clock() - self._asked_at >= (PAUSE_S if self._hinted or self._failed else MAP_AGE_S)

    def _ask_with_lease(self, deadline: Deadline) -> None:
        """Ask with a lease that was taken, and give it back. Failures are counted: the old map goes on."""
        try:
            if self._due and self._breaker.allow():
                self._ask_and_record(deadline)
        except Exception as error:
            self.faults[reason_of(error)] += 1
        finally:
            self._lease.give_back()

    def _ask_and_record(self, deadline: Deadline) -> None:
        verdict: bool | None = None
        try:
            self._hinted = False  # before asking: what comes in meanwhile counts again
            self._ask(deadline)
            self._known = verdict = True
            self._failed = False
        except Exception as error:  # a broken server makes libraries raise anything
            verdict, self._failed = False, True
            if reason_of(error) == Reason.RESPONSE:  # this is not the kind of server that the URL says
                raise redis.InvalidResponse(str(error)) from error
            raise
        finally:
            self._asked_at = self._clock()
            self._breaker.record(verdict)

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
            gone = [address for address, node in self._nodes.items() if node not in used]
            for address in gone:
                self._nodes.pop(address).close()

    def _pick(self, shard: Shard, reading: bool) -> Node:
        """The master; for reading a replica, if that is wanted and one is not known to be broken."""
        if reading and self._read_replicas:
            for i in range(len(shard.replicas)):
                replica = shard.replicas[(self._next_replica + i) % len(shard.replicas)]
                if replica.breaker.ready:
                    return replica
        return shard.master


def most_telling(errors: Sequence[Exception]) -> Exception:
    """Of the servers that were asked in vain, what one has said; else the last that did not answer."""
    silent = (Reason.CONN, Reason.TIMEOUT)
    return next((error for error in errors if reason_of(error) not in silent), errors[-1])


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
