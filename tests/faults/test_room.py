"""Faults 17 to 19: a server without room, and values that are too large."""

from __future__ import annotations

import contextlib
import socket
from collections import Counter

import pytest
import redis

from kvlab.cache import DistributedKVCache
from kvlab.stores import RedisStore
from kvlab.stores.redis.connection import MAX_VALUE_BYTES
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import RedisServer
from tests.faults.book import Book
from tests.faults.kit import (
    BLOCKS,
    KV,
    LONG_S,
    LOST,
    MIB,
    NAMES,
    OTHER_KV,
    OTHER_TOKENS,
    RECORD,
    TOKENS,
    cache_over,
    check_bad_value,
    check_repaired,
    impatient,
    load_all,
    load_others,
    monitored,
    names_of,
    under_fault,
    wait_for,
)
from tests.harness.helpers import FakeClock


@pytest.mark.fault(number=17)
@pytest.mark.redis
def test_out_of_memory(clock: FakeClock, book: Book) -> None:
    with (
        RedisServer("--maxmemory", "64mb", "--maxmemory-policy", "noeviction") as server,
        cache_over(RedisStore(server.url, deadline_s=LONG_S, clock=clock)) as cache,
        book("out of memory", injected="64 MB, noeviction, full", expected="oom, breaker; gets hit") as row,
    ):
        client = server.client()
        assert cache.save(TOKENS, KV) == BLOCKS
        fillers = []
        with contextlib.suppress(redis.exceptions.OutOfMemoryError):
            for n in range(100):  # a small command that takes 8 MiB: the last one goes over the limit
                client.setrange(f"filler {n}", 8 * MIB - 1, b"x")
                fillers.append(f"filler {n}")
        assert len(fillers) < 10
        with under_fault(row):
            for refused in (1, 2, 3):
                assert cache.save(OTHER_TOKENS, OTHER_KV) == 0
                assert cache.store.stats().drops == Counter(oom=refused * BLOCKS)
                assert load_all(cache) == BLOCKS
            with monitored(server) as commands:
                assert cache.save(OTHER_TOKENS, OTHER_KV) == 0
                assert load_all(cache) == BLOCKS
        assert "SET" not in names_of(commands) and "GET" in names_of(commands)
        assert cache.store.stats().drops == Counter(oom=3 * BLOCKS, breaker=BLOCKS)
        assert cache.store.nodes[0].breaker.state == "closed" and cache.store.nodes[0].write_breaker.state == "open"
        clock.now += 1.1
        assert cache.save(OTHER_TOKENS, OTHER_KV) == 0  # it may try, and is refused again
        assert cache.store.stats().drops == Counter(oom=4 * BLOCKS, breaker=BLOCKS)
        assert cache.stats().drops == Counter(store=5 * BLOCKS)
        client.delete(*fillers)
        assert cache.save(OTHER_TOKENS, OTHER_KV) == 0  # not asked before the cool-down is over
        row.seen = dict(cache.store.stats().drops)
        clock.now += 1.1
        assert cache.save(OTHER_TOKENS, OTHER_KV) == BLOCKS
        assert load_others(cache) == load_all(cache) == BLOCKS
        client.set(NAMES[LOST], RECORD[:-1])
        assert load_all(cache) == LOST
        check_repaired(cache)


@pytest.mark.fault(number=18)
@pytest.mark.redis
def test_a_value_over_the_limit(redis_server: RedisServer, book: Book) -> None:
    client = redis_server.client()
    with (
        FaultProxy(redis_server.port) as proxy,
        cache_over(RedisStore(proxy.url, deadline_s=LONG_S)) as cache,
        book("oversize value", injected="64 MiB + 1; a raw SET of 513 MiB", expected="too_big, nothing sent") as row,
    ):
        assert cache.save(TOKENS, KV) == BLOCKS
        proxy.reset_counts()
        half = memoryview(bytes(MAX_VALUE_BYTES // 2))
        with under_fault(row):
            assert cache.store.put_many([b"big"], [bytes(MAX_VALUE_BYTES + 1)]) == 0
            assert cache.store.put_many([b"pieces"], [(half, b"x", half)]) == 0
        assert proxy.bytes_up == 0 and proxy.accepted == 0
        assert cache.store.stats().drops == Counter(too_big=2)
        values = [b"small", bytes(MAX_VALUE_BYTES + 1), b"small too"]
        assert cache.store.put_many([b"a", b"big", b"c"], values) == 2  # it takes no other with it
        assert 0 < proxy.bytes_up < 200
        assert cache.store.get_many([b"a", b"big", b"c"]) == [b"small", None, b"small too"]
        cache.stats().check()
        assert not client.exists(b"kv:big") and not client.exists(b"kv:pieces")
        with impatient(redis_server) as raw, pytest.raises((redis.RedisError, OSError)) as refused:
            raw.set("raw", bytes(513 * MIB))
        with socket.create_connection(("127.0.0.1", redis_server.port)) as raw_socket:
            raw_socket.sendall(b"*3\r\n$3\r\nSET\r\n$3\r\nraw\r\n$%d\r\n" % (513 * MIB))
            said = raw_socket.recv(4096).decode().strip()
        assert client.ping() and not client.exists("raw")
        row.seen = {
            "too_big": cache.store.stats().drops["too_big"],
            "bytes sent": 0,
            "raw SET of 513 MiB": f"redis-py: {type(refused.value).__name__}; the server: {said}",
        }
        check_repaired(cache)


@pytest.mark.fault(number=18)
@pytest.mark.redis
def test_a_value_over_the_limit_that_somebody_else_stored(
    cache: DistributedKVCache, client: redis.Redis, book: Book
) -> None:
    with book("oversize value, stored", injected="SETRANGE of 65 MiB under a key", expected="too_big") as row:
        check_bad_value(row, cache, lambda: client.setrange(NAMES[LOST], 65 * MIB, b"x"), "too_big")


@pytest.mark.fault(number=19)
@pytest.mark.redis
def test_a_value_larger_than_the_server(book: Book) -> None:
    with (
        RedisServer("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru") as server,
        cache_over(RedisStore(server.url, deadline_s=LONG_S)) as cache,
        book("value larger than maxmemory", injected="100 MB into 64 MB, LRU", expected="too_big") as row,
    ):
        client = server.client()
        assert cache.save(TOKENS, KV) == BLOCKS
        with under_fault(row):
            for size in (100_000_000, 64 * MIB // 16 + 1):
                assert cache.store.put_many([b"big"], [bytes(size)]) == 0
        assert cache.store.stats().drops == Counter(too_big=2)
        assert cache.store.put_many([b"fits"], [bytes(64 * MIB // 16)]) == 1
        assert client.info("stats")["evicted_keys"] == 0
        assert load_all(cache) == BLOCKS
        row.seen = {"too_big": 2, "other keys lost": 0}
        with impatient(server) as raw, contextlib.suppress(redis.RedisError):
            raw.set("raw", bytes(100_000_000))  # what the guard is for
        row.seen["other keys lost by a raw SET"] = BLOCKS - client.exists(*NAMES)
        client.flushall()
        wait_for(lambda: client.info("memory")["used_memory"] < 32 * MIB)  # the closed client's buffer counts too
        check_repaired(cache)
