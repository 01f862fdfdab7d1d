"""Faults 24 and 25: slots and nodes move under load, batches cross slots."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable

import pytest
from redis.crc import key_slot

from kvlab.stores import RedisStore
from kvlab.testbed.cluster import RedisCluster, node_options
from kvlab.testbed.server import RedisServer
from tests.faults.book import Book
from tests.faults.calls import PATIENT_S, ask, calls_of, fill
from tests.faults.clusters import (
    KEYS,
    RECOVERS_S,
    SIZE,
    TAGS,
    D,
    agree,
    begin_to_move,
    check_all_there,
    client_at,
    end_to_move,
    id_of,
    masters,
    move_keys,
    name_of,
    node_at,
    nodes_by_port,
    owners,
    prepared,
    server_of,
    value_of,
)
from tests.faults.kit import monitored, wait_for
from tests.faults.load import Load

EMPTY_STAYS_MASTER = ("--cluster-allow-replica-migration", "no")  # who gave its last slot away does not follow then


@pytest.mark.fault(number=24)
@pytest.mark.cluster
@pytest.mark.slow
def test_slots_move_under_load(book: Book, cluster: RedisCluster) -> None:
    each = 8
    with (
        book(
            "slot migration",
            injected=f"6 slots with {each} keys each move under load, key by key",
            expected="ASK, then MOVED, then no redirects; no key that exists misses",
        ) as row,
        RedisStore(cluster.url, deadline_s=D) as store,
    ):
        source, target, third = masters(cluster)
        at = owners(cluster, TAGS)
        tags = [tag for tag in TAGS if at[tag] == source][:6]
        slots = [key_slot(name_of(tag)) for tag in tags]
        keys = [*KEYS[:150], *(tag + b"%d" % i for tag in tags for i in range(each))]
        owner = prepared(cluster, store, keys)
        with Load(store, owner) as load:
            at_first, begin = store.stats().redirects, time.monotonic()
            for slot in slots:
                begin_to_move(slot, source, target)
            for slot in slots:
                assert move_keys(slot, source, target, each // 2) == each // 2
            half = store.stats().redirects
            time.sleep(1.0)
            asked = store.stats().redirects
            assert asked > half > at_first, "keys that have gone are found by ASK"
            assert server_of(store, tags[0]) == source, "ASK is not for good"
            for slot in slots:
                assert move_keys(slot, source, target, 2 * each) == each // 2
            before_moved = store.stats().redirects
            for slot in slots:
                end_to_move(slot, source, target, [third])
            end = time.monotonic()
            wait_for(lambda: server_of(store, tags[0]) == target)
            wait_for(lambda: agree(cluster))
            wait_for(no_redirects_for(1.5, store), RECOVERS_S)
            all_in_all = store.stats().redirects
        load.check()
        served = load.check_undisturbed(load.shards)
        assert store.stats().faults["moved"] == 0, "no ring of redirects"
        row.seen = {
            "served": served,
            "misses": dict(store.stats().misses),
            "drops": dict(store.stats().drops),
            "redirects, ASK": before_moved - at_first,
            "redirects, MOVED": all_in_all - before_moved,
            "seconds": round(end - begin, 1),
        }
        check_all_there(store, keys)
        assert store.stats().redirects == all_in_all
        for slot in slots:  # back again, for the other tests' sake
            begin_to_move(slot, target, source)
            move_keys(slot, target, source, 2 * each, 0)
            end_to_move(slot, target, source, [third])
        check_all_there(store, keys)


def no_redirects_for(seconds: float, store: RedisStore) -> Callable[[], bool]:
    """Whether nothing was redirected for so long."""
    last = [store.stats().redirects, time.monotonic()]

    def quiet() -> bool:
        now = store.stats().redirects
        if now != last[0]:
            last[:] = now, time.monotonic()
        return time.monotonic() - last[1] > seconds

    return quiet


@pytest.mark.fault(number=24)
@pytest.mark.cluster
def test_a_node_comes_and_goes(book: Book, cluster: RedisCluster) -> None:
    with (
        book(
            "node added and removed",
            injected="a fourth master gets 3 slots, gives them back, is forgotten and killed, under load",
            expected="no misses; it is a node of the store for as long as it has slots",
        ) as row,
        RedisServer(*node_options(2000), *EMPTY_STAYS_MASTER, bus=True) as newcomer,
        RedisStore(cluster.url, deadline_s=D) as store,
    ):
        source, *others = masters(cluster)
        at = owners(cluster, TAGS)
        tags = [tag for tag in TAGS if at[tag] == source][:3]
        slots = [key_slot(name_of(tag)) for tag in tags]
        keys = [*KEYS[:150], *(tag + b"%d" % i for tag in tags for i in range(5))]
        owner = prepared(cluster, store, keys)
        new = newcomer.port
        bus = client_at(new).config_get("cluster-port")["cluster-port"]
        client_at(source).execute_command("CLUSTER MEET", "127.0.0.1", new, bus)
        known = lambda: [len(client_at(n.port).execute_command("CLUSTER NODES")) for n in (*cluster.nodes, newcomer)]  # noqa: E731
        wait_for(lambda: known() == [7] * 7)
        wait_for(lambda: client_at(new).execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        with Load(store, owner) as load:
            for slot in slots:
                begin_to_move(slot, source, new)
                move_keys(slot, source, new, 10)
                end_to_move(slot, source, new, others)
            wait_for(lambda: new in nodes_by_port(store))
            wait_for(no_redirects_for(0.7, store))
            assert calls_of(client_at(new), "get")["calls"] > 0
            assert [server_of(store, tag) for tag in tags] == [new] * 3
            for slot in slots:
                begin_to_move(slot, new, source)
                move_keys(slot, new, source, 10)
                end_to_move(slot, new, source, others)
            wait_for(lambda: new not in nodes_by_port(store))
            name = id_of(new)
            for node in cluster.nodes:
                client_at(node.port).execute_command("CLUSTER FORGET", name)
            newcomer.kill()
            time.sleep(0.5)
            load.wait_until_served()
        load.check()
        served = load.check_undisturbed(load.shards)
        assert not load.links and not load.writes
        row.seen = {"served": served, "misses": dict(store.stats().misses), "redirects": store.stats().redirects}
        check_all_there(store, keys)


@pytest.mark.fault(number=25)
@pytest.mark.cluster
def test_batches_are_divided_among_slots(book: Book, cluster: RedisCluster) -> None:
    with (
        book(
            "CROSSSLOT",
            injected="batches of random keys over all slots, through every call",
            expected="no error; no command with several keys",
        ) as row,
        RedisStore(cluster.url, ttl_s=100, deadline_s=PATIENT_S) as store,
        contextlib.ExitStack() as stack,
    ):
        chance = random.Random(25)
        keys = [chance.randbytes(16).hex().encode() for _ in range(1500)]
        assert len({key_slot(name_of(key)) for key in keys}) > 1000
        clients = [client_at(port) for port in masters(cluster)]
        for client in clients:
            client.config_resetstat()
        heard = [stack.enter_context(monitored(node_at(cluster.nodes, port))) for port in masters(cluster)]
        fill(store, keys, SIZE)
        assert all(ask(store, keys, SIZE))
        out = [memoryview(bytearray(SIZE)) for _ in keys]
        assert store.get_many(keys, out) == [value_of(key) for key in keys]
        assert store.probe(keys) == len(keys) and all(store.touch_many(keys))
        assert store.health().ok
        assert store.delete_many(keys) == len(keys)
        assert store.probe(keys) == 0 and not any(store.touch_many(keys)) and not any(ask(store, keys, SIZE))
        stack.close()  # what was heard is complete
        commands = [line.split(" ") for lines in heard for line in lines]
        keyed = [words for words in commands if words[0].upper() in ("GET", "SET", "DEL", "EXISTS", "PEXPIRE")]
        assert len(keyed) > 10 * len(keys)
        others = {words[0].upper() for words in commands} - {words[0].upper() for words in keyed}
        assert others <= {"INFO", "CLUSTER", "ASKING", "PING", "REPLCONF", "CLIENT"}
        assert all(len(words) == 2 for words in keyed if words[0].upper() in ("GET", "DEL", "EXISTS"))
        stats = [client.info("commandstats") for client in clients]
        many = {name for each in stats for name in each} & {f"cmdstat_{n}" for n in ("mget", "mset", "unlink", "eval")}
        failed = sum(facts["failed_calls"] + facts["rejected_calls"] for each in stats for facts in each.values())
        assert not many and failed == 0
        assert sum(calls_of(client, "set")["calls"] for client in clients) == len(keys) + 3  # and health's
        seen = store.stats()
        assert not seen.faults and not seen.drops and set(seen.misses) == {"absent"} and not seen.redirects
        row.seen = {"keys": len(keys), "commands": len(keyed), "errors": failed}
