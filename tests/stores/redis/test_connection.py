"""One connection: what is sent, replies of every shape, logins, settings, and when a connection is not used again."""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlab.stores import RedisStore
from kvlab.stores.base import MAX_VALUE_BYTES, joined
from kvlab.stores.deadline import Deadline
from kvlab.stores.redis.connection import Connection, TooBig, pack
from kvlab.stores.redis.pool import Pool
from kvlab.stores.redis.reasons import reason_of
from kvlab.testbed.certs import make_certs
from kvlab.testbed.server import RedisServer
from tests.harness.scripted import ScriptedServer
from tests.stores.redis.scripted import CLOSED, LONG_S, SHORT_S, SILENT, Said, resp

VALUE = os.urandom(200_000)


def connected_to(url: str) -> Connection:
    made: Connection = Pool(url, 1).take(Deadline(LONG_S))
    return made


def said_by(answer: Said, command: tuple[bytes, ...], out: memoryview | None = None, deadline_s: float = LONG_S) -> Any:
    """A server's reply as the connection takes it; the connection is checked to be in step or closed."""
    with ScriptedServer(lambda words: answer) as server:
        connection = connected_to(server.url)
        (reply,) = connection.exchange([command], Deadline(deadline_s), None if out is None else [out])
        assert connection.ready
        connection.disconnect()
        return reply


# --- what is sent -------------------------------------------------------------------------------
def plain(commands: list[tuple[Any, ...]]) -> bytes:
    """The protocol by the book."""
    return b"".join(
        b"*%d\r\n" % len(command) + b"".join(b"$%d\r\n%b\r\n" % (len(joined(a)), joined(a)) for a in command)
        for command in commands
    )


ARGUMENTS = st.one_of(
    st.binary(max_size=20),
    st.binary(max_size=20).map(memoryview),
    st.tuples(st.binary(max_size=9), st.binary(max_size=9).map(memoryview)),
    st.sampled_from([VALUE, memoryview(VALUE), (b"head", memoryview(VALUE), b"tail")]),
)


@given(st.lists(st.lists(ARGUMENTS, min_size=1, max_size=4).map(tuple), max_size=5))
def test_commands_are_packed_by_the_book(commands: list[tuple[Any, ...]]) -> None:
    assert b"".join(pack(commands)) == plain(commands)


def test_large_pieces_are_the_callers_own_memory() -> None:
    head, *rest = pack([(b"SET", b"a", (b"header", memoryview(VALUE))), (b"GET", b"a")])
    assert len(rest) == 2 and isinstance(rest[0], memoryview) and rest[0].obj is VALUE
    assert bytes(head).endswith(b"header") and bytes(rest[1]).startswith(b"\r\n*2\r\n")


# --- replies of every shape ---------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer", "command", "reply"),
    [
        (b"$3\r\none\r\n", b"GET", b"one"),
        (b"$0\r\n\r\n", b"GET", b""),
        (b"$-1\r\n", b"GET", None),
        (b"$4\r\n\r\n\r\n\r\n", b"GET", b"\r\n\r\n"),
        (resp(VALUE), b"GET", VALUE),
        (resp(b"# Memory\r\nmaxmemory:7\r\n"), b"INFO", b"# Memory\r\nmaxmemory:7\r\n"),
        (b"+OK\r\n", b"SET", b"OK"),
        (b"+OK\r\n", b"READONLY", b"OK"),
        (b":1\r\n", b"EXISTS", 1),
        (b":0\r\n", b"PEXPIRE", 0),
        (b":12\r\n", b"TOUCH", 12),
        (b":9223372036854775807\r\n", b"DEL", 2**63 - 1),
    ],
)
def test_a_reply_is_what_its_command_replies_with(answer: bytes, command: bytes, reply: Any) -> None:
    assert said_by(answer, (command, b"a")) == reply


@pytest.mark.parametrize(
    ("answer", "command", "reason"),
    [
        (b":1\r\n", b"GET", "protocol"),
        (b"+OK\r\n", b"GET", "protocol"),
        (b"*0\r\n", b"GET", "protocol"),
        (b"$2\r\nOK\r\n", b"SET", "protocol"),
        (b"$-1\r\n", b"SET", "protocol"),
        (b"+1\r\n", b"EXISTS", "protocol"),
        (b":\r\n", b"EXISTS", "protocol"),
        (b":-1\r\n", b"EXISTS", "protocol"),
        (b":1e3\r\n", b"DEL", "protocol"),
        (b":99999999999999999999\r\n", b"DEL", "protocol"),
        (":٣\r\n".encode(), b"DEL", "protocol"),
        (b"$-2\r\n", b"GET", "protocol"),
        (b"$x\r\n", b"GET", "protocol"),
        (b"$3\r\nonetwo\r\n", b"GET", "protocol"),
        (b"_\r\n", b"GET", "protocol"),  # protocol 3
        (b"#t\r\n", b"EXISTS", "protocol"),
        (b"!3\r\nERR\r\n", b"GET", "protocol"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"GET", "protocol"),
        (b"\r\n", b"GET", "protocol"),
        (b"x" * 5000, b"GET", "protocol"),
        (b"-MOVED\r\n", b"GET", "protocol"),
        (b"-\r\n", b"GET", "response"),
        (b"-\xff\xfe\r\n", b"GET", "response"),
        (b"$%d\r\n" % (MAX_VALUE_BYTES + 1), b"GET", "too_big"),
        (b"$9999999999999999999\r\n", b"GET", "too_big"),
        (CLOSED, b"GET", "conn"),
    ],
)
def test_any_other_reply_is_a_fault(answer: Said, command: bytes, reason: str) -> None:
    assert reason_of(said_by(answer, (command, b"a"))) == reason


