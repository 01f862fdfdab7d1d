"""The exercises of notebook 10, benchmarks: from when a latency counts, percentiles, hit rates, an interval."""

from __future__ import annotations

import random

import numpy as np

from kvlab.course.exercises.engine import Exercise, Wrong
from kvlab.course.minikv import hit_rates, open_loop, percentile, ratio_interval


# --- open_loop ----------------------------------------------------------------------------------
def _loop_from_send(due: list[float], service: list[float], slots: int) -> list[float]:
    return list(service)


def _loop_one_slot(due: list[float], service: list[float], slots: int) -> list[float]:
    return open_loop(due, service, 1)


def _loop_in_turn(due: list[float], service: list[float], slots: int) -> list[float]:
    free, latencies = [0.0] * slots, []
    for i, (at, took) in enumerate(zip(due, service)):
        free[i % slots] = max(free[i % slots], at) + took
        latencies.append(free[i % slots] - at)
    return latencies


def _loop_never_idle(due: list[float], service: list[float], slots: int) -> list[float]:
    free, latencies = [0.0] * slots, []
    for at, took in zip(due, service):
        first = free.index(min(free))
        free[first] += took
        latencies.append(free[first] - at)
    return latencies


def _loop_ends(due: list[float], service: list[float], slots: int) -> list[float]:
    return [at + latency for at, latency in zip(due, open_loop(due, service, slots))]


def _loop_waits(due: list[float], service: list[float], slots: int) -> list[float]:
    return [latency - took for latency, took in zip(open_loop(due, service, slots), service)]


def _loop_shared(due: list[float], service: list[float], slots: int) -> list[float]:
    return open_loop(due, [took / slots for took in service], 1)


OPEN_LOOP = Exercise(
    name="open_loop",
    number="10.1",
    difficulty=3,
    reference=open_loop,
    cases=(
        ([0, 20, 40, 60], [5, 50, 5, 5], 1),
        ([0, 20, 40, 60], [5, 50, 5, 5], 2),
        ([0, 100], [10, 10], 1),
        ([0, 0, 0, 0], [30, 5, 5, 5], 2),
        ([10, 20, 30], [40, 1, 1], 1),
        ([0, 1, 2, 3, 4, 5], [9.5, 8.0, 7.0, 1.5, 1.0, 6.0], 3),
        ([], [], 4),
    ),
    wrong=(
        Wrong(_loop_from_send, "that is the time from the actual send; from when it was due on, the user waits too"),
        Wrong(_loop_one_slot, "with `slots` of 2 the second request does not wait for the first one"),
        Wrong(_loop_in_turn, "not in turn: the next request takes the slot that is free first"),
        Wrong(_loop_never_idle, "a slot that is free waits: nothing begins before it is due"),
        Wrong(_loop_ends, "that is when they end: subtract when they were due"),
        Wrong(_loop_waits, "a latency goes to the end of a request, its service included"),
        Wrong(_loop_shared, "two slots do not make a request faster: each still takes its whole service"),
    ),
    hint="keep when each slot is free; a request begins at max(free, due), ends `service` later, and counts from `due`",
    after="wrk2 was written for this clock: it plans the sends, and counts from the plan.",
)


# --- percentile ---------------------------------------------------------------------------------
def _pc_distinct(counts: dict[float, int], percent: float) -> float:
    return percentile(dict.fromkeys(counts, 1), percent)


def _pc_as_given(counts: dict[float, int], percent: float) -> float:
    total, seen = sum(counts.values()), 0
    for value in counts:
        seen += counts[value]
        if 100 * seen >= percent * total:
            break
    return value


def _pc_more_than(counts: dict[float, int], percent: float) -> float:
    total, seen = sum(counts.values()), 0
    for value in sorted(counts):
        seen += counts[value]
        if 100 * seen > percent * total:
            break
    return value


