"""Inclusive against exclusive tiers: small cases by hand, and the figures of a real trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvlab.lab.two_tiers import hit_rate

TRACE = Path(__file__).parents[3] / "shared" / "traces" / "conversation_trace.jsonl"


def test_exclusive_tiers_hold_the_sum_of_both() -> None:
    requests = [["a"], ["b"], ["c"], ["d"]] * 3
    assert hit_rate(requests, 2, 2, exclusive=True) == 8 / 12
    assert hit_rate(requests, 2, 2, exclusive=False) == 0


def test_a_hit_needs_all_blocks_before_it() -> None:
    assert hit_rate([["a", "b"], ["c"], ["d", "b"]], 4, 4, exclusive=True) == 0
    assert hit_rate([["a", "b"], ["a", "b", "c"]], 4, 4, exclusive=False) == 2 / 5


def test_a_device_hit_is_a_use_of_the_copy_on_the_host() -> None:
    """Else "a" leaves host memory while the device uses it, and is nowhere when it leaves the device."""
    requests = [["a"], ["b"], ["a"], ["c"], ["a"], ["d"], ["e"], ["a"]]
    assert hit_rate(requests, 2, 3, exclusive=False) == 3 / 8


def test_nothing_is_no_hit() -> None:
    assert hit_rate([], 2, 2, exclusive=True) == 0


@pytest.mark.skipif(not TRACE.exists(), reason="the trace (Mooncake's release) is not in the project")
def test_a_real_trace_gives_the_known_figures() -> None:
    """12,031 chat requests, blocks of 512 tokens, 6,000 blocks on the device and 12,000 on the host, LRU."""
    requests = [json.loads(line)["hash_ids"] for line in TRACE.read_text().splitlines()]
    rates = [round(hit_rate(requests, 6_000, 12_000, exclusive), 3) for exclusive in (False, True)]
    assert rates == [0.230, 0.276]
    assert round(hit_rate(requests, 6_000, 12_000, False, use_below=False), 3) == 0.223
