"""Look-ups and fetches that nobody waits for: what a scheduler asks again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kvlab.stores import MemoryStore
from tests.engine.serving import HungStore
from tests.engine.test_tiers import (
    WAIT_S,
    B,
    Clock,
    GatedStore,
    blank_kv,
    filled_store,
    keys_in,
    kv_of,
    run,
    start_fetch,
    tiered,
    words,
)


def soon(done: Callable[[], object]) -> Any:
    """What `done` returns, once it is something."""
    give_up = time.monotonic() + WAIT_S
    while not (result := done()):
        assert time.monotonic() < give_up
        time.sleep(0.001)
    return result


# --- Fetch.poll ---------------------------------------------------------------------------------
def test_poll_copies_what_is_there_and_does_not_wait() -> None:
    prompt = words(4 * B)
    store = filled_store(prompt)
    fetch, kv = start_fetch(tiered(store), prompt)
    assert not fetch.poll() and fetch.filled == [False] * 4 and kv.isnan().all()
    store.gate.release(2)
    soon(lambda: fetch.poll() or sum(fetch.filled) == 2)
    assert not fetch.poll() and fetch.filled == [True, True, False, False]
    assert not kv[:, :, :, : 2 * B].isnan().any() and kv[:, :, :, 2 * B :].isnan().all()
    store.gate.release(2)
    soon(fetch.poll)
    assert fetch.finish() == [True] * 4
    assert (kv - kv_of(prompt)).abs().max() < 1e-4
    assert fetch.poll(), "and it stays so"


@pytest.mark.parametrize("who", ["wait_s", "deadline"])
def test_poll_says_when_it_is_too_late(who: str) -> None:
    prompt, clock = words(2 * B), Clock()
    store = filled_store(prompt)
    cache = tiered(store, clock=clock)
    store.deadline_s = 3.0 if who == "deadline" else 100.0
    fetch, _ = start_fetch(cache, prompt)
    wait_s = 3.0 if who == "wait_s" else None
    clock.now += 2.9
    assert not fetch.poll(wait_s)
    clock.now += 0.2
    assert fetch.poll(wait_s) and fetch.finish(wait_s) == [False, False]
    store.gate.release(2)


def test_poll_after_the_end_copies_nothing() -> None:
    prompt = words(2 * B)
    store = filled_store(prompt)
    fetch, kv = start_fetch(tiered(store), prompt)
    fetch.end()
    store.gate.release(2)
    soon(lambda: fetch._unpacked.qsize() == 2)
    assert fetch.poll() and fetch.filled == [False, False] and kv.isnan().all()


def test_poll_of_a_fetch_from_host_memory_has_nothing_to_wait_for() -> None:
    prompt, cache = words(2 * B), tiered()
    run([*prompt, 1], cache)
    keys = cache.namespace.keys(prompt)
    kv = blank_kv(2 * B)
    fetch = cache.fetch(keys, ["host"] * 2, [kv[:, :, :, :B], kv[:, :, :, B:]])
    assert fetch.poll(0) and fetch.filled == [True, True]


def test_what_is_polled_is_measured_like_what_is_waited_for() -> None:
    prompt = words(3 * B)
    store = filled_store(prompt)
    cache = tiered(store)
    fetch, _ = start_fetch(cache, prompt)
    store.gate.release(3)
    soon(fetch.poll)
    fetch.finish()
    assert [(tier, blocks) for tier, blocks, _ in cache._outer.measured] == [("store", 3)]


def test_many_windows_that_are_polled_all_come(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvlab.engine import fetch as fetch_module

    prompt, store = words(8 * B), GatedStore()
    run([*prompt, 1], tiered(store))
    store.gate.release(8)
    monkeypatch.setattr(fetch_module, "AHEAD_BYTES", 1)  # windows are fetched only as earlier ones are copied
    fetch, _ = start_fetch(tiered(store), prompt)
    soon(fetch.poll)
    assert fetch.finish(0) == [True] * 8


# --- TieredCache.locating -----------------------------------------------------------------------
def test_a_look_up_that_nobody_waits_for_answers_once_it_is_there() -> None:
    prompt, store = words(3 * B), HungStore()
    run([*prompt, 1], tiered(store))
    store.delete_many([sorted(keys_in(store))[0]])
    keys = tiered().namespace.keys(prompt)
    expected = ["store" if key in keys_in(store) else "" for key in keys]
    store.hangs = {"touch"}
    cache = tiered(store)
    found = cache.locating(keys, waits=False)
    assert store.began.wait(WAIT_S)
    assert found() is None and found() is None
    store.gate.set()
    assert soon(found) == expected and sorted(expected) == ["", "store", "store"]


def test_one_that_waits_answers_at_once() -> None:
    prompt, cache = words(3 * B), tiered()
    run([*prompt, 1], cache)
    keys = cache.namespace.keys(prompt)
    assert cache.locating(keys)() == ["host"] * 3 == cache.locate(keys)
    assert cache.locating(keys, shared=1)() == ["device", "host", "host"]


def test_what_is_all_on_the_device_is_answered_at_once_and_asks_no_store() -> None:
    store = HungStore("touch")
    cache = tiered(store)
    keys = cache.namespace.keys(words(2 * B))
    assert cache.locating(keys, shared=2, waits=False)() == ["device"] * 2
    assert cache.locating([], waits=False)() == [] and not store.began.is_set()


def test_a_look_up_that_raises_finds_what_is_on_the_device(caplog: pytest.LogCaptureFixture) -> None:
    class Raises(MemoryStore):
        def touch_many(self, keys: Sequence[bytes]) -> list[bool]:
            raise RuntimeError("a bug")

    cache = tiered(Raises())
    keys = cache.namespace.keys(words(3 * B))
    assert soon(cache.locating(keys, shared=1, waits=False)) == ["device", "", ""]
    assert cache.locating(keys, shared=1)() == ["device", "", ""]
    assert caplog.text.count("a look-up failed") == 2


def test_without_threads_a_look_up_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, cache = words(2 * B), tiered()
    run([*prompt, 1], cache)

    def no_thread(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(cache._outer.readers, "submit", no_thread)
    assert cache.locating(cache.namespace.keys(prompt), waits=False)() == ["host", "host"]


@pytest.mark.parametrize("counts", [True, False])
def test_only_a_look_up_that_counts_is_one_request_more(counts: bool) -> None:
    store, prompt = MemoryStore(), words(2 * B)
    cache = tiered(store, write="selective")
    run([*prompt, 1], cache)
    assert not keys_in(store)
    keys = cache.namespace.keys(prompt)
    soon(cache.locating(keys, waits=False, counts=counts))
    cache.save(prompt, kv_of(prompt))
    assert keys_in(store) == (set(keys) if counts else set())


def test_many_look_ups_at_once_are_all_answered() -> None:
    store = HungStore("touch")
    cache = tiered(store)
    asked = [cache.locating(cache.namespace.keys(words(B, seed=i)), waits=False) for i in range(100)]
    assert threading.active_count() < 100
    assert all(found() is None for found in asked)
    store.gate.set()
    assert [soon(found) for found in asked] == [[""]] * 100
