"""Clusters and sentinels that a test may harm: who is who, what they say, how they get well again."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import redis
from redis.crc import key_slot

from kvlab.stores import RedisStore
from kvlab.stores.redis.node import Node
from kvlab.testbed.cluster import RedisCluster
from kvlab.testbed.sentinel import NAME
from kvlab.testbed.server import RedisServer
from tests.faults.calls import PATIENT_S, ask, calls_of, fill
from tests.faults.calls import value_of as uncached_value_of
from tests.faults.kit import wait_for

D = 0.5  # deadline of the calls under load: two busy cores must not make a healthy server look hung
RECOVERS_S = 30.0
SIZE = 2000
KEYS = [b"key %d" % i for i in range(300)]
value_of = functools.cache(lambda key: uncached_value_of(key, SIZE))


def heal(cluster: RedisCluster) -> None:
    """Every node runs, has the settings that it was started with, and follows or is followed."""
    awake(cluster.nodes)
    for node in cluster.nodes:
        client = client_at(node.port)
        client.config_set("maxmemory", 0)
        client.config_set("masteruser", "")
        client.config_set("masterauth", "")
        client.config_set("cluster-require-full-coverage", "no")
        client.config_set("cluster-replica-no-failover", "no")
        client.config_set("cluster-allow-reads-when-down", "no")
        client.execute_command("ACL", "DELUSER", "kvlab")
    wait_for(lambda: one_mind(cluster), 60)
    cluster.wait_until_ok()


def awake(nodes: Iterable[RedisServer]) -> None:
    for node in nodes:
        node.cont()
        if not node.running:
            node.start()


def one_mind(cluster: RedisCluster) -> bool:
    """Every node names the same masters."""
    return len({tuple(line[:3] for line in slots_seen_by(node.port)) for node in cluster.nodes}) == 1


def agree(cluster: RedisCluster) -> bool:
    """Every node has the same map, in which each of three masters has a replica."""
    maps = [slots_seen_by(node.port) for node in cluster.nodes]
    return all(m == maps[0] for m in maps) and {len(m) for m in servers_of(maps[0]).values()} == {1}


def slots_seen_by(port: int) -> list[tuple[int, ...]]:
    """First and last slot, port of the master, ports of its replicas."""
    told = client_at(port).execute_command("CLUSTER", "SLOTS")
    return sorted((first, last, master[1], *sorted(r[1] for r in rest)) for first, last, master, *rest in told)


def servers_of(slots: Sequence[tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    """The replicas of each master."""
    return {line[2]: tuple(line[3:]) for line in slots}


def masters(cluster: RedisCluster) -> dict[int, tuple[int, ...]]:
    """The replicas of each master, by ports, as the first node says that answers."""
    for node in cluster.nodes:
        with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
            return servers_of(slots_seen_by(node.port))
    raise AssertionError("no node answers")


def client_at(port: int) -> Any:
    """A plain client; answers are as they come from the wire."""
    client = redis.Redis(host="127.0.0.1", port=port, protocol=2, socket_timeout=2, retry=None)
    for name in ("CLUSTER SLOTS", "CLUSTER", "SENTINEL"):
        client.response_callbacks.pop(name, None)
    return client


def node_at(nodes: Iterable[RedisServer], port: int) -> RedisServer:
    return next(node for node in nodes if node.port == port)


def name_of(key: bytes) -> bytes:
    """A key as servers know it."""
    return b"kv:" + key


def owners(cluster: RedisCluster, keys: Iterable[bytes]) -> dict[bytes, int]:
    """The port of each key's master."""
    slots = slots_seen_by(next(iter(masters(cluster))))
    at = {key: key_slot(name_of(key)) for key in keys}
    return {key: next(line[2] for line in slots if line[0] <= slot <= line[1]) for key, slot in at.items()}


