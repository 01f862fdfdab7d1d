"""Writes that nobody waits for: bounded, in order, counted, seen by reads, and written before the end."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from kvlab.errors import ConfigError
from kvlab.stores import MemoryStore, WriteBehind, write_behind
from kvlab.stores.base import joined

WAIT_S = 30.0


class SlowStore(MemoryStore):
    """Takes writes only while its gate is open, and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.began = threading.Event()
        self.batches: list[list[bytes]] = []

    def put_many(self, keys: Sequence[bytes], values: Sequence[Any]) -> int:
        self.began.set()
        assert self.gate.wait(WAIT_S)
        self.batches.append(list(keys))
        return super().put_many(keys, values)


@pytest.fixture
def slow() -> SlowStore:
    return SlowStore()


@pytest.fixture
def behind(slow: SlowStore) -> Iterator[WriteBehind]:
    made = WriteBehind(slow, max_bytes=1000)
    yield made
    slow.gate.set()
    made.close()
    made.stats().check()


def test_a_put_returns_before_it_is_written_and_reads_see_it(behind: WriteBehind, slow: SlowStore) -> None:
    assert behind.put_many([b"a", b"b"], [b"one", (b"t", memoryview(b"wo"))]) == 2
    assert slow.began.wait(WAIT_S)
    assert behind.get_many([b"a", b"x", b"b"]) == [b"one", None, b"two"]
    assert behind.probe([b"a", b"b", b"x"]) == 2
    assert behind.touch_many([b"a", b"x"]) == [True, False]
    assert behind.stats().stored == 0
    slow.gate.set()
    assert behind.flush(WAIT_S)
    assert slow.get_many([b"a", b"b"]) == [b"one", b"two"]
    assert behind.stats().stored == 2


def test_values_are_copied(behind: WriteBehind, slow: SlowStore) -> None:
    value = bytearray(b"first")
    behind.put_many([b"a"], [memoryview(value)])
    value[:] = b"XXXXX"
    slow.gate.set()
    assert behind.flush(WAIT_S)
    assert slow.get_many([b"a"]) == [b"first"]


def test_a_full_queue_drops_and_counts_what_does_not_fit(behind: WriteBehind, slow: SlowStore) -> None:
    keys = [b"%d" % i for i in range(5)]
    assert behind.put_many(keys, [bytes(300)] * 5) == 3
    assert behind.stats().drops == Counter(queue_full=2)
    assert slow.began.wait(WAIT_S)
    assert behind.put_many([b"more"], [bytes(200)]) == 0  # what is being written still counts
    slow.gate.set()
    assert behind.flush(WAIT_S)
    assert behind.put_many([b"more"], [bytes(200)]) == 1
    assert behind.flush(WAIT_S)
    stats = behind.stats()
    assert (stats.offered, stats.stored, stats.drops) == (7, 4, Counter(queue_full=3))


def test_a_newer_value_takes_the_older_ones_place(behind: WriteBehind, slow: SlowStore) -> None:
    behind.put_many([b"first"], [b"1"])
    assert slow.began.wait(WAIT_S)  # "first" is under way now, the next ones wait
    for value in (b"old", b"newer", b"newest"):
        assert behind.put_many([b"a"], [value]) == 1
    assert behind.get_many([b"a"]) == [b"newest"]
    slow.gate.set()
    assert behind.flush(WAIT_S)
    assert slow.get_many([b"a"]) == [b"newest"]
    assert slow.batches == [[b"first"], [b"a"]]
    assert behind.stats().drops == Counter(collapsed=2)


def test_a_repair_of_what_is_being_written_is_written_too(behind: WriteBehind, slow: SlowStore) -> None:
    behind.put_many([b"a"], [b"damaged"])
    assert slow.began.wait(WAIT_S)
    behind.put_many([b"a"], [b"repaired"])
    slow.gate.set()
    assert behind.flush(WAIT_S)
    assert slow.get_many([b"a"]) == [b"repaired"]
    assert behind.stats().drops == Counter()


