"""The planner against curves that it must learn and against a search of every plan."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from kvlab.engine.planner import EXPLORE, Curve, Plan, Planner
from kvlab.errors import InputError

B = 64


def fetch_s(blocks: int, ms: float = 1.0, per_block: float = 2.0) -> float:
    return (ms + per_block * blocks) / 1000 if blocks else 0.0


def compute_s(start: int, stop: int, speed: float = 1.0) -> float:
    n = stop - start
    return (3.0 + 0.08 * n + 0.00002 * (stop**2 - start**2)) / 1000 * speed if n else 0.0


def taught(tier: str = "store", per_block: float = 2.0, speed: float = 1.0, overlap: bool = True) -> Planner:
    """A planner that has seen exact times."""
    planner = Planner(B, overlap)
    for n in (1, 2, 4, 8, 16, 32):
        planner.fetched(tier, n, fetch_s(n, per_block=per_block))
        planner.computed(0, n * B, compute_s(0, n * B, speed))
        planner.computed(1024, 1024 + n * B, compute_s(1024, 1024 + n * B, speed))
    return planner


def real_time(plan: Plan, per_block: float = 2.0, speed: float = 1.0, overlap: bool = True) -> float:
    """What a plan takes on the curves."""
    blocks = sum(step.stop - step.start for step in plan.fetches) // B
    ahead = sum(compute_s(step.start, step.stop, speed) for step in plan.front)
    fetch = fetch_s(blocks, per_block=per_block)
    begin = max(fetch, ahead) if overlap else fetch + ahead
    return begin + sum(compute_s(step.start, step.stop, speed) for step in plan.rest)


def check_whole(plan: Plan, tokens: int, filled: int = 0) -> None:
    """The steps cover each token once, but for a last token that is computed again."""
    at = filled
    for step in sorted(plan.steps, key=lambda step: (step.start, step.stop)):
        assert step.start == at or (step.start == tokens - 1 and at == tokens)
        at = max(at, step.stop)
    assert at == tokens
    assert plan.rest and plan.rest[-1].stop == tokens and not plan.rest[-1].tier


@pytest.mark.parametrize("seed", range(20))
def test_a_curve_is_learned_from_noisy_times(seed: int) -> None:
    rng = random.Random(seed)
    curve = Curve(2)
    for _ in range(40):
        n = rng.choice([1, 2, 4, 8, 16, 32])
        curve.observe((1, n), fetch_s(n) * rng.gauss(1, 0.1))
    for n in (1, 6, 64):
        assert curve.predict((1, n)) == pytest.approx(fetch_s(n), rel=0.15)


def test_a_change_is_believed_after_three_observations() -> None:
    curve = Curve(2)
    for n in (1, 2, 4, 8) * 8:
        curve.observe((1, n), fetch_s(n))
    for n in (2, 8):
        curve.observe((1, n), 10 * fetch_s(n))
    assert curve.predict((1, 4)) < 5 * fetch_s(4), "two may be noise"
    curve.observe((1, 4), 10 * fetch_s(4))
    assert curve.predict((1, 16)) == pytest.approx(10 * fetch_s(16), rel=0.1)


def test_one_outlier_changes_little() -> None:
    curve = Curve(2)
    for n in (1, 2, 4, 8) * 8:
        curve.observe((1, n), fetch_s(n))
    curve.observe((1, 4), 20 * fetch_s(4))
    predicted = curve.predict((1, 4))
    assert predicted is not None and predicted <= 2.4 * fetch_s(
        4
    )  # careful, until the next one says that it was an accident
    curve.observe((1, 8), fetch_s(8))
    assert curve.predict((1, 4)) == pytest.approx(fetch_s(4), rel=0.35)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_clock_that_jumps_teaches_nothing(seconds: float) -> None:
    curve = Curve(2)
    curve.observe((1, 4), seconds)
    assert curve.predict((1, 4)) is None
    curve.observe((1, 4), 0.5)
    curve.observe((1, 4), seconds)
    assert curve.predict((1, 4)) == pytest.approx(0.5)


def test_nothing_is_predicted_below_zero() -> None:
    curve = Curve(3)
    for n in (64, 128, 256):
        curve.observe((1.0, n, n * n), 1.0 - n / 1000)
    assert curve.predict((1.0, 4096, 4096.0**2)) >= 0


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("per_block", [0.1, 1.0, 4.0, 8.0, 40.0])
def test_no_plan_is_faster_on_the_curves(per_block: float, overlap: bool) -> None:
    """All fronts and all ends, also with lost blocks in the middle, tried one by one."""
    planner = taught(per_block=per_block, overlap=overlap)
    rng = random.Random(round(10 * per_block))
    for _ in range(20):
        n = rng.randint(1, 20)
        where = [rng.choice(["store"] * 6 + [""]) for _ in range(n)]
        tokens = n * B + rng.randint(0, B - 1)
        plan = planner.plan(where, tokens)
        check_whole(plan, tokens)
        every = [
            planner._timed(where, tokens, 0, k, m) for k, m in itertools.combinations_with_replacement(range(n + 1), 2)
        ]
        best = min(real_time(other, per_block, overlap=overlap) for other in every)
        assert real_time(plan, per_block, overlap=overlap) <= 1.02 * best
        assert plan.predicted_s == pytest.approx(real_time(plan, per_block, overlap=overlap), rel=0.05)


def test_many_blocks_are_planned_nearly_as_well() -> None:
    planner = taught(per_block=5.0)
    where, tokens = ["store"] * 256, 256 * B + 10
    every = (planner._timed(where, tokens, 0, k, 256) for k in range(257))
    best = min(real_time(plan, 5.0) for plan in every)
    assert real_time(planner.plan(where, tokens), 5.0) <= 1.02 * best


def test_a_mixture_beats_both_extremes_where_fetch_and_compute_take_alike() -> None:
    planner = taught(per_block=6.0)
    plan = planner.plan(["store"] * 16, 16 * B + 10)
    assert plan.why == "mix" and plan.front and plan.fetches
    assert plan.predicted_s < 0.8 * min(plan.rejected["compute"], plan.rejected["fetch"])
    assert taught(per_block=6.0, overlap=False).plan(["store"] * 16, 16 * B + 10).why != "mix"


def test_a_lost_block_is_filled_and_not_the_whole_tail_computed() -> None:
    where = ["store"] * 16
    where[2] = ""
    plan = taught(per_block=0.5).plan(where, 16 * B + 10)
    fetched = {i for step in plan.fetches for i in range(step.start // B, step.stop // B)}
    ahead = {i for step in plan.front for i in range(step.start // B, step.stop // B)}
    assert fetched | ahead == set(range(16)) - {2} and len(ahead) <= 1
    assert [(step.start, step.stop) for step in plan.rest] == [(2 * B, 3 * B), (16 * B, 16 * B + 10)]
    slow = taught(per_block=500.0).plan(where, 16 * B + 10)
    assert slow.why == "compute" and not slow.fetches


def test_what_the_pool_has_is_neither_fetched_nor_computed() -> None:
    plan = taught(per_block=0.5).plan(["store"] * 8, 8 * B, filled=4 * B)
    check_whole(plan, 8 * B, filled=4 * B)
    assert min(step.start for step in plan.steps) == 4 * B
    whole = taught().plan(["store"] * 8, 8 * B, filled=8 * B)
    assert [(step.start, step.stop, step.tier) for step in whole.steps] == [(8 * B - 1, 8 * B, "")]


def test_a_planner_without_observations_fetches_to_learn() -> None:
    planner = Planner(B)
    plan = planner.plan(["store"] * 4, 4 * B + 1)
    assert plan.fetches and "learn" in plan.why and math.isnan(plan.predicted_s)
    assert planner.plan([""] * 4, 4 * B + 1).why == "compute"
    assert "predicted unknown" in plan.report()


def test_a_tier_that_is_left_out_is_tried_again_in_the_background() -> None:
    """A wire may have become fast; who never fetches never learns it."""
    planner = taught(per_block=500.0)
    plans = [planner.plan(["store"] * 16, 16 * B + 10) for _ in range(2 * EXPLORE)]
    assert {plan.why for plan in plans} == {"compute"}
    probes = [i for i, plan in enumerate(plans) if plan.probe]
    assert probes == [EXPLORE - 1, 2 * EXPLORE - 1]
    probe = plans[EXPLORE - 1].probe
    assert probe is not None and (probe.stop - probe.start, probe.tier) == (B, "store")
    for _ in range(3):
        planner.fetched("store", 1, fetch_s(1, per_block=0.5))
    plan = planner.plan(["store"] * 16, 16 * B + 10)
    assert plan.why != "compute" and plan.probe is None


def test_blocks_of_two_tiers_wait_for_both() -> None:
    planner = taught(per_block=2.0)
    for n in (1, 2, 4, 8):
        planner.fetched("host", n, fetch_s(n, ms=0.1, per_block=0.1))
    plan = planner.plan(["host"] * 4 + ["store"] * 4, 8 * B + 1)
    assert {step.tier for step in plan.fetches} == {"host", "store"}
    check_whole(plan, 8 * B + 1)


def test_a_report_has_the_choice_the_rejected_ones_and_what_it_took() -> None:
    plan = taught(per_block=0.5).plan(["store"] * 4, 4 * B + 10)
    plan.took_s = 0.0123
    said = plan.report()
    assert said.startswith("fetch: 0-256 store, 256-266 computed; predicted ")
    assert "took 12.3 ms" in said and "rejected: compute " in said and ", mix " in said


@pytest.mark.parametrize(
    ("where", "tokens", "filled"),
    [(["store"] * 3, 2 * B, 0), ([], 0, 0), ([], 10, 11), (["store"], B, 3), ([], 10, -B)],
)
def test_numbers_that_do_not_fit_are_refused(where: list[str], tokens: int, filled: int) -> None:
    with pytest.raises(InputError, match="full blocks in"):
        taught().plan(where, tokens, filled)


def test_a_wire_that_no_line_fits_is_learned_size_by_size() -> None:
    """The first MiB is free, as on a wire with a burst: a + b n with a >= 0 cannot say that."""

    def burst_s(n: int) -> float:
        return 0.001 + 0.004 * max(0, n - 6)

    curve = Curve(2)
    for n in (2, 4, 8, 16, 32) * 8:
        curve.observe((1, n), burst_s(n))
    for n in (2, 4, 8, 16, 32):
        assert curve.predict((1, n)) == pytest.approx(burst_s(n), rel=0.1)


def test_that_overlap_is_not_free_is_learned_and_can_change_the_choice() -> None:
    planner = taught(per_block=6.0)
    before = planner.plan(["store"] * 16, 16 * B + 16)
    assert before.why == "mix"
    second = min(before.rejected.values())
    for _ in range(40):
        plan = planner.plan(["store"] * 16, 16 * B + 16)
        planner.finished(plan, real_time(plan, per_block=6.0) * (1.45 if plan.why == "mix" else 1.0))
    assert plan.why != "mix" or plan.predicted_s == pytest.approx(1.45 * before.predicted_s, rel=0.1)
    assert plan.predicted_s <= second * 1.05
    for _ in range(300):  # an opinion that is not tried fades
        plan = planner.plan(["store"] * 16, 16 * B + 16)
        planner.finished(plan, real_time(plan, per_block=6.0))
    assert plan.why == "mix"


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_plan_timed_by_a_clock_that_jumps_teaches_nothing(seconds: float) -> None:
    planner = taught()
    before = planner.plan(["store"] * 8, 8 * B + 16)
    planner.finished(before, seconds)
    assert planner.plan(["store"] * 8, 8 * B + 16).predicted_s == before.predicted_s


def test_a_planner_that_does_not_choose_fetches_all_there_is() -> None:
    planner = Planner(B, chooses=False)
    for _ in range(3):
        plan = planner.plan(["store", "", "host"], 3 * B + 5)
        assert [(step.start, step.stop, step.tier) for step in plan.fetches] == [
            (0, B, "store"),
            (2 * B, 3 * B, "host"),
        ]
        planner.fetched("store", 1, 1e6)
        planner.computed(0, B, 1e-6)