def replicated(ports: Iterable[int]) -> None:
    """Wait until replicas have what these masters have now."""
    for port in ports:
        client = client_at(port)
        offset = client.info("replication")["master_repl_offset"]

        def followed(client: Any = client, offset: int = offset) -> bool:
            facts = client.info("replication")
            lines = [facts[f"slave{i}"] for i in range(facts["connected_slaves"])]
            return bool(lines) and all(line["offset"] >= offset for line in lines)

        wait_for(followed)


def prepared(cluster: RedisCluster, store: RedisStore, keys: Sequence[bytes] = KEYS) -> dict[bytes, int]:
    """Store every key, on replicas too; the port of each key's master."""
    put_all(store, keys)
    replicated(masters(cluster))
    return owners(cluster, keys)


def put_all(store: RedisStore, keys: Sequence[bytes]) -> None:
    with patient(store):
        fill(store, list(keys), SIZE)


@contextlib.contextmanager
def patient(store: RedisStore) -> Iterator[None]:
    """Calls that a busy machine must not turn into timeouts."""
    deadline_s = store.deadline_s
    store.deadline_s = PATIENT_S
    try:
        yield
    finally:
        store.deadline_s = deadline_s


def check_all_there(store: RedisStore, keys: Sequence[bytes] = KEYS) -> None:
    """Soon every key is read and written again, and stays so."""
    with patient(store):
        wait_for(lambda: all(ask(store, list(keys), SIZE)), RECOVERS_S)
        wait_for(lambda: store.put_many(keys, [value_of(key) for key in keys]) == len(keys), RECOVERS_S)
        for _ in range(3):
            assert all(ask(store, list(keys), SIZE))
            fill(store, list(keys), SIZE)
        assert store.probe(keys) == len(keys) and all(store.touch_many(keys))
        assert store.health().ok, store.health()
    store.stats().check()


def port_of(node: Node) -> int:
    return int(node.name.rpartition(":")[2])


def nodes_by_port(store: RedisStore) -> dict[int, Node]:
    return {port_of(node): node for node in store.nodes}


def server_of(store: RedisStore, key: bytes) -> int:
    """Where the store would write a key."""
    from kvlab.stores.redis.connection import Deadline

    parts, why = store._topology.split([name_of(key)], Deadline(PATIENT_S))
    assert not why
    return port_of(parts[0].node)


def ask_sentinel(sentinel: RedisServer, question: str) -> Any:
    return client_at(sentinel.port).execute_command("SENTINEL " + question, NAME)


def state_of(port: int) -> str:
    return str(client_at(port).execute_command("CLUSTER INFO")["cluster_state"])


def is_failed(port: int, other: int) -> bool:
    """Whether a node has been told that another has failed."""
    nodes = client_at(port).execute_command("CLUSTER NODES")
    return any("fail" in facts["flags"].split(",") for at, facts in nodes.items() if at.endswith(f":{other}"))


def set_slot(slot: int, ports: Iterable[int], *what: str) -> None:
    for port in ports:
        client_at(port).execute_command("CLUSTER SETSLOT", slot, *what)


def id_of(port: int) -> str:
    return str(client_at(port).execute_command("CLUSTER MYID").decode())


TAGS = [b"{slot %d}" % i for i in range(200)]


def begin_to_move(slot: int, source: int, target: int) -> None:
    set_slot(slot, [target], "IMPORTING", id_of(source))
    set_slot(slot, [source], "MIGRATING", id_of(target))


def move_keys(slot: int, source: int, target: int, count: int, pause_s: float = 0.02) -> int:
    """Move so many keys, one after the other; how many there were."""
    client, moved = client_at(source), 0
    while moved < count and (names := client.execute_command("CLUSTER GETKEYSINSLOT", slot, 1)):
        client.execute_command("MIGRATE", "127.0.0.1", target, "", 0, 5000, "KEYS", names[0])
        moved += 1
        time.sleep(pause_s)
    return moved


def end_to_move(slot: int, source: int, target: int, others: Iterable[int]) -> None:
    """The new owner must be the first to know."""
    set_slot(slot, [target, source, *others], "NODE", id_of(target))


def gets_of(port: int) -> int:
    return calls_of(client_at(port), "get")["calls"]
