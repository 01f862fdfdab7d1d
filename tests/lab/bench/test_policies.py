"""`bench policies` reports what it says, its keys look like conversations, and a real trace gives known hit rates."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from kvlab.core.policies import POLICIES
from kvlab.errors import InputError
from kvlab.lab.bench import policies as bench_policies
from kvlab.lab.bench.policies import CAPACITY, make_requests, read_trace, replay


def test_bench_policies_reports_every_policy(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    chains = [[0, 1, 2], [0, 1, 3], [4], [0, 1, 2, 5]]
    trace.write_text("".join(json.dumps({"timestamp": 0, "hash_ids": chain}) + "\n" for chain in chains))
    result = bench_policies.run(str(trace), capacity=6, rounds=1)
    assert (result["requests"], result["accesses"], result["distinct"]) == (4, 11, 6)
    assert (result["keys"], result["capacity"]) == ("trace.jsonl", 6)
    assert [row["policy"] for row in result["rows"]] == list(POLICIES)
    for row in result["rows"]:
        assert set(row) == {"policy", "accesses_per_s", "hit_rate"} and row["accesses_per_s"] > 0
        assert row["hit_rate"] == round(5 / 11, 4)
    assert {"about", "machine", "versions", "noisy", "aa_ratio"} < set(result)
    json.dumps(result)


def test_what_is_found_behind_a_miss_does_not_count() -> None:
    assert replay(POLICIES["lru"](10), [[0, 1, 2], [0, 9, 2], [0, 1, 2]]) == 1 + 3


def test_made_requests_are_prefixes_of_conversations_and_always_the_same() -> None:
    chains = make_requests(2000)
    assert chains == make_requests(2000) != make_requests(2000, seed=1)
    assert all(chain[0] == 0 and 2 <= len(chain) == len(set(chain)) <= bench_policies.LONGEST for chain in chains)
    before: dict[int, int] = {}
    for chain in chains:
        for parent, block in pairwise(chain):
            assert before.setdefault(block, parent) == parent  # a block stands behind one prefix only


def test_made_requests_come_close_to_the_trace() -> None:
    chains = make_requests()
    uses = Counter(block for chain in chains for block in chain)
    assert 0.7 < sum(n == 1 for n in uses.values()) / len(uses) < 0.8
    for capacity, rate in ((CAPACITY, 0.136), (30_000, 0.326)):
        assert replay(POLICIES["lru"](capacity), chains) / uses.total() == pytest.approx(rate, abs=0.015)


@pytest.mark.parametrize(
    "text",
    [
        *("", "\n", "{", "[1]", "7", "[" * 100_000, "\xff\xfe", '{"ids": [1]}', '{"hash_ids": 1}', '{"hash_ids": []}'),
        *('{"hash_ids": ["a", [1]]}', '{"hash_ids": [1.5]}', '{"hash_ids": [1]}\n{"hash_ids": null}'),
    ],
)
def test_a_file_that_is_no_trace_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"^expected .* in .*t\.jsonl.*; use a trace in Mooncake's format$"):
        read_trace(tmp_path / "t.jsonl")


TRACE = Path(__file__).parents[4] / "shared" / "traces" / "conversation_trace.jsonl"
CAPACITIES = (1_000, 5_859, 30_000)
FIGURES = {
    "fifo": (0.043, 0.125, 0.294),
    "lru": (0.044, 0.136, 0.326),
    "lfu": (0.048, 0.097, 0.276),
    "s3fifo": (0.056, 0.152, 0.304),
    "arc": (0.053, 0.142, 0.311),
}


def test_every_policy_has_figures_of_the_real_trace() -> None:
    assert FIGURES.keys() == POLICIES.keys()


@pytest.fixture(scope="module")
def conversations() -> list[list[int]]:
    if not TRACE.exists():
        pytest.skip("needs conversation_trace.jsonl of the Mooncake paper (FAST '25) in ../shared/traces")
    return read_trace(TRACE)


@pytest.mark.parametrize("name", POLICIES)
def test_hit_rates_on_the_conversation_trace_are_the_known_ones(name: str, conversations: list[list[int]]) -> None:
    blocks = sum(map(len, conversations))
    rates = [round(replay(POLICIES[name](capacity), conversations) / blocks, 3) for capacity in CAPACITIES]
    assert tuple(rates) == FIGURES[name]
