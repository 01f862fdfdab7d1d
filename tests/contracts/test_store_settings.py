"""Settings of stores: what cannot be meant is refused at once, and what they bound is bounded."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kvlab.errors import ConfigError
from kvlab.stores import MemoryStore, RedisStore, Store
from kvlab.stores.redis.connection import Command
from kvlab.stores.redis.node import Node
from kvlab.testbed.server import RedisServer
from tests.contracts.test_store import EXPIRY_BOUND_S, named


@pytest.mark.parametrize("make", [MemoryStore, RedisStore])
@pytest.mark.parametrize("ttl", [0, -1, -0.5, float("nan"), float("-inf")])
def test_a_ttl_that_is_not_positive_is_refused(make: Callable[..., Store], ttl: float) -> None:
    with pytest.raises(ConfigError, match=r"expected a TTL .* above 0"):
        make(ttl_s=ttl)


def test_an_endless_ttl_is_no_ttl_or_refused() -> None:
    try:
        store = RedisStore(ttl_s=float("inf"))
    except ConfigError:
        return
    store.put_many([b"a"], [b"one"])
    assert store.get_many([b"a"]) == [b"one"]


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_deadline_that_is_not_positive_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"expected deadline_s .* above 0"):
        RedisStore(deadline_s=seconds)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://localhost",
        "memcached://localhost",
        "redis://localhost:port",
        "redis://localhost:99999",
        "redis://[::1",
        "redis://localhost/notanumber",
        "redis://localhost?no_such_setting=1",
        "redis://localhost?socket_timeout=soon",
        "rediss://localhost?ssl_ca_certs=/no/such/ca.crt",
        "redis-cluster://",
        "redis-cluster://localhost:port,localhost",
        "redis-cluster://localhost,localhost:99999",
        "redis-cluster://localhost/1",
        "redis-cluster://localhost?no_such_setting=1",
        "rediss-cluster://localhost?ssl_ca_certs=/no/such/ca.crt",
        "redis-sentinel:///main",
        "redis-sentinel://localhost",
        "redis-sentinel://localhost:port/main",
        "redis-sentinel://localhost/main?no_such_setting=1",
        "rediss-sentinel://localhost/main?ssl_ca_certs=/no/such/ca.crt",
        None,
        b"redis://localhost",
    ],
)
def test_an_address_that_cannot_work_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match="URL"):
        RedisStore(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:secret@127.0.0.1",
        "redis://me:secret@127.0.0.1:port",
        "redis://me:secret@127.0.0.1:1",
        "redis://127.0.0.1:1?password=secret",
        "redis://me:a@secret@127.0.0.1:1",
        "redis://me:a/secret#b@127.0.0.1:1",
        "redis://:a/secret@127.0.0.1:1",
        "rediss://me:p@secret/b@127.0.0.1:1?ssl_ca_certs=/no/such/ca.crt",
        "redis-cluster://me:secret@127.0.0.1:1,127.0.0.1:2",
        "redis-cluster://me:secret@127.0.0.1:port",
        "redis-cluster://me:a/secret#b@127.0.0.1:1",
        "redis-cluster://127.0.0.1:1?password=secret",
        "rediss-cluster://:secret@127.0.0.1:1?ssl_ca_certs=/no/such/ca.crt",
        "redis-sentinel://me:secret@127.0.0.1:1/main",
        "redis-sentinel://me:secret@127.0.0.1:1",
        "redis-sentinel://127.0.0.1:1/main?sentinel_username=me&sentinel_password=secret",
        "redis-sentinel://127.0.0.1:1?sentinel_password=secret",
        "redis-sentinel://127.0.0.1:1/main?password=secret",
        "redis-sentinel://127.0.0.1:port/main?sentinel_password=secret",
    ],
)
def test_no_message_shows_the_password(url: str) -> None:
    try:
        said = RedisStore(url).health().detail
    except ConfigError as error:
        said = str(error)
    assert "127.0.0.1" in said or "#" in url  # what a "#" is the end of, nobody can say
    assert "secret" not in said


def test_fakeredis_is_shared_by_name_only() -> None:
    with RedisStore("fakeredis://one") as a, RedisStore("fakeredis://one") as b, RedisStore("fakeredis://two") as c:
        a.put_many([b"k"], [b"v"])
        assert b.get_many([b"k"]) == [b"v"]
        assert c.get_many([b"k"]) == [None]
        assert RedisStore().get_many([b"k"]) == [None]
        a.delete_many([b"k"])


@pytest.mark.redis
def test_two_stores_on_one_server_share_values(redis_server: RedisServer) -> None:
    with RedisStore(redis_server.url) as a, RedisStore(redis_server.unix_url) as b:
        a.put_many([b"k"], [b"v"])
        assert b.get_many([b"k"]) == [b"v"]


@pytest.mark.redis
def test_close_lets_go_of_the_connections(redis_server: RedisServer) -> None:
    client = redis_server.client()
    before = len(client.client_list())
    store = RedisStore(redis_server.url)
    store.put_many([b"k"], [b"v"])
    assert len(client.client_list()) == before + 1
    store.close()
    give_up = time.monotonic() + EXPIRY_BOUND_S
    while len(client.client_list()) > before:  # the server has to notice
        assert time.monotonic() < give_up


@pytest.mark.parametrize(("module", "make"), [("redis.node", RedisStore), ("memory", MemoryStore)])
def test_a_value_over_the_limit_is_dropped_and_counted(
    module: str, make: type[RedisStore | MemoryStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"kvlab.stores.{module}.MAX_VALUE_BYTES", 1000)
    with make() as store:
        assert store.put_many([b"a", b"b", b"c"], [b"x" * 1000, b"x" * 1001, b"x"]) == 2
        assert [value is None for value in store.get_many([b"a", b"b", b"c"])] == [False, True, False]
        assert store.stats().drops == Counter(too_big=1)


def test_bytes_in_flight_are_bounded_by_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlab.stores.redis.node.WINDOW_BYTES", 1000)
    sizes: list[int] = []
    send = Node._set

    def spying(self: Node, commands: Sequence[Command], *others: Any) -> list[Any]:
        sizes.append(sum(len(value) for _, _, value, *_ in commands))
        return send(self, commands, *others)

    monkeypatch.setattr(Node, "_set", spying)
    keys, _ = named(9)
    with RedisStore() as store:
        store.put_many(keys, [b"x" * 400] * 8 + [b"x" * 5000])
        assert sizes == [800, 800, 800, 800, 5000]
        assert all(store.get_many(keys))
