"""Faults 1 to 3: a server that is not there, or is killed while it answers or is written to.

In every test of this folder: what comes back is what was stored under that key or a miss, nothing is raised, every
call is counted under a reason, no call hangs, and once the fault is over the next try works. A test that counts no
fault has not shown one, so each names the counter that must have grown.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
import time
from collections import Counter

import pytest

from kvlab.stores import RedisStore
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import RedisServer
from tests.faults.book import Book
from tests.faults.calls import PATIENT_S, D, Fault, ask, calm, fill, value_of
from tests.faults.kit import BLOCKS, HEAD, KV, MIB, REPLY, TOKENS, cache_over, check_works_again, load_all, wait_for
from tests.faults.tiny import Scripted, Tiny
from tests.harness.helpers import FakeClock


@pytest.mark.fault(number=1)
@pytest.mark.redis
@pytest.mark.parametrize("how", ["refused", "reset at once", "killed before the call"])
def test_nobody_there_opens_the_breaker_and_is_found_again(
    book: Book, own_server: RedisServer, clock: FakeClock, how: str
) -> None:
    with (
        book(f"connection {how}", injected=how, expected="3 x conn, then breaker; back after one cool-down") as row,
        FaultProxy(own_server.port) as proxy,
        cache_over(RedisStore(proxy.url, clock=clock)) as cache,
    ):
        calm(cache.store)
        check_works_again(cache)
        cache.store.deadline_s = D
        if how == "killed before the call":
            own_server.kill()
        proxy.refuse, proxy.reset = how == "refused", how == "reset at once"
        proxy.drop()
        fault, before = Fault(row, D), cache.store.stats()
        assert [fault(lambda: load_all(cache)) for _ in range(5)] == [0] * 5
        seen = cache.store.stats().misses - before.misses
        assert seen == Counter(conn=3 * BLOCKS, breaker=2 * BLOCKS)
        assert fault(lambda: cache.save(TOKENS, KV)) == fault(lambda: cache.match(TOKENS)) == 0
        assert cache.store.stats().drops == Counter(breaker=BLOCKS)
        clock.cool_down()
        assert [fault(lambda: load_all(cache)) for _ in range(2)] == [0] * 2  # one tries, and it stays open
        seen = cache.store.stats().misses - before.misses
        assert seen == Counter(conn=4 * BLOCKS, breaker=3 * BLOCKS)
        row.seen = dict(seen)
        calm(cache.store)
        if how == "killed before the call":
            own_server.start()
        proxy.heal()
        proxy.refuse = False
        clock.cool_down()
        assert load_all(cache) == (0 if how == "killed before the call" else BLOCKS)
        assert cache.store.stats().misses - before.misses - seen == Counter(
            absent=BLOCKS if how == "killed before the call" else 0
        )
        check_works_again(cache)


@pytest.mark.fault(number=1)
def test_a_closed_port_on_the_real_clock(book: Book) -> None:
    """The store's own clock: a server that comes is found within one cool-down and one call."""
    with (
        book("closed port", injected="nobody listens; real clock", expected="3 x conn, then breaker") as row,
        Scripted(Tiny()) as server,
        FaultProxy(server.port) as proxy,
        RedisStore(proxy.url) as store,
    ):
        proxy.refuse = True
        fault = Fault(row, D)
        for _ in range(20):
            assert fault(lambda: ask(store, [b"k"])) == [False]
        row.seen = dict(store.stats().misses)
        assert row.seen["conn"] >= 3 and set(row.seen) == {"conn", "breaker"}
        proxy.refuse = False
        calm(store)
        time.sleep(store.nodes[0].breaker.cooldown_s)
        fill(store, [b"k"])
        assert ask(store, [b"k"]) == [True]


