"""Which server of a cluster is asked for which key, and what becomes of a batch when slots move and maps lie."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError

from kvlab.stores import RedisStore
from kvlab.stores.deadline import Deadline
from kvlab.stores.redis.cluster import Cluster
from kvlab.stores.redis.discovery import MAX_SERVERS, PAUSE_S, SLOTS
from kvlab.stores.redis.node import Node
from kvlab.stores.redis.pool import Pool
from kvlab.stores.redis.store import MAX_REDIRECTS
from kvlab.stores.redis.topology import Shard, SubBatch
from kvlab.testbed.server import free_port
from tests.harness.helpers import FakeClock
from tests.stores.redis.scripted import (
    A2,
    CLOSED,
    HOST,
    LONG_S,
    SHORT_S,
    SILENT,
    THIRDS,
    A,
    B,
    C,
    Said,
    SlotMap,
    bounded,
    line,
    name,
    opened,
    resp,
    says,
    slot,
    values,
)

# --- a batch is divided -------------------------------------------------------------------------


def known_cluster(holes: set[int] = frozenset()) -> Cluster:  # type: ignore[assignment]
    """A map of four masters, in sixteen stripes; the holes are nobody's. Nothing is asked."""
    made = Cluster([], lambda host, port: Node(f"{host}:{port}", Pool("redis://h", 1), 1), False, time.monotonic)
    shards = [Shard(made._node("10.0.0.1", 1 + i)) for i in range(4)]
    width = SLOTS // 16
    made._slots = [None if at // width in holes else shards[at // width % 4] for at in range(SLOTS)]
    made._by_master = {shard.master: shard for shard in shards}
    made._known, made._requested_at = True, time.monotonic()
    return made


@given(keys=st.lists(st.binary(max_size=8), max_size=40), holes=st.sets(st.integers(0, 15)))
def test_split_has_each_index_once_with_the_server_of_its_slot(keys: list[bytes], holes: set[int]) -> None:
    topology = known_cluster(holes)
    parts, why = topology.split(keys, Deadline(LONG_S))
    placed = {i: part.node for part in parts for i in part.indices}
    assert sum(len(part.indices) for part in parts) == len(placed)
    assert len({part.node for part in parts}) == len(parts) and not any(part.asking for part in parts)
    for i, key in enumerate(keys):
        shard = topology._slots[key_slot(key)]
        assert placed.pop(i, None) is (shard.master if shard else None)
    assert not placed
    assert why == ("down" if any(topology._slots[key_slot(key)] is None for key in keys) else None)


REPLIES = st.one_of(
    st.sampled_from([b"value", None, 1, MovedError("5 10.0.0.1:2"), MovedError("7 :3"), AskError("5 10.0.0.1:2")]),
    st.builds(
        lambda kind, slot, port: kind(f"{slot} 10.0.0.2:{port}"),
        st.sampled_from([MovedError, AskError]),
        st.integers(-1, SLOTS),
        st.integers(-1, 65537),
    ),
)


@given(replies=st.lists(REPLIES, max_size=30), start=st.integers(0, 5))
def test_redirect_has_each_index_at_most_once_and_all_that_can_be_followed(replies: list[Any], start: int) -> None:
    topology = known_cluster()
    part = SubBatch(topology.shards()[0].master, range(start, start + len(replies)))
    before = list(topology._slots)
    found = topology.redirect(part, replies)
    placed = {i: (one.node.name, one.asking) for one in found for i in one.indices}
    assert sum(len(one.indices) for one in found) == len(placed)
    expected = {}
    for i, reply in zip(part.indices, replies, strict=True):
        if isinstance(reply, AskError) and 0 <= reply.slot_id < SLOTS and 0 < reply.port < 65536:
            where = f"{reply.host or '10.0.0.1'}:{reply.port}"
            expected[i] = where, type(reply) is AskError
            if type(reply) is MovedError:
                before[reply.slot_id] = where  # type: ignore[call-overload]
    assert placed == expected
    names = [shard if isinstance(shard, str) else shard.master.name for shard in before]  # type: ignore[union-attr]
    assert [shard.master.name for shard in topology._slots] == names  # type: ignore[union-attr]


def test_tags_in_braces_decide_the_slot(cluster: SlotMap) -> None:
    with opened(cluster.url) as store:
        keys = [b"{same}%d" % i for i in range(10)]
        store.put_many(keys, keys)
        assert sorted(len(cluster.asked(at, b"SET")) for at in range(3)) == [0, 0, 10]


# --- MOVED and ASK ------------------------------------------------------------------------------


def test_moved_is_followed_at_once_and_remembered(cluster: SlotMap, clock: FakeClock) -> None:
    cluster.twist = says("MOVED", A, cluster.address(1), 0)
    with opened(cluster.url, clock=clock) as store:
        assert store.get_many([A, A2, B]) == values(A, A2, B)
        assert len(cluster.asked(0, b"GET")) == 2 and store.stats().redirects == 1
        cluster.forget()
        assert store.get_many([A, A2, B]) == values(A, A2, B)
        assert [command[1] for command in cluster.asked(0, b"GET")] == [name(A2)]
        assert store.stats().redirects == 1 and store.stats().misses == Counter()
        assert store.put_many([A], [b"new"]) == 1 and store.get_many([A]) == [b"new"]


def test_a_fill_of_the_callers_buffers_follows_too(cluster: SlotMap) -> None:
    cluster.twist = says("MOVED", A, cluster.address(1), 0)
    with opened(cluster.url, ttl_s=100) as store:
        out = [memoryview(bytearray(b"\xaa" * 32)) for _ in range(3)]
        got = store.get_many([B, A, A2], out)
        assert [bytes(view) for view in got if view is not None] == values(B, A, A2)
        assert [view.obj is buffer.obj for view, buffer in zip(got, out, strict=True)] == [True] * 3  # type: ignore


def test_probe_touch_and_delete_follow(cluster: SlotMap) -> None:
    cluster.twist = says("MOVED", A, cluster.address(1), 0)
    for call, expected in ((RedisStore.probe, 2), (RedisStore.touch_many, [True, True]), (RedisStore.delete_many, 2)):
        with opened(cluster.url, ttl_s=100) as store:
            assert call(store, [B, A]) == expected  # type: ignore[operator]
            commands = 2 if call is RedisStore.touch_many else 1  # for each key
            assert store.stats().redirects == commands and store.stats().requested == 0


def test_ask_is_followed_with_asking_before_each_command_and_not_remembered(cluster: SlotMap) -> None:
    keys = [b"{t}%d" % i for i in range(3)]
    there = next(at for at, (first, last) in enumerate(THIRDS) if first <= key_slot(b"kv:{t}") <= last)
    other = (there + 1) % 3
    cluster.data |= {name(key): b"value of " + key for key in keys}

    def migrating(at: int, command: list[bytes]) -> Said:
        return resp(f"ASK {slot(keys[0])} {cluster.address(other)}") if at == there and len(command) > 1 else ...

    with opened(cluster.url, ttl_s=100) as store:
        store.get_many([A, B, C])  # the map is known
        cluster.twist = migrating
        for calls in (1, 2):
            cluster.forget()
            assert store.get_many(keys) == values(*keys)
            heard = [command[0] for command in cluster.asked(other)]
            assert heard[0::2] == [b"ASKING"] * 6 and heard[1::2] == [b"GET"] * 3 + [b"PEXPIRE"] * 3
            assert len(cluster.asked(there, b"GET")) == 3 and store.stats().redirects == 3 * calls
        cluster.forget()
        assert store.put_many(keys[:2], [b"1", b"2"]) == 2
        assert [c[0] for c in cluster.asked(other) if c[0] != b"INFO"] == [b"ASKING", b"SET"] * 2


def test_of_one_batch_some_keys_move_some_are_asked_for_and_some_stay(cluster: SlotMap) -> None:
    moved, asked = says("MOVED", A, cluster.address(2), 0), says("ASK", A2, cluster.address(2), 0)
    cluster.twist = lambda at, command: moved(at, command) if moved(at, command) is not ... else asked(at, command)
    with opened(cluster.url) as store:
        assert store.get_many([A2, B, A, C]) == values(A2, B, A, C)
        assert store.stats().redirects == 2
        assert [command[0] for command in cluster.asked(2)].count(b"ASKING") == 1
        assert store.get_many([A2, A]) == values(A2, A)
        assert store.stats().redirects == 3


@pytest.mark.parametrize("kind", ["MOVED", "ASK"])
def test_two_servers_that_send_each_other_a_key_are_left_after_a_few_questions(cluster: SlotMap, kind: str) -> None:
    to_b, to_a = says(kind, A, cluster.address(1), 0), says(kind, A, cluster.address(0), 1)
    cluster.twist = lambda at, command: (to_b if at == 0 else to_a)(at, command)
    with opened(cluster.url) as store:
        why: list[str] = []
        assert store.get_many([A, B], reasons=why) == [None, *values(B)] and why == ["moved", ""]
        questions = sum([c[:2] == [b"GET", name(A)] for at in range(3) for c in cluster.asked(at)])
        assert questions == MAX_REDIRECTS + 1
        stats = store.stats()
        assert (stats.misses, stats.faults) == (Counter(moved=1), Counter(moved=1))
        assert stats.redirects == MAX_REDIRECTS
        assert store.put_many([A], [b"new"]) == 0
        assert (store.stats().drops, store.stats().faults) == (Counter(moved=1), Counter(moved=2))
        assert [node.breaker.state for node in store.nodes] == ["closed"] * 3


def test_a_chain_to_ever_new_servers_ends_and_leaves_none_behind(clock: FakeClock) -> None:
    with SlotMap(8, [(0, SLOTS - 1, 0)]) as cluster, opened(cluster.url_of(0), clock=clock) as store:
        cluster.twist = lambda at, c: (
            resp(f"MOVED {slot(A)} {cluster.address((at + 1) % 8)}") if c[0] == b"GET" else ...
        )
        for _ in range(3):
            assert store.get_many([A]) == [None]
        assert store.stats().misses == Counter(moved=3) and store.stats().faults == Counter(moved=3)
        assert store.stats().redirects == 3 * MAX_REDIRECTS
        assert len(store._topology._nodes) > 1
        cluster.twist = lambda at, command: ...
        clock.now += PAUSE_S
        store.get_many([A])
        assert len(store.nodes) == len(store._topology._nodes) == 1


def test_servers_heard_of_stay_few_though_nobody_tells_the_map_again(clock: FakeClock) -> None:
    with SlotMap(1, [(0, SLOTS - 1, 0)]) as cluster, opened(cluster.url, clock=clock) as store:
        store.get_many([A])
        port = iter(range(700, 1000))  # where hardly anybody listens
        cluster.twist = lambda at, c: (
            resp(f"MOVED {slot(A)} 127.0.0.1:{next(port)}") if c[0] == b"GET" else b"-NOPERM no\r\n"
        )
        for _ in range(100):
            clock.now += PAUSE_S
            store._topology._slots = [store._topology.shards()[0]] * SLOTS  # as many slots would do
            store.get_many([A])
        assert len(store._topology._nodes) <= 64


def test_moved_without_a_host_means_the_same_host(cluster: SlotMap) -> None:
    cluster.twist = says("MOVED", A, f":{cluster.port(1)}", 0)
    with opened(cluster.url) as store:
        assert store.get_many([A]) == values(A)
        assert {node.name for node in store.nodes} == {cluster.address(at) for at in range(3)}


@pytest.mark.parametrize(
    "said",
    [
        "MOVED",
        "MOVED 1",
        "MOVED 1 ",
        "MOVED 1 127.0.0.1",
        "MOVED 1 127.0.0.1:",
        "MOVED 1 127.0.0.1:port",
        "MOVED 1 127.0.0.1:0",
        "MOVED 1 127.0.0.1:-1",
        "MOVED 1 127.0.0.1:99999",
        "MOVED 1 127.0.0.1:1 more",
        "MOVED -1 127.0.0.1:7000",
        "MOVED 16384 127.0.0.1:7000",
        "MOVED 20000 127.0.0.1:7000",
        "MOVED x 127.0.0.1:7000",
        "MOVED 99999999999999999999 127.0.0.1:7000",
        "MOVED 1 127.0.0.1:99999999999999999999",
        f"MOVED 1 {'ü' * 70}:1",
        "ASK 1",
        "ASK 1 127.0.0.1:0",
        "ASK 20000 127.0.0.1:7000",
        "ASK",
        "TRYAGAIN later",
        "MOVED 1 [::1]:1",
        "MOVED 1 [:1",
        "MOVED 1 h/x:1",
        "ASK 1 h]:1",
        "MOVED 1 h℀:1",
    ],
)
def test_a_redirect_that_names_no_server_is_a_counted_miss(cluster: SlotMap, said: str) -> None:
    cluster.twist = lambda at, command: resp(said) if command[0] in (b"GET", b"SET", b"EXISTS") and at == 0 else ...
    with opened(cluster.url, deadline_s=2) as store:
        assert store.get_many([A, B]) == [None, *values(B)]
        assert set(store.stats().misses) <= {"moved", "protocol", "conn", "error"}
        assert store.put_many([A], [b"x"]) == store.probe([A]) == 0
        store.stats().check()


def test_a_redirect_to_a_dead_server_costs_its_keys_alone(cluster: SlotMap) -> None:
    cluster.twist = says("MOVED", A, f"127.0.0.1:{free_port()}", 0)
    with opened(cluster.url) as store:
        assert store.get_many([A, A2, B]) == [None, *values(A2, B)]
        assert store.stats().misses == Counter(conn=1)


# --- maps that are nonsense ---------------------------------------------------------------------


NONSENSE: list[tuple[str, Said, set[str]]] = [
    ("a number", b":1\r\n", {"protocol"}),
    ("a text", b"$2\r\nhi\r\n", {"protocol"}),
    ("OK", b"+OK\r\n", {"protocol"}),
    ("nothing", b"*-1\r\n", {"protocol"}),
    ("null", b"$-1\r\n", {"protocol"}),
    ("a list of numbers", resp([1, 2, 3]), {"protocol"}),
    ("a line that is too short", line(0, 1), {"protocol"}),
    ("no servers", line(0, 16383, []), {"protocol"}),
    ("text for slots", line(b"0", b"16383", [HOST, 1]), {"protocol"}),
    ("null for slots", line(None, None, [HOST, 1]), {"protocol"}),
    ("a slot too many", line(0, 16384, [HOST, 1]), {"protocol"}),
    ("many slots too many", line(0, 1 << 60, [HOST, 1]), {"protocol"}),
    ("slots below zero", line(-1, 5, [HOST, 1]), {"protocol"}),
    ("slots the wrong way", line(9, 5, [HOST, 1]), {"protocol"}),
    ("no port", line(0, 16383, [HOST]), {"protocol"}),
    ("port 0", line(0, 16383, [HOST, 0]), {"protocol"}),
    ("port 65536", line(0, 16383, [HOST, 65536]), {"protocol"}),
    ("a port below zero", line(0, 16383, [HOST, -7]), {"protocol"}),
    ("no number for a port", line(0, 16383, [HOST, b"port"]), {"protocol"}),
    ("null for a port", line(0, 16383, [HOST, None]), {"protocol"}),
    ("a number for a host", line(0, 16383, [1, 1]), {"protocol"}),
    ("a list for a host", line(0, 16383, [[HOST], 1]), {"protocol"}),
    ("?", line(0, 16383, [b"?", 1]), {"down"}),
    ("a host that no URL can hold", line(0, 16383, [b"h/[", 1]), {"protocol", "error"}),
    ("an error for a host", b"*1\r\n*3\r\n:0\r\n:9\r\n*2\r\n-ERR x\r\n:1\r\n", {"protocol"}),
    ("a line of errors", b"*2\r\n-ERR x\r\n-ERR y\r\n", {"protocol"}),
    ("lists in lists", b"*1\r\n" * 5000, {"protocol", "timeout"}),
    ("lists without end", b"*1\r\n" * 8 + b"*-7\r\n", {"protocol"}),
    ("HTTP", b"HTTP/1.1 400 Bad Request\r\n\r\n", {"protocol"}),
    ("not allowed", b"-NOPERM no permissions to run 'cluster|slots'\r\n", {"auth"}),
    ("no cluster", b"-ERR This instance has cluster support disabled\r\n", {"protocol"}),
    ("a password is wanted", b"-NOAUTH Authentication required.\r\n", {"auth"}),
    ("loading", b"-LOADING Redis is loading\r\n", {"loading"}),
    ("the cluster is down", b"-CLUSTERDOWN no\r\n", {"down"}),
    ("a redirect", b"-MOVED 1 127.0.0.1:1\r\n", {"moved", "conn"}),
    ("a redirect to nowhere", b"-MOVED\r\n", {"moved", "protocol", "error"}),
    ("hanging up", CLOSED, {"conn"}),
    ("silence", SILENT, {"timeout"}),
    ("half of it", b"*1\r\n*3\r\n:0\r\n:1638", {"timeout"}),
    ("a long list that does not come", b"*1000000\r\n", {"timeout"}),
]


@pytest.mark.parametrize(("said", "reasons"), [pytest.param(*rest, id=what) for what, *rest in NONSENSE])
def test_a_map_that_is_nonsense_is_a_counted_miss(said: Said, reasons: set[str]) -> None:
    with SlotMap(1) as cluster, opened(cluster.url, deadline_s=SHORT_S) as store:
        cluster.said = said
        why: list[str] = []
        assert bounded(lambda: store.get_many([A, B], reasons=why)) == [None, None]
        assert set(why) <= reasons and store.put_many([A], [b"x"]) == store.probe([A]) == 0
        assert set(store.stats().faults) <= reasons
        health = bounded(store.health)
        assert not health.ok and any(f"{reason}: " in health.detail for reason in reasons), health
        assert "\n" not in health.detail and cluster.asked(0, b"GET", b"SET") == []
        cluster.said, cluster.lines = ..., [(0, SLOTS - 1, 0)]
        store.deadline_s = LONG_S
        assert store.health().ok


def test_an_empty_map_means_that_no_server_has_anything() -> None:
    with SlotMap(1) as cluster, opened(cluster.url) as store:
        cluster.said = b"*0\r\n"
        assert store.get_many([A, B]) == [None, None] and store.stats().misses == Counter(down=2)
        assert not store.health().ok and "no slot has a server" in store.health().detail


def test_one_server_that_has_left_the_cluster_does_not_hide_the_others(cluster: SlotMap) -> None:
    cluster.twist = lambda at, command: b"*0\r\n" if at == 0 and command[0] == b"CLUSTER" else ...
    cluster.lines = [(0, SLOTS - 1, 1)]
    got = []
    for _ in range(12):  # whom it asks first is drawn by lot
        with opened(cluster.url) as store:
            got.append(store.get_many([A]))
    assert got == [values(A)] * 12


@pytest.mark.parametrize("host", [None, b""])
def test_a_host_that_is_not_named_is_the_one_that_was_asked(host: bytes | None) -> None:
    with SlotMap(2) as cluster, opened(cluster.url_of(0)) as store:
        cluster.said = line(0, SLOTS - 1, [host, cluster.port(1)])
        assert store.put_many([A], [b"x"]) == 1 and store.get_many([A]) == [b"x"]
        assert [node.name for node in store.nodes] == [cluster.address(1)]


def test_a_map_in_the_way_of_old_servers_will_do() -> None:
    with SlotMap(1) as cluster, opened(cluster.url) as store:
        cluster.said = line(0, SLOTS - 1, [HOST, cluster.port(0)])  # no ids
        assert store.put_many([A], [b"x"]) == 1


def test_servers_of_a_map_that_was_not_believed_are_not_asked(cluster: SlotMap, clock: FakeClock) -> None:
    good = [HOST, cluster.port(0)]
    cluster.said = resp([*([i, i, [HOST, 20_000 + i]] for i in range(200)), [0, SLOTS, good]])
    with opened(cluster.url_of(0), clock=clock) as store:
        assert store.get_many([A]) == [None]
        assert store._topology._nodes == {}


def test_a_map_as_slow_as_drops_is_bounded_by_the_deadline() -> None:
    stop = threading.Event()
    with SlotMap(1) as cluster, opened(cluster.url, deadline_s=SHORT_S) as store:

        def drip(at: int, command: list[bytes]) -> Said:
            connection = cluster.servers[0]._open[-1]
            connection.sendall(b"*1000\r\n")
            while not stop.wait(0.02):
                connection.sendall(b":1\r\n")
            return CLOSED

        cluster.twist = drip
        assert bounded(lambda: store.get_many([A])) == [None] and store.stats().misses == Counter(timeout=1)
        stop.set()


def test_a_map_of_more_servers_than_a_cluster_can_have_is_not_believed() -> None:
    with SlotMap(1) as cluster, opened(cluster.url, deadline_s=SHORT_S) as store:
        cluster.said = resp([[0, 0, [HOST, 20_000 + i]] for i in range(MAX_SERVERS + 1)])
        why: list[str] = []
        assert bounded(lambda: store.get_many([A], reasons=why)) == [None] and why == ["protocol"]
        assert store._topology._nodes == {}


# --- slots that no server has -------------------------------------------------------------------


def test_slots_that_no_server_has_cost_their_keys_alone(cluster: SlotMap) -> None:
    cluster.lines = cluster.lines[:2]
    with opened(cluster.url) as store:
        why: list[str] = []
        assert store.get_many([C, A, B], reasons=why) == [None, *values(A, B)] and why == ["down", "", ""]
        assert store.put_many([A, C], [b"1", b"2"]) == 1
        assert (store.stats().misses, store.stats().drops) == (Counter(down=1), Counter(down=1))
        assert store.stats().faults == Counter(down=2)
        assert store.touch_many([C, A]) == [False, True] and store.delete_many([C, A]) == 1
        health = store.health()
        assert not health.ok and f"{SLOTS - THIRDS[2][0]} of {SLOTS} slots have no server" in health.detail


def test_slots_that_a_server_has_again_are_found_after_the_pause(cluster: SlotMap, clock: FakeClock) -> None:
    whole, cluster.lines = cluster.lines, cluster.lines[:2]
    with opened(cluster.url, clock=clock) as store:
        assert store.get_many([C]) == [None]
        cluster.lines = whole
        assert store.get_many([C]) == [None]
        clock.now += PAUSE_S
        assert store.get_many([C]) == values(C)


# --- replicas -----------------------------------------------------------------------------------


def test_reads_go_to_replicas_and_all_else_to_masters(replicated: SlotMap) -> None:
    with opened(replicated.url, ttl_s=100, read_replicas=True) as store:
        assert store.put_many([A, B], [b"1", b"2"]) == 2
        assert store.get_many([A, B]) == [b"1", b"2"]
        assert store.probe([A, B]) == 2
        assert [bool(replicated.asked(at, b"GET", b"EXISTS")) for at in range(4)] == [False, False, True, True]
        assert store.touch_many([A, B]) == [True, True]
        assert [bool(replicated.asked(at, b"EXISTS")) for at in range(4)] == [True, True, True, True]
        assert [len(replicated.asked(at, b"SET")) for at in range(4)] == [1, 1, 0, 0]
        assert [len(replicated.asked(at, b"PEXPIRE")) for at in range(4)] == [2, 2, 0, 0]
        assert store.delete_many([A, B]) == 2
        assert [len(replicated.asked(at, b"DEL")) for at in range(4)] == [1, 1, 0, 0]
        assert [len(replicated.asked(at, b"READONLY")) for at in range(4)] == [1, 1, 1, 1]


def test_without_being_told_so_replicas_are_not_asked(replicated: SlotMap) -> None:
    with opened(replicated.url_of(0), ttl_s=100) as store:
        for _ in range(5):
            assert store.get_many([A, B]) == values(A, B)
        assert replicated.asked(2) == replicated.asked(3) == [] and replicated.asked(0, b"READONLY") == []


def test_readonly_is_said_once_a_connection(replicated: SlotMap) -> None:
    with opened(replicated.url_of(0), read_replicas=True) as store:
        for _ in range(10):
            assert store.get_many([A, B]) == values(A, B)
        assert [command[0] for command in replicated.asked(2)] == [b"READONLY"] + [b"GET"] * 10


@pytest.mark.parametrize("said", [CLOSED, SILENT, b"-LOADING no\r\n", b"-MASTERDOWN no\r\n"])
def test_a_replica_that_fails_is_left_for_its_master_and_tried_again(
    replicated: SlotMap, clock: FakeClock, said: Said
) -> None:
    with opened(replicated.url, deadline_s=1 if said == SILENT else LONG_S, read_replicas=True, clock=clock) as store:
        assert store.get_many([A]) == values(A)
        replicated.twist = lambda at, command: said if at == 2 and command[0] == b"GET" else ...
        for _ in range(3):
            assert store.get_many([A, B]) == [None, *values(B)]
        replicated.forget()
        for _ in range(5):
            assert store.get_many([A, B]) == values(A, B)
        assert replicated.asked(2) == [] and len(replicated.asked(0, b"GET")) == 5
        clock.cool_down()
        assert store.get_many([A]) == [None] and len(replicated.asked(2, b"GET")) == 1
        replicated.twist = lambda at, command: ...
        assert store.get_many([A]) == values(A)  # its master
        clock.cool_down()
        replicated.forget()
        assert store.get_many([A]) == values(A) and len(replicated.asked(2, b"GET")) == 1
        assert sum(store.stats().misses.values()) == 4


def test_only_what_a_replica_had_is_refreshed(replicated: SlotMap) -> None:
    with opened(replicated.url, ttl_s=100, read_replicas=True) as store:
        assert store.get_many([b"absent", A, b"none", B, A]) == [None, *values(A), None, *values(B, A)]
        refreshed = [command[1:] for at in (0, 1) for command in replicated.asked(at, b"PEXPIRE")]
        assert refreshed == [[name(key), b"100000", b"GT"] for key in (A, A, B)]


@pytest.mark.parametrize("ttl_s", [None, 100])
@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_several_replicas_share_the_reads(replicas: int, ttl_s: float | None) -> None:
    lines = [(0, SLOTS - 1, *range(replicas + 1))]
    with SlotMap(replicas + 1, lines) as cluster, opened(cluster.url, ttl_s=ttl_s, read_replicas=True) as store:
        cluster.data[name(A)] = b"here"
        for _ in range(3 * replicas):
            store.get_many([A])
        assert [len(cluster.asked(at, b"GET")) for at in range(replicas + 1)] == [0] + [3] * replicas


@pytest.mark.parametrize("read_replicas", [False, True])
@pytest.mark.parametrize(
    ("said", "reason"), [(b"-NOPERM no\r\n", "auth"), (b"-ERR unknown command 'PEXPIRE'\r\n", "response")]
)
def test_hits_whose_ttl_the_server_refuses_to_refresh_are_misses(
    replicated: SlotMap, said: bytes, reason: str, read_replicas: bool
) -> None:
    with opened(replicated.url, ttl_s=100, read_replicas=read_replicas) as store:
        assert store.get_many([A]) == values(A)
        replicated.twist = lambda at, command: said if command[0] == b"PEXPIRE" else ...
        assert store.get_many([A]) == [None] and store.stats().misses == Counter({reason: 1})


def test_what_is_absent_stays_absent_where_refreshing_is_refused_at_masters(replicated: SlotMap) -> None:
    replicated.twist = lambda at, command: b"-NOPERM no\r\n" if command[0] == b"PEXPIRE" else ...
    with opened(replicated.url, ttl_s=100, read_replicas=True) as store:
        assert store.get_many([A, b"absent"]) == [None, None]
        assert store.stats().misses == Counter(auth=1, absent=1)


def test_a_master_that_does_not_refresh_takes_no_value_from_a_replicas_reader(replicated: SlotMap) -> None:
    replicated.twist = lambda at, command: CLOSED if command[0] == b"PEXPIRE" else ...
    with opened(replicated.url, ttl_s=100, read_replicas=True) as store:
        assert store.get_many([A, B]) == values(A, B)
        assert store.stats().misses == Counter() and store.stats().faults == Counter(conn=2)
