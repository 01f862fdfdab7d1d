"""Continuous batching: who is in which step, what comes out when, what is written down, and what is refused."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab.engine import scheduler as module
from kvlab.engine.batch import Row, forward
from kvlab.engine.pages import PagePool, PoolExhausted
from kvlab.engine.requests import Busy
from kvlab.engine.scheduler import Scheduler
from kvlab.errors import ConfigError, InputError
from kvlab.model import Llama
from kvlab.stores import MemoryStore
from tests.engine.serving import Stream, all_pages_back, check, plain, serving, to_the_end, until
from tests.engine.test_tiers import MODEL, B, run, tiered, words
from tests.harness.helpers import FakeClock, attentive_model

Steps = list[dict[int, tuple[int, int]]]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """The rows of each step: where in its request each one starts and stops, by the number of its table."""
    seen: Steps = []

    def spy(model: Llama, pool: PagePool, rows: Sequence[Row]) -> Tensor:
        seen.append({id(row.table): (row.start, row.stop) for row in rows})
        return forward(model, pool, rows)

    monkeypatch.setattr(module, "forward", spy)
    return seen


# --- batching -----------------------------------------------------------------------------------
def test_requests_of_all_lengths_get_the_tokens_that_they_get_alone() -> None:
    scheduler = serving()
    prompts = [words(length, seed=length) for length in (1, 15, 16, 17, 40, 80)]
    for i, prompt in enumerate(prompts):
        scheduler.submit(str(i), prompt, 4 + i, stop_at_eos=False)
    stream = to_the_end(scheduler)
    assert stream.tokens == {str(i): plain(prompt, 4 + i) for i, prompt in enumerate(prompts)}
    assert {record.reason for record in stream.ended.values()} == {"length"}
    assert all_pages_back(scheduler)


def test_requests_join_and_leave_between_two_steps(steps: Steps) -> None:
    scheduler, stream = serving(), Stream()
    scheduler.submit("long", words(20), 12, stop_at_eos=False)
    until(scheduler, lambda: len(stream.tokens.get("long", [])) == 3, stream)
    scheduler.submit("short", words(5, seed=1), 4, stop_at_eos=False)
    until(scheduler, lambda: "short" in stream.ended, stream)
    assert len(stream.tokens["long"]) == 7
    to_the_end(scheduler, stream)
    assert [len(step) for step in steps] == [1] * 3 + [2] * 4 + [1] * 5
    assert stream.tokens == {"long": plain(words(20), 12), "short": plain(words(5, seed=1), 4)}


def test_at_most_max_batch_requests_are_worked_on_in_the_order_in_which_they_came(steps: Steps) -> None:
    scheduler = serving(max_batch=2)
    for i in range(5):
        scheduler.submit(str(i), words(10, seed=i), 3, stop_at_eos=False)
    stream = to_the_end(scheduler)
    assert max(map(len, steps)) == 2
    assert list(stream.ended) == list("01234")
    assert len(steps) == 9, "a place that is free is given away in the same step"


def test_the_steps_of_many_are_those_of_the_longest(steps: Steps) -> None:
    scheduler = serving()
    for i in range(8):
        scheduler.submit(str(i), words(10, seed=i), 5 + i, stop_at_eos=False)
    to_the_end(scheduler)
    assert len(steps) == scheduler.counts["steps"] == 12


def test_run_gives_out_the_same_as_the_steps() -> None:
    stream = Stream()
    with serving() as scheduler:
        for i in range(3):
            scheduler.submit(str(i), words(10, seed=i), 3, stop_at_eos=False)
        stream.take(scheduler.run())
    assert stream.tokens == {str(i): plain(words(10, seed=i), 3) for i in range(3)}
    assert list(scheduler.run()) == []


def test_a_step_with_nothing_to_do_does_nothing(steps: Steps) -> None:
    scheduler = serving()
    assert scheduler.step() == [] and scheduler.is_waiting and not steps and not len(scheduler)


# --- chunks -------------------------------------------------------------------------------------
def test_a_step_has_as_many_tokens_as_allowed_and_no_more(steps: Steps) -> None:
    scheduler = serving(max_batch=4, max_step_tokens=10)
    for i in range(3):
        scheduler.submit(str(i), words(35, seed=i), 6, stop_at_eos=False)
    stream = to_the_end(scheduler)
    sizes = [sum(stop - start for start, stop in step.values()) for step in steps]
    assert max(sizes) == 10 and sum(sizes) == 3 * (35 + 5)
    assert sizes[:10] == [10] * 10, "while there are prompts to compute"
    assert stream.tokens == {str(i): plain(words(35, seed=i), 6) for i in range(3)}


def test_answers_go_on_during_a_long_prompt(steps: Steps) -> None:
    scheduler, stream = serving(max_batch=2, max_step_tokens=8), Stream()
    scheduler.submit("talks", words(3), 30, stop_at_eos=False)
    until(scheduler, lambda: "talks" in stream.tokens, stream)
    scheduler.submit("long", words(100, seed=1), 1, stop_at_eos=False)
    before = len(stream.tokens["talks"])
    until(scheduler, lambda: "long" in stream.ended, stream)
    assert len(stream.tokens["talks"]) - before == -(-100 // 7), "one with every chunk of 7"
    assert stream.tokens["long"] == plain(words(100, seed=1), 1)


@pytest.mark.parametrize("chunk", [1, 7, 16, 17, 256])
def test_no_size_of_chunks_changes_a_token(chunk: int) -> None:
    scheduler = serving(max_batch=1, max_step_tokens=chunk)
    scheduler.submit("a", words(50), 4, stop_at_eos=False)
    assert to_the_end(scheduler).tokens["a"] == plain(words(50), 4)


# --- the end of an answer -----------------------------------------------------------------------
@pytest.mark.parametrize("at", [0, 3])
def test_an_answer_ends_with_eos_unless_told_otherwise(at: int) -> None:
    prompt = words(20, seed=2)
    expected = plain(prompt, 8)
    model = attentive_model(eos_token_ids=(96, expected[at]))
    scheduler = Scheduler(model, PagePool(model, 20))
    scheduler.submit("ends", prompt, 8)
    scheduler.submit("goes on", prompt, 8, stop_at_eos=False)
    stream = to_the_end(scheduler)
    assert stream.tokens["ends"] == expected[: expected.index(expected[at]) + 1]
    assert stream.tokens["goes on"] == expected
    assert [stream.ended[id].reason for id in ("ends", "goes on")] == ["eos", "length"]
    assert all_pages_back(scheduler)


def test_eos_as_the_last_token_allowed_is_eos() -> None:
    prompt = words(20, seed=2)
    model = attentive_model(eos_token_ids=(plain(prompt, 1)[0],))
    scheduler = Scheduler(model, PagePool(model, 20))
    assert scheduler.submit("a", prompt, 1).reason == ""
    assert to_the_end(scheduler).ended["a"].reason == "eos"


# --- records ------------------------------------------------------------------------------------
class Ticks:
    """A clock that is one second later each time it is asked."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_the_times_of_a_record_are_in_order() -> None:
    scheduler = serving(max_batch=1, clock=Ticks())
    records = [scheduler.submit(str(i), words(20, seed=i), 4, stop_at_eos=False) for i in range(2)]
    to_the_end(scheduler)
    for record in records:
        times = [record.submitted_at, record.admitted_at, *record.token_at]
        assert times == sorted(set(times)) and len(record.token_at) == 4
        assert record.finished_at == record.token_at[-1]
        assert record.first_token_at == record.token_at[0]
        assert record.queue_s == record.admitted_at - record.submitted_at
        assert record.ttft_s == record.first_token_at - record.submitted_at
        assert record.prefill_s > 0 and record.decode_s > 0 and record.probe_s == record.fetch_s == 0
    assert records[1].admitted_at > records[0].finished_at


