"""Faults 4, 29, 32 and 33 with many nodes: the worker stands still, is interrupted, forks, has many threads."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from typing import Any

import pytest

from kvlab.stores import RedisStore
from kvlab.testbed.cluster import RedisCluster
from tests.faults.book import Book
from tests.faults.calls import PATIENT_S, Alarm, Interrupt, alarm, ask, fill, forks, in_child, read_while_standing_still
from tests.faults.clusters import (
    KEYS,
    SIZE,
    check_all_there,
    client_at,
    masters,
    node_at,
    nodes_by_port,
    prepared,
    value_of,
)
from tests.faults.load import Load


@pytest.mark.fault(number=4)
@pytest.mark.cluster
def test_a_worker_of_a_cluster_that_stands_still(book: Book, cluster: RedisCluster) -> None:
    """Parts of a batch that had not begun when it stopped begin late, and are answered."""
    stops, threads = 10, 2
    with (
        book(
            "the worker stands still, cluster",
            injected=f"{stops} times no thread of it runs for two deadlines, while {threads} read; the nodes are well",
            expected="the answers have come, and are taken; the breakers stay closed",
        ) as row,
        RedisStore(cluster.url) as store,
    ):
        row.seen, row.added_ms = read_while_standing_still(store, stops, threads)
        assert all(node.breaker.state == "closed" for node in store.nodes)


@pytest.mark.fault(number=33)
@pytest.mark.cluster
@forks
def test_parent_and_child_of_a_fork_share_nothing_of_a_cluster(book: Book, cluster: RedisCluster) -> None:
    with (
        book(
            "fork, cluster",
            injected="os.fork after connections and threads to every node exist; both read at once",
            expected="both read right, the child with threads and connections of its own",
        ) as row,
        RedisStore(cluster.url, deadline_s=PATIENT_S, max_connections=4) as store,
    ):
        fill(store, KEYS, SIZE)
        threads = {thread.name for thread in threading.enumerate()}
        assert any(name.startswith("kvlab 127.0.0.1:") for name in threads)

        def read() -> list[int]:
            before = store.stats()
            for _ in range(20):
                assert all(ask(store, KEYS, SIZE))
            fill(store, KEYS[:50], SIZE)
            own = sum(thread.name.startswith("kvlab 127.0.0.1:") for thread in threading.enumerate())
            return [store.stats().hits - before.hits, store.stats().misses.total(), own]

        def read_in_threads() -> list[int]:
            first, got = read(), list[list[int]]()
            more = [threading.Thread(target=lambda: got.append([sum(ask(store, KEYS, SIZE))])) for _ in range(4)]
            for thread in more:
                thread.start()
            for thread in more:
                thread.join()
            assert got == [[len(KEYS)]] * 4
            return first

        said: list[Any] = []
        said.append(in_child(read_in_threads, lambda: said.append(read())))
        assert [each[:2] for each in said] == [[20 * len(KEYS), 0]] * 2
        assert all(each[2] >= 2 for each in said)
        row.seen = {"hits of each": 20 * len(KEYS), "misses": 0}
        check_all_there(store)


@pytest.mark.fault(number=29)
@pytest.mark.cluster
@pytest.mark.parametrize("which", ["the caller's own part", "another's part"])
@pytest.mark.parametrize("kind", [Interrupt, Alarm])
def test_an_alarm_in_the_middle_of_a_get_from_many(
    book: Book, cluster: RedisCluster, kind: type[BaseException], which: str
) -> None:
    """The first shard of a batch is asked in the caller's thread: an `Alarm` there is a fault of that shard."""
    with (
        book(
            f"interrupt, cluster: {kind.__name__} while {which} hangs",
            injected="SIGALRM raises while a node hangs; its answer comes afterwards",
            expected="no buffer changes after the call; later calls are right",
        ) as row,
        RedisStore(cluster.url, deadline_s=PATIENT_S) as store,
    ):
        owner = prepared(cluster, store)
        assert all(ask(store, KEYS, SIZE))
        store.deadline_s = 1.0
        first = owner[KEYS[0]]
        hangs = first if which == "the caller's own part" else next(p for p in owner.values() if p != first)
        out = [memoryview(bytearray(b"\xee" * SIZE)) for _ in KEYS]
        before = store.stats()
        node_at(cluster.nodes, hangs).stop()
        got, raised = None, False
        with alarm(kind, 0.2):
            try:
                got = store.get_many(KEYS, out)
            except kind:
                raised = True
        left = [bytes(buffer) for buffer in out]
        node_at(cluster.nodes, hangs).cont()
        time.sleep(0.5)
        assert [bytes(buffer) for buffer in out] == left, "written to after the call"
        assert raised == (kind is Interrupt or which == "another's part")
        allowed = lambda key: (bytes([0xEE]) * SIZE, value_of(key))  # noqa: E731
        assert all(value in allowed(key) for key, value in zip(KEYS, left, strict=True))
        assert all(value == allowed(key)[0] for key, value in zip(KEYS, left, strict=True) if owner[key] == hangs)
        if got is not None:
            assert [value is not None for value in got] == [owner[key] != hangs for key in KEYS]
        store.stats().check()
        row.seen = {"raised": raised, "misses": dict(store.stats().misses - before.misses)}
        check_all_there(store)


