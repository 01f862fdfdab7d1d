"""The connections to one server: bounded, first come first served, and what a full pool says."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import fakeredis
import pytest

from kvlab.stores import RedisStore
from kvlab.stores.deadline import Deadline
from kvlab.stores.latch import Latch
from kvlab.stores.redis.connection import TooBig
from kvlab.stores.redis.pool import FakePool, NoConnection, Pool
from kvlab.stores.redis.reasons import is_ok, reason_of
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import RedisServer
from tests.harness.scripted import ScriptedServer
from tests.stores.redis.scripted import LONG_S, SHORT_S

VALUE = os.urandom(200_000)
GET = [(b"GET", b"a")]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda command: b"$3\r\none\r\n") as made:
        yield made


def ask(pool: Pool) -> Any:
    """One round trip, as a node makes it."""
    connection = pool.take(Deadline(LONG_S))
    try:
        return connection.exchange(GET, Deadline(LONG_S))
    finally:
        pool.give_back(connection)


def until(true: Callable[[], bool]) -> None:
    """Wait for another thread."""
    give_up = time.monotonic() + LONG_S
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.001)


# --- taken and given back -----------------------------------------------------------------------
def test_nothing_is_connected_before_it_is_needed(server: ScriptedServer) -> None:
    pool = Pool(server.url, 4)
    assert (pool.host, pool.address, server._open) == ("127.0.0.1", f"127.0.0.1:{server.port}", [])
    assert ask(pool) == [b"one"] and len(server._open) == 1


def test_the_last_one_used_is_the_first_one_taken(server: ScriptedServer) -> None:
    pool = Pool(server.url, 4)
    first, second = pool.take(Deadline(LONG_S)), pool.take(Deadline(LONG_S))
    for connection in (first, second):
        connection.exchange(GET, Deadline(LONG_S))
        pool.give_back(connection)
    assert pool.take(Deadline(LONG_S)) is second and pool.take(Deadline(LONG_S)) is first


def test_who_waits_longest_goes_next(server: ScriptedServer) -> None:
    pool, order = Pool(server.url, 1), list[int]()
    connection = pool.take(Deadline(LONG_S))
    connection.exchange(GET, Deadline(LONG_S))

    def wait(at: int) -> None:
        taken = pool.take(Deadline(LONG_S))
        order.append(at)
        pool.give_back(taken)

    threads = [threading.Thread(target=wait, args=(at,)) for at in range(5)]
    for at, thread in enumerate(threads):
        thread.start()
        until(lambda at=at: len(pool._queue) == at + 1)
    pool.give_back(connection)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4] and pool._idle == [connection]


def test_who_waits_for_half_of_the_time_in_vain_leaves_the_queue(server: ScriptedServer) -> None:
    pool = Pool(server.url, 1)
    held, deadline = pool.take(Deadline(LONG_S)), Deadline(SHORT_S)
    with pytest.raises(NoConnection, match="all 1 connections"):
        pool.take(deadline)
    assert not deadline.passed and not pool._queue
    pool.give_back(held)
    assert pool.take(Deadline(LONG_S)) is held


def test_who_is_interrupted_while_waiting_takes_no_connection_along(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(BaseException): ...

    pool = Pool(server.url, 1)
    held = pool.take(Deadline(LONG_S))
    held.exchange(GET, Deadline(LONG_S))

    def interrupted(latch: Latch, timeout_s: float | None = None) -> bool:
        pool.give_back(held)  # served at the same moment
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Latch, "wait", interrupted)
        with pytest.raises(Interrupted):
            pool.take(Deadline(LONG_S))
    assert pool.take(Deadline(LONG_S)) is held


def test_a_connection_out_of_step_is_closed_before_the_next_one_has_it(server: ScriptedServer) -> None:
    pool = Pool(server.url, 1)
    connection = pool.take(Deadline(LONG_S))
    connection.exchange([(b"EXISTS", b"a")], Deadline(LONG_S))  # a value is no answer to that
    assert not connection.reusable
    pool.give_back(connection)
    assert not connection.is_connected and ask(pool) == [b"one"] and len(server._open) == 2


def test_after_closing_what_comes_back_is_closed_too(server: ScriptedServer) -> None:
    pool = Pool(server.url, 2)
    used, idle = pool.take(Deadline(LONG_S)), pool.take(Deadline(LONG_S))
    for connection in (used, idle):
        connection.exchange(GET, Deadline(LONG_S))
    pool.give_back(idle)
    pool.close()
    assert (used.is_connected, idle.is_connected) == (True, False)
    pool.give_back(used)
    assert not used.is_connected
    pool.close()


def test_after_a_fork_connections_and_those_who_wait_are_the_parents(server: ScriptedServer) -> None:
    pool = Pool(server.url, 2)
    ask(pool)
    (connection,) = pool._idle
    with pool._lock:
        pool.reset_after_fork()
    assert ask(pool) == [b"one"] and pool._idle[0] is not connection and connection.is_connected
    connection.disconnect()


def test_a_map_is_asked_for_over_a_connection_of_its_own(server: ScriptedServer) -> None:
    pool = Pool(server.url, 1)
    held = pool.take(Deadline(LONG_S))
    assert pool.request((b"CLUSTER", b"SLOTS"), Deadline(LONG_S)) == b"one"
    assert server.commands == [[b"CLUSTER", b"SLOTS"]]
    pool.give_back(held)


def test_what_messages_must_not_show_is_known() -> None:
    assert Pool("redis://me:sec%20ret@h", 1).secrets == ("sec ret",)
    assert Pool("rediss://:p@h?ssl_password=key&ssl_keyfile=x", 1).secrets == ("p", "key")
    assert Pool("redis://h", 1).secrets == ()


@pytest.mark.parametrize("url", ["redis://h?no_such=1", "redis://h?socket_timeout=soon"])
def test_a_setting_that_is_none_shows_when_the_pool_is_made(url: str) -> None:
    with pytest.raises((TypeError, ValueError)):
        Pool(url, 1)


# --- fakeredis ----------------------------------------------------------------------------------
def test_a_fake_pool_answers_as_a_server_would() -> None:
    pool = FakePool(fakeredis.FakeRedis())
    assert pool.take(Deadline(0)) is pool and pool.ready and pool.reusable
    said = pool.exchange(
        [(b"SET", b"a", (b"o", memoryview(b"ne"))), (b"GET", b"a"), (b"TOUCH", b"a"), (b"GET", b"x"), (b"WAT",)],
        Deadline(0),
    )
    assert is_ok(said[0]) and said[1:4] == [b"one", 1, None] and reason_of(said[4]) == "response"
    room = [memoryview(bytearray(b"\xaa" * size)) for size in (4, 2)]
    fits, not_ = pool.exchange([(b"GET", b"a"), (b"GET", b"a")], Deadline(0), room)
    assert fits == b"one" and bytes(room[0]) == b"one\xaa"
    assert isinstance(not_, TooBig) and bytes(room[1]) == b"\xaa\xaa"


def test_whatever_a_fake_pool_raises_is_a_reply() -> None:
    pool = FakePool(None)
    assert [type(reply) for reply in pool.exchange(GET * 2, Deadline(0))] == [AttributeError] * 2


# --- a real server ------------------------------------------------------------------------------
@pytest.mark.redis
def test_connections_are_bounded(redis_server: RedisServer) -> None:
    with RedisStore(redis_server.url, deadline_s=LONG_S, max_connections=4) as store:
        store.put_many([b"a"], [VALUE])

        def read() -> None:
            for _ in range(50):
                assert store.get_many([b"a"]) == [VALUE]

        threads = [threading.Thread(target=read) for _ in range(24)]
        for thread in threads:
            thread.start()
        most = 0
        while any(thread.is_alive() for thread in threads):
            most = max(most, len(redis_server.client().client_list()))
        assert store.stats().hits == 24 * 50
        assert most <= 4 + 2  # and those of this test


@pytest.mark.redis
def test_a_full_pool_says_nothing_about_the_server(redis_server: RedisServer) -> None:
    with FaultProxy(redis_server.port) as proxy, RedisStore(proxy.url, deadline_s=4, max_connections=1) as store:
        store.put_many([b"a"], [b"one"])
        proxy.latency_s = 0.8
        answers: list[list[object]] = []
        threads = [threading.Thread(target=lambda: answers.append(store.get_many([b"a"]))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.stats().misses["pool"] >= 1 and store.nodes[0].breaker.state == "closed"
        store.stats().check()
