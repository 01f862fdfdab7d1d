"""A Redis Cluster of real processes on loopback: three masters with a replica each, in sync before a test begins.

with RedisCluster() as cluster:
    victim = cluster.master_of(b"kv:some key")
    victim.kill()
    cluster.wait_until_ok()  # its replica has taken over
"""

from __future__ import annotations

import contextlib
import time
from types import TracebackType
from typing import Any, Self

import redis
from redis.crc import key_slot

from tests.servers import RedisServer, free_port

SLOTS = 16384
READY_S = 60.0


class RedisCluster:
    """`masters` nodes that share the slots evenly, each with `replicas` replicas.

    Args:
        node_timeout_ms: after so long a node counts as failing (cluster-node-timeout).
        arguments: further options of every node.
    """

    def __init__(self, masters: int = 3, replicas: int = 1, node_timeout_ms: int = 2000, *arguments: str) -> None:
        self._masters, self._replicas = masters, replicas
        self._options = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(node_timeout_ms), *arguments)
        self._stack = contextlib.ExitStack()
        self.nodes: list[RedisServer] = []

    @property
    def addresses(self) -> list[str]:
        """host:port of every node."""
        return [f"127.0.0.1:{node.port}" for node in self.nodes]

    def master_of(self, key: bytes) -> RedisServer:
        """The node that serves a key now."""
        slot = key_slot(key)
        for first, last, (_, port, *_), *_ in self._asked("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == port)
        raise AssertionError(f"nobody serves slot {slot}")

    def wait_until_ok(self) -> None:
        """Wait until every node that is up says that all slots are served and every replica is in sync."""
        give_up = time.monotonic() + READY_S
        while not all(map(self._is_ok, self.nodes)):
            assert time.monotonic() < give_up, [self._state(node) for node in self.nodes]
            time.sleep(0.05)

    def __enter__(self) -> Self:
        for _ in range(self._masters * (1 + self._replicas)):
            bus = ("--cluster-port", str(free_port()))
            self.nodes.append(self._stack.enter_context(RedisServer(*self._options, *bus)))
        self._meet()
        self._share_slots()
        for i, node in enumerate(self.nodes[self._masters :]):
            self._follow(node, self.nodes[i % self._masters])
        self.wait_until_ok()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _meet(self) -> None:
        first = self.nodes[0]
        bus = int(first.client().config_get("cluster-port")["cluster-port"])
        for node in self.nodes[1:]:
            node.client().execute_command("CLUSTER", "MEET", "127.0.0.1", first.port, bus)
        give_up = time.monotonic() + READY_S
        while any(len(_known(node)) < len(self.nodes) for node in self.nodes):
            assert time.monotonic() < give_up, "the nodes do not find each other"
            time.sleep(0.05)

    def _share_slots(self) -> None:
        edges = [SLOTS * i // self._masters for i in range(self._masters + 1)]
        for node, start, stop in zip(self.nodes, edges, edges[1:], strict=False):
            node.client().execute_command("CLUSTER", "ADDSLOTSRANGE", start, stop - 1)

    def _follow(self, replica: RedisServer, master: RedisServer) -> None:
        name = master.client().execute_command("CLUSTER", "MYID")
        replica.client().execute_command("CLUSTER", "REPLICATE", name)

    def _is_ok(self, node: RedisServer) -> bool:
        state = self._state(node)
        return state is None or (state["cluster_state"] == "ok" and state.get("master_link_status", "up") == "up")

    def _state(self, node: RedisServer) -> dict[str, Any] | None:
        """What a node says of itself; None if it is down."""
        try:
            client = node.client(socket_timeout=1, retry=None)
            return {**client.execute_command("CLUSTER INFO"), **client.info("replication")}
        except (redis.ConnectionError, redis.TimeoutError):
            return None

    def _asked(self, *command: str) -> Any:
        """The answer of the first node that is up."""
        for node in self.nodes:
            with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                client = node.client(socket_timeout=1, retry=None)
                client.response_callbacks.clear()  # as it comes from the wire
                return client.execute_command(*command)
        raise AssertionError("no node is up")


def _known(node: RedisServer) -> list[Any]:
    client = node.client()
    client.response_callbacks.clear()
    return [line for line in client.execute_command("CLUSTER NODES").splitlines() if b"handshake" not in line]
