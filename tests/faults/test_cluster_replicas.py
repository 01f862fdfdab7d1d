"""Fault 31: reads from the replicas of a cluster, when a node dies or a replica lags."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

import pytest

from kvlab.stores import RedisStore
from kvlab.testbed.cluster import RedisCluster
from tests.faults.book import Book
from tests.faults.calls import PATIENT_S, ask, fill
from tests.faults.clusters import (
    KEYS,
    SIZE,
    D,
    check_all_there,
    client_at,
    gets_of,
    heal,
    is_failed,
    masters,
    name_of,
    node_at,
    nodes_by_port,
    owners,
    prepared,
    replicated,
    state_of,
)
from tests.faults.kit import wait_for
from tests.faults.load import Load, recovery


@pytest.mark.fault(number=31)
@pytest.mark.cluster
def test_replicas_serve_reads_and_masters_renew(book: Book, cluster: RedisCluster) -> None:
    with (
        book(
            "read replicas: who serves",
            injected="read_replicas=True, all is well",
            expected="replicas serve all reads; masters renew the TTL",
        ) as row,
        RedisStore(cluster.url, ttl_s=100, deadline_s=PATIENT_S, read_replicas=True) as store,
    ):
        owner = prepared(cluster, store)
        shards = masters(cluster)
        before = {port: gets_of(port) for node in cluster.nodes for port in [node.port]}
        for key, port in owner.items():
            client_at(port).pexpire(name_of(key), 50_000)
        for _ in range(10):
            assert all(ask(store, KEYS, SIZE))
        assert store.probe(KEYS) == len(KEYS)
        by_masters = sum(gets_of(port) - before[port] for port in shards)
        by_replicas = sum(gets_of(port) - before[port] for port in before if port not in shards)
        assert (by_masters, by_replicas) == (0, 10 * len(KEYS))
        assert all(client_at(port).pttl(name_of(key)) > 90_000 for key, port in owner.items())
        assert not store.stats().faults and not store.stats().redirects
        row.seen = {"GETs of masters": by_masters, "GETs of replicas": by_replicas}
        check_all_there(store)


@pytest.mark.fault(number=31)
@pytest.mark.cluster
@pytest.mark.slow
def test_replicas_serve_reads_while_their_master_is_dead(book: Book, cluster: RedisCluster) -> None:
    settings = [("yes", "no"), ("yes", "yes"), ("no", "no"), ("no", "yes")]
    with (
        book(
            "read replicas: master killed",
            injected="kill -9 of a master, its replica kept from taking over; under load",
            expected="its keys go on hitting, unless all slots must be covered and reads are not allowed when down",
        ) as row,
        RedisStore(cluster.url, ttl_s=1000, deadline_s=D, read_replicas=True) as store,
    ):
        owner = prepared(cluster, store)
        assert all(ask(store, KEYS, SIZE))
        victim = cluster.master_of(name_of(KEYS[0]))
        (replica,) = masters(cluster)[victim.port]
        others = set(owner.values()) - {victim.port}
        client_at(replica).config_set("cluster-replica-no-failover", "yes")
        alive = [node.port for node in cluster.nodes if node is not victim]
        seen = {}
        for port in alive:
            client_at(port).config_set("cluster-require-full-coverage", "yes")
        with Load(store, owner) as load:
            at = time.monotonic()
            victim.kill()
            wait_for(lambda: load.bad("put", [victim.port], at))
            time.sleep(1.0)
            seen["first second, whatever is set"] = shares(load, victim.port, others, at, at + 1.0)
            for coverage, allow in settings:
                for port in alive:
                    client_at(port).config_set("cluster-require-full-coverage", coverage)
                    client_at(port).config_set("cluster-allow-reads-when-down", allow)
                expected = {"fail"} if coverage == "yes" else {"ok"}
                wait_for(lambda expected=expected: {state_of(port) for port in alive} == expected)
                time.sleep(0.5)
                begin = time.monotonic()
                time.sleep(1.0)
                name = f"full coverage {coverage}, reads when down {allow}"
                seen[name] = shares(load, victim.port, others, begin, time.monotonic())
            client_at(replica).config_set("cluster-replica-no-failover", "no")
            promoted = time.monotonic()
            recovered = recovery(load, victim.port, promoted)
        load.check()
        row.seen = {"share of hits, of its keys and of others": seen, **recovered}
        for name, (its, of_others) in seen.items():
            if "coverage yes, reads when down no" in name:
                assert its == 0.0 and of_others == 0.0
            else:
                assert its > 0.99 and of_others > 0.99, (name, load.bad("get", load.shards))
        heal(cluster)
        check_all_there(store)


def shares(load: Load, victim: int, others: Iterable[int], since: float, until: float) -> tuple[float, float]:
    """What part of the keys that were asked for was hit, the victim's and the others'."""

    def share(shards: Iterable[int]) -> float:
        good, bad = load.good("get", shards, since, until), load.bad("get", shards, since, until)
        return round(good / (good + sum(bad.values())), 4)

    return share([victim]), share(list(others))


@pytest.mark.fault(number=31)
@pytest.mark.cluster
@pytest.mark.slow
def test_masters_serve_reads_while_a_replica_is_dead(book: Book, cluster: RedisCluster) -> None:
    with (
        book(
            "read replicas: replica killed",
            injected="kill -9 of a replica under load",
            expected="a few misses until its breaker opens, then the master serves",
        ) as row,
        RedisStore(cluster.url, deadline_s=D, read_replicas=True) as store,
    ):
        owner = prepared(cluster, store)
        assert all(ask(store, KEYS, SIZE))
        (shard, (replica,)), *rest = masters(cluster).items()
        others = [port for port, _ in rest]
        with Load(store, owner) as load:
            at = time.monotonic()
            node_at(cluster.nodes, replica).kill()
            wait_for(lambda: load.first("get", shard, at) is not None)
            first = load.first("get", shard, at)
            wait_for(lambda: all(is_failed(port, replica) for port in (shard, *others)))
            wait_for(lambda: replica not in nodes_by_port(store))
            gone = time.monotonic()
            gets = gets_of(shard)
            load.wait_until_served()
            assert gets_of(shard) > gets
            time.sleep(0.5)
            end = time.monotonic()
            node_at(cluster.nodes, replica).start()
            heal(cluster)
        load.check()
        served = load.check_undisturbed(others, at, end)
        load.check_undisturbed(load.shards, gone + D, end)
        missed = load.bad("get", [shard], at, gone)
        hits = load.good("get", [shard], at, gone)
        assert store.stats().faults["conn"] and set(missed) <= {"conn", "breaker"}
        assert hits > sum(missed.values())
        row.seen = {
            "first hit after s": round(first or 0.0, 2),
            "misses until the cluster has dropped it": missed,
            "hits meanwhile": hits,
            "seconds": round(gone - at, 1),
            "other shards served": served,
        }
        check_all_there(store)


@pytest.mark.fault(number=31)
@pytest.mark.cluster
def test_a_replica_that_lags_has_misses_and_nothing_wrong(book: Book, cluster: RedisCluster) -> None:
    with (
        book(
            "read replicas: replica lags",
            injected="replication of one shard held while keys are written and removed",
            expected="what it has not got is a miss; what it still has is the identical value",
        ) as row,
        RedisStore(cluster.url, deadline_s=PATIENT_S, read_replicas=True) as store,
    ):
        fresh = [b"fresh %d" % i for i in range(60)]
        owner = prepared(cluster, store)
        shard, (replica,) = next(iter(masters(cluster).items()))
        at = owners(cluster, fresh)
        late = [key for key in fresh if at[key] == shard]
        removed = [key for key in KEYS if owner[key] == shard][:10]
        client = client_at(replica)
        client.config_set("masteruser", "nobody")  # it cannot log in again
        client.config_set("masterauth", "wrong")
        client.client_kill_filter(_type="master")
        wait_for(lambda: client.info("replication")["master_link_status"] == "down")
        fill(store, [*fresh, *KEYS], SIZE)  # the same values as before
        replicated(port for port in masters(cluster) if port != shard)
        assert store.delete_many(removed) == len(removed)
        assert ask(store, fresh, SIZE) == [at[key] != shard for key in fresh]
        assert store.stats().misses == Counter(absent=len(late))
        assert all(ask(store, KEYS, SIZE)), "the replica still has what was removed"
        hits = store.stats().hits
        client.config_set("masteruser", "")
        client.config_set("masterauth", "")
        wait_for(lambda: client.info("replication")["master_link_status"] == "up")
        wait_for(lambda: all(ask(store, fresh, SIZE)))
        assert ask(store, removed, SIZE) == [False] * len(removed)
        assert set(store.stats().misses) == {"absent"} and not store.stats().faults
        row.seen = {"misses while it lagged": len(late), "old values, identical": len(removed), "hits": hits}
        fill(store, removed, SIZE)
        replicated([shard])
        check_all_there(store)
