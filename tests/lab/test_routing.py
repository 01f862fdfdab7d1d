"""Routers on block keys alone: the counter-example, and what each number counts."""

from __future__ import annotations

import pytest

from kvlab.engine.router import ROUTERS, Candidate
from kvlab.lab.routing import groups, route


def test_the_numbers_of_a_stream_worked_out_by_hand() -> None:
    stream = [["a", "b"], ["a", "b"], ["c"], ["a", "x"]]
    one = route(stream, ROUTERS["round_robin"], workers=1, blocks=9)
    assert (one.hit_rate, one.imbalance, one.requests) == (3 / 7, 1.0, [4])
    turns = route(stream, ROUTERS["round_robin"], workers=2, blocks=9)  # a b, c | a b, a x
    assert (turns.hit_rate, turns.imbalance, turns.requests) == (1 / 7, 1.0, [2, 2])


def test_a_block_behind_a_missing_one_is_no_hit_and_a_full_cache_forgets_the_oldest() -> None:
    stream = [["a", "b"], ["x", "b"], ["a", "b"]]
    assert route(stream, ROUTERS["round_robin"], workers=1, blocks=9).hit_rate == 2 / 6
    assert route(stream, ROUTERS["round_robin"], workers=1, blocks=2).hit_rate == 0


def test_with_a_common_first_block_the_longest_prefix_sends_all_to_one_worker() -> None:
    stream = groups(400, common=1)
    longest, cost = (route(stream, ROUTERS[name], workers=2, blocks=80) for name in ("longest_prefix", "cost"))
    assert longest.requests == [400, 0] and longest.imbalance == 2.0
    assert cost.imbalance < 1.05 and cost.hit_rate > longest.hit_rate + 0.15
    whole = route(stream, ROUTERS["round_robin"], workers=1, blocks=160)
    assert cost.hit_rate > 0.95 * whole.hit_rate


def test_the_router_sees_what_each_worker_has() -> None:
    seen: list[tuple[int, list[int]]] = []

    def first(blocks: int, candidates: list[Candidate], routed: int) -> int:
        seen.append((routed, [candidate.matched for candidate in candidates]))
        return 0

    route([["a", "b"], ["a", "b", "c"], ["z"]], first, workers=2, blocks=9)
    assert seen == [(0, [0, 0]), (1, [2, 0]), (2, [0, 0])]


@pytest.mark.parametrize("skew", [0.0, 1.0, 3.0])
def test_streams_of_groups_are_the_same_each_time_and_as_skewed_as_asked(skew: float) -> None:
    stream = groups(300, shared=2, own=1, common=1, skew=skew)
    assert stream == groups(300, shared=2, own=1, common=1, skew=skew) != groups(300, skew=skew, seed=1)
    assert all(len(chain) == 4 and chain[0] == 0 for chain in stream)
    first = sum(chain[1] == (0, 0) for chain in stream) / 300
    assert first == pytest.approx(1 / sum((1 + g) ** -skew for g in range(16)), abs=0.08)
    assert len({chain[3] for chain in stream}) == 300, "own blocks are in no other request"
