"""The exercises of notebook 12, Production: why nothing hits, counters that restart, servers, a band of money."""

from __future__ import annotations

import math
from itertools import pairwise

from kvlab.course.exercises.engine import Exercise, Wrong

Description = dict[str, str]


# --- 12.1: in what a namespace differs ------------------------------------------------------------
def differs_in(own: dict[str, str], others: list[tuple[dict[str, str], int]]) -> list[str]:
    """The fields in which the namespace that holds most blocks of the prompt differs from ours, sorted."""
    found = [(blocks, description) for description, blocks in others if blocks > 0]
    if not found:
        return []
    most = max(blocks for blocks, _ in found)
    differences = [
        sorted(field for field in own if description[field] != own[field])
        for blocks, description in found
        if blocks == most
    ]
    return min(differences, key=len)


def _the_first(own: Description, others: list[tuple[Description, int]]) -> list[str]:
    for description, blocks in others:
        if blocks > 0:
            return sorted(field for field in own if description[field] != own[field])
    return []


def _stored_or_not(own: Description, others: list[tuple[Description, int]]) -> list[str]:
    differences = [sorted(f for f in own if description[f] != own[f]) for description, _ in others]
    return min(differences, key=len, default=[])


def _any_of_them(own: Description, others: list[tuple[Description, int]]) -> list[str]:
    return sorted({f for description, blocks in others if blocks > 0 for f in own if description[f] != own[f]})


def _most_similar(own: Description, others: list[tuple[Description, int]]) -> list[str]:
    differences = [sorted(f for f in own if d[f] != own[f]) for d, blocks in others if blocks > 0]
    return min(differences, key=len, default=[])


def _the_first_of_the_longest(own: Description, others: list[tuple[Description, int]]) -> list[str]:
    description, blocks = max(others, key=lambda other: other[1], default=(own, 0))
    return sorted(field for field in own if description[field] != own[field]) if blocks else []


def _values(own: Description, others: list[tuple[Description, int]]) -> list[str]:
    found = differs_in(own, others)
    for description, blocks in others:
        if blocks and found == sorted(field for field in own if description[field] != own[field]):
            return [description[field] for field in found]
    return []


OURS = {"weights": "a1", "precision": "fp16", "salt": "t1"}
DIFFERS_IN = Exercise(
    name="differs_in",
    number="12.1",
    difficulty=3,
    reference=differs_in,
    cases=(
        (OURS, []),
        (OURS, [(OURS | {"precision": "fp32"}, 4)]),
        (OURS, [(OURS | {"precision": "fp32"}, 0)]),
        (OURS, [(OURS | {"weights": "b2"}, 1), (OURS | {"weights": "c3", "precision": "int8"}, 4)]),
        (OURS, [(OURS | {"weights": "b2", "salt": "t2"}, 4), (OURS | {"precision": "fp32"}, 4)]),
        (OURS, [(OURS | {"salt": "t2"}, 0), (OURS | {"weights": "b2", "precision": "fp32"}, 2)]),
    ),
    wrong=(
        Wrong(_the_first, "not the first one that has blocks: the one with the most of them"),
        Wrong(_stored_or_not, "a namespace without a block of the prompt says nothing: leave it out"),
        Wrong(_any_of_them, "take one namespace, the one with the most blocks, not all of them together"),
        Wrong(_most_similar, "the number of blocks decides first; how few fields differ only where it is equal"),
        Wrong(
            _the_first_of_the_longest, "where several have the most blocks, take the one that differs in fewest fields"
        ),
        Wrong(_values, "return the names of the fields, not what is in them"),
    ),
    hint="leave out what has no blocks, keep those with the most, then take the shortest list of differences",
    after="kvlab.cache.elsewhere does the same, and reads at most four namespaces for it.",
)


# --- 12.2: counters that begin anew -----------------------------------------------------------------
def saves_nothing(scrapes: list[tuple[float, float]]) -> bool:
    """Whether loads took longer than the prefill that they avoided. A scrape: seconds of both, since the start."""
    load = avoided = 0.0
    load_before, avoided_before = scrapes[0]
    for load_now, avoided_now in scrapes[1:]:
        if load_now < load_before or avoided_now < avoided_before:
            load_before = avoided_before = 0.0  # the process was restarted
        load += load_now - load_before
        avoided += avoided_now - avoided_before
        load_before, avoided_before = load_now, avoided_now
    return load > avoided


def _last_minus_first(scrapes: list[tuple[float, float]]) -> bool:
    (load, avoided), (load_now, avoided_now) = scrapes[0], scrapes[-1]
    return load_now - load > avoided_now - avoided


def _since_the_start(scrapes: list[tuple[float, float]]) -> bool:
    load, avoided = scrapes[-1]
    return load > avoided


def _or_the_same(scrapes: list[tuple[float, float]]) -> bool:
    return not saves_nothing([(avoided, load) for load, avoided in scrapes])


