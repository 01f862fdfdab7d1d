"""Nothing secret leaves the package: not in refusals, however an address is written, and not in what health repeats."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
import torch

from kvlab.cache import DistributedKVCache
from kvlab.core.keys import KVSpec
from kvlab.errors import ConfigError, InputError, KVLabError
from kvlab.stores import RedisStore, WriteBehind, open_store
from kvlab.stores.url import read
from tests.harness.scripted import ScriptedServer
from tests.stores.redis.scripted import LONG_S

SECRET = "TOPSECRET"
AWKWARD = "t/o:p?S3cret"
SPEC = KVSpec(layers=2, heads=2, head_dim=4, dtype=torch.float32, fingerprint=bytes(32))

CLOUD = "name.redis.cache.windows.net:6380,password=TOPSECRET=,ssl=True,abortConnect=False"
ADDRESSES = [
    *(CLOUD, f"redis://{CLOUD}", "Password=TOPSECRET;Server=h", "host=h;port=1;pwd=TOPSECRET", "h:6379;TOPSECRET"),
    *("TOPSECRET@h", "u:TOPSECRET@h:1", "redis:/TOPSECRET@h", "redis:TOPSECRET", "jdbc:redis://u:TOPSECRET@h"),
    *("redis+tls://u:TOPSECRET@h", "https://u:TOPSECRET@h/", "REDIS_PASSWORD=TOPSECRET redis://h"),
    *("redis-cli -a TOPSECRET -u redis://h", "redis://h/0 password=TOPSECRET", "redis://h\npassword=TOPSECRET"),
    # the login in a wrong place
    *("redis://:TOPSECRET", "redis://:TOPSECRET:6379", "redis://me:TOPSECRET:host:6379", "redis://host:TOPSECRET"),
    *("redis://h:6379:TOPSECRET", "redis://me:TOPSECRET@", "redis://TOPSECRET:@h:x", "redis://[TOPSECRET]:1"),
    *("redis://a:1,TOPSECRET:x@b,c", "redis-cluster://me:TOPSECRET@a:1,me:TOPSECRET@b:1", "redis://[::1:TOPSECRET]"),
    # not percent-encoded
    *("redis://:TOPSECRET/x@h", "redis://:x/TOPSECRET@h", "redis://:TOPSECRET?x@h", "redis://:x?TOPSECRET@h"),
    *("redis://:TOPSECRET#x@h", "redis://:x#TOPSECRET@h", "redis://:TOPSECRET@x@h", "redis://:x@TOPSECRET@h"),
    *("redis://:%zzTOPSECRET@h", "redis:// :TOPSECRET@h", "redis://:TOP SECRET,TOPSECRET@h"),
    # beside something else that is wrong
    *("redis://me:TOPSECRET@h:port", "rediss://:TOPSECRET@[::1", "redis://:TOPSECRET@h/x", "redis://:TOPSECRET@h?db=x"),
    *("rediss://:TOPSECRET@h?ssl_ca_certs=/no", "unix://:TOPSECRET@/run/x?db=x", "redis-sentinel://:TOPSECRET@a/n m"),
    *("fakeredis://:TOPSECRET@", "memory://:TOPSECRET@x", "redis-cluster://:TOPSECRET@a/1", "redis://TOPSECRET@h?no=1"),
    # in a setting
    *("redis://h?TOPSECRET", "redis://h?TOPSECRET=", "redis://h?auth=TOPSECRET", "redis://h?Password=TOPSECRET"),
    *("redis://h?password=x&TOPSECRET", "redis://h?password=TOPSECRET&db=x", "redis://h?password=p@TOPSECRET&db=x"),
    *("redis://h?username=TOPSECRET&db=x", "redis-sentinel://a/main?sentinel_password=TOPSECRET&a=b"),
    *("rediss://h?ssl_password=TOPSECRET&no=1", "rediss://h?ssl_keyfile=-----BEGIN PRIVATE KEY-----TOPSECRET"),
    *("rediss://h?ssl_keyfile=MIIEvQIBADANBgkqhkiG9w0BAQ+TOPSECRET==", f"rediss://h?ssl_keyfile={'x' * 120}TOPSECRET"),
]
MAKERS: list[Callable[[Any], Any]] = [
    RedisStore,
    open_store,
    WriteBehind,
    lambda address: DistributedKVCache(store=address),
    lambda address: DistributedKVCache(redis_host=address),
    lambda address: DistributedKVCache(address, 6379),
]


def strings_of(error: BaseException | None) -> str:
    """All that is told of an error, by whoever prints or logs it."""
    if error is None:
        return ""
    notes = "".join(getattr(error, "__notes__", ()))
    return f"{error}{error!r}{notes}{strings_of(error.__cause__)}{strings_of(error.__context__)}"


@pytest.mark.parametrize("address", ADDRESSES, ids=lambda address: repr(address[:40]))
def test_a_refused_address_is_not_repeated(address: str) -> None:
    for make in MAKERS:
        with pytest.raises(ConfigError) as refused:
            make(address)
        assert SECRET not in strings_of(refused.value)


def test_the_form_of_a_cloud_is_refused_with_the_url_to_write() -> None:
    with pytest.raises(ConfigError, match=r"write rediss://:PASSWORD@HOST:PORT") as refused:
        RedisStore(CLOUD)
    assert "cluster" not in str(refused.value) and "windows.net" not in str(refused.value)


LOGINS = [
    "redis://me:TOPSECRET@127.0.0.1:1",
    "redis://:TOPSECRET@127.0.0.1:1",
    "redis://TOPSECRET@127.0.0.1:1",
    "redis://TOPSECRET:@127.0.0.1:1",
    "redis://127.0.0.1:1?username=me&password=TOPSECRET",
    "rediss://:TOPSECRET@127.0.0.1:1?ssl_password=TOPSECRET",
    "unix://me:TOPSECRET@/tmp/no/such.sock",
    "redis-cluster://me:TOPSECRET@127.0.0.1:1,127.0.0.1:2",
    "redis-sentinel://me:TOPSECRET@127.0.0.1:1/main?sentinel_username=you&sentinel_password=TOPSECRET",
]


@pytest.mark.parametrize("url", LOGINS)
def test_what_works_shows_where_it_points_and_no_secret(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    store = RedisStore(url, deadline_s=1)
    with DistributedKVCache(store=WriteBehind(store), model=SPEC) as cache:
        cache.match(list(range(64)))
        cache.cache_kv("text", 0, torch.zeros(2), torch.zeros(2))
        parts: list[Any] = [cache, cache.store, store, store.nodes, store._topology, cache.health(), cache.stats()]
        for node in store.nodes:
            parts += [node.name, node.pool, node.breaker, node.write_breaker, *node.pool._idle]
        told = "".join(map(repr, [*parts, store.stats(), read(url)]))
    assert SECRET not in told and SECRET not in caplog.text
    assert ("/tmp/no/such.sock" if "unix" in url else "127.0.0.1:1") in repr(store)


# --- what servers say of it ---------------------------------------------------------------------
def echo_as_redis(words: list[bytes]) -> bytes:
    args = b" ".join(b"'%b'" % word for word in words[1:])
    return b"-ERR unknown command '%b', with args beginning with: %b\r\n" % (words[0], args)


def one_line(words: list[bytes]) -> bytes:
    return b" ".join(words).replace(b"\r", b"").replace(b"\n", b"")[:400]


ECHOES: dict[str, Callable[[list[bytes]], bytes]] = {
    "as Redis does": echo_as_redis,
    "an error": lambda words: b"-ERR no: %b\r\n" % one_line(words),
    "a login": lambda words: b"-WRONGPASS %b\r\n" % one_line(words),
    "a right": lambda words: b"-NOPERM %b\r\n" % one_line(words),
    "a redirect": lambda words: b"-MOVED 1 %b\r\n" % one_line(words),
    "a line": lambda words: b"+%b\r\n" % one_line(words),
    "a value": lambda words: b"$%d\r\n%b\r\n" % (len(one_line(words)), one_line(words)),
    "a list": lambda words: b"*2\r\n$%d\r\n%b\r\n:70000\r\n" % (len(one_line(words)), one_line(words)),
}
KINDS = [
    "redis://me:{0}@{1}",
    "redis://{1}?username=me&password={0}",
    "redis-cluster://me:{0}@{1}",
    "redis-sentinel://{1}/main?sentinel_password={0}",
]


@pytest.mark.parametrize("login_is_taken", [True, False])
@pytest.mark.parametrize("url", KINDS)
@pytest.mark.parametrize("echo", ECHOES)
def test_health_repeats_no_secret_that_a_server_repeats(
    echo: str, url: str, login_is_taken: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    login: list[bytes] = []

    def script(words: list[bytes]) -> bytes:
        if words[0] == b"AUTH":
            login[:] = words
            return b"+OK\r\n" if login_is_taken else ECHOES[echo](words)
        return ECHOES[echo]([*words, *login])

    with ScriptedServer(script) as server:
        place = f"127.0.0.1:{server.port}"
        with RedisStore(url.format(quote(AWKWARD, safe=""), place), deadline_s=LONG_S) as store:
            assert store.get_many([b"a"]) == [None] or echo == "a value"
            health = store.health()
            told = f"{health}{store!r}{store.nodes}{store.stats()}{caplog.text}"
        assert login and not health.ok and place in health.detail
        assert not any(part in told for part in (AWKWARD, quote(AWKWARD, safe=""), "S3cret"))


# --- salts, keys and texts ----------------------------------------------------------------------
KEY = b"TOPSECRET-TOPSECRET-TOPSECRET-TO"
WRONG_CALLS: dict[str, Callable[[DistributedKVCache], Any]] = {
    "a short key": lambda cache: DistributedKVCache(encryption_keys={1: KEY[:9]}),
    "a key as text": lambda cache: DistributedKVCache(encryption_keys={1: KEY.decode()}),  # type: ignore[dict-item]
    "a key alone": lambda cache: DistributedKVCache(encryption_keys=KEY),  # type: ignore[arg-type]
    "a key for an id": lambda cache: DistributedKVCache(encryption_keys={KEY: 1}),  # type: ignore[dict-item]
    "an id without keys": lambda cache: DistributedKVCache(encryption_key_id=KEY),  # type: ignore[arg-type]
    "a salt in a list": lambda cache: DistributedKVCache(salt=[SECRET]),  # type: ignore[arg-type]
    "a salt that is no text": lambda cache: DistributedKVCache(salt="TOPSECRET\ud800"),
    "a model by name": lambda cache: DistributedKVCache(model=SECRET),  # type: ignore[arg-type]
    "a TTL": lambda cache: DistributedKVCache(ttl_seconds=SECRET),  # type: ignore[arg-type]
    "a block": lambda cache: DistributedKVCache(model=SPEC, block_tokens=SECRET),  # type: ignore[arg-type]
    "a prompt in bytes": lambda cache: cache.cache_kv(KEY, 0, torch.zeros(1), torch.zeros(1)),  # type: ignore[arg-type]
    "a prompt that is no text": lambda cache: cache.get_cached_kv("TOPSECRET\ud800", 0),
    "a prompt for a layer": lambda cache: cache.get_cached_kv("text", SECRET),  # type: ignore[arg-type]
    "a prompt for tokens": lambda cache: cache.match(SECRET),  # type: ignore[arg-type]
    "keys as text": lambda cache: cache.store.probe([SECRET]),  # type: ignore[list-item]
    "a value as text": lambda cache: cache.store.put_many([b"a"], [SECRET]),  # type: ignore[list-item]
    "a password as a setting": lambda cache: open_store("redis://h", password=SECRET),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_is_refused_without_repeating_what_may_be_secret(name: str) -> None:
    cache = DistributedKVCache(model=SPEC)
    with pytest.raises((ConfigError, InputError)) as refused:
        WRONG_CALLS[name](cache)
    assert isinstance(refused.value, KVLabError) and SECRET not in strings_of(refused.value)


def test_a_cache_shows_neither_its_salt_nor_its_keys() -> None:
    pytest.importorskip("cryptography", reason="encryption needs it: pip install 'kvlab[secure]'")
    cache = DistributedKVCache(model=SPEC, salt=SECRET, encryption_keys={1: KEY})
    told = "".join(map(repr, [cache, cache.format, cache.format.seal, cache._text, cache.health(), cache.stats()]))
    assert SECRET not in told


def test_a_store_that_raises_is_logged_without_what_was_written(caplog: pytest.LogCaptureFixture) -> None:
    class Raises(RedisStore):
        def put_many(self, keys: Any, values: Any) -> int:
            raise RuntimeError("a bug")

    with WriteBehind(Raises("redis://:TOPSECRET@127.0.0.1:1")) as behind:
        behind.put_many([b"key TOPSECRET"], [b"value TOPSECRET"])
        assert behind.flush(LONG_S)
    assert "the store raised an exception" in caplog.text and SECRET not in caplog.text
