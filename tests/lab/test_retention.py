"""Pins and TTLs on traces: by hand, against plain caches, and the committed result."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlab.core.policies import LRU, POLICIES
from kvlab.errors import InputError
from kvlab.lab import retention
from kvlab.lab.replay import Setup, replay
from kvlab.lab.retention import Case, Pinning, expiring, pinned, shared, with_job
from kvlab.lab.traces import Request, Trace, from_blocks

ROOT = Path(__file__).parents[2]
TRACE = ROOT.parent / "shared" / "traces" / "conversation_trace.jsonl"
RESULT = ROOT / "docs/results/retention.json"
PAGE = ROOT / "docs/04_production_deployment.md"
chains = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), min_size=1, max_size=40)


def scan(first: int, count: int) -> list[list[int]]:
    return [[first + i] for i in range(count)]


def test_a_pinned_block_outlasts_a_scan_and_one_without_a_pin_does_not() -> None:
    requests = from_blocks([[1, 2], *scan(100, 10), [1, 2]])
    row = pinned(Case("t", "k", requests, {1, 2}), "lru", 4, 60)
    assert (row["pinned_without"], row["pinned_with"]) == (0, 0.5)
    assert (row["others_without"], row["others_with"], row["pinned"]) == (0, 0, 2)
    assert row["idle"] == round((1 + 7 * 2) / (4 * 12), 4)  # LRU loses 1 at the third of the scan, then 2 as well


def test_a_lease_ends_unless_it_is_used() -> None:
    cache = Pinning("lru", 4, {1}, 5)
    for at_s, blocks, held in ((0, [1], [1]), (4, [1], [1]), (8, [100], [1]), (9, [101], []), (10, [1], [1])):
        cache.serve(Request(float(at_s), 1, 1, blocks))
        assert [*cache.held] == held


def test_no_more_than_half_of_the_room_is_pinned() -> None:
    cache = Pinning("lru", 5, {1, 2, 3}, 60)
    cache.serve(Request(0.0, 1, 1, [1, 2, 3]))
    assert [*cache.held] == [1, 2] and cache.policy.pinned == 2
    assert cache.serve(Request(1.0, 1, 1, [1, 2, 3])) == 3


@given(chains, st.integers(0, 12), st.sampled_from(sorted(POLICIES)))
def test_with_nothing_pinned_it_is_a_plain_replay(blocks: list[list[int]], capacity: int, policy: str) -> None:
    requests = from_blocks(blocks)
    row = pinned(Case("t", "k", requests, set()), policy, capacity, 60)
    expected = replay(requests, 1, Setup(policy, capacity)).hits.rates()["blocks"]
    assert row["others_with"] == row["others_without"] == row["all_with"] == round(expected, 4)
    assert row["idle"] == 0


@given(chains, st.integers(0, 12), st.sampled_from(sorted(POLICIES)), st.integers(0, 9), st.integers(1, 50))
def test_pins_hold_at_most_half_and_are_never_evicted(
    blocks: list[list[int]], capacity: int, policy: str, most: int, lease_s: int
) -> None:
    cache = Pinning(policy, capacity, set(range(most)), lease_s)
    for request in from_blocks(blocks):
        before = {*cache.held} - {key for key, end in cache._ends.items() if end <= request.at_s}
        found = cache.serve(request)
        assert before <= {*cache.held} and all(key in cache.policy for key in cache.held)
        assert len(cache.held) <= capacity // 2 and cache.policy.used <= capacity
        assert found <= len(request.blocks)


def test_what_is_shared_is_in_so_many_prompts_and_in_more_than_one() -> None:
    requests = from_blocks([[1, 2, 3], [1, 2, 4], [1, 5], [6]])
    assert shared(requests, 0.5) == {1, 2} and shared(requests, 0.6) == {1}
    assert shared(requests, 0.1) == {1, 2}  # the others came once


def test_a_job_comes_at_its_times_with_one_prompt() -> None:
    requests = from_blocks([[n] for n in range(25)])
    merged, prompt = with_job(requests, 3, 10)
    job = [r for r in merged if r.blocks[0] < 0]
    assert prompt == {-1, -2, -3} and [r.at_s for r in job] == [0, 10, 20]
    assert all([*r.blocks[:3]] == [-1, -2, -3] for r in job)
    assert len({block for r in job for block in r.blocks}) == 3 + 3  # and one block of its own each
    assert [r for r in merged if r.blocks[0] >= 0] == requests
    assert [r.at_s for r in merged] == sorted(r.at_s for r in merged)


def test_a_ttl_beside_lru_by_hand() -> None:
    requests = from_blocks([[1], [2], [1], [3], [4], [1]])  # one a second
    rows = {row["ttl_s"]: row for row in expiring(requests, (1, 2, 100))}
    assert [rows[ttl_s]["hit_rate"] for ttl_s in (1, 2, 100)] == [0, round(1 / 6, 4), round(2 / 6, 4)]
    assert rows[100]["mean_blocks"] == round((1 + 2 + 2 + 3 + 4 + 4) / 6)
    assert rows[100]["lru_hit_rate"] == round(replay(requests, 1, Setup("lru", 3)).hit_rate, 4)
    assert rows[1]["lru_hit_rate"] == round(replay(requests, 1, Setup("lru", rows[1]["mean_blocks"])).hit_rate, 4)


@pytest.mark.parametrize("wrong", [{"share": 0}, {"share": 1.1}, {"lease": 0}, {"every": -1}])
def test_numbers_that_mean_nothing_are_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected a share"):
        retention.run(**wrong)


def test_the_command_takes_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "MADE", {})
    lines = [{"timestamp": 1000 * n, "input_length": 2, "output_length": 1, "hash_ids": [0, n + 1]} for n in range(50)]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(line | {"block_size": 1}) + "\n" for line in lines))
    result = retention.run(str(file), share=1.0, every=10)
    assert {row["trace"] for row in result["pins"]} == {row["trace"] for row in result["ttls"]} == {"own.jsonl"}
    assert [row["pinned"] for row in result["pins"]] == [1] * 8 + [29] * 8


# --- the committed result -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    committed: dict[str, Any] = json.loads(RESULT.read_text("utf-8"))
    return committed


def rows_of(result: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return [row for row in result["pins"] if all(row[name] == value for name, value in fields.items())]


def test_the_committed_result_is_what_the_generated_workloads_give(result: dict[str, Any]) -> None:
    requests = retention._made("chat")
    case = Case("chat", "shared", requests, shared(requests, retention.MADE["chat"][1]))
    for row in rows_of(result, trace="chat", pins="shared")[:2]:
        assert pinned(case, row["policy"], row["capacity"], result["lease_s"]) == row
    own = [row for row in result["ttls"] if row["trace"] == "chat"]
    assert [{"trace": "chat", **row} for row in expiring(requests)] == own


@pytest.mark.skipif(not TRACE.exists(), reason="the trace (Mooncake's release) is not in the project")
def test_the_committed_result_is_what_the_trace_gives(result: dict[str, Any]) -> None:
    requests = list(Trace(TRACE))
    case = Case(TRACE.name, "job", *with_job(requests, retention.JOB_BLOCKS, result["every_s"]))
    row = rows_of(result, trace=TRACE.name, pins="job", policy="lru")[1]
    assert pinned(case, "lru", row["capacity"], result["lease_s"]) == row


def test_what_the_page_concludes_is_in_the_result(result: dict[str, Any]) -> None:
    hot = [*rows_of(result, trace=TRACE.name, pins="shared"), *rows_of(result, trace="chat", pins="shared")]
    assert all(row["pinned_with"] == row["pinned_without"] >= 0.99 for row in hot)  # any policy keeps them anyway
    rare = rows_of(result, trace=TRACE.name, pins="job", policy="lru")
    assert [row["pinned_without"] for row in rare][:3] == [0, 0, 0] and all(row["pinned_with"] > 0.8 for row in rare)
    assert all(row["others_without"] - row["others_with"] < 0.002 for row in rare)
    small = rows_of(result, trace="agentic", pins="shared", policy="lru")[1]
    assert small["pinned_with"] > small["pinned_without"] and small["all_with"] < small["all_without"]


def test_the_tables_of_the_page_are_those_of_the_result(result: dict[str, Any]) -> None:
    page = PAGE.read_text("utf-8")
    found = re.findall(r"^\| `?([\w.]+)`? \| (shared|job) \| (\w+) \| ([\d,]+) \| (.*) \|$", page, re.MULTILINE)
    assert len(found) >= 8
    for trace, kind, policy, capacity, numbers in found:
        name = TRACE.name if trace == "Mooncake" else trace
        (row,) = rows_of(result, trace=name, pins=kind, policy=policy, capacity=int(capacity.replace(",", "")))
        names = ("pinned_without", "pinned_with", "others_without", "others_with", "all_without", "all_with", "idle")
        assert numbers.split(" | ") == [f"{row[each]:.3f}" for each in names], (trace, kind, policy, capacity)
    ttls = re.findall(r"^\| (\d+) s \| (.*) \|$", page, re.MULTILINE)
    own = {str(row["ttl_s"]): row for row in result["ttls"] if row["trace"] == TRACE.name}
    assert {ttl for ttl, _ in ttls} == own.keys()
    for ttl, numbers in ttls:
        row = own[ttl]
        shown = [f"{row['mean_blocks']:,}", f"{row['hit_rate']:.3f}", f"{row['lru_hit_rate']:.3f}"]
        assert numbers.split(" | ") == shown


def test_the_capacity_of_lru_is_what_the_rows_say() -> None:
    assert isinstance(Pinning("lru", 3).policy, LRU) and Pinning("lru", 3).policy.capacity == 3
