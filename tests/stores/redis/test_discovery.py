"""When the servers are asked which servers there are, by whom, and what goes on meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from typing import Any

import pytest
import redis

from kvlab.stores import RedisStore
from kvlab.stores.deadline import Deadline
from kvlab.stores.redis.cluster import Cluster
from kvlab.stores.redis.discovery import MAP_AGE_S, PAUSE_S, REFRESHER, SLOTS, address_of, most_informative
from kvlab.stores.redis.pool import Pool
from kvlab.testbed.server import free_port
from tests.harness.helpers import FakeClock
from tests.stores.redis.scripted import (
    CLOSED,
    LONG_S,
    SHORT_S,
    SILENT,
    THIRDS,
    A,
    B,
    C,
    Said,
    SlotMap,
    Watched,
    bounded,
    in_threads,
    name,
    opened,
    resp,
    values,
    wait_for_askers,
)

# --- when the map is asked for ------------------------------------------------------------------


def test_the_map_is_asked_for_once_and_again_after_a_while(cluster: SlotMap, clock: FakeClock) -> None:
    with opened(cluster.url, clock=clock) as store:
        for _ in range(5):
            store.get_many([A, B, C])
        assert cluster.questions() == 1
        clock.now += MAP_AGE_S - 0.01
        store.get_many([A])
        assert cluster.questions() == 1
        clock.now += 0.01
        for _ in range(5):
            store.get_many([A])
        assert cluster.questions() == 2


def test_hints_bring_one_question_in_each_pause(cluster: SlotMap, clock: FakeClock) -> None:
    cluster.twist = lambda at, command: b"-CLUSTERDOWN no\r\n" if command[0] == b"GET" else ...
    with opened(cluster.url, clock=clock) as store:
        for _ in range(10):
            store.get_many([A, B, C])
        assert cluster.questions() == 1
        clock.now += PAUSE_S - 0.01
        store.get_many([A])
        assert cluster.questions() == 1
        for asked in (2, 3, 4):
            clock.now += PAUSE_S
            for _ in range(5):
                store.get_many([A])
            assert cluster.questions() == asked
        cluster.twist = lambda at, command: ...
        clock.now += PAUSE_S
        for _ in range(3):
            assert store.get_many([A]) == values(A)
            clock.now += PAUSE_S
        assert cluster.questions() == 5  # the last hint, and no more


@pytest.mark.parametrize(
    ("said", "hints"),
    [
        (b"-MOVED 1 127.0.0.1:0\r\n", True),
        (b"-CLUSTERDOWN no\r\n", True),
        (b"-READONLY no\r\n", True),
        (b"-LOADING no\r\n", True),
        (CLOSED, True),
        (b":1\r\n", True),
        (b"-ERR no\r\n", False),
        (b"-NOPERM no\r\n", False),
        (b"-OOM no\r\n", False),
        (b"$-1\r\n", False),
    ],
)
def test_only_what_may_mean_another_map_is_a_hint(cluster: SlotMap, clock: FakeClock, said: Said, hints: bool) -> None:
    cluster.twist = lambda at, command: said if command[0] == b"GET" else ...
    with opened(cluster.url, clock=clock) as store:
        store.get_many([A])
        clock.now += PAUSE_S
        store.get_many([A])
        assert cluster.questions() == 1 + hints


@pytest.mark.parametrize("said", [CLOSED, b"-NOPERM no\r\n", b"$3\r\nwat\r\n"])
def test_the_old_map_goes_on_while_nobody_tells_a_new_one(cluster: SlotMap, clock: FakeClock, said: Said) -> None:
    with opened(cluster.url, clock=clock) as store:
        store.get_many([A])
        cluster.said = said
        for _ in range(8):
            clock.now += MAP_AGE_S
            assert store.get_many([A, B, C]) == values(A, B, C)
        assert store.stats().misses == Counter()
        cluster.said = ...
        cluster.lines = [(0, SLOTS - 1, 1)]
        clock.now += MAP_AGE_S
        cluster.forget()
        assert store.get_many([A]) == values(A) and len(cluster.asked(1, b"GET")) == 1


def test_while_nobody_tells_one_thread_a_second_tries(
    cluster: SlotMap, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread.name) or start(thread))
    with opened(cluster.url_of(0), clock=clock) as store:
        store.get_many([A])
        cluster.said = CLOSED
        clock.now += MAP_AGE_S
        for _ in range(90):
            store.get_many([A])
            clock.now += 0.1
        assert 8 <= started.count(REFRESHER) <= 10
        assert store.stats().faults == Counter(conn=started.count(REFRESHER)) and store.stats().misses == Counter()


def test_a_question_that_nobody_answered_is_asked_again_after_the_pause(cluster: SlotMap, clock: FakeClock) -> None:
    with opened(cluster.url_of(0), clock=clock) as store:
        store.get_many([A])
        cluster.said = CLOSED
        clock.now += MAP_AGE_S
        store.get_many([A])
        cluster.said, cluster.lines = ..., [(0, SLOTS - 1, 1)]
        cluster.forget()
        store.get_many([A])
        assert cluster.questions() == 0
        clock.now += PAUSE_S
        store.get_many([A])
        assert cluster.questions() == 1 and len(cluster.asked(1, b"GET")) == 1


def test_a_question_that_was_interrupted_tells_nothing_and_blocks_nobody(
    cluster: SlotMap, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(BaseException): ...

    def interrupted(*_: Any) -> Any:
        raise Interrupted

    cluster.said = CLOSED
    with opened(cluster.url, clock=clock) as store:
        store.get_many([A])
        store.get_many([A])
        with monkeypatch.context() as patch:
            patch.setattr(Pool, "request", interrupted)
            with pytest.raises(Interrupted):
                store.get_many([A])
        assert store._topology._breaker.faults == 2
        cluster.said = ...
        assert store.get_many([A]) == values(A)


def test_nodes_keep_what_their_breakers_know_when_the_map_is_asked_for_again(
    cluster: SlotMap, clock: FakeClock
) -> None:
    with opened(cluster.url, clock=clock) as store:
        store.get_many([A, B, C])
        before = store.nodes
        cluster.twist = lambda at, command: CLOSED if at == 0 and command[0] == b"GET" else ...
        for _ in range(3):
            store.get_many([A])
        asked = cluster.questions()
        clock.now += PAUSE_S
        store.get_many([A])
        assert cluster.questions() == asked + 1
        assert store.nodes == before and store.nodes[0].breaker.state == "open"
        assert store.stats().misses == Counter(conn=3, breaker=1)


# --- who is asked -------------------------------------------------------------------------------


def test_a_server_that_hangs_does_not_take_all_of_the_time_for_the_map(cluster: SlotMap) -> None:
    cluster.twist = lambda at, command: SILENT if at == 0 and command[0] == b"CLUSTER" else ...
    for _ in range(6):  # whom it asks first is drawn by lot
        with opened(cluster.url, deadline_s=2) as store:
            assert store.get_many([B, C]) == values(B, C)


def test_healthy_servers_are_asked_for_the_map_before_faulty_ones(cluster: SlotMap, clock: FakeClock) -> None:
    with opened(cluster.url_of(0), clock=clock) as store:
        store.get_many([A, B, C])
        cluster.twist = lambda at, command: CLOSED if at == 0 and command[0] == b"GET" else ...
        store.get_many([A, B, C])
        cluster.forget()
        for _ in range(10):
            clock.now += MAP_AGE_S
            store.get_many([B])
        assert cluster.questions() == 10 and cluster.asked(0, b"CLUSTER") == []


def test_the_seeds_are_asked_when_all_servers_known_have_gone(clock: FakeClock) -> None:
    with SlotMap(5, [(*THIRDS[at], at + 1) for at in range(3)]) as cluster:
        cluster.data |= {name(A): b"value of " + A}
        with opened(cluster.url_of(0), deadline_s=4, clock=clock) as store:
            store.get_many([A, B, C])
            cluster.twist = lambda at, command: ... if at in (0, 4) else CLOSED
            cluster.lines = [(0, SLOTS - 1, 4)]
            store.get_many([A])
            clock.now += PAUSE_S
            assert store.get_many([A]) == values(A)
            assert [node.name for node in store.nodes] == [cluster.address(4)]


def test_the_seeds_are_asked_before_servers_that_do_not_answer(clock: FakeClock) -> None:
    lines = [(*THIRDS[at], at) for at in range(3)]
    with SlotMap(4, lines) as cluster, opened(cluster.url_of(3), clock=clock) as store:
        store.get_many([A, B, C])
        cluster.twist = lambda at, command: ... if at == 3 else CLOSED
        store.get_many([A, B, C])
        cluster.forget()
        clock.now += PAUSE_S
        store.get_many([A])
        assert [len(cluster.asked(at, b"CLUSTER")) for at in range(4)] == [0, 0, 0, 1]


@pytest.mark.parametrize("url", ["redis-cluster://127.0.0.1:{0},127.0.0.1:{1}", "redis-sentinel://127.0.0.1:{0}/main"])
def test_seeds_that_refuse_are_left_alone_after_three_calls(url: str, clock: FakeClock) -> None:
    with opened(url.format(free_port(), free_port()), clock=clock) as store:
        for _ in range(6):
            assert store.get_many([A, B]) == [None, None]
        assert store.put_many([A], [b"x"]) == store.probe([A]) == store.delete_many([A]) == 0
        assert store.stats().misses == Counter(conn=6, breaker=6) and store.stats().drops == Counter(breaker=1)
        assert store.stats().faults == Counter(conn=3, breaker=6)
        assert not store.health().ok and "conn: " in store.health().detail
        clock.cool_down()
        store.get_many([A])
        store.get_many([A])
        assert store.stats().misses == Counter(conn=7, breaker=7)


def test_seeds_that_come_up_are_found_after_the_cool_down(cluster: SlotMap, clock: FakeClock) -> None:
    cluster.twist = lambda at, command: CLOSED
    with opened(cluster.url, clock=clock) as store:
        for _ in range(4):
            store.get_many([A])
        cluster.twist = lambda at, command: ...
        assert store.get_many([A]) == [None]
        clock.cool_down()
        assert store.get_many([A, B, C]) == values(A, B, C)


def test_servers_that_have_left_are_let_go(cluster: SlotMap, clock: FakeClock) -> None:
    with opened(cluster.url_of(1), clock=clock) as store:
        store.get_many([A, B, C])
        (gone,) = [node for node in store.nodes if node.name == cluster.address(0)]
        assert [connection.is_connected for connection in gone.pool._idle] == [True]
        cluster.lines[0] = (*THIRDS[0], 1)
        clock.now += MAP_AGE_S
        assert store.get_many([A, B, C]) == values(A, B, C)
        assert gone not in store.nodes and not any(c.is_connected for c in gone.pool._idle)
        assert len(store._topology._nodes) == 2


# --- who waits for the answer -------------------------------------------------------------------


def test_many_threads_at_the_first_call_ask_once(cluster: SlotMap) -> None:
    with opened(cluster.url) as store:
        assert in_threads(16, lambda: store.get_many([A, B, C])) == [values(A, B, C)] * 16
        assert cluster.questions() == 1


def test_threads_wait_for_the_first_answer_no_longer_than_their_deadline(cluster: SlotMap) -> None:
    heard, go_on, got = threading.Event(), threading.Event(), []

    def slow(at: int, command: list[bytes]) -> Said:
        if command[0] == b"CLUSTER":
            heard.set()
            go_on.wait(LONG_S)
        return ...

    cluster.twist = slow
    with opened(cluster.url) as store:
        asker = threading.Thread(target=lambda: got.append(store.get_many([A, B])))
        asker.start()
        assert heard.wait(LONG_S)
        store.deadline_s = SHORT_S
        assert bounded(lambda: in_threads(15, lambda: store.get_many([A, B]))) == [[None, None]] * 15
        assert store.stats().misses == Counter(pool=30)
        go_on.set()
        asker.join()
        assert got == [values(A, B)] and cluster.questions() == 1


def test_threads_at_a_first_call_that_nobody_answers_all_return_in_time(cluster: SlotMap) -> None:
    cluster.twist = lambda at, command: SILENT
    with opened(cluster.url, deadline_s=SHORT_S) as store:
        assert bounded(lambda: in_threads(16, lambda: store.get_many([A, B]))) == [[None, None]] * 16
        assert set(store.stats().misses) <= {"timeout", "pool", "breaker"} and store.stats().misses["timeout"] >= 2


@pytest.mark.parametrize("kind", ["cluster", "sentinel"])
def test_who_knows_a_map_waits_for_no_newer_one(
    cluster: SlotMap, watched: Watched, clock: FakeClock, kind: str
) -> None:
    many, asked, go_on = cluster if kind == "cluster" else watched, threading.Event(), threading.Event()

    def slow(at: int, command: list[bytes]) -> Said:
        if command[0] in (b"CLUSTER", b"SENTINEL"):
            asked.set()
            go_on.wait(LONG_S)
        return ...

    with opened(many.url, RedisStore, clock=clock) as store:
        store.get_many([A])
        many.twist = slow
        cluster.lines, watched.master = [(0, SLOTS - 1, 1)], [1, 1, 1]
        clock.now += MAP_AGE_S
        for _ in range(5):
            assert store.get_many([A, B]) == values(A, B)
        assert asked.wait(LONG_S)
        assert store.get_many([A, B]) == values(A, B) and many.asked(0, b"GET")
        go_on.set()
        wait_for_askers()
        many.forget()
        assert store.get_many([A, B]) == values(A, B)
        assert not many.asked(0, b"GET") and len(many.asked(1, b"GET")) == 2
        assert store.stats().misses == Counter() and store.stats().faults == Counter()


def test_after_a_hint_the_next_call_asks_in_half_of_its_time(
    cluster: SlotMap, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []
    by: list[str] = []
    request_map = Cluster._request_map

    def watched(topology: Cluster, deadline: Deadline) -> None:
        times.append(deadline.remaining)
        by.append(threading.current_thread().name)
        request_map(topology, deadline)

    monkeypatch.setattr(Cluster, "_request_map", watched)
    with opened(cluster.url, RedisStore, clock=clock) as store:
        store.get_many([A])
        cluster.twist = lambda at, command: resp("READONLY no") if at == 0 and command[0] == b"SET" else ...
        store.put_many([A], [b"x"])
        cluster.lines = [(0, SLOTS - 1, 1)]
        clock.now += PAUSE_S
        assert store.put_many([A], [b"x"]) == 1
        clock.now += MAP_AGE_S
        assert store.get_many([A]) == [b"x"]
        wait_for_askers()
        me = threading.current_thread().name
        assert by == [me, me, REFRESHER] and LONG_S / 2 < times[0] < LONG_S and times[1] <= LONG_S / 2 < times[2]


def test_without_a_thread_to_ask_the_old_map_goes_on(
    cluster: SlotMap, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with opened(cluster.url, clock=clock) as store:
        store.get_many([A])
        cluster.lines = [(0, SLOTS - 1, 1)]
        clock.now += MAP_AGE_S
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_more)
            assert store.get_many([A]) == values(A)
        cluster.forget()
        assert store.get_many([A]) == values(A)
        assert cluster.questions() == len(cluster.asked(1, b"GET")) == 1


@pytest.mark.parametrize("url", ["redis-cluster://127.0.0.1:{}", "redis-sentinel://127.0.0.1:{}/main"])
def test_a_deadline_that_passed_before_the_first_question_is_a_counted_miss(url: str) -> None:
    with opened(url.format(free_port()), deadline_s=1e-9) as store:
        assert store.get_many([A]) == [None] and store.put_many([A], [b"x"]) == 0
        assert set(store.stats().misses) <= {"timeout", "pool", "conn"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("kind", ["cluster", "sentinel"])
def test_the_child_of_a_fork_waits_for_no_lock_of_its_parent(
    cluster: SlotMap, watched: Watched, clock: FakeClock, kind: str
) -> None:
    with opened((cluster if kind == "cluster" else watched).url, clock=clock) as store:
        assert store.get_many([A, B]) == values(A, B)
        with store._topology._lock, store._topology._lease._lock, store._topology._breaker._lock:
            child = os.fork()
            if child == 0:
                try:
                    signal.alarm(round(LONG_S))  # ends a child that hangs
                    clock.now += MAP_AGE_S
                    good = store.get_many([A, B]) == values(A, B) and store.health().ok
                    os._exit(0 if good else 1)
                except BaseException:
                    os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert store.get_many([A, B]) == values(A, B)


def test_close_lets_go_of_every_server(cluster: SlotMap) -> None:
    with opened(cluster.url) as store:
        store.get_many([A, B, C])
        nodes = store.nodes
    assert len(nodes) == 3 and not any(c.is_connected for node in nodes for c in node.pool._idle)
    asked = cluster.questions()
    assert store.get_many([A]) == [None] and store.put_many([A], [b"x"]) == 0 and not store.health().ok
    assert store.stats().misses == Counter(closed=1) and cluster.questions() == asked


# --- what servers say of servers ----------------------------------------------------------------
@pytest.mark.parametrize(
    ("told", "address"),
    [
        ((b"10.0.0.1", 7000), ("10.0.0.1", 7000)),
        ((b"10.0.0.1", b"7000"), ("10.0.0.1", 7000)),
        ((b"::1", 1), ("::1", 1)),
        ((b"fe80::1%eth0", 65535), ("fe80::1%eth0", 65535)),
        ((b"my_host-1.example.com", b"65535"), ("my_host-1.example.com", 65535)),
    ],
)
def test_an_address_is_a_host_and_a_port(told: tuple[Any, Any], address: tuple[str, int]) -> None:
    assert address_of(*told) == address


@pytest.mark.parametrize("host", [b"", b" ", b"a b", b"h/[", b"a@b", b"\xff", "h", None, 7, [b"h"], b"a,b", b"a\n"])
def test_what_is_no_host_is_not_believed(host: Any) -> None:
    with pytest.raises(redis.InvalidResponse, match="expected a server's address"):
        address_of(host, 7000)


@pytest.mark.parametrize("port", [0, -1, 65536, 10**30, b"", b"x", b"-1", b"7000 ", "²".encode(), None, 7.5, [7000]])
def test_what_is_no_port_is_not_believed(port: Any) -> None:
    with pytest.raises(redis.InvalidResponse, match="expected a server's address"):
        address_of(b"h", port)


@pytest.mark.parametrize(
    ("errors", "told"),
    [
        (["gone"], "gone"),
        (["gone", "late"], "late"),
        (["gone", "no right", "late"], "no right"),
        (["loading", "no right"], "loading"),
    ],
)
def test_of_servers_asked_in_vain_what_one_said_tells_most(errors: list[str], told: str) -> None:
    made: dict[str, Exception] = {
        "gone": redis.ConnectionError("gone"),
        "late": redis.TimeoutError("late"),
        "no right": redis.exceptions.NoPermissionError("no right"),
        "loading": redis.BusyLoadingError("loading"),
    }
    assert str(most_informative([made[error] for error in errors])) == told
