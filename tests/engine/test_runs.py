"""Free pages as runs: what is taken and put back, and which run is chosen."""

from __future__ import annotations

import random

from kvlab.engine.runs import Runs


def pages_in(free: Runs) -> list[int]:
    return sorted(page for first, n in free.lengths.items() for page in range(first, first + n))


def test_the_smallest_run_that_fits_is_cut() -> None:
    free = Runs(20)
    assert free.take(20) == list(range(20))
    free.put([1, 2, 3, 6, 7, 10, 11, 12, 13])
    assert free.take(2) == [6, 7]
    assert free.take(3) == [1, 2, 3]
    assert free.take(3) == [10, 11, 12]
    assert pages_in(free) == [13]


def test_the_neighbours_of_a_page_come_first() -> None:
    free = Runs(20)
    free.take(20)
    free.put([4, 5, 9])
    assert free.take(1, after=3) == [4]
    assert free.take(2, after=8) == [9, 5], "as far as they reach"


def test_the_longest_runs_are_cut_up_if_none_is_long_enough() -> None:
    free = Runs(20)
    free.take(20)
    free.put([1, 4, 5, 6, 9, 10])
    assert free.take(5) == [4, 5, 6, 9, 10]


def test_what_is_put_back_joins_its_neighbours_in_any_order() -> None:
    rng = random.Random(0)
    for _ in range(200):
        free, held = Runs(30), []
        for _ in range(60):
            if free.total and rng.random() < 0.6:
                held += free.take(rng.randint(1, free.total), after=rng.randint(-1, 29))
            else:
                rng.shuffle(held)
                back, held = held[: len(held) // 2], held[len(held) // 2 :]
                free.put(back)
            assert sorted(pages_in(free) + held) == list(range(30)) and free.total == 30 - len(held)
            ends = {first + n for first, n in free.lengths.items()}
            assert not ends & free.lengths.keys(), "two runs are neighbours"
