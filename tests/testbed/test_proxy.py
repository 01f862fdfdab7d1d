"""The proxy's faults happen, its counts are right, and it leaves nothing behind."""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import redis

from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import RedisServer, free_port
from tests.harness.scripted import ScriptedServer
from tests.harness.talk import LONG, WORDS, ask, command, reply, take, take_all


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(reply) as made:
        yield made


@pytest.fixture
def proxy(server: ScriptedServer) -> Iterator[FaultProxy]:
    """A proxy that leaves no thread and logs nothing."""
    with FaultProxy(server.port) as made:
        yield made
    assert not [thread for thread in threading.enumerate() if thread.name == "fault-proxy"]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nobody prints a traceback."""
    with caplog.at_level(logging.WARNING, "asyncio"):
        yield
    assert [record.getMessage() for record in caplog.records] == []
    assert "Traceback" not in capfd.readouterr().err


def dial(proxy: FaultProxy, timeout_s: float = 5.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout_s)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def check_takes(low: float, high: float, call: Callable[[], object]) -> None:
    """Never faster; and not slower either, once out of five, for the machine may be busy."""
    for _ in range(5):
        took = seconds(call)
        assert took >= low
        if took < high:
            return
    pytest.fail(f"five times over {high} s, the last {took} s")


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# --- the proxy: passing on and counting ----------------------------------------------------------
def test_without_faults_everything_passes_and_is_counted(proxy: FaultProxy) -> None:
    with dial(proxy) as one, dial(proxy) as two:
        assert ask(one, b"GET", b"0") == WORDS[0]
        assert ask(two, b"LONG") == LONG
        assert (proxy.accepted, proxy.open_connections) == (2, 2)
        assert proxy.bytes_up == len(command(b"GET", b"0") + command(b"LONG"))
        assert proxy.bytes_down == len(WORDS[0] + LONG)
        assert proxy.round_trips() == proxy.exchanges() == 2
    wait_for(lambda: proxy.open_connections == 0)
    assert proxy.accepted == 2


def test_a_round_trip_is_a_turn_of_direction(proxy: FaultProxy) -> None:
    with dial(proxy) as connection:
        ask(connection, b"GET", b"0")
        ask(connection, b"GET", b"1")
        assert proxy.round_trips() == 2
        proxy.reset_counts()
        connection.sendall(b"".join(command(b"GET", b"%d" % i) for i in range(4)))
        assert take(connection, len(b"".join(WORDS))) == b"".join(WORDS)
        assert (proxy.round_trips(), proxy.exchanges(), proxy.accepted) == (1, 1, 0)


def test_a_client_that_goes_on_sending_while_it_is_answered_made_one_exchange(proxy: FaultProxy) -> None:
    with dial(proxy) as connection:
        connection.sendall(command(b"GET", b"0") + command(b"GET", b"1")[:9])
        take(connection, len(WORDS[0]))
        connection.sendall(command(b"GET", b"1")[9:] + command(b"LONG") + command(b"GET", b"0")[:1])
        take(connection, len(WORDS[1] + LONG))
        assert proxy.round_trips() == 2
        assert proxy.exchanges() == 2, "the first piece of the second command was not yet owed an answer"


def test_an_exchange_lasts_until_every_command_is_answered(proxy: FaultProxy) -> None:
    proxy.slices = (len(WORDS[0]), 0.05)
    with dial(proxy) as connection:
        connection.sendall(command(b"GET", b"0") * 2)
        take(connection, len(WORDS[0]))
        connection.sendall(command(b"GET", b"0"))
        take(connection, 2 * len(WORDS[0]))
        assert (proxy.round_trips(), proxy.exchanges()) == (2, 1)


def test_a_client_that_leaves_ends_the_servers_connection_and_the_other_way_round(
    server: ScriptedServer, proxy: FaultProxy
) -> None:
    with dial(proxy) as connection:
        connection.sendall(command(b"END"))
        assert take_all(connection) == (b"", "end")
    dial(proxy).close()
    wait_for(lambda: proxy.open_connections == 0)


def test_an_upstream_that_is_not_there_is_a_closed_connection() -> None:
    with FaultProxy(free_port()) as proxy, dial(proxy) as connection:
        assert take_all(connection) == (b"", "end")


# --- the proxy: bytes ----------------------------------------------------------------------------
@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
@pytest.mark.parametrize("n", [0, 1, 9, 65_536, 262_145, len(LONG) - 1, len(LONG)])
def test_a_truncated_answer_has_exactly_n_bytes(proxy: FaultProxy, n: int, reset: bool) -> None:
    with dial(proxy) as connection:
        ask(connection, b"GET", b"0")
        proxy.truncate(n, reset)
        connection.sendall(command(b"LONG") + command(b"GET", b"1"))
        assert take_all(connection) == (LONG[:n], "reset" if reset else "end")
    assert proxy.fired == {"truncate": 1}
    with dial(proxy) as connection:
        assert ask(connection, b"LONG") == LONG


def test_an_answer_can_be_truncated_by_the_death_of_the_server() -> None:
    dead = []
    with ScriptedServer(reply) as server, FaultProxy(server.port) as proxy, dial(proxy) as connection:
        proxy.truncate(1000, call=lambda: dead.append(proxy.bytes_down))
        connection.sendall(command(b"LONG"))
        assert take_all(connection) == (LONG[:1000], "end")
    assert dead == [1000]


@pytest.mark.parametrize(("n", "bit"), [(0, 0), (100, 7), (len(LONG) - 1, 3)])
def test_one_bit_of_one_byte_is_flipped(proxy: FaultProxy, n: int, bit: int) -> None:
    with dial(proxy) as connection:
        ask(connection, b"GET", b"0")
        proxy.flip(n, bit)
        got = ask(connection, b"LONG")
        changed = [(i, a ^ b) for i, (a, b) in enumerate(zip(got, LONG, strict=True)) if a != b]
        assert changed == [(n, 1 << bit)]
        assert ask(connection, b"LONG") == LONG
    assert proxy.fired == {"flip": 1}


def test_something_can_be_done_after_n_bytes(proxy: FaultProxy) -> None:
    def hold() -> None:
        proxy.hold = True

    proxy.after(1000, hold)
    with dial(proxy, 0.1) as connection:
        connection.sendall(command(b"LONG"))
        assert take_all(connection) == (LONG[:1000], "open")
        proxy.hold = False
        connection.settimeout(5)
        assert take(connection, len(LONG) - 1000) == LONG[1000:]


def test_faults_at_bytes_may_be_combined(proxy: FaultProxy) -> None:
    seen: list[int] = []
    proxy.after(10, lambda: seen.append(proxy.bytes_down))
    proxy.flip(10)
    proxy.flip(11)
    proxy.truncate(12)
    with dial(proxy) as connection:
        connection.sendall(command(b"LONG"))
        got, end = take_all(connection)
    assert (got, end, seen) == (LONG[:10] + b"\x01\x01", "end", [10])


# --- the proxy: replies --------------------------------------------------------------------------
@pytest.mark.parametrize("k", range(4))
def test_a_reply_is_sent_twice(proxy: FaultProxy, k: int) -> None:
    proxy.double(k)
    with dial(proxy) as connection:
        connection.sendall(command(b"ALL"))
        expected = b"".join([*WORDS[: k + 1], *WORDS[k:]])
        assert take(connection, len(expected)) == expected
        assert ask(connection, b"GET", b"0") == WORDS[0]
    assert proxy.fired == {"double": 1}


@pytest.mark.parametrize("k", range(3))
def test_two_replies_change_places(proxy: FaultProxy, k: int) -> None:
    proxy.swap(k)
    with dial(proxy) as connection:
        connection.sendall(command(b"ALL"))
        expected = b"".join([*WORDS[:k], WORDS[k + 1], WORDS[k], *WORDS[k + 2 :]])
        assert take(connection, len(expected)) == expected
        assert ask(connection, b"LONG") == LONG
    assert proxy.fired == {"swap": 1}


def test_long_replies_change_places_whole(proxy: FaultProxy) -> None:
    proxy.swap()
    with dial(proxy) as connection:
        connection.sendall(command(b"LONG") + command(b"GET", b"0"))
        assert take(connection, len(LONG + WORDS[0])) == WORDS[0] + LONG


# --- the proxy: time -----------------------------------------------------------------------------
def test_an_answer_comes_later_and_all_of_it_together(proxy: FaultProxy) -> None:
    proxy.latency_s = 0.1
    with dial(proxy) as connection:
        check_takes(0.1, 0.2, lambda: ask(connection, b"LONG"))
        proxy.latency_s = 0
        check_takes(0, 0.1, lambda: ask(connection, b"LONG"))


def test_jitter_is_drawn_from_the_seed(server: ScriptedServer) -> None:
    draws = random.Random(7)
    with FaultProxy(server.port, seed=7) as proxy, dial(proxy) as connection:
        proxy.latency_s, proxy.jitter_s = 0.01, 0.05
        for _ in range(4):
            assert seconds(lambda: ask(connection, b"GET", b"0")) >= 0.01 + draws.uniform(0, 0.05)
        check_takes(0.01, 0.08, lambda: ask(connection, b"GET", b"0"))


def test_bandwidth_is_kept(proxy: FaultProxy) -> None:
    proxy.bandwidth = 3e6
    with dial(proxy) as connection:
        check_takes(0.1 / 3, 0.1 * 3, lambda: ask(connection, b"LONG"))


def test_upload_bandwidth_is_kept(proxy: FaultProxy) -> None:
    proxy.upload_bandwidth = 3e6
    with dial(proxy) as connection:
        check_takes(0.1 / 3, 0.1 * 3, lambda: ask(connection, b"SET", b"k", bytes(300_000)))


def test_slices_have_at_most_n_bytes(proxy: FaultProxy) -> None:
    proxy.slices = (4, 0.02)
    sizes = []
    with dial(proxy) as connection:
        connection.sendall(command(b"GET", b"2"))
        start = time.perf_counter()
        while sum(sizes) < len(WORDS[2]):
            sizes.append(len(connection.recv(100)))
    assert time.perf_counter() - start >= 0.02 * (len(WORDS[2]) // 4)
    assert min(sizes) <= 4 and len(sizes) > 1  # on a busy machine some slices are found together


def test_a_black_hole_accepts_and_says_nothing(server: ScriptedServer, proxy: FaultProxy) -> None:
    with dial(proxy, 0.05) as old:
        ask(old, b"GET", b"0")
        proxy.blackhole = True
        with dial(proxy, 0.05) as new:
            new.sendall(command(b"GET", b"1"))
            old.sendall(command(b"GET", b"2"))
            assert take_all(new) == take_all(old) == (b"", "open")
            assert len(server.commands) == 1
            proxy.blackhole = False
            for connection, word in ((new, WORDS[1]), (old, WORDS[2])):
                connection.settimeout(5)
                assert take(connection, len(word)) == word


def test_held_answers_wait_though_the_server_heard_the_command(server: ScriptedServer, proxy: FaultProxy) -> None:
    proxy.hold = True
    with dial(proxy, 0.05) as connection:
        connection.sendall(command(b"GET", b"1"))
        assert take_all(connection) == (b"", "open")
        assert server.commands == [[b"GET", b"1"]]
        proxy.hold = False
        connection.settimeout(5)
        assert take(connection, len(WORDS[1])) == WORDS[1]


# --- the proxy: connections ----------------------------------------------------------------------
def test_connections_are_reset(proxy: FaultProxy) -> None:
    with dial(proxy) as old:
        ask(old, b"GET", b"0")
        proxy.reset = True
        with pytest.raises(ConnectionResetError), dial(proxy) as new:
            new.recv(1)
        assert ask(old, b"GET", b"0") == WORDS[0]
    assert proxy.accepted == 2


def test_connections_are_refused_and_accepted_again_on_the_same_port(proxy: FaultProxy) -> None:
    port = proxy.port
    with dial(proxy) as old:
        ask(old, b"GET", b"0")
        for _ in range(2):
            proxy.refuse = True
            with pytest.raises(ConnectionRefusedError):
                dial(proxy)
            assert ask(old, b"GET", b"0") == WORDS[0]
            proxy.refuse = False
            with dial(proxy) as new:
                assert ask(new, b"GET", b"1") == WORDS[1]
    assert proxy.port == port


@pytest.mark.parametrize("reset", [False, True])
def test_open_connections_are_dropped(proxy: FaultProxy, reset: bool) -> None:
    with dial(proxy) as connection:
        ask(connection, b"GET", b"0")
        proxy.drop(reset)
        assert take_all(connection) == (b"", "reset" if reset else "end")


def test_healing_ends_every_fault(proxy: FaultProxy) -> None:
    proxy.latency_s, proxy.bandwidth, proxy.blackhole, proxy.hold, proxy.reset = 9.0, 1.0, True, True, True
    proxy.slices, proxy.refuse = (1, 9.0), True
    proxy.truncate(0)
    proxy.flip(0)
    proxy.double()
    proxy.heal()
    with dial(proxy) as connection:
        assert ask(connection, b"LONG") == LONG
    assert not proxy.fired


def test_the_end_waits_for_nobody(server: ScriptedServer) -> None:
    with FaultProxy(server.port) as proxy:
        connections = [dial(proxy) for _ in range(5)]
        for connection, fault in zip(connections, ("hold", "blackhole", "latency_s", "none", "none"), strict=True):
            setattr(proxy, fault, 60)
            connection.sendall(command(b"LONG"))
        time.sleep(0.05)
        start = time.perf_counter()
    assert time.perf_counter() - start < 5.0
    for connection in connections:
        connection.close()


def test_a_fault_of_the_proxy_itself_is_not_kept_quiet(server: ScriptedServer) -> None:
    with pytest.raises(RuntimeError, match="the proxy itself failed"), FaultProxy(server.port) as proxy:
        proxy.after(1, lambda: 1 / 0)
        with dial(proxy) as connection:
            connection.sendall(command(b"LONG"))
            take_all(connection)


@pytest.mark.redis
def test_redis_speaks_through_the_proxy(redis_server: RedisServer) -> None:
    value = os.urandom(8_000_000)
    with FaultProxy(redis_server.port) as proxy:
        client = redis.Redis.from_url(proxy.url, protocol=2, socket_timeout=5)
        client.set("k", value)
        proxy.reset_counts()
        assert client.get("k") == value
        assert (proxy.round_trips(), proxy.exchanges()) == (1, 1)
        with client.pipeline(transaction=False) as pipeline:
            for _ in range(100):
                pipeline.get("nothing")
            assert pipeline.execute() == [None] * 100
        assert proxy.exchanges() == 2
        client.close()
