"""Bootstrap intervals: of what was drawn together, and as wide as the groups differ."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvlab.errors import InputError
from kvlab.lab.intervals import interval

RNG = random.Random(0)


def test_an_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    covered = 0
    for trial in range(200):
        rng = random.Random(trial)
        low, high = interval(np.mean, [rng.gauss(5, 2) for _ in range(60)], groups=range(60), draws=200)
        covered += low <= 5 <= high
    assert 175 <= covered <= 199


def test_groups_are_drawn_whole() -> None:
    """Sixty requests of three conversations say as much as three numbers do."""
    values = [float(group) for group in range(3) for _ in range(20)]
    single = interval(np.mean, values, groups=range(60))
    whole = interval(np.mean, values, groups=[int(value) for value in values])
    assert whole == (0.0, 2.0) and single[1] - single[0] < 0.6


def test_two_settings_of_the_same_requests_are_drawn_together() -> None:
    slow = [RNG.lognormvariate(0, 2) for _ in range(50)]
    fast = [value / 3 for value in slow]

    def ratio(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean(a) / np.mean(b))

    low, high = interval(ratio, slow, fast, groups=range(50))
    assert low == pytest.approx(3) == high


def test_a_seed_gives_one_interval_and_more_confidence_a_wider_one() -> None:
    values = [RNG.random() for _ in range(40)]
    assert interval(np.mean, values, groups=range(40)) == interval(np.mean, values, groups=range(40))
    narrow = interval(np.mean, values, groups=range(40), confidence=0.5)
    wide = interval(np.mean, values, groups=range(40), confidence=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_bad_input_is_refused() -> None:
    for values, groups in (([], []), ([1.0], []), ([1.0, 2.0], [1])):
        with pytest.raises(InputError, match="a group for each value"):
            interval(np.mean, values, groups=groups)
    with pytest.raises(InputError, match="a group for each value"):
        interval(np.mean, groups=[1])
