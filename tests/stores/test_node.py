"""One server as a store sees it, and the deadlines that calls share: threads, forks, the largest value."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from kvlab.stores import RedisStore
from kvlab.stores.redis.connection import GRACE_S, MAX_VALUE_BYTES, Deadline, FakePool, NoConnection, Pool, TooBig
from kvlab.stores.redis.node import SHARE_OF_MEMORY, Node, Refused, reason_of, works
from kvlab.stores.redis.topology import Part
from kvlab.testbed.server import free_port
from tests.harness.helpers import FakeClock
from tests.harness.scripted import ScriptedServer
from tests.stores.test_topology import LONG_S, A, B, SlotMap, opened, resp, values

MINUTE_S = 60.0


# --- deadlines ----------------------------------------------------------------------------------
@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time that deadlines see."""
    moment = [1000.0]
    monkeypatch.setattr("kvlab.stores.redis.connection.time.monotonic", lambda: moment[0])
    yield moment
    monkeypatch.undo()


def test_a_deadline_counts_down_and_passes(now: list[float]) -> None:
    deadline = Deadline(2.0)
    assert (deadline.remaining_to_connect(), deadline.passed) == (2.0, False)
    now[0] += 1.5
    assert (deadline.remaining_to_connect(), deadline.passed) == (0.5, False)
    for _ in range(2):
        now[0] += 0.5
        assert deadline.passed
        with pytest.raises(TimeoutError, match="deadline"):
            deadline.remaining_to_connect()


def test_who_did_not_wait_for_the_deadline_to_pass_gets_a_moment_more_once(now: list[float]) -> None:
    deadline = Deadline(2.0)
    now[0] += 1.5
    assert deadline.remaining_to_receive() == 0.5
    now[0] += 7.0  # stood still
    assert deadline.remaining_to_receive() == pytest.approx(GRACE_S) and deadline.passed
    now[0] += GRACE_S / 2
    assert deadline.remaining_to_receive() == pytest.approx(GRACE_S / 2)
    now[0] += GRACE_S
    for _ in range(2):
        with pytest.raises(TimeoutError, match="deadline"):
            deadline.remaining_to_receive()
    with pytest.raises(TimeoutError):
        deadline.remaining_to_connect()


@pytest.mark.parametrize("waited", [False, True])
def test_who_was_abandoned_gets_no_moment_more(now: list[float], waited: bool) -> None:
    deadline = Deadline(2.0)
    if waited:
        now[0] += 3.0
        deadline.remaining_to_receive()
    deadline.abandon()
    with pytest.raises(TimeoutError):
        deadline.remaining_to_receive()


def test_a_copy_ends_at_the_same_moment_and_is_stretched_alone(now: list[float]) -> None:
    deadline = Deadline(2.0)
    now[0] += 1
    copy = deadline.copy()
    assert copy.remaining_to_connect() == deadline.remaining_to_connect() == 1.0
    copy.extend(50_000_000)
    assert (copy.remaining_to_connect(), deadline.remaining_to_connect()) == (2.0, 1.0)
    deadline.abandon()
    assert deadline.passed and copy.remaining_to_connect() == 2.0


def test_half_a_deadline_is_half_of_what_is_left(now: list[float]) -> None:
    deadline = Deadline(4.0)
    assert deadline.half().remaining_to_connect() == 2.0
    now[0] += 2
    half = deadline.half()
    assert (half.remaining_to_connect(), half.half().remaining_to_connect(), deadline.remaining_to_connect()) == (1.0, 0.5, 2.0)
    now[0] += 3
    assert deadline.half().passed and half.passed


def test_a_deadline_waits_for_the_last_of_others_and_never_ends_earlier(now: list[float]) -> None:
    deadline = Deadline(2.0)
    deadline.cover([])
    assert deadline.remaining_to_connect() == 2.0
    deadline.cover([Deadline(1.0), Deadline(5.0), Deadline(3.0)])
    assert deadline.remaining_to_connect() == 5.0
    deadline.cover(iter([Deadline(4.0)]))
    assert deadline.remaining_to_connect() == 5.0


def test_a_deadline_until_a_moment(now: list[float]) -> None:
    assert Deadline.until(1001.5).remaining_to_connect() == 1.5
    assert Deadline.until(1000.0).passed and Deadline.until(-7.0).passed


def test_what_has_expired_stays_so_whatever_it_moves(now: list[float]) -> None:
    deadline = Deadline(2.0)
    deadline.abandon()
    assert deadline.passed
    now[0] = 1.0  # a machine that has just been started
    deadline.extend(150_000_000)
    assert deadline.passed