def _pc_one_too_far(counts: dict[float, int], percent: float) -> float:
    values = sorted(value for value, count in counts.items() for _ in range(count))
    return values[int(len(values) * percent / 100)]


def _pc_rounded_down(counts: dict[float, int], percent: float) -> float:
    values = sorted(value for value, count in counts.items() for _ in range(count))
    return values[int(len(values) * percent / 100) - 1]


def _pc_rounded(counts: dict[float, int], percent: float) -> float:
    values = sorted(value for value, count in counts.items() for _ in range(count))
    return values[round(len(values) * percent / 100) - 1]


def _pc_mean(counts: dict[float, int], percent: float) -> float:
    return sum(value * count for value, count in counts.items()) / sum(counts.values())


def _pc_between(counts: dict[float, int], percent: float) -> float:
    return float(np.percentile(np.repeat(list(counts), list(counts.values())), percent))


def _pc_share(counts: dict[float, int], percent: float) -> float:
    return percentile(counts, percent / 100)


def _pc_of_the_range(counts: dict[float, int], percent: float) -> float:
    return min(counts) + percent / 100 * (max(counts) - min(counts))


PERCENTILE = Exercise(
    name="percentile",
    number="10.2",
    difficulty=2,
    reference=percentile,
    cases=(
        ({20: 90, 400: 10}, 50),
        ({20: 90, 400: 10}, 90),
        ({20: 90, 400: 10}, 95),
        ({400: 10, 20: 90}, 50),
        ({1: 1, 2: 1, 3: 1, 4: 1}, 50),
        ({10: 1, 20: 98, 30: 1}, 99),
        ({10: 1, 20: 98, 30: 1}, 100),
        ({0.5: 2, 0.25: 2, 4.0: 1}, 75),
        ({5: 1}, 99),
        ({1: 1, 2: 1, 3: 1}, 50),
        ({1: 1, 2: 1, 3: 1, 4: 1, 5: 1}, 45),
    ),
    wrong=(
        Wrong(_pc_distinct, "a value counts as often as it came: add up the counts, not the values"),
        Wrong(_pc_as_given, "the values must be in order: a dict keeps the order in which its keys were added"),
        Wrong(_pc_more_than, "if exactly `percent` % of the values are <= a value, it is the one: >= and not >"),
        Wrong(_pc_one_too_far, "one place too far: of 100 values, 90 % are those at the indexes 0 to 89"),
        Wrong(_pc_rounded_down, "50 % of 3 values are 1.5 of them: two must be <= the answer, so round up"),
        Wrong(_pc_rounded, "45 % of 5 values are 2.25 of them: two are too few, so round up and not to the nearest"),
        Wrong(_pc_mean, "that is the mean, which may lie where no value is"),
        Wrong(_pc_between, "no mixture of two values: return one that came"),
        Wrong(_pc_share, "`percent` goes from 0 to 100, and the counts add up to a number of requests"),
        Wrong(_pc_of_the_range, "that is a place between the least value and the largest; how often they came counts"),
    ),
    hint="go through the values from the least on, add up their counts, stop once the sum is `percent` % of all",
    after="Histograms of two machines can be added, their percentiles cannot: that is why HdrHistogram keeps counts.",
)


