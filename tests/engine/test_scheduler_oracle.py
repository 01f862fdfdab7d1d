"""The oracle over the scheduler: in FP32, batched is as one by one, whatever is full, slow, lost or cancelled.

The suite runs combinations in which every two values of different settings meet once, each over some prompts, and
200 prompts in one run for the hardest few. `--all-tiers` runs 200 prompts with every combination of the list.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from kvlab.cache import DistributedKVCache
from kvlab.core.keys import KVSpec
from kvlab.engine import generate
from kvlab.engine import scheduler as module
from kvlab.engine.batch import forward
from kvlab.engine.pages import PagePool, PoolExhausted
from kvlab.engine.requests import Busy
from kvlab.engine.scheduler import Scheduler
from kvlab.engine.tiers import TieredCache
from kvlab.model import Llama
from kvlab.stores import MemoryStore, Store
from tests.engine.serving import Stream, all_pages_back, at_once, check, plain, serving, to_the_end
from tests.engine.test_generate import DownStore, LyingStore
from tests.engine.test_tiers import B, tiered, words
from tests.engine.test_tiers_oracle import VanishingStore, pairs_of

NEW = (2, 2, 40)  # how many tokens the clients want
MOST_PAGES = 9  # of one request: five blocks of prompt and answer, and a copy

SETTINGS: dict[str, tuple[Any, ...]] = {
    "pages": (MOST_PAGES, 30, 200),
    "page_tokens": (B, 4),
    "batch": (1, 4, 16),
    "chunk": (16, 37, 256),
    "store": ("memory", "down", "lies", "vanishes", "slow", "late"),
    "host": (0, 5, 100),
    "write": ("through", "back", "selective"),
    "exclusive": (False, True),
    "planner": (False, True),
    "wait_s": (None, 0),
    "max_saves": (1, 8),
}
Combination = dict[str, Any]


def pairwise() -> list[Combination]:
    """Few combinations with every pair of values: the best of some random ones, again and again. Seeded."""
    rng = random.Random(2)
    names = itertools.combinations(SETTINGS.items(), 2)
    missing = {((a, x), (b, y)) for (a, xs), (b, ys) in names for x in xs for y in ys}
    chosen: list[Combination] = []
    while missing:
        ((a, x), (b, y)) = rng.choice(sorted(missing, key=repr))
        tried = [{name: rng.choice(values) for name, values in SETTINGS.items()} | {a: x, b: y} for _ in range(60)]
        chosen.append(max(tried, key=lambda c: len(pairs_of(c) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen


class LateStore(MemoryStore):
    """Some calls take longer than its deadline, and some a little. Seeded."""

    deadline_s = 0.01

    def __init__(self, late: float) -> None:
        super().__init__()
        self.rng, self.late = random.Random(11), late

    def _wait(self) -> None:
        time.sleep(0.03 if self.rng.random() < self.late else 0.0005)

    def get_many(self, *arguments: Any) -> list[Any]:
        self._wait()
        return super().get_many(*arguments)

    def touch_many(self, keys: Sequence[bytes]) -> list[bool]:
        self._wait()
        return super().touch_many(keys)


def store_of(kind: str) -> Store:
    if kind == "lies":
        return LyingStore(seed=3)
    if kind in ("slow", "late"):
        return LateStore(0.1 if kind == "late" else 0.0)
    return {"memory": MemoryStore, "down": DownStore, "vanishes": VanishingStore}[kind]()


def prompts(count: int, seed: int = 7) -> list[list[int]]:
    """Shared beginnings, repeats, and lengths around the edges of blocks."""
    rng = random.Random(seed)
    beginnings = [words(blocks * B, seed=100 + i) for i, blocks in enumerate((3, 3, 2, 1, 0))]
    tails = [words(n, seed=200 + n) for n in (1, 2, 15, 16, 17, 40)]
    return [[*rng.choice(beginnings), *rng.choice([*tails, [], words(5, seed=i)])] or [i % 97] for i in range(count)]


def oracle(c: Combination, count: int) -> Scheduler:
    """Serve prompts that arrive by and by; every answer is the one that the prompt gets alone."""
    rng = random.Random(count)
    store = store_of(c["store"])
    blocks = {"host": c["host"], **{name: c[name] for name in ("write", "exclusive", "planner", "wait_s")}}
    cache = tiered(store, blocks=blocks.pop("host"), **blocks)
    per_page = B // c["page_tokens"]
    scheduler = serving(
        c["pages"] * per_page,
        cache,
        c["page_tokens"],
        max_batch=c["batch"],
        max_step_tokens=c["chunk"],
        max_saves=c["max_saves"],
    )
    stream, expected = Stream(), {}
    for i, prompt in enumerate(prompts(count)):
        new = NEW[i % len(NEW)]
        scheduler.submit(str(i), prompt, new, stop_at_eos=False)
        expected[str(i)] = plain(prompt, new)
        for _ in range(rng.choice([0, 0, 0, 1, 3])):
            stream.take(scheduler.step())
            check(scheduler)
    to_the_end(scheduler, stream)
    assert stream.tokens == expected
    for id, record in stream.ended.items():
        assert record.sources.total() == record.prompt_tokens and min(record.sources.values()) > 0, id
        assert record.sources.keys() <= {"computed", "device", "host", "store"}
    hits = sum(record.sources["device"] for record in stream.ended.values())
    assert hits <= B * scheduler.pool.counts["hits"] or scheduler.counts["preemptions"]
    assert all_pages_back(scheduler)
    cache.close()
    return scheduler


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "combination" in metafunc.fixturenames:
        metafunc.parametrize("combination", pairwise(), ids=lambda c: "-".join(map(str, c.values())))


def test_no_combination_of_settings_and_faults_changes_a_token(
    combination: Combination, request: pytest.FixtureRequest
) -> None:
    oracle(combination, 200 if request.config.getoption("--all-tiers") else 24)


HARD = {
    "pages": MOST_PAGES + 3,
    "page_tokens": B,
    "batch": 16,
    "chunk": 37,
    "host": 5,
    "planner": True,
    "wait_s": None,
    "max_saves": 2,
}


@pytest.mark.parametrize(
    ("store", "write", "exclusive"),
    [("memory", "through", False), ("lies", "back", True), ("late", "selective", False), ("vanishes", "back", True)],
)
def test_200_prompts_with_preemption_and_faults_are_as_one_by_one(store: str, write: str, exclusive: bool) -> None:
    scheduler = oracle({**HARD, "store": store, "write": write, "exclusive": exclusive}, 200)
    assert scheduler.counts["preemptions"] > 3


def test_the_oracle_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """KV that is written one page too far does change what comes out."""

    def wrong(model: Llama, pool: PagePool, rows: Any) -> torch.Tensor:
        logits = forward(model, pool, rows)
        pool.data[:, :, :, rows[0].table.pages[0], 0] += 1.0
        return logits

    monkeypatch.setattr(module, "forward", wrong)
    base = {name: values[-1] for name, values in SETTINGS.items()}
    with pytest.raises(AssertionError):
        oracle({**base, "store": "memory"}, 12)


def test_every_pair_of_values_meets() -> None:
    names = itertools.combinations(SETTINGS.items(), 2)
    every = {((a, x), (b, y)) for (a, xs), (b, ys) in names for x in xs for y in ys}
    assert set().union(*map(pairs_of, pairwise())) == every and len(pairwise()) < 40


# --- anything, in any order ---------------------------------------------------------------------
class Account:
    """Random arrivals, cancellations and steps, with a second account of what every client has to get."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        store = store_of(rng.choice(["memory", "lies", "vanishes", "late"]))
        cache = tiered(
            store,
            blocks=rng.choice([0, 5, 100]),
            write=rng.choice(["through", "back", "selective"]),
            exclusive=rng.random() < 0.5,
            planner=rng.random() < 0.5,
            wait_s=rng.choice([None, 0, 0.002]),
        )
        batch = rng.choice([1, 3, 8])
        settings = {"max_batch": batch, "max_step_tokens": rng.choice([8, 40]), "max_waiting": 6}
        self.scheduler = serving(rng.randint(7, 11), cache, max_saves=rng.choice([1, 4]), **settings)
        self.stream = Stream()
        self.expected: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()
        self.seen: Counter[str] = Counter()

    def op(self) -> None:
        """One operation, then a check of everything."""
        do = self.rng.choice([self.submit, self.submit, self.cancel, *[self.step] * 6])
        do()
        check(self.scheduler)

    def submit(self) -> None:
        id, new = str(len(self.expected)), self.rng.choice([1, 30, 60])
        prompt = prompts(20)[self.rng.randrange(20)]
        try:
            self.scheduler.submit(id, prompt, new, stop_at_eos=False)
        except (Busy, PoolExhausted) as error:
            self.seen[type(error).__name__] += 1
            return
        self.expected[id] = plain(prompt, new)

    def cancel(self) -> None:
        """Of anybody, but seldom."""
        if self.expected and self.rng.random() < 0.5:
            id = self.rng.choice([*self.expected])
            running = id in self.scheduler._by_id
            assert self.scheduler.cancel(id) == running
            if running:
                self.cancelled.add(id)

    def step(self) -> None:
        self.stream.take(self.scheduler.step())

    def finish(self) -> None:
        """Serve the remainder; every client got the right tokens, or the first ones of them if it left."""
        to_the_end(self.scheduler, self.stream)
        assert self.stream.ended.keys() == self.expected.keys()
        for id, tokens in self.expected.items():
            got = self.stream.tokens[id]
            assert got == (tokens[: len(got)] if id in self.cancelled else tokens), id
            assert self.stream.ended[id].reason == ("cancelled" if id in self.cancelled else "length")
        self.seen += self.scheduler.counts
        self.seen["cancelled"] += len(self.cancelled)
        assert all_pages_back(self.scheduler)