@pytest.mark.fault(number=2)
@pytest.mark.redis
def test_a_server_killed_while_it_answers(book: Book, own_server: RedisServer) -> None:
    cuts = [0, 3, HEAD + 40, HEAD + 500, REPLY, 2 * REPLY - 1, 3 * REPLY + HEAD + 200]
    with (
        book(
            "killed mid-GET",
            injected=f"kill -9 after {', '.join(map(str, cuts))} bytes of the answer",
            expected="what had arrived whole is served, the rest misses: conn",
        ) as row,
        FaultProxy(own_server.port) as proxy,
        cache_over(RedisStore(proxy.url, deadline_s=PATIENT_S)) as cache,
    ):
        fault, row.seen = Fault(row, PATIENT_S), Counter()
        for cut in cuts:
            assert cache.save(TOKENS, KV) == BLOCKS
            before, fired = cache.store.stats(), proxy.fired["truncate"]
            proxy.truncate(cut, call=own_server.kill)
            assert fault(functools.partial(load_all, cache)) == cut // REPLY
            missed = cache.store.stats().misses - before.misses
            assert missed == Counter(conn=BLOCKS - cut // REPLY)
            assert cache.store.stats().faults["conn"] == before.faults["conn"] + 1
            assert proxy.fired["truncate"] == fired + 1
            row.seen += missed
            own_server.start()
            assert load_all(cache) == 0  # it is back, and empty
        row.seen = dict(row.seen)
        check_works_again(cache)


BIG = 200 * MIB


@pytest.mark.fault(number=3)
@pytest.mark.redis
@pytest.mark.parametrize(("aof", "when"), [("no", "120 ms"), ("yes", "120 ms"), ("yes", "writing its file")])
def test_a_server_killed_during_a_set_has_the_value_whole_or_not_at_all(book: Book, aof: str, when: str) -> None:
    options = ("--appendonly", aof, "--appendfsync", "no", "--proto-max-bulk-len", "512mb")
    value = memoryview(value_of(b"big", MIB) * 200)
    with (
        book(
            f"kill -9 during SET, AOF {aof}, {when}",
            injected="kill -9 during a raw SET of 200 MB, restart",
            expected="after the restart the key is absent or whole; the store misses",
        ) as row,
        RedisServer(*options) as server,
        cache_over(RedisStore(server.url, deadline_s=PATIENT_S)) as cache,
    ):
        assert cache.save(TOKENS, KV) == BLOCKS
        key = b"kv:" + OTHER_KEY
        with socket.create_connection(("127.0.0.1", server.port), PATIENT_S) as writer:
            sending = threading.Thread(target=send_set, args=(writer, key, value))
            sending.start()
            if when == "120 ms":
                time.sleep(0.12)
            else:
                wait_for(lambda: sum(f.stat().st_size for f in server.folder.rglob("*.aof")) > 8 * MIB, 20)
            server.kill()
            sending.join()
        fault = Fault(row, PATIENT_S)
        assert fault(lambda: load_all(cache)) == 0
        server.start()
        client = server.client()
        wait_for(lambda: not client.info("persistence")["loading"])
        kept = load_all(cache)
        assert kept == (BLOCKS if aof == "yes" else 0), "what was answered before is in the file"
        there = client.get(key)
        assert there is None or there == value, "part of a value"
        before = cache.store.stats().misses
        assert fault(lambda: cache.store.get_many([OTHER_KEY])) == [None]
        after = cache.store.stats().misses - before
        assert after.total() == 1 and (there is not None or after == Counter(absent=1))
        row.seen = {"key": "whole" if there else "absent", "blocks kept": kept, **cache.store.stats().misses}
        client.delete(key)
        check_works_again(cache)


OTHER_KEY = bytes(range(32))


def send_set(connection: socket.socket, key: bytes, value: memoryview) -> None:
    """A raw SET: the store refuses values of this size."""
    with contextlib.suppress(OSError):
        connection.sendall(b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(value)))
        connection.sendall(value)
        connection.sendall(b"\r\n")


@pytest.mark.fault(number=3)
@pytest.mark.redis
def test_a_server_killed_during_the_stores_own_put(book: Book, own_server: RedisServer) -> None:
    size = 48 * MIB
    with (
        book(
            "kill -9 during put",
            injected="kill -9 after 8 MiB of a put of 48 MiB, restart",
            expected="drop: conn; nothing there afterwards",
        ) as row,
        FaultProxy(own_server.port) as proxy,
        RedisStore(proxy.url, deadline_s=PATIENT_S) as store,
    ):
        fill(store, [b"small"])
        proxy.reset_counts()
        proxy.upload_bandwidth = 80e6
        killer = threading.Thread(
            target=lambda: (wait_for(lambda: proxy.bytes_up > 8 * MIB, 20), own_server.kill())  # type: ignore[func-returns-value]
        )
        killer.start()
        value = value_of(b"big", size)
        fault = Fault(row, PATIENT_S)
        assert fault(lambda: store.put_many([b"big", b"after"], [value, b"x"])) == 0
        killer.join()
        assert proxy.bytes_up < size
        store.stats().check()
        assert store.stats().drops == Counter(conn=2) and store.stats().faults["conn"] >= 1
        row.seen = dict(store.stats().drops)
        proxy.heal()
        own_server.start()
        assert own_server.client().keys() == []
        fill(store, [b"big"], size)
        assert ask(store, [b"big"], size) == [True]
