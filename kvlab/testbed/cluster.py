"""A Redis Cluster of real processes on loopback: masters that share the slots, with replicas in sync.

with RedisCluster() as cluster:
    store = RedisStore(cluster.url)
    cluster.master_of(b"kv:some key").kill()
    cluster.wait_until_ok()  # its replica has taken over
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS as SLOTS
from redis.crc import key_slot

from kvlab.errors import KVLabError
from kvlab.testbed.server import HOST, RedisServer

READY_S = 60.0
POLL_S = 0.05
DOWN = redis.ConnectionError, redis.TimeoutError


def node_options(node_timeout_ms: int) -> tuple[str, ...]:
    """The options of every node. Replication starts at once, not after Redis' default delay of five seconds."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(node_timeout_ms))
    return *options, "--cluster-require-full-coverage", "no", "--repl-diskless-sync-delay", "0"


class RedisCluster:
    """`masters` nodes that share the slots evenly, each with `replicas` replicas.

    If a master is lost, the slots of the other masters stay available (cluster-require-full-coverage no).

    Args:
        arguments: further command-line options of every node.
        replicas: number of replicas of each master.
        node_timeout_ms: a node without an answer for this time counts as failing (cluster-node-timeout).

    Attributes:
        nodes: the servers, the initial masters first. Killed servers stay in this list.
    """

    def __init__(self, *arguments: str, masters: int = 3, replicas: int = 1, node_timeout_ms: int = 2000) -> None:
        self._masters, self._count = masters, masters * (1 + replicas)
        self._options = (*node_options(node_timeout_ms), *arguments)
        self._stack = contextlib.ExitStack()
        self.nodes: list[RedisServer] = []

    @property
    def url(self) -> str:
        """URL of the cluster, which lists every node."""
        return f"redis-cluster://{','.join(self.addresses)}"

    @property
    def addresses(self) -> list[str]:
        """host:port of every node."""
        return [f"{HOST}:{node.port}" for node in self.nodes]

    def master_of(self, key: bytes) -> RedisServer:
        """The node that serves a key now, according to the first node that is up.

        Raises:
            KVLabError: no node is up, or no node serves the key's slot.
        """
        slot = key_slot(key)
        for first, last, (_, port, *_), *_ in self._slots():
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == port)
        raise KVLabError(f"no node serves slot {slot}")

    def roles(self) -> list[str]:
        """The present role of each node: "master", "replica" or "down" (no answer)."""
        words = {"master": "master", "slave": "replica", "": "down"}
        return [words[state["role"] if state else ""] for state in map(_state, self.nodes)]

    def wait_until_ok(self) -> None:
        """Wait until every node that is up reports that all slots are served, and every replica is in sync.

        Raises:
            KVLabError: the cluster does not reach this state within a minute.
        """
        self._wait(lambda: all(map(_is_ok, self.nodes)))

    def __enter__(self) -> Self:
        with self._stack as stack:  # stops the started nodes if a later node does not start
            for _ in range(self._count):
                self.nodes.append(stack.enter_context(RedisServer(*self._options, bus=True)))
            self._form()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _form(self) -> None:
        """Join the running nodes: the masters share the slots evenly, and the replicas follow the masters in turn."""
        first, *others = self.nodes
        for node in others:
            _client(node).execute_command("CLUSTER", "MEET", HOST, first.port, first.bus_port)
        self._wait(lambda: all(_knows(node) == len(self.nodes) for node in self.nodes))
        masters, replicas = self.nodes[: self._masters], self.nodes[self._masters :]
        for i, node in enumerate(masters):
            start, stop = (SLOTS * edge // self._masters for edge in (i, i + 1))
            _client(node).execute_command("CLUSTER", "ADDSLOTSRANGE", start, stop - 1)
        for i, node in enumerate(replicas):
            name = _client(masters[i % self._masters]).execute_command("CLUSTER", "MYID")
            _client(node).execute_command("CLUSTER", "REPLICATE", name)
        self.wait_until_ok()

    def _slots(self) -> Any:
        """The unparsed reply of the first node that is up to CLUSTER SLOTS."""
        for node in self.nodes:
            with contextlib.suppress(*DOWN):
                client = _client(node)
                client.response_callbacks.clear()
                return client.execute_command("CLUSTER", "SLOTS")
        raise KVLabError(f"none of the nodes {', '.join(self.addresses)} is up")

    def _wait(self, ready: Callable[[], bool]) -> None:
        give_up = time.monotonic() + READY_S
        while not ready():
            if time.monotonic() > give_up:
                states = [_state(node) for node in self.nodes]
                raise KVLabError(f"the cluster is not ready after {READY_S:.0f} s: {states}")
            time.sleep(POLL_S)


def _client(node: RedisServer) -> Any:
    """A client with a short timeout and without retries."""
    return node.client(socket_timeout=1, retry=None, protocol=2)


def _knows(node: RedisServer) -> int:
    """How many nodes a node knows, including itself. Nodes in a handshake do not count."""
    known = _client(node).execute_command("CLUSTER NODES").values()
    return sum("handshake" not in other["flags"] for other in known)


def _state(node: RedisServer) -> dict[str, Any] | None:
    """A node's cluster and replication state; None if the node is down."""
    try:
        return {**_client(node).execute_command("CLUSTER INFO"), **_client(node).info("replication")}
    except DOWN:
        return None


def _is_ok(node: RedisServer) -> bool:
    state = _state(node)
    if state is None:
        return True
    served = state["cluster_state"] == "ok" and int(state["cluster_slots_ok"]) == SLOTS
    return served and bool(state.get("master_link_status", "up") == "up")
