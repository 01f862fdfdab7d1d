"""What a store does when the wire or the server fails: dead, hung, slow, cut off, full, out of step, forked.

In every test: what comes back is what was stored under that key or a miss, nothing is raised, every call is
counted under a reason, no call hangs, and once the fault is over the next try works. A test that counts no
fault has not shown one, so each names the counter that must have grown.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import json
import os
import random
import signal
import socket
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import redis
import torch

from kvlab.cache import DistributedKVCache
from kvlab.core import record
from kvlab.core.record import Format
from kvlab.stores import RedisStore, Store
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import RedisServer
from tests.faults.conftest import Book, Row
from tests.faults.test_basic_faults import (
    BLOCKS,
    KEYS,
    KV,
    OTHER_KV,
    OTHER_TOKENS,
    SPEC,
    TOKENS,
    B,
    cache_over,
    check_works_again,
    heal_breakers,
    load_all,
    wait_for,
)
from tests.harness.helpers import FakeClock, blank, joined
from tests.harness.scripted import ScriptedServer

Result = TypeVar("Result")

D = 0.25  # the default deadline of a call
PATIENT_S = 20.0  # where a busy machine must not turn a good call into a timeout
HANG = 10  # deadlines: the only thing asserted about time
MIB = 1 << 20
RECORDS = [joined(record.encode(KV[:, :, :, i * B : (i + 1) * B], KEYS[i], Format())) for i in range(BLOCKS)]
HEAD = len(b"$%d\r\n" % len(RECORDS[0]))
REPLY = HEAD + len(RECORDS[0]) + 2  # bytes of the answer to one GET
MEMORY_INFO = b"\r\nmaxmemory:0\r\n"


class Fault:
    """Runs calls under a fault: their time goes in the row, and none may hang."""

    def __init__(self, row: Row, deadline_s: float) -> None:
        self._row, self._bound_s = row, HANG * deadline_s
        row.added_ms = 0.0

    def __call__(self, call: Callable[[], Result], deadlines: int = 1) -> Result:
        begin = time.perf_counter()
        result = call()
        took = time.perf_counter() - begin
        self._row.added_ms = (self._row.added_ms or 0.0) + took * 1000
        assert took < self._bound_s * deadlines
        return result


def value_of(key: bytes, size: int = 1000) -> bytes:
    """The only value that is ever stored under this key."""
    seed = random.Random(key).randbytes(min(size, 1000))
    return (seed * (size // len(seed) + 1))[:size]


def ask(store: Store, keys: list[bytes], size: int = 1000) -> list[bool]:
    """Which keys are hits; what comes back is what was stored under that key."""
    got = store.get_many(keys)
    for key, value in zip(keys, got, strict=True):
        assert value is None or value == value_of(key, size)
    store.stats().check()
    return [value is not None for value in got]


def fill(store: Store, keys: list[bytes], size: int = 1000) -> None:
    assert store.put_many(keys, [value_of(key, size) for key in keys]) == len(keys)


def load_some(cache: DistributedKVCache, tokens: list[int], kv: torch.Tensor) -> int:
    """Load these blocks; what is said to be there must be right."""
    out = blank(SPEC, len(tokens))
    end = cache.load(tokens, 0, len(tokens), out)
    assert torch.equal(out[:, :, :, :end], kv[:, :, :, :end])
    cache.stats().check()
    cache.store.stats().check()
    return end // B


def calm(store: Store) -> None:
    """The fault is over; from here on a busy machine must not turn a good call into a timeout."""
    assert isinstance(store, RedisStore)
    store._deadline_s = PATIENT_S


def breakers(store: Store) -> tuple[str, str]:
    assert isinstance(store, RedisStore)
    return store.nodes[0].breaker.state, store.nodes[0].write_breaker.state


def all_arrived(proxy: FaultProxy, before: int, nbytes: int) -> None:
    """Wait until so many answer bytes lie at the store, or it has closed the connection.

    An answer that nobody asked for shows only once it is there; until then nothing tells it from the next one.
    """
    wait_for(lambda: proxy.open_connections == 0 or proxy.bytes_down - before >= nbytes)
    proxy.after(1 << 60, int)  # runs in the proxy's thread: what it has counted is sent by then
    time.sleep(0.02)


def calls_of(client: redis.Redis, command: str) -> dict[str, int]:
    """The server's own count of a command."""
    counts = client.info("commandstats").get(f"cmdstat_{command}", {})
    return {name: counts.get(name, 0) for name in ("calls", "rejected_calls", "failed_calls")}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server that the test may stop and kill."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[FaultProxy]:
    """The way to a server that is well."""
    with FaultProxy(redis_server.port, seed=1) as made:
        prompt(made)
        yield made


def prompt(proxy: FaultProxy) -> None:
    """Nothing that it sends from here on waits for an acknowledgement of what was sent before: 40 ms each."""
    assert proxy._listener is not None
    proxy._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it


class Tiny:
    """Answers as a Redis would; a command named in `bad` gets what stands there instead."""

    def __init__(self, password: bytes | None = None) -> None:
        self.values: dict[bytes, bytes] = {}
        self.bad: dict[bytes, bytes | Callable[[list[bytes]], bytes | None]] = {}
        self.password = password

    def __call__(self, command: list[bytes]) -> bytes | None:
        bad = self.bad.get(command[0])
        if bad is not None:
            return bad if isinstance(bad, bytes) else bad(command)
        return self.good(command)

    def good(self, command: list[bytes]) -> bytes:
        name, *rest = command
        if name == b"AUTH":
            return b"+OK\r\n" if rest[-1] == self.password else b"-WRONGPASS invalid username-password pair\r\n"
        if name == b"INFO":
            return bulk(MEMORY_INFO)
        if name == b"GET":
            return bulk(self.values.get(rest[0]))
        if name == b"SET":
            self.values[rest[0]] = rest[1]
            return b"+OK\r\n"
        there = rest[0] in self.values
        if name == b"DEL":
            self.values.pop(rest[0], None)
        return b":%d\r\n" % there


class Scripted(ScriptedServer):
    """One that does not wait for an acknowledgement between two answers: 40 ms each."""

    def __init__(self, script: Tiny) -> None:
        super().__init__(script)
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it


def bulk(value: bytes | None) -> bytes:
    return b"$-1\r\n" if value is None else b"$%d\r\n%b\r\n" % (len(value), value)


def command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


# --- 1: nobody there -----------------------------------------------------------------------------
@pytest.mark.redis
@pytest.mark.parametrize("how", ["refused", "reset at once", "killed before the call"])
def test_nobody_there_opens_the_breaker_and_is_found_again(
    book: Book, own_server: RedisServer, clock: FakeClock, how: str
) -> None:
    with (
        book(1, f"connection {how}", injected=how, expected="3 x conn, then breaker; back after one cool-down") as row,
        FaultProxy(own_server.port) as proxy,
        cache_over(RedisStore(proxy.url, clock=clock)) as cache,
    ):
        calm(cache.store)
        check_works_again(cache)
        cache.store._deadline_s = D
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


