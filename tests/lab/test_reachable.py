"""A store that is needed fails at once where it cannot be used."""

import pytest

from kvlab.errors import ConfigError, KVLabError
from kvlab.lab.reachable import open_reachable
from kvlab.stores import RedisStore
from kvlab.testbed.server import RedisServer


def test_a_store_that_answers_comes_with_its_settings() -> None:
    with open_reachable("fakeredis://", ttl_s=7) as store:
        assert isinstance(store, RedisStore)
        assert store.put_many([b"k"], [b"v"]) == 1


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1", "redis://me:secret@127.0.0.1:1"])
def test_nobody_there(url: str) -> None:
    with pytest.raises(KVLabError, match=r"cannot be used .*127\.0\.0\.1:1: conn.*.*KVLAB_STORE") as raised:
        open_reachable(url)
    assert "secret" not in str(raised.value)


@pytest.mark.redis
def test_a_server_that_takes_no_writes() -> None:
    with RedisServer("--maxmemory", "1") as server, pytest.raises(KVLabError, match="cannot be used"):
        open_reachable(server.url)


@pytest.mark.parametrize("url", ["", "http://x", "redis://localhost:65536", "redis://localhost:6379\n"])
def test_no_url_of_a_store(url: str) -> None:
    with pytest.raises(ConfigError):
        open_reachable(url)
