"""The exercises of notebook 00, start here: the part of a prompt that a cache can give back, and the hit rate."""

from __future__ import annotations

import math

from kvlab.course.exercises.engine import Exercise, Wrong

Prompts = list[list[int]]
Requests = list[tuple[int, int]]


def cacheable_prefix(a: list[int], b: list[int], block_tokens: int) -> int:
    """How many leading tokens of `b` can come from the cache after `a` was saved."""
    same = 0
    for x, y in zip(a, b):
        if x != y:
            break
        same += 1
    return same // block_tokens * block_tokens


def _counts_partial_blocks(a: list[int], b: list[int], block_tokens: int) -> int:
    same = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        same += 1
    return same


def _counts_all_equal_positions(a: list[int], b: list[int], block_tokens: int) -> int:
    same = sum(x == y for x, y in zip(a, b, strict=False))
    return same // block_tokens * block_tokens


def _counts_blocks(a: list[int], b: list[int], block_tokens: int) -> int:
    return cacheable_prefix(a, b, block_tokens) // block_tokens


def _runs_off_the_shorter_prompt(a: list[int], b: list[int], block_tokens: int) -> int:
    same = 0
    while a[same] == b[same]:
        same += 1
    return same // block_tokens * block_tokens


CACHEABLE_PREFIX = Exercise(
    name="cacheable_prefix",
    number="00.1",
    difficulty=2,
    reference=cacheable_prefix,
    cases=(
        ([1, 2, 3, 4, 5], [1, 2, 3, 9, 5], 2),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], 2),
        ([1, 2, 3, 4], [9, 2, 3, 4], 2),
        ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 0, 6, 7, 8], 2),
        ([], [1, 2], 4),
    ),
    wrong=(
        Wrong(_counts_partial_blocks, "only full blocks are stored: round down to a multiple of block_tokens"),
        Wrong(_counts_all_equal_positions, "a prefix ends at the first difference; what is equal after it is lost"),
        Wrong(_counts_blocks, "this counts blocks; the answer is in tokens"),
        Wrong(_runs_off_the_shorter_prompt, "one prompt can end before the two differ: `zip` stops at the shorter one"),
    ),
    hint="walk along both lists while they agree, then round down to whole blocks",
    after="The real cache never compares two prompts: it compares one key for each block. You see them in notebook 03.",
)


def hit_rate(requests: list[tuple[int, int]], block_tokens: int) -> float:
    """Share of all full blocks that came from the cache, from 0 to 1."""
    found = 0
    full = 0
    for prompt_tokens, cached_tokens in requests:
        found += cached_tokens // block_tokens
        full += prompt_tokens // block_tokens
    return found / full if full else 0.0


def _mean_of_rates(requests: Requests, block_tokens: int) -> float:
    rates = [hit_rate([request], block_tokens) for request in requests]
    return sum(rates) / len(rates) if rates else 0.0


