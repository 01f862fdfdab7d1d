"""Faults 17 and 26 in a cluster: one node is full, or knows other passwords and rights."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest
from redis.crc import key_slot

from kvlab.stores import RedisStore
from kvlab.testbed.cluster import RedisCluster
from tests.faults.book import Book
from tests.faults.calls import PATIENT_S, ask, fill
from tests.faults.clusters import (
    KEYS,
    SIZE,
    TAGS,
    D,
    begin_to_move,
    check_all_there,
    client_at,
    end_to_move,
    masters,
    move_keys,
    name_of,
    nodes_by_port,
    owners,
    patient,
    prepared,
    put_all,
    replicated,
)
from tests.faults.kit import wait_for
from tests.faults.load import Load

RIGHTS = ("get", "set", "del", "exists", "pexpire", "touch", "info", "cluster|slots", "asking", "readonly")


@pytest.mark.fault(number=17)
@pytest.mark.cluster
def test_one_shard_is_full(book: Book, cluster: RedisCluster) -> None:
    with (
        book(
            "one shard full",
            injected="maxmemory reached on one master of three, noeviction, under load",
            expected="drops of its keys: oom, then its write breaker; all reads hit; other shards store",
        ) as row,
        RedisStore(cluster.url, deadline_s=D) as store,
    ):
        owner = prepared(cluster, store)
        full, *others = masters(cluster)
        with Load(store, owner) as load:
            at = time.monotonic()
            client_at(full).config_set("maxmemory", 1)
            wait_for(lambda: nodes_by_port(store)[full].write_breaker.state == "open")
            time.sleep(1.0)
            load.wait_until_served(others)
            end = time.monotonic()
            client_at(full).config_set("maxmemory", 0)
            load.wait_until_served()
        load.check()
        served = load.check_undisturbed(others)
        assert load.good("get", [full], at, end) and not load.bad("get", [full])
        stats = store.stats()
        assert set(stats.drops) == {"oom", "breaker"} and not stats.misses
        assert (load.links, load.writes) == (set(), {full})
        row.seen = {"drops": dict(stats.drops), "misses": {}, "other shards served": served}
        check_all_there(store)


def set_user(ports: Iterable[int], *rules: str) -> None:
    for port in ports:
        client_at(port).execute_command("ACL", "SETUSER", "kvlab", *rules)


def make_user(cluster: RedisCluster, without: str = "") -> str:
    """The store's user on every node, with one right less if it is named; the URL to log in with."""
    rights = [f"+{name}" for name in RIGHTS if name != without]
    set_user([node.port for node in cluster.nodes], "reset", "on", ">old", "~kv:*", "resetchannels", *rights)
    return login(cluster, "old")


def login(cluster: RedisCluster, password: str) -> str:
    return cluster.url.replace("://", f"://kvlab:{password}@")


def denied(cluster: RedisCluster) -> list[str]:
    """What any node has refused the user."""
    lines = [line for node in cluster.nodes for line in client_at(node.port).acl_log()]
    return sorted({str(line["object"]) for line in lines})


def forget_denied(cluster: RedisCluster) -> None:
    for node in cluster.nodes:
        client_at(node.port).acl_log_reset()


@pytest.mark.fault(number=26)
@pytest.mark.cluster
def test_passwords_are_rotated_with_two_valid_ones(book: Book, cluster: RedisCluster) -> None:
    ports = [node.port for node in cluster.nodes]
    url = make_user(cluster)
    with (
        book(
            "password rotation, cluster",
            injected="new password beside the old on all nodes, workers restarted, old one removed, under load",
            expected="0 misses, 0 drops",
        ) as row,
        RedisStore(url, deadline_s=D) as before,
        RedisStore(login(cluster, "new"), deadline_s=D) as after,
    ):
        owner = prepared(cluster, before)
        with Load(before, owner, threads=2) as old_load:
            set_user(ports, ">new")
            with Load(after, owner, threads=2) as new_load:
                old_load.wait_until_served()
                old_load.__exit__(None, None, None)
                set_user(ports, "<old")
                new_load.wait_until_served()
        for load in (old_load, new_load):
            load.check()
            load.check_undisturbed(load.shards)
        served = [load.good("", load.shards) for load in (old_load, new_load)]
        faults = before.stats().faults + after.stats().faults
        assert set(faults) <= {"timeout"}
        row.seen = {"served with the old": served[0], "with the new": served[1], "misses": {}, "drops": {}}
        check_all_there(after)
        with RedisStore(url, deadline_s=PATIENT_S) as late:
            assert not late.health().ok and late.health().detail.count("auth")
            assert ask(late, KEYS[:3], SIZE) == [False] * 3 and late.stats().misses == Counter(auth=3)


