"""Faults 27 and 36: no connection to be had, and readers that do not read."""

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
from tests.faults.calls import PATIENT_S, D, Fault, ask, breakers, calm, fill, value_of
from tests.faults.kit import BLOCKS, KV, MIB, TOKENS, cache_over, check_works_again, load_all, wait_for
from tests.faults.tiny import Scripted, Tiny
from tests.harness.helpers import FakeClock


@pytest.mark.fault(number=27)
@pytest.mark.redis
@pytest.mark.parametrize("login", [False, True], ids=["", "with AUTH"])
def test_a_server_with_too_many_clients(book: Book, clock: FakeClock, login: bool) -> None:
    options = ("--requirepass", "pw") if login else ()
    with (
        book(
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


@pytest.mark.fault(number=27)
def test_a_server_that_says_at_once_that_it_is_full(book: Book) -> None:
    """Redis does not wait for a command before it says so; the error may come before the first GET or after."""
    done = threading.Event()

    def refuse(listener: socket.socket) -> None:
        while not done.is_set():
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                connection.sendall(b"-ERR max number of clients reached\r\n")

    with (
        book("maxclients, said at once", injected="the error before any command", expected="conn") as row,
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


@pytest.mark.fault(number=27)
def test_a_pool_that_is_all_in_use_says_nothing_about_the_server(book: Book, clock: FakeClock) -> None:
    tiny, go = Tiny(), threading.Event()

    def slowly(command: list[bytes]) -> bytes:
        if command[1] == b"kv:slow":
            go.wait(PATIENT_S)
        return tiny.good(command)

    tiny.bad[b"GET"] = slowly
    with (
        book("pool of one", injected="a slow answer holds the only connection", expected="pool; stays closed") as row,
        Scripted(tiny) as server,
        RedisStore(server.url, deadline_s=PATIENT_S, max_connections=1, clock=clock) as store,
    ):
        fill(store, [b"slow", b"k"])
        heard: list[bool] = []
        holder = threading.Thread(target=lambda: heard.extend(ask(store, [b"slow"])))
        holder.start()
        wait_for(lambda: server.commands[-1] == [b"GET", b"kv:slow"])
        count, store.deadline_s = len(server.commands), D
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


LIMIT = 64 * MIB


@pytest.mark.fault(number=36)
@pytest.mark.redis
def test_readers_that_stall_do_not_stop_the_store(book: Book) -> None:
    """The server's limit on what waits for a client ends them; its memory stays bounded."""
    size, clients = 16 * MIB, 2
    with (
        book(
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


@pytest.mark.fault(number=36)
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


@pytest.mark.fault(number=36)
@pytest.mark.redis
def test_a_limit_smaller_than_a_window_is_misses(book: Book, clock: FakeClock) -> None:
    """Whoever sets the limit below what a window holds loses windows, and nothing else."""
    keys = [b"key %d" % i for i in range(8)]
    with (
        book("store over the output limit", injected="output limit 4 MiB, window 16 MiB", expected="conn") as row,
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
