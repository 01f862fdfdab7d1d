"""Servers that a measurement or a notebook cell starts: they listen, can be made to hang, and end with their block."""

from __future__ import annotations

import pytest
import redis

from kvlab.errors import KVLabError
from kvlab.testbed.server import with_redis


@pytest.mark.redis
def test_it_listens_both_ways_and_ends_with_its_block() -> None:
    with with_redis("--maxmemory", "8mb") as url:
        for address in (url, url.unix_url):
            client = redis.Redis.from_url(address)
            assert client.ping() and client.config_get("maxmemory")["maxmemory"] == str(8 << 20)
            assert client.config_get("bind")["bind"] == "127.0.0.1"
    with pytest.raises(redis.ConnectionError):
        redis.Redis.from_url(url, retry=None).ping()


@pytest.mark.redis
def test_a_paused_server_hangs_and_then_goes_on() -> None:
    with with_redis() as url:
        client = redis.Redis.from_url(url, socket_timeout=0.2, retry=None)
        with url.paused(), pytest.raises(redis.TimeoutError):
            client.ping()
        assert redis.Redis.from_url(url).ping()


@pytest.mark.redis
def test_a_server_that_ends_at_once_is_an_error() -> None:
    with pytest.raises(KVLabError, match="did not come up"), with_redis("--no-such-option", "1"):
        pass


def test_it_says_how_to_install_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(KVLabError, match="apt-get install redis-server"), with_redis():
        pass
