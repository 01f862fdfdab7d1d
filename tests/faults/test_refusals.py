"""Faults 20 and 21: servers that answer, and say that they will not."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import redis

from kvlab.stores import RedisStore
from kvlab.testbed.server import RedisServer, free_port
from tests.faults.book import Book
from tests.faults.kit import (
    BLOCKS,
    KV,
    LONG_S,
    LOST,
    NAMES,
    OTHER_KV,
    OTHER_TOKENS,
    RECORD,
    TOKENS,
    cache_over,
    check_is_no_help,
    check_repaired,
    check_sums,
    heal_breakers,
    impatient,
    load_all,
    load_others,
    under_fault,
    wait_for,
)
from tests.harness.helpers import FakeClock, flipped


@pytest.mark.fault(number=20)
@pytest.mark.redis
def test_a_read_only_replica(clock: FakeClock, book: Book) -> None:
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(RedisServer("--repl-diskless-sync-delay", "0"))
        replica = stack.enter_context(RedisServer("--replicaof", "127.0.0.1", str(master.port)))
        writer = stack.enter_context(cache_over(RedisStore(master.url, deadline_s=LONG_S)))
        aging = stack.enter_context(cache_over(RedisStore(replica.url, 100, LONG_S, clock=clock)))
        plain = stack.enter_context(cache_over(RedisStore(replica.url, None, LONG_S, clock=clock)))
        row = stack.enter_context(book("read-only replica", injected="--replicaof", expected="readonly; gets hit"))
        client = replica.client()
        assert writer.save(TOKENS, KV) == BLOCKS
        wait_for(lambda: client.info("replication")["master_link_status"] == "up" and client.exists(*NAMES) == BLOCKS)
        with under_fault(row):
            for cache in (plain, aging):
                assert load_all(cache) == BLOCKS
                assert cache.save(OTHER_TOKENS, OTHER_KV) == 0
                assert cache.store.stats().drops == Counter(readonly=BLOCKS)
            assert plain.save(TOKENS, KV) == plain.stats().kept == BLOCKS  # they are there: no write is needed
            assert aging.save(TOKENS, KV) == aging.save(TOKENS, KV) == 0  # their age cannot be renewed there
            assert aging.save(TOKENS, KV) == 0
            assert load_all(aging) == BLOCKS
        assert aging.store.stats().drops == Counter(readonly=3 * BLOCKS, breaker=BLOCKS)
        assert aging.store.stats().faults["readonly"] > 0 and aging.store.nodes[0].breaker.state == "closed"
        row.seen = {"drops": dict(aging.store.stats().drops), "faults": dict(aging.store.stats().faults)}
        master.client().set(NAMES[LOST], flipped(RECORD, 500))
        wait_for(lambda: client.get(NAMES[LOST]) != RECORD)
        assert load_all(plain) == LOST  # and cannot be removed there
        assert client.exists(NAMES[LOST])
        client.replicaof("NO", "ONE")
        clock.now += 1.1
        for cache in (plain, aging):
            check_repaired(cache)
            assert cache.save(OTHER_TOKENS, OTHER_KV) == BLOCKS
            assert load_others(cache) == BLOCKS
        check_sums(writer, aging, plain)


def answers_with(server: RedisServer, word: str) -> Callable[[], bool]:
    """Whether the server answers a PING with this error."""
    client = impatient(server)

    def there() -> bool:
        try:
            client.ping()
        except redis.RedisError as error:
            return word in f"{type(error).__name__} {error}"
        return False

    return there


@pytest.mark.fault(number=21)
@pytest.mark.redis
def test_a_server_that_is_loading(book: Book) -> None:
    with (
        RedisServer(debug=True) as server,
        cache_over(RedisStore(server.url, deadline_s=LONG_S)) as cache,
        book("LOADING", injected="DEBUG RELOAD, 1 ms a key", expected="loading") as row,
    ):
        client = server.client()
        assert cache.save(TOKENS, KV) == BLOCKS
        with client.pipeline(transaction=False) as pipe:
            for n in range(2000):
                pipe.set(f"filler {n}", bytes(1024))
            pipe.execute()
        client.config_set("rdbcompression", "no")
        client.config_set("loading-process-events-interval-bytes", 1024)
        client.config_set("key-load-delay", 1000)
        reload = threading.Thread(target=lambda: server.client().execute_command("DEBUG", "RELOAD"))
        reload.start()
        wait_for(answers_with(server, "BusyLoading"))
        with under_fault(row):
            check_is_no_help(cache, "loading")
        row.seen = dict(cache.store.stats().misses + cache.store.stats().drops)
        assert answers_with(server, "BusyLoading")(), "it was loading all the time"
        client.config_set("key-load-delay", 0)
        reload.join()
        assert load_all(cache) == BLOCKS
        check_repaired(cache)
        check_sums(cache)


@pytest.mark.fault(number=21)
@pytest.mark.redis
def test_a_server_that_is_busy(clock: FakeClock, book: Book) -> None:
    with (
        RedisServer("--busy-reply-threshold", "20") as server,
        cache_over(RedisStore(server.url, deadline_s=LONG_S, clock=clock)) as cache,
        book("BUSY", injected="EVAL of an endless loop", expected="busy, then breaker") as row,
    ):
        assert cache.save(TOKENS, KV) == BLOCKS

        def script() -> None:
            with contextlib.suppress(redis.RedisError):  # it is killed
                server.client().eval("while true do end", 0)

        thread = threading.Thread(target=script)
        thread.start()
        try:
            wait_for(answers_with(server, "BUSY"))
            with under_fault(row):
                check_is_no_help(cache, "busy")
                for misses in ({"busy": 2 * BLOCKS}, {"busy": 3 * BLOCKS}, {"busy": 4 * BLOCKS}):
                    assert load_all(cache) == 0
                    assert cache.store.stats().misses == Counter(misses)
                assert load_all(cache) == cache.save(OTHER_TOKENS, OTHER_KV) == 0
            assert cache.store.stats().misses == Counter(busy=4 * BLOCKS, breaker=BLOCKS)
        finally:
            server.client().script_kill()
            thread.join()
        row.seen = {"misses": dict(cache.store.stats().misses), "drops": dict(cache.store.stats().drops)}
        assert load_all(cache) == 0  # not asked before the cool-down is over
        clock.now += 1.1
        assert load_all(cache) == BLOCKS
        check_repaired(cache)
        check_sums(cache)


@pytest.mark.fault(number=21)
@pytest.mark.redis
def test_a_replica_without_its_master(clock: FakeClock, book: Book) -> None:
    with (
        RedisServer("--replica-serve-stale-data", "no") as server,
        cache_over(RedisStore(server.url, deadline_s=LONG_S, clock=clock)) as cache,
        book("MASTERDOWN", injected="replica of a dead master, no stale data", expected="loading, readonly") as row,
    ):
        assert cache.save(TOKENS, KV) == BLOCKS
        server.client().replicaof("127.0.0.1", free_port())
        wait_for(lambda: server.client().info("replication")["role"] == "slave")
        with under_fault(row):
            assert load_all(cache) == cache.match(TOKENS) == 0
            heal_breakers(cache)
            assert cache.save(TOKENS, KV) == 0
        stats = cache.store.stats()
        assert stats.misses == Counter(loading=BLOCKS) and stats.faults["loading"] == 3
        assert stats.drops.total() == BLOCKS and stats.drops.keys() <= {"loading", "readonly"}  # as servers see fit
        row.seen = {"misses": dict(stats.misses), "drops": dict(stats.drops), "faults": dict(stats.faults)}
        server.client().replicaof("NO", "ONE")
        clock.now += 1.1
        assert load_all(cache) == BLOCKS
        check_repaired(cache)
        check_sums(cache)


@pytest.mark.fault(number=21)
@pytest.mark.redis
def test_a_server_that_cannot_write_its_disk(clock: FakeClock, book: Book) -> None:
    with (
        RedisServer("--stop-writes-on-bgsave-error", "yes", "--enable-protected-configs", "yes") as server,
        cache_over(RedisStore(server.url, deadline_s=LONG_S, clock=clock)) as cache,
        book("MISCONF", injected="BGSAVE into a folder that is gone", expected="misconf, breaker; gets hit") as row,
    ):
        client, folder = server.client(), server.folder / "gone"
        assert cache.save(TOKENS, KV) == BLOCKS
        folder.mkdir()
        client.config_set("dir", str(folder))
        client.config_set("save", "3600 1")
        shutil.rmtree(folder)
        client.bgsave()
        wait_for(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        assert answers_with(server, "MISCONF")(), "a PING is refused, and all reads below hit"
        with under_fault(row):
            for refused in (1, 2, 3):
                assert cache.save(OTHER_TOKENS, OTHER_KV) == 0
                assert cache.store.stats().drops == Counter(misconf=refused * BLOCKS)
                assert load_all(cache) == BLOCKS
            assert cache.save(OTHER_TOKENS, OTHER_KV) == 0
            assert load_all(cache) == BLOCKS
        assert cache.store.stats().drops == Counter(misconf=3 * BLOCKS, breaker=BLOCKS)
        row.seen = dict(cache.store.stats().drops)
        client.config_set("dir", str(server.folder))
        client.bgsave()
        wait_for(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "ok")
        clock.now += 1.1
        assert cache.save(OTHER_TOKENS, OTHER_KV) == BLOCKS
        assert load_others(cache) == load_all(cache) == BLOCKS
        check_sums(cache)