def play(seeds: range, ops: int) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in seeds:
        account = Account(seed)
        for _ in range(ops):
            account.op()
        account.finish()
        seen += account.seen
    return seen


def test_random_arrivals_and_cancellations_lose_no_page_and_no_token(request: pytest.FixtureRequest) -> None:
    """With `--all-tiers`, 20,000 operations."""
    seen = play(range(8), 110)
    assert min(seen[name] for name in ("cancelled", "preemptions", "Busy", "PoolExhausted", "saves dropped")) > 0, seen
    if request.config.getoption("--all-tiers"):
        play(range(100, 140), 500)


# --- the model that ships -----------------------------------------------------------------------
def test_the_shipped_model_says_the_same_batched(model: Llama, spec: KVSpec, sample: list[int]) -> None:
    new, beginnings = 40, [sample[:130], sample[400:500]]
    ends = [sample[1000 + 9 * i : 1000 + 9 * i + length] for i, length in enumerate([1, 9, 40, 62, 7, 0])]
    asked = [[*beginnings[i % 2], *end] for i, end in enumerate(ends)]
    alone = [generate(model, prompt, new).tokens for prompt in asked]
    inner = DistributedKVCache(precision="fp32", store=MemoryStore(), model=spec)
    cache = at_once(TieredCache(inner, planner=False))
    preemptions = 0
    for attempt in range(2):
        with Scheduler(model, PagePool(model, 24, cache.namespace), cache, max_step_tokens=64) as scheduler:
            for i, prompt in enumerate(asked):
                scheduler.submit(str(i), prompt, new)
            stream = Stream()
            stream.take(scheduler.run())
            assert [stream.tokens[str(i)] for i in range(len(asked))] == alone
            used = sum((record.sources for record in stream.ended.values()), Counter[str]())
            assert used["device"] and bool(used["host"]) == bool(attempt)
            preemptions += scheduler.counts["preemptions"]
    assert preemptions
