"""`bench serve` measures what it names: the same answers in each way, cold saves, loads that are routed."""

from __future__ import annotations

import json

import pytest

from kvlab.engine import generate
from kvlab.lab.bench import serve
from kvlab.lab.padded import generate_padded
from kvlab.model import Tokenizer, held_out_tokens, load_model


@pytest.mark.redis
@pytest.mark.slow
def test_bench_serve_reports_batches_saves_and_routers() -> None:
    result = serve.run((2,), (64,), rounds=1, steps=3, open_requests=3, routed=6, per_second=20.0)
    assert [(row["batch"], row["context"]) for row in result["rows"]] == [(2, 64)]
    assert all(min(row.values()) > 0 for row in result["rows"])
    assert all(row["ttft_p50_ms"] <= row["ttft_p95_ms"] for row in [*result["rows"], *result["routers"]])
    assert result["saves"]["blocks_saved"] == 2 * 24 * 4, "every full block of 24 prompts, in two rounds"
    rows = {row["router"]: row for row in result["routers"]}
    assert rows.keys() == {"one worker", "round_robin", "least_loaded", "longest_prefix", "cost"}
    assert sum(rows["cost"]["requests"]) == 6 and rows["longest_prefix"]["imbalance"] == 2.0
    assert all(0 < row["hit_rate"] < 1 <= row["imbalance"] <= 2 for row in rows.values())
    json.dumps(result)


def test_the_three_ways_give_the_same_answers() -> None:
    model, text = load_model(), held_out_tokens(Tokenizer())
    prompts, new = [text[i * 90 :][: 20 + 30 * i] for i in range(3)], [3, 9, 5]
    expected = [generate(model, p, n, stop_at_eos=False).tokens for p, n in zip(prompts, new, strict=True)]
    assert generate_padded(model, prompts, new) == expected
    assert [record.tokens for record in serve._continuous(model, prompts, new, 2)] == expected
