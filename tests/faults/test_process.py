"""Faults 4, 27, 29, 33 and 34: the worker itself stands still, is interrupted, forks, or its clock jumps."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections import Counter

import pytest

from kvlab.stores import RedisStore
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import RedisServer
from tests.faults.book import Book
from tests.faults.calls import (
    PATIENT_S,
    Alarm,
    D,
    Fault,
    Interrupt,
    alarm,
    ask,
    breakers,
    calm,
    fill,
    forks,
    in_child,
    read_while_standing_still,
    value_of,
)
from tests.faults.kit import (
    BLOCKS,
    KV,
    LONG_S,
    NAMES,
    OTHER_KV,
    OTHER_TOKENS,
    SPEC,
    TOKENS,
    B,
    cache_over,
    check_repaired,
    load_all,
    monitored,
    names_of,
    under_fault,
    wait_for,
)
from tests.faults.tiny import Scripted, Tiny
from tests.harness.helpers import FakeClock, blank


@pytest.mark.fault(number=4)
@pytest.mark.redis
def test_a_worker_that_stands_still_takes_the_answers_that_came_meanwhile(
    book: Book, redis_server: RedisServer
) -> None:
    """What a full garbage collection does to all threads, or a C function that keeps the interpreter to itself."""
    stops, threads = 10, 2  # fewer threads than faults that open a breaker
    with (
        book(
            "the worker stands still",
            injected=f"{stops} times no thread of it runs for two deadlines, while {threads} read; the server is well",
            expected="the answers have come, and are taken; the breaker stays closed",
        ) as row,
        RedisStore(redis_server.url, deadline_s=D) as store,
    ):
        row.seen, row.added_ms = read_while_standing_still(store, stops, threads)
        assert breakers(store)[0] == "closed"


@pytest.mark.fault(number=27)
def test_an_interrupt_while_waiting_for_a_connection_does_not_lose_it(book: Book) -> None:
    """The handler runs while this thread waits, and the connection is handed to it meanwhile."""
    tiny, go = Tiny(), threading.Event()

    def slowly(command: list[bytes]) -> bytes:
        go.wait(PATIENT_S)
        return tiny.good(command)

    with (
        book("interrupt in the queue of the pool", injected="SIGALRM; pool of one", expected="works on") as row,
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
        store.deadline_s, fault = 4 * D, Fault(row, 4 * D)
        assert fault(lambda: ask(store, [b"k"])) == [True], store.stats().misses
        row.seen = {"hits": store.stats().hits}


@pytest.mark.fault(number=29)
@pytest.mark.redis
@pytest.mark.parametrize("passed", [0, 3, 200], ids=["before the answer", "in its header", "in the value"])
@pytest.mark.parametrize("kind", [Interrupt, Alarm])
def test_an_alarm_in_the_middle_of_a_get(book: Book, proxy: FaultProxy, kind: type[BaseException], passed: int) -> None:
    """The answer comes later; it must not be taken for the next one."""
    with (
        book(
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


@pytest.mark.fault(number=29)
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
        book(f"interrupt in a {call} that tries, {which}", injected="SIGALRM", expected="the next one tries") as row,
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


@pytest.mark.fault(number=29)
@pytest.mark.redis
def test_a_thread_interrupted_in_the_middle_of_a_value(book: Book, proxy: FaultProxy) -> None:
    size = 20_000
    with (
        book(
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


@pytest.mark.fault(number=33)
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


@pytest.mark.fault(number=33)
@forks
@pytest.mark.redis
def test_a_fork_while_other_threads_are_in_the_middle_of_calls(book: Book, own_server: RedisServer) -> None:
    """The child has none of the threads that hold the parent's connections."""
    with (
        book("fork in the middle of calls", injected="a pool of 2, both in use", expected="both work") as row,
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


@pytest.mark.fault(number=33)
@forks
@pytest.mark.redis
def test_a_fork_with_an_open_breaker_starts_closed_in_the_child(
    book: Book, own_server: RedisServer, clock: FakeClock
) -> None:
    with (
        book("fork with an open breaker", injected="os.fork while open", expected="child tries, parent waits") as row,
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


@pytest.mark.fault(number=34)
@pytest.mark.redis
def test_clocks_that_jump_or_stand_still(redis_server: RedisServer, clock: FakeClock, book: Book) -> None:
    with (
        FaultProxy(redis_server.port) as proxy,
        cache_over(RedisStore(proxy.url, ttl_s=1000, deadline_s=LONG_S, clock=clock)) as cache,
        book("clock skew", injected="breaker's clock jumps, stops", expected="conn, breaker; PX only") as row,
    ):
        client = redis_server.client()
        assert cache.save(TOKENS, KV) == BLOCKS
        for _ in range(10):  # time alone opens nothing
            clock.now += 1e7
            assert load_all(cache) == BLOCKS
        assert not cache.store.stats().misses and cache.store.nodes[0].breaker.state == "closed"
        proxy.refuse = True
        proxy.drop()
        with under_fault(row):
            for later in (0.0, 1e7, 1e7):  # faults in a row count however far apart
                clock.now += later
                assert load_all(cache) == 0
            clock.now += 0.5
            for _ in range(20):  # it stands still: nobody asks, and nobody waits
                assert load_all(cache) == 0
        assert cache.store.stats().misses == Counter(conn=3 * BLOCKS, breaker=20 * BLOCKS)
        proxy.refuse = False
        asked = proxy.accepted
        assert load_all(cache) == 0 and proxy.accepted == asked  # back, and not asked while no time passes
        clock.now += 1e9
        assert load_all(cache) == BLOCKS  # the first call after the jump is the trial, and closes it
        assert cache.store.nodes[0].breaker.state == "closed"
        row.seen = dict(cache.store.stats().misses)
        with monitored(redis_server) as commands:
            clock.now += 1e9
            assert load_all(cache) == BLOCKS
            assert cache.load(TOKENS, 2 * B, BLOCKS * B, blank(SPEC, 2 * B)) == BLOCKS * B
            assert cache.save(OTHER_TOKENS, OTHER_KV) == BLOCKS
        assert names_of(commands) == {"GET", "PEXPIRE", "EXISTS", "SET", "INFO"}
        sets = [command for command in commands if command.startswith("SET ")]
        assert len(sets) == BLOCKS and all(command.endswith(" PX 1000000") for command in sets)
        touches = [command.split(" ")[-2:] for command in commands if command.startswith("PEXPIRE ")]
        assert touches and all(touch == ["1000000", "GT"] for touch in touches), "whatever time it is"
        assert all(990_000 < client.pttl(name) <= 1_000_000 for name in NAMES)
        check_repaired(cache)
