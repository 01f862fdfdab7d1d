"""`bench hash` reports what it says."""

from __future__ import annotations

import pytest

from kvlab.core.keys import KEY_BYTES, field
from kvlab.lab.bench import hash as bench_hash


def test_bench_hash_reports_every_block_size() -> None:
    result = bench_hash.run(tokens=1024, rounds=1)
    assert [row["block_tokens"] for row in result["rows"]] == [16, 64, 256]
    for row in result["rows"]:
        assert {"ns_per_token", "us_per_block", "sha256_floor_ns_per_token", "ratio_to_floor"} < set(row)
        assert row["us_per_block"] == pytest.approx(row["ns_per_token"] * row["block_tokens"] / 1000)
    assert [row["prefix_tokens"] for row in result["by_prefix"]] == list(bench_hash.PREFIXES)
    assert {"machine", "versions", "noisy", "aa_ratio"} < set(result)


def test_the_floor_hashes_messages_of_the_right_length() -> None:
    chain = len(field(b"kvlab/1/block") + field(bytes(KEY_BYTES)) + field(b""))
    assert chain == bench_hash.MESSAGE_BYTES