def test_deleted_means_deleted(behind: WriteBehind, slow: SlowStore) -> None:
    behind.put_many([b"under way"], [b"1"])
    assert slow.began.wait(WAIT_S)
    behind.put_many([b"waiting"], [b"2"])
    threading.Timer(0.05, slow.gate.set).start()
    assert behind.delete_many([b"under way", b"waiting", b"absent"]) == 2
    assert behind.flush(WAIT_S)
    assert behind.get_many([b"under way", b"waiting"]) == [None, None]
    assert behind.stats().drops == Counter(deleted=1)


def test_closing_writes_what_waits(slow: SlowStore) -> None:
    behind = WriteBehind(slow)
    keys = [b"%d" % i for i in range(100)]
    behind.put_many(keys, [bytes(10)] * 100)
    slow.gate.set()
    behind.close()
    assert sum(map(len, slow.batches)) == 100
    assert behind.put_many([b"late"], [b"1"]) == 0
    assert behind.stats().drops == Counter(closed=1)
    behind.close()


def test_a_store_that_drops_is_counted_once() -> None:
    class Refuses(MemoryStore):
        def put_many(self, keys: Sequence[bytes], values: Sequence[Any]) -> int:
            self._stats.offered += len(keys)
            self._stats.drops["oom"] += len(keys)
            return 0

    with WriteBehind(Refuses()) as behind:
        assert behind.put_many([b"a", b"b"], [b"1", b"2"]) == 2
        assert behind.flush(WAIT_S)
        assert (behind.stats().offered, behind.stats().drops) == (2, Counter(oom=2))


def test_a_store_that_raises_stops_no_later_write() -> None:
    class Raises(MemoryStore):
        def put_many(self, keys: Sequence[bytes], values: Sequence[Any]) -> int:
            if b"bad" in keys:
                raise RuntimeError("a bug")
            return super().put_many(keys, values)

    with WriteBehind(Raises()) as behind:
        behind.put_many([b"bad"], [b"1"])
        assert behind.flush(WAIT_S)
        behind.put_many([b"good"], [b"2"])
        assert behind.flush(WAIT_S)
        assert behind.get_many([b"bad", b"good"]) == [None, b"2"]
        stats = behind.stats()
        assert (stats.offered, stats.stored, stats.drops) == (2, 1, Counter(error=1))


