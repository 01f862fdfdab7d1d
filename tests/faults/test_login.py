"""Fault 26: passwords and rights that are wrong, missing, or changed at run time."""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from kvlab.stores import RedisStore, Store
from kvlab.testbed.server import RedisServer
from tests.faults.book import Book
from tests.faults.calls import PATIENT_S, Fault, ask, breakers, calls_of, fill, value_of
from tests.faults.kit import BLOCKS, KV, TOKENS, cache_over, check_works_again, load_all
from tests.faults.tiny import Scripted, Tiny
from tests.harness.helpers import FakeClock


def four_calls(store: Store) -> list[object]:
    return [ask(store, [b"k"]), store.put_many([b"k"], [value_of(b"k")]), store.probe([b"k"]), ask(store, [b"k"])]


NOTHING = [[False], 0, 0, [False]]


@pytest.mark.fault(number=26)
def test_a_wrong_password_is_tried_once_a_call(book: Book, clock: FakeClock) -> None:
    tiny = Tiny(b"right")
    with (
        book(
            "wrong password, counted by the peer",
            injected="a scripted server that counts AUTH",
            expected="auth; one AUTH a call and nothing after it; none when the breaker is open",
        ) as row,
        Scripted(tiny) as server,
        RedisStore(f"redis://:wrong@127.0.0.1:{server.port}", deadline_s=PATIENT_S, clock=clock) as store,
    ):
        fault = Fault(row, PATIENT_S)
        assert fault(lambda: four_calls(store)) == NOTHING
        assert [name for name, *_ in server.commands] == [b"AUTH"] * 3
        stats = store.stats()
        assert (stats.misses, stats.drops) == (Counter(auth=1, breaker=1), Counter(auth=1))
        clock.cool_down()
        assert fault(lambda: four_calls(store)) == NOTHING
        assert [name for name, *_ in server.commands] == [b"AUTH"] * 4, "one may try"
        row.seen = {"calls": 8, "AUTH": 4, **store.stats().faults}
        tiny.password = b"wrong"
        clock.cool_down()
        fill(store, [b"k"])
        assert ask(store, [b"k"]) == [True]


@pytest.mark.fault(number=26)
@pytest.mark.redis
@pytest.mark.parametrize("login", [":wrong@", "worker:wrong@", "nobody:pw@", ""], ids=["", "user", "nobody", "none"])
def test_a_wrong_login_as_the_server_sees_it(book: Book, clock: FakeClock, login: str) -> None:
    with (
        book(
            f"wrong login {login or '(none)'}",
            injected="--requirepass, ACL",
            expected="auth; each call tries once, by the server's own count; then breaker",
        ) as row,
        RedisServer("--requirepass", "right") as server,
        RedisStore(f"redis://{login}127.0.0.1:{server.port}", deadline_s=PATIENT_S, clock=clock) as store,
    ):
        client = server.client(password="right")
        client.execute_command("ACL", "SETUSER", "worker", "reset", "on", ">pw", "~kv:*", "+@all")
        fault = Fault(row, PATIENT_S)
        assert fault(lambda: four_calls(store)) == NOTHING
        tried = {name: calls_of(client, name) for name in ("auth", "get", "set", "info", "exists")}
        assert tried["auth"]["failed_calls"] == (3 if login else 0)
        assert sum(tried[name]["rejected_calls"] for name in ("get", "set", "info", "exists")) == (0 if login else 3)
        assert len(client.acl_log()) == (1 if login else 0), "one entry for all that are alike"
        if login:
            assert client.acl_log()[0]["count"] == 3
        stats = store.stats()
        assert (stats.misses, stats.drops) == (Counter(auth=1, breaker=1), Counter(auth=1))
        row.seen = dict(stats.faults)
        client.execute_command("ACL", "SETUSER", "default", *(("resetpass", ">wrong") if login else ("nopass",)))
        for user in ("worker", "nobody"):
            client.execute_command("ACL", "SETUSER", user, "reset", "on", "nopass", "~kv:*", "+@all")
        clock.cool_down()
        fill(store, [b"k"])
        assert ask(store, [b"k"]) == [True]


