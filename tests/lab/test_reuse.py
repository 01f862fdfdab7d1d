"""Reuse of a trace: by hand, and the same as a replay at every capacity."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlab.errors import InputError
from kvlab.lab.replay import Setup, replay
from kvlab.lab.reuse import reuse
from kvlab.lab.traces import Request, Trace, from_blocks

MOONCAKE = Path(__file__).parents[2].parent / "shared" / "traces" / "conversation_trace.jsonl"


def test_by_hand() -> None:
    """Between both uses of 1 and 2 there are 3 and 4, so four blocks of room are needed; 5 never comes again."""
    told = reuse(from_blocks([[1, 2], [3, 4], [1, 2], [3, 5]], 1000), 1000)
    assert (told.requests, told.tokens, told.blocks, told.span_s) == (4, 8000, 8, 3.0)
    assert [told.found(capacity).tolist() for capacity in (3, 4)] == [[0, 0, 0, 0], [0, 0, 2, 1]]
    assert [told.hit_rate(capacity) for capacity in (0, 3, 4)] == [0, 0, 3 / 8] and told.hit_rate() == 3 / 8
    assert [told.capacity(rate) for rate in (0, 0.1, 3 / 8, 1)] == [0, 4, 4, 4]


def test_a_part_of_a_block_is_not_found_and_does_not_take_room() -> None:
    part = [Request(float(at), 1500, 1, [1, 10 + at % 2]) for at in range(4)]
    told = reuse(part, 1000)
    assert told.blocks == 4 and told.found(1).tolist() == [0, 1, 1, 1]
    short = reuse([Request(0.0, 10, 1, [1]), Request(1.0, 10, 1, [1])], 1000)
    assert short.blocks == 0 and short.hit_rate() == 0 and short.capacity(0.5) == 0


def test_an_empty_trace() -> None:
    with pytest.raises(InputError, match="expected a trace with requests, got an empty one"):
        reuse([], 16)


chains = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=30)


def prefixes(contents: list[list[int]]) -> list[list[int]]:
    """Ids that stand for whole prefixes."""
    ids: dict[tuple[int, ...], int] = {}
    return [[ids.setdefault(tuple(one[: i + 1]), len(ids)) for i in range(len(one))] for one in contents]


@given(chains, st.integers(0, 40), st.integers(0, 15))
def test_it_finds_what_a_replay_of_full_blocks_finds(contents: list[list[int]], capacity: int, part: int) -> None:
    blocks = prefixes(contents)
    told = reuse(from_blocks(blocks, 16), 16)
    replayed = replay(from_blocks(blocks, 16), 16, Setup(device=capacity)).hits
    assert told.hit_rate(capacity) == replayed.rates()["full_blocks"]
    assert told.hit_rate(capacity) <= told.hit_rate(capacity + part) <= told.hit_rate()
    rate = told.hit_rate(capacity)
    assert told.hit_rate(told.capacity(rate)) == rate and told.capacity(rate) <= max(capacity, 0)


@pytest.mark.skipif(not MOONCAKE.exists(), reason="needs Mooncake's conversation_trace.jsonl in ../shared/traces")
def test_one_cache_finds_what_engines_with_a_router_find() -> None:
    trace = Trace(MOONCAKE)
    told = reuse(trace, trace.block_tokens)
    engines = replay(trace, trace.block_tokens, Setup(device=834, nodes=10, router="cost"))
    assert told.hit_rate() == pytest.approx(0.3819, abs=1e-4)
    assert told.hit_rate(8340) == pytest.approx(engines.hits.rates()["full_blocks"], abs=0.02)
