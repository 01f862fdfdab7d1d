"""Faults 7, 28 and 29: answers that are cut off, that are none, or that belong to another question."""

from __future__ import annotations

import functools
import random
import tracemalloc
from collections import Counter

import pytest

from kvlab.stores import RedisStore
from kvlab.testbed.proxy import FaultProxy
from tests.faults.book import Book
from tests.faults.calls import PATIENT_S, D, Fault, ask, calm, fill, load_some
from tests.faults.kit import (
    BLOCKS,
    HEAD,
    KEYS,
    KV,
    MIB,
    OTHER_KV,
    OTHER_TOKENS,
    RECORDS,
    REPLY,
    TOKENS,
    B,
    cache_over,
    check_works_again,
    heal_breakers,
    load_all,
)
from tests.faults.tiny import Scripted, Tiny, all_arrived, bulk, prompt
from tests.harness.helpers import FakeClock


@pytest.mark.fault(number=7)
@pytest.mark.redis
@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
def test_an_answer_cut_off_at_any_byte(book: Book, proxy: FaultProxy, reset: bool) -> None:
    """Cut in the first block's answer, and in the second's: the first is served then."""
    end = "RST" if reset else "FIN"
    boundaries = [*range(HEAD + 129), HEAD + 200, HEAD + 1000, REPLY - 3, REPLY - 2, REPLY - 1]
    cuts = [*boundaries, *(REPLY + at for at in boundaries[::4]), 4 * REPLY - 1]
    with (
        book(
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


@pytest.mark.fault(number=7)
@pytest.mark.redis
@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
def test_an_answer_cut_off_behind_the_values(book: Book, proxy: FaultProxy, reset: bool) -> None:
    """With a TTL each GET has its PEXPIRE: values that came whole are hits although its answer is missing."""
    end = "RST" if reset else "FIN"
    with (
        book(f"{end} after the values", injected=f"{end} in the answers to PEXPIRE", expected="hits; conn") as row,
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
    "+OK for EXISTS": (b"EXISTS", b"+OK\r\n", "protocol"),
    "-1 for EXISTS": (b"EXISTS", b":-1\r\n", "protocol"),
    "too long for a number": (b"EXISTS", b":" + b"1" * 30 + b"\r\n", "protocol"),
    "HTTP for AUTH": (b"AUTH", b"HTTP/1.1 400 Bad Request\r\n\r\n", "protocol"),
    "a number for AUTH": (b"AUTH", b":1\r\n", "auth"),
    "nested arrays for AUTH": (b"AUTH", b"*1\r\n" * 100_000, "protocol"),
}


@pytest.mark.fault(number=28)
@pytest.mark.parametrize("name", MALFORMED)
def test_an_answer_that_is_none(book: Book, clock: FakeClock, name: str) -> None:
    command, answer, reason = MALFORMED[name]
    tiny, deadline_s = Tiny(b"pw"), D if reason == "timeout" else PATIENT_S
    with (
        book(f"malformed: {name}", injected=f"{command.decode()} is answered {answer[:30]!r}", expected=reason) as row,
        Scripted(tiny) as server,
        FaultProxy(server.port) as proxy,
        RedisStore(f"redis://:pw@127.0.0.1:{proxy.port}", deadline_s=deadline_s, clock=clock) as store,
        cache_over(store) as cache,
    ):
        if command in (b"GET", b"EXISTS"):
            calm(store)
            assert cache.save(TOKENS, KV) == BLOCKS
            store.deadline_s = deadline_s
        tiny.bad[command] = answer
        fault, before, accepted = Fault(row, deadline_s), store.stats(), proxy.accepted
        if command == b"EXISTS":
            assert fault(lambda: cache.match(TOKENS)) == 0
        elif command == b"SET":
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


@pytest.mark.fault(number=28)
@pytest.mark.parametrize("name", ["null", "nonsense"])
def test_an_info_that_says_nothing_stops_no_write(book: Book, name: str) -> None:
    tiny, answer = Tiny(), {"null": b"$-1\r\n", "nonsense": b"$3\r\nabc\r\n"}[name]
    tiny.bad[b"INFO"] = answer
    with (
        book(
            f"malformed: {name} for INFO", injected=f"INFO is answered {answer!r}", expected="stored; no fault"
        ) as row,
        Scripted(tiny) as server,
        RedisStore(server.url, deadline_s=PATIENT_S) as store,
    ):
        assert Fault(row, PATIENT_S)(lambda: store.put_many(KEYS, RECORDS)) == BLOCKS
        assert not store.stats().faults and store.get_many(KEYS) == RECORDS
        row.seen = {"stored": BLOCKS}


@pytest.mark.fault(number=28)
def test_a_length_that_is_a_lie_costs_no_memory(book: Book) -> None:
    tiny = Tiny()
    tiny.bad[b"GET"] = b"$10737418240\r\nabc"
    with (
        book("malformed: memory for 10 GB", injected="$10737418240", expected="too_big; nothing allocated") as row,
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


@pytest.mark.fault(number=28)
@pytest.mark.parametrize("extra", [b"$3\r\nbad\r\n", b"$-1\r\n", b":1\r\n", b"+OK\r\n", b"-ERR late\r\n"])
def test_one_answer_too_many(book: Book, clock: FakeClock, extra: bytes) -> None:
    """After the answer to each GET: the values that follow are not where they belong."""
    tiny = Tiny()
    tiny.bad[b"GET"] = lambda command: tiny.good(command) + extra
    with (
        book(f"malformed: {extra!r} too many", injected="after each answer", expected="1 hit, the rest miss") as row,
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


@pytest.mark.fault(number=29)
@pytest.mark.redis
@pytest.mark.parametrize(
    ("what", "k"), [*(("double", k) for k in range(BLOCKS)), *(("swap", k) for k in range(BLOCKS - 1))]
)
def test_answers_that_do_not_belong_to_their_questions(book: Book, proxy: FaultProxy, what: str, k: int) -> None:
    """Only the key in the record tells that: in the middle of a batch the bare store cannot."""
    with (
        book(
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


@pytest.mark.fault(number=29)
@pytest.mark.redis
def test_a_doubled_answer_is_never_the_answer_to_the_next_call(book: Book, proxy: FaultProxy) -> None:
    keys = [b"key %d" % i for i in range(20)]
    with (
        book("doubled reply, bare store", injected="each answer twice", expected="a new connection each time") as row,
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


@pytest.mark.fault(number=29)
def test_an_extra_answer_that_comes_after_the_next_question(book: Book, clock: FakeClock) -> None:
    """Nothing on the wire tells the two apart: only the key inside the record does."""
    tiny, first = Tiny(), b"kv:" + KEYS[0]

    def late(command: list[bytes]) -> bytes:
        return tiny.good(command) if command[1] == first else bulk(tiny.values[first]) + tiny.good(command)

    with (
        book("late extra reply", injected="the last answer again, before the next", expected="miss: key") as row,
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