# --- why and whether ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Refused("breaker"), "breaker"),
        (TooBig(), "too_big"),
        (NoConnection(), "pool"),
        (redis.AuthenticationError("x"), "auth"),
        (redis.exceptions.NoPermissionError("x"), "auth"),
        (redis.TimeoutError("x"), "timeout"),
        (TimeoutError("x"), "timeout"),
        (redis.BusyLoadingError("x"), "loading"),
        (redis.exceptions.MasterDownError("x"), "loading"),
        (redis.exceptions.ClusterDownError("x"), "down"),
        (redis.exceptions.MovedError("1 h:1"), "moved"),
        (redis.exceptions.AskError("1 h:1"), "moved"),
        (redis.exceptions.TryAgainError("x"), "moved"),
        (redis.ReadOnlyError("x"), "readonly"),
        (redis.exceptions.OutOfMemoryError("x"), "oom"),
        (redis.InvalidResponse("x"), "protocol"),
        (redis.ConnectionError("x"), "conn"),
        (OSError("x"), "conn"),
        (redis.ResponseError("BUSY x"), "busy"),
        (redis.ResponseError("MISCONF x"), "misconf"),
        (redis.ResponseError("ERR x"), "response"),
        (KeyError("x"), "error"),
        (7, "protocol"),
        (b"x", "protocol"),
        (None, "protocol"),
    ],
)
def test_each_reply_has_one_reason(reply: Any, reason: str) -> None:
    assert reason_of(reply) == reason


@pytest.mark.parametrize(
    ("faults", "verdict"),
    [
        ([], True),
        ([redis.exceptions.MovedError("1 h:1"), redis.ReadOnlyError("x")], True),
        ([redis.exceptions.ClusterDownError("x"), redis.exceptions.NoPermissionError("x")], True),
        ([TooBig(), redis.ResponseError("ERR x")], True),
        ([redis.ReadOnlyError("x"), redis.ConnectionError("x")], False),
        ([redis.AuthenticationError("x")], False),
        ([redis.BusyLoadingError("x")], False),
        ([KeyError("x")], False),
        ([NoConnection(), redis.ConnectionError("x")], None),
    ],
)
def test_what_faults_say_of_the_link(faults: list[Exception], verdict: bool | None) -> None:
    assert works(faults) is verdict


# --- work in threads ----------------------------------------------------------------------------
def node(**settings: Any) -> Node:
    return Node("name", Pool("redis://127.0.0.1:1", 2), **{"workers": 2, **settings})


def test_work_runs_in_threads_that_bear_the_servers_name() -> None:
    made, names = node(), []
    together = threading.Barrier(2)

    def work() -> list[Any]:
        together.wait(LONG_S)  # so many run at the same time
        names.append(threading.current_thread().name)
        return [1]

    assert [job.result() for job in [made.start(work), made.start(work)]] == [[1], [1]]
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

    for job in [made.start(work) for _ in range(20)]:
        job.result()
    assert 1 <= most[0] <= 2


def test_where_no_thread_can_be_started_the_caller_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(self: ThreadPoolExecutor, work: Any) -> Any:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", ending)
    done_by: list[str] = []
    job = node().start(lambda: done_by.append(threading.current_thread().name) or [b"x"])
    assert job.done() and job.result() == [b"x"] and done_by == [threading.current_thread().name]


def test_a_whole_batch_is_answered_while_the_interpreter_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(self: ThreadPoolExecutor, work: Any) -> Any:
        raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", ending)
    with SlotMap() as cluster, opened(cluster.url) as store:
        assert store.put_many([A, B], values(A, B)) == 2 and store.get_many([B, A]) == values(B, A)
        assert store.health().ok


def test_work_is_done_once_though_a_thread_could_not_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    made, runs = node(), []
    first, go_on = threading.Event(), threading.Event()

    def busy() -> list[Any]:
        first.set()
        go_on.wait(LONG_S)
        return []

    running = made.start(busy)
    assert first.wait(LONG_S)

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        assert made.start(lambda: runs.append(1) or [b"x"]).result() == [b"x"]
    go_on.set()
    running.result()
    made.start(lambda: []).result()
    assert runs == [1]


