"""The simulator keeps its laws, and each law notices a simulator that breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from kvlab.lab import laws, simulate
from kvlab.lab.costs import Costs
from kvlab.lab.laws import LAWS, LawBroken
from kvlab.lab.replay import Setup
from kvlab.lab.routers import Running
from kvlab.lab.simulate import Job, Machine, Pipe
from kvlab.lab.traces import Request

Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("law", LAWS)
def test_the_simulator_keeps_the_law(law: str) -> None:
    LAWS[law](simulate.simulate)


# --- simulators that break one ------------------------------------------------------------------
def some_room_is_left(patch: pytest.MonkeyPatch) -> None:
    """A cache of no blocks has room for a few."""
    node = Setup.node
    patch.setattr(Setup, "node", lambda self: node(Setup(device=5) if self.device == 0 else self))


def hits_are_work(patch: pytest.MonkeyPatch) -> None:
    """What is there costs more than computing it."""
    prefill = Costs.prefill
    patch.setattr(Costs, "prefill", lambda self, tokens, past: prefill(self, tokens + 2 * past, 0))


def latency_ignores_hits(patch: pytest.MonkeyPatch) -> None:
    """The cache size changes the hits, and no latency (BLIS, pull request 1702)."""
    patch.setattr(simulate._World, "_past", lambda self, tokens, blocks: 0)


def latency_without_cause(patch: pytest.MonkeyPatch) -> None:
    """A larger cache is faster even where it finds no more."""
    init = simulate._World.__init__

    def slower(self: Any, block_tokens: int, setup: Setup, costs: Costs, *others: Any) -> None:
        extra = 1e-4 / (1 + (setup.device or 0))
        init(self, block_tokens, setup, replace(costs, prefill_s=costs.prefill_s + extra), *others)

    patch.setattr(simulate._World, "__init__", slower)


def bandwidth_upside_down(patch: pytest.MonkeyPatch) -> None:
    """Bytes are multiplied by the bandwidth."""
    patch.setattr(
        Pipe, "done_at", lambda self, now, size: max(now, self.free_at) + size * self.link.bytes_per_s * 1e-12
    )


def bandwidth_ignored(patch: pytest.MonkeyPatch) -> None:
    """A transfer takes its latency only."""
    patch.setattr(Pipe, "done_at", lambda self, now, size: max(now, self.free_at) + self.link.latency_s)


def time_built_in(patch: pytest.MonkeyPatch) -> None:
    """Each step takes a millisecond more, whatever the costs are."""
    wait = Machine._pass
    patch.setattr(Machine, "_pass", lambda self, seconds: wait(self, seconds + 1e-3))


def latency_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Transfers have no latency."""
    patch.setattr(Pipe, "done_at", lambda self, now, size: max(now, self.free_at) + size / self.link.bytes_per_s)


def first_token_from_the_cache(patch: pytest.MonkeyPatch) -> None:
    """A prompt that is all there costs nothing, though its last token must be computed."""
    patch.setattr(simulate._World, "_past", lambda self, tokens, blocks: min(blocks * self.block_tokens, tokens))


def no_queue(patch: pytest.MonkeyPatch) -> None:
    """Each request begins when it comes."""
    submit = Machine.submit

    def at_once(self: Machine, job: Job) -> None:
        self.now = job.request.at_s
        submit(self, job)

    patch.setattr(Machine, "submit", at_once)


def found_after_use(patch: pytest.MonkeyPatch) -> None:
    """A request is looked up when its blocks are already in the cache."""
    job = simulate._World._job

    def used_before(self: Any, number: int, request: Request, node: int) -> Job:
        self.caches[node].serve(request)
        return job(self, number, request, node)

    patch.setattr(simulate._World, "_job", used_before)


def work_lost(patch: pytest.MonkeyPatch) -> None:
    """A tenth of the work is not done."""
    wait = Machine._pass
    patch.setattr(Machine, "_pass", lambda self, seconds: wait(self, 0.9 * seconds))


def work_twice(patch: pytest.MonkeyPatch) -> None:
    """Long prefills are counted twice."""

    def run(self: Machine, job: Job, prefill: Any = Machine._prefill) -> Iterator[Any]:
        yield from prefill(self, job)
        self.busy_s += 1e-3 if job.compute > 500 else 0.0

    patch.setattr(Machine, "_prefill", run)


BREAKING: dict[str, tuple[Patch, ...]] = {
    "off is nothing": (some_room_is_left,),
    "hits never cost": (hits_are_work, latency_ignores_hits),
    "bandwidth never costs": (bandwidth_upside_down, bandwidth_ignored),
    "hits change latency": (latency_ignores_hits, latency_without_cause),
    "time scales": (time_built_in,),
    "alone is exact": (latency_forgotten, first_token_from_the_cache, time_built_in),
    "queue": (no_queue, work_lost),
    "replay agrees": (found_after_use,),
    "work is kept": (work_lost, work_twice, time_built_in),
}


@pytest.mark.parametrize(
    ("law", "breaks"), [(law, breaks) for law, some in BREAKING.items() for breaks in some],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)  # fmt: skip
def test_a_simulator_that_breaks_the_law_is_noticed(law: str, breaks: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Running, "__eq__", lambda self, other: True)  # so that only the law can notice
    breaks(monkeypatch)
    with pytest.raises(LawBroken, match="a law is broken"):
        LAWS[law](simulate.simulate)


def test_every_law_is_broken_on_purpose() -> None:
    assert BREAKING.keys() == LAWS.keys()


def test_requests_with_more_in_common_are_the_same_otherwise() -> None:
    less, more = laws.requests(3, shared=0.2), laws.requests(3, shared=0.9)
    assert [(r.at_s, r.tokens, r.new, len(r.blocks)) for r in less] == [
        (r.at_s, r.tokens, r.new, len(r.blocks)) for r in more
    ]
    assert all(-(-r.tokens // laws.B) == len(r.blocks) for r in more)
