"""Faults 30, 32, 37, 38 and 39: many at once, and two who may not see each other."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvlab.cache import DistributedKVCache
from kvlab.core.keys import Namespace, text_key
from kvlab.stores import RedisStore
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import RedisServer
from tests.faults.book import Book
from tests.faults.calls import FORK, needs_fork, processes
from tests.faults.kit import (
    BLOCKS,
    KV,
    LONG_S,
    LOST,
    MIB,
    NAMES,
    RECORD,
    RECORDS,
    SPEC,
    TOKENS,
    B,
    cache_over,
    check_repaired,
    check_sums,
    load_all,
    under_fault,
    wait_for,
)
from tests.harness.helpers import blank, exact_kv, flipped


def text_cache(url: str) -> DistributedKVCache:
    return DistributedKVCache(precision="fp32", compress=False, store=RedisStore(url, deadline_s=LONG_S))


def pair_of(value: float, nbytes: int = 4 * MIB) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that together take so many bytes."""
    half = torch.full((nbytes // 8,), value)
    return half, half


@pytest.mark.fault(number=30)
@pytest.mark.redis
@needs_fork
def test_two_writers_of_one_key(redis_server: RedisServer, book: Book) -> None:
    assert FORK is not None
    stop = FORK.Event()

    def write(number: int) -> None:
        with text_cache(redis_server.url) as mine:
            pair = pair_of(number + 1.0)
            while not stop.is_set():
                assert mine.cache_kv("shared", 0, *pair)

    with (
        text_cache(redis_server.url) as reader,
        book("two writers of one key", injected="two processes, 4 MiB each", expected="A or B") as row,
    ):
        seen: Counter[str] = Counter()
        with processes(2, write):
            wait_for(lambda: reader.store.probe([text_key("shared", 0, "fp32")]) == 1)
            give_up = time.monotonic() + LONG_S
            while seen.total() < 60 or len(seen) < 2:
                assert time.monotonic() < give_up, seen
                with under_fault(row):
                    got = reader.get_cached_kv("shared", 0)
                assert got is not None, "it is there, and whole"
                assert torch.equal(*got) and bool((got[0] == got[0][0]).all())
                seen[{1.0: "A", 2.0: "B"}[float(got[0][0])]] += 1
            stop.set()
        assert reader.stats().hits == seen.total() and not reader.stats().misses
        row.seen = dict(seen)
        assert reader.cache_kv("shared", 0, *pair_of(3.0))
        got = reader.get_cached_kv("shared", 0)
        assert got is not None and torch.equal(got[0], pair_of(3.0)[0])
        check_sums(reader)


@pytest.mark.fault(number=32)
@pytest.mark.redis
@needs_fork
def test_a_thousand_readers(redis_server: RedisServer, book: Book) -> None:
    own, children, each, per_child = 800, 4, 50, 8
    requests = [[1000 * n + i for i in range(B * BLOCKS)] for n in range(8)]
    kvs = [exact_kv(SPEC, B * BLOCKS, seed=100 + n) for n in range(8)]
    bound = 32 + children * per_child

    def read(cache: DistributedKVCache, number: int, times: list[float]) -> None:
        out = blank(SPEC, B * BLOCKS)
        begin = time.perf_counter()
        assert cache.load(requests[number % 8], 0, B * BLOCKS, out) == B * BLOCKS
        times.append(1000 * (time.perf_counter() - begin))
        assert torch.equal(out, kvs[number % 8])

    def readers(cache: DistributedKVCache, count: int) -> list[float]:
        times: list[float] = []  # one for each reader that saw no wrong: others end before they are checked
        right: list[int] = []

        def one(number: int) -> None:
            read(cache, number, times)
            right.append(number)

        threads = [threading.Thread(target=one, args=(n,)) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(right) == count
        check_sums(cache)
        assert cache.stats().hits == count * BLOCKS
        return times

    def child(_: int) -> None:
        with cache_over(RedisStore(proxy.url, deadline_s=LONG_S, max_connections=per_child)) as theirs:
            readers(theirs, each)

    most = 0
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        with redis_server.client() as client:
            while not over.is_set():
                most = max(most, len(client.client_list()) - 1)
                time.sleep(0.002)

    injected = f"{own} threads over 32 connections, {children} processes of {each} over {per_child}, answers 20 ms late"
    with (
        FaultProxy(redis_server.port) as proxy,
        cache_over(RedisStore(proxy.url, deadline_s=LONG_S, max_connections=32)) as cache,
        book("1000 readers", injected=injected, expected="all hit, none wrong") as row,
    ):
        for tokens, kv in zip(requests, kvs, strict=True):
            assert cache.save(tokens, kv) == BLOCKS
        others = len(redis_server.client().client_list()) - 1
        proxy.latency_s = 0.02  # or a server as near as this one never sees so many at once
        with processes(children, child):
            watcher = threading.Thread(target=watch)
            watcher.start()
            with under_fault(row):
                times = readers(cache, own)
        over.set()
        watcher.join()
        assert 1 < most <= bound + others + 1  # one more: a connection that the server has not yet seen closing
        row.seen = {
            "wrong": 0,
            "hits": cache.stats().hits,
            "clients of the server": most,
            "bound": bound,
            "p50 ms": round(statistics.median(times), 1),
            "p99 ms": round(statistics.quantiles(times, n=100)[98], 1),
        }
        check_repaired(cache)


@pytest.mark.fault(number=37)
@pytest.mark.redis
@needs_fork
def test_a_herd_on_one_prefix(redis_server: RedisServer, book: Book) -> None:
    """Blocks that are there are not sent again. That bounds the herd by those who began before the first had saved.

    Processes begin one after the other, each when somebody in the one before has saved the whole prefix. Then
    only the eight threads of the first process can find a block missing: 8 SETs a block at most, whatever the
    machine does. With all 64 at one moment there is no such bound; that number is recorded.
    """
    assert FORK is not None
    count, each = 8, 8

    def work(number: int, starts: list[Any], results: Any) -> None:
        with cache_over(RedisStore(redis_server.url, deadline_s=LONG_S, max_connections=each)) as mine:
            good: list[bool] = []

            def one() -> None:
                load_all(mine)
                taken = mine.save(TOKENS, KV)
                if number + 1 < len(starts):
                    starts[number + 1].set()
                good.append(taken == BLOCKS == load_all(mine))

            starts[number].wait(LONG_S)
            threads = [threading.Thread(target=one) for _ in range(each)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert good == [True] * each
            check_sums(mine)
            results.put((mine.stats().stored, mine.stats().kept))

    def herd(starts: list[Any], before: Callable[[], object]) -> tuple[int, int]:
        results = FORK.SimpleQueue()
        with processes(count, work, starts, results):
            before()
            told = [results.get() for _ in range(count)]
        assert sum(saved + kept for saved, kept in told) == count * each * BLOCKS
        return sum(saved for saved, _ in told), client.info("commandstats").get("cmdstat_set", {"calls": 0})["calls"]

    client = redis_server.client()
    injected = f"{count} processes of {each} threads load and save one prefix"
    expected = f"at most {each * BLOCKS} of {count * each * BLOCKS} SETs"
    with (
        cache_over(RedisStore(redis_server.url, deadline_s=LONG_S)) as cache,
        book("thundering herd", injected=injected, expected=expected) as row,
    ):
        client.config_resetstat()
        starts = [FORK.Event() for _ in range(count)]
        with under_fault(row):
            saved, sets = herd(starts, starts[0].set)
        assert BLOCKS <= saved == sets <= each * BLOCKS
        assert load_all(cache) == BLOCKS
        client.set(NAMES[LOST], flipped(RECORD, 500))
        assert load_all(cache) == LOST
        check_repaired(cache)
        client.set(NAMES[LOST], RECORD[:-1])  # damage that stays there until it is written again
        client.config_resetstat()
        one_event = FORK.Event()
        repairs = herd([one_event] * count, one_event.set)[1]
        assert 1 <= repairs <= count * each * (BLOCKS - LOST)
        assert load_all(cache) == BLOCKS and [client.get(name) for name in NAMES] == RECORDS
        client.flushall()
        client.config_resetstat()
        at_once = herd([gate := FORK.Event()] * count, lambda: (time.sleep(0.2), gate.set()))[1]
        assert BLOCKS <= at_once <= count * each * BLOCKS
        row.seen = {
            "SETs": sets,
            "SETs by 64 at one moment": at_once,
            "SETs by 64 that meet a damaged block": repairs,
            "blocks offered": count * each * BLOCKS,
        }
        check_sums(cache)


@pytest.mark.fault(number=39)
@pytest.mark.redis
@needs_fork
def test_a_writer_killed_in_mid_set(redis_server: RedisServer, book: Book) -> None:
    size, client = 16 * MIB, redis_server.client()

    def write(_: int) -> None:
        with text_cache(proxy.url) as mine:
            mine.cache_kv("large", 0, *pair_of(2.0, size))

    injected = "SIGKILL after ½, 2 and 4 MiB of 16, with and without an older value"
    with (
        FaultProxy(redis_server.port) as proxy,
        text_cache(redis_server.url) as reader,
        book("writer killed in mid-SET", injected=injected, expected="absent, or the older one") as row,
    ):
        proxy.upload_bandwidth = 40e6
        old, new = pair_of(1.0, size), pair_of(2.0, size)
        seen: Counter[str] = Counter()
        for attempt in range(40):
            older, mib = (None, old)[attempt % 2], (0.5, 2, 4)[attempt // 2 % 3]
            client.flushall()
            if older:
                assert reader.cache_kv("large", 0, *older)
            proxy.reset_counts()
            with processes(1, write) as (child,):
                wait_for(lambda n=mib: proxy.bytes_up > n * MIB)
                child.kill()
                child.join()
                child._popen.returncode = 0  # -9: it was to be killed
            wait_for(lambda: proxy.open_connections == 0)
            with under_fault(row):
                got = reader.get_cached_kv("large", 0)
            if proxy.bytes_up < size:  # else the system had it all in its buffers: then it may arrive whole
                expected = older
                seen["absent" if older is None else "the older one"] += 1
            else:
                expected = None if got is None else new
            assert (got is None) == (expected is None)
            assert got is None or all(map(torch.equal, got, expected))
            if min(seen["absent"], seen["the older one"]) == 3:
                break
        assert min(seen["absent"], seen["the older one"]) == 3, "hardly ever killed in the middle"
        assert reader.stats().misses.keys() == {"absent"}
        row.seen = dict(seen)
        proxy.upload_bandwidth = None
        with text_cache(proxy.url) as again:
            assert again.cache_kv("large", 0, *pair_of(2.0, size))
        got = reader.get_cached_kv("large", 0)
        assert got is not None and torch.equal(got[0], pair_of(2.0, size)[0])
        check_sums(reader)


def auc(a: list[float], b: list[float]) -> float:
    """The chance that one of `a` is larger than one of `b`; 0.5 where nothing tells them apart."""
    return sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b))


@pytest.mark.fault(number=38)
@pytest.mark.redis
def test_two_tenants(redis_server: RedisServer, book: Book) -> None:
    length, probes = BLOCKS * B, 200

    def tenant(salt: str) -> DistributedKVCache:
        store = RedisStore(redis_server.url, deadline_s=LONG_S)
        return DistributedKVCache(precision="fp32", compress=False, store=store, model=SPEC, block_tokens=B, salt=salt)

    chance = random.Random(38)
    victims = [[1000 * n + i for i in range(length)] for n in range(probes // 2)]
    nobodys = [[10**6 + 1000 * n + i for i in range(length)] for n in range(probes // 2)]
    kv = exact_kv(SPEC, length)
    injected = f"the same tokens under two salts, {probes} probes"
    with (
        tenant("a") as a,
        tenant("b") as b,
        book("tenant isolation", injected=injected, expected="absent; times tell nothing") as row,
    ):
        for tokens in victims:
            assert a.save(tokens, kv) == BLOCKS
        theirs = set(redis_server.client().keys())
        own = Namespace(SPEC.fingerprint, "fp32", b"b", B)
        assert not theirs & {b"kv:" + key for tokens in victims for key in own.keys(tokens)}
        b.match(victims[0])  # connects
        asked = [(True, tokens) for tokens in victims] + [(False, tokens) for tokens in nobodys]
        chance.shuffle(asked)
        times: dict[bool, list[float]] = {True: [], False: []}
        out = blank(SPEC, length)
        for of_a, tokens in asked:
            begin = time.perf_counter()
            with under_fault(row):
                assert b.match(tokens) == b.load(tokens, 0, length, out) == 0
            times[of_a].append(time.perf_counter() - begin)
        assert b.stats().hits == 0 and b.stats().misses["absent"] == probes
        assert a.cache_kv("text", 0, kv, kv) and b.get_cached_kv("text", 0) is None
        row.seen = {"hits across": 0, "absent": probes, "AUC of the times": round(auc(times[True], times[False]), 3)}
        assert b.save(victims[0], kv) == b.stats().stored == BLOCKS  # written anew: the other's are not these
        for each in (a, b):
            assert each.load(victims[0], 0, length, out) == length and torch.equal(out, kv)
        ours = set(redis_server.client().keys()) - theirs
        assert len(ours) == BLOCKS + 1  # and the text
        check_sums(a, b)
