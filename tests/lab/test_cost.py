"""Money: values worked out by hand, laws that hold at any price, and the claims of the brief."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf, isclose, nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlab.errors import InputError
from kvlab.lab.cost import (
    CONTEXT,
    LLAMA_70B,
    Bill,
    Load,
    Node,
    Tier,
    break_even_hit_rate,
    break_even_keep_s,
    cached_input_discount,
    gpu_s,
    h100,
    measured,
    prompt_needed,
    roi,
    sensitivity,
    usd_per_mtok,
)
from kvlab.lab.costs import LLAMA_8B, Costs, Link
from kvlab.lab.prices import CROSS_ZONE, ENGINEER, GPU, MANAGED, RAM, RATES, STALL, UTILISATION, VM, Price, interval

SMALL, LARGE = h100(LLAMA_8B), h100(LLAMA_70B, 4)
CLAIMED = Load(100_000)
"""The brief's requests a month, as long as a chat with a system prompt; .9 of the prompts' tokens are found."""


def exact(value: float) -> Price:
    return Price("exact", "USD", value, value, value, "none", "2026", "a test")


EXACT: dict[str, Any] = {
    "gpu": exact(3.6),
    "engineer": exact(100),
    "utilisation": exact(0.5),
    "stall": exact(0.0),
}
PLAIN = Node(Costs(kv_bytes=1000, prefill_token_s=1e-3, step_request_s=1e-2, store=Link(0.0, 1e9)))
"""A prompt token takes 1 ms, a new token 10 ms, and GPUs of $3.6 an hour cost $0.001 a second."""


def bills(load: Load, node: Node, tier: Tier, **prices: Any) -> tuple[Bill, Bill]:
    result = roi(load, node, tier, **prices)
    return result.fractional, result.whole_gpus


# --- by hand ------------------------------------------------------------------------------------
def test_a_million_tokens() -> None:
    assert usd_per_mtok(500, 1.8) == 1.0
    assert usd_per_mtok(500, 1.8, 0.25) == 4.0
    assert round(usd_per_mtok(1597, VM.value), 4) == 0.0142, "the shipped model on two cores, batch of 16"


def test_gpu_seconds_of_a_request() -> None:
    load = Load(1, prompt=1000, new=10, hit_rate=0.5)
    assert gpu_s(PLAIN, replace(load, hit_rate=0)) == pytest.approx(1.0 + 0.1)
    assert gpu_s(PLAIN, load, stall=0) == pytest.approx(0.5 + 0.1)
    assert gpu_s(PLAIN, load, stall=1) == pytest.approx(0.5 + 0.1 + 500e3 / 1e9)
    assert gpu_s(replace(PLAIN, gpus=4), load, stall=0) == pytest.approx(4 * 0.6)
    assert gpu_s(PLAIN, replace(load, hit_rate=1), stall=0) == pytest.approx(0.001 + 0.1), "the last token is computed"


def test_roi_worked_out_by_hand() -> None:
    """A million requests: 1.1 s without the tier, .6 with half of the prompt found. At half use $2,200 and $1,200.

    A tier of 10 GiB at $20 and an hour of $100 each month cost $300, so $700 are saved; ten hours of set-up, $1,000,
    are paid after 1 / .7 months. A month has 2,628,000 s: .837 nodes at half use, then .457; one whole node.
    """
    load = Load(1_000_000, prompt=1000, new=10, hit_rate=0.5)
    fractional, whole = bills(load, PLAIN, Tier(10, exact(20), setup_hours=10, upkeep_hours=1), **EXACT)
    assert fractional.without_usd == pytest.approx((2200,) * 3)
    assert fractional.with_usd == pytest.approx((1500,) * 3)
    assert fractional.saving_usd == pytest.approx((700,) * 3)
    assert fractional.break_even_months == pytest.approx((1000 / 700,) * 3)
    assert whole.without_usd == pytest.approx((2628,) * 3)
    assert whole.saving_usd == pytest.approx((-300,) * 3)
    assert whole.break_even_months == (inf, inf, inf)
    result = roi(load, PLAIN, Tier(10), **EXACT)
    assert [nodes[1] for nodes in result.nodes] == pytest.approx([2.2e6 / 2_628_000, 1.2e6 / 2_628_000])
    assert result.store_load == pytest.approx(1e6 * 500 * 1000 / 2_628_000 / 1e9)


def test_a_second_node_that_is_no_longer_needed_is_saved_whole() -> None:
    load = Load(2_000_000, prompt=1000, new=10, hit_rate=0.5)
    _, whole = bills(load, PLAIN, Tier(0, setup_hours=0, upkeep_hours=0), **EXACT)
    assert whole.saving_usd == pytest.approx((2628,) * 3), "1.67 nodes become .91"
    assert whole.break_even_months == (0, 0, 0)


@pytest.mark.parametrize(("requests", "nodes"), [(0, 1), (1_190_000, 1), (1_200_000, 2), (1_500_000, 2)])
def test_nodes_are_rounded_up_and_one_is_always_there(requests: float, nodes: int) -> None:
    """Without hits a request takes 1.1 s, and a node has 1,314,000 s at half use: 1,194,545 requests."""
    _, whole = bills(Load(requests, prompt=1000, new=10, hit_rate=0), PLAIN, Tier(0), **EXACT)
    assert whole.without_usd == pytest.approx((2628 * nodes,) * 3)


def test_transfer_between_zones_is_paid_for_all_of_the_prompt() -> None:
    load, tier = Load(1_000_000, prompt=1000, new=10, hit_rate=0.5), Tier(0, setup_hours=0, upkeep_hours=0)
    near, far = (bills(load, PLAIN, tier, **EXACT, transfer=price)[0] for price in (None, exact(0.02)))
    assert far.with_usd[1] - near.with_usd[1] == pytest.approx(1e6 * 1000 * 1000 / 1e9 * 0.02)


def test_hit_rate_from_which_on_it_pays() -> None:
    assert break_even_hit_rate(1, 0, 1, 10, 1) == 0.1
    assert break_even_hit_rate(1, 0.5, 1, 10, 1) == 0.2
    assert break_even_hit_rate(0.1, 0, 0.1, 10, 1) == pytest.approx(10), "no hit rate is enough"
    assert break_even_hit_rate(1, 0, 0, 10, 1) == inf, "no requests"
    assert break_even_hit_rate(1, 1.5, 100, 10, 1) == inf, "fetching is slower than computing"
    assert break_even_hit_rate(1, 0, 1, 10, 0) == 0


def test_vendor_discounts() -> None:
    anthropic, hour, deepseek = RATES["anthropic"], RATES["anthropic_1h"], RATES["deepseek"]
    assert cached_input_discount(anthropic, 1) == pytest.approx(0.95)
    assert cached_input_discount(anthropic, 0.5) == pytest.approx(0.5 * 0.95 - 0.5 * 0.25)
    assert cached_input_discount(anthropic, 0.5, written=0) == pytest.approx(0.5 * 0.95)
    assert cached_input_discount(anthropic, 0, written=0) == 0
    assert cached_input_discount(anthropic, 0) == -0.25, "unique prompts: every write is in vain"
    assert cached_input_discount(deepseek, 0.9) == pytest.approx(0.9 * 0.98)
    assert cached_input_discount(anthropic, 0.25 / 1.2) == pytest.approx(0, abs=1e-12), ".208 is the break-even"
    assert cached_input_discount(hour, 1 / 1.95) == pytest.approx(0, abs=1e-12), ".513 with writes for an hour"


# --- laws ---------------------------------------------------------------------------------------
loads = st.builds(
    Load,
    st.floats(0, 1e9),
    st.integers(1, 100_000),
    st.integers(0, 2000),
    st.floats(0, 1),
    st.integers(1, 256),
)
nodes = st.sampled_from([PLAIN, SMALL, LARGE])
tiers = st.builds(Tier, st.floats(0, 1e5), st.just(RAM), st.floats(0, 1000), st.floats(0, 100))


def close(one: tuple[float, ...], other: tuple[float, ...], scale: float = 1.0) -> bool:
    return all(a == b or isclose(a, b, rel_tol=1e-9, abs_tol=1e-9 * scale) for a, b in zip(one, other, strict=True))


@given(loads, nodes, tiers)
def test_twice_the_prices_are_twice_the_money_and_the_same_months(load: Load, node: Node, tier: Tier) -> None:
    prices = {"gpu": GPU, "engineer": ENGINEER, "transfer": CROSS_ZONE}
    double = {name: price.times(2) for name, price in prices.items()}
    before = bills(load, node, tier, **prices)
    after = bills(load, node, replace(tier, price=tier.price.times(2)), **double)
    for one, two in zip(before, after, strict=True):
        scale = one.without_usd[2] + one.with_usd[2]
        for part in ("without_usd", "with_usd", "saving_usd"):
            assert close(tuple(2 * usd for usd in getattr(one, part)), getattr(two, part), scale)
        assert close(one.break_even_months, two.break_even_months)


@given(loads, nodes, tiers)
def test_without_hits_a_tier_loses_exactly_what_it_costs(load: Load, node: Node, tier: Tier) -> None:
    for bill in bills(replace(load, hit_rate=0), node, tier):
        costs = interval(lambda gib, hour: -(tier.gib * gib + tier.upkeep_hours * hour), tier.price, ENGINEER)
        assert close(bill.saving_usd, costs, bill.with_usd[2])
        if tier.gib + tier.upkeep_hours > 1:
            assert bill.break_even_months == (inf, inf, inf)


@given(loads, nodes, tiers, st.floats(0, 1))
def test_more_hits_never_save_less(load: Load, node: Node, tier: Tier, more: float) -> None:
    better = replace(load, hit_rate=max(load.hit_rate, more))
    for one, two in zip(bills(load, node, tier), bills(better, node, tier), strict=True):
        slack = 1e-9 * one.with_usd[2]
        assert all(b >= a - slack for a, b in zip(one.saving_usd, two.saving_usd, strict=True))


@given(loads, nodes, tiers)
def test_triples_are_in_order_and_hold_at_any_prices_between(load: Load, node: Node, tier: Tier) -> None:
    between = {
        name: exact(0.3 * price.low + 0.7 * price.high)
        for name, price in {"gpu": GPU, "engineer": ENGINEER, "utilisation": UTILISATION, "stall": STALL}.items()
    }
    inside = bills(load, node, replace(tier, price=exact(RAM.low)), **between)
    for band, point in zip(bills(load, node, tier), inside, strict=True):
        for part in ("without_usd", "with_usd", "saving_usd", "break_even_months"):
            low, mid, high = getattr(band, part)
            slack = 1e-9 * band.with_usd[2]
            assert low <= mid <= high
            assert low - slack <= getattr(point, part)[1] <= high + slack


@given(loads, nodes, st.floats(0, 1))
def test_a_fetch_never_takes_longer_than_computing(load: Load, node: Node, stall: float) -> None:
    assert gpu_s(node, load, stall) <= gpu_s(node, replace(load, hit_rate=0)) * (1 + 1e-12)


def test_a_slow_store_saves_nothing() -> None:
    slow = replace(PLAIN, costs=replace(PLAIN.costs, store=Link(0.0, 1e5)))  # 10 ms a token, computing takes 1
    bill = bills(Load(1_000_000), slow, Tier(0, setup_hours=0, upkeep_hours=0), **EXACT | {"stall": exact(1)})[0]
    assert bill.saving_usd == (0, 0, 0)


def test_measured_rates_give_what_was_measured() -> None:
    node = Node(measured(1000, prefill_tok_per_s=1000, decode_tok_per_s=100))
    for batch in (1, 7):
        load = Load(1, prompt=500, new=50, hit_rate=0, batch=batch)
        assert gpu_s(node, load) == pytest.approx(500 / 1000 + 50 / 100)


# --- how long a block is worth its RAM ----------------------------------------------------------
def test_the_time_by_hand() -> None:
    """1,000 tokens take 1 s, $0.001. They are 1e6 bytes; a GiB at $7.3 a month costs $0.01 an hour."""
    got = break_even_keep_s(PLAIN, 1000, 0, 3.6, 7.3)
    assert got == pytest.approx(0.001 / (1e6 / 2**30 * 0.01 / 3600))
    assert break_even_keep_s(PLAIN, 10, 0, 3.6, 7.3) == pytest.approx(got), "the size of a block does not matter"
    assert break_even_keep_s(PLAIN, 10, 0, 3.6, 7.3, 0.5) == pytest.approx(2 * got)
    assert break_even_keep_s(PLAIN, 10, 0, 3.6, 14.6) == pytest.approx(got / 2)


@pytest.mark.parametrize(
    ("node", "ram", "expected"),
    [
        (SMALL, RAM, (71, 120, 260)),
        (SMALL, MANAGED, (9, 66, 104)),
        (LARGE, RAM, (247, 422, 913)),
        (LARGE, MANAGED, (30, 230, 364)),
    ],
    ids=["8B", "8B, managed", "70B", "70B, managed"],
)
def test_minutes_on_an_h100(node: Node, ram: Price, expected: tuple[int, int, int]) -> None:
    got = interval(lambda gpu, gib: break_even_keep_s(node, 512, 0, gpu, gib), GPU, ram)
    assert tuple(round(seconds) for seconds in got) == expected


def test_deep_blocks_are_worth_their_ram_longer() -> None:
    """Because a token attends to all tokens before it; its KV is not larger."""
    kept = [break_even_keep_s(SMALL, 512, past, GPU.value, RAM.value) for past in (0, 8000, 32_000, 128_000)]
    assert [round(seconds) for seconds in kept] == [120, 155, 260, 679]


def test_a_day_costs_more_than_computing_it_again_hundreds_of_times() -> None:
    """The brief keeps KV for 86,400 s."""
    times = [86_400 / break_even_keep_s(node, 512, 0, GPU.value, RAM.value) for node in (SMALL, LARGE)]
    assert [round(t) for t in times] == [718, 205]


def test_transfer_to_another_zone_costs_more_than_computing() -> None:
    for node, times in ((SMALL, 27), (LARGE, 7.6)):
        transfer = node.costs.kv_bytes / 1e9 * CROSS_ZONE.value
        computing = node.gpus * node.costs.prefill_token_s / 3600 * GPU.value
        assert transfer / computing == pytest.approx(times, rel=0.01)


# --- the claims ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("node", "all_of_it", "for_nothing"),
    [(SMALL, (23, 62, 157), (0, 5, 57)), (LARGE, (169, 459, 1163), (0, 18, 499))],
    ids=["8B", "70B"],
)
def test_claim_5000_to_50000_a_month_at_100000_requests(
    node: Node, all_of_it: tuple[int, ...], for_nothing: tuple[int, ...]
) -> None:
    """All the GPU time of these requests costs less than that, so no cache can save it, not even one for nothing."""
    fractional, whole = bills(CLAIMED, node, Tier(64))
    assert tuple(round(usd) for usd in fractional.without_usd) == all_of_it
    free, _ = bills(CLAIMED, node, Tier(0, setup_hours=0, upkeep_hours=0))
    assert tuple(round(usd) for usd in free.saving_usd) == for_nothing
    assert fractional.saving_usd[2] < 0 and whole.saving_usd[2] < 0
    assert fractional.break_even_months == whole.break_even_months == (inf, inf, inf)
    result = roi(CLAIMED, node, Tier(64))
    assert result.nodes[0][2] < 0.1, "one node is enough without a tier, too"


def test_what_the_claim_would_take() -> None:
    assert prompt_needed(5000, CLAIMED, SMALL, Tier(64)) == (89_793, inf, inf)
    assert prompt_needed(5000, CLAIMED, LARGE, Tier(64)) == (20_250, 83_904, inf)
    assert prompt_needed(50_000, CLAIMED, LARGE, Tier(64)) == (108_546, inf, inf)
    assert prompt_needed(160 * ENGINEER.value, CLAIMED, LARGE, Tier(64)) == (48_686, inf, inf), "paid in a month"


def test_prompt_needed_is_the_first_that_is_enough() -> None:
    _, needed, _ = prompt_needed(5000, CLAIMED, LARGE, Tier(64))
    assert needed < CONTEXT
    savings = [bills(replace(CLAIMED, prompt=int(needed) + by), LARGE, Tier(64))[0].saving_usd[1] for by in (-20, 0)]
    assert savings[0] < 5000 <= savings[1]


def test_claim_95_percent_off_generated_tokens() -> None:
    """From $18 to $0.90, says the brief. Decoding is not cached: with 95 % of the prompt found, 38 % less at most."""
    usd = [usd_per_mtok(250 / gpu_s(SMALL, replace(CLAIMED, hit_rate=hits), stall=0), GPU.value) for hits in (0, 0.95)]
    assert [round(price, 2) for price in usd] == [0.99, 0.61]


def test_sensitivity_says_where_it_loses() -> None:
    rows = sensitivity([1e5, 1e7], [0.0, 0.95], Load(0, prompt=20_000, new=500), LARGE, Tier(256))
    table = {(row["requests_per_month"], row["hit_rate"]): row for row in rows}
    assert len(rows) == 4 and json.dumps(rows, allow_nan=False)
    assert [row["fractional_sign"] for row in rows] == ["-", "?", "-", "?"]
    assert [row["whole_gpus_sign"] for row in rows] == ["-", "-", "-", "?"]
    assert table[1e7, 0.95]["fractional_saving_usd"][1] > 45_000
    assert table[1e7, 0.95]["store_load"] > 9, "ten stores of this bandwidth"
    certain = sensitivity([1e7], [0.95], Load(0, prompt=20_000), LARGE, Tier(256), stall=exact(0))
    assert certain[0]["fractional_sign"] == "+"


def test_roi_as_json_has_everything_and_no_infinity() -> None:
    told = roi(CLAIMED, SMALL, Tier(64)).as_json()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["whole_gpus"]["break_even_months"] == [None, None, None]
    assert told["inputs"]["load"]["requests_per_month"] == 100_000
    assert {price["name"] for price in told["inputs"]["prices"]} >= {GPU.name, RAM.name, UTILISATION.name}


# --- the examples of docs/01, and one whose band spans zero --------------------------------------
FLEET = Load(80_000_000, prompt=8000, new=300)
"""Forty H100s with the 8B model at middle prices; with the 70B a request takes 6.7 times as much, so 12 million."""


def over(node: Node, bytes_per_s: float) -> Node:
    return replace(node, costs=replace(node.costs, store=Link(1e-3, bytes_per_s)))


def rate_that_pays(load: Load, node: Node, gib: float) -> float:
    """The least hit rate, to .0001, at which a tier saves money at middle prices; above 1: there is none."""
    low, high = 0, 10_001
    while high - low > 1:
        middle = (low + high) // 2
        saved = roi(replace(load, hit_rate=middle / 10_000), node, Tier(gib)).fractional.saving_usd[1]
        low, high = (low, middle) if saved > 0 else (middle, high)
    return high / 10_000


@pytest.mark.parametrize(
    ("node", "requests", "gib", "expected"),
    [
        (SMALL, 80e6, 256, (0.19, 0.06, 0.05, 0.04)),
        (SMALL, 80e6, 1024, (0.50, 0.19, 0.15, 0.13)),
        (SMALL, 80e6, 3750, (1.00, 0.59, 0.49, 0.41)),
        (LARGE, 12e6, 1024, (0.71, 0.15, 0.12, 0.10)),
        (LARGE, 12e6, 256, (0.30, 0.05, 0.04, 0.03)),
    ],
    ids=["8B, 256 GiB", "8B, 1 TiB", "8B, 3.7 TiB", "70B, 1 TiB", "70B, 256 GiB"],
)
def test_what_a_tier_for_40_gpus_must_add(node: Node, requests: float, gib: float, expected: tuple[float, ...]) -> None:
    load = replace(FLEET, requests_per_month=requests)
    assert roi(load, node, Tier(gib)).nodes[0][1] * node.gpus == pytest.approx(40, abs=0.3)
    found = [rate_that_pays(load, over(node, speed), gib) for speed in (2.5e9, 6e9, 12e9, inf)]
    assert [round(rate, 2) for rate in found] == list(expected)


def test_the_example_whose_band_spans_zero() -> None:
    node, load, ram = over(SMALL, 6e9), replace(FLEET, hit_rate=0.1), exact(RAM.value)
    result = roi(load, node, Tier(1024))
    assert [round(usd) for usd in result.fractional.saving_usd] == [-12_074, -4714, 14_303]
    assert [round(nodes[1], 1) for nodes in result.nodes] == [40.2, 38.9]
    assert round(result.store_load, 2) == 0.53
    bands = {"gpu": GPU, "engineer": ENGINEER, "utilisation": UTILISATION, "stall": STALL}
    known = {name: exact(price.value) for name, price in bands.items()}
    ends = {
        name: roi(load, node, Tier(1024, ram), **known | {name: price}).fractional.saving_usd[::2]
        for name, price in bands.items()
    }
    widths = {name: high - low for name, (low, high) in ends.items()}
    assert max(widths, key=lambda name: widths[name]) == "utilisation"
    assert [round(usd) for usd in (*ends["utilisation"], *ends["stall"])] == [-7285, 428, -7503, -1925]
    own = [{"utilisation": exact(0.6)}, {"utilisation": exact(0.6), "stall": exact(0.2)}]
    savings = [roi(load, node, Tier(1024), **prices).fractional.saving_usd for prices in own]
    assert [[round(usd) for usd in saving[::2]] for saving in savings] == [[-11_786, 916], [-9602, -26]]


def test_transfer_to_another_zone_by_length() -> None:
    for node, expected in ((SMALL, (25.9, 17.6)), (LARGE, (7.5, 5.9))):
        for tokens, times in zip((2000, 32_000), expected, strict=True):
            transfer = tokens * node.costs.kv_bytes / 1e9 * CROSS_ZONE.value
            computing = node.gpus * node.costs.prefill(tokens, 0) / 3600 * GPU.value
            assert round(transfer / computing, 1) == times


# --- mistakes -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong",
    [
        lambda: usd_per_mtok(0, 1),
        lambda: usd_per_mtok(1, -1),
        lambda: usd_per_mtok(1, 1, utilisation=0),
        lambda: usd_per_mtok(nan, 1),
        lambda: cached_input_discount(RATES["google"], 1.1),
        lambda: cached_input_discount(RATES["google"], 0.6, written=0.6),
        lambda: break_even_hit_rate(1, -1, 1, 1, 1),
        lambda: break_even_hit_rate(1, 1, nan, 1, 1),
        lambda: break_even_keep_s(PLAIN, 0, 0, 1, 1),
        lambda: break_even_keep_s(PLAIN, 1, 0, 1, 0),
        lambda: break_even_keep_s(PLAIN, 1, 0, 1, 1, utilisation=2),
        lambda: measured(1000, 0, 1),
        lambda: Node(PLAIN.costs, gpus=0),
        lambda: Load(-1),
        lambda: Load(inf),
        lambda: Load(1, hit_rate=1.5),
        lambda: Load(1, prompt=0),
        lambda: Tier(-1),
        lambda: Tier(nan),
        lambda: roi(CLAIMED, PLAIN, Tier(1), utilisation=exact(0)),
        lambda: roi(CLAIMED, PLAIN, Tier(1), utilisation=exact(2)),
        lambda: roi(CLAIMED, PLAIN, Tier(1), stall=exact(2)),
        lambda: prompt_needed(0, CLAIMED, PLAIN, Tier(1)),
    ],
)
def test_mistakes_are_told(wrong: Any) -> None:
    with pytest.raises(InputError, match=r"expected .* got "):
        wrong()
