"""Exceptions in a step: no token changes, no output is lost, no page leaks, and no store gets KV of a broken step."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kvlab.engine import fetch as fetch_module
from kvlab.engine import scheduler as module
from kvlab.engine.scheduler import Scheduler
from kvlab.stores import MemoryStore
from tests.engine.serving import Stream, all_pages_back, plain, serving, submit, to_the_end
from tests.engine.test_tiers import B, run, tiered, words


def test_a_model_that_fails_once_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, stream = serving(cache=tiered(), max_batch=2, max_step_tokens=16), Stream()
    expected = submit(scheduler, [40, 20, 30], 6)
    real, calls = module.forward, iter(range(1000))

    def sometimes(*arguments: Any) -> Any:
        if next(calls) % 3 == 1:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(module, "forward", sometimes)
    failures = 0
    while len(scheduler):
        try:
            stream.take(scheduler.step())
        except MemoryError:
            failures += 1
        scheduler.pool.check_integrity()
    assert failures > 3 and stream.tokens == expected
    assert all_pages_back(scheduler)


def test_an_exception_anywhere_in_a_step_changes_no_token_and_loses_no_output() -> None:
    """Ctrl-C may come anywhere. Here it comes whenever the clock is asked, once in each of many runs."""
    interrupted = 0
    for at in range(3, 40):
        calls = iter(range(1000))

        def clock(calls: Any = calls, at: int = at) -> float:
            if next(calls) == at:
                raise KeyboardInterrupt
            return time.perf_counter()

        scheduler, stream = serving(cache=tiered(), clock=clock), Stream()
        expected = submit(scheduler, [10, 20, 40], 6)
        for _ in range(2):
            try:
                to_the_end(scheduler, stream)
            except KeyboardInterrupt:
                interrupted += 1
        assert stream.tokens == expected and stream.ended.keys() == expected.keys()
        assert all_pages_back(scheduler)
    assert interrupted > 15


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("where", ["look-up", "plan", "copy", "the end of the prefill"])
def test_a_prefill_that_is_interrupted_starts_again_and_poisons_no_store(
    where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, prompt = MemoryStore(), words(4 * B + 1)
    run(prompt[: 2 * B + 1], tiered(store))
    cache = tiered(store)
    scheduler, stream = serving(cache=cache), Stream()
    owner, name = {
        "look-up": (cache, "locating"),
        "plan": (cache.planner, "plan"),
        "copy": (fetch_module, "from_parts"),
        "the end of the prefill": (cache.planner, "finished"),
    }[where]

    def raises(*_: Any) -> None:
        monkeypatch.undo()
        raise error

    monkeypatch.setattr(owner, name, raises)
    scheduler.submit("a", prompt, 4, stop_at_eos=False)
    with pytest.raises(error):
        to_the_end(scheduler, stream)
    to_the_end(scheduler, stream)
    assert stream.tokens["a"] == plain(prompt, 4)
    assert stream.ended["a"].sources.total() == len(prompt)
    assert all_pages_back(scheduler)
    assert cache.host._policy.pinned == 0
    result = run(prompt, tiered(store))
    assert (result.tokens, result.sources) == (plain(prompt, 4), {"store": 64}), "what was saved is right"


def test_an_interrupt_right_after_a_prefill_lets_it_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, stream, prompt = serving(cache=tiered(), max_batch=1, max_step_tokens=16), Stream(), words(40)
    scheduler.submit("a", prompt, 4, stop_at_eos=False)
    stream.take(scheduler.step())

    def raises(**_: int) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "Counter", raises)  # next used for the sources of the record
    with pytest.raises(KeyboardInterrupt):
        to_the_end(scheduler, stream)
    assert scheduler._active[0].job is not None
    to_the_end(scheduler, stream)
    assert stream.tokens["a"] == plain(prompt, 4) and stream.ended["a"].preemptions == 1
    assert all_pages_back(scheduler)


def test_an_admission_that_is_interrupted_loses_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, real, calls = serving(cache=tiered()), module.make_room, iter(range(9))

    def sometimes(*arguments: Any) -> None:
        real(*arguments)
        if next(calls) == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "make_room", sometimes)
    scheduler.submit("a", words(40), 1)
    with pytest.raises(KeyboardInterrupt):
        scheduler.step()
    assert not scheduler.pool.tables
    assert to_the_end(scheduler).tokens["a"] == plain(words(40), 1)
    assert all_pages_back(scheduler)


def test_to_close_a_second_time_takes_the_pool_from_nobody() -> None:
    first = serving()
    first.close()
    second = Scheduler(first.model, first.pool)
    first.close()
    assert first.pool.owner is not None and first.pool.owner() is second
