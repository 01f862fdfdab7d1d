"""The oracle over tiers: in FP32, no combination of tiers, settings and faults changes a token.

The suite runs combinations in which every two values of different settings meet once. `--all-tiers` runs all.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest

from kvlab.cache import DistributedKVCache
from kvlab.engine import generate
from kvlab.engine.pages import PagePool
from kvlab.engine.tiers import TieredCache
from kvlab.stores import MemoryStore, Store, WriteBehind
from tests.engine.test_generate import DownStore, LyingStore
from tests.harness.helpers import attentive_model

MODEL = attentive_model()
B, NEW, REQUESTS = 16, 6, 14
BLOCK_BYTES = 4 * B * 2 * 2 * 2 * 16

SETTINGS: dict[str, tuple[Any, ...]] = {
    "device": (0, 12, 60),  # pages of a pool that remembers; 0: none
    "host": (0, 5, 100),  # blocks
    "store": ("memory", "down", "lies", "behind", "vanishes"),
    "write": ("through", "back", "selective"),
    "exclusive": (False, True),
    "planner": (False, True),
    "wait_s": (None, 0),
    "window": (1, 1 << 20),
    "compress": (False, True),
}
Combination = dict[str, Any]


def combinations() -> Iterator[Combination]:
    """All that make sense: exclusive tiers need a device tier."""
    for values in itertools.product(*SETTINGS.values()):
        combination = dict(zip(SETTINGS, values, strict=True))
        if combination["device"] or not combination["exclusive"]:
            yield combination


def pairs_of(combination: Combination) -> set[Any]:
    return set(itertools.combinations(combination.items(), 2))


def pairwise() -> list[Combination]:
    """Few combinations with every pair of values. Greedy; seeded."""
    every = [*combinations()]
    random.Random(0).shuffle(every)
    missing = set().union(*map(pairs_of, every))
    chosen = []
    while missing:
        best = max(every, key=lambda c: len(pairs_of(c) & missing))
        chosen.append(best)
        missing -= pairs_of(best)
    return chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "combination" in metafunc.fixturenames:
        chosen = [*combinations()] if metafunc.config.getoption("--all-tiers") else pairwise()
        metafunc.parametrize("combination", chosen, ids=lambda c: "-".join(map(str, c.values())))


class VanishingStore(MemoryStore):
    """Loses a random half of what it has before every third read. Seeded."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(5)

    def get_many(self, *arguments: Any) -> list[Any]:
        if self.rng.random() < 0.3:
            self.delete_many([key for key in self._entries if self.rng.random() < 0.5])
        return super().get_many(*arguments)


def store_of(kind: str) -> Store:
    kinds = {"memory": MemoryStore, "down": DownStore, "vanishes": VanishingStore}
    if kind == "lies":
        return LyingStore(seed=3)
    return WriteBehind(MemoryStore()) if kind == "behind" else kinds[kind]()


def prompts() -> list[list[int]]:
    """Requests with shared beginnings, repeats, and lengths around the edges of blocks."""
    rng = random.Random(7)
    beginnings = [rng.choices(range(97), k=3 * B) for _ in range(2)]
    texts = [[*rng.choice(beginnings), *rng.choices(range(97), k=length)] for length in (0, 1, 15, 16, 17, 40, 5)]
    return [texts[rng.randrange(len(texts))] for _ in range(REQUESTS)]


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    return [generate(MODEL, prompt, NEW, stop_at_eos=False).tokens for prompt in prompts()]


def run(c: Combination, plain: list[list[int]]) -> None:
    with store_of(c["store"]) as store:
        inner = DistributedKVCache(precision="fp32", compress=c["compress"], store=store, model=MODEL, block_tokens=B)
        settings = {name: c[name] for name in ("write", "exclusive", "planner", "wait_s")}
        cache = TieredCache(inner, c["host"] * BLOCK_BYTES, window_bytes=c["window"], **settings)
        pool = PagePool(MODEL, c["device"], cache.namespace) if c["device"] else None
        for prompt, expected in zip(prompts(), plain, strict=True):
            result = generate(MODEL, prompt, NEW, cache, stop_at_eos=False, pool=pool)
            assert result.tokens == expected, result
            cache.host.check_integrity()
            cache.stats().check()
            if pool is not None:
                pool.check_integrity()
                assert not pool.tables
        cache.close()


def test_no_combination_of_tiers_changes_a_token(combination: Combination, plain: list[list[int]]) -> None:
    run(combination, plain)


def test_the_oracle_can_fail(plain: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A host tier that mixes up its blocks does change what comes out."""
    from kvlab.engine.host import HostBlocks

    def borrow(host: HostBlocks, key: bytes) -> Any:
        host._policy.pin(key)
        return host._view(min(host._row_of.values()))

    monkeypatch.setattr(HostBlocks, "borrow", borrow)
    base = {name: values[0] for name, values in SETTINGS.items()}
    with pytest.raises(AssertionError):
        run({**base, "host": 100}, plain)


def test_every_pair_of_values_meets() -> None:
    assert len(pairwise()) < 40
    assert set().union(*map(pairs_of, pairwise())) == set().union(*map(pairs_of, combinations()))
