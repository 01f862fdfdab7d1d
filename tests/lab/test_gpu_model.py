"""The computed side of `bench gpu`: sizes, work, roof, and which side wins at which length."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kvlab.lab import costs
from kvlab.lab.costs import PCIE, Costs, Link
from kvlab.lab.gpu_model import (
    GPT_OSS_120B,
    H200,
    LLAMA_1B,
    LLAMA_8B,
    PUBLISHED,
    QWEN_05B,
    Roof,
    Shape,
    Work,
    break_even_gbps,
    crossover,
    decode_work,
    fitted,
    prefill_work,
    published,
    sides,
)
from kvlab.model import Llama, load_model

LENGTHS = [*PUBLISHED]


@pytest.mark.parametrize(
    ("shape", "billions", "kv_bytes"),
    [(QWEN_05B, 0.494, 12_288), (LLAMA_1B, 1.236, 32_768), (LLAMA_8B, 8.030, 131_072)],
)
def test_published_shapes_have_the_published_sizes(shape: Shape, billions: float, kv_bytes: int) -> None:
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.001)
    assert shape.kv_bytes() == kv_bytes and shape.hidden == shape.heads * shape.head_dim


def test_the_sizes_are_those_of_the_model() -> None:
    model = load_model()
    shape = Shape.of("shipped", model.config)
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert shape.config(4096) == replace(model.config, eos_token_ids=())
    with torch.device("meta"):
        untied = Llama(LLAMA_8B.config(1024))
    assert LLAMA_8B.parameters == sum(weight.numel() for weight in untied.parameters())
    assert costs.LLAMA_8B.kv_bytes == LLAMA_8B.kv_bytes()
    assert costs.LLAMA_8B.parameters == pytest.approx(LLAMA_8B.parameters, rel=1e-3)


def test_work_by_hand() -> None:
    tiny = Shape("tiny", layers=1, heads=2, kv_heads=1, head_dim=4, hidden=8, mlp=16, vocab=10)
    assert tiny.weights == 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # q, k and v, o, MLP
    assert tiny.kv_bytes(4) == 2 * 4 * 4
    prefill = prefill_work(tiny, 3, element_bytes=4)
    assert prefill.flops == 2 * (3 * 576 + 80) + 4 * 8 * 6, "six pairs: 1 + 2 + 3"
    assert prefill.bytes == 4 * (576 + 80) + 3 * 32
    decode = decode_work(tiny, 3, batch=2, element_bytes=4)
    assert decode.flops == 2 * (2 * (576 + 80) + 4 * 8 * 4)
    assert decode.bytes == 4 * (576 + 80) + 2 * 4 * 32


def test_decode_is_bound_by_memory_and_a_long_prefill_by_computing() -> None:
    roof = Roof(750e12, 4e12)
    for shape in (QWEN_05B, LLAMA_1B, LLAMA_8B):
        assert roof.bound(decode_work(shape, 8192)) == roof.bound(decode_work(shape, 8192, batch=16)) == "memory"
        assert roof.bound(prefill_work(shape, 8192)) == "compute"
    assert decode_work(LLAMA_8B, 0).intensity == pytest.approx(1, abs=0.05), "a multiply and an add for two bytes"
    assert roof.seconds(Work(750e12, 4e12)) == 1 and roof.ridge == 187.5
    assert roof.seconds(Work(1, 8e12)) == 2 and roof.seconds(Work(1500e12, 1)) == 2


def test_break_even_is_where_both_take_the_same_time() -> None:
    gbps = break_even_gbps(LLAMA_8B.kv_bytes(), 8192, 0.4)
    assert LLAMA_8B.kv_bytes() * 8192 / (1e9 * gbps) == pytest.approx(0.4)


@pytest.mark.parametrize("pair", [0.0, 1e-9, 1e-7])
@pytest.mark.parametrize("floor", [0.0, 0.01, 1.25])
@pytest.mark.parametrize("gbps", [0.2, 1.0, 20.0])
@pytest.mark.parametrize("call", [0.0, 0.005])
def test_the_crossover_is_where_fetching_begins_to_win_for_good(
    pair: float, floor: float, gbps: float, call: float
) -> None:
    case = Costs(93_000, call, 1e-4, prefill_pair_s=pair, store=Link(floor, 1e9 * gbps))
    at = crossover(case)
    if math.isinf(at):
        assert all(row["wins"] == "compute" for row in sides(case, [10**4, 10**6, 10**8]))
    else:
        after = int(at)
        assert all(row["wins"] == "fetch" for row in sides(case, [after, after + 1, 2 * after, 100 * after]))
        assert after == 1 or sides(case, [after - 1])[0]["wins"] == "compute"


def test_a_crossover_is_exact_though_pairs_cost_next_to_nothing() -> None:
    """As after a fit of prefills that are short."""
    wire = Link(0.01, 1e9)
    plain, small = (Costs(93_000, 0.0, 1e-4, prefill_pair_s=pair, store=wire) for pair in (0.0, 1e-22))
    assert crossover(small) == crossover(plain) == 1429


def test_a_fit_of_measured_prefills_finds_their_costs() -> None:
    true = Costs(1000, 0.002, 3e-5, prefill_pair_s=2e-9)
    found = fitted(1000, {n: true.prefill(n, 0) for n in (512, 2048, 8192, 16384)}, Link())
    assert found.prefill(32768, 0) == pytest.approx(true.prefill(32768, 0), rel=1e-6)
    assert fitted(1000, {512: 0.01, 1024: 0.02}, Link()).prefill(2048, 0) == pytest.approx(0.04)


# --- the published crossover --------------------------------------------------------------------
def test_what_was_published_is_reproduced_and_pulling_wins_at_every_length() -> None:
    rows = sides(published(), LENGTHS)
    assert [row["wins"] for row in rows] == [
        "fetch" if pull < compute else "compute" for compute, pull in PUBLISHED.values()
    ]
    assert {row["wins"] for row in rows} == {"fetch"}
    for row, (compute, pull) in zip(rows, PUBLISHED.values(), strict=True):
        assert row["compute_ms"] == pytest.approx(compute, rel=0.02)
        assert row["fetch_ms"] == pytest.approx(pull, rel=0.08)
    assert crossover(published()) < 2048


def test_two_lengths_foretell_the_winner_at_the_others() -> None:
    ends = {n: PUBLISHED[n] for n in (2048, 49152)}
    pulls = [pull / 1000 for _, pull in ends.values()]
    token = (pulls[1] - pulls[0]) / (49152 - 2048)
    wire = Link(pulls[0] - 2048 * token, GPT_OSS_120B.kv_bytes / token)
    case = fitted(GPT_OSS_120B.kv_bytes, {n: compute / 1000 for n, (compute, _) in ends.items()}, wire)
    for row, (compute, pull) in zip(sides(case, LENGTHS), PUBLISHED.values(), strict=True):
        assert (row["wins"] == "fetch") == (pull < compute)
        assert (row["compute_ms"], row["fetch_ms"]) == (pytest.approx(compute, rel=0.3), pytest.approx(pull, rel=0.15))


def test_a_data_sheet_foretells_the_same_winners() -> None:
    """Of what was published, only the wire is used; prefills follow from the sizes of the model and of the GPU."""
    computed = costs.compute(GPT_OSS_120B, H200, PCIE, published().store)
    assert [row["wins"] for row in sides(computed, LENGTHS)] == ["fetch"] * 5
    for row, (compute, _) in zip(sides(computed, LENGTHS), PUBLISHED.values(), strict=True):
        assert compute / 2.5 < row["compute_ms"] < compute * 2.5


@pytest.mark.parametrize("floor_ms", [1200, 1300])
def test_a_high_floor_of_the_pull_moves_the_crossover_to_8k(floor_ms: int) -> None:
    """93 KB a token, over the same wire. Its prefill is not published; the tie near 8K says what it is."""
    wire = Link(floor_ms / 1000, published().store.bytes_per_s)
    token_s = (wire.latency_s + 8192 * 93_000 / wire.bytes_per_s) / 8192
    case = Costs(93_000, prefill_token_s=token_s, store=wire)
    assert crossover(case) == pytest.approx(8192, abs=2)
    assert [row["wins"] for row in sides(case, LENGTHS) if row["tokens"] != 8192] == [
        "compute",
        "fetch",
        "fetch",
        "fetch",
    ]
    low = replace(case, store=replace(wire, latency_s=published().store.latency_s))
    assert crossover(low) < 2048, "it is the floor, not the size"
