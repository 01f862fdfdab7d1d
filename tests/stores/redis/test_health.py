"""What health says of one server and of many, and that it tells what writes and reads would meet."""

from __future__ import annotations

from collections import Counter

import pytest

from kvlab.stores import RedisStore
from kvlab.stores.redis.discovery import SLOTS
from kvlab.testbed.cluster import RedisCluster
from tests.stores.redis.scripted import CLOSED, LONG_S, A, SlotMap, Watched, opened, values

# --- several servers ----------------------------------------------------------------------------


def test_health_tries_every_master_and_says_which_is_sick(cluster: SlotMap) -> None:
    with opened(cluster.url, deadline_s=4) as store:
        assert store.health().ok and store.health().detail.endswith("3 masters answer")
        for at in range(3):
            cluster.twist = lambda server, c, at=at: b"-LOADING no\r\n" if server == at and c[0] == b"GET" else ...
            health = store.health()
            assert not health.ok and cluster.address(at) in health.detail and "loading: " in health.detail
        cluster.twist = lambda at, c: b"-READONLY no\r\n" if at == 1 and c[0] in (b"SET", b"DEL", b"PEXPIRE") else ...
        assert f"{cluster.address(1)}: reads work, but readonly: " in store.health().detail
        assert store.get_many([A]) == values(A)


def test_health_sees_a_sick_master_however_few_its_slots() -> None:
    with SlotMap(2, [(0, SLOTS - 2, 0), (SLOTS - 1, SLOTS - 1, 1)]) as cluster, opened(cluster.url_of(0)) as store:
        cluster.twist = lambda at, command: CLOSED if at == 1 else ...
        assert not store.health().ok


def test_health_names_every_sick_master_up_to_three() -> None:
    lines = [(at * SLOTS // 4, (at + 1) * SLOTS // 4 - 1, at) for at in range(4)]
    with SlotMap(4, lines) as cluster, opened(cluster.url) as store:
        for sick in ({1}, {0, 2}, {0, 1, 2, 3}):
            cluster.twist = lambda at, c, sick=sick: b"-LOADING no\r\n" if at in sick and c[0] == b"GET" else ...
            detail = store.health().detail
            assert f"{len(sick)} of 4 masters fail: " in detail and detail.endswith("…") == (len(sick) > 3)
            assert sum(f"{cluster.address(at)}: loading" in detail for at in sick) == min(3, len(sick))


def test_health_tells_sick_sentinels_from_a_sick_master(watched: Watched) -> None:
    with opened(watched.url) as store:
        watched.twist = lambda at, command: CLOSED if at >= 3 else ...
        assert "known from before" not in store.health().detail
        watched.twist = lambda at, command: ...
        assert store.health().ok
        watched.twist = lambda at, command: CLOSED if at >= 3 else ...
        health = store.health()
        assert not health.ok and "from the sentinel at 127.0.0.1:" in health.detail
        assert health.detail.endswith(f"; known from before and well: {watched.address(0)}")
        watched.twist = lambda at, command: CLOSED
        assert store.health().detail.endswith(f"; known from before, 1 of them sick: {watched.address(0)}")


# --- servers of another kind than the URL says --------------------------------------------------


def test_a_sentinel_taken_for_a_redis_is_called_one(watched: Watched) -> None:
    with opened(f"redis://{watched.address(3)}") as store:
        assert store.get_many([A]) == [None]
        assert not store.health().ok and "redis-sentinel://" in store.health().detail


@pytest.mark.cluster
def test_one_node_of_a_cluster_taken_for_a_server_alone_is_said(redis_cluster: RedisCluster) -> None:
    keys = [b"%d" % i for i in range(60)]
    for node in redis_cluster.nodes[:3]:
        with RedisStore(node.url, deadline_s=LONG_S) as store:
            assert not any(store.health().ok for _ in range(3))
            assert "moved: this is a node of a Redis Cluster" in store.health().detail
            stored = store.put_many(keys, keys)
            assert 0 < stored < 60 and store.stats().drops == Counter(moved=60 - stored)
            assert store.stats().faults["moved"] == 1