def test_a_request_of_one_token_does_not_decode() -> None:
    scheduler = serving()
    record = scheduler.submit("a", words(20), 1)
    to_the_end(scheduler)
    assert record.prefill_s > 0 and record.decode_s == 0.0


def test_every_prompt_token_has_one_source() -> None:
    store, prompt = MemoryStore(), words(6 * B + 5)
    run(prompt, tiered(store))
    cache = tiered(store)
    scheduler = serving(cache=cache)
    scheduler.submit("device", prompt[: 2 * B + 1], 1)
    to_the_end(scheduler)
    for key in cache.namespace.keys(prompt)[:2]:
        cache.host.remove(key)
    cache.prefetch(cache.namespace.keys(prompt)[3:4], ["store"])
    until(scheduler, lambda: len(cache.host) == 1)
    mixed = scheduler.submit("mixed", prompt, 4, stop_at_eos=False)
    to_the_end(scheduler)
    assert mixed.sources == {"device": 32, "host": 16, "store": 48, "computed": 5}
    assert mixed.tokens == plain(prompt, 4)
    assert mixed.probe_s > 0 and mixed.fetch_s > 0
    assert (scheduler.pool.counts["requested"], scheduler.pool.counts["hits"]) == (2 + 6, 2)
    assert cache.stats().sources == {"store": 5, "host": 1}


