"""Faults 20, 22 and 31 with Sentinel: hand-overs, dead masters, dead sentinels, replicas that serve reads."""

from __future__ import annotations

import contextlib
import time
from collections import Counter

import pytest
import redis

from kvlab.stores import RedisStore
from kvlab.stores.redis.topology import Shard
from kvlab.testbed.cluster import RedisCluster
from kvlab.testbed.sentinel import RedisSentinel
from kvlab.testbed.server import RedisServer
from tests.faults.book import Book
from tests.faults.calls import PATIENT_S, ask, fill
from tests.faults.clusters import (
    KEYS,
    SIZE,
    D,
    ask_sentinel,
    awake,
    check_all_there,
    client_at,
    gets_of,
    nodes_by_port,
    prepared,
    put_all,
    replicated,
    server_of,
    value_of,
)
from tests.faults.kit import wait_for
from tests.faults.load import Load, recovery


def prepared_group(group: RedisSentinel, store: RedisStore) -> RedisServer:
    put_all(store, KEYS)
    replicated([group.master.port])
    return group.master


ALL_IN_ONE = dict.fromkeys(KEYS, 0)


def role_of(port: int) -> str:
    """What a server is; "" while it closes connections, as a sentinel has it do when it makes it a replica."""
    try:
        return str(client_at(port).info("replication")["role"])
    except redis.exceptions.ConnectionError:
        return ""


@pytest.mark.fault(number=20)
@pytest.mark.cluster
@pytest.mark.slow
def test_sentinel_hands_over_to_a_replica(book: Book, group: RedisSentinel) -> None:
    """The old master lives on. For some eight seconds it still takes writes, which are then lost; then none."""
    with (
        book(
            "Sentinel failover by hand",
            injected="SENTINEL FAILOVER under load; the old master becomes a replica",
            expected="readonly or conn for a moment; writes go to the new master",
        ) as row,
        RedisStore(group.url, deadline_s=D) as store,
    ):
        old = prepared_group(group, store)
        with Load(store, ALL_IN_ONE) as load:
            at = time.monotonic()
            ask_sentinel(group.sentinels[0], "FAILOVER")
            wait_for(lambda: int(ask_sentinel(group.sentinels[0], "GET-MASTER-ADDR-BY-NAME")[1]) != old.port)
            named = time.monotonic()
            wait_for(lambda: role_of(old.port) == "slave")
            demoted = time.monotonic()
            wait_for(lambda: server_of(store, KEYS[0]) != old.port)
            recovered = recovery(load, 0, demoted)
            found = time.monotonic()
            time.sleep(1.0)
        load.check()
        load.check_undisturbed([0], found + D)
        stats = store.stats()
        assert set(stats.misses) <= {"conn", "loading", "breaker", "timeout", "absent"}
        assert set(stats.drops) <= {"readonly", "conn", "loading", "breaker", "timeout"}
        assert set(stats.faults) & {"conn", "readonly"}, "the switch was not noticed"
        row.seen = {
            **{f"{name}, after it was demoted": seconds for name, seconds in recovered.items()},
            "new master named after s": round(named - at, 2),
            "old one demoted after s": round(demoted - at, 2),
            "misses": dict(stats.misses),
            "drops": dict(stats.drops),
            "faults": dict(stats.faults),
        }
        group.wait_until_ok()
        check_all_there(store)
        assert server_of(store, KEYS[0]) == group.master.port != old.port


@pytest.mark.fault(number=20)
@pytest.mark.cluster
def test_a_store_that_still_writes_to_a_replica(book: Book, group: RedisSentinel, cluster: RedisCluster) -> None:
    """Both maps are wrong: Sentinel's replica says READONLY, the cluster's says MOVED."""
    with (
        book(
            "a replica taken for the master",
            injected="a map that is wrong: put, get and put again",
            expected="Sentinel: readonly once, then the master; cluster: MOVED at once",
        ) as row,
        RedisStore(group.url, deadline_s=PATIENT_S) as watched,
        RedisStore(cluster.url, deadline_s=PATIENT_S) as sharded,
    ):
        prepared_group(group, watched)
        prepared(cluster, sharded)
        node = next(node for node in group.nodes if node is not group.master)
        time.sleep(0.5)  # the last question is so old that a hint leads to another
        watched._topology._shard = Shard(watched._topology._node("127.0.0.1", node.port))  # type: ignore[attr-defined]
        assert all(ask(watched, KEYS, SIZE))
        assert watched.put_many(KEYS[:10], [value_of(key) for key in KEYS[:10]]) == 0
        assert watched.put_many(KEYS[:10], [value_of(key) for key in KEYS[:10]]) == 10
        seen = dict(watched.stats().drops)
        assert seen == {"readonly": 10} and watched.stats().faults == Counter(readonly=1)
        before = sharded.stats()
        for shard in sharded._topology.shards():
            wrong = Shard(shard.replicas[0])
            slots = sharded._topology._slots  # type: ignore[attr-defined]
            slots[:] = [wrong if at is shard else at for at in slots]
        fill(sharded, KEYS, SIZE)
        assert all(ask(sharded, KEYS, SIZE))
        redirects = sharded.stats().redirects - before.redirects
        assert redirects and not sharded.stats().drops and not sharded.stats().misses
        row.seen = {"Sentinel, drops": seen, "cluster, redirects": redirects}


