"""A scripted server sends the answers of its script to a socket and to a client library."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator

import pytest
import redis

from tests.harness.scripted import ScriptedServer, read_command
from tests.harness.talk import GET, WORDS, command, reply, take, take_all


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(reply) as made:
        yield made


def test_a_script_answers_each_command(server: ScriptedServer) -> None:
    value = bytes(range(256)) * 1000 + b"\r\n*1\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 5) as connection:
        parts = command(b"CLIENT", b"SETINFO", b"lib-name", b"x") + command(b"SET", b"k", value) + b"GET 1\r\n"
        for at in range(0, len(parts), 50_001):
            connection.sendall(parts[at : at + 50_001])
        expected = b"+OK\r\n+OK\r\n" + WORDS[1]
        assert take(connection, len(expected)) == expected
        connection.sendall(command(b"END"))
        assert take_all(connection) == (b"", "end")
    assert server.commands == [[b"SET", b"k", value], [b"GET", b"1"], [b"END"]]


def test_a_client_library_follows_a_script() -> None:
    with ScriptedServer(reply) as server:
        client = redis.Redis.from_url(server.url, protocol=2)
        assert (client.get("0"), client.get("3"), client.set("k", "v")) == (b"one", None, True)
        client.close()


@pytest.mark.parametrize("stream", [b"", GET[:1], GET[:3], GET[:6], GET[:-1], b"*1\r\n$"])
def test_half_a_command_is_none(stream: bytes) -> None:
    assert read_command(io.BytesIO(stream)) == []
