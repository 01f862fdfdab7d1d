"""Replays: small cases by hand, agreement between independent ways, and the known figures of a real trace."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlab.core.policies import POLICIES
from kvlab.errors import InputError
from kvlab.lab import replay as module
from kvlab.lab.belady import Belady
from kvlab.lab.replay import Node, Replayed, Setup, curve_table, lru_curve, replay
from kvlab.lab.routers import ROUTERS, Seen
from kvlab.lab.traces import Request, Trace, from_blocks

TRACE = Path(__file__).parents[3] / "shared" / "traces" / "conversation_trace.jsonl"
needs_trace = pytest.mark.skipif(not TRACE.exists(), reason="the trace (Mooncake's release) is not in the project")


def blocks(chains: Sequence[Sequence[int]], **settings: Any) -> float:
    """The hit rate by blocks."""
    return replay(from_blocks(chains), 1, Setup(**settings)).hits.rates()["blocks"]


def prefixes(seed: int, count: int = 60, size: int = 12) -> list[list[int]]:
    """Chains of ids that stand for prefixes: each continues a part of an earlier one."""
    rng, fresh = random.Random(seed), itertools.count()
    chains: list[list[int]] = []
    for _ in range(count):
        before = rng.choice(chains) if chains else []
        kept = before[: rng.randint(0, len(before))]
        chains.append([*kept, *itertools.islice(fresh, rng.randint(0 if kept else 1, size))][:40])
    return chains


chains_of_prefixes = st.builds(prefixes, st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 12))


# --- by hand ------------------------------------------------------------------------------------
def test_a_hit_needs_all_blocks_before_it() -> None:
    assert blocks([[0, 1, 2], [0, 9, 2], [0, 1, 2]], device=10) == (1 + 3) / 9
    assert blocks([[0, 1], [2], [0, 3, 1]], device=2) == 0, "0 was evicted"
    assert blocks([], device=2) == 0


def test_the_four_hit_rates_worked_out_by_hand() -> None:
    requests = [Request(0, 1024, 1, [0, 1]), Request(1, 700, 1, [0, 2]), Request(2, 700, 1, [0, 2])]
    result = replay(requests, 512)
    rates = result.hits.rates()
    assert rates == {
        "blocks": 3 / 6,
        "tokens": (512 + 700) / (1024 + 700 + 700),
        "full_blocks": 2 / 4,  # of the last request, the full block only
        "requests": (0 + 0.5 + 1) / 3,
    }
    told = result.as_json()
    assert set(told["hit_rate"]) == {"blocks", "tokens", "full_blocks", "requests"}
    assert told["hits_by_source"] == {"device": 3, "host": 0, "store": 0}
    assert (told["requests"], told["blocks"], told["tokens"], told["full_blocks"]) == (3, 6, 2424, 4)


def test_blocks_of_the_answer_are_found_by_the_next_turn() -> None:
    first, second = Request(0, 32, 20, [1, 2], [1, 2, 3]), Request(1, 64, 1, [1, 2, 3, 4])
    assert replay([first, second], 16).hits.by_source["device"] == 3
    assert replay([replace(first, kept=None), second], 16).hits.by_source["device"] == 2


def test_exclusive_tiers_hold_the_sum_of_both() -> None:
    chains = [[1], [2], [3], [4]] * 3
    assert blocks(chains, device=2, host=2, mode="exclusive") == 8 / 12
    assert blocks(chains, device=2, host=2) == 0


def test_hits_are_counted_by_tier() -> None:
    result = replay(from_blocks([[1], [2], [3], [1], [3]]), 1, Setup(device=2, host=9))
    assert result.as_json()["hits_by_source"] == {"device": 1, "host": 1, "store": 0}


def test_a_device_hit_is_a_use_of_the_copy_on_the_host() -> None:
    """Else block 1 leaves host memory while the device uses it, and is nowhere when it leaves the device."""
    requests = from_blocks([[1], [2], [1], [3], [1], [4], [5], [1]])

    def found(use_below: bool) -> int:
        node = Node(POLICIES["lru"](2), POLICIES["lru"](3), use_below=use_below)
        return sum(sum(node.serve(request)) for request in requests)

    assert (found(True), found(False)) == (3, 2)


def test_blocks_that_nobody_used_for_the_ttl_are_gone() -> None:
    requests = [Request(at, 1, 1, [1]) for at in (0.0, 5.0, 10.0, 15.1)]
    assert replay(requests, 1, Setup(ttl_s=5.0)).hits.by_source["device"] == 2
    assert replay(requests, 1, Setup(ttl_s=4.9)).hits.by_source["device"] == 0
    tiers = Setup(device=1, host=9, ttl_s=5.0)
    assert replay([Request(0, 1, 1, [1]), Request(1, 1, 1, [2]), Request(5, 1, 1, [1])], 1, tiers).hits.by_source == {
        "host": 1
    }


def test_a_shared_store_has_what_other_nodes_computed() -> None:
    requests = from_blocks([[1, 2], [1, 2, 3], [1, 2, 3]])
    alone = replay(requests, 1, Setup(nodes=3))
    shared = replay(requests, 1, Setup(nodes=3, store=9))
    assert alone.hits.by_source.total() == 0
    assert shared.as_json()["hits_by_source"] == {"device": 0, "host": 0, "store": 5}
    assert (shared.computed, shared.requests) == ([2, 1, 0], [1, 1, 1])


def test_work_and_requests_by_node() -> None:
    requests = from_blocks([[1, 2], [1, 2], [3], [1, 4]])
    result = replay(requests, 1, Setup(nodes=2))
    assert (result.requests, result.computed, result.imbalance) == ([2, 2], [3, 3], 1.0)
    assert result.hits.rates()["blocks"] == 1 / 7


def test_a_router_of_ones_own_sees_what_each_node_has() -> None:
    told: list[tuple[int, int, list[int]]] = []

    def first(size: int, workers: Sequence[Seen], routed: int) -> int:
        told.append((size, routed, [worker.matched for worker in workers]))
        return 0

    replay(from_blocks([[1, 2], [1, 2, 3], [9]]), 1, Setup(nodes=2, router=first))
    assert told == [(2, 0, [0, 0]), (3, 1, [2, 0]), (1, 2, [0, 0])]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"policy": "random"}, "expected one of fifo, lru, lfu, s3fifo, arc, belady as the policy, got 'random'"),
        ({"mode": "both"}, "expected one of inclusive, exclusive as the mode, got 'both'"),
        ({"router": "magic"}, "as the router, got 'magic'"),
        ({"nodes": 0}, "expected at least one node"),
        ({"device": -1}, "capacities of 0 or more"),
        ({"ttl_s": float("nan")}, "expected a TTL of 0 or more"),
        ({"mode": "exclusive"}, "expected a host tier with exclusive tiers"),
        ({"policy": "belady"}, "expected a capacity for belady"),
        ({"policy": "belady", "device": 5, "nodes": 2}, "expected one node with one tier and no TTL for belady"),
        ({"policy": "belady", "device": 5, "host": 2}, "expected one node with one tier and no TTL for belady"),
    ],
)
def test_setups_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Setup(**settings)


# --- one way against another --------------------------------------------------------------------
@given(chains_of_prefixes)
def test_the_curve_is_the_replay_of_each_capacity(chains: list[list[int]]) -> None:
    curve = lru_curve(from_blocks(chains))
    for capacity, found in enumerate(curve):
        assert found == replay(from_blocks(chains), 1, Setup(device=capacity)).hits.by_source.total()
    assert curve[-1] == replay(from_blocks(chains), 1).hits.by_source.total()


def test_the_curve_needs_the_running_maximum() -> None:
    """Block 2 was used last, but block 1 before it is gone: at a capacity of 2, block 2 is found by nobody."""
    chains = [[1], [2], [3], [1, 2]]
    assert lru_curve(from_blocks(chains)) == [0, 0, 0, 2]


def test_a_table_of_the_curve_ends_at_the_endless_one() -> None:
    chains = prefixes(3, 200)
    table = curve_table(from_blocks(chains))
    assert table["blocks"] == sum(map(len, chains))
    assert table["rows"][-1]["hit_rate"] == replay(from_blocks(chains), 1).hits.rates()["blocks"]
    assert [row["capacity"] for row in table["rows"]] == sorted({row["capacity"] for row in table["rows"]})
    assert curve_table([])["rows"][0]["hit_rate"] == 0.0


def best(chains: list[list[int]], capacity: int) -> int:
    """The most blocks that any cache could find, by trying all that it could keep."""
    keys = sorted({key for chain in chains for key in chain})
    states = {frozenset[int](): 0}
    for chain in chains:
        after: dict[frozenset[int], int] = {}
        for has, found in states.items():
            leading = next((i for i, key in enumerate(chain) if key not in has), len(chain))
            pool = [key for key in keys if key in has or key in chain]
            for kept in itertools.combinations(pool, min(capacity, len(pool))):
                after[frozenset(kept)] = max(after.get(frozenset(kept), 0), found + leading)
        states = after
    return max(states.values())


@given(st.builds(prefixes, st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 3)), st.integers(0, 3))
def test_belady_is_the_best_that_can_be(chains: list[list[int]], capacity: int) -> None:
    chains = [chain[:4] for chain in chains]
    assert replay(from_blocks(chains), 1, Setup("belady", capacity)).hits.by_source.total() == best(chains, capacity)


@given(chains_of_prefixes, st.integers(0, 40))
def test_no_policy_beats_belady(chains: list[list[int]], capacity: int) -> None:
    bound = blocks(chains, policy="belady", device=capacity)
    assert all(blocks(chains, policy=name, device=capacity) <= bound for name in POLICIES)


def test_belady_without_its_rule_for_ties_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    chains = [[1, 2, 3, 4]] * 3
    assert blocks(chains, policy="belady", device=2) == 4 / 12

    class Shallow(Belady):
        """Evicts the shallowest of several blocks."""

        def serve(self, request: Request) -> tuple[int]:
            found = super().serve(replace(request, blocks=request.blocks[::-1]))
            return found if set(request.blocks) <= set(self._next) else (0,)

    monkeypatch.setattr(module, "Belady", Shallow)
    assert blocks(chains, policy="belady", device=2) == 0


@given(chains_of_prefixes, st.integers(0, 30), st.integers(0, 30))
def test_one_tier_is_two_of_which_one_is_empty(chains: list[list[int]], capacity: int, nodes: int) -> None:
    one = blocks(chains, device=capacity)
    assert one == blocks(chains, device=capacity, host=0) == blocks(chains, device=0, host=capacity)
    assert one == blocks(chains, device=capacity, host=0, mode="exclusive", store=0)
    assert one == blocks(chains, device=capacity, ttl_s=1e9)
    assert one == blocks(chains, device=capacity, nodes=nodes + 1, router=lambda size, workers, routed: nodes)


@given(chains_of_prefixes, st.sampled_from(sorted(ROUTERS)), st.integers(1, 70), st.integers(0, 50))
def test_all_routers_keep_their_promises(chains: list[list[int]], router: str, nodes: int, capacity: int) -> None:
    result: Replayed = replay(from_blocks(chains), 1, Setup(device=capacity, nodes=nodes, router=router))
    assert sum(result.requests) == len(chains) == result.hits.requests
    assert sum(result.computed) + result.hits.by_source.total() == sum(map(len, chains)) == result.hits.blocks
    assert 1 <= result.imbalance <= nodes + 1e-9


# --- the real trace -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def conversations() -> list[Request]:
    return list(Trace(TRACE))


CAPACITIES = (1_000, 5_859, 10_000, 30_000, 50_000, 100_000)
KNOWN = {
    "fifo": (0.043, 0.125, 0.181, 0.294, 0.334, 0.356),
    "lru": (0.044, 0.136, 0.211, 0.326, 0.355, 0.364),
    "lfu": (0.048, 0.097, 0.132, 0.276, 0.344, 0.363),
    "s3fifo": (0.056, 0.152, 0.195, 0.304, 0.349),
    "arc": (0.053, 0.142, 0.222, 0.311, 0.343),
    "belady": (0.191, 0.353, 0.366, 0.366, 0.366, 0.366),
}


@needs_trace
@pytest.mark.parametrize("policy", KNOWN)
def test_the_known_table_by_policy_and_capacity(policy: str, conversations: list[Request]) -> None:
    """Figures of two independent programs, three digits each."""
    for capacity, known in zip(CAPACITIES, KNOWN[policy], strict=False):
        found = replay(conversations, 512, Setup(policy, capacity)).hits.rates()["blocks"]
        assert found == pytest.approx(known, abs=0.0011), (capacity, found)


@needs_trace
def test_the_known_hit_rates_of_an_endless_cache(conversations: list[Request]) -> None:
    hits = replay(conversations, 512).hits
    expected = {"blocks": 0.3664, "tokens": 0.3736, "full_blocks": 0.3819, "requests": 0.3843}
    assert {name: round(rate, 4) for name, rate in hits.rates().items()} == expected
    assert round(hits.by_source.total() / hits.full_blocks, 4) == 0.3823, "what the published table divides"


@needs_trace
def test_the_known_figures_of_ten_nodes_and_of_two_tiers(conversations: list[Request]) -> None:
    pool = replay(conversations, 512, Setup(device=58_590)).hits.rates()["blocks"]
    assert round(pool, 3) == 0.359
    known = {"round_robin": (0.104, 1.05), "longest_prefix": (0.136, 10.01), "cost": (0.358, 1.1)}
    for router, (rate, imbalance) in known.items():
        result = replay(conversations, 512, Setup(device=5_859, nodes=10, router=router))
        assert round(result.hits.rates()["blocks"], 3) == rate and result.imbalance < imbalance
    for mode, rate in {"inclusive": 0.230, "exclusive": 0.276}.items():
        tiers = Setup(device=6_000, host=12_000, mode=mode)
        assert round(replay(conversations, 512, tiers).hits.rates()["blocks"], 3) == rate


MEMORY = {
    (834, 0): (0.059, 0.359, 0.178, 0.359),
    (834, 3072): (0.086, 0.359, 0.324, 0.359),
    (5859, 0): (0.104, 0.359, 0.358, 0.359),
}
"""Blocks of 64 MiB on the device and in host memory of each of ten engines; hit rates in turn and by cost, each
without and with a store of 60,000 blocks that all share. The first is what an H100 has beside the 8B model."""


@pytest.mark.slow
@needs_trace
@pytest.mark.parametrize("memory", MEMORY)
def test_what_a_shared_store_adds_depends_on_the_memory_of_the_engines(
    memory: tuple[int, int], conversations: list[Request]
) -> None:
    device, host = memory
    found = [
        replay(conversations, 512, Setup(device=device, host=host, store=store, nodes=10, router=router))
        for router in ("round_robin", "cost")
        for store in (None, 60_000)
    ]
    assert tuple(round(result.hit_rate, 3) for result in found) == MEMORY[memory]


@needs_trace
def test_an_hour_of_the_trace_does_not_show_all_that_comes_again(conversations: list[Request]) -> None:
    known = {5: 0.203, 15: 0.303, 30: 0.341, 59: 0.366}
    begin = conversations[0].at_s
    for minutes, rate in known.items():
        first = [request for request in conversations if request.at_s - begin < 60 * minutes]
        assert round(replay(first, 512).hit_rate, 3) == rate


@needs_trace
def test_when_requests_and_reuses_of_the_trace_come(conversations: list[Request]) -> None:
    begin, end = conversations[0].at_s, conversations[-1].at_s
    tokens, last, gaps = Counter[int](), dict[int, float](), list[float]()
    for request in conversations:
        tokens[int((request.at_s - begin) // 10)] += request.tokens
        gaps += [request.at_s - last[block] for block in request.blocks if block in last]
        last |= dict.fromkeys(request.blocks, request.at_s)
    mean = sum(tokens.values()) / (end - begin)
    assert round(mean) == 40_937
    assert round(max(tokens.values()) / 10 / mean, 1) == 2.2
    assert round(statistics.median(gaps)) == 114


@needs_trace
def test_the_curve_of_the_trace_is_its_table(conversations: list[Request]) -> None:
    curve = lru_curve(conversations)
    for capacity in CAPACITIES:
        assert curve[capacity] == replay(conversations, 512, Setup(device=capacity)).hits.by_source.total()
