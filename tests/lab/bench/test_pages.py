"""`bench pages` reports what it says, and its tables are what they are called."""

from __future__ import annotations

import json
import statistics

import torch

from kvlab.engine.pages import PAGE_TOKENS
from kvlab.lab.bench import pages as bench_pages
from kvlab.model import load_model


def test_bench_pages_reports_speed_and_waste() -> None:
    result = bench_pages.run((32, 64), rounds=1)
    assert [row["prefix_tokens"] for row in result["rows"]] == [32, 64]
    names = {"prefix_tokens", "cold_ms", "run_ms", "scattered_ms", "speedup_run", "speedup_scattered"}
    assert all(set(row) == names and min(row.values()) > 0 for row in result["rows"])
    assert result["decode_ratio"] > 0 and result["decode_ratio_scattered"] > 0
    assert {"about", "machine", "versions", "noisy", "aa_ratio"} < set(result)
    json.dumps(result)


def test_both_tables_hold_the_same_kv_and_only_one_is_a_run() -> None:
    model, tokens = load_model(), torch.arange(100, 180)[None]
    with torch.inference_mode():
        run, scattered = bench_pages._filled(model, tokens, 16)
        assert (run.is_run, scattered.is_run) == (True, False)
        assert torch.equal(run.read(80), scattered.read(80))


def test_pages_waste_half_a_page_and_contiguous_kv_what_the_answer_did_not_use() -> None:
    lengths = bench_pages.chat_lengths(4096)
    assert 350 < statistics.median(lengths) < 600 and max(lengths) <= 4096
    waste = bench_pages.waste(4096)
    expected = PAGE_TOKENS / 2 / statistics.fmean(lengths)
    assert abs(waste["paged"] - expected) < 0.005
    assert waste["contiguous"] > 0.8
