"""Ids of trace blocks: equal exactly where all tokens up to the end of the block are, and only with the same salt."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlab.core.keys import Namespace
from kvlab.errors import InputError
from kvlab.lab.trace_ids import LONGEST_BLOCK, trace_ids

BLOCKS = [9056500327055413761, 3495514861080954893, 3634907892917834190]  # with hashlib alone, by the definition
CACHED = [9056500327055413761, 3495514861080954893, 1151986976778345398]
TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=24)


def alike(a: list[int], b: list[int]) -> int:
    """How many entries both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(TOKENS, TOKENS, st.integers(1, 8))
def test_prompts_share_ids_exactly_where_their_tokens_agree(a: list[int], b: list[int], size: int) -> None:
    ids_a, ids_b = (trace_ids(tokens, size)[0] for tokens in (a, b))
    assert len(ids_a) == -(-len(a) // size)
    same = len(ids_a) if a == b else alike(a, b) // size
    assert alike(ids_a, ids_b) == same
    assert len(set(ids_a) & set(ids_b)) == same, "an id says where it is"


@given(TOKENS, TOKENS, st.integers(1, 8))
def test_what_is_cached_are_full_blocks_without_the_last_token(tokens: list[int], answer: list[int], size: int) -> None:
    blocks, cached = trace_ids(tokens, size, answer=answer)
    known = [*tokens, *answer[:-1]]
    assert len(cached) == len(known) // size
    full = len(tokens) // size
    assert cached[:full] == blocks[:full]
    assert cached == trace_ids(known, size)[0][: len(cached)]
    if len(tokens) % size:
        assert blocks[-1] not in cached, "a part of a block is not shared"


def test_without_an_answer_the_full_blocks_of_the_prompt_are_cached() -> None:
    blocks, cached = trace_ids([1, 2, 3, 4, 5], 2)
    assert cached == blocks[:2]


def test_salts_and_block_sizes_share_no_id() -> None:
    tokens = list(range(256))
    seen = [set(trace_ids(tokens, size, salt)[0]) for size in (8, 16) for salt in (b"", b"a", b"b")]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 3 * (32 + 16)


def test_no_id_is_a_part_of_a_key_of_a_cache() -> None:
    tokens, salt = list(range(64)), b"the salt of a tenant"
    keys = Namespace(bytes(32), "fp32", salt, 16).keys(tokens)
    assert not {int.from_bytes(key[:8], "little") >> 1 for key in keys} & set(trace_ids(tokens, 16, salt)[0])


def test_ids_do_not_change() -> None:
    """Files with one salt share ids only as long as these stay as they are."""
    blocks, cached = trace_ids([1, 2, 3, 4, 5], 2, b"salt", [6, 7])
    assert blocks == BLOCKS and cached == CACHED


def test_ids_survive_other_readers() -> None:
    ids = trace_ids(list(range(4096)), 1)[0]
    assert all(0 <= one < 1 << 63 for one in ids) and max(ids) > 1 << 62
    rounded = [int(float(one)) for one in ids]  # as JavaScript reads them
    assert len(set(rounded)) == len(set(ids)) == 4096
    assert json.loads(json.dumps(ids)) == ids


@pytest.mark.parametrize("size", [0, -1, LONGEST_BLOCK + 1])
def test_a_block_size_that_is_none(size: int) -> None:
    with pytest.raises(InputError, match="expected a block size of 1"):
        trace_ids([1], size)


@pytest.mark.parametrize("tokens", [[-1], [1 << 32], [1.5], ["a"], [True]])
def test_tokens_that_are_none(tokens: list[int]) -> None:
    with pytest.raises(InputError, match="expected tokens as integers"):
        trace_ids(tokens, 1)
