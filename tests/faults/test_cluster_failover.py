"""Faults 22, 23 and 31: a master of a cluster dies or hangs, and somebody takes over or nobody."""

from __future__ import annotations

import random
import time

import pytest
from redis.crc import key_slot

from kvlab.cache import DistributedKVCache
from kvlab.engine import generate
from kvlab.stores import RedisStore
from kvlab.testbed.cluster import RedisCluster
from tests.faults.book import Book
from tests.faults.calls import ask
from tests.faults.clusters import (
    KEYS,
    RECOVERS_S,
    SIZE,
    D,
    check_all_there,
    client_at,
    heal,
    masters,
    name_of,
    node_at,
    owners,
    patient,
    prepared,
    put_all,
    replicated,
    server_of,
    servers_of,
    slots_seen_by,
    value_of,
)
from tests.faults.kit import wait_for
from tests.faults.load import Load, recovery
from tests.harness.helpers import attentive_model


@pytest.mark.fault(number=22)
@pytest.mark.cluster
@pytest.mark.parametrize("coverage", ["no", "yes"])
@pytest.mark.slow
def test_a_master_is_killed_and_its_replica_takes_over(book: Book, cluster: RedisCluster, coverage: str) -> None:
    full = coverage == "yes"  # Redis' default
    with (
        book(
            f"cluster, kill -9 of a master{', all slots must be covered' if full else ''}",
            injected=f"kill -9 under load; node-timeout 2 s, cluster-require-full-coverage {coverage}",
            expected="its keys miss until its replica takes over; other shards "
            + ("say CLUSTERDOWN from when it counts as failed" if full else "miss nothing"),
        ) as row,
        RedisStore(cluster.url, deadline_s=D) as store,
    ):
        owner = prepared(cluster, store)
        victim = cluster.master_of(name_of(KEYS[0]))
        others = set(owner.values()) - {victim.port}
        for node in cluster.nodes:
            client_at(node.port).config_set("cluster-require-full-coverage", coverage)
        with Load(store, owner) as load:
            at = time.monotonic()
            victim.kill()
            recovered = recovery(load, victim.port, at)
            load.wait_until_served()
            up = time.monotonic()
            victim.start()
            heal(cluster)
            assert client_at(victim.port).info("replication")["role"] == "slave"
            well = time.monotonic()
            load.wait_until_served()
            time.sleep(0.5)
        load.check()
        load.check_undisturbed(load.shards, well)
        missed = load.bad("get", [victim.port], at)
        assert missed and set(missed) <= {"conn", "breaker", "timeout", "down"} and store.stats().faults["conn"] >= 3
        assert load.links == {victim.port} and (full or not load.writes), "its breaker alone"
        row.seen = {**recovered, "misses": missed, "redirects": store.stats().redirects}
        if full:
            served, theirs = load.good("get", others, at, up), load.bad("get", others, at, up)
            assert served and set(theirs) <= {"down", "timeout"}
            row.seen |= {"reads of other shards": {"hits": served, **theirs}}
        else:
            row.seen |= {"other shards served": load.check_undisturbed(others, at)}
        check_all_there(store)
        assert server_of(store, KEYS[0]) != victim.port