@pytest.mark.parametrize("answer", [SILENT, b"$", b"$3", b"$3\r\n", b"$3\r\non", b"$3\r\none", b"$3\r\none\r", b"-ERR"])
def test_a_reply_that_does_not_end_is_a_timeout(answer: bytes) -> None:
    assert reason_of(said_by(answer, (b"GET", b"a"), deadline_s=SHORT_S / 4)) == "timeout"


@pytest.mark.parametrize("length", [0, 1, 3, 4095, 4096, 4097, 200_000])
@pytest.mark.parametrize("more", [0, 1, 5000])
def test_a_value_fills_the_start_of_its_buffer(length: int, more: int) -> None:
    room = memoryview(bytearray(b"\xaa" * (length + more)))
    got = said_by(resp(VALUE[:length]), (b"GET", b"a"), room)
    assert got.obj is room.obj and bytes(room) == VALUE[:length] + b"\xaa" * more


def test_values_that_do_not_fit_are_skipped_and_those_behind_them_come() -> None:
    answer = resp(VALUE) + resp(b"tiny") + resp(b"two") + resp(b"last")
    with ScriptedServer(lambda words: answer if words[1] == b"a" else b"") as server:
        connection = connected_to(server.url)
        room = [memoryview(bytearray(size)) for size in (100_000, 4, 2, 4)]
        commands = [(b"GET", key) for key in (b"a", b"b", b"c", b"d")]
        first, second, third, last = connection.exchange(commands, Deadline(LONG_S), room)
        assert isinstance(first, TooBig) and isinstance(third, TooBig) and connection.reusable
        assert (second, last) == (b"tiny", b"last") and bytes(room[0]) == bytes(100_000) and bytes(room[2]) == bytes(2)
        connection.disconnect()


def test_one_round_trip_takes_one_reply_a_command_and_stays_in_step() -> None:
    with ScriptedServer(lambda words: resp(words[-1])) as server:
        connection = connected_to(server.url)
        for _ in range(3):
            keys = [b"%d" % i for i in range(2000)]
            assert connection.exchange([(b"GET", key) for key in keys], Deadline(LONG_S)) == keys
            assert connection.reusable
        assert len(server._open) == 1
        connection.disconnect()


def test_an_error_is_the_reply_to_its_command_alone() -> None:
    with ScriptedServer(lambda words: b"-OOM full\r\n" if words[1] == b"b" else b"+OK\r\n") as server:
        connection = connected_to(server.url)
        said = connection.exchange([(b"SET", key, b"") for key in (b"a", b"b", b"c")], Deadline(LONG_S))
        assert (said[0], reason_of(said[1]), said[2], connection.reusable) == (b"OK", "oom", b"OK", True)
        connection.disconnect()


# --- when a connection is not used again --------------------------------------------------------
def test_replies_that_did_not_come_are_the_fault_that_broke_it() -> None:
    with ScriptedServer(lambda words: CLOSED if words[1] == b"b" else b"$3\r\none\r\n") as server:
        connection = connected_to(server.url)
        said = connection.exchange([(b"GET", key) for key in (b"a", b"b", b"c")], Deadline(LONG_S))
        assert said[0] == b"one" and [reason_of(reply) for reply in said[1:]] == ["conn", "conn"]
        assert said[1] is said[2] and (connection.ready, connection.reusable) == (True, False)


@pytest.mark.parametrize("more", [b":1\r\n", b"\r\n", b"-ERR late\r\n", b"$3\r\none\r\n"])
def test_more_than_was_asked_for_leaves_it_out_of_step(more: bytes) -> None:
    with ScriptedServer(lambda words: b"$-1\r\n" + more) as server:
        connection = connected_to(server.url)
        assert connection.exchange([(b"GET", b"a")], Deadline(LONG_S)) == [None]
        late = not connection.reusable or connection._receive_unrequested()  # as it arrives
        assert late
        connection.disconnect()


