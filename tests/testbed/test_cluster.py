"""The cluster is real: slots are shared, replicas follow, one takes over from a master that died, all end together."""

from __future__ import annotations

import pytest
import redis

from kvlab.errors import KVLabError
from kvlab.testbed.cluster import RedisCluster


@pytest.mark.cluster
@pytest.mark.slow
def test_a_replica_takes_over_and_all_nodes_end_with_the_block() -> None:
    with RedisCluster(node_timeout_ms=1000) as cluster:
        assert cluster.url == "redis-cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in cluster.nodes)
        assert cluster.roles() == ["master"] * 3 + ["replica"] * 3
        client = redis.RedisCluster(host="127.0.0.1", port=cluster.nodes[0].port, protocol=2)
        keys = [f"kv:{i}".encode() for i in range(60)]
        for key in keys:
            client.set(key, b"value of " + key)
        assert {cluster.master_of(key).port for key in keys} == {node.port for node in cluster.nodes[:3]}
        client.wait(1, 5000, target_nodes=redis.RedisCluster.PRIMARIES)
        victim = cluster.master_of(keys[0])
        with victim.paused():
            assert cluster.roles()[cluster.nodes.index(victim)] == "down"
        cluster.wait_until_ok()
        cluster.master_of(keys[0]).kill()
        cluster.wait_until_ok()
        assert sorted(cluster.roles()) == ["down", "master", "master", "master", "replica", "replica"]
        again = redis.RedisCluster(host="127.0.0.1", port=cluster.master_of(keys[0]).port, protocol=2)
        assert [again.get(key) for key in keys] == [b"value of " + key for key in keys]
    for node in cluster.nodes:
        with pytest.raises(redis.ConnectionError):
            node.client(retry=None).ping()


@pytest.mark.cluster
def test_a_cluster_of_which_nobody_is_up_says_so(redis_cluster: RedisCluster) -> None:
    assert redis_cluster.master_of(b"kv:a") in redis_cluster.nodes[:3]
    with pytest.raises(KVLabError, match="none of the nodes"):
        RedisCluster().master_of(b"kv:a")


def test_it_says_how_to_install_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(KVLabError, match="apt-get install redis-server"), RedisCluster():
        pass
