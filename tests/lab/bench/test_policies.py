"""`bench policies` reports what it says, and its keys look like conversations."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from kvlab.core.policies import POLICIES
from kvlab.lab.bench import policies as bench_policies
from kvlab.lab.bench.policies import CAPACITY, make_requests
from kvlab.lab.replay import Setup, replay
from kvlab.lab.traces import from_blocks


def test_bench_policies_reports_every_policy(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    chains = [[0, 1, 2], [0, 1, 3], [4], [0, 1, 2, 5]]
    rows = [
        {"timestamp": 0, "input_length": 512 * len(chain), "output_length": 1, "hash_ids": chain} for chain in chains
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = bench_policies.run(str(trace), capacity=6, rounds=1)
    assert (result["requests"], result["accesses"], result["distinct"]) == (4, 11, 6)
    assert (result["keys"], result["capacity"]) == ("trace.jsonl", 6)
    assert [row["policy"] for row in result["rows"]] == list(POLICIES)
    for row in result["rows"]:
        assert set(row) == {"policy", "accesses_per_s", "hit_rate"} and row["accesses_per_s"] > 0
        assert row["hit_rate"] == round(5 / 11, 4)
    assert {"about", "machine", "versions", "noisy", "aa_ratio"} < set(result)
    json.dumps(result)


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
        found = replay(from_blocks(chains), 1, Setup(device=capacity)).hits.rates()["blocks"]
        assert found == pytest.approx(rate, abs=0.015)