@pytest.mark.fault(number=26)
@pytest.mark.cluster
def test_a_password_changed_on_one_node(book: Book, cluster: RedisCluster) -> None:
    url = make_user(cluster)
    with (
        book(
            "password changed on one node",
            injected="ACL SETUSER and CLIENT KILL on one master of three, under load",
            expected="its keys miss: auth, then breaker; other shards miss nothing",
        ) as row,
        RedisStore(url, deadline_s=D) as store,
    ):
        owner = prepared(cluster, store)
        victim, *others = masters(cluster)
        with Load(store, owner) as load:
            at = time.monotonic()
            set_user([victim], "resetpass", ">other")
            client_at(victim).client_kill_filter(_type="normal", skipme=True)
            wait_for(lambda: nodes_by_port(store)[victim].breaker.state == "open")
            time.sleep(1.0)
            assert not store.health().ok and f"127.0.0.1:{victim}: auth" in store.health().detail
            end = time.monotonic()
            set_user([victim], "resetpass", ">old")
            load.wait_until_served()
        load.check()
        served = load.check_undisturbed(others)
        missed = load.bad("get", [victim], at)
        assert missed and set(missed) <= {"auth", "breaker", "conn"} and store.stats().faults["auth"] >= 3
        assert load.links | load.writes <= {victim}
        faults = dict(store.stats().faults)
        row.seen = {"misses": missed, "faults": faults, "other shards served": served, "seconds": round(end - at, 1)}
        check_all_there(store)


@pytest.mark.fault(number=26)
@pytest.mark.cluster
@pytest.mark.parametrize("read_replicas", [False, True])
def test_the_documented_rights_are_enough(book: Book, cluster: RedisCluster, read_replicas: bool) -> None:
    url = make_user(cluster)
    with (
        book(
            f"rights of a cluster's user{', read replicas' if read_replicas else ''}",
            injected=f"ACL with no more than {' '.join(f'+{right}' for right in RIGHTS)}",
            expected="nothing is refused, in ASK and health neither",
        ) as row,
        RedisStore(url, ttl_s=100, deadline_s=PATIENT_S, read_replicas=read_replicas) as store,
    ):
        forget_denied(cluster)
        prepared(cluster, store)
        check_all_there(store)
        source, target, *_ = masters(cluster)
        with one_slot_moving(store, cluster, source, target) as (here, gone):
            forget_denied(cluster)
            with patient(store):
                # A replica does not know that a slot moves: what has gone is a miss there.
                assert ask(store, [here, gone], SIZE) == [True, not read_replicas]
                fill(store, [here, gone], SIZE)
                assert store.probe([here]) == 1 and all(store.touch_many([here, gone]))
                assert store.delete_many([here, gone]) == 2
        assert denied(cluster) == [] and not store.stats().faults
        row.seen = {"refused": 0, "redirects": store.stats().redirects}


@contextlib.contextmanager
def one_slot_moving(
    store: RedisStore, cluster: RedisCluster, source: int, target: int
) -> Iterator[tuple[bytes, bytes]]:
    """A slot of two keys, of which the first is still there and the second has gone."""
    at = owners(cluster, TAGS)
    tag = next(tag for tag in TAGS if at[tag] == source)
    here, gone, slot = tag + b"here", tag + b"gone", key_slot(name_of(tag))
    put_all(store, [here, gone])
    begin_to_move(slot, source, target)
    client_at(source).execute_command("MIGRATE", "127.0.0.1", target, name_of(gone), 0, 5000)
    replicated([source, target])
    try:
        yield here, gone
    finally:
        client_at(source).execute_command("MIGRATE", "127.0.0.1", target, name_of(here), 0, 5000)
        third = set(masters(cluster)) - {source, target}
        for giver, taker in ((source, target), (target, source)):  # there and back: a slot that stays half open is none
            if giver == target:
                begin_to_move(slot, giver, taker)
                move_keys(slot, giver, taker, 10, 0)
            end_to_move(slot, giver, taker, third)


@pytest.mark.fault(number=26)
@pytest.mark.cluster
@pytest.mark.parametrize("right", ["cluster|slots", "asking", "readonly"])
def test_a_right_that_only_clusters_need_is_missing(book: Book, cluster: RedisCluster, right: str) -> None:
    with RedisStore(cluster.url, deadline_s=PATIENT_S) as other:
        prepared(cluster, other)
        source, target, *_ = masters(cluster)
        url = make_user(cluster, without=right)
        forget_denied(cluster)
        with (
            book(f"no right to {right.upper()}", injected=f"ACL without +{right}", expected="auth") as row,
            RedisStore(url, deadline_s=PATIENT_S, read_replicas=right == "readonly") as store,
            one_slot_moving(other, cluster, source, target) as (here, gone),
        ):
            keys = [here, gone] if right == "asking" else [here, KEYS[0]]
            found = ask(store, keys, SIZE)
            health = store.health()
            row.seen = {"health": health.detail.partition(": ")[2], "misses": dict(store.stats().misses)}
            assert found == [right == "asking", False]
            assert right in denied(cluster)
            # Without +asking this is "moved" as long as `Pool.exchange` takes no notice of what ASKING was answered.
            assert store.stats().misses == Counter(auth=found.count(False))
            if right != "asking":
                assert not health.ok and "auth" in health.detail and right in health.detail
            assert all(node.breaker.state == "closed" for node in store.nodes)