def test_a_renewed_node_has_new_threads_locks_and_breakers_and_no_connections() -> None:
    with ScriptedServer(lambda command: b"$-1\r\n") as server:
        made = Node("name", Pool(server.url, 2), 2)
        assert made.exchange([(b"GET", b"a")], Deadline(LONG_S)) == [None]
        made.start(lambda: []).result()
        (connection,) = made.pool._idle
        for breaker in (made.breaker, made.write_breaker):
            for _ in range(3):
                breaker.record(False)
        with made._lock, made.breaker._lock, made.write_breaker._lock, made.pool._lock:  # as others held them
            made.renew()
            assert made._workers is None and made.pool._idle == []
            assert (made.breaker.state, made.write_breaker.state) == ("closed", "closed")
            assert made.exchange([(b"GET", b"a")], Deadline(LONG_S)) == [None]
            assert made.start(lambda: [1]).result() == [1]
        assert made.pool._idle[0] is not connection
        connection.disconnect()


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
        exchange = Pool.exchange

        def interrupted(self: Pool, commands: Any, deadline: Deadline, *others: Any, **more: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                heard.wait(LONG_S)
                threading.Timer(0.1, held.set).start()
                raise Interrupted
            replies = exchange(self, commands, deadline, *others, **more)
            late.append(deadline.passed)
            return replies

        monkeypatch.setattr(Pool, "exchange", interrupted)
        room = [memoryview(bytearray(32)) for _ in range(2)]
        with pytest.raises(Interrupted):
            store.get_many([A, B], room)
        assert late == [True]  # it has ended, and before that learned that nobody waits


def test_a_server_is_not_blamed_for_a_deadline_that_others_used_up() -> None:
    with SlotMap() as cluster, opened(cluster.url) as store:
        store.get_many([A, B])
        parts = [SubBatch(made, [at]) for at, made in enumerate(store.nodes[:2])]
        cluster.forget()

        def work(made: Node, indices: Any, deadline: Deadline, asking: bool) -> Any:
            return made.exchange([(b"GET", b"a")], deadline)

        replies = store._at_once(parts, work, Deadline.until(0))
        assert [[reason_of(reply) for reply in its] for its in replies] == [["timeout"], ["timeout"]]
        assert [made.breaker.faults for made in store.nodes] == [0, 0, 0]


def test_what_large_values_add_to_one_servers_time_is_the_calls() -> None:
    with SlotMap() as cluster, opened(cluster.url) as store:
        store.get_many([A])
        deadline = Deadline(LONG_S)

        def work(made: Node, indices: Any, deadline: Deadline, asking: bool) -> Any:
            if made is store.nodes[1]:
                deadline.extend(5_000_000_000)
            return [deadline.remaining_to_connect()]

        (first,), (second,), (third,) = store._at_once([SubBatch(made, [0]) for made in store.nodes], work, deadline)
        assert max(first, third) <= LONG_S < second  # each has its own
        assert deadline.remaining_to_connect() > LONG_S


# --- the largest value --------------------------------------------------------------------------
@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def asking_for_memory(says: Callable[[], bytes], clock: FakeClock) -> tuple[ScriptedServer, Callable[[], Any]]:
    server = ScriptedServer(lambda command: says())
    made = Node("name", Pool(server.url, 1), 1, clock)
    return server, lambda: made.value_limit(Deadline(LONG_S))


def test_the_limit_is_remembered_for_a_minute(clock: FakeClock) -> None:
    memory = [1600]
    server, limit = asking_for_memory(
        lambda: resp(b"# Memory\r\nmaxmemory:%d\r\nmaxmemory_human:x\r\n" % memory[0]), clock
    )
    with server:
        assert limit() == 1600 // SHARE_OF_MEMORY
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
    ("said", "reason"),
    [
        (resp(b"# Memory\r\n"), "protocol"),
        (resp(b"not_maxmemory:7\r\n"), "protocol"),
        (b"$-1\r\n", "protocol"),
        (b":7\r\n", "protocol"),
        (b"-NOPERM no\r\n", "auth"),
        (b"-LOADING no\r\n", "loading"),
    ],
)
def test_a_limit_that_nobody_tells_is_asked_for_again(said: bytes, reason: str, clock: FakeClock) -> None:
    says = [said]
    server, limit = asking_for_memory(lambda: says[0], clock)
    with server:
        assert reason_of(limit()) == reason
        says[0] = resp(b"\r\nmaxmemory:160\r\n")
        assert limit() == 10


def test_a_fake_server_has_no_limit_of_its_own() -> None:
    assert Node("fake", FakePool(None), 1).value_limit(Deadline(LONG_S)) == MAX_VALUE_BYTES


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


def test_a_server_whose_limit_is_not_known_takes_no_writes_and_the_others_do() -> None:
    with SlotMap() as cluster, opened(cluster.url) as store:
        cluster.twist = lambda at, command: b"-NOPERM no\r\n" if at == 1 and command[0] == b"INFO" else ...
        assert store.put_many([A, B], [b"1", b"2"]) == 1
        assert store.stats().drops == store.stats().faults == Counter(auth=1) and cluster.asked(1, b"SET") == []


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
        replies = made.exchange([(b"GET", b"a"), (b"GET", b"b")], Deadline(LONG_S))
        assert [reason_of(reply) for reply in replies] == ["breaker"] * 2 and server.commands == []


def test_the_breaker_learns_how_each_round_trip_went() -> None:
    made = Node("name", Pool(f"redis://127.0.0.1:{free_port()}", 1), 1, FakeClock())
    for faults in (1, 2, 3):
        assert [reason_of(reply) for reply in made.exchange([(b"GET", b"a")], Deadline(LONG_S))] == ["conn"]
        assert made.breaker.faults == faults
    assert made.breaker.state == "open" and "open" in repr(made) and "name" in repr(made)


def test_a_server_alone_is_asked_by_the_callers_own_thread() -> None:
    threads: set[int] = set()
    with ScriptedServer(lambda command: b"$-1\r\n") as server, RedisStore(server.url, deadline_s=LONG_S) as store:
        work = Node.exchange
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Node, "exchange", lambda *a, **k: threads.add(threading.get_ident()) or work(*a, **k))
            store.get_many([A, B])
        assert threads == {threading.get_ident()} and store.nodes[0]._workers is None
