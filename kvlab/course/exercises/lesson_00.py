"""The exercises of notebook 00, start here: what of a prompt can come from the cache, and the hit rate."""

from __future__ import annotations

import math

from kvlab.course.exercises.engine import Exercise, Wrong


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


CACHEABLE_PREFIX = Exercise(
    name="cacheable_prefix",
    number="00.1",
    difficulty=2,
    reference=cacheable_prefix,
    cases=(
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], 2),
        ([1, 2, 3, 4, 5], [1, 2, 3, 9, 5], 2),
        ([1, 2, 3, 4], [9, 2, 3, 4], 2),
        ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 0, 6, 7, 8], 2),
        ([], [1, 2], 4),
    ),
    wrong=(
        Wrong(_counts_partial_blocks, "only full blocks are stored: round down to a multiple of block_tokens"),
        Wrong(_counts_all_equal_positions, "a prefix ends at the first difference; what is equal after it is lost"),
    ),
    hint="walk along both lists while they agree, then round down to whole blocks",
)


def hit_rate(prompt_tokens: int, cached_tokens: int, block_tokens: int) -> float:
    """Share of the prompt's full blocks that came from the cache."""
    full = prompt_tokens // block_tokens
    return cached_tokens // block_tokens / full if full else 0.0


def _rate_over_tokens(prompt_tokens: int, cached_tokens: int, block_tokens: int) -> float:
    return cached_tokens / prompt_tokens


def _rate_over_started_blocks(prompt_tokens: int, cached_tokens: int, block_tokens: int) -> float:
    return cached_tokens // block_tokens / math.ceil(prompt_tokens / block_tokens)


HIT_RATE = Exercise(
    name="hit_rate",
    number="00.2",
    difficulty=2,
    reference=hit_rate,
    cases=((1040, 1024, 64), (1024, 512, 64), (100, 64, 64), (40, 0, 64)),
    wrong=(
        Wrong(_rate_over_tokens, "this is the share of tokens; the question is the share of full blocks"),
        Wrong(_rate_over_started_blocks, "the partial last block is never stored: it must not count as a miss"),
    ),
    hint="count full blocks in the prompt and in the cached part; a prompt without a full block has rate 0.0",
)
