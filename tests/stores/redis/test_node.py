"""One server as a store sees it: its threads, one round trip, the largest value, refused writes."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kvlab.stores.base import MAX_VALUE_BYTES
from kvlab.stores.deadline import Deadline
from kvlab.stores.redis.node import MAXMEMORY_DIVISOR, Answer, Batch, Job, Node
from kvlab.stores.redis.pool import FakePool, Pool
from kvlab.stores.redis.reasons import reason_of
from kvlab.stores.workers import Workers
from kvlab.testbed.server import free_port
from tests.harness.helpers import FakeClock
from tests.harness.scripted import ScriptedServer
from tests.stores.redis.scripted import LONG_S, A, B, SlotMap, opened, resp

MINUTE_S = 60.0


# --- work in threads ----------------------------------------------------------------------------


SEND = Batch("send", (b"a",), ((b"GET", b"a"),))


def node() -> Node:
    return Node("name", Pool("redis://127.0.0.1:1", 2), max_workers=2)


def start(made: Node, work: Callable[[], list[Any]]) -> Job:
    """Have a node do this in one of its threads, as if it were its share of a batch."""
    made.send = lambda *sub_batch: Answer(work())  # type: ignore[method-assign]
    return begun(made)


def begun(made: Node) -> Job:
    job = Job(made, SEND, [0], Deadline(LONG_S))
    made.start(job)
    return job


def trip(made: Node, *names: bytes) -> list[Any]:
    """The replies of one round trip."""
    return made.round_trip([(b"GET", name) for name in names], Deadline(LONG_S), Answer([]))


def test_work_runs_in_threads_that_bear_the_servers_name() -> None:
    made, names = node(), list[str]()
    together = threading.Barrier(2)

    def work() -> list[Any]:
        together.wait(LONG_S)  # so many run at the same time
        names.append(threading.current_thread().name)
        return [1]

    assert [job.result().replies for job in [start(made, work), start(made, work)]] == [[1], [1]]
    assert all(name.startswith("kvlab name") for name in names) and threading.current_thread().name not in names


def test_no_more_threads_than_it_may_have() -> None:
    made, most, running = node(), [0], [0]
    lock = threading.Lock()

    def work() -> list[Any]:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        return []

    for job in [start(made, work) for _ in range(20)]:
        job.result()
    assert 1 <= most[0] <= 2


def test_where_no_thread_can_be_started_the_caller_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(self: Workers, work: Any) -> Any:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(Workers, "submit", ending)
    done_by: list[str] = []
    job = start(node(), lambda: done_by.append(threading.current_thread().name) or [b"x"])
    assert done_by == [threading.current_thread().name] and job.result().replies == [b"x"]


def test_work_is_done_once_though_a_thread_could_not_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    made, runs = node(), list[int]()
    first, go_on = threading.Event(), threading.Event()

    def busy() -> list[Any]:
        first.set()
        go_on.wait(LONG_S)
        return []

    running = start(made, busy)
    assert first.wait(LONG_S)

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        assert start(made, lambda: runs.append(1) or [b"x"]).result().replies == [b"x"]
    go_on.set()
    running.result()
    start(made, list).result()
    assert runs == [1]


def test_work_that_was_abandoned_before_it_began_is_not_done() -> None:
    made, runs = node(), list[int]()
    made.send = lambda *sub_batch: runs.append(1) or Answer([b"x"])  # type: ignore[method-assign]
    job = Job(made, SEND, [0], Deadline(LONG_S), asking=False)
    job.abandon()
    job.run()
    assert runs == [] and [reason_of(reply) for reply in job.result().replies] == ["timeout"]


def test_abandoning_work_waits_until_it_has_ended() -> None:
    made, ends = node(), list[str]()
    began, go_on = threading.Event(), threading.Event()

    def work() -> list[Any]:
        began.set()
        go_on.wait(LONG_S)
        ends.append("work")
        return []

    job = start(made, work)
    assert began.wait(LONG_S)
    threading.Timer(0.05, go_on.set).start()
    job.abandon()
    ends.append("abandoned")
    assert ends == ["work", "abandoned"] and job.deadline.abandoned


def test_what_work_raises_reaches_who_asks_for_its_result() -> None:
    class Bug(BaseException): ...

    def work() -> list[Any]:
        raise Bug

    with pytest.raises(Bug):
        start(node(), work).result()


def test_after_a_fork_a_node_has_new_threads_locks_and_breakers_and_no_connections() -> None:
    with ScriptedServer(lambda command: b"$-1\r\n") as server:
        made = Node("name", Pool(server.url, 2), 2)
        assert trip(made, b"a") == [None]
        begun(made).result()
        (connection,) = made.pool._idle
        parts = (made, made.breaker, made.write_breaker, made.pool)
        for breaker in (made.breaker, made.write_breaker):
            for _ in range(3):
                breaker.record(False)
        with made._lock, made.breaker._lock, made.write_breaker._lock, made.pool._lock:  # as others held them
            for part in parts:
                part.reset_after_fork()
            assert made._workers is None and made.pool._idle == []
            assert (made.breaker.state, made.write_breaker.state) == ("closed", "closed")
            assert trip(made, b"a") == [None]
            assert begun(made).result().replies == [None]
        assert made.pool._idle[0] is not connection
        connection.disconnect()


# --- the largest value --------------------------------------------------------------------------


def asking_for_memory(says: Callable[[], bytes], clock: FakeClock) -> tuple[ScriptedServer, Callable[[], Any]]:
    server = ScriptedServer(lambda command: says())
    made = Node("name", Pool(server.url, 1), 1, clock)
    return server, lambda: made.value_limit(Deadline(LONG_S), Answer([]))


def test_the_limit_is_remembered_for_a_minute(clock: FakeClock) -> None:
    memory = [1600]
    server, limit = asking_for_memory(
        lambda: resp(b"# Memory\r\nmaxmemory:%d\r\nmaxmemory_human:x\r\n" % memory[0]), clock
    )
    with server:
        assert limit() == 1600 // MAXMEMORY_DIVISOR
        memory[0] = 3200
        clock.now += MINUTE_S - 0.01
        assert limit() == 100 and len(server.commands) == 1
        clock.now += 0.01
        assert [limit() for _ in range(5)] == [200] * 5 and server.commands == [[b"INFO", b"memory"]] * 2


@pytest.mark.parametrize(("memory", "limit"), [(0, MAX_VALUE_BYTES), (1 << 50, MAX_VALUE_BYTES), (32, 2)])
def test_the_limit_is_a_share_of_the_memory_or_that_of_all_servers(memory: int, limit: int, clock: FakeClock) -> None:
    server, asked = asking_for_memory(lambda: resp(b"x\r\nmaxmemory:%d\r\n" % memory), clock)
    with server:
        assert asked() == limit


@pytest.mark.parametrize(
    "said",
    [
        resp(b"# Memory\r\nused_memory:1\r\n"),
        resp(b"not_maxmemory:7\r\n"),
        resp(b"maxmemory:\r\n"),
        resp(b"maxmemory:-7\r\n"),
        resp(b"maxmemory:lots\r\n"),
        resp(b"maxmemory:" + b"9" * 30 + b"\r\n"),
        resp(b"maxmemory_human:7B\r\n"),
        resp(b""),
        b"$-1\r\n",
        b"-NOPERM User kvlab has no permissions to run the 'info' command\r\n",
        b"-ERR unknown command 'INFO', with args beginning with: 'memory' \r\n",
    ],
)
def test_a_server_that_keeps_its_memory_to_itself_has_the_limit_of_all_and_is_asked_once_a_minute(
    said: bytes, clock: FakeClock
) -> None:
    server, limit = asking_for_memory(lambda: said, clock)
    with server:
        assert limit() == limit() == MAX_VALUE_BYTES and len(server.commands) == 1
        clock.now += MINUTE_S
        assert limit() == MAX_VALUE_BYTES and len(server.commands) == 2


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"-LOADING no\r\n", "loading"),
        (b"-BUSY no\r\n", "busy"),
        (b"-NOAUTH no\r\n", "auth"),
        (b":7\r\n", "protocol"),
        (b"+OK\r\n", "protocol"),
        (b"*0\r\n", "protocol"),
        (None, "conn"),
    ],
)
def test_a_server_that_is_not_itself_is_asked_again_for_its_limit(said: bytes, reason: str, clock: FakeClock) -> None:
    says = [said]
    server, limit = asking_for_memory(lambda: says[0], clock)
    with server:
        assert reason_of(limit()) == reason
        says[0] = resp(b"\r\nmaxmemory:160\r\n")
        assert limit() == 10


def test_a_fake_server_has_no_limit_of_its_own() -> None:
    assert Node("fake", FakePool(None), 1).value_limit(Deadline(LONG_S), Answer([])) == MAX_VALUE_BYTES


def test_each_server_has_a_limit_of_its_own(clock: FakeClock) -> None:
    with SlotMap() as cluster, opened(cluster.url, clock=clock) as store:
        cluster.maxmemory = [0, 1600, 0]
        assert store.put_many([A, B, A], [bytes(101)] * 3) == 2 and store.stats().drops == Counter(too_big=1)
        assert cluster.asked(1, b"SET") == []
        assert store.put_many([B], [bytes(100)]) == 1
        cluster.maxmemory = [1600, 0, 0]
        assert store.put_many([A, B], [bytes(101)] * 2) == 1 and len(cluster.asked(1, b"INFO")) == 1
        clock.now += MINUTE_S
        assert store.put_many([A, B], [bytes(101)] * 2) == 1
        assert store.stats().drops == Counter(too_big=3)
        assert cluster.asked(1, b"SET")[-1][1] == b"kv:" + B


def test_a_server_that_cannot_say_its_limit_takes_no_writes_and_the_others_do() -> None:
    with SlotMap() as cluster, opened(cluster.url) as store:
        cluster.twist = lambda at, command: b"-LOADING no\r\n" if at == 1 and command[0] == b"INFO" else ...
        assert store.put_many([A, B], [b"1", b"2"]) == 1
        assert store.stats().drops == store.stats().faults == Counter(loading=1) and cluster.asked(1, b"SET") == []


def test_writes_that_one_server_refuses_stop_writes_there_alone(clock: FakeClock) -> None:
    with SlotMap() as cluster, opened(cluster.url, clock=clock) as store:
        cluster.twist = lambda at, command: b"-OOM no\r\n" if at == 1 and command[0] == b"SET" else ...
        for _ in range(5):
            assert store.put_many([A, B], [b"1", b"2"]) == 1
        assert store.stats().drops == Counter(oom=3, breaker=2) and len(cluster.asked(1, b"SET")) == 3
        assert [n.write_breaker.state for n in store.nodes] == ["closed", "open", "closed"]
        assert {n.breaker.state for n in store.nodes} == {"closed"} and store.get_many([B]) == [None]
        cluster.twist = lambda at, command: ...
        clock.cool_down()
        assert store.put_many([A, B], [b"1", b"2"]) == 2


# --- one round trip -----------------------------------------------------------------------------


def test_an_open_breaker_sends_nothing() -> None:
    with ScriptedServer(lambda command: b"$-1\r\n") as server:
        made = Node("name", Pool(server.url, 1), 1, FakeClock())
        for _ in range(3):
            made.breaker.record(False)
        assert [reason_of(reply) for reply in trip(made, b"a", b"b")] == ["breaker"] * 2 and server.commands == []


def test_the_breaker_learns_how_each_round_trip_went() -> None:
    made = Node("name", Pool(f"redis://127.0.0.1:{free_port()}", 1), 1, FakeClock())
    for faults in (1, 2, 3):
        assert [reason_of(reply) for reply in trip(made, b"a")] == ["conn"]
        assert made.breaker.faults == faults
    assert made.breaker.state == "open" and "open" in repr(made) and "name" in repr(made)