def test_of_two_requests_with_the_same_cold_prefix_one_computes_it_and_the_other_waits_for_it() -> None:
    scheduler = serving(cache=tiered())
    prefix = words(3 * B)
    twins = [scheduler.submit(str(i), [*prefix, i], 4, stop_at_eos=False) for i in range(2)]
    to_the_end(scheduler)
    third = scheduler.submit("third", [*prefix, 7], 4, stop_at_eos=False)
    to_the_end(scheduler)
    assert [record.sources for record in (*twins, third)] == [{"computed": 49}, *[{"device": 48, "computed": 1}] * 2]
    assert [r.tokens for r in (*twins, third)] == [plain([*prefix, i], 4) for i in (0, 1, 7)]
    assert all_pages_back(scheduler)


def test_who_waits_for_a_prefix_computes_it_if_the_other_one_is_cancelled() -> None:
    scheduler = serving(cache=tiered(), max_step_tokens=16)
    prefix = words(3 * B)
    first, second = (scheduler.submit(str(i), [*prefix, i], 4, stop_at_eos=False) for i in range(2))
    scheduler.step()
    assert first.admitted_at and not second.admitted_at
    assert scheduler.cancel("0")
    to_the_end(scheduler)
    assert second.sources == {"computed": 49} and second.tokens == plain([*prefix, 1], 4)
    assert all_pages_back(scheduler)


@pytest.mark.parametrize(("shared", "together"), [(1, True), (2, False)])
def test_a_small_part_in_common_is_computed_twice_and_a_large_one_waited_for(shared: int, together: bool) -> None:
    """Three blocks each; of one in common the wait would be longer than the work."""
    scheduler = serving(cache=tiered(), max_step_tokens=16)
    ends = [words((3 - shared) * B, seed=seed) for seed in (5, 6)]
    first, second = (
        scheduler.submit(name, [*words(shared * B), *end, 7], 4, stop_at_eos=False)
        for name, end in zip("ab", ends, strict=True)
    )
    scheduler.step()
    assert first.admitted_at and bool(second.admitted_at) == together
    to_the_end(scheduler)
    assert second.sources["device"] == (0 if together else shared * B)


def test_a_cache_behind_a_pool_that_remembers_nothing_is_refused() -> None:
    cache = tiered()
    with pytest.raises(ConfigError, match="prefix_caching for a cache"):
        Scheduler(MODEL, PagePool(MODEL, 8, cache.namespace, prefix_caching=False), cache)