@pytest.mark.fault(number=22)
@pytest.mark.fault(number=31)
@pytest.mark.cluster
@pytest.mark.slow
def test_a_master_hangs_and_comes_back_when_another_has_its_keys(book: Book, cluster: RedisCluster) -> None:
    with (
        book(
            "cluster, SIGSTOP of a master",
            injected="SIGSTOP under load, SIGCONT after the failover; node-timeout 2 s",
            expected="a deadline a call until its breaker opens; then as with kill -9",
            number=22,
        ) as row,
        book(
            "split brain, cluster",
            injected="a store with the map of before the failover asks the old master as soon as it wakes",
            expected="MOVED or the identical value; ends on the new master",
            number=31,
        ) as split,
        RedisStore(cluster.url, deadline_s=D) as store,
        RedisStore(cluster.url, deadline_s=D) as stale,
    ):
        owner = prepared(cluster, store)
        assert all(ask(stale, KEYS, SIZE))
        victim = cluster.master_of(name_of(KEYS[0]))
        its = [key for key in KEYS if owner[key] == victim.port]
        others = set(owner.values()) - {victim.port}
        with Load(store, owner) as load:
            at = time.monotonic()
            victim.stop()
            for _ in range(3):  # one that starts now, and may ask the one that hangs first
                seeds = ",".join(f"127.0.0.1:{port}" for port in (victim.port, *others))
                with RedisStore(f"redis-cluster://{seeds}", deadline_s=2 * D) as new:
                    late = dict(zip(KEYS, ask(new, KEYS, SIZE), strict=True))
                    assert all(there for key, there in late.items() if owner[key] != victim.port), new.stats()
            recovered = recovery(load, victim.port, at)
            failed_over = time.monotonic()
            taker = cluster_master(cluster, its[0], besides=victim.port)
            assert taker != victim.port and server_of(stale, its[0]) == victim.port
            victim.cont()
            rounds = 0
            while server_of(stale, its[0]) != taker or rounds < 20:
                ask(stale, its, SIZE)
                stale.put_many(its, [value_of(key) for key in its])
                rounds += 1
                assert time.monotonic() < failed_over + RECOVERS_S
            heal(cluster)
            assert client_at(victim.port).info("replication")["role"] == "slave"
            well = time.monotonic()
            load.wait_until_served()
        load.check()
        served = load.check_undisturbed(others, at)
        load.check_undisturbed(load.shards, well)
        missed = load.bad("get", [victim.port], at)
        assert missed and set(missed) <= {"timeout", "breaker", "conn", "down"} and store.stats().faults["timeout"] >= 3
        assert (load.links, load.writes) == ({victim.port}, set()), "its breaker alone"
        row.seen = {**recovered, "misses": missed, "other shards served": served, **load.slow(at, failed_over)}
        stats = stale.stats()
        stats.check()
        assert stats.redirects or stats.misses, "the old map was never used"
        assert set(stats.misses) <= {"timeout", "conn", "breaker", "down", "moved"}
        split.seen = {"hits": stats.hits, "misses": dict(stats.misses), "redirects": stats.redirects, "wrong": 0}
        for each in (store, stale):
            check_all_there(each)
            assert server_of(each, its[0]) == taker


def cluster_master(cluster: RedisCluster, key: bytes, besides: int) -> int:
    """The port of a key's master, as another node says."""
    asked = next(node for node in cluster.nodes if node.port != besides and node.port in masters(cluster))
    slot = key_slot(name_of(key))
    return next(line[2] for line in slots_seen_by(asked.port) if line[0] <= slot <= line[1])


@pytest.mark.fault(number=23)
@pytest.mark.cluster
@pytest.mark.slow
def test_three_masters_without_replicas(book: Book) -> None:
    with (
        book(
            "no replica",
            injected="3 masters, kill -9 of one; cluster-require-full-coverage yes, then no",
            expected="yes: all keys miss, down and conn; no: two thirds hit",
        ) as row,
        RedisCluster("--cluster-require-full-coverage", "yes", replicas=0) as cluster,
        RedisStore(cluster.url, deadline_s=D) as store,
    ):
        put_all(store, KEYS)
        owner = owners(cluster, KEYS)
        victim = cluster.nodes[0]
        left = [client_at(node.port) for node in cluster.nodes[1:]]
        states = lambda: {client.execute_command("CLUSTER INFO")["cluster_state"] for client in left}  # noqa: E731
        hits = [owner[key] != victim.port for key in KEYS]
        with Load(store, owner) as load:
            victim.kill()
            wait_for(lambda: states() == {"fail"})
            time.sleep(0.3)
            down = time.monotonic()
            time.sleep(1.0)
            up = time.monotonic()
            assert not store.health().ok
            for client in left:
                client.config_set("cluster-require-full-coverage", "no")
            wait_for(lambda: states() == {"ok"})
            load.wait_until_served(set(load.shards) - {victim.port})
            partly = time.monotonic()
            time.sleep(1.0)
            end = time.monotonic()
        load.check()
        alive = set(load.shards) - {victim.port}
        assert load.good("get", load.shards, down, up) == 0
        with_coverage = load.bad("get", load.shards, down, up)
        assert {"down"} <= set(with_coverage) <= {"down", "conn", "breaker"}
        assert set(load.bad("get", alive, down, up)) == {"down"}
        assert store.stats().faults["conn"] >= 3
        load.check_undisturbed(alive, partly, end)
        assert load.links == {victim.port}, "who says CLUSTERDOWN answers, though it takes no writes"
        with patient(store):
            assert ask(store, KEYS, SIZE) == hits
        row.seen = {"yes": {"hits": 0, **with_coverage}, "no": {"hits": f"{sum(hits)} of {len(hits)}"}}
        sick = store.health()
        assert not sick.ok and str(victim.port) in sick.detail
        victim.start()
        cluster.wait_until_ok()
        with patient(store):
            wait_for(lambda: store.put_many(KEYS, [value_of(key) for key in KEYS]) == len(KEYS))
        check_all_there(store)


