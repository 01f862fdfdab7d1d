"""The cluster of the tests is real: slots are shared, replicas follow, one takes over from a master that died."""

from __future__ import annotations

import time

import pytest
import redis

from tests.cluster import READY_S, RedisCluster


@pytest.mark.cluster
@pytest.mark.slow
def test_a_replica_takes_over_from_a_master_that_was_killed() -> None:
    with RedisCluster() as cluster:
        client = redis.RedisCluster(host="127.0.0.1", port=cluster.nodes[0].port, protocol=2)
        keys = [f"kv:{i}".encode() for i in range(60)]
        for key in keys:
            client.set(key, b"value of " + key)
        served = {cluster.master_of(key).port for key in keys}
        assert served == {node.port for node in cluster.nodes[:3]}
        client.wait(1, 5000, target_nodes=redis.RedisCluster.PRIMARIES)
        victim = cluster.master_of(keys[0])
        victim.kill()
        give_up = time.monotonic() + READY_S
        while cluster.master_of(keys[0]) is victim:
            assert time.monotonic() < give_up, "nobody took over"
            time.sleep(0.05)
        cluster.wait_until_ok()
        again = redis.RedisCluster(host="127.0.0.1", port=cluster.master_of(keys[0]).port, protocol=2)
        assert [again.get(key) for key in keys] == [b"value of " + key for key in keys]
