"""How sure a measured number is: bootstrap intervals over what was repeated.

Requests of one conversation are alike, so whole conversations are drawn, not single requests. Two settings that served
the same requests are drawn together: what both had to bear alike does not count as a difference.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, percentile intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvlab.errors import InputError

Values = NDArray[np.float64]


def interval(
    statistic: Callable[..., Any],
    *values: Sequence[float],
    groups: Sequence[Hashable],
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the interval in which a statistic lies for most draws of the groups.

    Args:
        statistic: a number from arrays, one for each of `values`, all of the same length.
        values: a number for each request; several sequences belong to the same requests in the same order.
        groups: of each request, for example its conversation.

    Raises:
        InputError: there are no values, or not as many as groups.

    >>> interval(np.mean, [1.0, 1.0, 4.0, 4.0], groups=["a", "a", "b", "b"])
    (1.0, 4.0)
    """
    if not groups or not values or any(len(own) != len(groups) for own in values):
        raise InputError(f"expected a group for each value, got {len(groups)} groups for {[*map(len, values)]} values")
    arrays = [np.asarray(own, float) for own in values]
    members: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    places = [np.asarray(own) for own in members.values()]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        drawn = np.concatenate([places[i] for i in rng.integers(len(places), size=len(places))])
        found.append(float(statistic(*(own[drawn] for own in arrays))))
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