# --- hit_rates ----------------------------------------------------------------------------------
def _rates_whole_blocks(requests: list[tuple[int, int]], block_tokens: int) -> dict[str, float]:
    full = [max(1, tokens // block_tokens) for tokens, _ in requests]
    found = [count for _, count in requests]
    shares = [count / most for count, most in zip(found, full)]
    rates = {"blocks": sum(found) / sum(full), "requests": sum(shares) / len(shares)}
    return hit_rates(requests, block_tokens) | rates


def _rates_tokens_by_blocks(requests: list[tuple[int, int]], block_tokens: int) -> dict[str, float]:
    tokens = sum(count * block_tokens for _, count in requests) / sum(tokens for tokens, _ in requests)
    return hit_rates(requests, block_tokens) | {"tokens": tokens}


def _rates_mixed_counts(requests: list[tuple[int, int]], block_tokens: int) -> dict[str, float]:
    full = sum(tokens // block_tokens for tokens, _ in requests)
    return hit_rates(requests, block_tokens) | {"full_blocks": sum(count for _, count in requests) / max(1, full)}


def _rates_any_hit(requests: list[tuple[int, int]], block_tokens: int) -> dict[str, float]:
    share = sum(count > 0 for _, count in requests) / len(requests)
    return hit_rates(requests, block_tokens) | {"requests": share}


def _rates_means(requests: list[tuple[int, int]], block_tokens: int) -> dict[str, float]:
    each = [hit_rates([request], block_tokens) for request in requests]
    return {name: sum(rates[name] for rates in each) / len(each) for name in each[0]}


def _rates_percent(requests: list[tuple[int, int]], block_tokens: int) -> dict[str, float]:
    return {name: 100 * rate for name, rate in hit_rates(requests, block_tokens).items()}


def _rates_of_the_misses(requests: list[tuple[int, int]], block_tokens: int) -> dict[str, float]:
    return {name: 1 - rate for name, rate in hit_rates(requests, block_tokens).items()}


def _rates_no_full_block(requests: list[tuple[int, int]], block_tokens: int) -> dict[str, float]:
    full = sum(tokens // block_tokens for tokens, _ in requests)
    found = sum(min(count, tokens // block_tokens) for tokens, count in requests)
    return hit_rates(requests, block_tokens) | {"full_blocks": found / full}


HIT_RATES = Exercise(
    name="hit_rates",
    number="10.3",
    difficulty=3,
    reference=hit_rates,
    cases=(
        ([(700, 1)], 512),
        ([(64, 1), (640, 0)], 64),
        ([(1040, 16), (140, 0), (300, 4)], 64),
        ([(100, 2)], 64),
        ([(100, 2), (200, 1)], 64),
        ([(30, 0), (128, 2)], 64),
        ([(30, 1), (20, 0)], 64),
    ),
    wrong=(
        Wrong(_rates_whole_blocks, "`blocks` counts a shorter last block like the others: round up"),
        Wrong(_rates_tokens_by_blocks, "a found last block may be shorter: no more tokens than the prompt has"),
        Wrong(_rates_mixed_counts, "`full_blocks` counts full blocks above and below: a found shorter one is none"),
        Wrong(_rates_any_hit, "`requests` is the mean of the shares of blocks, not how many found something"),
        Wrong(_rates_means, "only `requests` is a mean of shares; the others divide one sum by another"),
        Wrong(_rates_percent, "from 0 to 1, not in percent"),
        Wrong(_rates_of_the_misses, "that is the share of the misses"),
        Wrong(_rates_no_full_block, "there may be no full block at all; then the rate of full blocks is 0.0"),
    ),
    hint="found / all, each time in other units: blocks (the last one rounded up), tokens, full blocks; then the mean",
    after="Engines share full blocks only, so `full_blocks` at the engine's block size is what vLLM can reach.",
)


# --- ratio_interval -----------------------------------------------------------------------------
def _interval_once_each(
    a: list[float], b: list[float], groups: list[str], draws: list[list[str]]
) -> tuple[float, float]:
    return ratio_interval(a, b, groups, [sorted(set(drawn)) for drawn in draws])


def _interval_mean_of_ratios(
    a: list[float], b: list[float], groups: list[str], draws: list[list[str]]
) -> tuple[float, float]:
    return ratio_interval([x / y for x, y in zip(a, b)], [1.0] * len(a), groups, draws)


def _interval_whole_range(
    a: list[float], b: list[float], groups: list[str], draws: list[list[str]]
) -> tuple[float, float]:
    each = [ratio_interval(a, b, groups, [drawn])[0] for drawn in draws]
    return min(each), max(each)


def _interval_not_sorted(
    a: list[float], b: list[float], groups: list[str], draws: list[list[str]]
) -> tuple[float, float]:
    each = [ratio_interval(a, b, groups, [drawn])[0] for drawn in draws]
    cut = len(each) // 40
    return each[cut], each[-1 - cut]


def _interval_of_b_by_a(
    a: list[float], b: list[float], groups: list[str], draws: list[list[str]]
) -> tuple[float, float]:
    return ratio_interval(b, a, groups, draws)


def _interval_unpaired(
    a: list[float], b: list[float], groups: list[str], draws: list[list[str]]
) -> tuple[float, float]:
    return ratio_interval(a, [sum(b) / len(b)] * len(b), groups, draws)


def _interval_first_of_each(
    a: list[float], b: list[float], groups: list[str], draws: list[list[str]]
) -> tuple[float, float]:
    first = [groups.index(name) for name in dict.fromkeys(groups)]
    return ratio_interval([a[i] for i in first], [b[i] for i in first], [groups[i] for i in first], draws)


def _interval_five_at_each_end(
    a: list[float], b: list[float], groups: list[str], draws: list[list[str]]
) -> tuple[float, float]:
    each = sorted(ratio_interval(a, b, groups, [drawn])[0] for drawn in draws)
    cut = len(each) // 20
    return each[cut], each[-1 - cut]


def _interval_sliced(a: list[float], b: list[float], groups: list[str], draws: list[list[str]]) -> tuple[float, float]:
    each = sorted(ratio_interval(a, b, groups, [drawn])[0] for drawn in draws)
    cut = len(each) // 40
    kept = each[cut:-cut]
    return kept[0], kept[-1]


def _drawn(names: str, count: int) -> list[list[str]]:
    rng = random.Random(0)
    return [rng.choices(names, k=len(names)) for _ in range(count)]


RATIO_INTERVAL = Exercise(
    name="ratio_interval",
    number="10.4",
    difficulty=4,
    reference=ratio_interval,
    cases=(
        ([10.0, 30.0], [20.0, 20.0], ["p", "q"], [["p", "p"], ["p", "q"], ["q", "q"]]),
        ([10.0, 20.0, 90.0, 60.0], [20.0, 20.0, 30.0, 30.0], ["p", "p", "q", "q"], _drawn("pq", 8)),
        (
            [9.0, 8.0, 30.0, 31.0, 50.0, 4.0, 12.0, 77.0],
            [8.0, 8.0, 20.0, 25.0, 80.0, 5.0, 10.0, 40.0],
            ["p", "p", "q", "r", "r", "r", "s", "t"],
            _drawn("pqrst", 200),
        ),
        ([3.0, 5.0], [2.0, 2.0], ["p", "p"], [["p"]] * 50),
    ),
    wrong=(
        Wrong(_interval_once_each, "a group that was drawn twice counts twice"),
        Wrong(_interval_mean_of_ratios, "the ratio of the means, not the mean of the ratios of single requests"),
        Wrong(_interval_whole_range, "leave out 2.5 % of the ratios at each end: len(draws) // 40 of them"),
        Wrong(_interval_not_sorted, "put the ratios in order before you leave out the ends"),
        Wrong(_interval_of_b_by_a, "mean(a) ÷ mean(b), not the other way round"),
        Wrong(_interval_sliced, "where `cut` is 0, ratios[0:-0] is empty: use ratios[cut] and ratios[-1 - cut]"),
        Wrong(_interval_unpaired, "draw both together: from `b` the same requests as from `a`"),
        Wrong(_interval_first_of_each, "a drawn group brings all of its requests"),
        Wrong(_interval_five_at_each_end, "95 % inside leaves 2.5 % at each end, not 5 %"),
    ),
    hint="for each draw: all requests of its groups, as often as drawn; mean of `a` ÷ mean of `b`; sort; cut the ends",
    after="kvlab's table of strategies has such intervals (`kvlab.lab.intervals`), drawn by conversation.",
)
