"""Faults 15, 16 and 35: values that are evicted, expired or flushed between two looks."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from kvlab.stores import RedisStore
from kvlab.testbed.server import RedisServer
from tests.faults.book import Book
from tests.faults.calls import PATIENT_S, Fault, ask, fill
from tests.faults.kit import (
    BLOCKS,
    KEYS,
    KV,
    LONG_S,
    MIB,
    NAMES,
    TOKENS,
    B,
    cache_over,
    check_repaired,
    check_sums,
    check_works_again,
    load_all,
    monitored,
    names_of,
    under_fault,
)
from tests.harness.helpers import FakeClock


@pytest.mark.fault(number=15)
@pytest.mark.redis
def test_evicted_between_match_and_load(book: Book) -> None:
    with (
        RedisServer("--maxmemory", "20mb", "--maxmemory-policy", "allkeys-random") as server,
        cache_over(RedisStore(server.url, deadline_s=LONG_S)) as cache,
        book("evicted after match", injected="20 MB, a churning writer", expected="absent; only GETs") as row,
    ):
        client, stop = server.client(), threading.Event()
        assert cache.save(TOKENS, KV) == cache.match(TOKENS) // B == BLOCKS
        client.delete(NAMES[2])  # just after match: the same as an eviction, to the letter
        with monitored(server) as commands, under_fault(row):
            assert load_all(cache) == 2
        assert names_of(commands) == {"GET"}
        assert len(commands) == BLOCKS

        def churn() -> None:
            with server.client() as other:
                for n in range(10**9):
                    if stop.is_set():
                        return
                    other.set(b"other %d" % n, bytes(64 << 10))

        before, thread = cache.stats().misses["absent"], threading.Thread(target=churn)
        thread.start()
        outrun = loads = 0
        try:
            give_up = time.monotonic() + LONG_S
            while cache.stats().misses["absent"] < before + 20:
                assert time.monotonic() < give_up, "nothing was evicted"
                matched = cache.match(TOKENS) // B
                with under_fault(row):
                    got = load_all(cache)
                outrun, loads = outrun + (got < matched), loads + 1
                cache.save(TOKENS, KV)
        finally:
            stop.set()
            thread.join()
        row.seen = {"absent": cache.stats().misses["absent"], "loads": loads, "fewer than matched": 1 + outrun}
        assert client.info("stats")["evicted_keys"] > 0
        assert set(cache.stats().misses) == {"absent", "gap"}
        client.config_set("maxmemory", 0)
        check_repaired(cache)


@pytest.mark.fault(number=16)
@pytest.mark.redis
def test_expired_in_between(redis_server: RedisServer, book: Book) -> None:
    chance, waits = random.Random(16), (0.0, 0.001, 0.002, 0.003, 0.01)
    short = cache_over(RedisStore(redis_server.url, ttl_s=0.003, deadline_s=LONG_S))
    long = cache_over(RedisStore(redis_server.url, ttl_s=100, deadline_s=LONG_S))
    with short, long, book("TTL race", injected="PX 3, reads after 0 … 10 ms", expected="absent, or all") as row:
        got: Counter[int] = Counter()
        for _ in range(300):
            short.save(TOKENS, KV)
            time.sleep(chance.choice(waits))
            with under_fault(row):
                got[load_all(short)] += 1
        assert set(short.stats().misses) == {"absent", "gap"}
        row.seen = {"blocks got": dict(sorted(got.items())), "absent": short.stats().misses["absent"]}
        time.sleep(0.02)
        check_repaired(long)
        client = redis_server.client()
        client.pexpire(NAMES[0], 50_000)
        assert load_all(long) == BLOCKS
        assert client.pttl(NAMES[0]) > 50_000, "a read renews"
        check_sums(short, long)


@contextlib.contextmanager
def listened_to(server: RedisServer) -> Iterator[list[tuple[bytes, bytes]]]:
    """What the server is asked from here on, as (command, key)."""
    seen: list[tuple[bytes, bytes]] = []
    other = server.client()
    other.ping()
    with server.client().monitor() as monitor:
        yield seen
        other.echo("the end")
        for event in monitor.listen():
            name, *rest = event["command"].split(" ", 2)
            if name.upper() == "ECHO":
                return
            seen.append((name.upper().encode(), rest[0].encode() if rest else b""))


@pytest.mark.fault(number=15)
@pytest.mark.redis
@pytest.mark.parametrize("ttl_s", [None, 100])
def test_a_load_trusts_no_earlier_look(book: Book, redis_server: RedisServer, ttl_s: float | None) -> None:
    with (
        book(
            f"evicted between EXISTS and GET, TTL {ttl_s}",
            injected="keys deleted after match said that they are there; MONITOR",
            expected="no EXISTS before a GET in a load; misses: absent",
        ) as row,
        cache_over(RedisStore(redis_server.url, ttl_s=ttl_s, deadline_s=PATIENT_S)) as cache,
    ):
        assert cache.save(TOKENS, KV) == BLOCKS
        with listened_to(redis_server) as commands:
            assert load_all(cache) == BLOCKS
        names = [name for name, _ in commands]
        assert names == [b"GET"] * BLOCKS + [b"PEXPIRE"] * (BLOCKS if ttl_s else 0)
        assert cache.match(TOKENS) == B * BLOCKS
        redis_server.client().delete(*(b"kv:" + key for key in KEYS[2:]))
        fault = Fault(row, PATIENT_S)
        assert fault(lambda: load_all(cache)) == 2
        assert cache.store.stats().misses == Counter(absent=BLOCKS - 2)
        row.seen = {"commands of a load": dict(Counter(map(bytes.decode, names))), **cache.store.stats().misses}
        check_works_again(cache)


@pytest.mark.fault(number=15)
@pytest.mark.redis
def test_what_is_evicted_all_the_time_is_missed_and_never_wrong(book: Book, own_server: RedisServer) -> None:
    """Another client fills a small server while this one matches, loads and saves."""
    client = own_server.client()
    client.config_set("maxmemory-policy", "allkeys-random")
    done = threading.Event()

    def churn() -> None:
        other, filler = own_server.client(), bytes(20_000)
        for i in itertools.count():
            if done.is_set():
                return
            with other.pipeline(transaction=False) as pipe:
                for j in range(20):
                    pipe.set(f"filler {i} {j}", filler)
                pipe.execute(raise_on_error=False)

    with (
        book(
            "eviction all the time",
            injected="another client churns a server of 4 MB more than it needs, allkeys-random",
            expected="hits and misses: absent; what match promised is not relied upon",
        ) as row,
        cache_over(RedisStore(own_server.url, deadline_s=PATIENT_S)) as cache,
    ):
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 4 * MIB)
        thread = threading.Thread(target=churn)
        thread.start()
        fault, broken = Fault(row, PATIENT_S), 0
        try:
            end = time.monotonic() + 20
            while time.monotonic() < end and (broken < 3 or cache.store.stats().hits < 10):
                cache.save(TOKENS, KV)
                promised = cache.match(TOKENS) // B
                time.sleep(random.uniform(0, 0.01))
                broken += fault(lambda: load_all(cache)) < promised
        finally:
            done.set()
            thread.join()
        stats = cache.store.stats()
        assert broken >= 3 and stats.hits >= 10 and stats.misses["absent"]
        assert set(stats.misses) == {"absent"} and set(stats.drops) <= {"oom"}
        row.seen = {"promises broken": broken, "hits": stats.hits, **stats.misses}
        client.config_set("maxmemory", 0)
        check_works_again(cache)


@pytest.mark.fault(number=16)
@pytest.mark.redis
def test_a_value_that_expires_is_whole_or_missed(book: Book, redis_server: RedisServer) -> None:
    rng, size = random.Random(16), 100_000
    with (
        book("TTL race", injected="TTL of 3 ms, reads 0 to 6 ms later", expected="whole, or a miss: absent") as row,
        RedisStore(redis_server.url, ttl_s=0.003, deadline_s=PATIENT_S) as store,
    ):
        fault = Fault(row, PATIENT_S)
        for i in range(2000):
            fill(store, [b"k"], size)
            time.sleep(rng.uniform(0, 0.006))
            fault(lambda: ask(store, [b"k"], size))
            if i >= 200 and store.stats().hits >= 10:
                break
        stats = store.stats()
        assert set(stats.misses) == {"absent"} and stats.hits >= 10 and not stats.faults
        row.seen = {"hits": stats.hits, **stats.misses}
    with RedisStore(redis_server.url, ttl_s=100, deadline_s=PATIENT_S) as store:
        fill(store, [b"k"])
        assert ask(store, [b"k"]) == [True]


@pytest.mark.fault(number=16)
@pytest.mark.redis
@pytest.mark.parametrize("how", ["get", "touch", "put"])
def test_a_use_renews_the_lifetime(book: Book, redis_server: RedisServer, how: str) -> None:
    client = redis_server.client()
    with (
        book(f"TTL refresh by {how}", injected="a second left, then none", expected="renewed; then absent") as row,
        RedisStore(redis_server.url, ttl_s=100, deadline_s=PATIENT_S) as store,
    ):
        fill(store, [b"k"])
        client.pexpire("kv:k", 30_000)
        fault = Fault(row, PATIENT_S)
        if how == "get":
            assert fault(lambda: ask(store, [b"k"])) == [True]
        elif how == "touch":
            assert fault(lambda: store.touch_many([b"k", b"none"])) == [True, False]
        else:
            fault(lambda: fill(store, [b"k"]))
        left = client.pttl("kv:k")
        assert 50_000 < left <= 100_000
        client.pexpire("kv:k", 0)
        assert fault(lambda: ask(store, [b"k"])) == [False] and store.touch_many([b"k"]) == [False]
        assert store.stats().misses == Counter(absent=1)
        row.seen = {"ms left after": round(left, -4), **store.stats().misses}
        fill(store, [b"k"])
        assert ask(store, [b"k"]) == [True]


@pytest.mark.fault(number=35)
@pytest.mark.redis
@pytest.mark.parametrize("how", ["FLUSHALL", "restart"])
def test_a_server_that_forgot_everything(how: str, clock: FakeClock, book: Book) -> None:
    with (
        RedisServer() as server,
        cache_over(RedisStore(server.url, deadline_s=LONG_S, clock=clock)) as cache,
        book(f"all gone: {how}", injected="in mid-run", expected="absent, then refilled; no fault") as row,
    ):
        for _ in range(3):
            check_repaired(cache)
            if how == "FLUSHALL":
                server.client().flushall()
            else:
                server.kill()
                server.start()
            with under_fault(row):
                assert cache.match(TOKENS) == load_all(cache) == 0
            before = cache.stats().stored
            assert cache.save(TOKENS, KV) == cache.stats().stored - before == BLOCKS
            assert load_all(cache) == BLOCKS
        assert cache.stats().misses == Counter(absent=3, gap=3 * (BLOCKS - 1))
        assert not cache.store.stats().faults and not cache.store.stats().drops
        row.seen = dict(cache.stats().misses)
        check_sums(cache)
