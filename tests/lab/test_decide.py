"""The decision: by hand, laws, each verdict reached on purpose, and flips that are tried on both sides."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.cli import FAILURE, SUCCESS, USAGE, main
from kvlab.errors import InputError
from kvlab.lab.cost import Load, Node, Tier, roi
from kvlab.lab.costs import Costs, Link
from kvlab.lab.decide import NEARLY, SERVER_GIB, Decision, decide
from kvlab.lab.decide_inputs import FALLING, SHAPES, USED, sizes
from kvlab.lab.decide_page import page
from kvlab.lab.prices import PRICES, Price
from kvlab.lab.prices import given as exact
from kvlab.lab.replay import Setup, replay
from kvlab.lab.reuse import Reuse, reuse
from kvlab.lab.traces import from_blocks, write

ROOT = Path(__file__).parents[2]
MOONCAKE = ROOT.parent / "shared" / "traces" / "conversation_trace.jsonl"
KILO = "25x1x10"
"""25 layers x 2 x 1 head x 10 x 2 bytes: 1,000 bytes of KV a token."""
TINY = reuse(from_blocks([[1, 2], [3, 4], [1, 2], [3, 5]], 1000), 1000)
"""Blocks of 1 MB. From 4 of them on a cache finds two blocks of the third request and one of the fourth: 3 of 8."""
THREE, FOUR = 0.003, 0.004
"""GiB that hold so many blocks."""


def money(**values: float) -> dict[str, Price]:
    """Prices that are known exactly."""
    known = {"gpu": 3.6, "ram": 1.0, "engineer": 10.0, "utilisation": 0.5, "stall": 0.5} | values
    return {name: exact(PRICES[name], value) for name, value in known.items()}


def tiny(requests: float = 4e6, prefill: float = 1000, wire: float = 1.0, **options: Any) -> Decision:
    prices = options.pop("prices", money())
    settings = {"own": 0.0, "capacities": [THREE, FOUR]} | options
    return decide(TINY, KILO, prefill, wire, prices, requests_per_month=requests, **settings)


# --- by hand ------------------------------------------------------------------------------------
def test_worked_out_by_hand() -> None:
    """A million times 3,000 tokens at 1,000 a second are 3,000,000 s of a GPU. Each time they are fetched in two loads
    of 1 ms and 3 ms of transfer, half of which the GPU waits: 2,500 s. $3.6 an hour at half use are $0.002 a second,
    so $5,995 are saved. One server is 41.6 GiB at $1, upkeep 8 hours at $10; set-up is 160 hours, $1,600.
    Of 8,000,000 blocks 3,000,000 are fetched and 5,000,000 saved: 8e12 bytes in 2,628,000 s over 1 GB/s."""
    told = tiny()
    assert told.kv_bytes == 1000 and told.hit_rate == 3 / 8
    assert (told.break_even_gbps, told.above_break_even) == (pytest.approx(0.001), True)
    assert told.crossover == 2, "0.001 s + n us < n ms"
    small, large = told.rows
    assert (small.blocks, small.hit_rate, small.added, small.gpu_hours) == (3, 0, 0, 0)
    assert small.net_usd == pytest.approx((-121.6,) * 3) and small.payback_months == (inf,) * 3
    assert (large.blocks, large.servers, large.hit_rate, large.added, large.worth) == (4, 1, 3 / 8, 3 / 8, 1)
    assert large.gpu_hours == pytest.approx(2_997_500 / 3600)
    assert large.tier_usd == pytest.approx((121.6,) * 3)
    assert large.net_usd == pytest.approx((5995 - 121.6,) * 3)
    assert large.payback_months == pytest.approx((1600 / 5873.4,) * 3)
    assert large.load == pytest.approx(8e12 / 2_628_000 / 1e9)
    assert told.best is large and told.verdict == "yes"


def test_only_what_the_engines_lack_is_added() -> None:
    """Ten blocks come again after one other block, ten after a hundred; the engines have .25, the first ten."""
    near = [[i] for i in range(10) for _ in range(2)]
    far = [[100 + i] for i in range(110)] + [[100 + i] for i in range(10)]
    trace = reuse(from_blocks(near + far, 1000), 1000)
    assert trace.hit_rate() == 20 / 140
    own = decide(trace, KILO, 1000, 1, money(), own=10 / 140, capacities=[1], requests_per_month=1e6)
    none = decide(trace, KILO, 1000, 1, money(), own=0, capacities=[1], requests_per_month=1e6)
    assert (none.rows[0].added, own.rows[0].added) == (pytest.approx(20 / 140), pytest.approx(10 / 140))
    assert none.rows[0].gpu_hours == pytest.approx(2 * own.rows[0].gpu_hours)


def test_runs_shorter_than_the_crossover_are_computed() -> None:
    """At 3,000 tokens/s and 0.004 GB/s a run is fetched in 1 ms + n / 4,000 s and computed in n / 3,000: from 13 on.
    Just above the break-even of 0.003 GB/s it takes longer: 1 ms / (1 / 3,000 - 1 / 3,003) = 3,003 tokens."""
    chains = [[1, 2, 3, 4], [1, 2, 3, 4], [1]]
    trace = reuse(from_blocks(chains, 1000), 1000)
    fast, slow, below = (
        decide(trace, KILO, 3000, wire, money(), own=0, capacities=[1], requests_per_month=1e6)
        for wire in (0.004, 0.003003, 0.0029)
    )
    assert (fast.crossover, slow.crossover, below.crossover) == (13, 3004, inf)
    assert (fast.long_share, slow.long_share, below.long_share) == (1, 4 / 5, 0)
    assert (fast.rows[0].worth, slow.rows[0].worth, below.rows[0].worth) == (1, pytest.approx(4 / 5), 0)
    assert below.verdict == "no" and "break-even is 0.003" in below.reasons[0]


@pytest.mark.parametrize("stall", [0.0, 0.5, 1.0])
def test_requests_that_are_all_alike_save_what_roi_says(stall: float) -> None:
    """Two of three blocks, on engines of two GPUs, over all bands of prices."""
    chains = [[3 * i, 3 * i + 1, 1000 + i] for i in range(50)] + [[3 * i, 3 * i + 1, 2000 + i] for i in range(50)]
    trace = reuse(from_blocks(chains, 1000), 1000)
    prices = {"stall": exact(PRICES["stall"], stall)}
    told = decide(trace, KILO, 500, 0.9, prices, own=0, requests_per_month=2e6, gpus_per_engine=2, capacities=[100])
    node = Node(Costs(1000, prefill_token_s=1 / 500, store=Link(1e-3, 0.9e9)), gpus=2)
    bill = roi(Load(1e6, 3000, 0, 2 / 3), node, Tier(3 * SERVER_GIB), **prices).fractional
    assert told.best.net_usd == pytest.approx(bill.saving_usd)
    assert told.best.payback_months == pytest.approx(bill.break_even_months)


def test_the_sizes_of_shapes_and_precisions() -> None:
    assert sizes("80x8x128").kv_bytes() == 327_680
    assert [sizes(name).kv_bytes() for name in SHAPES] == [131_072, 32_768, 12_288]
    assert sizes("LLAMA-3.1-8B").kv_bytes("fp32") == 262_144
    assert 0.5 < sizes("32x8x128").kv_bytes("int8") / 131_072 < 0.56
    assert 0.25 < sizes("32x8x128").kv_bytes("int4") / 131_072 < 0.30


def test_without_a_prefill_it_is_computed_and_never_enough_for_a_yes() -> None:
    told = decide(TINY, "llama-3.1-8b", None, 50, money(), own=0, requests_per_month=1e8, capacities=[1])
    prefill = told.inputs["prefill"]
    assert prefill.value == pytest.approx(29_800, rel=0.01), "docs/01: of 2,000 tokens"
    assert "prefill" in told.assumed and min(row.net_usd[0] for row in told.rows) > 0
    assert told.verdict == "measure first" and [q.name for q in told.measure] == ["prefill"]
    known = decide(TINY, "llama-3.1-8b", prefill.high, 50, money(), own=0, requests_per_month=1e8, capacities=[1])
    assert known.verdict == "yes"


def test_a_computed_prefill_says_no_to_a_wire_only_if_all_of_its_band_does() -> None:
    """An engine may be slower than computed: then a slower wire is fast enough."""
    mid = decide(TINY, "llama-3.1-8b", None, 50, own=0, requests_per_month=1e9, capacities=[1]).break_even_gbps
    for share, verdict in ((0.9, "measure first"), (0.55, "no")):
        told = decide(TINY, "llama-3.1-8b", None, mid * share, own=0, requests_per_month=1e9, capacities=[1])
        assert told.verdict == verdict and not told.above_break_even and told.long_share == 0
        assert json.dumps(told.as_json(), allow_nan=False) and told.as_json()["crossover"] is None


def test_engines_that_are_not_described_have_a_band() -> None:
    """An H100 beside the 8B model has 56 GB for KV; with blocks of 512 tokens, 834 of them."""
    chains = [[i] for i in range(2000)] * 2
    trace = reuse(from_blocks(chains, 512), 512)
    one, three = (decide(trace, "llama-3.1-8b", 15_000, 6, gpus=gpus).inputs["own"] for gpus in (1, 3))
    assert (one.low, one.value, one.high) == (0, 0, 0.5), "host memory for 3,072 blocks holds all 2,000"
    assert (three.low, three.value, three.high) == (0, 0.5, 0.5), "so do three GPUs"
    computed = decide(trace, "llama-3.1-8b", 15_000, 6)
    assert computed.busy_gpus == pytest.approx(512 / 15_000, rel=0.01) and computed.gpus == 1


# --- verdicts and flips -------------------------------------------------------------------------
BAND = replace(PRICES["utilisation"], low=0.2, value=0.4, high=0.8)


def test_no_without_reuse() -> None:
    unlike = reuse(from_blocks([[1], [2], [3]], 1000), 1000)
    told = decide(unlike, "llama-3.1-8b", 15_000, 6)
    assert told.verdict == "no" and "no prompt begins with a full block" in told.reasons[0] and told.changes
    alone = reuse(from_blocks([[1]], 1000), 1000)
    assert decide(alone, "llama-3.1-8b", None, 6).verdict == "no", "no span, so no rate, and none is needed"


def test_no_because_prefixes_are_too_short_for_a_fetch_on_a_fast_wire() -> None:
    """A fetch takes 1 ms and 65.5 us a token, computing 66.7 us a token: from 884 tokens on it is faster."""
    trace = reuse(from_blocks([[i % 9, 100 + i] for i in range(60)], 256), 256)
    told = decide(trace, "llama-3.1-8b", 15_000, 2)
    assert told.verdict == "no" and told.above_break_even
    begin = f"{told.crossover:,.0f} tokens"
    assert begin in told.reasons[0] and begin in told.changes[0] and "break-even" not in told.reasons[0]


@pytest.mark.parametrize("gib", [1331.2, 131_072, 1_048_576])
def test_no_number_of_the_table_is_cut_or_glued_to_another(gib: float) -> None:
    told = tiny(requests=4e9, wire=1e4, capacities=[gib], prices=money(ram=1e6))
    (line,) = [line for line in page(told, "t.jsonl").splitlines() if line.startswith("*") and "best" not in line]
    numbers = [float(number.replace(",", "")) for number in line[1:].split()]
    row = told.best
    assert numbers[:2] == [float(f"{gib:g}"), row.servers] and len(numbers) == 9
    assert numbers[5:] == [round(row.tier_usd[1]), *(round(value) for value in row.net_usd)]


def test_no_if_the_best_ends_lose() -> None:
    told = tiny(requests=4e4)
    assert told.verdict == "no" and "even at the best ends" in told.reasons[0]
    needed = told.flips["requests"].mid
    assert needed == pytest.approx(4e6 * 121.6 / 5995), "the upkeep and a server by the saving of a request"
    assert f"requests above {needed:,.3g}"[:16] in told.changes[0]
    assert tiny(requests=needed * 1.001).verdict == "yes" and tiny(requests=needed * 0.999).verdict == "no"


def test_measure_first_says_what_and_the_value_that_settles_it() -> None:
    """$5,995 x .5 / utilisation - $121.6, for a fiftieth of the requests: 0 at .493."""
    known = money()
    told = tiny(requests=8e4, prices={**known, "utilisation": BAND})
    assert told.verdict == "measure first" and [q.name for q in told.measure] == ["utilisation"]
    flips = told.flips["utilisation"]
    assert flips.yes == flips.mid == flips.no == pytest.approx(5995 / 50 * 0.5 / 121.6)
    assert told.measure[0].settles and "--prices" in told.measure[0].command
    sides = [tiny(requests=8e4, prices=money(utilisation=(flips.mid or 0) * by)).verdict for by in (0.999, 1.001)]
    assert sides == ["yes", "no"]


def test_measure_the_wire_if_the_servers_cannot_carry_it() -> None:
    told = tiny(requests=4e9)
    assert told.best.load == pytest.approx(3.044, rel=1e-3) and told.best.net_usd[0] > 0
    assert told.verdict == "measure first" and [q.name for q in told.measure] == ["wire"]
    assert "3.0 servers" in told.reasons[0]
    assert tiny(requests=4e9, wire=4).verdict == "yes"


def test_a_smaller_capacity_that_is_certain_is_a_yes_and_is_named() -> None:
    """One server holds the blocks that come again at once; a second one, for those that come late, may not pay."""
    gib = 2**30 / 1e6  # blocks
    near = [[i] for i in range(400) for _ in range(2)]
    late = [[1000 + i] for i in range(int(41 * gib))]
    trace = reuse(from_blocks(near + late + late[:200], 1000), 1000)
    prices = money(stall=0.5) | {"ram": replace(PRICES["ram"], low=0.1, value=1, high=20)}
    told = decide(trace, KILO, 1000, 1, prices, own=0, requests_per_month=5.6e7, capacities=[1, 60])
    assert told.best.gib == 60 and told.best.net_usd[0] < 0 < told.rows[0].net_usd[0]
    assert told.verdict == "yes" and "begin with 1" in told.reasons[1]


def with_input(name: str, value: float, base: dict[str, Any]) -> Decision:
    """Decide once more, with one input given."""
    options = dict(base)
    if name in USED:
        options["prices"] = {**options["prices"], name: exact(PRICES[name], value)}
    else:
        options[{"requests": "requests_per_month", "prefill": "prefill", "wire": "wire", "own": "own"}[name]] = value
    return decided(**options)


def decided(trace: Reuse, prefill: float, wire: float, prices: dict[str, Price], **options: Any) -> Decision:
    return decide(trace, "llama-3.1-8b", prefill, wire, prices, **options)


def sessions(seed: int, groups: int = 40, turns: int = 6, block: int = 256) -> Reuse:
    """Conversations that grow by some blocks each turn, mixed."""
    chance = random.Random(seed)
    told: list[list[int]] = [[] for _ in range(groups)]
    count, chains = 0, []
    for _ in range(groups * turns):
        one = told[chance.randrange(groups)]
        for _ in range(chance.randint(1, 8)):
            count += 1
            one.append(count)
        chains.append([*one])
    return reuse(from_blocks(chains, block), block)


@pytest.mark.parametrize("name", ["own", "requests", "prefill", "wire", *USED])
def test_each_flip_is_where_the_decision_turns(name: str) -> None:
    base: dict[str, Any] = {
        **{"trace": sessions(1), "prefill": 9000.0, "wire": 4.0, "prices": {}, "requests_per_month": 8e6, "own": 0.3},
        "capacities": [2, 8, 40, 80],
    }
    if name == "own":
        base |= {"own": None, "gpus": 1, "trace": sessions(1, 100), "capacities": [40, 80, 160]}
    told, tried = decided(**base), 0
    assert told.verdict == "measure first"
    for end, part in enumerate(("yes", "mid", "no")):
        flip = getattr(told.flips[name], part)
        if flip is None:
            continue
        tried += 1
        below, above = (with_input(name, flip * by, base) for by in (1 - 1e-6, 1 + 1e-6))
        better, worse = (below, above) if name in FALLING else (above, below)
        paying = [one.long_share >= NEARLY and max(row.net_usd[end] for row in one.rows) > 0 for one in (better, worse)]
        assert paying == [True, False]
        if part == "no":
            assert worse.verdict == "no" != better.verdict
        if part == "yes":
            assert better.verdict == "yes" != worse.verdict
    assert tried or name == "stall"


# --- laws ---------------------------------------------------------------------------------------
ORDER = ("no", "measure first", "yes")
worlds = st.builds(
    lambda seed, requests, prefill, wire, own, prices: {
        **{"trace": sessions(seed, 12, 4), "prefill": prefill, "wire": wire, "own": own, "prices": prices},
        **{"requests_per_month": requests, "capacities": [0.1, 1, 40, 90]},
    },
    st.integers(0, 30),
    st.sampled_from([10**exponent for exponent in range(5, 10)]),
    st.floats(1e3, 2e4),
    st.floats(1, 30),
    st.floats(0, 0.4),
    st.sampled_from([{}, money(), {**money(), "utilisation": BAND}, {**money(), "ram": PRICES["ram"]}]),
)


@given(worlds, st.floats(1, 10))
@settings(max_examples=40, deadline=None)
def test_a_faster_wire_never_turns_yes_into_no(world: dict[str, Any], factor: float) -> None:
    before, after = decided(**world), decided(**{**world, "wire": world["wire"] * factor})
    assert (before.verdict, after.verdict) != ("yes", "no")
    for one, two in zip(before.rows, after.rows, strict=True):
        assert all(b >= a - 1e-6 * abs(a) for a, b in zip(one.net_usd, two.net_usd, strict=True))


@given(worlds, st.floats(1, 10))
@settings(max_examples=40, deadline=None)
def test_dearer_memory_never_makes_a_verdict_better(world: dict[str, Any], factor: float) -> None:
    ram = world["prices"].get("ram", PRICES["ram"])
    after = decided(**{**world, "prices": {**world["prices"], "ram": ram.times(factor)}})
    assert ORDER.index(after.verdict) <= ORDER.index(decided(**world).verdict)


@given(worlds)
@settings(max_examples=40, deadline=None)
def test_twice_the_requests_of_the_same_reuse_never_lower_the_money(world: dict[str, Any]) -> None:
    before, after = decided(**world), decided(**{**world, "requests_per_month": 2 * world["requests_per_month"]})
    for one, two in zip(before.rows, after.rows, strict=True):
        assert all(b >= a - 1e-6 * abs(a) for a, b in zip(one.net_usd, two.net_usd, strict=True))
    assert after.best.net_usd[1] >= before.best.net_usd[1] - 1e-6 * abs(before.best.net_usd[1])


@given(worlds)
@settings(max_examples=40, deadline=None)
def test_bands_are_in_order_and_the_curve_never_falls(world: dict[str, Any]) -> None:
    told = decided(**world)
    for part in ("net_usd", "tier_usd", "payback_months"):
        assert all(list(getattr(row, part)) == sorted(getattr(row, part)) for row in told.rows)
    for part in ("hit_rate", "added"):
        curve = [getattr(row, part) for row in told.rows]
        assert curve == sorted(curve) and curve[-1] <= told.hit_rate


def test_the_curve_is_that_of_replays() -> None:
    chains = [[i % 7, 10 + i % 11] for i in range(60)]
    chains = [[a, 100 * a + b] for a, b in chains]
    trace = reuse(from_blocks(chains, 1000), 1000)
    told = decide(trace, KILO, 1000, 1, own=0, capacities=[n * 1e6 / 2**30 + 1e-6 for n in (5, 20, 60)])
    for row in told.rows:
        again = replay(from_blocks(chains, 1000), 1000, Setup(device=row.blocks)).hits.rates()
        assert row.hit_rate == again["full_blocks"]


# --- the command --------------------------------------------------------------------------------
@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "t.jsonl"
    write(from_blocks([[1, 2], [3, 4], [1, 2], [3, 5]], 1000), path, 1000)
    return str(path)


def run(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["decide", *words]) == SUCCESS
    return capsys.readouterr().out


def test_both_forms_say_the_same(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.json").write_text('{"gpu": 3.6, "ram": {"value": 1, "high": 2}, "engineer": 10}', "utf-8")
    words = [file, "--shape", KILO, "--prefill", "1000", "--wire", "1", "--prices", str(tmp_path / "p.json")]
    words += ["--requests-per-month", "4000000", "--own", "0", "--capacities", f"{THREE},{FOUR}"]
    text, told = run(words, capsys), json.loads(run([*words, "--json"], capsys))
    assert told["verdict"] == "yes" and text.startswith("YES: ")
    assert told["rows"][1]["hit_rate"] == 3 / 8 and "\n* 0.004       1     0.375  0.375" in text
    assert told["rows"][0]["payback_months"] == [None] * 3
    assert "take a full day before you decide. It takes 3 s: check the unit of its times (docs/traces.md)" in " ".join(
        text.split()
    )
    assert told["assumed"] == ["utilisation", "stall"] and "ram 1 (1 to 2)!" in text
    assert f"{told['best']['net_usd'][0]:,.0f}" in text


@pytest.mark.parametrize(
    "words",
    [
        "--prefill 1000 --wire 1",
        "--prefill 1000 --wire 0.0001",
        "--prefill 1000 --wire 1 --requests-per-month 900000000 --own 0.1",
        "--prefill 1000 --wire 1 --own 0 --requests-per-month 500000 --tp 4 --gpus 9999 --precision int4",
    ],
)
def test_the_page_is_a_page(words: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = run([file, "--shape", "80x8x128", *words.split()], capsys)
    assert max(map(len, text.splitlines())) <= 80 and len(text.splitlines()) <= 45
    assert re.match("(YES|NO|MEASURE FIRST): +a shared KV tier for t.jsonl\n", text)
    assert "1000 tokens each, LRU; endless" in text.replace("\n", " ")


@pytest.mark.skipif(not MOONCAKE.exists(), reason="needs Mooncake's conversation_trace.jsonl in ../shared/traces")
def test_the_page_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "01_why_kv_cache_matters.md").read_text("utf-8")
    block = re.search(r"```\n\$ python -m kvlab decide (.*)\n((?s:.*?))```", text)
    assert block
    words = [str(MOONCAKE) if word.endswith(".jsonl") else word for word in block[1].split()]
    assert run(words, capsys) == block[2]


def test_a_trace_without_repeats_is_a_clear_no(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for chains in ([[1], [2]], [[1]]):
        write(from_blocks(chains, 16), tmp_path / "u.jsonl", 16)
        text = run([str(tmp_path / "u.jsonl"), "--shape", "llama-3.1-8b", "--wire", "6"], capsys)
        assert text.startswith("NO: ") and "no prompt begins with a full block (16 tokens)" in text


def test_measure_first_names_the_command_and_the_value(capsys: pytest.CaptureFixture[str]) -> None:
    told = tiny(requests=8e4, prices={**money(), "utilisation": BAND})
    text = re.sub("\n +", " ", page(told, "t"))
    assert "measure    utilisation, 0.4 (0.2 to 0.8)" in text and "pays below 0.493" in text
    assert "vllm:num_requests_running" in text and "do not run a store" in text


@pytest.mark.parametrize(
    ("prices", "told"),
    [
        ("[1]", "expected an object"),
        ("{", "expected JSON"),
        ('{"gpus": 1}', "expected only gpu, ram, engineer, utilisation, stall, got 'gpus'"),
        ('{"vm": 1}', "got 'vm'"),
        ('{"gpu": "3"}', "gpu: expected a number"),
        ('{"gpu": {"low": 3}}', "gpu: expected a number"),
        ('{"gpu": {"value": 3, "mid": 3}}', "gpu: expected a number"),
        ('{"gpu": -1}', "gpu: expected 0 <= low"),
        ('{"ram": {"value": 3, "low": 4}}', "ram: expected 0 <= low"),
        ('{"ram": NaN}', "ram: expected 0 <= low"),
        ('{"utilisation": 0}', "utilisation: expected a share"),
        ('{"stall": 2}', "stall: expected a share"),
    ],
)
def test_prices_that_are_none(
    prices: str, told: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.json").write_text(prices, "utf-8")
    words = ["decide", file, "--shape", "llama-3.1-8b", "--wire", "6", "--prices", str(tmp_path / "p.json")]
    assert main(words) == FAILURE
    error = capsys.readouterr().err
    assert told in error and error.startswith("kvlab: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("{} --shape gpt-9 --wire 1", "expected a shape of llama-3.1-8b, llama-3.2-1b, qwen2.5-0.5b, or layers"),
        ("{} --shape 0x8x128 --wire 1", "expected a shape of"),
        ("{} --shape 32x8x128 --wire 1", "expected --prefill with the shape 32x8x128"),
        ("{} --shape llama-3.1-8b --wire 1 --tp 4 --gpus 2", "expected at least the 4 GPUs of one engine, got 2"),
        ("{} --shape llama-3.1-8b --wire 1 --block 16", "line 1: expected a block size of 16, got 1000"),
        ("nowhere --shape llama-3.1-8b --wire 1", "expected a trace file"),
        ("/dev/null --shape llama-3.1-8b --wire 1", "got an empty file"),
        ("{} --shape llama-3.1-8b --wire 1 --prices nowhere", "expected a file of prices, got: No such file"),
    ],
)
def test_mistakes_are_one_line(words: str, told: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decide", *words.format(file).split()]) == FAILURE
    error = capsys.readouterr().err
    assert told in error and error.startswith("kvlab: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "wrong",
    ["--prefill -5", "--prefill 0", "--wire -1", "--own 1.5", "--own .", "--gpus 0", "--capacities 1,x", "--tp x"],
)
def test_options_that_are_no_numbers(wrong: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["decide", file, "--shape", "llama-3.1-8b", "--wire", "1", *wrong.split()])
    assert stopped.value.code == USAGE and "expected a " in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        {"wire": 0},
        {"prefill": -1},
        {"own": 2},
        {"capacities": []},
        {"capacities": [0, 1]},
        {"requests": -1},
        {"requests": inf},
        {"gpus_per_engine": 0},
        {"precision": "fp8"},
        {"prices": {"vm": PRICES["vm"]}},
        {"prices": {"utilisation": exact(PRICES["utilisation"], 0)}},
    ],
)
def test_mistakes_are_told(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"expected .* got "):
        tiny(**wrong)


def test_requests_of_one_time_have_no_rate() -> None:
    at_once = [replace(request, at_s=0.0) for request in from_blocks([[1], [1]], 1000)]
    with pytest.raises(InputError, match="--requests-per-month"):
        decide(reuse(at_once, 1000), "llama-3.1-8b", None, 6)
