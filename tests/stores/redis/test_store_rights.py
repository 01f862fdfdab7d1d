"""The rights of an ACL user: exactly those that the store lists, over TLS, and what each missing one costs."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import redis

from kvlab.stores import RedisStore
from kvlab.stores.redis.store import COMMANDS, KEY_PREFIX
from kvlab.testbed.server import RedisServer
from tests.stores.redis.scripted import LONG_S

VALUE = os.urandom(200_000)


def with_user(server: RedisServer, rights: list[str]) -> str:
    """A user with these rights alone; the URL by which it comes in over TLS."""
    server.client().execute_command("ACL", "SETUSER", "kvlab", "reset", "on", ">secret", "~kv:*", *rights)
    return server.tls_url.replace("rediss://", "rediss://kvlab:secret@")


RIGHTS = [f"+{name.lower()}" for name in COMMANDS]
FAILS = {  # without this right: what a put and a get come to
    "+get": (1, Counter(), [None], Counter(auth=1)),
    "+set": (0, Counter(auth=1), [VALUE], Counter()),
    "+del": (1, Counter(), [VALUE], Counter()),
    "+exists": (1, Counter(), [VALUE], Counter()),
    "+pexpire": (1, Counter(), [None], Counter(auth=1)),
    "+touch": (1, Counter(), [VALUE], Counter()),
}
UNUSED = {100: "+touch", None: "+pexpire"}  # by TTL: the right that such a store has no use for


@pytest.mark.redis
@pytest.mark.parametrize("ttl_s", UNUSED)
def test_a_user_with_exactly_the_rights_that_are_used_does_everything_over_tls(
    own_tls: RedisServer, ttl_s: float | None
) -> None:
    rights = [right for right in RIGHTS if right != UNUSED[ttl_s]]
    with RedisStore(with_user(own_tls, rights), ttl_s=ttl_s, deadline_s=LONG_S) as store:
        assert store.health().ok and store.health().detail.endswith("answers"), store.health()
        assert store.put_many([b"a", b"b"], [VALUE, (VALUE[:128], memoryview(VALUE)[128:])]) == 2
        assert store.get_many([b"a", b"b"]) == [VALUE, VALUE]
        assert (store.probe([b"a", b"b", b"c"]), store.touch_many([b"c", b"a"])) == (2, [False, True])
        assert store.delete_many([b"a", b"c"]) == 1
        assert store.stats().misses == store.stats().drops == store.stats().faults == Counter()


@pytest.mark.redis
@pytest.mark.parametrize(("missing", "ttl_s"), [(m, ttl_s) for m in FAILS for ttl_s in UNUSED if m != UNUSED[ttl_s]])
def test_with_any_right_missing_it_fails_closed(own_tls: RedisServer, missing: str, ttl_s: float | None) -> None:
    put, drops, got, misses = FAILS[missing]
    own_tls.client().set(KEY_PREFIX + b"k", VALUE)
    url = with_user(own_tls, [right for right in RIGHTS if right != missing])
    with RedisStore(url, ttl_s=ttl_s, deadline_s=LONG_S) as store:
        health = store.health()
        assert not health.ok and "auth: " in health.detail and f"'{missing[1:]}'" in health.detail.lower()
        assert store.put_many([b"k"], [VALUE]) == put and store.stats().drops == drops
        assert store.get_many([b"k"]) == got and store.stats().misses == misses
        assert store.probe([b"k"]) == (0 if missing == "+exists" else 1)
        needed = {"+pexpire", "+exists"} if ttl_s else {"+pexpire"}  # without TOUCH, EXISTS tells
        assert store.touch_many([b"k"]) == [missing not in needed]
        assert store.delete_many([b"k"]) == (0 if missing == "+del" else 1)
        assert store.stats().faults["auth"] >= 1
        store.stats().check()


@pytest.mark.redis
def test_a_user_who_may_not_ask_for_the_memory_reads_and_writes(own_tls: RedisServer) -> None:
    url = with_user(own_tls, [right for right in RIGHTS if right != "+info"])
    with RedisStore(url, ttl_s=100, deadline_s=LONG_S) as store:
        health = store.health()
        assert health.ok and "it refuses INFO: auth: " in health.detail
        assert store.put_many([b"k"], [VALUE]) == 1 and store.get_many([b"k"]) == [VALUE]
        assert store.stats().drops == store.stats().misses == Counter()


@pytest.mark.redis
def test_keys_of_others_are_out_of_reach(own_tls: RedisServer) -> None:
    url = with_user(own_tls, RIGHTS)
    client = redis.Redis.from_url(url)
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.get("session:1")
    for command in (["KEYS", "*"], ["FLUSHALL"], ["CONFIG", "GET", "*"], ["EVAL", "return 1", "0"]):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*command)
