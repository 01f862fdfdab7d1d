"""The cluster that a notebook cell starts: it serves, survives the death of a master, and ends with its block."""

from __future__ import annotations

import pytest
import redis

from kvlab.errors import KVLabError
from kvlab.testbed.cluster import with_cluster


@pytest.mark.cluster
@pytest.mark.slow
def test_a_replica_takes_over_and_all_nodes_end_with_the_block() -> None:
    with with_cluster(node_timeout_ms=1000) as cluster:
        assert cluster.url == "redis-cluster://" + ",".join(f"127.0.0.1:{port}" for port in cluster.ports)
        assert sorted(cluster.roles().values()) == ["master"] * 3 + ["replica"] * 3
        victim = cluster.master_of(b"kv:a")
        redis.Redis(port=victim).set("kv:a", "value")
        assert redis.Redis(port=victim).wait(1, 5000) == 1
        with cluster.paused(victim):
            assert cluster.roles()[victim] == "down"
        cluster.wait_until_ok()
        cluster.kill(cluster.master_of(b"kv:a"))
        cluster.wait_until_ok()
        assert sorted(cluster.roles().values()) == ["down", "master", "master", "master", "replica", "replica"]
        assert redis.Redis(port=cluster.master_of(b"kv:a")).get("kv:a") == b"value"
    for port in cluster.ports:
        with pytest.raises(redis.ConnectionError):
            redis.Redis(port=port, retry=None).ping()


def test_it_says_how_to_install_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(KVLabError, match="apt-get install redis-server"), with_cluster():
        pass
