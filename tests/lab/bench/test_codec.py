"""`bench codec` reports what it says."""

from __future__ import annotations

import json

import pytest

from kvlab.lab.bench import codec as bench_codec


@pytest.mark.slow
def test_bench_codec_reports_every_codec() -> None:
    result = bench_codec.run(windows=2, blocks=4, rounds=1)
    rows = {row["codec"]: row for row in result["rows"]}
    assert len(rows) == 5 * 3 + 2
    want = {"codec", "x_fp32", "encode_gbps", "decode_gbps", "fp16_cast_gbps", "memcpy_gbps"}
    assert all(set(row) == want | {"kl", "kl_se", "ppl_delta_pct", "top1"} for row in rows.values())
    assert rows["fp32"]["kl"] == 0 and rows["fp32"]["top1"] == 1
    assert 0 < rows["bf16"]["kl"] < rows["int8"]["kl"] < rows["int4"]["kl"]
    assert 0.999 < rows["fp32"]["x_fp32"] < 1 and 1.999 < 2 * rows["fp32"]["x_fp32"] <= rows["fp16"]["x_fp32"] * 1.001
    for precision in ("fp32", "fp16", "bf16", "int8", "int4"):
        assert rows[f"{precision}+zstd"]["x_fp32"] > rows[precision]["x_fp32"]
        assert rows[f"{precision}+zstd"]["kl"] == rows[precision]["kl"]
    assert result["reference"]["kl"] > rows["int8"]["kl"]
    json.dumps(result)
