"""The exercises of notebook 06, three tiers: promotion, what to write, the time of a fetch, a front to compute."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from kvlab.course.exercises.engine import Exercise, Wrong
from kvlab.course.minikv import best_front, fetch_seconds, find_block, seen_twice

A, B, C, D = b"a", b"b", b"c", b"d"


# --- find_block ---------------------------------------------------------------------------------
def _what_is_found(result: Any, args: tuple[Any, ...]) -> Any:
    """What it returned, and host memory in its order; the store must stay as it is."""
    _, host, store, _ = args
    return [f"returned {result!r}", f"host, the oldest first: {list(host.items())}", f"store {sorted(store.items())}"]


def _find_without_promotion(key: bytes, host: dict[bytes, bytes], store: dict[bytes, bytes], room: int) -> Any:
    if key in host:
        host[key] = host.pop(key)
        return host[key]
    return store.get(key)


def _find_keeps_the_order(key: bytes, host: dict[bytes, bytes], store: dict[bytes, bytes], room: int) -> Any:
    return host[key] if key in host else find_block(key, host, store, room)


def _find_evicts_the_newest(key: bytes, host: dict[bytes, bytes], store: dict[bytes, bytes], room: int) -> Any:
    if key in host or key not in store:
        return find_block(key, host, store, room)
    while len(host) >= room:
        host.popitem()
    host[key] = store[key]
    return host[key]


def _find_without_eviction(key: bytes, host: dict[bytes, bytes], store: dict[bytes, bytes], room: int) -> Any:
    return find_block(key, host, store, room=len(host) + 1)


def _find_evicts_one(key: bytes, host: dict[bytes, bytes], store: dict[bytes, bytes], room: int) -> Any:
    if key not in host and key in store and len(host) >= room:
        del host[next(iter(host))]
        return find_block(key, host, store, room=len(host) + 1)
    return find_block(key, host, store, room)


def _find_evicts_for_a_hit(key: bytes, host: dict[bytes, bytes], store: dict[bytes, bytes], room: int) -> Any:
    if key in host and len(host) >= room:
        block = host.pop(key)
        host.pop(next(iter(host)), None)
        host[key] = block
        return block
    return find_block(key, host, store, room)


def _find_trims_for_a_hit(key: bytes, host: dict[bytes, bytes], store: dict[bytes, bytes], room: int) -> Any:
    block = find_block(key, host, store, room)
    while len(host) > room:
        del host[next(iter(host))]
    return block


def _find_asks_the_store_first(key: bytes, host: dict[bytes, bytes], store: dict[bytes, bytes], room: int) -> Any:
    if key in store:
        host.pop(key, None)
        return find_block(key, host, store, room)
    return find_block(key, host, store, room)


def _find_in_a_new_dict(key: bytes, host: dict[bytes, bytes], store: dict[bytes, bytes], room: int) -> Any:
    return find_block(key, dict(host), store, room)


def _find_one_too_many(key: bytes, host: dict[bytes, bytes], store: dict[bytes, bytes], room: int) -> Any:
    return find_block(key, host, store, room + 1)


def _find_evicts_for_a_miss(key: bytes, host: dict[bytes, bytes], store: dict[bytes, bytes], room: int) -> Any:
    if key not in host and len(host) >= room:
        del host[next(iter(host))]
    return find_block(key, host, store, room)


def _find_promotes_nothing(key: bytes, host: dict[bytes, Any], store: dict[bytes, bytes], room: int) -> Any:
    if key in host or key in store:
        return find_block(key, host, store, room)
    return find_block(key, host, {key: None}, room)  # type: ignore[dict-item]


def _find_moves(key: bytes, host: dict[bytes, bytes], store: dict[bytes, bytes], room: int) -> Any:
    if key in host:
        return find_block(key, host, store, room)
    block = find_block(key, host, store, room)
    store.pop(key, None)
    return block


FIND_BLOCK = Exercise(
    name="find_block",
    number="06.1",
    difficulty=3,
    reference=find_block,
    cases=(
        (A, {A: b"1", B: b"2"}, {}, 2),
        (C, {A: b"1", B: b"2"}, {C: b"3"}, 2),
        (C, {A: b"1"}, {C: b"3", D: b"4"}, 2),
        (D, {A: b"1", B: b"2"}, {C: b"3"}, 2),
        (A, {A: b"1", B: b"2", C: b"3"}, {A: b"of the store"}, 3),
        (C, {A: b"1", B: b"2"}, {C: b"3"}, 1),
        (A, {A: b"1", B: b"2", C: b"3"}, {}, 2),
    ),
    wrong=(
        Wrong(_find_without_promotion, "a block from the store goes into host memory too, or it is fetched each time"),
        Wrong(
            _find_keeps_the_order,
            "a hit is a use: the block must become the newest (a dict keeps the order in which keys were added)",
        ),
        Wrong(_find_evicts_the_newest, "`popitem` takes the newest entry; the oldest one must go: `next(iter(host))`"),
        Wrong(_find_without_eviction, "host memory has room for `room` blocks: make room before you add one"),
        Wrong(_find_evicts_one, "one block that leaves may not be enough: repeat until there is room"),
        Wrong(_find_evicts_for_a_hit, "a block that is in host memory already needs no new room"),
        Wrong(_find_trims_for_a_hit, "nothing leaves on a hit, also if host memory has more than `room` blocks"),
        Wrong(_find_asks_the_store_first, "ask the store only if host memory lacks the block: that is what it is for"),
        Wrong(_find_in_a_new_dict, "change the dict that you were given; `host = {…}` only names a new one"),
        Wrong(_find_one_too_many, "count the new block too: afterwards there may be `room` blocks and no more"),
        Wrong(_find_evicts_for_a_miss, "nobody has this block, so nothing needs room: nothing may leave"),
        Wrong(_find_promotes_nothing, "nobody has this block: there is nothing to promote"),
        Wrong(_find_moves, "other workers use the store too: a block that was promoted stays in it"),
    ),
    hint="three cases: in host memory (make it the newest), in the store (make room, keep a copy), in neither (None)",
    observe=_what_is_found,
    after="kvlab's host tier does the same with any of five eviction policies, in memory that is taken once.",
)


# --- seen_twice ---------------------------------------------------------------------------------
def first_seen_twice(keys: list[bytes], counts: dict[bytes, int], done: int) -> list[bytes]:
    """Count what a request needs; return what now is needed a second time."""
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return [key for key in keys if counts[key] == 2]


def _what_is_counted(result: Any, args: tuple[Any, ...]) -> Any:
    return [f"returned {result!r}", f"counts {sorted(args[1].items())}"]


def _seen_last_chunk_only(keys: list[bytes], counts: dict[bytes, int], done: int) -> list[bytes]:
    for key in keys[done:]:
        counts[key] = counts.get(key, 0) + 1
    return [key for key in keys if counts[key] == 2]


def _seen_first_chunk_only(keys: list[bytes], counts: dict[bytes, int], done: int) -> list[bytes]:
    return [] if done else seen_twice(keys, counts, 0)


def _seen_at_least_twice(keys: list[bytes], counts: dict[bytes, int], done: int) -> list[bytes]:
    seen_twice(keys, counts, done)
    return [key for key in keys[done:] if counts[key] >= 2]


def _seen_before_counting(keys: list[bytes], counts: dict[bytes, int], done: int) -> list[bytes]:
    before = dict(counts)
    seen_twice(keys, counts, done)
    return [key for key in keys[done:] if before.get(key, 0) == 2]


def _seen_counts_to_one(keys: list[bytes], counts: dict[bytes, int], done: int) -> list[bytes]:
    again = [key for key in keys[done:] if key in counts]
    for key in keys[done:]:
        counts[key] = 1
    return again


def _seen_stops_at_two(keys: list[bytes], counts: dict[bytes, int], done: int) -> list[bytes]:
    again = [key for key in keys[done:] if counts.get(key, 0) == 1]
    for key in keys[done:]:
        counts[key] = min(counts.get(key, 0) + 1, 2)
    return again


def _seen_in_any_order(keys: list[bytes], counts: dict[bytes, int], done: int) -> list[bytes]:
    return sorted(seen_twice(keys, counts, done))


def _seen_skips_one_more(keys: list[bytes], counts: dict[bytes, int], done: int) -> list[bytes]:
    return seen_twice(keys, counts, done + 1)


SEEN_TWICE = Exercise(
    name="seen_twice",
    number="06.2",
    difficulty=2,
    reference=seen_twice,
    given=first_seen_twice,
    cases=(
        ([A, B], {}, 0),
        ([D, B, C, A, b"e", b"f"], {A: 1, B: 1, C: 1, D: 1, b"e": 1, b"f": 1}, 0),
        ([A, B, C], {A: 1, B: 1}, 2),
        ([A, B], {A: 1, B: 1, C: 1}, 0),
        ([A, B, C, D], {A: 2, B: 2, C: 1}, 2),
        ([A, D], {A: 2}, 0),
        ([A, B], {A: 1, B: 1}, 2),
    ),
    wrong=(
        Wrong(_seen_last_chunk_only, "right counts; but blocks of an earlier chunk are named a second time"),
        Wrong(_seen_first_chunk_only, "now the blocks of later chunks are never counted, so they are never written"),
        Wrong(_seen_at_least_twice, "a block that was needed three times was written at the second; name it once"),
        Wrong(_seen_before_counting, "this request counts too: a block is named when its count *becomes* 2"),
        Wrong(_seen_counts_to_one, "the counts must grow with each request: a third one is told apart by them"),
        Wrong(_seen_stops_at_two, "counts go on: a third request makes it 3"),
        Wrong(_seen_in_any_order, "return the blocks in the order of `keys`: a chain is written from its beginning"),
        Wrong(_seen_skips_one_more, "`done` blocks were counted: the next one has the index `done`"),
    ),
    hint="the first `done` blocks were counted when their chunk came: leave them alone, in both steps",
    observe=_what_is_counted,
    after="The other error exists too: SGLang's pull request 36647 mends a rule that wrote no chunked prompt.",
)


# --- fetch_seconds ------------------------------------------------------------------------------
def first_fetch_seconds(seen: list[tuple[int, float]], blocks: int) -> float:
    """Predict the seconds of a fetch from the sizes and seconds of earlier ones."""
    each = [seconds / size for size, seconds in seen]
    return blocks * sum(each) / len(each)


def _fetch_all_by_all(seen: list[tuple[int, float]], blocks: int) -> float:
    return blocks * sum(seconds for _, seconds in seen) / sum(size for size, _ in seen)


def _fetch_median(seen: list[tuple[int, float]], blocks: int) -> float:
    return blocks * statistics.median(seconds / size for size, seconds in seen)


def _fetch_nearest(seen: list[tuple[int, float]], blocks: int) -> float:
    nearest: tuple[int, float] = min(seen, key=lambda pair: abs(pair[0] - blocks))
    return nearest[1]


def _fetch_swapped(seen: list[tuple[int, float]], blocks: int) -> float:
    sizes, seconds = zip(*seen, strict=True)
    begin, each = np.polyfit(sizes, seconds, 1)
    return float(begin + each * blocks)


def _fetch_without_begin(seen: list[tuple[int, float]], blocks: int) -> float:
    return fetch_seconds(seen, blocks) - fetch_seconds(seen, 0)


def _fetch_two_points(seen: list[tuple[int, float]], blocks: int) -> float:
    (x, a), (y, b) = min(seen), max(seen)
    return a + (b - a) / (y - x) * (blocks - x)


def _fetch_last_only(seen: list[tuple[int, float]], blocks: int) -> float:
    size, seconds = seen[-1]
    return blocks * seconds / size


FETCH_SECONDS = Exercise(
    name="fetch_seconds",
    number="06.3",
    difficulty=2,
    reference=fetch_seconds,
    given=first_fetch_seconds,
    cases=(
        ([(1, 3.0), (2, 4.0), (4, 6.0), (8, 10.0)], 16),
        ([(2, 0.5), (4, 0.5), (10, 0.5)], 3),
        ([(1, 2.0), (3, 6.0)], 2),
        ([(4, 10.0), (8, 19.0), (8, 17.0), (16, 36.0)], 1),
    ),
    wrong=(
        Wrong(_fetch_all_by_all, "still seconds for each block: a fetch also costs something before its first block"),
        Wrong(_fetch_median, "the median is no better than the mean here: what a call costs, has nothing to do with n"),
        Wrong(_fetch_last_only, "one observation cannot tell the cost of a call from the cost of its blocks"),
        Wrong(_fetch_two_points, "use all observations: one late answer must not decide"),
        Wrong(_fetch_nearest, "between two sizes that were seen, and beyond them, the time changes with the size"),
        Wrong(_fetch_swapped, "`np.polyfit(sizes, seconds, 1)` returns the slope first, then what a call costs"),
        Wrong(_fetch_without_begin, "you have the slope; add what a call costs before its first block"),
    ),
    hint="a straight line: seconds = begin + each * blocks. `np.polyfit(sizes, seconds, 1)` returns (each, begin)",
    after="kvlab's planner fits the same line, and forgets what it saw before the wire changed.",
)


# --- best_front ---------------------------------------------------------------------------------
def _front_by_sum(fetch: list[float], compute: list[float]) -> int:
    blocks = len(compute) - 1
    return min(range(blocks + 1), key=lambda k: fetch[blocks - k] + compute[k])


def _front_all_or_nothing(fetch: list[float], compute: list[float]) -> int:
    blocks = len(compute) - 1
    return 0 if fetch[blocks] <= compute[blocks] else blocks


def _front_fetches_k(fetch: list[float], compute: list[float]) -> int:
    blocks = len(compute) - 1
    return min(range(blocks + 1), key=lambda k: max(fetch[k], compute[k]))


def _front_without_the_last(fetch: list[float], compute: list[float]) -> int:
    blocks = len(compute) - 1
    return min(range(blocks), key=lambda k: max(fetch[blocks - k], compute[k]))


def _front_slowest(fetch: list[float], compute: list[float]) -> int:
    blocks = len(compute) - 1
    return max(range(blocks + 1), key=lambda k: max(fetch[blocks - k], compute[k]))


def _front_where_equal(fetch: list[float], compute: list[float]) -> int:
    blocks = len(compute) - 1
    return min(range(blocks + 1), key=lambda k: abs(fetch[blocks - k] - compute[k]))


def _front_first_crossing(fetch: list[float], compute: list[float]) -> int:
    blocks = len(compute) - 1
    return next((k for k in range(blocks + 1) if compute[k] >= fetch[blocks - k]), blocks)


def _front_last_of_equal(fetch: list[float], compute: list[float]) -> int:
    blocks = len(compute) - 1
    return min(range(blocks, -1, -1), key=lambda k: max(fetch[blocks - k], compute[k]))


def _front_seconds(fetch: list[float], compute: list[float]) -> float:
    blocks = len(compute) - 1
    return min(max(fetch[blocks - k], compute[k]) for k in range(blocks + 1))


def _front_fetched(fetch: list[float], compute: list[float]) -> int:
    return len(compute) - 1 - best_front(fetch, compute)


def _front_at_least_one(fetch: list[float], compute: list[float]) -> int:
    blocks = len(compute) - 1
    return min(range(min(1, blocks), blocks + 1), key=lambda k: max(fetch[blocks - k], compute[k]))


def _front_half(fetch: list[float], compute: list[float]) -> int:
    return (len(compute) - 1) // 2


BEST_FRONT = Exercise(
    name="best_front",
    number="06.4",
    difficulty=3,
    reference=best_front,
    cases=(
        ([0.0, 2.0, 3.0, 4.0, 5.0], [0.0, 1.0, 2.0, 3.0, 4.0]),
        ([0.0, 9.0, 10.0, 11.0], [0.0, 1.0, 2.0, 3.0]),
        ([0.0, 0.2, 0.3, 0.4], [0.0, 5.0, 6.0, 7.0]),
        ([0.0, 8.0, 10.0, 12.0], [0.0, 4.0, 11.0, 20.0]),
        ([0.0, 5.0, 9.0], [0.0, 5.0, 5.0]),
        ([0.0, 4.0, 8.0, 12.0, 16.0, 20.0, 24.0], [0.0, 1.0, 2.0, 4.0, 7.0, 11.0, 16.0]),
        ([0.0], [0.0]),
    ),
    wrong=(
        Wrong(_front_by_sum, "both happen at the same time: they are done when the slower one is, not after the sum"),
        Wrong(_front_all_or_nothing, "between all and nothing there are mixtures: try each number of computed blocks"),
        Wrong(_front_fetches_k, "if k blocks are computed, the others are fetched: how many are these?"),
        Wrong(_front_without_the_last, "computing all blocks is a choice too"),
        Wrong(_front_slowest, "this is the worst choice"),
        Wrong(_front_where_equal, "not where both take about the same, but where the slower one is soonest"),
        Wrong(_front_first_crossing, "where the lines cross may be one too late: compare with the front before"),
        Wrong(_front_last_of_equal, "of equally good ones the smallest (`min` returns the first that it meets)"),
        Wrong(_front_seconds, "return the number of computed blocks, not the seconds"),
        Wrong(_front_fetched, "this is how many are fetched; how many are computed?"),
        Wrong(_front_at_least_one, "computing none of them is a choice too"),
        Wrong(_front_half, "the half is only best where both take the same time"),
    ),
    hint="for each k from 0 to all blocks: computing k and fetching the others takes as long as the slower of both",
    after="This is the idea of Cake (arXiv 2410.03065). kvlab's planner also may compute an end, and gaps between.",
)
