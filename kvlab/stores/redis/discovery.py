"""The common part of Cluster and Sentinel: servers report the map, which assigns keys to servers.

A map may be out of date at any time: slots move, masters fail, and replicas take over. A hint is a reply that
suggests such a change (MOVED, READONLY, a missing answer). After a hint, the map is requested at most twice
per second, otherwise once per minute. After a hint, a call requests the map itself, in half of its time,
because its keys would otherwise be misses. If the map is only old, the call uses it, and a thread requests a
new map. Until the servers agree on a new map, the keys of a lost server are misses.
"""

from __future__ import annotations

import random
import re
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS

from kvlab.stores.breaker import Breaker
from kvlab.stores.deadline import Deadline
from kvlab.stores.faults import Reason
from kvlab.stores.fork import reset_in_children
from kvlab.stores.latch import Lease
from kvlab.stores.redis.node import Node
from kvlab.stores.redis.pool import NoConnection, Pool
from kvlab.stores.redis.reasons import HINTS, reason_of
from kvlab.stores.redis.topology import Shard, Topology

SLOTS: Final = REDIS_CLUSTER_HASH_SLOTS
MAP_AGE_S: Final = 60.0  # how long a map is used without a hint
PAUSE_S: Final = 0.5  # the minimum time from one request to the next after a hint or a failure
REFRESHER: Final = "kvlab map"  # the name of the thread that requests the map
MAX_SERVERS: Final = 1000  # the specification plans for no larger cluster
_HOST: Final = re.compile(rb"[A-Za-z0-9._:%-]+")  # a host name, or an IPv4 or IPv6 address


class Discovered(Topology):
    """A topology whose servers report its map.

    Args:
        seeds: the servers that the URL names.
        make_node: creates a node for a host and a port.
        read_replicas: read from replicas that work.
    """

    def __init__(
        self, seeds: list[Pool], make_node: Callable[[str, int], Node], read_replicas: bool, clock: Callable[[], float]
    ) -> None:
        super().__init__()
        self._seeds = seeds
        self.secrets = tuple({secret for seed in seeds for secret in seed.secrets})
        self._make_node = make_node
        self._read_replicas = read_replicas
        self._clock = clock
        self._breaker = Breaker(clock=clock)  # opens when no server returns a map
        self._nodes: dict[tuple[str, int], Node] = {}
        self._known = False
        self._hinted = False  # a reply suggests that the map is out of date
        self._failed = False  # the last request for the map failed
        self._requested_at = float("-inf")
        self._next_replica = random.randrange(1 << 16)
        self.reset_after_fork()
        reset_in_children(self)

    def reset_after_fork(self) -> None:
        """See `Forkable`."""
        self._lock = threading.Lock()  # guards `_nodes`
        self._lease = Lease()

    @abstractmethod
    def _request_map(self, deadline: Deadline) -> None:
        """Request the map and use it; raise an exception if no server returns a map."""

    def refresh(self, deadline: Deadline) -> list[Shard]:
        """See `Topology`."""
        if not self._lease.take(deadline.remaining, deadline.remaining):
            raise NoConnection("other threads kept requesting the map")
        try:
            self._request_and_record(deadline)
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
        """Ensure that a map exists and is refreshed when due; return the reason if there is none, else None."""
        if self._known:
            self._refresh_if_due(deadline)
            return None
        if not self._lease.take(deadline.remaining, deadline.remaining):
            return Reason.POOL
        try:
            if self._known:
                return None  # another thread has just requested the map
            if not self._breaker.allow():
                return Reason.BREAKER
            self._request_and_record(deadline)
        except Exception as error:
            return reason_of(error)
        finally:
            self._lease.give_back()
        return None

    def _refresh_if_due(self, deadline: Deadline) -> None:
        """Request a map if one is due: after a hint in half of the call's time, otherwise in a thread."""
        if not (self._due and self._breaker.ready and self._lease.take(0, deadline.remaining)):
            return
        if self._hinted:
            self._request_with_lease(deadline.half())
            return
        thread = threading.Thread(target=self._request_with_lease, args=(deadline.copy(),), name=REFRESHER, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread can be started
            self._lease.give_back()

    @property
    def _due(self) -> bool:
        """Whether a request is due: `PAUSE_S` after the last one if there was a hint or failure, else `MAP_AGE_S`."""
        return self._clock() - self._requested_at >= (PAUSE_S if self._hinted or self._failed else MAP_AGE_S)

    def _request_with_lease(self, deadline: Deadline) -> None:
        """Request a due map under the caller's lease, then end the lease. After a failure, the old map stays in use."""
        try:
            if self._due and self._breaker.allow():
                self._request_and_record(deadline)
        except Exception as error:
            self.faults[reason_of(error)] += 1
        finally:
            self._lease.give_back()

    def _request_and_record(self, deadline: Deadline) -> None:
        verdict: bool | None = None
        try:
            self._hinted = False  # before the request, so that hints during the request count
            self._request_map(deadline)
            self._known = verdict = True
            self._failed = False
        except Exception as error:  # a broken server can cause any exception in a library
            verdict, self._failed = False, True
            if reason_of(error) == Reason.RESPONSE:  # the server is not of the kind that the URL names
                raise redis.InvalidResponse(str(error)) from error
            raise
        finally:
            self._requested_at = self._clock()
            self._breaker.record(verdict)

    def _node(self, host: str, port: int) -> Node:
        """Return the node at an address. A known address keeps its node, with its connections and breakers."""
        with self._lock:
            if (host, port) not in self._nodes:
                self._nodes[host, port] = self._make_node(host, port)
            return self._nodes[host, port]

    def _keep_only(self, shards: Iterable[Shard]) -> None:
        """Close the nodes that are in none of the shards."""
        used = {node for shard in shards for node in (shard.master, *shard.replicas)}
        with self._lock:
            for address in [at for at, node in self._nodes.items() if node not in used]:
                self._nodes.pop(address).close()

    def _pick(self, shard: Shard, reading: bool) -> Node:
        """Return the master; for reading with `read_replicas`, a replica whose breaker is ready, if there is one."""
        if reading and self._read_replicas:
            for i in range(len(shard.replicas)):
                replica = shard.replicas[(self._next_replica + i) % len(shard.replicas)]
                if replica.breaker.ready:
                    return replica
        return shard.master


def most_informative(errors: Sequence[Exception]) -> Exception:
    """Return the first error other than a missing answer, or the last error if there is no other."""
    no_answer = (Reason.CONN, Reason.TIMEOUT)
    return next((error for error in errors if reason_of(error) not in no_answer), errors[-1])


def is_list(reply: Any, least: int) -> bool:
    """Return whether a reply is a list of at least `least` members."""
    return isinstance(reply, list) and len(reply) >= least


def address_of(host: Any, port: Any) -> tuple[str, int]:
    """Return the address of a server from a reply.

    Raises:
        redis.InvalidResponse: the host or the port is invalid.
    """
    number = int(port) if isinstance(port, int) or (isinstance(port, bytes) and port.isdigit()) else 0
    if not isinstance(host, bytes) or not _HOST.fullmatch(host) or not 0 < number < 65536:
        raise redis.InvalidResponse(f"expected a server's address, got {str((host, port))[:80]}")
    return host.decode("ascii"), number