def _drops_the_restart(scrapes: list[tuple[float, float]]) -> bool:
    load = sum(max(0.0, b[0] - a[0]) for a, b in pairwise(scrapes))
    avoided = sum(max(0.0, b[1] - a[1]) for a, b in pairwise(scrapes))
    return load > avoided


def _each_alone(scrapes: list[tuple[float, float]]) -> bool:
    def increase(at: int) -> float:
        values = [scrape[at] for scrape in scrapes]
        return sum(b - a if b >= a else b for a, b in pairwise(values))

    return increase(0) > increase(1)


def _the_other_way(scrapes: list[tuple[float, float]]) -> bool:
    return saves_nothing([(avoided, load) for load, avoided in scrapes])


SAVES_NOTHING = Exercise(
    name="saves_nothing",
    number="12.2",
    difficulty=3,
    reference=saves_nothing,
    cases=(
        ([(0.0, 0.0), (2.0, 5.0)],),
        ([(0.0, 0.0), (5.0, 2.0)],),
        ([(9.0, 1.0), (10.0, 5.0)],),
        ([(1.0, 9.0), (5.0, 10.0)],),
        ([(3.0, 3.0), (3.0, 3.0)],),
        ([(50.0, 9.0), (60.0, 10.0), (1.0, 2.0)],),
        ([(10.0, 20.0), (11.0, 29.0), (6.0, 1.0), (7.0, 2.0)],),
        ([(50.0, 90.0), (51.0, 91.0), (1.0, 4.0)],),
        ([(2.0, 10.0), (5.0, 3.0)],),
        ([(0.0, 0.0), (2.0, 3.0), (1.9, 0.1)],),
    ),
    wrong=(
        Wrong(_since_the_start, "a counter runs since its process began: take what was added between scrapes"),
        Wrong(_last_minus_first, "a worker that restarts begins with 0 again, so the last may be below the first"),
        Wrong(_drops_the_restart, "after a restart the whole counter is new: it counts, from 0 on"),
        Wrong(_each_alone, "both counters begin anew together: if one fell, the other was 0 in between, too"),
        Wrong(_or_the_same, "as long as both are equal, nothing is lost: only more is too much"),
        Wrong(_the_other_way, "it saves nothing if the loads took longer, not if the prefill would have"),
    ),
    hint="add up the increase of both counters from each scrape to the next; if one of them fell, both began at 0",
    after="Prometheus' increase() does this for each counter by itself: between two scrapes it cannot know better.",
)