@pytest.mark.fault(number=22)
@pytest.mark.cluster
@pytest.mark.parametrize("how", ["kill -9", "SIGSTOP, one sentinel hung"])
@pytest.mark.slow
def test_sentinel_replaces_a_dead_master(book: Book, group: RedisSentinel, how: str) -> None:
    with (
        book(
            f"Sentinel failover, {how}",
            injected=f"{how} under load; down-after 1 s, two of three sentinels must agree",
            expected="misses until a replica is the master; no wrong value when the old master comes back",
        ) as row,
        RedisStore(group.url, deadline_s=D) as store,
    ):
        old = prepared_group(group, store)
        with Load(store, ALL_IN_ONE) as load:
            if how == "kill -9":
                at = time.monotonic()
                old.kill()
            else:
                group.sentinels[2].stop()
                at = time.monotonic()
                old.stop()
            recovered = recovery(load, 0, at)
            up = time.monotonic()
            time.sleep(0.5)
            well = time.monotonic()
            assert server_of(store, KEYS[0]) != old.port
            awake([old, group.sentinels[2]])
            time.sleep(1.0)  # the old one still takes itself for the master
        load.check()
        load.check_undisturbed([0], well)
        missed = load.bad("get", [0], at, up)
        assert missed and set(missed) <= {"conn", "breaker", "timeout", "loading"}
        row.seen = {**recovered, "misses": missed, **load.slow(at, up)}
        check_all_there(store)
        assert server_of(store, KEYS[0]) == group.master.port != old.port


@pytest.mark.fault(number=31)
@pytest.mark.cluster
def test_replicas_of_a_sentinels_master_serve_reads(book: Book, group: RedisSentinel) -> None:
    with (
        book(
            "read replicas: Sentinel",
            injected="kill -9 of one of two replicas under load",
            expected="replicas serve the reads; a few misses until a breaker opens, then the other one serves",
        ) as row,
        RedisStore(group.url, ttl_s=100, deadline_s=D, read_replicas=True) as store,
    ):
        master = prepared_group(group, store)
        assert all(ask(store, KEYS, SIZE))
        victim, other = (node for node in group.nodes if node is not master)
        before, gets = gets_of(master.port), gets_of(other.port)
        with Load(store, ALL_IN_ONE) as load:
            at = time.monotonic()
            victim.kill()
            wait_for(lambda: victim.port not in nodes_by_port(store))
            gone = time.monotonic()
            time.sleep(1.0)
            load.wait_until_served()
        load.check()
        load.check_undisturbed([0], gone + D)
        missed, hits = load.bad("get", [0], at), load.good("get", [0], at)
        assert set(missed) <= {"conn", "breaker"} and hits > sum(missed.values())
        assert gets_of(other.port) > gets
        row.seen = {"misses": missed, "hits": hits, "GETs of the master": gets_of(master.port) - before}
        check_all_there(store)


@pytest.mark.fault(number=22)
@pytest.mark.cluster
@pytest.mark.slow
def test_sentinels_die_one_by_one(book: Book, groups: list[RedisSentinel], group: RedisSentinel) -> None:
    ahead = [0.0]
    with (
        book(
            "Sentinel failover, one sentinel dead",
            injected="kill -9 of a sentinel, then of the master, under load",
            expected="the other two replace it",
        ) as row,
        book(
            "all sentinels dead",
            injected="SIGSTOP, then kill -9 of all sentinels while the master lives; each time the map is due again",
            expected="everything goes on hitting; a new store finds nobody: conn",
        ) as last,
        RedisStore(group.url, deadline_s=D, clock=lambda: time.monotonic() + ahead[0]) as store,
        RedisStore(group.url, deadline_s=D) as late,
    ):
        old = prepared_group(group, store)
        groups.clear()  # a sentinel that died knows nothing when it starts again
        with contextlib.ExitStack() as stack, Load(store, ALL_IN_ONE) as load:
            stack.push(group)
            group.sentinels[2].kill()  # one that hung before does nothing for half a minute: Sentinel's TILT
            at = time.monotonic()
            old.kill()
            recovered = recovery(load, 0, at)
            time.sleep(1.0)
            missed = load.bad("get", [0], at)
            row.seen = {**recovered, "misses": missed}
            dead = time.monotonic()
            for how in (RedisServer.stop, RedisServer.kill):
                for sentinel in group.sentinels:
                    how(sentinel)
                ahead[0] += 61.0  # the map is a minute old
                time.sleep(1.2)
                load.wait_until_served()
            asked = store.stats().faults
            assert ask(late, KEYS, SIZE) == [False] * len(KEYS)
            assert not late.health().ok
            load.wait_until_served()
            end = time.monotonic()
            load.__exit__(None, None, None)
            load.check()
            served = load.check_undisturbed([0], dead, end)
            assert store.stats().faults == asked and store._topology._breaker.faults  # type: ignore[attr-defined]
            assert set(late.stats().misses) == {"conn"}
            last.seen = {"served": served, "misses": {}, "a new store's misses": dict(late.stats().misses)}
            last.seen |= load.slow(dead, end)