def test_many_writers_lose_nothing() -> None:
    inner = MemoryStore()
    behind = WriteBehind(inner)

    def write(who: int) -> None:
        for i in range(200):
            behind.put_many([b"%d:%d" % (who, i)], [b"%d" % i])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert behind.flush(WAIT_S)
    keys = [b"%d:%d" % (who, i) for who in range(8) for i in range(200)]
    assert inner.get_many(keys) == [key.split(b":")[1] for key in keys]
    assert behind.stats().stored == 1600
    behind.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_child_of_a_fork_reads_though_a_thread_of_the_parent_held_every_lock() -> None:
    inner = MemoryStore()
    behind = WriteBehind(inner)
    inner.put_many([b"a"], [b"1"])
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with behind._lock, inner._lock:
            held.set()
            assert forked.wait(WAIT_S)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(WAIT_S)
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(5)  # instead of hanging
            good = behind.get_many([b"a"]) == [b"1"] and behind.probe([b"a"]) == 1 and behind.stats().hits == 1
            os._exit(0 if good else 1)
        except BaseException:
            os._exit(2)
    forked.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    behind.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_child_of_a_fork_leaves_the_parents_queue_alone(slow: SlowStore) -> None:
    behind = WriteBehind(slow)
    behind.put_many([b"a"], [b"1"])
    assert slow.began.wait(WAIT_S)
    child = os.fork()
    if child == 0:
        try:
            slow.gate = threading.Event()
            slow.gate.set()
            good = behind.put_many([b"b"], [b"2"]) == 1 and behind.flush(WAIT_S)
            os._exit(0 if good and slow.batches == [[b"b"]] else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    slow.gate.set()
    behind.close()
    assert slow.batches == [[b"a"]]


@pytest.mark.parametrize("store", ["redis://localhost", "", None, 7, MemoryStore, {}], ids=lambda v: type(v).__name__)
def test_a_url_is_no_store_nor_is_anything_else(store: Any) -> None:
    with pytest.raises(ConfigError, match=f"expected a store, such as .* got {type(store).__name__}"):
        WriteBehind(store)


@pytest.mark.parametrize("most", [0, -1, 2.5, 1e9, math.nan, math.inf, "64", True, None], ids=repr)
def test_the_room_of_its_queue_is_a_whole_number_of_bytes(most: Any) -> None:
    with pytest.raises(ConfigError, match="max_bytes as a whole number above 0"):
        WriteBehind(MemoryStore(), max_bytes=most)


# --- pressure -----------------------------------------------------------------------------------
class PacedStore(SlowStore):
    """Takes so many seconds of a fake clock for each byte; reads wait for a gate."""

    def __init__(self, seconds_per_byte: float) -> None:
        super().__init__()
        self.now, self.pace = 0.0, seconds_per_byte
        self.read_gate = threading.Event()
        self.reading = threading.Event()
        self.gate.set()
        self.read_gate.set()

    def put_many(self, keys: Sequence[bytes], values: Sequence[Any]) -> int:
        stored = super().put_many(keys, values)
        self.now += self.pace * sum(map(len, values))
        return stored

    def get_many(self, keys: Sequence[bytes], *more: Any) -> Any:
        self.reading.set()
        assert self.read_gate.wait(WAIT_S)
        return super().get_many(keys, *more)


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> PacedStore:
    monkeypatch.setattr(write_behind, "BATCH_BYTES", 2000)
    return PacedStore(0.0001)


def made_behind(store: PacedStore) -> WriteBehind:
    """Patience for 1,000 bytes at ten times the pace that the store has at first."""
    return WriteBehind(store, max_bytes=100_000, patience_s=1.0, clock=lambda: store.now)


def test_a_slow_store_gets_no_more_than_it_can_write_in_time(
    paced: PacedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[bytes] = []
    monkeypatch.setattr(write_behind, "joined", lambda value: copies.append(joined(value)) or copies[-1])
    with made_behind(paced) as behind:
        assert behind.put_many([b"%d" % i for i in range(9)], [bytes(1000)] * 9) == 9, "no pace is known yet"
        assert behind.flush(WAIT_S)
        paced.pace *= 10
        behind.put_many([b"slow"], [bytes(5000)])
        assert behind.flush(WAIT_S)
        paced.gate.clear()
        copies.clear()
        assert behind.put_many([b"first"], [bytes(2000)]) == 1, "an empty queue takes a value in any case"
        assert behind.put_many([b"a", b"b"], [bytes(100), bytes(600)]) == 0
        assert behind.stats().drops == Counter(pressure=2)
        assert len(copies) == 1, "what is dropped was not copied"
        paced.gate.set()
        assert behind.flush(WAIT_S)
        behind.stats().check()


def test_a_store_that_has_recovered_gets_values_again(paced: PacedStore) -> None:
    with made_behind(paced) as behind:
        paced.pace *= 100
        behind.put_many([b"slow"], [bytes(2000)])
        assert behind.flush(WAIT_S)
        paced.pace /= 100
        accepted = []
        for i in range(8):
            paced.gate.clear()
            accepted.append(behind.put_many([b"%d" % i, b"%d+" % i], [bytes(1000), bytes(1000)]))
            paced.gate.set()
            assert behind.flush(WAIT_S)
        assert accepted[0] == 1 and accepted[-1] == 2
        assert accepted == sorted(accepted) and accepted.index(2) <= 6


def test_a_slow_first_write_of_a_few_bytes_is_no_pressure(paced: PacedStore) -> None:
    """Opening a connection takes as long for a small value as for a large one."""
    with made_behind(paced) as behind:
        paced.pace *= 1000
        behind.put_many([b"small"], [bytes(100)])
        assert behind.flush(WAIT_S)
        paced.pace /= 1000
        paced.gate.clear()
        assert behind.put_many([b"%d" % i for i in range(9)], [bytes(1000)] * 9) == 9
        paced.gate.set()


def test_a_clock_that_jumps_back_drops_nothing(paced: PacedStore) -> None:
    with made_behind(paced) as behind:
        paced.pace = -1.0
        for i in range(3):
            assert behind.put_many([b"%d" % i, b"%d+" % i], [bytes(1000), bytes(1000)]) == 2
            assert behind.flush(WAIT_S)


def begin_read(behind: WriteBehind, paced: PacedStore) -> threading.Thread:
    """A read that the store does not answer until its gate opens."""
    paced.read_gate.clear()
    reader = threading.Thread(target=behind.get_many, args=([b"x"],))
    reader.start()
    assert paced.reading.wait(WAIT_S)
    return reader


def test_a_batch_waits_for_a_read_that_is_running(paced: PacedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_behind, "HOLD_S", WAIT_S)
    with made_behind(paced) as behind:
        reader = begin_read(behind, paced)
        behind.put_many([b"a"], [b"one"])
        assert not paced.began.wait(0.2)
        paced.read_gate.set()
        assert paced.began.wait(WAIT_S)
        reader.join(WAIT_S)


def test_a_read_that_never_ends_does_not_keep_values_from_being_written(paced: PacedStore) -> None:
    with made_behind(paced) as behind:
        reader = begin_read(behind, paced)
        behind.put_many([b"a"], [b"one"])
        assert behind.flush(WAIT_S)
        paced.read_gate.set()
        reader.join(WAIT_S)


@pytest.mark.parametrize("patience", [0, -1, "1", None, math.nan, True])
def test_the_patience_is_a_positive_number(patience: Any) -> None:
    with pytest.raises(ConfigError, match="patience_s"):
        WriteBehind(MemoryStore(), patience_s=patience)


class TimedStore(MemoryStore):
    """Takes writes only while its gate is open, and remembers their TTLs."""

    def __init__(self) -> None:
        super().__init__(ttl_s=100)
        self.gate = threading.Event()
        self.began = threading.Event()
        self.ttls: dict[bytes, float | None] = {}

    def put_many(self, keys: Sequence[bytes], values: Sequence[Any], ttl_s: float | None = None) -> int:
        self.began.set()
        assert self.gate.wait(WAIT_S)
        self.ttls |= dict.fromkeys(keys, ttl_s)
        return super().put_many(keys, values, ttl_s)


def test_what_waits_keeps_its_own_ttl_or_the_longer_one_of_a_touch() -> None:
    with TimedStore() as store, WriteBehind(store) as behind:
        behind.put_many([b"first"], [b"v"])
        assert store.began.wait(WAIT_S)  # all others wait now
        for key, ttl_s in ((b"plain", None), (b"short", 20), (b"long", 500), (b"again", 20), (b"more", 20)):
            assert behind.put_many([key], [b"v"], ttl_s) == 1
        assert behind.touch_many([b"plain", b"again"], 300) == [True, True]
        assert behind.touch_many([b"long", b"x"], 300) == [True, False]
        assert behind.touch_many([b"more"]) == [True]  # the TTL of the store
        store.gate.set()
        assert behind.flush(WAIT_S)
        expected = {b"first": None, b"plain": 300, b"short": 20, b"long": 500, b"again": 300, b"more": None}
        assert store.ttls == expected
