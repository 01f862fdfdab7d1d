"""How this project measures: contenders run in rounds, and medians are compared, never single times.

Machines are shared and noisy. In a round every contender runs once, so all of them meet the same
noise, and ratios hold where times do not. The first contender runs under two names; where the two
disagree by more than 10 %, the measurement calls itself noisy.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

NOISY_BEYOND = 0.10


@dataclass(frozen=True)
class Timings:
    """Seconds of each contender, one number a round, and the A/A ratio: the first contender against itself."""

    seconds: Mapping[str, list[float]]
    aa_ratio: float

    @property
    def noisy(self) -> bool:
        """Whether the same work differed from itself by more than 10 %."""
        return abs(self.aa_ratio - 1) > NOISY_BEYOND

    def median_ms(self, name: str) -> float:
        """Median milliseconds of one contender."""
        return 1000 * statistics.median(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> float:
        """How many times faster `fast` is than `slow`: the median of the ratios of each round."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return statistics.median(s / f for s, f in pairs)


def time_rounds(contenders: Mapping[str, Callable[[], object]], rounds: int = 5) -> Timings:
    """Time each contender once a round, in an order that changes from round to round, after one uncounted round."""
    first = next(iter(contenders))
    again = f"{first} again"
    work = {**contenders, again: contenders[first]}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    order, rng = list(work.items()), random.Random(0)
    for number in range(rounds + 1):
        rng.shuffle(order)  # what one leaves in the processor's cache, the next one finds
        for name, run in order:
            begin = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    aa = statistics.median(seconds[again]) / statistics.median(seconds[first])
    return Timings(seconds, aa)
