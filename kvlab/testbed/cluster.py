"""A Redis Cluster of our own for as long as something is measured: real nodes on loopback, replicas in sync.

with with_cluster() as cluster:
    store = RedisStore(cluster.url)
    cluster.kill(cluster.master_of(b"kv:some key"))
    cluster.wait_until_ok()  # its replica has taken over

The functions on ports below make a cluster of any nodes that run; the tests form theirs with them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import redis
from redis.crc import key_slot

from kvlab.errors import KVLabError
from kvlab.stores.redis.topology import SLOTS
from kvlab.testbed.server import LocalRedis, free_port, with_redis

HOST = "127.0.0.1"
READY_S = 60.0
POLL_S = 0.05


class LocalCluster:
    """A running cluster. Nodes are named by their ports.

    Attributes:
        ports: of all nodes, those that were killed included.
        url: the address of the whole cluster, with every node as a place to begin.
    """

    def __init__(self, nodes: Sequence[LocalRedis]) -> None:
        self._nodes = {node.port: node for node in nodes}
        self.ports = list(self._nodes)
        self.url = cluster_url(self.ports)

    def master_of(self, key: bytes) -> int:
        """The node that serves a key now, as the first node that is up says. See `master_port`."""
        return master_port(self.ports, key)

    def roles(self) -> dict[int, str]:
        """What each node is now: "master", "replica" or "down" (it does not answer)."""
        states = {port: _state(port) for port in self.ports}
        words = {"master": "master", "slave": "replica", "": "down"}
        return {port: words[state["role"] if state else ""] for port, state in states.items()}

    def kill(self, port: int) -> None:
        """End a node at once, as a crash would (kill -9)."""
        self._nodes[port].kill()

    def paused(self, port: int) -> contextlib.AbstractContextManager[None]:
        """A node hangs: its port still accepts, and nothing comes back. It goes on afterwards."""
        return self._nodes[port].paused()

    def wait_until_ok(self) -> None:
        """See the function `wait_until_ok`."""
        wait_until_ok(self.ports)


@contextlib.contextmanager
def with_cluster(masters: int = 3, replicas: int = 1, node_timeout_ms: int = 2000) -> Iterator[LocalCluster]:
    """Start a Redis Cluster on free loopback ports; yield it when every replica is in sync; end it afterwards.

    Slots whose master is gone do not stop the others (cluster-require-full-coverage no).

    Args:
        replicas: of each master.
        node_timeout_ms: after so long without an answer a node counts as failing.

    Raises:
        KVLabError: redis-server is not installed, or the nodes do not come up and agree within a minute.
    """
    with contextlib.ExitStack() as stack:
        options = *node_options(node_timeout_ms), "--cluster-require-full-coverage", "no"
        count = masters * (1 + replicas)
        nodes = [stack.enter_context(with_redis(*options, *bus_option())) for _ in range(count)]
        cluster = LocalCluster(nodes)
        form_cluster(cluster.ports, masters)
        yield cluster


def node_options(node_timeout_ms: int) -> tuple[str, ...]:
    """The options of every node. A replica begins to copy at once, not after Redis' usual five seconds."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(node_timeout_ms))
    return *options, "--repl-diskless-sync-delay", "0"


def bus_option() -> tuple[str, str]:
    """A port of its own for what one node says to the others."""
    return "--cluster-port", str(free_port())


def cluster_url(ports: Sequence[int]) -> str:
    """The address of a cluster, all its nodes in it."""
    return "redis-cluster://" + ",".join(f"{HOST}:{port}" for port in ports)


def form_cluster(ports: Sequence[int], masters: int) -> None:
    """Join running nodes: the first `masters` share the slots evenly, the others follow them in turn. Waits for it.

    Raises:
        KVLabError: they do not agree within a minute.
    """
    bus = int(_client(ports[0]).config_get("cluster-port")["cluster-port"])
    for port in ports[1:]:
        _client(port).execute_command("CLUSTER", "MEET", HOST, ports[0], bus)
    _wait(lambda: all(_knows(port) == len(ports) for port in ports), ports)
    edges = [SLOTS * i // masters for i in range(masters + 1)]
    for port, start, stop in zip(ports, edges, edges[1:], strict=False):
        _client(port).execute_command("CLUSTER", "ADDSLOTSRANGE", start, stop - 1)
    for i, port in enumerate(ports[masters:]):
        name = _client(ports[i % masters]).execute_command("CLUSTER", "MYID")
        _client(port).execute_command("CLUSTER", "REPLICATE", name)
    wait_until_ok(ports)


def wait_until_ok(ports: Sequence[int]) -> None:
    """Wait until every node that is up says that all slots are served, and every replica is in sync.

    Raises:
        KVLabError: it is not so within a minute.
    """
    _wait(lambda: all(map(_is_ok, ports)), ports)


def master_port(ports: Sequence[int], key: bytes) -> int:
    """The port that serves a key, as the first of these nodes says that is up.

    Raises:
        KVLabError: no node is up, or nobody serves the key's slot.
    """
    slot = key_slot(key)
    for first, last, (_, port, *_), *_ in _first_answer(ports, "CLUSTER", "SLOTS"):
        if first <= slot <= last:
            return int(port)
    raise KVLabError(f"nobody serves slot {slot}")


def _client(port: int) -> Any:
    """A client that waits briefly, never retries, and gives answers as they come from the wire."""
    return redis.Redis.from_url(f"redis://{HOST}:{port}", socket_timeout=1, retry=None, protocol=2)


def _knows(port: int) -> int:
    """How many nodes a node knows, itself included; a handshake is not yet an acquaintance."""
    return sum("handshake" not in node["flags"] for node in _client(port).execute_command("CLUSTER NODES").values())


def _state(port: int) -> dict[str, Any] | None:
    """What a node says of itself; None if it is down."""
    try:
        return {**_client(port).execute_command("CLUSTER INFO"), **_client(port).info("replication")}
    except (redis.ConnectionError, redis.TimeoutError):
        return None


def _is_ok(port: int) -> bool:
    state = _state(port)
    if state is None:
        return True
    served = state["cluster_state"] == "ok" and int(state["cluster_slots_ok"]) == SLOTS
    return served and state.get("master_link_status", "up") == "up"


def _first_answer(ports: Sequence[int], *command: str) -> Any:
    for port in ports:
        with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
            client = _client(port)
            client.response_callbacks.clear()
            return client.execute_command(*command)
    raise KVLabError(f"none of the nodes at {', '.join(map(str, ports))} is up")


def _wait(ready: Callable[[], bool], ports: Sequence[int]) -> None:
    give_up = time.monotonic() + READY_S
    while not ready():
        if time.monotonic() > give_up:
            raise KVLabError(f"the cluster does not come up within {READY_S:.0f} s: {[_state(port) for port in ports]}")
        time.sleep(POLL_S)
