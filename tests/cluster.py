"""A Redis Cluster of real processes on loopback: three masters with a replica each, in sync before a test begins.

with RedisCluster() as cluster:
    victim = cluster.master_of(b"kv:some key")
    victim.kill()
    cluster.wait_until_ok()  # its replica has taken over
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Self

from kvlab.testbed import cluster
from kvlab.testbed.cluster import READY_S
from tests.servers import RedisServer

__all__ = ["READY_S", "RedisCluster"]


class RedisCluster:
    """`masters` nodes that share the slots evenly, each with `replicas` replicas.

    Args:
        node_timeout_ms: after so long a node counts as failing (cluster-node-timeout).
        arguments: further options of every node.
    """

    def __init__(self, masters: int = 3, replicas: int = 1, node_timeout_ms: int = 2000, *arguments: str) -> None:
        self._masters, self._count = masters, masters * (1 + replicas)
        self._options = (*cluster.node_options(node_timeout_ms), *arguments)
        self._stack = contextlib.ExitStack()
        self.nodes: list[RedisServer] = []

    @property
    def url(self) -> str:
        """Address of the whole cluster."""
        return cluster.cluster_url(self._ports)

    @property
    def addresses(self) -> list[str]:
        """host:port of every node."""
        return [f"127.0.0.1:{port}" for port in self._ports]

    def master_of(self, key: bytes) -> RedisServer:
        """The node that serves a key now."""
        port = cluster.master_port(self._ports, key)
        return next(node for node in self.nodes if node.port == port)

    def wait_until_ok(self) -> None:
        """Wait until every node that is up says that all slots are served and every replica is in sync."""
        cluster.wait_until_ok(self._ports)

    def __enter__(self) -> Self:
        with self._stack as stack:  # ends what was started if a later node does not come up
            for _ in range(self._count):
                self.nodes.append(stack.enter_context(RedisServer(*self._options, *cluster.bus_option())))
            cluster.form_cluster(self._ports, self._masters)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    @property
    def _ports(self) -> list[int]:
        return [node.port for node in self.nodes]