@pytest.mark.fault(number=29)
@pytest.mark.cluster
def test_an_interrupt_while_the_parts_are_handed_out(
    book: Book, cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three shards has its part, the third not yet."""
    with (
        book(
            "interrupt, cluster: between two parts",
            injected="a signal's handler raises when one thread has its part and the next has not",
            expected="no buffer changes after the call",
        ) as row,
        RedisStore(cluster.url, deadline_s=PATIENT_S) as store,
    ):
        owner = prepared(cluster, store)
        assert all(ask(store, KEYS, SIZE))
        store.deadline_s = 1.0
        ports = list(dict.fromkeys(owner[key] for key in KEYS))
        nodes = nodes_by_port(store)

        def interrupted(*work: object) -> Any:
            raise Interrupt

        monkeypatch.setattr(nodes[ports[2]], "start", interrupted)
        out = [memoryview(bytearray(b"\xee" * SIZE)) for _ in KEYS]
        hangs = node_at(cluster.nodes, ports[1])
        hangs.stop()
        with pytest.raises(Interrupt):
            store.get_many(KEYS, out)
        left = [bytes(buffer) for buffer in out]
        hangs.cont()
        time.sleep(0.5)
        written = sum(bytes(buffer) != before for buffer, before in zip(out, left, strict=True))
        monkeypatch.undo()
        assert written == 0, f"{written} buffers were written to after the call"
        row.seen = {"buffers written to afterwards": written}
        check_all_there(store)


@pytest.mark.fault(number=29)
@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # when it is raised in a __del__
def test_interrupts_at_any_moment_of_a_get(book: Book, cluster: RedisCluster) -> None:
    """Whatever was going on: nothing is written afterwards, nothing stays locked, counted or half open."""
    rounds, chance = 150, random.Random(29)
    with (
        book(
            "interrupt, cluster: at any moment",
            injected=f"{rounds} times SIGALRM raises at a random moment of a get or put of {len(KEYS)} keys",
            expected="no buffer changes after the call; later calls are right",
        ) as row,
        RedisStore(cluster.url, ttl_s=100, deadline_s=PATIENT_S) as store,
    ):
        prepared(cluster, store)
        assert all(ask(store, KEYS, SIZE))
        begin = time.perf_counter()
        assert all(ask(store, KEYS, SIZE))
        took, seen = time.perf_counter() - begin, Counter[str]()
        values = [value_of(key) for key in KEYS]
        for i in range(rounds):
            out = [memoryview(bytearray(b"\xee" * SIZE)) for _ in KEYS]
            try:
                with alarm(Interrupt, max(1e-5, chance.random() * 1.2 * took)):
                    store.get_many(KEYS, out) if i % 4 else store.put_many(KEYS, values)
                    seen["came too late"] += 1
            except Interrupt:
                left = [bytes(buffer) for buffer in out]
                time.sleep(0.005)
                written = sum(bytes(buffer) != before for buffer, before in zip(out, left, strict=True))
                assert written == 0, f"{written} buffers were written to after call {i}"
                assert all(begins_with_value(k, v) for k, v in zip(KEYS, left, strict=True))
                seen["interrupted"] += 1
            assert all(ask(store, KEYS[:60], SIZE)), store.stats()
        assert seen["interrupted"] > rounds / 10
        assert all(node.breaker.state == node.write_breaker.state == "closed" for node in store.nodes)
        # Servers whose part was cut short count as having timed out, though they did nothing wrong.
        assert set(store.stats().faults) <= {"timeout"} and not store.stats().misses
        store._topology._hinted = True  # type: ignore[attr-defined]
        time.sleep(0.6)
        asked_at = store._topology._requested_at  # type: ignore[attr-defined]
        assert all(ask(store, KEYS, SIZE))
        assert store._topology._requested_at > asked_at, "nobody may ask for the map any more"  # type: ignore[attr-defined]
        row.seen = dict(seen)
        check_all_there(store)


def begins_with_value(key: bytes, buffer: bytes) -> bool:
    """Whether a buffer of 0xEE was filled with nothing but the key's value, perhaps not to the end."""
    right = value_of(key)
    upto = next((n for n in range(SIZE) if buffer[n] != right[n]), SIZE)
    return buffer[upto:] == b"\xee" * (SIZE - upto)


@pytest.mark.fault(number=32)
@pytest.mark.cluster
def test_many_threads_share_the_connections_of_each_node(book: Book, cluster: RedisCluster) -> None:
    most, threads = 4, 16
    with (
        book(
            "16 threads, cluster",
            injected=f"{threads} threads read and write over {most} connections a node",
            expected="nothing wrong; no node has more connections",
        ) as row,
        RedisStore(cluster.url, deadline_s=PATIENT_S, max_connections=most) as store,
        contextlib.ExitStack() as stack,
    ):
        owner = prepared(cluster, store)
        ports = list(masters(cluster))
        watchers = {port: client_at(port) for port in ports}
        lines = lambda: {p: {c["id"] for c in watchers[p].client_list(_type="normal")} for p in ports}  # noqa: E731
        store.close()
        known = lines()
        store = stack.enter_context(RedisStore(cluster.url, deadline_s=PATIENT_S, max_connections=most))
        peak = Counter[int]()
        with Load(store, owner, threads=threads) as load:
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                for port, now in lines().items():
                    peak[port] = max(peak[port], len(now - known[port]))
                time.sleep(0.01)
        load.check()
        served = load.check_undisturbed(load.shards)
        assert not store.stats().faults and not store.stats().misses and not store.stats().drops
        assert all(1 < n <= most + 1 for n in peak.values()), "and one that asks for the map"
        row.seen = {"served": served, "most connections of a node": max(peak.values()), "allowed": most}
        check_all_there(store)