def test_without_prefix_caching_nobody_waits_for_a_prefix() -> None:
    names = tiered().namespace
    pool = PagePool(MODEL, 64, names, prefix_caching=False)
    with Scheduler(MODEL, pool, max_step_tokens=16) as scheduler:
        twins = [scheduler.submit(str(i), [*words(3 * B), i], 4, stop_at_eos=False) for i in range(2)]
        scheduler.step()
        assert all(record.admitted_at for record in twins)
        to_the_end(scheduler)
        assert [record.sources for record in twins] == [{"computed": 49}] * 2


@pytest.mark.parametrize("page_tokens", [4, B])
@pytest.mark.parametrize("exclusive", [False, True])
def test_of_a_prompt_that_is_wholly_shared_one_page_is_copied(page_tokens: int, exclusive: bool) -> None:
    cache = tiered(exclusive=exclusive)
    scheduler = serving(4 * B // page_tokens + 1, cache, page_tokens)
    prompt = words(3 * B)
    for id in ("first", "again"):
        record = scheduler.submit(id, prompt, 4, stop_at_eos=False)
        to_the_end(scheduler)
        assert record.tokens == plain(prompt, 4)
    assert record.sources == {"device": 47, "computed": 1}
    assert scheduler.pool.counts["copied"] == 1
    third = scheduler.submit("third", [*prompt, 5], 2, stop_at_eos=False)
    to_the_end(scheduler)
    assert third.tokens == plain([*prompt, 5], 2) and third.sources["device"] == 48, "the block is as it was"
    assert all_pages_back(scheduler)


def test_exclusive_tiers_keep_each_block_once() -> None:
    cache = tiered(exclusive=True)
    scheduler = serving(8, cache)
    first, second = words(4 * B + 1), words(5 * B + 1, seed=1)
    for id, prompt in (("a", first), ("b", second), ("c", first)):
        record = scheduler.submit(id, prompt, 1)
        to_the_end(scheduler)
        until(scheduler, lambda: scheduler._saver is not None and not scheduler._saver._saves)
        on_device, on_host = set(scheduler.pool.index.blocks), set(cache.host._row_of)
        assert not on_device & on_host
    assert on_device | on_host == {*cache.namespace.keys(first), *cache.namespace.keys(second)}
    assert record.sources["host"] and record.tokens == plain(first, 1)
    assert all_pages_back(scheduler)


def test_the_load_is_what_is_still_to_be_computed() -> None:
    scheduler = serving(max_batch=1, max_step_tokens=8)
    scheduler.submit("a", words(20), 5, stop_at_eos=False)
    scheduler.submit("b", words(10, seed=1), 1, stop_at_eos=False)
    loads = [scheduler.load]
    while len(scheduler):
        scheduler.step()
        loads.append(scheduler.load)
    assert loads == [34, 26, 18, 14, 13, 12, 11, 10, 2, 0]


# --- back-pressure ------------------------------------------------------------------------------
def test_one_request_too_many_is_refused_until_there_is_room() -> None:
    scheduler, stream = serving(max_batch=1, max_waiting=2), Stream()
    for i in range(2):
        scheduler.submit(str(i), words(5, seed=i), 2, stop_at_eos=False)
    with pytest.raises(Busy, match="2 requests are waiting"):
        scheduler.submit("2", words(5), 2)
    assert len(scheduler) == 2
    stream.take(scheduler.step())  # admits one
    scheduler.submit("2", words(5, seed=2), 2, stop_at_eos=False)
    with pytest.raises(Busy):
        scheduler.submit("3", words(5), 2)
    assert list(to_the_end(scheduler, stream).ended) == ["0", "1", "2"]


def test_who_was_refused_may_come_again_with_the_same_id() -> None:
    scheduler = serving(max_waiting=1)
    scheduler.submit("a", words(5), 1)
    with pytest.raises(Busy):
        scheduler.submit("b", words(5), 1)
    to_the_end(scheduler)
    scheduler.submit("b", words(5), 1)
    scheduler.cancel("b")
    scheduler.submit("a", words(5), 1)  # an id may come again after its request's end
    assert to_the_end(scheduler).ended.keys() == {"a", "b"}


# --- bad input ----------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [0, -1, 1.5, True, None, "8"])
@pytest.mark.parametrize("name", ["max_batch", "max_step_tokens", "max_waiting", "max_saves"])
def test_a_scheduler_of_no_size_is_refused(name: str, size: Any) -> None:
    pool = PagePool(MODEL, 8)
    with pytest.raises(ConfigError, match=f"expected {name} as a whole number of at least 1"):
        Scheduler(MODEL, pool, **{name: size})
    Scheduler(MODEL, pool)  # the pool is still free


def test_a_step_too_small_for_its_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_step_tokens of at least max_batch \(4\), got 3"):
        serving(max_batch=4, max_step_tokens=3)


def test_a_pool_and_a_cache_that_do_not_fit_are_refused() -> None:
    cache = tiered()
    for pool in (PagePool(MODEL, 8), PagePool(MODEL, 8, tiered(model=attentive_model(seed=1)).namespace)):
        with pytest.raises(ConfigError, match="a pool with its namespace"):
            Scheduler(MODEL, pool, cache)
    with pytest.raises(ConfigError, match="expected a TieredCache"):
        Scheduler(MODEL, PagePool(MODEL, 8, cache.namespace), cache.store)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "new", "said"),
    [
        ([], 1, "at least one token"),
        ([97], 1, r"tokens in 0 … 96, got 97"),
        ([-1], 1, "got -1"),
        ("text", 1, "sequence of tokens"),
        ([1.5], 1, "integer tokens"),
        ([[1, 2]], 1, "shape"),
        ([1] * 250, 7, "context is 256"),
        ([1], 0, "max_new_tokens as a whole number of at least 1, got 0"),
        ([1], -3, "got -3"),
        ([1], 2.0, "got 2.0"),
        ([1], True, "got True"),
    ],
)
def test_a_bad_request_is_refused_and_leaves_nothing(tokens: Any, new: Any, said: str) -> None:
    scheduler = serving()
    with pytest.raises(InputError, match=said):
        scheduler.submit("a", tokens, new)
    assert not len(scheduler) and scheduler.load == 0
    check(scheduler)
    scheduler.submit("a", [1, 2], 1)
    assert to_the_end(scheduler).tokens["a"] == plain([1, 2], 1)


