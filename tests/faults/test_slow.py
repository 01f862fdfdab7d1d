"""Faults 4 to 6: a server that hangs, bytes that trickle, answers that come late."""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable

import pytest

from kvlab.stores import RedisStore
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import RedisServer
from tests.faults.book import Book
from tests.faults.calls import D, Fault, ask, breakers, calm, fill, value_of
from tests.faults.kit import BLOCKS, KEYS, KV, MIB, TOKENS, cache_over, check_works_again, load_all, wait_for
from tests.faults.tiny import Scripted, Tiny
from tests.harness.helpers import FakeClock


@pytest.mark.fault(number=4)
@pytest.mark.redis
@pytest.mark.parametrize("connected", [True, False], ids=["open connection", "new connection"])
def test_a_hung_server_costs_three_deadlines_and_then_nothing(
    book: Book, own_server: RedisServer, connected: bool
) -> None:
    """Sixty calls should add less than a second: three deadlines, and the breaker. The book has the figure."""
    kind = "open connection" if connected else "new connection"
    with (
        book(
            f"hung server, {kind}",
            injected="SIGSTOP, 60 calls, SIGCONT; real clock",
            expected="3 x timeout, then breaker, < 1 s in all; back within one cool-down and one call",
        ) as row,
        cache_over(RedisStore(own_server.url)) as cache,
    ):
        if connected:
            calm(cache.store)
            check_works_again(cache)
            cache.store.deadline_s = D
        before = cache.store.stats()
        own_server.stop()
        try:
            fault = Fault(row, D)
            works = (
                lambda: load_all(cache),
                lambda: cache.save(TOKENS, KV),
                lambda: cache.match(TOKENS),
                lambda: cache.store.delete_many(KEYS),
            )
            for work in itertools.islice(itertools.cycle(works), 60):
                assert fault(work, deadlines=2) == 0  # a save is two calls of the store
            assert row.added_ms < 10_000
        finally:
            own_server.cont()
        faults = cache.store.stats().faults - before.faults
        assert faults["timeout"] >= 3 and faults["breaker"] >= 40 and set(faults) == {"timeout", "breaker"}
        assert breakers(cache.store)[0] == "open"
        row.seen = dict(faults)
        wait_for(own_server.client().ping)
        calm(cache.store)
        time.sleep(cache.store.nodes[0].breaker.cooldown_s)
        assert load_all(cache) == (BLOCKS if connected else 0)  # the first try
        assert cache.store.stats().misses - before.misses - Counter(absent=10**6, timeout=10**6, breaker=10**6) == {}
        assert breakers(cache.store)[0] == "closed"
        check_works_again(cache)


def slow_bandwidth(proxy: FaultProxy) -> None:
    proxy.bandwidth = 1e6


def slow_slices(proxy: FaultProxy) -> None:
    proxy.slices = (1024, 0.005)


def slow_drip(proxy: FaultProxy) -> None:
    proxy.slices = (1, 0.1)


def slow_upload(proxy: FaultProxy) -> None:
    proxy.upload_bandwidth = 1e6


@pytest.mark.fault(number=5)
@pytest.mark.redis
@pytest.mark.parametrize(
    ("name", "slow", "call"),
    [
        ("1 MB/s", slow_bandwidth, "get"),
        ("1 KiB every 5 ms", slow_slices, "get"),
        ("a byte every 0.1 s, from the header on", slow_drip, "get"),
        ("1 MB/s upwards", slow_upload, "put"),
        ("a byte every 0.1 s of the answer to SET", slow_drip, "put"),
        ("a byte every 0.1 s of the answer to EXISTS", slow_drip, "probe"),
    ],
)
def test_bytes_that_trickle_do_not_stretch_the_deadline(
    book: Book, proxy: FaultProxy, clock: FakeClock, name: str, slow: Callable[[FaultProxy], None], call: str
) -> None:
    size = 4 * MIB if call == "put" else MIB
    with (
        book(f"slow: {name}", injected=f"{call} of {size >> 20} MiB at {name}", expected="timeout") as row,
        RedisStore(proxy.url, clock=clock) as store,
    ):
        calm(store)
        fill(store, [b"k"], size)
        store.deadline_s = D
        slow(proxy)
        value, passed = value_of(b"new", size), proxy.bytes_down
        fault = Fault(row, D + size / 50e6)
        if call == "get":
            assert fault(lambda: ask(store, [b"k"], size)) == [False]
            assert proxy.bytes_down > passed
            assert store.stats().misses == Counter(timeout=1)
        elif call == "put":
            assert fault(lambda: store.put_many([b"new"], [value])) == 0
            assert store.stats().drops == Counter(timeout=1)
        else:
            assert fault(lambda: store.probe([b"k"] * 3)) == 0
        row.seen = dict(store.stats().faults)
        assert row.seen == {"timeout": 1}
        proxy.heal()
        calm(store)
        assert ask(store, [b"k"], size) == [True]
        ask(store, [b"new"], size)  # a write given up may still arrive, and then whole
        fill(store, [b"new"], size)
        assert ask(store, [b"new", b"k"], size) == [True, True]


@pytest.mark.fault(number=5)
@pytest.mark.parametrize("drip", [False, True], ids=["silent", "drip"])
def test_a_slow_handshake_is_under_the_deadline_too(book: Book, clock: FakeClock, drip: bool) -> None:
    name = "a byte every 0.1 s" if drip else "no answer"
    tiny = Tiny(b"right")
    with (
        book(f"slow handshake: {name}", injected=f"{name} to AUTH and SELECT", expected="timeout") as row,
        Scripted(tiny) as server,
        FaultProxy(server.port) as proxy,
        RedisStore(f"redis://:right@127.0.0.1:{proxy.port}", clock=clock) as store,
    ):
        fault = Fault(row, D)
        proxy.slices, proxy.hold = (1, 0.1), not drip
        for _ in range(2):
            assert fault(lambda: ask(store, [b"k"])) == [False]
        assert store.stats().misses == Counter(timeout=2)
        assert {name for name, *_ in server.commands} == {b"AUTH"}
        row.seen = dict(store.stats().misses)
        proxy.heal()
        calm(store)
        fill(store, [b"k"])
        assert ask(store, [b"k"]) == [True]


@pytest.mark.fault(number=6)
@pytest.mark.redis
def test_jitter_gives_hits_before_the_deadline_and_misses_after(
    book: Book, redis_server: RedisServer, clock: FakeClock
) -> None:
    """Each call asks another key: a late answer to an earlier question would show."""
    keys = [b"key %d" % i for i in range(40)]
    with (
        book("jitter", injected="answers 50 to 300 ms late, seeded", expected="hit in time, else timeout") as row,
        FaultProxy(redis_server.port, seed=6) as proxy,
        RedisStore(proxy.url, clock=clock) as store,
    ):
        calm(store)
        fill(store, keys)
        store.deadline_s = D
        proxy.latency_s, proxy.jitter_s = 0.05, 0.25
        fault = Fault(row, D)
        for key in keys:
            begin = time.perf_counter()
            (hit,) = fault(functools.partial(ask, store, [key]))
            assert not hit or time.perf_counter() - begin >= 0.05
            if breakers(store)[0] == "open":
                clock.cool_down()
            if store.stats().hits >= 4 and store.stats().misses["timeout"] >= 2:
                break
        stats = store.stats()
        assert stats.hits and stats.misses["timeout"] and set(stats.misses) == {"timeout"}
        row.seen = {"hits": stats.hits, **stats.misses}
        proxy.heal()
        calm(store)
        clock.cool_down()
        assert ask(store, keys) == [True] * len(keys)