def _mean_of_rates_unguarded(requests: Requests, block_tokens: int) -> float:
    rates = [cached // block_tokens / (prompt // block_tokens) for prompt, cached in requests]
    return sum(rates) / len(rates)


def _rate_over_tokens(requests: Requests, block_tokens: int) -> float:
    prompts = sum(prompt for prompt, _ in requests)
    return sum(cached for _, cached in requests) / prompts if prompts else 0.0


def _rate_over_started_blocks(requests: Requests, block_tokens: int) -> float:
    blocks = sum(math.ceil(prompt / block_tokens) for prompt, _ in requests)
    return sum(cached // block_tokens for _, cached in requests) / blocks if blocks else 0.0


def _rate_over_pooled_tokens(requests: Requests, block_tokens: int) -> float:
    blocks = sum(prompt for prompt, _ in requests) // block_tokens
    return sum(cached for _, cached in requests) // block_tokens / blocks if blocks else 0.0


def _rate_over_requests(requests: Requests, block_tokens: int) -> float:
    return sum(cached > 0 for _, cached in requests) / len(requests) if requests else 0.0


def _in_percent(requests: Requests, block_tokens: int) -> float:
    return 100 * hit_rate(requests, block_tokens)


def _whole_number(requests: Requests, block_tokens: int) -> float:
    return hit_rate(requests, block_tokens) // 1


def _no_guard(requests: Requests, block_tokens: int) -> float:
    full = sum(prompt // block_tokens for prompt, _ in requests)
    return sum(cached // block_tokens for _, cached in requests) / full


HIT_RATE = Exercise(
    name="hit_rate",
    number="00.2",
    difficulty=3,
    reference=hit_rate,
    cases=(
        ([(1040, 1024)], 64),
        ([(1040, 1024), (1040, 512)], 64),
        ([(1040, 1024), (140, 0), (300, 64)], 64),
        ([(130, 64), (40, 0), (40, 0)], 64),
        ([(40, 0), (63, 0)], 64),
        ([], 64),
    ),
    wrong=(
        Wrong(_rate_over_tokens, "this is the share of tokens; the question is the share of full blocks"),
        Wrong(_rate_over_started_blocks, "the partial last block is never stored: it must not count as a miss"),
        Wrong(_mean_of_rates, "a mean of rates counts a short prompt as much as a long one: sum first, divide once"),
        Wrong(
            _mean_of_rates_unguarded,
            "add up blocks over all requests and divide once; a request without a full block has no rate of its own",
        ),
        Wrong(_rate_over_pooled_tokens, "round down for each request: leftovers of two prompts make no full block"),
        Wrong(_rate_over_requests, "this is the share of requests with a hit; the question is the share of blocks"),
        Wrong(_in_percent, "a share is a number from 0 to 1, not in percent"),
        Wrong(_whole_number, "`//` between the two sums throws the fraction away: use `/` there"),
        Wrong(_no_guard, "requests without any full block have rate 0.0: do not divide by zero"),
    ),
    hint="two sums over the requests, found blocks and full blocks, then one division; without a full block: 0.0",
    after="Serving systems report this rate in different units. Ask which one before you compare two numbers.",
)


def replay(prompts: list[list[int]], block_tokens: int) -> list[tuple[int, int]]:
    """(prompt tokens, cached tokens) of each prompt; the cache never forgets."""
    kept = set()
    served = []
    for prompt in prompts:
        ends = range(block_tokens, len(prompt) + 1, block_tokens)
        cached = 0
        for end in ends:
            if tuple(prompt[:end]) not in kept:
                break
            cached = end
        for end in ends:
            kept.add(tuple(prompt[:end]))
        served.append((len(prompt), cached))
    return served


def _blocks(prompt: list[int], block_tokens: int) -> list[tuple[int, ...]]:
    ends = range(block_tokens, len(prompt) + 1, block_tokens)
    return [tuple(prompt[end - block_tokens : end]) for end in ends]


def _replay_by_content(prompts: Prompts, block_tokens: int) -> Requests:
    kept: set[tuple[int, ...]] = set()
    served = []
    for prompt in prompts:
        blocks = _blocks(prompt, block_tokens)
        hits = [block in kept for block in blocks]
        kept.update(blocks)
        served.append((len(prompt), [*hits, False].index(False) * block_tokens))
    return served


def _replay_past_gaps(prompts: Prompts, block_tokens: int) -> Requests:
    kept: set[tuple[int, ...]] = set()
    served = []
    for prompt in prompts:
        blocks = _blocks(prompt, block_tokens)
        served.append((len(prompt), sum(block in kept for block in blocks) * block_tokens))
        kept.update(blocks)
    return served


def _replay_finds_its_own_blocks(prompts: Prompts, block_tokens: int) -> Requests:
    kept: set[tuple[int, ...]] = set()
    served = []
    for prompt in prompts:
        cached = 0
        for block in _blocks(prompt, block_tokens):
            cached += block_tokens * (block in kept)
            kept.add(block)
        served.append((len(prompt), cached))
    return served


def _replay_never_resets(prompts: Prompts, block_tokens: int) -> Requests:
    kept: set[tuple[int, ...]] = set()
    served = []
    cached = 0
    for prompt in prompts:
        ends = range(block_tokens, len(prompt) + 1, block_tokens)
        for end in ends:
            if tuple(prompt[:end]) not in kept:
                break
            cached = end
        kept.update(tuple(prompt[:end]) for end in ends)
        served.append((len(prompt), cached))
    return served


def _replay_counts_on(prompts: Prompts, block_tokens: int) -> Requests:
    right = replay(prompts, block_tokens)
    return [(total, sum(cached for _, cached in right[: i + 1])) for i, (total, _) in enumerate(right)]


def _replay_misses_the_last(prompts: Prompts, block_tokens: int) -> Requests:
    return [(total + 1, cached) for total, cached in replay([prompt[:-1] for prompt in prompts], block_tokens)]


def _replay_saves_first(prompts: Prompts, block_tokens: int) -> Requests:
    return [(len(prompt), len(prompt) // block_tokens * block_tokens) for prompt in prompts]


def _replay_against_the_last(prompts: Prompts, block_tokens: int) -> Requests:
    before = [[], *prompts]
    return [(len(b), cacheable_prefix(a, b, block_tokens)) for a, b in zip(before, prompts, strict=False)]


def _replay_with_partial_blocks(prompts: Prompts, block_tokens: int) -> Requests:
    served = []
    for i, prompt in enumerate(prompts):
        served.append((len(prompt), max((_counts_partial_blocks(a, prompt, 1) for a in prompts[:i]), default=0)))
    return served


def _replay_in_blocks(prompts: Prompts, block_tokens: int) -> Requests:
    return [(prompt // block_tokens, cached // block_tokens) for prompt, cached in replay(prompts, block_tokens)]


REPLAY = Exercise(
    name="replay",
    number="00.3",
    difficulty=3,
    reference=replay,
    cases=(
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 9, 9], [1, 2, 7, 7]], 2),
        ([[1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 4, 0]], 2),
        ([[1, 2, 3, 4, 5, 6, 0], [1, 2, 9, 9, 5, 6, 0]], 2),
        ([[1, 2, 3, 4, 0], [3, 4, 1, 2, 0]], 2),
        ([[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]], 2),
        ([[8, 8, 8, 8, 8, 8, 0]], 2),
        ([[1], [1], []], 2),
        ([], 2),
    ),
    wrong=(
        Wrong(
            _replay_past_gaps,
            "a block after a missing one is lost: stop at the first that is missing. And its history counts too",
        ),
        Wrong(
            _replay_by_content,
            "the same tokens after another beginning are another block: remember all tokens up to the block's end",
        ),
        Wrong(
            _replay_finds_its_own_blocks,
            "remember all tokens up to the block's end, not the block's own: equal tokens later are another block",
        ),
        Wrong(_replay_never_resets, "every prompt begins with nothing found: set the count back to 0 for each one"),
        Wrong(_replay_counts_on, "this count goes on from prompt to prompt: set it back to 0 for each one"),
        Wrong(
            _replay_misses_the_last,
            "the last full block is missing: the loop ends too early when no token is left over",
        ),
        Wrong(_replay_saves_first, "every prompt finds itself here: look up before you save"),
        Wrong(_replay_against_the_last, "the cache never forgets: look in all earlier prompts, not in the last one"),
        Wrong(_replay_with_partial_blocks, "only full blocks are stored: what is found is a multiple of block_tokens"),
        Wrong(_replay_in_blocks, "both numbers of a request are in tokens, not in blocks"),
    ),
    hint="keep a set of prefixes that end at a full block; for each prompt: look up from the front, then save",
    after="`python -m kvlab bench policies` replays requests in this way, with caches that also run out of memory.",
)