def test_an_id_is_a_string_and_new() -> None:
    scheduler, stream = serving(max_batch=1), Stream()
    for i in range(2):
        scheduler.submit(str(i), words(5, seed=i), 3, stop_at_eos=False)
    stream.take(scheduler.step())
    for id in ("0", "1", 0, None, b"2", ["2"]):  # of one that runs, of one that waits, and no strings
        with pytest.raises(InputError, match="the id of a new request as a string"):
            scheduler.submit(id, words(5), 3)  # type: ignore[arg-type]
    assert to_the_end(scheduler, stream).tokens == {str(i): plain(words(5, seed=i), 3) for i in range(2)}


def test_a_pool_too_small_for_one_request_refuses_it_at_once() -> None:
    scheduler = serving(5)
    with pytest.raises(PoolExhausted, match="needs up to 6 pages, and the pool has 5"):
        scheduler.submit("a", words(60), 10)
    scheduler.submit("b", words(54), 10, stop_at_eos=False)  # the largest that it takes
    assert to_the_end(scheduler).tokens["b"] == plain(words(54), 10)


def test_a_pool_has_one_scheduler() -> None:
    first = serving()
    with pytest.raises(ConfigError, match="a pool that nobody uses"):
        Scheduler(MODEL, first.pool)
    pool = first.pool
    first.close()
    second = Scheduler(MODEL, pool)
    del first, second
    gc.collect()
    third = Scheduler(MODEL, pool)
    assert pool.owner is not None and pool.owner() is third
    with PagePool(MODEL, 8).new_table(capacity=1) as table, pytest.raises(ConfigError, match="nobody uses"):
        Scheduler(MODEL, table.pool)


