"""What the Redis store does beyond the contract: batches over several servers, rights, round trips, sizes, forks."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kvlab.errors import ConfigError, InputError
from kvlab.stores import RedisStore
from kvlab.stores.deadline import Deadline
from kvlab.stores.redis.connection import Connection
from kvlab.stores.redis.discovery import PAUSE_S
from kvlab.stores.redis.node import WINDOW_BYTES, Answer, Batch, Node
from kvlab.stores.redis.reasons import reason_of
from kvlab.stores.redis.store import KEY_PREFIX, _answers
from kvlab.stores.redis.topology import SubBatch
from kvlab.stores.workers import Workers
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import RedisServer, valkey_program
from tests.harness.helpers import FakeClock
from tests.harness.scripted import ScriptedServer
from tests.stores.redis.scripted import (
    A2,
    B2,
    CLOSED,
    LONG_S,
    SILENT,
    THIRDS,
    A,
    B,
    C,
    Many,
    Said,
    SlotMap,
    bounded,
    key_of,
    name,
    opened,
    resp,
    slot,
    values,
)

VALUE = os.urandom(200_000)


# --- split and join -----------------------------------------------------------------------------


def test_each_server_gets_its_own_keys_and_the_batch_keeps_its_order(cluster: SlotMap) -> None:
    batch = [C, A, b"absent", B2, A2, A, C, B]
    expected = [cluster.data.get(name(key)) for key in batch]
    with opened(cluster.url) as store:
        assert store.get_many(batch) == expected
        for at, (first, last) in enumerate(THIRDS):
            heard = [command[1] for command in cluster.asked(at, b"GET")]
            assert heard == [name(key) for key in batch if first <= slot(key) <= last]
        out = [memoryview(bytearray(32)) for _ in batch]
        assert [None if got is None else bytes(got) for got in store.get_many(batch, out)] == expected
        assert store.stats().misses == Counter(absent=2) and store.stats().faults == Counter()


def test_each_server_is_asked_once_for_all_of_its_keys(cluster: SlotMap, monkeypatch: pytest.MonkeyPatch) -> None:
    trips: list[int] = []
    exchange = Connection.exchange

    def counted(self: Connection, commands: Any, *others: Any, **more: Any) -> Any:
        trips.append(len(commands))
        return exchange(self, commands, *others, **more)

    monkeypatch.setattr(Connection, "exchange", counted)
    with opened(cluster.url, ttl_s=100) as store:
        keys = [key_of(at, number) for number in range(4) for at in range(3)]
        store.get_many(keys)
        assert trips == [8, 8, 8]  # GET and PEXPIRE
        trips.clear()
        assert store.put_many(keys, keys) == 12
        assert sorted(trips) == [1, 1, 1, 4, 4, 4]  # INFO comes first, once
        trips.clear()
        assert (store.probe(keys), store.touch_many(keys), store.delete_many(keys)) == (12, [True] * 12, 12)
        assert trips == [4] * 3 + [8] * 3 + [4] * 3  # a touch: PEXPIRE and EXISTS
        assert cluster.questions() == 1


def test_the_servers_of_a_batch_are_asked_at_the_same_time(cluster: SlotMap) -> None:
    together = threading.Barrier(3)

    def wait_for_all(at: int, command: list[bytes]) -> Said:
        if command[0] == b"GET":
            together.wait(LONG_S)
        return ...

    cluster.twist = wait_for_all
    with opened(cluster.url) as store:
        assert store.get_many([A, B, C]) == values(A, B, C)


def test_a_batch_for_one_server_starts_no_threads(cluster: SlotMap, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    start = Node.start
    monkeypatch.setattr(Node, "start", lambda node, *work: started.append(node.name) or start(node, *work))
    with opened(cluster.url, ttl_s=100) as store:
        assert store.get_many([A, A2, A]) == values(A, A2, A)
        store.put_many([A, A2], [b"1", b"2"])
        assert (store.probe([A]), store.touch_many([A]), store.delete_many([A2])) == (1, [True], 1)
        assert started == []
        store.get_many([A, B, C])
        assert started == [cluster.address(1), cluster.address(2)]


def test_a_key_twice_in_a_batch_is_answered_twice_and_the_last_write_stays(cluster: SlotMap) -> None:
    with opened(cluster.url) as store:
        assert store.put_many([A, B, A, B], [b"1", b"2", b"3", b"4"]) == 4
        assert store.get_many([B, A, A, B]) == [b"4", b"3", b"3", b"4"]
        assert store.delete_many([A, B, A]) == 2


def test_a_server_alone_is_asked_by_the_callers_own_thread() -> None:
    threads: set[int] = set()
    with ScriptedServer(lambda command: b"$-1\r\n") as server, RedisStore(server.url, deadline_s=LONG_S) as store:
        work = Node.round_trip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Node, "round_trip", lambda *a, **k: threads.add(threading.get_ident()) or work(*a, **k))
            store.get_many([A, B])
        assert threads == {threading.get_ident()} and store.nodes[0]._workers is None


def test_a_whole_batch_is_answered_while_the_interpreter_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(self: Workers, work: Any) -> Any:
        raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr(Workers, "submit", ending)
    with SlotMap() as cluster, opened(cluster.url) as store:
        assert store.put_many([A, B], values(A, B)) == 2 and store.get_many([B, A]) == values(B, A)
        assert store.health().ok


def test_a_signal_in_the_middle_of_a_batch_leaves_no_thread_that_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(BaseException): ...

    heard, held, late = threading.Event(), threading.Event(), []
    with SlotMap() as cluster, opened(cluster.url) as store:
        cluster.data |= {b"kv:" + key: b"value of " + key for key in (A, B)}
        store.get_many([A, B])

        def slow(at: int, command: list[bytes]) -> Any:
            if at == 1:
                heard.set()
                held.wait(LONG_S)
            return ...

        cluster.twist = slow
        exchange = Connection.exchange

        def interrupted(self: Connection, commands: Any, deadline: Deadline, *others: Any, **more: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                heard.wait(LONG_S)
                threading.Timer(0.1, held.set).start()
                raise Interrupted
            replies = exchange(self, commands, deadline, *others, **more)
            late.append(deadline.passed)
            return replies

        monkeypatch.setattr(Connection, "exchange", interrupted)
        room = [memoryview(bytearray(32)) for _ in range(2)]
        with pytest.raises(Interrupted):
            store.get_many([A, B], room)
        assert late == [True]  # it has ended, and before that learned that nobody waits


@pytest.mark.parametrize("when", ["before it begins", "when it has begun"])
def test_a_signal_between_two_servers_leaves_no_thread_that_writes(
    cluster: SlotMap, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    class Interrupted(BaseException): ...

    start, go_on = Node.start, threading.Event()

    def interrupted(node: Node, *work: Any) -> None:
        if when == "when it has begun":
            start(node, *work)
        threading.Timer(0.1, go_on.set).start()
        raise Interrupted

    def slow(at: int, command: list[bytes]) -> Said:
        go_on.wait(LONG_S)
        return ...

    with opened(cluster.url) as store:
        store.get_many([A, B, C])
        cluster.twist = slow
        monkeypatch.setattr(Node, "start", interrupted)
        room = [memoryview(bytearray(32)) for _ in range(3)]
        with pytest.raises(Interrupted):
            store.get_many([A, B, C], room)
        before = [bytes(buffer) for buffer in room]
        monkeypatch.undo()
        assert go_on.wait(LONG_S) and store.get_many([A, B, C]) == values(A, B, C)
        assert [bytes(buffer) for buffer in room] == before


def test_a_server_is_not_blamed_for_a_deadline_that_others_used_up(cluster: SlotMap) -> None:
    with opened(cluster.url) as store:
        store.get_many([A, B])
        parts = [SubBatch(made, [at]) for at, made in enumerate(store.nodes[:2])]
        cluster.forget()
        answers = _answers(Batch("get", [name(A), name(B)]), parts, Deadline(0))
        assert [[reason_of(reply) for reply in answer.replies] for answer in answers] == [["timeout"], ["timeout"]]
        assert [answer.faults for answer in answers] == [[], []]
        assert [made.breaker.faults for made in store.nodes] == [0, 0, 0]
        assert [cluster.asked(at) for at in range(3)] == [[], [], []]


def test_what_large_values_add_to_one_servers_time_is_the_calls(cluster: SlotMap) -> None:
    with opened(cluster.url) as store:
        store.get_many([A])
        deadline = Deadline(LONG_S)
        ends: list[float] = []
        for at, made in enumerate(store.nodes):

            def send(batch: Batch, indices: Any, deadline: Deadline, asking: bool, at: int = at) -> Answer:
                deadline.extend(5_000_000_000 * (at == 1))
                return Answer([deadline.remaining_to_connect()])

            made.send = send  # type: ignore[method-assign]
        for answer in _answers(Batch("send", [b"a"]), [SubBatch(made, [0]) for made in store.nodes], deadline):
            ends += answer.replies
        assert max(ends[0], ends[2]) <= LONG_S < ends[1]  # each has its own
        assert deadline.remaining_to_connect() > LONG_S


# --- one server's faults cost its own keys alone ------------------------------------------------


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"-CLUSTERDOWN The cluster is down\r\n", "down"),
        (b"-CLUSTERDOWN Hash slot not served\r\n", "down"),
        (b"-LOADING Redis is loading the dataset in memory\r\n", "loading"),
        (b"-MASTERDOWN Link with MASTER is down\r\n", "loading"),
        (b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n", "moved"),
        (b"-NOPERM this user has no permissions\r\n", "auth"),
        (b"-NOAUTH Authentication required.\r\n", "auth"),
        (b"-BUSY Redis is busy running a script.\r\n", "busy"),
        (b"-ERR what\r\n", "response"),
        (b"*2\r\n:1\r\n:2\r\n", "protocol"),
        (CLOSED, "conn"),
    ],
)
def test_what_one_server_refuses_costs_its_keys_alone(cluster: SlotMap, said: Said, reason: str) -> None:
    cluster.twist = lambda at, command: said if at == 0 and command[0] == b"GET" else ...
    with opened(cluster.url) as store:
        why: list[str] = []
        assert store.get_many([A, B, C], reasons=why) == [None, *values(B, C)]
        assert why == [reason, "", ""] and store.stats().misses == Counter({reason: 1})


def test_readonly_from_a_master_is_a_counted_drop_and_a_hint(cluster: SlotMap, clock: FakeClock) -> None:
    cluster.twist = lambda at, command: resp("READONLY You can't write") if at == 0 and command[0] == b"SET" else ...
    with opened(cluster.url, clock=clock) as store:
        assert store.put_many([A, B], [b"1", b"2"]) == 1 and store.stats().drops == Counter(readonly=1)
        cluster.lines[0] = (*THIRDS[0], 2)  # another has taken over
        clock.now += PAUSE_S
        assert store.put_many([A, B], [b"1", b"2"]) == 2
        assert store.stats().redirects == 0


def test_a_server_that_hangs_costs_its_keys_alone_and_opens_its_breaker_alone(
    cluster: SlotMap, clock: FakeClock
) -> None:
    with opened(cluster.url, deadline_s=1, clock=clock) as store:
        store.get_many([A, B, C])
        cluster.twist = lambda at, command: SILENT if at == 0 else ...
        for _ in range(3):
            assert bounded(lambda: store.get_many([A, B, C])) == [None, *values(B, C)]
        states = {node.name: node.breaker.state for node in store.nodes}
        assert states.pop(cluster.address(0)) == "open" and set(states.values()) == {"closed"}
        cluster.forget()
        assert store.get_many([A, B]) == [None, *values(B)] and cluster.asked(0, b"GET") == []
        assert store.stats().misses == Counter(timeout=3, breaker=1)
        cluster.twist = lambda at, command: ...
        clock.cool_down()
        assert store.get_many([A, B]) == values(A, B)


# --- round trips and sizes -----------------------------------------------------------------------


@pytest.mark.redis
def test_a_probe_is_one_round_trip_and_a_load_one_for_each_window(redis_server: RedisServer) -> None:
    with FaultProxy(redis_server.port) as proxy, RedisStore(proxy.url, ttl_s=100, deadline_s=LONG_S) as store:
        keys = [b"%d" % i for i in range(1024)]
        store.put_many(keys, [b"small"] * 1024)
        value = bytes(192 << 10)
        big, room = keys[:64], [memoryview(bytearray(len(value))) for _ in range(64)]
        store.put_many(big, [value] * 64)
        proxy.reset_counts()
        assert store.probe(keys) == 1024
        assert proxy.round_trips() == 1
        assert None not in store.get_many(big, room)
        assert proxy.round_trips() == 2
        proxy.reset_counts()
        windows = -(-64 * (1 << 20) // WINDOW_BYTES)
        store.get_many(big, [memoryview(bytearray(1 << 20)) for _ in range(64)])
        assert proxy.round_trips() == windows


@pytest.mark.redis
def test_a_value_over_the_servers_share_is_refused_before_a_byte_is_sent() -> None:
    small = RedisServer("--maxmemory", "16mb")
    with small as server, FaultProxy(server.port) as proxy, RedisStore(proxy.url, deadline_s=LONG_S) as store:
        assert store.put_many([b"fits", b"not"], [bytes(1 << 20), bytes((1 << 20) + 1)]) == 1
        assert store.stats().drops == Counter(too_big=1)
        proxy.reset_counts()
        assert store.put_many([b"not"], [bytes(2 << 20)]) == 0
        assert proxy.bytes_up == 0
        assert store.probe([b"fits", b"not"]) == 1


@pytest.mark.redis
def test_the_share_is_asked_for_again_after_a_minute() -> None:
    now = [0.0]
    with RedisServer() as server, RedisStore(server.url, deadline_s=LONG_S, clock=lambda: now[0]) as store:
        value = bytes(1 << 20)
        assert store.put_many([b"a"], [value]) == 1
        server.client().config_set("maxmemory", 8 << 20)
        assert store.put_many([b"a"], [value]) == 1
        now[0] += 61
        assert store.put_many([b"a"], [value]) == 0
        assert store.stats().drops == Counter(too_big=1)


# --- breakers -----------------------------------------------------------------------------------


@pytest.mark.redis
def test_faults_of_probes_are_counted_though_they_are_no_requests() -> None:
    with RedisServer() as server, RedisStore(server.url) as store:
        server.kill()
        for _ in range(5):
            assert store.probe([b"a"]) == 0
        stats = store.stats()
        assert (stats.requested, stats.misses, stats.faults) == (0, Counter(), Counter(conn=3, breaker=2))


@pytest.mark.redis
def test_one_call_tries_after_the_cool_down_and_the_rest_go_on() -> None:
    now = [0.0]
    with RedisServer() as server, RedisStore(server.url, deadline_s=LONG_S, clock=lambda: now[0]) as store:
        store.put_many([b"a"], [b"one"])
        server.kill()
        for _ in range(10):
            store.get_many([b"a"])
        assert store.stats().misses == Counter(conn=3, breaker=7) and store.nodes[0].breaker.state == "open"
        server.start()
        assert store.put_many([b"a"], [b"one"]) == 0
        now[0] += 1.0
        assert store.put_many([b"a"], [b"one"]) == 1
        assert store.get_many([b"a"]) == [b"one"] and store.nodes[0].breaker.state == "closed"


@pytest.mark.redis
def test_refused_writes_stop_writes_alone() -> None:
    now = [0.0]
    with RedisServer() as server, RedisStore(server.url, deadline_s=LONG_S, clock=lambda: now[0]) as store:
        store.put_many([b"a"], [b"one"])
        server.client().config_set("maxmemory", 1)
        assert [store.put_many([b"b"], [b"two"]) for _ in range(5)] == [0] * 5
        assert store.stats().drops == Counter(oom=3, breaker=2)
        assert store.get_many([b"a"]) == [b"one"] and store.nodes[0].breaker.state == "closed"
        server.client().config_set("maxmemory", 0)
        assert store.put_many([b"b"], [b"two"]) == 0
        now[0] += 1.0
        assert store.put_many([b"b"], [b"two"]) == 1


# --- eviction -----------------------------------------------------------------------------------
USES: dict[str, Callable[[RedisStore, bytes], Any]] = {
    "touched": lambda store, key: store.touch_many([key]),
    "read": lambda store, key: store.get_many([key]),
    "read into a buffer": lambda store, key: store.get_many([key], [memoryview(bytearray(1 << 20))]),
    "written": lambda store, key: store.put_many([key], [bytes(1 << 20)]),
}


@pytest.mark.parametrize("ttl_s", [None, 1000.0])
@pytest.mark.parametrize(
    "program", [pytest.param("redis", marks=pytest.mark.redis), pytest.param("valkey", marks=pytest.mark.valkey)]
)
def test_what_is_used_is_evicted_after_what_is_not(program: str, ttl_s: float | None) -> None:
    where = {"program": valkey_program()} if program == "valkey" else {}
    lru = ("--maxmemory-policy", "allkeys-lru", "--maxmemory-samples", "64")
    used, unused = [b"%b" % how.encode() for how in USES], [b"unused %d" % i for i in range(len(USES))]
    with RedisServer(*lru, **where) as server, RedisStore(server.url, ttl_s=ttl_s, deadline_s=LONG_S) as store:
        client = server.client()
        assert store.put_many(used, [bytes(1 << 20)] * len(used)) == len(used)  # older than those that are not used
        wait_until(lambda: client.object("idletime", KEY_PREFIX + used[0]) >= 1)
        assert store.put_many(unused, [bytes(1 << 20)] * len(unused)) == len(unused)
        wait_until(lambda: client.object("idletime", KEY_PREFIX + unused[-1]) >= 2)
        for key, use in zip(used, USES.values(), strict=True):
            assert use(store, key)
        assert store.probe(unused) == len(unused)  # a probe is no use
        assert [client.object("idletime", KEY_PREFIX + key) >= 2 for key in unused] == [True] * len(unused)
        to_free = round((len(unused) - 0.5) * client.memory_usage(KEY_PREFIX + unused[0]))
        client.config_set("maxmemory", client.info("memory")["used_memory"] - to_free)
        client.set("more", "x")
        assert [store.probe([key]) for key in used] == [1] * len(used)
        assert [store.probe([key]) for key in unused] == [0] * len(unused)


def wait_until(true: Callable[[], bool]) -> None:
    give_up = time.monotonic() + LONG_S
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_a_touch_is_what_the_server_needs_to_be_told() -> None:
    for ttl_s, told in ((None, [b"TOUCH", b"kv:a"]), (9, [b"PEXPIRE", b"kv:a", b"9000", b"GT"])):
        with Many(1) as many, opened(f"redis://{many.address(0)}", RedisStore, ttl_s=ttl_s) as store:
            many.data[b"kv:a"] = b"one"
            assert store.touch_many([b"a", b"x"]) == [True, False]
            exist = [[b"EXISTS", b"kv:a"], [b"EXISTS", b"kv:x"]] if ttl_s else []  # 0 is said for a longer life, too
            assert many.asked(0) == [told, [told[0], b"kv:x", *told[2:]], *exist]
            many.forget()
            assert store.get_many([b"a"]) == [b"one"]
            assert many.asked(0) == [[b"GET", b"kv:a"], *([told] if ttl_s else [])]  # a GET is a use


@pytest.mark.parametrize("ttl_s", [None, 9])
def test_masters_are_told_what_replicas_gave(replicated: SlotMap, ttl_s: float | None) -> None:
    with opened(replicated.url, ttl_s=ttl_s, read_replicas=True) as store:
        assert store.get_many([A, b"absent", B]) == [*values(A), None, *values(B)]
        told = [command for at in (0, 1) for command in replicated.asked(at, b"TOUCH", b"PEXPIRE")]
        verb, rest = (b"TOUCH", []) if ttl_s is None else (b"PEXPIRE", [b"9000", b"GT"])
        assert told == [[verb, name(A), *rest], [verb, name(B), *rest]]
        assert not [command for at in (2, 3) for command in replicated.asked(at, b"TOUCH", b"PEXPIRE")]


@pytest.mark.parametrize("said", [b"-NOPERM no\r\n", b"-ERR unknown command 'TOUCH'\r\n"])
def test_a_user_who_may_only_read_is_told_what_is_there(said: bytes, replicated: SlotMap) -> None:
    replicated.twist = lambda at, command: said if command[0] == b"TOUCH" else ...
    with opened(replicated.url) as store:
        assert store.touch_many([A, b"absent", B]) == [True, False, True]
    with opened(replicated.url, read_replicas=True) as store:
        assert store.get_many([A, b"absent", B]) == [*values(A), None, *values(B)]
        assert store.stats().misses == Counter(absent=1)


# --- settings ------------------------------------------------------------------------------------
WRONG: dict[str, list[Any]] = {
    "url": [None, 7, b"redis://h", ["redis://h"], True],
    "ttl_s": [0, -1, 0.0, math.nan, math.inf, 10**400, "60", True, False, [60]],
    "deadline_s": [0, -1, 0.0, math.nan, math.inf, 3601, "0.25", True, None, [1]],
    "max_connections": [0, -1, 2.5, 2.0, math.nan, math.inf, 10**400, "16", True, None],
    "read_replicas": [0, 1, None, "yes", "false", []],
    "clock": [None, 0.0, "now", True],
}


@pytest.mark.parametrize("url", ["fakeredis://", "redis://h", "redis-cluster://h", "redis-sentinel://h/main"])
@pytest.mark.parametrize(
    ("name", "value"), [pytest.param(n, v, id=f"{n} {i}") for n in WRONG for i, v in enumerate(WRONG[n])]
)
def test_a_setting_of_another_type_or_out_of_bounds_is_refused_at_once(url: str, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="expected") as refused:
        RedisStore(**{"url": url, name: value})
    assert len(str(refused.value)) < 200


PIECES = memoryview(b"abcdef")
MISTAKES: dict[str, Callable[[Any], Any]] = {
    "a key as text": lambda store: store.get_many(["a"]),
    "keys that are used up": lambda store: store.get_many(key for key in [b"a"]),
    "a buffer with gaps": lambda store: store.get_many([b"a"], [memoryview(bytearray(9))[::2]]),
    "a buffer that is no view": lambda store: store.get_many([b"a"], [bytearray(9)]),
    "a value as text": lambda store: store.put_many([b"a"], ["text"]),
    "a piece with gaps": lambda store: store.put_many([b"a"], [(b"head", PIECES[::2])]),
    "no values": lambda store: store.put_many([b"a"], None),
    "no keys": lambda store: store.probe(None),
    "a probe of text": lambda store: store.probe(["a"]),
    "a touch of a number": lambda store: store.touch_many([7]),
    "a delete of nothing": lambda store: store.delete_many([None]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_callers_mistake_is_no_fault_of_the_servers(mistake: str) -> None:
    with RedisStore() as store:
        before = store.stats()
        for _ in range(5):
            with pytest.raises(InputError, match="expected"):
                MISTAKES[mistake](store)
        assert store.stats() == before and store.nodes[0].breaker.faults == 0


@pytest.mark.parametrize(
    "settings", [{"deadline_s": 1e-9}, {"deadline_s": 3600}, {"max_connections": 1}, {"ttl_s": 1e-9}]
)
def test_settings_at_their_bounds_work(settings: dict[str, Any]) -> None:
    with RedisStore(**settings) as store:
        store.put_many([b"a"], [b"1"])
        store.get_many([b"a"])
        store.stats().check()


# --- forks --------------------------------------------------------------------------------------


@pytest.mark.redis
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_after_connect_is_safe_on_both_sides(redis_server: RedisServer) -> None:
    store = RedisStore(redis_server.url, deadline_s=LONG_S, max_connections=2)
    keys = [b"%d" % i for i in range(50)]
    values = [b"value of " + key for key in keys]
    store.put_many(keys, values)
    stop = threading.Event()

    def keep_busy() -> None:  # so that the fork finds locks and connections in use
        while not stop.is_set():
            store.get_many(keys[:5])

    threads = [threading.Thread(target=keep_busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                good = all(store.get_many(keys) == values for _ in range(50))
                os._exit(0 if good else 1)
            except BaseException:
                os._exit(2)
        children.append(child)
    for _ in range(50):
        assert store.get_many(keys) == values
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    stop.set()
    for thread in threads:
        thread.join()
    store.stats().check()
    store.close()
