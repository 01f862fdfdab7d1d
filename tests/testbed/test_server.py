"""Servers of our own: they listen, can be made to hang or die, and end with their block."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import redis

from kvlab.errors import KVLabError
from kvlab.testbed import server as server_module
from kvlab.testbed.server import RedisServer, free_port


@pytest.mark.redis
def test_it_listens_both_ways_and_ends_with_its_block() -> None:
    with RedisServer("--maxmemory", "8mb") as server:
        for address in (server.url, server.unix_url):
            client = redis.Redis.from_url(address)
            assert client.ping() and client.config_get("maxmemory")["maxmemory"] == str(8 << 20)
            assert client.config_get("bind")["bind"] == "127.0.0.1"
        assert server.running and server.folder.exists()
    assert not server.running and not server.folder.exists()
    with pytest.raises(redis.ConnectionError):
        server.client(retry=None).ping()


@pytest.mark.redis
def test_a_paused_server_hangs_and_then_goes_on() -> None:
    with RedisServer() as server:
        client = server.client(socket_timeout=0.2, retry=None)
        with server.paused(), pytest.raises(redis.TimeoutError):
            client.ping()
        assert server.client().ping()


@pytest.mark.redis
def test_a_server_may_die_while_it_is_paused() -> None:
    with RedisServer() as server:
        with server.paused():
            server.kill()
        assert not server.running


@pytest.mark.redis
def test_options_of_the_server_survive_a_restart() -> None:
    with RedisServer("--maxmemory", "3mb", debug=True) as server:
        for _ in range(2):
            client = server.client()
            assert client.config_get("maxmemory") == {"maxmemory": "3145728"}
            assert client.execute_command("DEBUG", "SLEEP", "0") == b"OK"
            client.close()
            server.kill()
            server.start()


@pytest.mark.redis
def test_a_port_that_was_taken_meanwhile_costs_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = iter([taken.getsockname()[1], free_port()])
        monkeypatch.setattr(server_module, "free_port", lambda: next(ports))
        with RedisServer() as server:
            assert server.client().ping()


@pytest.mark.redis
def test_a_server_that_ends_at_once_is_an_error_with_its_last_words() -> None:
    server = RedisServer("--no-such-option", "1")
    with pytest.raises(KVLabError, match=r"exited at once: (?s:.*)no-such-option"), server:
        pass
    assert not server.folder.exists()


def test_it_says_how_to_install_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(KVLabError, match=r"redis-server is not installed: .*apt-get install redis-server"),
        RedisServer(),
    ):
        pass


@pytest.mark.redis
def test_without_certificates_there_is_no_address_over_tls(redis_server: RedisServer) -> None:
    with pytest.raises(KVLabError, match="no certificates"):
        _ = redis_server.tls_url


@pytest.mark.valkey
def test_valkey_is_valkey(valkey_server: RedisServer) -> None:
    with valkey_server.client() as client:
        assert client.info("server")["server_name"] == "valkey"