def test_two_schedulers_of_one_model_do_not_disturb_each_other() -> None:
    cache = tiered()
    both = [serving(cache=cache), serving(cache=cache)]
    for i, scheduler in enumerate(both * 2):
        scheduler.submit(str(i), words(20, seed=i), 6, stop_at_eos=False)
    streams = [Stream(), Stream()]
    while any(map(len, both)):
        for scheduler, stream in zip(both, streams, strict=True):
            stream.take(scheduler.step())
            check(scheduler)
    tokens = {id: answer for stream in streams for id, answer in stream.tokens.items()}
    assert tokens == {str(i): plain(words(20, seed=i), 6) for i in range(4)}


def test_the_prompt_may_be_changed_after_it_was_handed_over() -> None:
    scheduler, prompt = serving(), words(20)
    scheduler.submit("a", prompt, 3, stop_at_eos=False)
    scheduler.submit("b", torch.tensor(prompt), 3, stop_at_eos=False)  # type: ignore[arg-type]
    prompt[:] = [0] * 20
    assert to_the_end(scheduler).tokens == dict.fromkeys("ab", plain(words(20), 3))


# --- close --------------------------------------------------------------------------------------
def test_close_cancels_what_is_under_way_and_gives_all_pages_back() -> None:
    scheduler = serving(max_batch=2, max_step_tokens=4)
    records = [scheduler.submit(str(i), words(20, seed=i), 9) for i in range(3)]
    for _ in range(3):
        scheduler.step()
    assert all_pages_back(scheduler)
    assert [record.reason for record in records] == ["cancelled"] * 3
    assert not len(scheduler) and scheduler.step() == []
    with pytest.raises(InputError, match="expected an open scheduler"):
        scheduler.submit("d", words(3), 1)
    scheduler.close()


def test_a_with_block_closes_also_when_its_body_raises() -> None:
    pool = PagePool(MODEL, 20)
    with pytest.raises(ZeroDivisionError), Scheduler(MODEL, pool) as scheduler:
        scheduler.submit("a", words(20), 9)
        scheduler.step()
        raise ZeroDivisionError
    assert not pool.tables and pool.owner is None


# --- how long blocks are kept -------------------------------------------------------------------
def test_a_request_says_how_long_its_blocks_are_kept() -> None:
    clock = FakeClock()
    store = MemoryStore(ttl_s=100, clock=clock)
    with tiered(store, write="back") as cache, serving(cache=cache) as scheduler:
        scheduler.submit("short", words(3 * B), 2, stop_at_eos=False, ttl_s=20)
        scheduler.submit("long", words(3 * B, seed=1), 2, stop_at_eos=False, ttl_s=500)
        to_the_end(scheduler)
        scheduler.close()
        keys = [cache.namespace.keys(words(3 * B, seed)) for seed in (0, 1)]
        for age, alive in ((0, [3, 3]), (21, [0, 3]), (400, [0, 3]), (80, [0, 0])):
            clock.now += age
            assert [store.probe(each) for each in keys] == alive


def test_a_ttl_that_cannot_be_kept_is_refused_at_once() -> None:
    with tiered(MemoryStore()) as cache, serving(cache=cache) as scheduler:
        for ttl_s, said in ((60, "a store with a TTL of its own"), (0, "a TTL")):
            with pytest.raises(ConfigError, match=said):
                scheduler.submit("a", words(20), 2, ttl_s=ttl_s)
        assert len(scheduler) == 0
    with serving() as scheduler, pytest.raises(ConfigError, match="ttl_s=60"):
        scheduler.submit("a", words(20), 2, ttl_s=60)