@pytest.mark.fault(number=22)
@pytest.mark.cluster
@pytest.mark.slow
def test_no_state_of_a_cluster_changes_a_token(book: Book, cluster: RedisCluster) -> None:
    model, size = attentive_model(), 16
    chance = random.Random(4)
    prompts = [chance.choices(range(97), k=12 * size) for _ in range(6)]
    plain = [generate(model, prompt, 8, stop_at_eos=False).tokens for prompt in prompts]
    with (
        book(
            "a hung shard under an engine",
            injected="SIGSTOP of a master between requests, until its replica has taken over",
            expected="the same tokens; the blocks before the first lost one are used, none behind it",
        ) as row,
        RedisStore(cluster.url, deadline_s=D) as store,
        DistributedKVCache(precision="fp32", store=store, model=model, block_tokens=size) as cache,
    ):

        def answer() -> list[int]:
            """How many tokens the cache gave for each prompt; what was said is what is always said."""
            said = [generate(model, prompt, 8, cache, stop_at_eos=False) for prompt in prompts]
            assert [each.tokens for each in said] == plain
            cache.stats().check()
            store.stats().check()
            return [each.cached_tokens for each in said]

        whole = 12 * size - 1  # the last token is always computed
        with patient(store):
            assert answer() == [0] * len(prompts)
            assert answer() == [whole] * len(prompts)
        replicated(masters(cluster))
        chains = [cache._namespace.keys(prompt) for prompt in prompts]  # type: ignore[union-attr]
        owner = owners(cluster, [key for chain in chains for key in chain])
        victim = next(iter(masters(cluster)))
        lost = [next((i for i, key in enumerate(chain) if owner[key] == victim), 12) for chain in chains]
        assert any(0 < n < 12 for n in lost)
        (replica,) = masters(cluster)[victim]
        client_at(replica).config_set("cluster-replica-no-failover", "yes")
        node_at(cluster.nodes, victim).stop()
        hung = answer()
        before_failover = store.stats()
        begin = time.monotonic()
        client_at(replica).config_set("cluster-replica-no-failover", "no")
        wait_for(lambda: slots_moved_away(cluster, victim))
        with patient(store):
            wait_for(lambda: answer() == [whole] * len(prompts))
        took = time.monotonic() - begin
        node_at(cluster.nodes, victim).cont()
        heal(cluster)
        with patient(store):
            wait_for(lambda: answer() == [whole] * len(prompts))
        for n, block in zip(hung, lost, strict=True):
            assert n <= min(block * size, whole), "used what lies behind a lost block"
            assert n % size == 0 or n == whole
        assert before_failover.faults["timeout"] and before_failover.hits
        row.seen = {
            "cached tokens while it hung": hung,
            "what lies before the first lost block": [n * size for n in lost],
            "faults": dict(before_failover.faults),
            "all cached again after s": round(took, 1),
        }


def slots_moved_away(cluster: RedisCluster, victim: int) -> bool:
    alive = [node.port for node in cluster.nodes if node.port != victim]
    return all(victim not in servers_of(slots_seen_by(port)) for port in alive)
