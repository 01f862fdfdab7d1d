"""Cost and gain of dividing a batch among the nodes of a Redis Cluster, and the cost of one hung node.

python -m kvlab bench shards --json

The three nodes and the client share the cores of this machine. The benchmark therefore shows the
effect of the client's work, not the speed of three machines with three networks.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis

from kvlab.errors import KVLabError
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.timing import Timings, time_rounds
from kvlab.stores import RedisStore
from kvlab.stores.redis.node import Node
from kvlab.stores.redis.store import KEY_PREFIX
from kvlab.testbed.cluster import RedisCluster
from kvlab.testbed.server import HOST, RedisServer

SIZES = (16 << 10, 64 << 10, 192 << 10, 1 << 20)
RECORDS = 256
LOOKUP_KEYS = 1024
MASTERS = 3
DEADLINE_S = 10.0  # long enough for every value, also on a busy machine
HUNG_DEADLINE_S = 0.25
HUNG_CALLS = 8
NODE_TIMEOUT_MS = 15_000  # longer than the hang, so that the cluster does not mark the node as failed
ABOUT = (
    f"get_vs_one, put_vs_one: {RECORDS} records over {MASTERS} nodes, compared with one server (above 1 is faster); "
    "get_vs_in_turn: all nodes at once, compared with one node after another; get_vs_redis_py: compared with "
    "RedisCluster.mget_nonatomic; many_*_ms, one_*_ms: all records over the nodes and over one server; lookup: a "
    f"probe of {LOOKUP_KEYS:,} keys, ratio as above; round_trips: keys of each node, and exchanges with each node per "
    f"call; hung: {HUNG_CALLS} loads of all records while one node is stopped, with the misses of all loads; aa_ratio: "
    "the same work compared with itself, at the top level the median of all measurements; noisy: one aa_ratio is off "
    "by more than 10 %; versions: of Python packages"
)


def run(scale: float = 1.0) -> dict[str, Any]:
    """Start a cluster of three masters and one server, and compare them.

    Args:
        scale: factor for the number of rounds.

    Returns:
        `rows`: by value size, milliseconds of a load and a save of 256 records, and ratios,
        computed per round. `lookup`: a probe of 1,024 keys. `round_trips`: by node. `hung`:
        consecutive calls while one node is stopped.

    Raises:
        KVLabError: redis-server is not installed, or a store did not accept or return a value.
    """
    timings: list[Timings] = []
    with RedisServer() as alone, RedisCluster(masters=MASTERS, replicas=0, node_timeout_ms=NODE_TIMEOUT_MS) as cluster:
        rows = [_row(alone.url, cluster, size, scale, timings) for size in SIZES]
        lookup = _lookup(alone.url, cluster, scale, timings)
        trips = _round_trips(cluster)
        hung = _hung(cluster)
    return {
        "rows": rows,
        "about": ABOUT,
        "lookup": lookup,
        "round_trips": trips,
        "hung": hung,
        "aa_ratio": statistics.median(t.aa_ratio for t in timings),
        "noisy": any(t.noisy for t in timings),
        "machine": describe_machine(),
        "versions": versions(),
    }


def _row(alone: str, cluster: RedisCluster, size: int, scale: float, timings: list[Timings]) -> dict[str, Any]:
    keys, out = _keys(RECORDS), _buffers(size)
    values = [memoryview(os.urandom(size))] * RECORDS
    with _stored(cluster.url, keys, values) as many, _stored(alone, keys, values) as one:
        parts = _by_node(cluster, keys)
        names = [KEY_PREFIX + key for key in keys]
        client = redis.RedisCluster.from_url(cluster.nodes[0].url)

        def in_turn() -> None:
            for part in parts:
                _load(many, [keys[i] for i in part], [out[i] for i in part])

        times = time_rounds(
            {
                "many_get": lambda: _load(many, keys, out),
                "one_get": lambda: _load(one, keys, out),
                "in_turn_get": in_turn,
                "redis_py_get": lambda: client.mget_nonatomic(names),
                "many_put": lambda: _save(many, keys, values),
                "one_put": lambda: _save(one, keys, values),
            },
            max(5, int(scale * min(40, (1 << 30) // (size * RECORDS)))),
        )
        if any(view != values[0] for view in out):
            raise KVLabError("the store returned a changed value")
        client.close()
    timings.append(times)
    return {
        "value_kib": size >> 10,
        **{f"{name}_ms": times.median_ms(name) for name in ("many_get", "one_get", "many_put", "one_put")},
        "get_vs_one": times.ratio("one_get", "many_get"),
        "put_vs_one": times.ratio("one_put", "many_put"),
        "get_vs_in_turn": times.ratio("in_turn_get", "many_get"),
        "get_vs_redis_py": times.ratio("redis_py_get", "many_get"),
        "aa_ratio": times.aa_ratio,
    }


def _lookup(alone: str, cluster: RedisCluster, scale: float, timings: list[Timings]) -> dict[str, Any]:
    keys = _keys(LOOKUP_KEYS)
    values = [memoryview(b"small")] * LOOKUP_KEYS
    with _stored(cluster.url, keys, values) as many, _stored(alone, keys, values) as one:

        def probe(store: RedisStore) -> None:
            if store.probe(keys) != LOOKUP_KEYS:
                raise KVLabError("the store does not find the stored keys")

        times = time_rounds({"many": lambda: probe(many), "one": lambda: probe(one)}, max(5, int(scale * 40)))
    timings.append(times)
    both = {f"{name}_ms": times.median_ms(name) for name in ("many", "one")}
    return {"keys": LOOKUP_KEYS, **both, "probe_vs_one": times.ratio("one", "many"), "aa_ratio": times.aa_ratio}


def _round_trips(cluster: RedisCluster) -> dict[str, list[int]]:
    """Number of exchanges with each node per call, and number of its keys."""
    keys, values = _keys(RECORDS), [memoryview(bytes(1 << 10))] * RECORDS
    with _stored(cluster.url, keys, values) as store:
        counts: Counter[str] = Counter()
        for node in store.nodes:
            node.round_trip = _counting(node, counts)  # type: ignore[method-assign]
        trips = {"keys": [len(part) for part in _by_node(cluster, keys)]}
        out = _buffers(1 << 10)
        calls: dict[str, Callable[[], object]] = {
            "load": lambda: store.get_many(keys, out),
            "save": lambda: store.put_many(keys, values),
            "probe": lambda: store.probe(keys),
        }
        for name, call in calls.items():
            counts.clear()
            call()
            trips[name] = [counts[address] for address in cluster.addresses]
    return trips


def _counting(node: Node, counts: Counter[str]) -> Callable[..., Any]:
    real = node.round_trip

    def round_trip(*args: Any, **settings: Any) -> Any:
        counts[node.name] += 1
        return real(*args, **settings)

    return round_trip


def _hung(cluster: RedisCluster) -> dict[str, Any]:
    """Load all records repeatedly while one node is stopped."""
    keys, values = _keys(RECORDS), [memoryview(bytes(16 << 10))] * RECORDS
    with _stored(cluster.url, keys, values, HUNG_DEADLINE_S) as store:
        victim = cluster.master_of(KEY_PREFIX + keys[0])
        lost = max(len(part) for part in _by_node(cluster, keys) if 0 in part)
        calls, hits, before = [], [], store.stats().misses
        with victim.paused():
            for _ in range(HUNG_CALLS):
                begin = time.perf_counter()
                hits.append(sum(value is not None for value in store.get_many(keys)))
                calls.append(1000 * (time.perf_counter() - begin))
            opened = [node.name for node in store.nodes if node.breaker.state != "closed"]
        return {
            "deadline_ms": 1000 * HUNG_DEADLINE_S,
            "keys_of_the_hung_node": lost,
            "call_ms": [round(ms, 1) for ms in calls],
            "hits": hits,
            "misses": dict(store.stats().misses - before),
            "open_breakers": ["hung" if name == f"{HOST}:{victim.port}" else "other" for name in opened],
        }


@contextmanager
def _stored(
    url: str, keys: Sequence[bytes], values: Sequence[memoryview], deadline_s: float = DEADLINE_S
) -> Iterator[RedisStore]:
    """A store with these values. The values are deleted afterwards."""
    with RedisStore(url, deadline_s=deadline_s) as store:
        _save(store, keys, values)
        yield store
        store.delete_many(keys)


def _by_node(cluster: RedisCluster, keys: Sequence[bytes]) -> list[list[int]]:
    """Indices of the keys of each master, in the order of the cluster's nodes."""
    owners = [cluster.master_of(KEY_PREFIX + key) for key in keys]
    return [[i for i, owner in enumerate(owners) if owner is node] for node in cluster.nodes]


def _load(store: RedisStore, keys: Sequence[bytes], out: Sequence[memoryview]) -> None:
    if None in store.get_many(keys, out):
        raise KVLabError(f"the store did not return a value: {dict(store.stats().misses)}")


def _save(store: RedisStore, keys: Sequence[bytes], values: Sequence[memoryview]) -> None:
    if store.put_many(keys, values) != len(keys):
        raise KVLabError(f"the store did not accept a value: {dict(store.stats().drops)}")


def _keys(count: int) -> list[bytes]:
    """Random keys with the length of block keys, 32 bytes."""
    return [os.urandom(32) for _ in range(count)]


def _buffers(size: int) -> list[memoryview]:
    whole = memoryview(bytearray(RECORDS * size))
    return [whole[i * size : (i + 1) * size] for i in range(RECORDS)]
