"""Timing in rounds: medians over the rounds are compared, never single times.

Machines are shared and noisy. In each round every contender runs once, so that all contenders meet
the same noise. Ratios are therefore more stable than times. The first contender runs under two
names. If the medians of the two differ by more than 10 %, the measurement is marked as noisy; if the
rounds of one contender differ by more than half, as unsteady.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NOISY_BEYOND = 0.10
UNSTEADY_BEYOND = 1.5


@dataclass(frozen=True)
class Timings:
    """Seconds of each contender, one value per round, and the A/A ratio of the first contender to itself."""

    seconds: Mapping[str, list[float]]
    aa_ratio: float

    @property
    def noisy(self) -> bool:
        """Whether two measurements of the same work differ by more than 10 %."""
        return abs(self.aa_ratio - 1) > NOISY_BEYOND

    @property
    def swing(self) -> float:
        """Upper quartile of the rounds by lower quartile, for the contender where it is highest."""
        quartiles = [statistics.quantiles(rounds, n=4, method="inclusive") for rounds in self.seconds.values()]
        return max(upper / lower for lower, _, upper in quartiles)

    @property
    def unsteady(self) -> bool:
        """Whether the slower rounds of the same work took more than 1.5 times as long as the faster ones."""
        return self.swing > UNSTEADY_BEYOND

    def median_ms(self, name: str) -> float:
        """Median time of one contender in milliseconds."""
        return 1000 * statistics.median(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> float:
        """Time of `slow` divided by the time of `fast`: the median of the ratios per round."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return statistics.median(s / f for s, f in pairs)


def time_rounds(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int = 5,
    seconds_of: Callable[[Any], float] | None = None,
    enough: Callable[[], bool] | None = None,
) -> Timings:
    """Time each contender once per round, in a random order, after one round that is not counted.

    Args:
        seconds_of: takes what a contender returned, and returns its seconds; by default the whole call is timed.
        enough: asked after each round that counts; True ends the measurement with the rounds that there are.
    """
    first = next(iter(contenders))
    again = f"{first} again"
    work = {**contenders, again: contenders[first]}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    order, rng = list(work.items()), random.Random(0)
    for number in range(rounds + 1):
        rng.shuffle(order)  # a contender finds its predecessor's data in the processor's cache
        for name, run in order:
            begin = time.perf_counter()
            result = run()
            took = time.perf_counter() - begin
            if number:
                seconds[name].append(took if seconds_of is None else seconds_of(result))
        if number and enough is not None and enough():
            break
    aa = statistics.median(seconds[again]) / statistics.median(seconds[first])
    return Timings(seconds, aa)