@pytest.mark.fault(number=26)
@pytest.mark.redis
@pytest.mark.parametrize("right", ["get", "set", "info", "exists", "pexpire", "touch", "del"])
def test_a_missing_right_is_asked_for_once_a_call(
    book: Book, own_server: RedisServer, clock: FakeClock, right: str
) -> None:
    """What needs the right fails, and says so; what does not need it works."""
    client = own_server.client()
    rights = [f"+{name}" for name in ("get", "set", "del", "exists", "pexpire", "touch", "info") if name != right]
    client.execute_command("ACL", "SETUSER", "worker", "reset", "on", ">pw", "~kv:*", "resetchannels", *rights)
    url, ttl_s = f"redis://worker:pw@127.0.0.1:{own_server.port}", 100 if right == "pexpire" else None
    reads = right not in ("get", "pexpire")
    with (
        book(f"no right to {right.upper()}", injected=f"ACL without +{right}", expected="auth, no retry") as row,
        RedisStore(own_server.url, ttl_s=100, deadline_s=PATIENT_S) as other,
        RedisStore(url, ttl_s=ttl_s, deadline_s=PATIENT_S, clock=clock) as store,
    ):
        fill(other, [b"k"])
        fault = Fault(row, PATIENT_S)
        refused = lambda: calls_of(client, right)["rejected_calls"]  # noqa: E731
        assert fault(lambda: ask(store, [b"k"])) == [reads]
        stored = fault(lambda: store.put_many([b"new"], [value_of(b"new")]))
        assert stored == (right != "set")  # INFO tells how large a value may be; without it the usual limit holds
        there = fault(lambda: store.probe([b"k"]))
        assert there == (right != "exists")
        assert fault(lambda: store.touch_many([b"k"])) == [right != "pexpire"]  # TOUCH is a courtesy
        assert fault(lambda: store.delete_many([b"none"])) == 0
        uses = {"get": 1, "set": 1, "info": 1, "exists": 1, "pexpire": 2, "touch": 1, "del": 1}
        assert refused() == uses[right]
        assert store.stats().faults["auth"] == (0 if right == "info" else uses[right])
        stats = store.stats()
        assert stats.misses == (Counter() if reads else Counter(auth=1))
        assert stats.drops == (Counter(auth=1) if right == "set" else Counter())
        assert client.acl_log()[0]["object"] == right
        if right == "set":  # three refused writes, and writes are left alone; reads go on
            for _ in range(5):
                assert fault(lambda: store.put_many([b"new"], [b"x"])) == 0
            assert refused() == 3 and breakers(store) == ("closed", "open")
            assert store.stats().drops == Counter(auth=3, breaker=3)
            assert ask(store, [b"k"]) == [True]
        assert breakers(store)[0] == "closed", "the server answers: others may work"
        row.seen = {"refused by the server": refused(), **store.stats().faults}
        client.execute_command("ACL", "SETUSER", "worker", f"+{right}")
        clock.cool_down()
        fill(store, [b"new"])
        assert ask(store, [b"new", b"k"]) == [True, True]
        assert store.probe([b"k"]) == 1 and store.delete_many([b"new"]) == 1


@pytest.mark.fault(number=26)
@pytest.mark.redis
@pytest.mark.parametrize("how", ["user deleted", "password changed and connections killed"])
def test_a_password_changed_at_run_time(book: Book, own_server: RedisServer, clock: FakeClock, how: str) -> None:
    client = own_server.client()
    acl = functools.partial(client.execute_command, "ACL")
    acl("SETUSER", "worker", "reset", "on", ">old", "~kv:*", "+@all")
    url = f"redis://worker:old@127.0.0.1:{own_server.port}"
    with (
        book(how, injected="ACL DELUSER / SETUSER and CLIENT KILL", expected="auth, no retry; then breaker") as row,
        cache_over(RedisStore(url, deadline_s=PATIENT_S, clock=clock)) as cache,
    ):
        assert cache.save(TOKENS, KV) == BLOCKS
        acl("SETUSER", "worker", "resetpass", ">new")
        assert load_all(cache) == BLOCKS, "who is logged in stays so"
        if how == "user deleted":
            acl("DELUSER", "worker")
        else:
            client.client_kill_filter(_type="normal", skipme=True)
        before, fault = calls_of(client, "auth"), Fault(row, PATIENT_S)
        assert [fault(lambda: load_all(cache)) for _ in range(6)] == [0] * 6
        assert calls_of(client, "auth")["failed_calls"] - before["failed_calls"] == 3
        assert cache.store.stats().misses == Counter(auth=3 * BLOCKS, breaker=3 * BLOCKS)
        row.seen = dict(cache.store.stats().misses)
        acl("SETUSER", "worker", "reset", "on", ">old", "~kv:*", "+@all")
        clock.cool_down()
        assert load_all(cache) == BLOCKS
        check_works_again(cache)


@pytest.mark.fault(number=26)
def test_asking_for_health_does_not_close_the_breaker_on_a_wrong_password(book: Book, clock: FakeClock) -> None:
    """A monitor that asks every second must not make every worker try its password again."""
    with (
        book("wrong password, watched", injected="health() while the breaker is open", expected="open") as row,
        Scripted(Tiny(b"right")) as server,
        RedisStore(f"redis://:wrong@127.0.0.1:{server.port}", deadline_s=PATIENT_S, clock=clock) as store,
    ):
        fault = Fault(row, PATIENT_S)
        for _ in range(3):
            assert fault(lambda: ask(store, [b"k"])) == [False]
        assert breakers(store)[0] == "open"
        assert not store.health().ok
        assert [name for name, *_ in server.commands] == [b"AUTH"] * 4
        assert breakers(store)[0] == "open"
        assert fault(lambda: ask(store, [b"k"])) == [False]
        row.seen = dict(store.stats().misses)
        assert row.seen == {"auth": 3, "breaker": 1}