def test_a_closed_port_on_the_real_clock(book: Book) -> None:
    """The store's own clock: a server that comes is found within one cool-down and one call."""
    with (
        book(1, "closed port", injected="nobody listens; real clock", expected="3 x conn, then breaker") as row,
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


# --- 2: killed while it answers ------------------------------------------------------------------
@pytest.mark.redis
def test_a_server_killed_while_it_answers(book: Book, own_server: RedisServer) -> None:
    cuts = [0, 3, HEAD + 40, HEAD + 500, REPLY, 2 * REPLY - 1, 3 * REPLY + HEAD + 200]
    with (
        book(
            2,
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


# --- 3: killed while it is written to ------------------------------------------------------------
BIG = 200 * MIB


@pytest.mark.redis
@pytest.mark.parametrize(("aof", "when"), [("no", "120 ms"), ("yes", "120 ms"), ("yes", "writing its file")])
def test_a_server_killed_during_a_set_has_the_value_whole_or_not_at_all(book: Book, aof: str, when: str) -> None:
    options = ("--appendonly", aof, "--appendfsync", "no", "--proto-max-bulk-len", "512mb")
    value = memoryview(value_of(b"big", MIB) * 200)
    with (
        book(
            3,
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


@pytest.mark.redis
def test_a_server_killed_during_the_stores_own_put(book: Book, own_server: RedisServer) -> None:
    size = 48 * MIB
    with (
        book(
            3,
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


# --- 4: hung -------------------------------------------------------------------------------------
@pytest.mark.redis
@pytest.mark.parametrize("connected", [True, False], ids=["open connection", "new connection"])
def test_a_hung_server_costs_three_deadlines_and_then_nothing(
    book: Book, own_server: RedisServer, connected: bool
) -> None:
    """Sixty calls should add less than a second: three deadlines, and the breaker. The book has the figure."""
    kind = "open connection" if connected else "new connection"
    with (
        book(
            4,
            f"hung server, {kind}",
            injected="SIGSTOP, 60 calls, SIGCONT; real clock",
            expected="3 x timeout, then breaker, < 1 s in all; back within one cool-down and one call",
        ) as row,
        cache_over(RedisStore(own_server.url)) as cache,
    ):
        if connected:
            calm(cache.store)
            check_works_again(cache)
            cache.store._deadline_s = D
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


@pytest.mark.redis
def test_a_worker_that_stands_still_takes_the_answers_that_came_meanwhile(
    book: Book, redis_server: RedisServer
) -> None:
    """What a full garbage collection does to all threads, or a C function that keeps the interpreter to itself."""
    stops, threads = 10, 2  # fewer threads than faults that open a breaker
    with (
        book(
            4,
            "the worker stands still",
            injected=f"{stops} times no thread of it runs for two deadlines, while {threads} read; the server is well",
            expected="the answers have come, and are taken; the breaker stays closed",
        ) as row,
        RedisStore(redis_server.url, deadline_s=D) as store,
    ):
        row.seen, row.added_ms = read_while_standing_still(store, stops, threads)
        assert breakers(store)[0] == "closed"


def read_while_standing_still(store: Store, stops: int, threads: int) -> tuple[dict[str, int], float]:
    """The keys that were hits and misses meanwhile, and how long the worker stood still, in ms."""
    keys = [b"%d" % i for i in range(20)]
    fill(store, keys)
    stop, stood_s = threading.Event(), 0.0

    def read() -> None:
        while not stop.is_set():
            ask(store, keys)

    readers = [threading.Thread(target=read) for _ in range(threads)]
    for reader in readers:
        reader.start()
    for _ in range(stops):
        time.sleep(0.05)
        begin = time.perf_counter()
        ctypes.PyDLL(None).usleep(round(2 * D * 1e6))  # keeps the interpreter to itself
        stood_s += time.perf_counter() - begin
    stop.set()
    for reader in readers:
        reader.join()
    stats = store.stats()
    assert stats.hits and stood_s >= stops * 2 * D
    assert stats.misses.total() <= stops * threads * len(keys) / 10 and set(stats.misses) <= {"timeout"}
    return {"hits": stats.hits, "misses": stats.misses.total()}, 1000 * stood_s


# --- 5, 6: slow ----------------------------------------------------------------------------------
def slow_bandwidth(proxy: FaultProxy) -> None:
    proxy.bandwidth = 1e6


def slow_slices(proxy: FaultProxy) -> None:
    proxy.slices = (1024, 0.005)


def slow_drip(proxy: FaultProxy) -> None:
    proxy.slices = (1, 0.1)


def slow_upload(proxy: FaultProxy) -> None:
    proxy.upload_bandwidth = 1e6


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
        book(5, f"slow: {name}", injected=f"{call} of {size >> 20} MiB at {name}", expected="timeout") as row,
        RedisStore(proxy.url, clock=clock) as store,
    ):
        calm(store)
        fill(store, [b"k"], size)
        store._deadline_s = D
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


@pytest.mark.parametrize("drip", [False, True], ids=["silent", "drip"])
def test_a_slow_handshake_is_under_the_deadline_too(book: Book, clock: FakeClock, drip: bool) -> None:
    name = "a byte every 0.1 s" if drip else "no answer"
    tiny = Tiny(b"right")
    with (
        book(5, f"slow handshake: {name}", injected=f"{name} to AUTH and SELECT", expected="timeout") as row,
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


@pytest.mark.redis
def test_jitter_gives_hits_before_the_deadline_and_misses_after(
    book: Book, redis_server: RedisServer, clock: FakeClock
) -> None:
    """Each call asks another key: a late answer to an earlier question would show."""
    keys = [b"key %d" % i for i in range(40)]
    with (
        book(6, "jitter", injected="answers 50 to 300 ms late, seeded", expected="hit in time, else timeout") as row,
        FaultProxy(redis_server.port, seed=6) as proxy,
        RedisStore(proxy.url, clock=clock) as store,
    ):
        calm(store)
        fill(store, keys)
        store._deadline_s = D
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


# --- 7: cut off ----------------------------------------------------------------------------------
@pytest.mark.redis
@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
def test_an_answer_cut_off_at_any_byte(book: Book, proxy: FaultProxy, reset: bool) -> None:
    """Cut in the first block's answer, and in the second's: the first is served then."""
    end = "RST" if reset else "FIN"
    boundaries = [*range(HEAD + 129), HEAD + 200, HEAD + 1000, REPLY - 3, REPLY - 2, REPLY - 1]
    cuts = [*boundaries, *(REPLY + at for at in boundaries[::4]), 4 * REPLY - 1]
    with (
        book(
            7,
            f"{end} mid-value",
            injected=f"{end} at each byte of the reply header and the record header, at some of the payload",
            expected="conn for what did not arrive whole; blocks before it are served",
        ) as row,
        cache_over(RedisStore(proxy.url, deadline_s=PATIENT_S)) as cache,
    ):
        assert cache.save(TOKENS, KV) == BLOCKS
        fault, missed = Fault(row, PATIENT_S), 0
        for i, cut in enumerate(cuts):
            heal_breakers(cache)  # each cut as if it were the first
            if i % 10 == 0:  # and in between, the call after a cut works
                assert load_all(cache) == BLOCKS
            proxy.truncate(cut, reset)
            assert fault(functools.partial(load_all, cache)) == cut // REPLY
            missed += BLOCKS - cut // REPLY
            assert cache.store.stats().misses == Counter(conn=missed)
        assert proxy.fired["truncate"] == cache.store.stats().faults["conn"] == len(cuts)
        row.seen = {"cuts": len(cuts), **cache.store.stats().misses}
        assert load_all(cache) == BLOCKS
        check_works_again(cache)


@pytest.mark.redis
@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
def test_an_answer_cut_off_behind_the_values(book: Book, proxy: FaultProxy, reset: bool) -> None:
    """With a TTL each GET has its PEXPIRE: values that came whole are hits although its answer is missing."""
    end = "RST" if reset else "FIN"
    with (
        book(7, f"{end} after the values", injected=f"{end} in the answers to PEXPIRE", expected="hits; conn") as row,
        RedisStore(proxy.url, ttl_s=100, deadline_s=PATIENT_S) as store,
    ):
        fill(store, [b"a", b"b"])
        fault = Fault(row, PATIENT_S)
        cuts = range(2 * len(bulk(bytes(1000))), 2 * len(bulk(bytes(1000))) + 8)
        for cut in cuts:
            assert ask(store, [b"a", b"b"]) == [True, True]  # the call after a fault works
            proxy.truncate(cut, reset)
            assert fault(lambda: ask(store, [b"a", b"b"])) == [True, True]
        row.seen = dict(store.stats().faults)
        assert row.seen == {"conn": len(cuts)} == {"conn": proxy.fired["truncate"]}
        assert ask(store, [b"a", b"b"]) == [True, True]
        assert store.stats().faults == Counter(row.seen)


# --- 15, 16: gone between two looks --------------------------------------------------------------
@contextlib.contextmanager
def monitored(server: RedisServer) -> Iterator[list[tuple[bytes, bytes]]]:
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


@pytest.mark.redis
@pytest.mark.parametrize("ttl_s", [None, 100])
def test_a_load_trusts_no_earlier_look(book: Book, redis_server: RedisServer, ttl_s: float | None) -> None:
    with (
        book(
            15,
            f"evicted between EXISTS and GET, TTL {ttl_s}",
            injected="keys deleted after match said that they are there; MONITOR",
            expected="no EXISTS before a GET in a load; misses: absent",
        ) as row,
        cache_over(RedisStore(redis_server.url, ttl_s=ttl_s, deadline_s=PATIENT_S)) as cache,
    ):
        assert cache.save(TOKENS, KV) == BLOCKS
        with monitored(redis_server) as commands:
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
            15,
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


@pytest.mark.redis
def test_a_value_that_expires_is_whole_or_missed(book: Book, redis_server: RedisServer) -> None:
    rng, size = random.Random(16), 100_000
    with (
        book(16, "TTL race", injected="TTL of 3 ms, reads 0 to 6 ms later", expected="whole, or a miss: absent") as row,
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


@pytest.mark.redis
@pytest.mark.parametrize("how", ["get", "touch", "put"])
def test_a_use_renews_the_lifetime(book: Book, redis_server: RedisServer, how: str) -> None:
    client = redis_server.client()
    with (
        book(16, f"TTL refresh by {how}", injected="a second left, then none", expected="renewed; then absent") as row,
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


# --- 26: refused ---------------------------------------------------------------------------------
def four_calls(store: Store) -> list[object]:
    return [ask(store, [b"k"]), store.put_many([b"k"], [value_of(b"k")]), store.probe([b"k"]), ask(store, [b"k"])]


NOTHING = [[False], 0, 0, [False]]


def test_a_wrong_password_is_tried_once_a_call(book: Book, clock: FakeClock) -> None:
    tiny = Tiny(b"right")
    with (
        book(
            26,
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


@pytest.mark.redis
@pytest.mark.parametrize("login", [":wrong@", "worker:wrong@", "nobody:pw@", ""], ids=["", "user", "nobody", "none"])
def test_a_wrong_login_as_the_server_sees_it(book: Book, clock: FakeClock, login: str) -> None:
    with (
        book(
            26,
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


@pytest.mark.redis
@pytest.mark.parametrize("right", ["get", "set", "info", "exists", "pexpire", "del"])
def test_a_missing_right_is_asked_for_once_a_call(
    book: Book, own_server: RedisServer, clock: FakeClock, right: str
) -> None:
    """What needs the right fails, and says so; what does not need it works."""
    client = own_server.client()
    rights = [f"+{name}" for name in ("get", "set", "del", "exists", "pexpire", "info") if name != right]
    client.execute_command("ACL", "SETUSER", "worker", "reset", "on", ">pw", "~kv:*", "resetchannels", *rights)
    url, ttl_s = f"redis://worker:pw@127.0.0.1:{own_server.port}", 100 if right == "pexpire" else None
    reads = right not in ("get", "pexpire")
    with (
        book(26, f"no right to {right.upper()}", injected=f"ACL without +{right}", expected="auth, no retry") as row,
        RedisStore(own_server.url, ttl_s=100, deadline_s=PATIENT_S) as other,
        RedisStore(url, ttl_s=ttl_s, deadline_s=PATIENT_S, clock=clock) as store,
    ):
        fill(other, [b"k"])
        fault = Fault(row, PATIENT_S)
        refused = lambda: calls_of(client, right)["rejected_calls"]  # noqa: E731
        assert fault(lambda: ask(store, [b"k"])) == [reads]
        stored = fault(lambda: store.put_many([b"new"], [value_of(b"new")]))
        assert stored == (right not in ("set", "info"))
        there = fault(lambda: store.probe([b"k"]))
        assert there == (right != "exists")
        assert fault(lambda: store.touch_many([b"k"])) == [right not in ("exists", "pexpire")]
        assert fault(lambda: store.delete_many([b"none"])) == 0
        uses = {"get": 1, "set": 1, "info": 1, "exists": 2, "pexpire": 2, "del": 1}
        assert refused() == store.stats().faults["auth"] == uses[right]
        stats = store.stats()
        assert stats.misses == (Counter() if reads else Counter(auth=1))
        assert stats.drops == (Counter(auth=1) if right in ("set", "info") else Counter())
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


@pytest.mark.redis
@pytest.mark.parametrize("how", ["user deleted", "password changed and connections killed"])
def test_a_password_changed_at_run_time(book: Book, own_server: RedisServer, clock: FakeClock, how: str) -> None:
    client = own_server.client()
    acl = functools.partial(client.execute_command, "ACL")
    acl("SETUSER", "worker", "reset", "on", ">old", "~kv:*", "+@all")
    url = f"redis://worker:old@127.0.0.1:{own_server.port}"
    with (
        book(26, how, injected="ACL DELUSER / SETUSER and CLIENT KILL", expected="auth, no retry; then breaker") as row,
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


def test_asking_for_health_does_not_close_the_breaker_on_a_wrong_password(book: Book, clock: FakeClock) -> None:
    """A monitor that asks every second must not make every worker try its password again."""
    with (
        book(26, "wrong password, watched", injected="health() while the breaker is open", expected="open") as row,
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


# --- 27: no connection to be had -----------------------------------------------------------------
@pytest.mark.redis
@pytest.mark.parametrize("login", [False, True], ids=["", "with AUTH"])
def test_a_server_with_too_many_clients(book: Book, clock: FakeClock, login: bool) -> None:
    options = ("--requirepass", "pw") if login else ()
    with (
        book(
            27,
            "maxclients" + " with AUTH" * login,
            injected="--maxclients 5, all taken",
            expected="conn, then breaker; who is connected works on",
        ) as row,
        RedisServer("--maxclients", "5", *options) as server,
        contextlib.ExitStack() as others,
    ):
        url = f"redis://{':pw@' if login else ''}127.0.0.1:{server.port}"
        early = others.enter_context(RedisStore(url, deadline_s=PATIENT_S))
        late = others.enter_context(RedisStore(url, deadline_s=PATIENT_S, clock=clock))
        wait_for(lambda: early.put_many([b"k"], [value_of(b"k")]) == 1)  # the harness lets go of its own connection
        taken = [others.enter_context(server.client(password="pw" if login else None)) for _ in range(4)]
        for client in taken:
            assert client.ping()
        fault = Fault(row, PATIENT_S)
        for _ in range(5):
            assert fault(lambda: ask(late, [b"k"])) == [False]
            assert ask(early, [b"k"]) == [True]
        seen = late.stats().misses
        assert seen["conn"] == 3 and seen["breaker"] == 2
        assert late.put_many([b"k"], [b"x"]) == 0 and late.stats().drops == Counter(breaker=1)
        row.seen = dict(late.stats().misses)
        taken[0].close()
        taken[1].close()
        wait_for(lambda: taken[2].info("clients")["connected_clients"] == 3)
        clock.cool_down()
        assert ask(late, [b"k"]) == [True]


def test_a_server_that_says_at_once_that_it_is_full(book: Book) -> None:
    """Redis does not wait for a command before it says so; the error may come before the first GET or after."""
    done = threading.Event()

    def refuse(listener: socket.socket) -> None:
        while not done.is_set():
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                connection.sendall(b"-ERR max number of clients reached\r\n")

    with (
        book(27, "maxclients, said at once", injected="the error before any command", expected="conn") as row,
        socket.create_server(("127.0.0.1", 0)) as listener,
        RedisStore(f"redis://127.0.0.1:{listener.getsockname()[1]}", deadline_s=PATIENT_S, clock=FakeClock()) as store,
    ):
        thread = threading.Thread(target=refuse, args=(listener,))
        thread.start()
        fault, connect = Fault(row, PATIENT_S), socket.socket.connect

        def connect_and_wait(self: socket.socket, address: object) -> None:
            connect(self, address)
            time.sleep(0.05)  # it has spoken by then

        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(socket.socket, "connect", connect_and_wait, raising=False)
                for _ in range(3):
                    assert fault(lambda: ask(store, [b"k"])) == [False]
        finally:
            done.set()
            with contextlib.suppress(OSError), socket.create_connection(listener.getsockname()):
                thread.join()
        row.seen = dict(store.stats().misses)
        assert row.seen == {"conn": 3}


def test_a_pool_that_is_all_in_use_says_nothing_about_the_server(book: Book, clock: FakeClock) -> None:
    tiny, go = Tiny(), threading.Event()

    def slowly(command: list[bytes]) -> bytes:
        if command[1] == b"kv:slow":
            go.wait(PATIENT_S)
        return tiny.good(command)

    tiny.bad[b"GET"] = slowly
    with (
        book(
            27, "pool of one", injected="a slow answer holds the only connection", expected="pool; stays closed"
        ) as row,
        Scripted(tiny) as server,
        RedisStore(server.url, deadline_s=PATIENT_S, max_connections=1, clock=clock) as store,
    ):
        fill(store, [b"slow", b"k"])
        heard: list[bool] = []
        holder = threading.Thread(target=lambda: heard.extend(ask(store, [b"slow"])))
        holder.start()
        wait_for(lambda: server.commands[-1] == [b"GET", b"kv:slow"])
        count, store._deadline_s = len(server.commands), D
        fault = Fault(row, D)
        others = [threading.Thread(target=lambda: fault(lambda: ask(store, [b"k"]))) for _ in range(6)]
        for thread in others:
            thread.start()
        for thread in others:
            thread.join()
        assert fault(lambda: store.put_many([b"k"], [value_of(b"k")])) == fault(lambda: store.probe([b"k"])) == 0
        stats = store.stats()
        assert (stats.misses, stats.drops) == (Counter(pool=6), Counter(pool=1))
        assert stats.faults == Counter(pool=8) and breakers(store) == ("closed", "closed")
        assert len(server.commands) == count
        row.seen = dict(stats.faults)
        calm(store)
        go.set()
        holder.join()
        assert heard == [True], "whoever had the connection was served"
        assert ask(store, [b"k"]) == [True]


def test_an_interrupt_while_waiting_for_a_connection_does_not_lose_it(book: Book) -> None:
    """The handler runs while this thread waits, and the connection is handed to it meanwhile."""
    tiny, go = Tiny(), threading.Event()

    def slowly(command: list[bytes]) -> bytes:
        go.wait(PATIENT_S)
        return tiny.good(command)

    with (
        book(27, "interrupt in the queue of the pool", injected="SIGALRM; pool of one", expected="works on") as row,
        Scripted(tiny) as server,
        RedisStore(server.url, deadline_s=PATIENT_S, max_connections=1) as store,
    ):
        fill(store, [b"k"])
        tiny.bad[b"GET"] = slowly
        heard: list[bool] = []
        holder = threading.Thread(target=lambda: heard.extend(ask(store, [b"k"])))
        holder.start()
        wait_for(lambda: server.commands[-1][0] == b"GET")

        def ring(*_: object) -> None:
            go.set()
            holder.join()  # its connection is handed on now
            raise Interrupt

        old = signal.signal(signal.SIGALRM, ring)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(Interrupt):
                store.get_many([b"k"])
        finally:
            signal.signal(signal.SIGALRM, old)
        assert heard == [True]
        store._deadline_s, fault = 4 * D, Fault(row, 4 * D)
        assert fault(lambda: ask(store, [b"k"])) == [True], store.stats().misses
        row.seen = {"hits": store.stats().hits}


# --- 28: answers that are none -------------------------------------------------------------------
NOISE = random.Random(28).randbytes(8192).replace(b"\r\n", b"??")
MALFORMED: dict[str, tuple[bytes, bytes, str]] = {
    "a number for GET": (b"GET", b":5\r\n", "protocol"),
    "+OK for GET": (b"GET", b"+OK\r\n", "protocol"),
    "nested arrays": (b"GET", b"*1\r\n" * 100_000, "protocol"),
    "wide array": (b"GET", b"*1000000000\r\n", "protocol"),
    "null array": (b"GET", b"*-1\r\n", "protocol"),
    "10 GB announced": (b"GET", b"$10737418240\r\nabc", "too_big"),
    "an exabyte announced": (b"GET", b"$9999999999999999999999\r\nabc", "protocol"),
    "length -5": (b"GET", b"$-5\r\n", "protocol"),
    "length abc": (b"GET", b"$abc\r\n", "protocol"),
    "length +5": (b"GET", b"$+5\r\nabcde\r\n", "protocol"),
    "length with a space": (b"GET", b"$ 5\r\nabcde\r\n", "protocol"),
    "no length": (b"GET", b"$\r\n", "protocol"),
    "no line end after the value": (b"GET", b"$5\r\nabcde", "protocol"),
    "other bytes for the line end": (b"GET", b"$5\r\nabcdeXY\r\n", "protocol"),
    "longer than announced": (b"GET", b"$3\r\nabcdef\r\n", "protocol"),
    "shorter than announced": (b"GET", b"$10000\r\nabc\r\n", "timeout"),
    "error for each": (b"GET", b"-ERR boom\r\n", "response"),
    "error that is no text": (b"GET", b"-\xff\xfe\x00\r\n", "response"),
    "empty error": (b"GET", b"-\r\n", "response"),
    "endless error": (b"GET", b"-" + b"e" * 10_000, "protocol"),
    "RESP3 null": (b"GET", b"_\r\n", "protocol"),
    "RESP3 map": (b"GET", b"%1\r\n+a\r\n:1\r\n", "protocol"),
    "RESP3 set": (b"GET", b"~1\r\n+a\r\n", "protocol"),
    "RESP3 double": (b"GET", b",1.5\r\n", "protocol"),
    "RESP3 boolean": (b"GET", b"#t\r\n", "protocol"),
    "RESP3 verbatim": (b"GET", b"=7\r\ntxt:abc\r\n", "protocol"),
    "RESP3 blob error": (b"GET", b"!5\r\nERR x\r\n", "protocol"),
    "RESP3 push": (b"GET", b">2\r\n+invalidate\r\n$1\r\na\r\n", "protocol"),
    "RESP3 big number": (b"GET", b"(12345678901234567890\r\n", "protocol"),
    "RESP3 streamed string": (b"GET", b"$?\r\n;3\r\nabc\r\n;0\r\n", "protocol"),
    "empty line": (b"GET", b"\r\n", "protocol"),
    "line feeds alone": (b"GET", b"$3\nabc\n", "timeout"),
    "endless line": (b"GET", b"$" + b"1" * 10_000, "protocol"),
    "binary noise": (b"GET", NOISE, "protocol"),
    "zeros": (b"GET", bytes(5000), "protocol"),
    "HTTP": (b"GET", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", "protocol"),
    "SSH": (b"GET", b"SSH-2.0-OpenSSH_9.2\r\n", "protocol"),
    "TLS alert": (b"GET", b"\x15\x03\x01\x00\x02\x02\x46", "timeout"),
    ":1 for SET": (b"SET", b":1\r\n", "protocol"),
    "+QUEUED for SET": (b"SET", b"+QUEUED\r\n", "protocol"),
    "null for SET": (b"SET", b"$-1\r\n", "protocol"),
    "a value for SET": (b"SET", b"$2\r\nOK\r\n", "protocol"),
    "null for INFO": (b"INFO", b"$-1\r\n", "protocol"),
    "nonsense for INFO": (b"INFO", b"$3\r\nabc\r\n", "protocol"),
    "+OK for EXISTS": (b"EXISTS", b"+OK\r\n", "protocol"),
    "-1 for EXISTS": (b"EXISTS", b":-1\r\n", "protocol"),
    "too long for a number": (b"EXISTS", b":" + b"1" * 30 + b"\r\n", "protocol"),
    "HTTP for AUTH": (b"AUTH", b"HTTP/1.1 400 Bad Request\r\n\r\n", "protocol"),
    "a number for AUTH": (b"AUTH", b":1\r\n", "auth"),
    "nested arrays for AUTH": (b"AUTH", b"*1\r\n" * 100_000, "protocol"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_an_answer_that_is_none(book: Book, clock: FakeClock, name: str) -> None:
    command, answer, reason = MALFORMED[name]
    tiny, deadline_s = Tiny(b"pw"), D if reason == "timeout" else PATIENT_S
    with (
        book(
            28, f"malformed: {name}", injected=f"{command.decode()} is answered {answer[:30]!r}", expected=reason
        ) as row,
        Scripted(tiny) as server,
        FaultProxy(server.port) as proxy,
        RedisStore(f"redis://:pw@127.0.0.1:{proxy.port}", deadline_s=deadline_s, clock=clock) as store,
        cache_over(store) as cache,
    ):
        if command in (b"GET", b"EXISTS"):
            calm(store)
            assert cache.save(TOKENS, KV) == BLOCKS
            store._deadline_s = deadline_s
        tiny.bad[command] = answer
        fault, before, accepted = Fault(row, deadline_s), store.stats(), proxy.accepted
        if command == b"EXISTS":
            assert fault(lambda: cache.match(TOKENS)) == 0
        elif command in (b"SET", b"INFO"):
            assert fault(lambda: store.put_many(KEYS, RECORDS)) == 0
            assert store.stats().drops == Counter({reason: BLOCKS})
        else:
            assert fault(lambda: load_all(cache)) == 0
            assert store.stats().misses - before.misses == Counter({reason: BLOCKS})
        store.stats().check()
        if command in (b"EXISTS", b"AUTH"):
            assert (store.stats().faults - before.faults) == Counter({reason: 1})
        row.seen = {reason: 1}
        tiny.bad.clear()
        calm(store)
        if command == b"GET":
            assert load_all(cache) == BLOCKS
            assert reason == "response" or proxy.accepted > accepted, "the connection was used again"
        assert cache.save(OTHER_TOKENS, OTHER_KV) == BLOCKS
        assert load_some(cache, OTHER_TOKENS, OTHER_KV) == BLOCKS


def test_a_length_that_is_a_lie_costs_no_memory(book: Book) -> None:
    tiny = Tiny()
    tiny.bad[b"GET"] = b"$10737418240\r\nabc"
    with (
        book(28, "malformed: memory for 10 GB", injected="$10737418240", expected="too_big; nothing allocated") as row,
        Scripted(tiny) as server,
        RedisStore(server.url, deadline_s=PATIENT_S) as store,
    ):
        fill(store, [b"k"])
        tracemalloc.start()
        try:
            fault = Fault(row, PATIENT_S)
            assert fault(lambda: ask(store, [b"k"])) == [False]
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 4 * MIB
        row.seen = {"peak MiB": round(peak / MIB, 1), **store.stats().misses}
        assert store.stats().misses == Counter(too_big=1)
        tiny.bad.clear()
        assert ask(store, [b"k"]) == [True]


@pytest.mark.parametrize("extra", [b"$3\r\nbad\r\n", b"$-1\r\n", b":1\r\n", b"+OK\r\n", b"-ERR late\r\n"])
def test_one_answer_too_many(book: Book, clock: FakeClock, extra: bytes) -> None:
    """After the answer to each GET: the values that follow are not where they belong."""
    tiny = Tiny()
    tiny.bad[b"GET"] = lambda command: tiny.good(command) + extra
    with (
        book(
            28, f"malformed: {extra!r} too many", injected="after each answer", expected="1 hit, the rest miss"
        ) as row,
        Scripted(tiny) as server,
        FaultProxy(server.port) as proxy,
        cache_over(RedisStore(proxy.url, deadline_s=PATIENT_S, clock=clock)) as cache,
    ):
        prompt(proxy)
        assert cache.save(TOKENS, KV) == BLOCKS
        accepted, before, fault = proxy.accepted, proxy.bytes_down, Fault(row, PATIENT_S)
        assert fault(lambda: load_all(cache)) == 1
        row.seen = dict(cache.stats().misses)
        assert cache.stats().misses["gap"] == BLOCKS - 2 and cache.stats().misses.total() == BLOCKS - 1
        all_arrived(proxy, before, BLOCKS * (REPLY + len(extra)))
        tiny.bad.clear()
        clock.cool_down()
        assert load_all(cache) == BLOCKS, (cache.stats(), proxy.accepted - accepted, proxy.open_connections)
        assert proxy.accepted == accepted + 1
        check_works_again(cache)


# --- 29: out of step -----------------------------------------------------------------------------
@pytest.mark.redis
@pytest.mark.parametrize(
    ("what", "k"), [*(("double", k) for k in range(BLOCKS)), *(("swap", k) for k in range(BLOCKS - 1))]
)
def test_answers_that_do_not_belong_to_their_questions(book: Book, proxy: FaultProxy, what: str, k: int) -> None:
    """Only the key in the record tells that: in the middle of a batch the bare store cannot."""
    with (
        book(
            29,
            f"{what} of reply {k} of {BLOCKS}",
            injected=f"the proxy {what}s an answer of a load",
            expected="the record's key tells: miss, reason key; the load after it is whole",
        ) as row,
        cache_over(RedisStore(proxy.url, deadline_s=PATIENT_S)) as cache,
    ):
        assert cache.save(TOKENS, KV) == BLOCKS
        accepted, before, fault = proxy.accepted, proxy.bytes_down, Fault(row, PATIENT_S)
        getattr(proxy, what)(k)
        good = k + 1 if what == "double" else k
        assert fault(lambda: load_all(cache)) == good
        assert proxy.fired == Counter({what: 1})
        assert cache.stats().misses == Counter(key=int(good < BLOCKS), gap=max(0, BLOCKS - good - 1))
        all_arrived(proxy, before, (BLOCKS + (what == "double")) * REPLY)
        assert fault(lambda: load_all(cache)) == BLOCKS
        assert proxy.accepted - accepted == (what == "double"), "an answer is left over: not to be used again"
        row.seen = {**cache.stats().misses, "new connections": proxy.accepted - accepted}
        check_works_again(cache)


@pytest.mark.redis
def test_a_doubled_answer_is_never_the_answer_to_the_next_call(book: Book, proxy: FaultProxy) -> None:
    keys = [b"key %d" % i for i in range(20)]
    with (
        book(
            29, "doubled reply, bare store", injected="each answer twice", expected="a new connection each time"
        ) as row,
        RedisStore(proxy.url, deadline_s=PATIENT_S, max_connections=1) as store,
    ):
        fill(store, keys)
        proxy.reset_counts()
        fault = Fault(row, PATIENT_S)
        for key in keys:
            proxy.double()
            before = proxy.bytes_down
            assert fault(functools.partial(ask, store, [key])) == [True]
            all_arrived(proxy, before, 2 * len(bulk(bytes(1000))))
        assert ask(store, [b"key 0"]) == [True]
        assert proxy.accepted == proxy.fired["double"] == len(keys)
        row.seen = {"hits": store.stats().hits, "new connections": proxy.accepted}


def test_an_extra_answer_that_comes_after_the_next_question(book: Book, clock: FakeClock) -> None:
    """Nothing on the wire tells the two apart: only the key inside the record does."""
    tiny, first = Tiny(), b"kv:" + KEYS[0]

    def late(command: list[bytes]) -> bytes:
        return tiny.good(command) if command[1] == first else bulk(tiny.values[first]) + tiny.good(command)

    with (
        book(29, "late extra reply", injected="the last answer again, before the next", expected="miss: key") as row,
        Scripted(tiny) as server,
        FaultProxy(server.port) as proxy,
        cache_over(RedisStore(proxy.url, deadline_s=PATIENT_S, clock=clock)) as cache,
    ):
        prompt(proxy)
        for tokens, kv in ((TOKENS, KV), (OTHER_TOKENS, OTHER_KV)):
            assert cache.save(tokens[:B], kv[:, :, :, :B]) == 1
        accepted, before, fault = proxy.accepted, proxy.bytes_down, Fault(row, PATIENT_S)
        tiny.bad[b"GET"] = late
        assert fault(lambda: load_some(cache, TOKENS[:B], KV)) == 1
        assert fault(lambda: load_some(cache, OTHER_TOKENS[:B], OTHER_KV)) == 0
        assert cache.stats().misses == Counter(key=1)
        row.seen = dict(cache.stats().misses)
        tiny.bad.clear()
        all_arrived(proxy, before, 3 * REPLY)
        assert load_some(cache, OTHER_TOKENS[:B], OTHER_KV) == load_some(cache, TOKENS[:B], KV) == 1
        assert proxy.accepted == accepted + 1
        check_works_again(cache)


class Interrupt(BaseException):
    """What KeyboardInterrupt is, without ending the test run."""


class Alarm(Exception):
    """A handler's exception that `except Exception` catches."""


@contextlib.contextmanager
def alarm(kind: type[BaseException], after_s: float = 0.05) -> Iterator[None]:
    """The main thread is in the middle of something when this is raised."""

    def ring(*_: object) -> None:
        raise kind

    old = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, after_s)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@pytest.mark.redis
@pytest.mark.parametrize("passed", [0, 3, 200], ids=["before the answer", "in its header", "in the value"])
@pytest.mark.parametrize("kind", [Interrupt, Alarm])
def test_an_alarm_in_the_middle_of_a_get(book: Book, proxy: FaultProxy, kind: type[BaseException], passed: int) -> None:
    """The answer comes later; it must not be taken for the next one."""
    with (
        book(
            29,
            f"SIGALRM raises {kind.__name__} {passed} bytes into an answer",
            injected="signal handler raises during GET; pool of one",
            expected="the connection is closed; the next key gets its own value",
        ) as row,
        RedisStore(proxy.url, deadline_s=PATIENT_S, max_connections=1) as store,
    ):
        fill(store, [b"a", b"b"])
        before, accepted, fault = store.stats(), proxy.accepted, Fault(row, PATIENT_S)
        proxy.after(passed, lambda: setattr(proxy, "hold", True)) if passed else setattr(proxy, "hold", True)
        with alarm(kind):
            if kind is Interrupt:
                with pytest.raises(Interrupt):  # its own, not the store's
                    store.get_many([b"a"])
            else:
                assert fault(lambda: ask(store, [b"a"])) == [False]
        proxy.hold = False
        stats = store.stats()
        assert stats.misses == (Counter() if kind is Interrupt else Counter(error=1)) == stats.faults
        for _ in range(3):
            assert fault(lambda: ask(store, [b"b", b"a"])) == [True, True]
        stats = store.stats()
        assert stats.hits - before.hits == 6 and proxy.accepted == accepted + 1
        row.seen = {"hits after": 6, "new connections": 1, **stats.misses}


@pytest.mark.redis
@pytest.mark.parametrize(
    ("which", "call"),
    [
        ("link", "get"),
        ("link", "put"),
        pytest.param(
            *("writes", "put"),
        ),
    ],
)
def test_an_interrupt_while_a_breaker_tries_does_not_leave_it_half_open(
    book: Book, own_server: RedisServer, clock: FakeClock, which: str, call: str
) -> None:
    """The call that tries after the cool-down is interrupted: another may try then."""
    client = own_server.client()
    with (
        book(
            29, f"interrupt in a {call} that tries, {which}", injected="SIGALRM", expected="the next one tries"
        ) as row,
        FaultProxy(own_server.port) as proxy,
        RedisStore(proxy.url, deadline_s=PATIENT_S, clock=clock) as store,
    ):
        fill(store, [b"k"])
        fault = Fault(row, PATIENT_S)
        if which == "link":
            proxy.refuse = True
            proxy.drop()
        else:
            client.config_set("maxmemory", 1)
        for _ in range(4):
            assert fault(lambda: store.put_many([b"k"], [value_of(b"k")])) == 0
        assert breakers(store) == (("open", "closed") if which == "link" else ("closed", "open"))
        assert store.stats().drops == Counter({"conn" if which == "link" else "oom": 3, "breaker": 1})
        proxy.refuse = False
        client.config_set("maxmemory", 0)
        clock.cool_down()
        proxy.hold = True
        with alarm(Interrupt), pytest.raises(Interrupt):
            store.get_many([b"k"]) if call == "get" else store.put_many([b"k"], [value_of(b"k")])
        proxy.hold = False
        row.seen = dict(store.stats().drops)
        clock.cool_down()
        fill(store, [b"k"])
        assert ask(store, [b"k"]) == [True] and breakers(store) == ("closed", "closed")


@pytest.mark.redis
def test_a_thread_interrupted_in_the_middle_of_a_value(book: Book, proxy: FaultProxy) -> None:
    size = 20_000
    with (
        book(
            29,
            "thread interrupted in a value",
            injected="PyThreadState_SetAsyncExc while a value trickles in; pool of one",
            expected="the connection is closed; the next key gets its own value",
        ) as row,
        RedisStore(proxy.url, deadline_s=PATIENT_S, max_connections=1) as store,
    ):
        fill(store, [b"a", b"b"], size)
        ended: list[str] = []

        def get() -> None:
            try:
                store.get_many([b"a"])
            except Interrupt:
                ended.append("interrupted")
            else:
                ended.append("whole")

        proxy.reset_counts()
        proxy.slices = (100, 0.01)
        thread = threading.Thread(target=get)
        thread.start()
        wait_for(lambda: proxy.bytes_down > 300)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Interrupt))
        thread.join(PATIENT_S)
        assert ended == ["interrupted"] and proxy.bytes_down < size
        proxy.heal()
        fault = Fault(row, PATIENT_S)
        for _ in range(3):
            assert fault(lambda: ask(store, [b"b", b"a"], size)) == [True, True]
        assert store.stats().hits == 6 and proxy.accepted == 1
        row.seen = {"hits after": 6, "new connections": proxy.accepted}


# --- 33: fork ------------------------------------------------------------------------------------
def in_child(work: Callable[[], object], meanwhile: Callable[[], object] = int) -> object:
    """What `work` returns in a forked child, as JSON; `meanwhile` runs here."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writer, json.dumps(work()).encode())
            code = 0
        except BaseException as error:
            os.write(writer, json.dumps(repr(error)).encode())
        finally:
            os._exit(code)
    os.close(writer)
    killer = threading.Timer(PATIENT_S, os.kill, (child, signal.SIGKILL))
    killer.start()
    try:
        meanwhile()
        with os.fdopen(reader, "rb") as answer:
            said = answer.read()
        assert os.waitpid(child, 0)[1] == 0, said
    finally:
        killer.cancel()
    return json.loads(said)


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@forks
@pytest.mark.redis
@pytest.mark.parametrize("connections", [1, 4])
def test_parent_and_child_of_a_fork_do_not_share_a_connection(
    book: Book, redis_server: RedisServer, connections: int
) -> None:
    mine, theirs = [b"parent %d" % i for i in range(10)], [b"child %d" % i for i in range(10)]
    client = redis_server.client()
    with (
        book(
            33,
            f"fork after connect, pool of {connections}",
            injected="os.fork between two calls; both read at once",
            expected="each reads its own keys, over a connection of its own",
        ) as row,
        RedisStore(redis_server.url, deadline_s=PATIENT_S, max_connections=connections) as store,
    ):
        fill(store, mine + theirs, 20_000)
        received = client.info("stats")["total_connections_received"]

        def read(keys: list[bytes]) -> list[int]:
            before = store.stats().hits
            for _ in range(100):
                assert ask(store, keys, 20_000) == [True] * len(keys)
            return [store.stats().hits - before, store.stats().misses.total()]

        fault = Fault(row, PATIENT_S)
        said: list[object] = []
        fault(lambda: said.append(in_child(lambda: read(theirs), lambda: said.append(read(mine)))))
        assert said == [[1000, 0], [1000, 0]]
        assert client.info("stats")["total_connections_received"] == received + 1, "the child's own"
        assert ask(store, mine, 20_000) == [True] * 10, "the child's end did not touch the parent's connection"
        assert client.info("stats")["total_connections_received"] == received + 1
        row.seen = {"hits": 2000, "misses": 0, "new connections": 1}


@forks
@pytest.mark.redis
def test_a_fork_while_other_threads_are_in_the_middle_of_calls(book: Book, own_server: RedisServer) -> None:
    """The child has none of the threads that hold the parent's connections."""
    with (
        book(33, "fork in the middle of calls", injected="a pool of 2, both in use", expected="both work") as row,
        FaultProxy(own_server.port) as proxy,
        RedisStore(proxy.url, deadline_s=PATIENT_S, max_connections=2) as store,
    ):
        fill(store, [b"a", b"b"])
        heard: list[bool] = []
        proxy.hold = True
        threads = [threading.Thread(target=lambda: heard.extend(ask(store, [b"a"]))) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: proxy.open_connections == 2 and own_server.client().info("stats")["keyspace_hits"] >= 2)

        def go_on() -> None:
            wait_for(lambda: proxy.open_connections == 3)  # the child's own
            proxy.hold = False

        fault = Fault(row, PATIENT_S)
        assert fault(lambda: in_child(lambda: ask(store, [b"b", b"a"]), go_on)) == [True, True]
        for thread in threads:
            thread.join()
        assert heard == [True, True] and ask(store, [b"b", b"a"]) == [True, True]
        assert proxy.accepted == 3
        row.seen = {"hits in the child": 2, "hits in the parent": store.stats().hits}


@forks
@pytest.mark.redis
def test_a_fork_with_an_open_breaker_starts_closed_in_the_child(
    book: Book, own_server: RedisServer, clock: FakeClock
) -> None:
    with (
        book(
            33, "fork with an open breaker", injected="os.fork while open", expected="child tries, parent waits"
        ) as row,
        RedisStore(own_server.url, clock=clock) as store,
    ):
        own_server.kill()
        fault = Fault(row, D)
        for _ in range(4):
            assert fault(lambda: ask(store, [b"k"])) == [False]
        assert store.stats().misses == Counter(conn=3, breaker=1)
        own_server.start()
        calm(store)
        assert in_child(lambda: [store.put_many([b"k"], [value_of(b"k")]), *ask(store, [b"k"])]) == [1, True]
        assert fault(lambda: ask(store, [b"k"])) == [False]
        assert store.stats().misses == Counter(conn=3, breaker=2)
        row.seen = dict(store.stats().misses)
        clock.cool_down()
        assert ask(store, [b"k"]) == [True]


# --- 36: readers that do not read ----------------------------------------------------------------
LIMIT = 64 * MIB


@pytest.mark.redis
def test_readers_that_stall_do_not_stop_the_store(book: Book) -> None:
    """The server's limit on what waits for a client ends them; its memory stays bounded."""
    size, clients = 16 * MIB, 2
    with (
        book(
            36,
            "other clients stall",
            injected=f"{clients} raw clients ask for 32 x 16 MiB and read nothing; output limit 64 MiB",
            expected="the server drops them, its memory stays bounded, the store works on",
        ) as row,
        RedisServer("--client-output-buffer-limit", f"normal {LIMIT} 0 0") as server,
        cache_over(RedisStore(server.url, deadline_s=PATIENT_S)) as cache,
    ):
        client = server.client()
        client.set("big", bytes(size))
        assert cache.save(TOKENS, KV) == BLOCKS
        client.config_resetstat()
        base, fault, loads = client.info("memory")["used_memory"], Fault(row, PATIENT_S), 0
        peak = base
        for _ in range(clients):
            with socket.socket() as stalled:
                stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
                stalled.connect(("127.0.0.1", server.port))
                name = b"%s:%d" % (stalled.getsockname()[0].encode(), stalled.getsockname()[1])
                stalled.sendall(b"*2\r\n$3\r\nGET\r\n$3\r\nbig\r\n" * 32)
                for _ in range(5):
                    loads += fault(lambda: load_all(cache)) == BLOCKS
                wait_for(functools.partial(lambda who: who not in str(client.client_list()).encode(), name))
                peak = max(peak, client.info("memory")["used_memory_peak"])
        assert loads == 5 * clients and not cache.store.stats().faults
        assert peak - base <= clients * (LIMIT + 2 * size)
        row.seen = {"loads served": loads, "peak MiB": (peak - base) // MIB}
        check_works_again(cache)


@pytest.mark.redis
@pytest.mark.parametrize("buffers", [True, False], ids=["into buffers", "as bytes"])
def test_what_is_in_flight_for_a_store_that_is_not_reached_is_one_window(
    book: Book, own_server: RedisServer, buffers: bool
) -> None:
    """The proxy keeps the answers: what waits in the server is what the store asked for at once."""
    size, window = 2 * MIB, 16 * MIB
    keys = [b"key %d" % i for i in range(32)]
    with (
        book(
            36,
            f"answers held, values {'into buffers' if buffers else 'as bytes'}",
            injected="the proxy holds the answers to a read of 64 MiB",
            expected="at most 16 MiB wait in the server; then all 32 are hits",
        ) as row,
        FaultProxy(own_server.port) as proxy,
        RedisStore(proxy.url, deadline_s=PATIENT_S) as store,
    ):
        fill(store, keys, size)
        assert ask(store, keys[:1], size) == [True]  # it knows now what values are like
        client = own_server.client()
        base, waiting, peak = client.info("memory")["used_memory"], 0, 0
        out = [memoryview(bytearray(size)) for _ in keys] if buffers else None
        got: list[object] = []
        reader = threading.Thread(target=lambda: got.extend(store.get_many(keys, out)))
        fault = Fault(row, PATIENT_S)
        proxy.hold = True
        reader.start()
        wait_for(lambda: client.info("stats")["keyspace_hits"] > 1)
        for _ in range(10):
            time.sleep(0.02)
            peak = max(peak, client.info("memory")["used_memory"] - base)
            waiting = max(waiting, *(int(each["omem"]) for each in client.client_list()))
        proxy.hold = False
        fault(reader.join)
        assert MIB < waiting < window + size and peak < window + 2 * size
        assert [bytes(value) for value in got] == [value_of(key, size) for key in keys]  # type: ignore[call-overload]
        store.stats().check()
        assert store.stats().hits == 33 and not store.stats().faults
        row.seen = {"waiting MiB": round(waiting / MIB, 1), "peak MiB": round(peak / MIB, 1), "hits": 32}


@pytest.mark.redis
def test_a_limit_smaller_than_a_window_is_misses(book: Book, clock: FakeClock) -> None:
    """Whoever sets the limit below what a window holds loses windows, and nothing else."""
    keys = [b"key %d" % i for i in range(8)]
    with (
        book(36, "store over the output limit", injected="output limit 4 MiB, window 16 MiB", expected="conn") as row,
        RedisServer("--client-output-buffer-limit", f"normal {4 * MIB} 0 0") as server,
        FaultProxy(server.port) as proxy,
        RedisStore(proxy.url, deadline_s=PATIENT_S, clock=clock) as store,
    ):
        fill(store, keys, 2 * MIB)
        proxy.hold = True
        opener = threading.Timer(0.2, setattr, (proxy, "hold", False))
        opener.start()
        fault = Fault(row, PATIENT_S)
        hits = fault(lambda: ask(store, keys, 2 * MIB))
        opener.join()
        assert not all(hits) and hits == sorted(hits, reverse=True)
        assert store.stats().misses == Counter(conn=hits.count(False)) and store.stats().faults == Counter(conn=1)
        row.seen = {"hits": hits.count(True), **store.stats().misses}
        server.client().config_set("client-output-buffer-limit", "normal 0 0 0")
        assert ask(store, keys, 2 * MIB) == [True] * 8