@pytest.mark.parametrize("how", ["hang up", "speak"])
def test_a_server_that_hung_up_or_spoke_meanwhile_is_connected_again(how: str) -> None:
    done = threading.Event()
    with ScriptedServer(lambda words: b"$3\r\none\r\n") as server:
        connection = connected_to(server.url)
        assert connection.exchange([(b"GET", b"a")], Deadline(LONG_S)) == [b"one"]
        (theirs,) = server._open
        if how == "speak":
            theirs.sendall(b"$3\r\nbad\r\n")
        else:
            theirs.shutdown(socket.SHUT_WR)
        while not (server_spoke := connection._sock.recv(1, socket.MSG_PEEK)) and how == "speak":
            done.wait(0.001)
        assert bool(server_spoke) == (how == "speak")
        assert connection.exchange([(b"GET", b"a")], Deadline(LONG_S)) == [b"one"] and len(server._open) == 2
        connection.disconnect()


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b"-ERR max number of clients reached\r\n", "conn"),
        (b"-ERR max number of clients + cluster connections reached\r\n", "conn"),
        (b"-DENIED Redis is running in protected mode\r\n", "auth"),
        (b"HTTP/1.1 400 Bad Request\r\n", "protocol"),
    ],
)
def test_a_server_that_speaks_first_is_heard(greeting: bytes, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            theirs, _ = listener.accept()
            theirs.sendall(greeting)
            theirs.close()

        threading.Thread(target=greet, daemon=True).start()
        connection = connected_to(f"redis://127.0.0.1:{listener.getsockname()[1]}")
        (reply,) = connection.exchange([(b"GET", b"a")], Deadline(LONG_S))
        assert reason_of(reply) in (reason, "conn")  # hung up before the greeting was read
        connection.disconnect()


# --- on connecting ------------------------------------------------------------------------------
REFUSED = [b"-ERR no\r\n", b"-NOPERM no\r\n", b"-LOADING no\r\n", b":1\r\n", CLOSED]


@pytest.mark.parametrize("said", REFUSED)
@pytest.mark.parametrize("step", ["SELECT", "READONLY", "AUTH"])
def test_a_connection_whose_set_up_is_refused_asks_nothing(step: str, said: Said) -> None:
    with ScriptedServer(lambda words: said if words[0] == step.encode() else b"+OK\r\n") as server:
        url = server.url.replace("//", "//:secret@") + "/3"
        pool = Pool(url, 1, read_only=True)
        connection = pool.take(Deadline(LONG_S))
        (reply,) = connection.exchange([(b"GET", b"a")], Deadline(LONG_S))
        assert isinstance(reply, Exception) and not connection.ready
        pool.give_back(connection)
        assert not connection.is_connected and b"GET" not in [words[0] for words in server.commands]


def test_a_set_up_that_is_refused_opens_the_breaker() -> None:
    server = ScriptedServer(lambda words: b"-ERR DB index is out of range\r\n")
    with server, RedisStore(f"{server.url}/99", deadline_s=LONG_S) as store:
        for _ in range(5):
            assert store.get_many([b"a"]) == [None]
        assert store.stats().misses["breaker"] == 2 and store.nodes[0].breaker.state == "open"
        assert len(server.commands) == 3 and "out of range" in store.health().detail


@pytest.mark.redis
def test_a_certificate_of_another_ca_is_refused(own_tls: RedisServer, tmp_path: Path) -> None:
    other = make_certs(tmp_path / "other")
    mine, _, query = own_tls.tls_url.partition("?")
    assert query
    with RedisStore(f"{mine}?ssl_ca_certs={other.ca}", deadline_s=LONG_S) as store:
        assert store.get_many([b"a"]) == [None]
        assert store.stats().misses == Counter(conn=1)
        assert "certificate verify failed" in store.health().detail.lower()


def test_a_wrong_password_is_tried_once_a_call_and_then_left_alone() -> None:
    tried = []

    def script(command: list[bytes]) -> bytes:
        tried.append(command[0].upper())
        return b"-WRONGPASS invalid username-password pair or user is disabled.\r\n"

    with ScriptedServer(script) as server:
        url = server.url.replace("redis://", "redis://:wrong@")
        with RedisStore(url, deadline_s=LONG_S) as store:
            for calls in (1, 2, 3):
                store.get_many([b"a"])
                assert tried == [b"AUTH"] * calls
            for _ in range(20):
                store.get_many([b"a"])
            assert tried == [b"AUTH"] * 3
            assert store.stats().misses == Counter(auth=3, breaker=20)


@pytest.mark.redis
@pytest.mark.parametrize("setting", ["protocol=3", "decode_responses=True", "socket_timeout=0.001"])
def test_settings_in_the_url_do_not_change_how_it_speaks(redis_server: RedisServer, setting: str) -> None:
    with RedisStore(f"{redis_server.url}?{setting}", deadline_s=LONG_S) as store:
        assert store.put_many([b"a"], [VALUE]) == 1
        assert store.get_many([b"a", b"b"]) == [VALUE, None]
