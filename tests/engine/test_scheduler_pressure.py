"""A scheduler when things are scarce or slow: a full pool, clients that leave, saves beside it, stores that hang."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from kvlab.engine.pages import PagePool
from kvlab.engine.scheduler import Scheduler
from kvlab.engine.tiers import TieredCache
from kvlab.stores import MemoryStore
from tests.engine.serving import HungStore, Stream, all_pages_back, at_once, plain, serving, submit, to_the_end, until
from tests.engine.test_tiers import MODEL, WAIT_S, B, keys_in, run, tiered, words


# --- preemption ---------------------------------------------------------------------------------
@pytest.mark.parametrize("pages", [7, 9, 13])
@pytest.mark.parametrize("tiers", [None, "inclusive", "exclusive"])
def test_a_full_pool_preempts_and_changes_no_token(pages: int, tiers: str | None) -> None:
    scheduler = serving(pages, at_once(tiered(exclusive=tiers == "exclusive")) if tiers else None)
    expected = submit(scheduler, [30, 31, 17, 33], 50)
    stream = to_the_end(scheduler)
    assert stream.tokens == expected
    preemptions = [record.preemptions for record in stream.ended.values()]
    assert scheduler.counts["preemptions"] == sum(preemptions) > 0
    assert all(bool(r.recomputed) <= bool(r.preemptions) for r in stream.ended.values())
    assert all_pages_back(scheduler)


def test_what_a_preempted_request_finds_again_is_no_hit() -> None:
    cache = at_once(tiered())
    scheduler = serving(9, cache)
    lengths = [30, 31, 17, 33]
    submit(scheduler, lengths, 50)
    stream = to_the_end(scheduler)
    records = [stream.ended[str(i)] for i in range(4)]
    assert any(record.preemptions and record.recomputed for record in records)
    assert [record.sources for record in records] == [{"computed": length} for length in lengths]
    assert (scheduler.pool.counts["requested"], scheduler.pool.counts["hits"]) == (1 + 1 + 1 + 2, 0)
    assert (cache.stats().requested, cache.stats().hits) == (0, 0)


def test_recomputed_is_what_it_had_when_it_was_preempted() -> None:
    scheduler, stream = serving(8), Stream()
    submit(scheduler, [30, 31], 50)
    until(scheduler, lambda: scheduler.counts["preemptions"] == 1, stream)
    assert [r.record.id for r in scheduler._waiting] == ["1"]
    had = 31 + len(stream.tokens["1"])
    record = to_the_end(scheduler, stream).ended["1"]
    assert (record.preemptions, record.recomputed) == (1, had)
    assert stream.ended["0"].preemptions == 0, "the one that came first goes on"


def test_a_block_whose_last_token_has_no_kv_yet_is_not_published_by_a_preemption() -> None:
    scheduler, stream = Scheduler(MODEL, PagePool(MODEL, 5, tiered().namespace)), Stream()
    prompts = [words(length, seed=length) for length in (10, 25)]
    for id, prompt in zip("ab", prompts, strict=True):
        scheduler.submit(id, prompt, 30, stop_at_eos=False)
    until(scheduler, lambda: scheduler.counts["preemptions"] == 1, stream)
    tokens = scheduler._waiting[0].tokens
    assert len(tokens) == 3 * B
    assert [key in scheduler.pool.index for key in scheduler.pool.keys(tokens)] == [True, True, False]
    to_the_end(scheduler, stream)
    assert stream.tokens == {id: plain(prompt, 30) for id, prompt in zip("ab", prompts, strict=True)}


def test_who_was_preempted_comes_before_all_who_wait() -> None:
    scheduler = serving(8, max_batch=2)
    expected = submit(scheduler, [30, 31, 5, 6], 50)
    stream = to_the_end(scheduler)
    assert stream.tokens == expected and scheduler.counts["preemptions"]
    assert list(stream.ended)[:2] == ["0", "1"]


def test_a_preempted_request_has_one_time_of_admission() -> None:
    scheduler = serving(8)
    submit(scheduler, [30, 31], 50)
    stream = to_the_end(scheduler)
    record = stream.ended["1"]
    assert record.preemptions and record.admitted_at < record.first_token_at == record.token_at[0]
    assert record.token_at == sorted(record.token_at) and len(record.token_at) == 50


def test_a_request_that_is_preempted_while_its_prompt_is_computed_starts_again() -> None:
    scheduler, stream = serving(10, max_batch=2, max_step_tokens=2), Stream()
    scheduler.submit("talks", words(30), 60, stop_at_eos=False)
    until(scheduler, lambda: "talks" in stream.tokens, stream)
    scheduler.submit("late", words(83, seed=1), 3, stop_at_eos=False)
    record = to_the_end(scheduler, stream).ended["late"]
    assert record.preemptions and record.sources == {"computed": 83}
    assert stream.tokens == {"talks": plain(words(30), 60), "late": plain(words(83, seed=1), 3)}


def test_many_requests_in_the_smallest_pool_end_in_the_order_in_which_they_came() -> None:
    """The oldest is never preempted by a younger one, so there is always one that goes on."""
    scheduler = serving(6)
    expected = submit(scheduler, [14] * 8, 60)
    stream = to_the_end(scheduler)
    assert stream.tokens == expected and list(stream.ended) == list(expected)
    assert scheduler.counts["preemptions"] and scheduler.counts["steps"] < 8 * 60
    assert stream.ended["0"].preemptions == 0


# --- cancellation -------------------------------------------------------------------------------
def test_a_request_that_waits_can_be_cancelled() -> None:
    scheduler = serving(max_batch=1)
    expected = submit(scheduler, [10, 11, 12], 4)
    scheduler.step()
    assert scheduler.cancel("1") and not scheduler.cancel("1")
    assert len(scheduler) == 2
    ends = scheduler.step()
    assert [(o.id, o.index, o.token) for o in ends if o.id == "1"] == [("1", 0, None)]
    end = next(o.record for o in ends if o.record is not None)
    assert (end.reason, end.tokens, end.admitted_at) == ("cancelled", [], 0.0)
    while len(scheduler):
        ends += scheduler.step()
    assert [o.record.tokens for o in ends if o.record and o.id != "1"] == [expected["0"], expected["2"]]
    assert not scheduler.cancel("0") and not scheduler.cancel("nobody")


def test_a_request_that_decodes_can_be_cancelled_and_keeps_what_it_has() -> None:
    scheduler, stream = serving(), Stream()
    expected = submit(scheduler, [10, 11], 9)
    until(scheduler, lambda: len(stream.tokens.get("0", [])) == 3, stream)
    used = len(scheduler.pool.tables)
    assert scheduler.cancel("0")
    assert len(scheduler.pool.tables) == used - 1, "its pages are free at once"
    to_the_end(scheduler, stream)
    assert (stream.ended["0"].reason, stream.tokens["0"]) == ("cancelled", expected["0"][:3])
    assert stream.tokens["1"] == expected["1"]
    assert all_pages_back(scheduler)


def test_a_request_in_the_middle_of_its_prompt_can_be_cancelled() -> None:
    scheduler = serving(max_batch=2, max_step_tokens=4)
    scheduler.submit("a", words(50), 4)
    scheduler.step()
    assert scheduler._active[0].known == 4
    scheduler.cancel("a")
    assert to_the_end(scheduler).ended["a"].sources == {}
    assert all_pages_back(scheduler)


def test_a_preempted_request_can_be_cancelled() -> None:
    scheduler, stream = serving(8), Stream()
    expected = submit(scheduler, [30, 31], 50)
    until(scheduler, lambda: bool(scheduler.counts["preemptions"]), stream)
    scheduler.cancel("1")
    to_the_end(scheduler, stream)
    assert stream.tokens["0"] == expected["0"]
    assert stream.tokens["1"] == expected["1"][: len(stream.tokens["1"])] != []
    assert all_pages_back(scheduler)


def hung(*hangs: str, prompt: list[int], **settings: Any) -> tuple[HungStore, TieredCache]:
    """A store that has a prompt, and hangs from now on; and tiers that have nothing."""
    store = HungStore()
    run(prompt, tiered(store))
    store.hangs = set(hangs)
    return store, tiered(store, **settings)


@pytest.mark.parametrize("call", ["touch", "get"])
def test_a_request_whose_look_up_or_fetch_is_under_way_can_be_cancelled(call: str) -> None:
    prompt = words(3 * B + 1)
    store, cache = hung(call, prompt=prompt)
    scheduler = serving(cache=cache, save=False)
    scheduler.submit("a", prompt, 2, stop_at_eos=False)
    until(scheduler, store.began.is_set)
    scheduler.cancel("a")
    assert not scheduler.pool.tables
    pages = scheduler.pool.data.fill_(7.0).clone()
    store.gate.set()
    for _ in range(20):
        scheduler.step()
        time.sleep(0.001)
    assert (scheduler.pool.data == pages).all(), "what comes late is written into no page"
    scheduler.submit("a", prompt, 2, stop_at_eos=False)
    again = to_the_end(scheduler)
    assert again.tokens["a"][-2:] == plain(prompt, 2)
    assert all_pages_back(scheduler)


# --- stores that hang ---------------------------------------------------------------------------
@pytest.mark.parametrize("call", ["touch", "get"])
def test_the_others_go_on_while_one_waits_for_a_store_that_hangs(call: str) -> None:
    prompt = words(3 * B + 1)
    store, cache = hung(call, prompt=prompt)
    scheduler, stream = serving(cache=cache, save=False), Stream()
    scheduler.submit("talks", words(5, seed=8), 60, stop_at_eos=False)
    scheduler.submit("waits", prompt, 4, stop_at_eos=False)
    until(scheduler, store.began.is_set, stream)
    scheduler.submit("too", [*prompt, 3], 4, stop_at_eos=False)
    scheduler.submit("joins", words(7, seed=9), 5, stop_at_eos=False)
    until(scheduler, lambda: stream.ended.keys() == {"talks", "joins"}, stream)
    assert scheduler.is_waiting and not {"waits", "too"} & stream.tokens.keys() and not store.gate.is_set()
    store.gate.set()
    to_the_end(scheduler, stream)
    assert stream.ended["waits"].sources == {"store": 48, "computed": 1}
    assert stream.ended["too"].sources == {"device": 48, "computed": 2}, "it was not fetched twice"
    assert stream.tokens == {
        "too": plain([*prompt, 3], 4),
        "talks": plain(words(5, seed=8), 60),
        "joins": plain(words(7, seed=9), 5),
        "waits": plain(prompt, 4),
    }
    assert all_pages_back(scheduler)


@pytest.mark.parametrize(("deadline_s", "wait_s"), [(0.05, None), (30.0, 0.05), (30.0, 0)])
def test_who_waits_too_long_computes(deadline_s: float, wait_s: float | None) -> None:
    prompt = words(3 * B + 1)
    store, cache = hung("get", prompt=prompt, wait_s=wait_s)
    store.deadline_s = deadline_s
    scheduler = serving(cache=cache)
    record = scheduler.submit("a", prompt, 4, stop_at_eos=False)
    to_the_end(scheduler)
    assert not store.gate.is_set() and record.sources == {"computed": 49} and record.tokens == plain(prompt, 4)
    assert cache.stats().misses == Counter(late=3)
    store.gate.set()


def test_a_look_up_that_fails_finds_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Raises(MemoryStore):
        def touch_many(self, keys: Sequence[bytes]) -> list[bool]:
            raise RuntimeError("a bug")

    scheduler = serving(cache=tiered(Raises()))
    expected = submit(scheduler, [40, 50], 4)
    assert to_the_end(scheduler).tokens == expected
    scheduler.close()
    assert "a look-up failed" in caplog.text
    assert scheduler.counts["saves failed"] == 2


# --- saves --------------------------------------------------------------------------------------
def test_what_was_computed_is_in_the_store_at_the_end() -> None:
    store = MemoryStore()
    with serving(cache=tiered(store)) as scheduler:
        submit(scheduler, [40, 50], 30)
        to_the_end(scheduler)
    names = scheduler.pool.namespace
    assert names is not None
    known = [[*words(n, seed=i), *plain(words(n, seed=i), 30)[:-1]] for i, n in enumerate([40, 50])]
    assert keys_in(store) == {key for tokens in known for key in names.keys(tokens)}
    assert scheduler.counts["saves"] == 4 and not scheduler.counts["saves dropped"]
    result = run(known[1], tiered(store))
    assert result.sources == {"store": 64} and result.tokens == plain(known[1], 4), "and it is right"


def test_a_prefix_is_saved_before_the_answer_ends() -> None:
    store, stream = MemoryStore(), Stream()
    scheduler = serving(cache=tiered(store))
    scheduler.submit("a", words(2 * B + 1), 60, stop_at_eos=False)
    until(scheduler, lambda: len(keys_in(store)) == 2, stream)
    until(scheduler, lambda: len(stream.tokens.get("a", [])) == 10, stream)
    assert "a" not in stream.ended and len(keys_in(store)) == 2
    scheduler.close()


def test_without_saving_nothing_is_saved() -> None:
    store = MemoryStore()
    with serving(cache=tiered(store), save=False) as scheduler:
        submit(scheduler, [40], 4)
        to_the_end(scheduler)
    assert not keys_in(store) and not scheduler.counts["saves"]


def test_too_many_saves_are_dropped_and_the_answers_are_right() -> None:
    store = HungStore("put")
    scheduler = serving(cache=tiered(store), max_saves=2)
    expected = submit(scheduler, [40, 41, 42, 43, 44], 3)
    assert to_the_end(scheduler).tokens == expected
    assert scheduler.counts["saves"] == 5 and scheduler.counts["saves dropped"] == 3
    store.gate.set()
    assert all_pages_back(scheduler)
    assert len(keys_in(store)) == 4


def test_saves_that_have_not_begun_give_their_pages_up_when_they_are_needed() -> None:
    store = HungStore("put")
    scheduler, stream = serving(12, tiered(store)), Stream()
    for id in ("under way", "waits"):
        scheduler.submit(id, words(3 * B + 1, seed=len(id)), 1, stop_at_eos=False)
        to_the_end(scheduler, stream)
        until(scheduler, store.began.is_set)
    assert len(scheduler.pool.tables) == 2
    scheduler.submit("long", words(3 * B + 1), 70, stop_at_eos=False)
    to_the_end(scheduler, stream)
    assert stream.tokens["long"] == plain(words(3 * B + 1), 70)
    assert stream.ended["long"].preemptions == 0 and scheduler.counts["saves dropped"] >= 1
    assert not store.gate.is_set()
    store.gate.set()
    assert all_pages_back(scheduler)
    saved = keys_in(store)
    names = scheduler.cache.namespace if scheduler.cache else None
    assert names is not None and saved >= set(names.keys(words(3 * B + 1, seed=len("under way"))))
    assert not saved & set(names.keys(words(3 * B + 1, seed=len("waits"))))


def test_a_save_is_of_the_blocks_as_they_were_though_its_pages_are_used_again() -> None:
    """The save holds its pages: a pool that is full of other requests meanwhile cannot overwrite them."""
    store = MemoryStore()
    cache = tiered(store)
    scheduler, prompt = serving(10, cache), words(B + 3)
    scheduler.submit("a", prompt, 1, stop_at_eos=False)
    real, began, gate = cache.save, threading.Event(), threading.Event()

    def late(*arguments: Any) -> int:
        began.set()
        assert gate.wait(WAIT_S)
        return real(*arguments)

    cache.save = late  # type: ignore[method-assign]
    to_the_end(scheduler)
    until(scheduler, began.is_set)
    for i in range(6):
        scheduler.submit(str(i), words(5, seed=i), 100, stop_at_eos=False)
    to_the_end(scheduler)
    gate.set()
    scheduler.close()
    result = run(prompt, tiered(store))
    assert result.sources == {"store": B} and result.tokens == plain(prompt, 4)


@pytest.mark.parametrize("fails", ["put_many", "touch_many"])
def test_a_store_that_fails_costs_saves_and_no_answer(fails: str, caplog: pytest.LogCaptureFixture) -> None:
    def raises(*_: Any) -> Any:
        raise RuntimeError("a bug")

    store = MemoryStore()
    setattr(store, fails, raises)
    scheduler = serving(cache=tiered(store))
    expected = submit(scheduler, [40, 50, 60], 4)
    assert to_the_end(scheduler).tokens == expected
    assert all_pages_back(scheduler)
    assert scheduler.counts["saves failed"] == 3 and "a save failed" in caplog.text


def test_without_threads_nothing_is_saved_and_nothing_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tiered()
    scheduler = serving(cache=cache)

    def no_thread(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    assert scheduler._saver is not None
    monkeypatch.setattr(scheduler._saver._thread, "submit", no_thread)
    monkeypatch.setattr(cache._outer.readers, "submit", no_thread)
    expected = submit(scheduler, [40, 50], 4)
    assert to_the_end(scheduler).tokens == expected
    assert scheduler.counts["saves dropped"] == scheduler.counts["saves"] == 2
    assert all_pages_back(scheduler)


def test_close_waits_for_the_saves() -> None:
    store = HungStore("put")
    scheduler = serving(cache=tiered(store))
    submit(scheduler, [40, 50], 4)
    to_the_end(scheduler)
    closing = threading.Thread(target=scheduler.close, daemon=True)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    store.gate.set()
    closing.join(WAIT_S)
    assert not closing.is_alive() and len(keys_in(store)) == 2 + 3 and not scheduler.pool.tables


def test_a_second_try_is_not_a_second_request_that_needs_a_block() -> None:
    store = MemoryStore()
    scheduler = serving(9, at_once(tiered(store, write="selective")))
    expected = submit(scheduler, [30, 31, 17, 33], 50)
    assert to_the_end(scheduler).tokens == expected
    assert scheduler.counts["preemptions"] and all_pages_back(scheduler)
    assert not keys_in(store)


def test_saves_that_wait_for_a_store_that_hangs_do_not_keep_new_requests_out() -> None:
    store = HungStore("put")
    scheduler, stream = serving(12, tiered(store)), Stream()
    for i in range(6):
        scheduler.submit(str(i), words(3 * B + 1, seed=i), 1, stop_at_eos=False)
    to_the_end(scheduler, stream)
    assert stream.ended.keys() == set("012345") and not store.gate.is_set()
    store.gate.set()
    assert all_pages_back(scheduler)


def test_who_lacks_a_page_for_a_copy_waits_and_is_not_preempted_again_and_again() -> None:
    store, twice = HungStore(), words(2 * B)
    scheduler, stream = serving(8, tiered(store)), Stream()
    scheduler.submit("first", twice, 1)
    saver = scheduler._saver
    until(scheduler, lambda: "first" in stream.ended and saver is not None and not saver._saves, stream)
    store.hangs = {"put"}
    scheduler.submit("large", words(6 * B, seed=5), 1)
    until(scheduler, store.began.is_set, stream)
    scheduler.submit("again", twice, 4, stop_at_eos=False)
    for _ in range(50):
        stream.take(scheduler.step())
    assert "again" not in stream.tokens
    store.gate.set()
    to_the_end(scheduler, stream)
    assert stream.tokens["again"] == plain(twice, 4) and stream.ended["again"].preemptions == 0
