"""Copies that run beside the engine, as on a GPU: lanes that copy nothing before somebody waits for them.

No GPU is slower than that. A buffer that is reused too early, or a place that is read too early, has other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from kvlab.core.precisions import Unholdable
from kvlab.engine import fetch as fetch_module
from kvlab.engine.fetch import Lanes
from kvlab.stores import MemoryStore
from tests.engine.test_tiers import MODEL, B, blank_kv, run, tiered, words

WINDOWS = 9
PROMPT = words(WINDOWS * B)


class SlowLane:
    """Does what was started inside of it when somebody waits."""

    inside: SlowLane | None = None

    def __init__(self, log: list[str]) -> None:
        self.started: list[Callable[[], None]] = []
        self.log, self.number, self.done, self.followed = log, 0, 0, 0

    def __enter__(self) -> None:
        SlowLane.inside = self

    def __exit__(self, *error: object) -> None:
        SlowLane.inside = None

    def follow(self) -> None:
        self.followed += 1

    def start(self, copy: Callable[[], None]) -> None:
        self.log.append("start")
        self.started.append(copy)

    def mark(self) -> Callable[[], None]:
        return partial(self._until, len(self.started))

    def wait(self) -> None:
        self._until(len(self.started))

    def _until(self, count: int) -> None:
        for copy in self.started[self.done : count]:
            self.log.append("arrive")
            copy()
        self.done = max(self.done, count)

    @property
    def pending(self) -> int:
        return len(self.started) - self.done


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SlowLane]]:
    log: list[str] = []
    both = [SlowLane(log), SlowLane(log)]
    real = fetch_module.from_parts

    def start(*copy: Any) -> None:
        assert SlowLane.inside is not None, "a copy outside of all lanes"
        SlowLane.inside.start(partial(real, *copy))

    monkeypatch.setattr(Lanes, "take", lambda self, device: list(both))
    monkeypatch.setattr(Lanes, "put", lambda self, device, idle: log.append(f"idle {sum(x.pending for x in idle)}"))
    monkeypatch.setattr(fetch_module, "from_parts", start)
    monkeypatch.setattr(fetch_module, "AHEAD_BYTES", 1)  # two windows, the least: buffers are used again and again
    yield both
    assert not any(lane.pending for lane in both), "a copy runs after the end"
    assert log[-1] == "idle 0"


@pytest.fixture
def stored() -> tuple[MemoryStore, torch.Tensor]:
    """A store with the blocks of the prompt, and their KV as it is loaded without lanes."""
    store = MemoryStore()
    run(PROMPT, tiered(store))
    kv = blank_kv(len(PROMPT))
    assert tiered(store).load(PROMPT, 0, len(PROMPT), kv) == len(PROMPT)
    return store, kv


def outs_of(kv: torch.Tensor) -> list[torch.Tensor]:
    return [kv[:, :, :, i * B : (i + 1) * B] for i in range(WINDOWS)]


def test_a_window_starts_before_the_one_before_it_has_arrived_and_no_buffer_is_reused_too_early(
    stored: tuple[MemoryStore, torch.Tensor], lanes: list[SlowLane]
) -> None:
    store, expected = stored
    cache, kv = tiered(store), blank_kv(len(PROMPT))
    with cache.fetch(cache.namespace.keys(PROMPT), ["store"] * WINDOWS, outs_of(kv)) as fetch:
        assert all(fetch.finish())
    assert torch.equal(kv, expected)
    log = lanes[0].log
    assert log == ["start", *["start", "arrive"] * (WINDOWS - 1), "arrive", "idle 0"], "one window ahead, never two"
    assert len(lanes[0].started) - len(lanes[1].started) == 1, "the lanes take turns"
    assert [lane.followed for lane in lanes] == [1, 1]


def test_what_the_engine_waits_for_a_copy_is_measured(
    stored: tuple[MemoryStore, torch.Tensor], lanes: list[SlowLane]
) -> None:
    cache, kv = tiered(stored[0]), blank_kv(len(PROMPT))
    fetch = cache.fetch(cache.namespace.keys(PROMPT), ["store"] * WINDOWS, outs_of(kv))
    fetch.finish()
    copies = [span for span in fetch.trace if span.stage == "copy"]
    assert sorted(span.window for span in copies) == sorted([*range(WINDOWS)] * 2), "begun, and waited for"
    tier, blocks, seconds = cache._outer.measured[-1]
    assert (tier, blocks) == ("store", WINDOWS)
    assert seconds == pytest.approx(fetch._received_s + sum(span.end - span.begin for span in copies))


def test_blocks_of_host_memory_are_given_back_after_they_were_copied(
    stored: tuple[MemoryStore, torch.Tensor], lanes: list[SlowLane], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, expected = stored
    cache, kv = tiered(store), blank_kv(len(PROMPT))
    cache.load(PROMPT, 0, len(PROMPT), blank_kv(len(PROMPT)))  # promotes them
    give_back = cache.host.give_back

    def all_copied(keys: list[bytes]) -> None:
        assert not any(lane.pending for lane in lanes)
        give_back(keys)

    monkeypatch.setattr(cache.host, "give_back", all_copied)
    with cache.fetch(cache.namespace.keys(PROMPT), ["host"] * WINDOWS, outs_of(kv)) as fetch:
        assert all(fetch.filled)
        assert torch.equal(kv, expected), "before `finish`: nothing else is waited for"
        begun = len(range(0, WINDOWS, cache._outer.window))
        assert [span.stage for span in fetch.trace] == ["copy"] * (begun + 1), "begun, and waited for"


def test_after_the_end_of_a_fetch_that_is_given_up_nothing_is_written(
    stored: tuple[MemoryStore, torch.Tensor], lanes: list[SlowLane]
) -> None:
    cache, kv = tiered(stored[0]), blank_kv(len(PROMPT))
    with cache.fetch(cache.namespace.keys(PROMPT), ["store"] * WINDOWS, outs_of(kv)) as fetch:
        while fetch._copied < 3:
            fetch.poll()
        assert lanes[0].pending + lanes[1].pending == 1
    late = kv.clone()
    assert sum(fetch.filled) >= 3 and not any(lane.pending for lane in lanes)
    torch.testing.assert_close(kv, late, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_copy_that_fails_leaves_nothing_running(
    error: type[BaseException],
    stored: tuple[MemoryStore, torch.Tensor],
    lanes: list[SlowLane],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, kv, start = tiered(stored[0]), blank_kv(len(PROMPT)), fetch_module.from_parts
    copies = iter(range(WINDOWS))

    def fails(*copy: Any) -> None:
        if next(copies) == 4:
            raise error
        start(*copy)

    monkeypatch.setattr(fetch_module, "from_parts", fails)
    with (
        pytest.raises(error),
        cache.fetch(cache.namespace.keys(PROMPT), ["store"] * WINDOWS, outs_of(kv)) as fetch,
    ):
        fetch.finish()
    assert fetch.filled == [True] * 4 + [False] * 5


def test_a_block_that_the_dtype_cannot_hold_is_a_miss_and_the_others_arrive(
    stored: tuple[MemoryStore, torch.Tensor], lanes: list[SlowLane], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, kv, start = tiered(stored[0]), blank_kv(len(PROMPT)), fetch_module.from_parts
    copies = iter(range(WINDOWS))

    def too_large(*copy: Any) -> None:
        if next(copies) == 2:
            raise Unholdable
        start(*copy)

    monkeypatch.setattr(fetch_module, "from_parts", too_large)
    with cache.fetch(cache.namespace.keys(PROMPT), ["store"] * WINDOWS, outs_of(kv)) as fetch:
        assert fetch.finish() == [True, True, False, *[True] * 6]
    assert kv[:, :, :, 2 * B : 3 * B].isnan().all()


def test_tokens_are_the_same(stored: tuple[MemoryStore, torch.Tensor], lanes: list[SlowLane]) -> None:
    plain, cache = run(PROMPT), tiered(stored[0])
    for tier in ("store", "host"):
        found = run(PROMPT, cache)
        assert found.tokens == plain.tokens and found.sources == {tier: len(PROMPT) - 1}


def test_a_cpu_has_no_lanes_and_a_pool_of_lanes_gives_the_same_ones_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "Lane", lambda device: SlowLane([]))
    pool, gpu = Lanes(), torch.device("cuda", 0)
    assert pool.take(MODEL.device) == []
    first, second = pool.take(gpu), pool.take(gpu)
    assert len({id(lane) for lane in first + second}) == 2 * fetch_module.LANES
    pool.put(gpu, first)
    assert pool.take(gpu) is first
