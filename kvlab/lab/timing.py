"""How this project measures: the things to compare take turns, and medians are compared, never single times.

Machines are shared and noisy. Work done in turns sees the same noise, so ratios hold where
times do not. The first contender is measured twice under two names; if the two disagree by
more than 10 %, the run calls itself noisy.
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
    """Seconds of each contender, in order of the repeats, and the A/A ratio of the first one with itself."""

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
        """How many times faster `fast` is than `slow`: the median of the ratios turn by turn."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return statistics.median(s / f for s, f in pairs)


def time_rounds(contenders: Mapping[str, Callable[[], object]], repeats: int = 5) -> Timings:
    """Time each contender `repeats` times, turn by turn, after one uncounted round, in a new order each turn."""
    first = next(iter(contenders))
    again = f"{first} again"
    work = {**contenders, again: contenders[first]}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    order, rng = list(work.items()), random.Random(0)
    for turn in range(repeats + 1):
        rng.shuffle(order)  # who comes after whom matters: what one leaves in the processor's cache, the next finds
        for name, run in order:
            begin = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    aa = statistics.median(seconds[again]) / statistics.median(seconds[first])
    return Timings(seconds, aa)