# --- 12.3: servers --------------------------------------------------------------------------------
def servers_needed(shared: int, users: int, own: int, block_tokens: int, token_bytes: int, server_gib: float) -> int:
    """Servers that hold the blocks of `users` prompts: `shared` tokens that are the same, and `own` tokens each."""
    blocks = shared // block_tokens + users * ((shared + own) // block_tokens - shared // block_tokens)
    record = block_tokens * token_bytes + 128
    return -int(-blocks * record * 1.25 // (0.65 * server_gib * 2**30))  # rounded up


def _shared_for_each(shared: int, users: int, own: int, block_tokens: int, token_bytes: int, server_gib: float) -> int:
    blocks = users * ((shared + own) // block_tokens)
    return math.ceil(blocks * (block_tokens * token_bytes + 128) * 1.25 / (0.65 * server_gib * 2**30))


def _gigabytes(shared: int, users: int, own: int, block_tokens: int, token_bytes: int, server_gib: float) -> int:
    return servers_needed(shared, users, own, block_tokens, token_bytes, server_gib * 1e9 / 2**30)


def _all_of_it(shared: int, users: int, own: int, block_tokens: int, token_bytes: int, server_gib: float) -> int:
    return servers_needed(shared, users, own, block_tokens, token_bytes, server_gib / 0.65)


def _no_rounding(shared: int, users: int, own: int, block_tokens: int, token_bytes: int, server_gib: float) -> int:
    return servers_needed(shared, users, own, block_tokens, token_bytes, server_gib * 1.25)


def _partial_blocks(shared: int, users: int, own: int, block_tokens: int, token_bytes: int, server_gib: float) -> int:
    blocks = math.ceil(shared / block_tokens) + users * math.ceil(own / block_tokens)
    return math.ceil(blocks * (block_tokens * token_bytes + 128) * 1.25 / (0.65 * server_gib * 2**30))


def _apart(shared: int, users: int, own: int, block_tokens: int, token_bytes: int, server_gib: float) -> int:
    blocks = shared // block_tokens + users * (own // block_tokens)
    return math.ceil(blocks * (block_tokens * token_bytes + 128) * 1.25 / (0.65 * server_gib * 2**30))


def _rounded(shared: int, users: int, own: int, block_tokens: int, token_bytes: int, server_gib: float) -> int:
    blocks = shared // block_tokens + users * ((shared + own) // block_tokens - shared // block_tokens)
    return round(blocks * (block_tokens * token_bytes + 128) * 1.25 / (0.65 * server_gib * 2**30))


SERVERS_NEEDED = Exercise(
    name="servers_needed",
    number="12.3",
    difficulty=3,
    reference=servers_needed,
    cases=(
        (2000, 40, 4000, 16, 131_072, 40.0),
        (2000, 40, 4000, 16, 131_072, 64.0),
        (2000, 1000, 4000, 16, 131_072, 64.0),
        (48_000, 400, 100, 64, 131_072, 64.0),
        (0, 1, 100, 64, 6144, 64.0),
        (40, 100_000, 40, 64, 6144, 64.0),
        (100, 1000, 27, 64, 131_072, 1.0),
    ),
    wrong=(
        Wrong(_shared_for_each, "the shared beginning is stored once, not once for each user"),
        Wrong(_gigabytes, "a GiB has 2**30 bytes, not 10**9"),
        Wrong(_all_of_it, "Redis may have 0.65 of a server's memory; buffers and copies need the remainder"),
        Wrong(_no_rounding, "the allocator rounds up: a record takes 1.25 times its size"),
        Wrong(_partial_blocks, "only full blocks are stored"),
        Wrong(
            _apart,
            "blocks are counted along the whole prompt: a user's tokens may fill a block that the beginning began",
        ),
        Wrong(_rounded, "round up: half a server too few evicts"),
    ),
    hint="first count blocks: those of the beginning once, and for each user those of the whole prompt less these",
    after="docs/04 has the whole table: buffers, connections and network too.",
)


# --- 12.4: a band of money --------------------------------------------------------------------------
Band = tuple[float, float]


def net_band(
    hours: float,
    fetch_hours: float,
    gpu_usd: tuple[float, float],
    stall: tuple[float, float],
    tier_usd: tuple[float, float],
) -> tuple[float, float]:
    """The lowest and the highest USD a month that a tier can bring."""
    ends = []
    for usd in gpu_usd:
        for share in stall:
            for tier in tier_usd:
                ends.append((hours - share * fetch_hours) * usd - tier)
    return min(ends), max(ends)


def _low_with_low(hours: float, fetch_hours: float, gpu_usd: Band, stall: Band, tier_usd: Band) -> Band:
    low, high = ((hours - stall[end] * fetch_hours) * gpu_usd[end] - tier_usd[end] for end in (0, 1))
    return low, high


def _good_and_bad(hours: float, fetch_hours: float, gpu_usd: Band, stall: Band, tier_usd: Band) -> Band:
    low = (hours - stall[1] * fetch_hours) * gpu_usd[0] - tier_usd[1]
    return low, (hours - stall[0] * fetch_hours) * gpu_usd[1] - tier_usd[0]


def _without_fetching(hours: float, fetch_hours: float, gpu_usd: Band, stall: Band, tier_usd: Band) -> Band:
    return net_band(hours, 0.0, gpu_usd, stall, tier_usd)


def _fetches_cost_all(hours: float, fetch_hours: float, gpu_usd: Band, stall: Band, tier_usd: Band) -> Band:
    return net_band(hours, fetch_hours, gpu_usd, (1.0, 1.0), tier_usd)


def _without_the_tier(hours: float, fetch_hours: float, gpu_usd: Band, stall: Band, tier_usd: Band) -> Band:
    return net_band(hours, fetch_hours, gpu_usd, stall, (0.0, 0.0))


def _never_below_zero(hours: float, fetch_hours: float, gpu_usd: Band, stall: Band, tier_usd: Band) -> Band:
    low, high = net_band(hours, fetch_hours, gpu_usd, stall, tier_usd)
    return max(0.0, low), max(0.0, high)


NET_BAND = Exercise(
    name="net_band",
    number="12.4",
    difficulty=4,
    reference=net_band,
    cases=(
        (100.0, 0.0, (4.0, 4.0), (0.0, 0.0), (100.0, 100.0)),
        (100.0, 0.0, (2.0, 6.0), (0.0, 0.0), (50.0, 300.0)),
        (100.0, 50.0, (4.0, 4.0), (0.0, 1.0), (0.0, 0.0)),
        (100.0, 40.0, (2.0, 6.0), (0.0, 1.0), (50.0, 300.0)),
        (100.0, 300.0, (2.0, 6.0), (0.0, 1.0), (50.0, 300.0)),
        (0.0, 100.0, (2.0, 6.0), (0.5, 1.0), (0.0, 0.0)),
    ),
    wrong=(
        Wrong(
            _low_with_low, "all that is bad belongs together: a low price of what you save, a high price of the tier"
        ),
        Wrong(
            _good_and_bad,
            "if fetches cost more hours than they save, a dear GPU is the bad end: try every combination of the ends",
        ),
        Wrong(_without_fetching, "while KV is fetched, a GPU waits for a share `stall` of the time: that costs hours"),
        Wrong(_fetches_cost_all, "a GPU waits only for the share `stall` of a fetch"),
        Wrong(_without_the_tier, "the tier has a price of its own: take it away"),
        Wrong(_never_below_zero, "a tier can lose money: do not cut the band at 0"),
    ),
    hint="compute the money for each of the eight combinations of the ends, and return the least and the most",
    after="kvlab.lab.prices.interval does this for every result of kvlab.lab.cost.",
)
