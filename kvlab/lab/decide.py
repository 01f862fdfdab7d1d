"""Whether a shared KV tier pays: yes, no, or what to measure first; from one trace, one model and one wire.

    python -m kvlab decide TRACE --shape llama-3.1-8b --prefill 15000 --wire 6 --gpus 40

The rule is that of docs/01. Money is what GPUs, rented by the second, cost less, minus servers and upkeep. It counts
only hits that the engines' own caches lack and that a fetch brings sooner than computing would: runs of tokens of at
least the crossover length. For requests that are all alike it is the saving of `kvlab.lab.cost.roi`.

Each input is a `Price`: exact where it was given, with a band where it was assumed. The low end of the money has all
that is bad for the tier together, the high end all that is good.

    yes            the low end is above 0 at some capacity, and the prefill was given
    no             nothing to find, or a wire below the break-even for nearly all hits, or the high end is never above 0
    measure first  all else; then the inputs that can settle it, and the values from which on they do

At a flip value of an input the tier begins or ceases to pay at its best capacity, with all other inputs at the worst
ends of their bands, in the middle, or at the best ends. One prefill rate stands for all lengths. Not counted: the
worth of an earlier first token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, inf
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvlab.errors import InputError
from kvlab.lab.cost import Tier, without_inf
from kvlab.lab.costs import REDIS, Costs, Link
from kvlab.lab.decide_inputs import COMMANDS, FALLING, USED, busy, engines_for, inputs_of, points, sizes
from kvlab.lab.gpu_model import break_even_gbps, crossover
from kvlab.lab.prices import GIVEN, HOURS, Interval, Price, interval
from kvlab.lab.reuse import Reuse
from kvlab.lab.tables import number, usd

SERVER_GIB: Final = 0.65 * 64
"""Values in one server: `prices.RAM` is the price of a machine of 64 GiB of which so much holds them."""
CAPACITIES: Final = (32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)
"""GiB."""
NEARLY: Final = 0.05
"""If fewer of the hit tokens than this share are worth fetching, the wire is too slow for nearly all of them."""


# --- what comes out -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Row:
    """A tier of one capacity.

    Attributes:
        gib, blocks, servers: its size, and how many servers of `SERVER_GIB` hold it; they are paid for whole.
        hit_rate: found full blocks / all full blocks in an LRU cache of this size.
        added: the same, less what the engines find themselves.
        worth: the share of the added tokens in runs of at least the crossover length; only they are fetched.
        load: bytes a second of fetches and saves / what the servers carry, each a wire. Above 1 they cannot.
        gpu_hours: GPU-hours a month that the fetched tokens would take to compute, less those that wait for fetches.
        tier_usd: servers and upkeep of a month.
        net_usd: what is left of the saved GPU time, a month.
        payback_months: until the set-up is paid; `inf` for never.
    """

    gib: float
    blocks: int
    servers: int
    hit_rate: float
    added: float
    worth: float
    load: float
    gpu_hours: float
    tier_usd: Interval
    net_usd: Interval
    payback_months: Interval


@dataclass(frozen=True)
class Flips:
    """Values of an input at which the tier begins or ceases to pay at its best capacity; None where it does neither.

    It pays if money is left and fetching is faster for the share `NEARLY` of the hit tokens, or more.

    Attributes:
        yes: all other inputs at the worst ends of their bands: beyond it the tier pays for certain.
        mid: all others in the middle.
        no: all others at the best ends: beyond it the tier cannot pay.
    """

    yes: float | None
    mid: float | None
    no: float | None


@dataclass(frozen=True)
class Question:
    """An input to measure.

    Attributes:
        name: of the input.
        swing_usd: how far the money moves over its band, at most.
        settles: whether some values of its band decide alone.
        command: how to measure it, and where the result goes.
    """

    name: str
    swing_usd: float
    settles: bool
    command: str


@dataclass(frozen=True)
class Decision:
    """A decision and all that it is made of.

    Attributes:
        verdict: "yes", "no" or "measure first".
        reasons: of it, in words.
        changes: if it is "no", what would have to be otherwise.
        measure: if it is "measure first", what.
        shape, precision, kv_bytes: the model, and bytes of KV of a token.
        gpus, gpus_per_engine: that serve the trace.
        busy_gpus: how many of them computing all prompts keeps busy.
        block_tokens, requests, tokens, span_s: of the trace.
        hit_rate: found full blocks / all full blocks of an endless cache.
        inputs: by name: requests (a month), prefill (tokens/s of an engine), wire (GB/s), own (hit rate of the
            engines), and the prices of `USED`.
        assumed: the names of those that were not given.
        break_even_gbps: the wire over which a fetch takes as long as the prefill, without latency.
        crossover: the number of tokens from which on fetching them is faster; `inf` for never.
        long_share: the share of an endless cache's hit tokens in prefixes of at least that length.
        rows: by capacity.
        best: the row whose money is highest in the middle.
        flips: by input.
    """

    verdict: str
    reasons: tuple[str, ...]
    changes: tuple[str, ...]
    measure: tuple[Question, ...]
    shape: str
    precision: str
    kv_bytes: int
    gpus: int
    gpus_per_engine: int
    busy_gpus: float
    block_tokens: int
    requests: int
    tokens: int
    span_s: float
    hit_rate: float
    inputs: dict[str, Price]
    assumed: tuple[str, ...]
    break_even_gbps: float
    above_break_even: bool
    crossover: float
    long_share: float
    rows: tuple[Row, ...]
    best: Row
    flips: dict[str, Flips]

    def as_json(self) -> dict[str, Any]:
        """Return everything, with None in the place of `inf`, which JSON has not got."""
        told: dict[str, Any] = without_inf(asdict(self))
        return told


# --- the decision -------------------------------------------------------------------------------
def decide(
    trace: Reuse,
    shape: str,
    prefill_tok_s: float | None,
    wire_gbps: float,
    prices: Mapping[str, Price] | None = None,
    *,
    precision: str = "bf16",
    gpus: int | None = None,
    gpus_per_engine: int = 1,
    own: float | None = None,
    requests_per_month: float | None = None,
    capacities: Sequence[float] = CAPACITIES,
) -> Decision:
    """Decide whether a shared tier pays.

    Args:
        trace: what `reuse` says of it.
        shape: a name of `SHAPES`, or layers x KV heads x head dim.
        prefill_tok_s: prompt tokens a second of one engine; None: computed for H100s.
        wire_gbps: GB/s from a server to an engine.
        prices: by names of `USED`, in the place of those of `kvlab.lab.prices`.
        gpus: that serve the trace; None: as many H100s as its prompts keep busy.
        own: the hit rate that the engines have already; None: computed from their number and the memory of H100s.
        requests_per_month: None: as many as come in the trace, all month. More scale the money, not the memory that
            it takes to find them: that is the trace's.
        capacities: of the tier, in GiB.

    Raises:
        InputError: a shape or precision is unknown, or a number is none of its kind.
    """
    model, tp = sizes(shape), gpus_per_engine
    _check_numbers(prefill_tok_s, wire_gbps, gpus, tp, own, requests_per_month, capacities)
    _check_prices(prices or {})
    inputs = inputs_of(model, trace, prefill_tok_s, wire_gbps, prices or {}, gpus, tp, own, requests_per_month)
    world = _World(trace, model.kv_bytes(precision), tp, tuple(capacities), {})
    return _judge(world, model.name, precision, gpus or engines_for(trace, inputs) * tp, inputs)


def _check_numbers(
    prefill: float | None,
    wire: float,
    gpus: int | None,
    tp: int,
    own: float | None,
    requests: float | None,
    capacities: Sequence[float],
) -> None:
    least = min(capacities, default=0.0)
    most = max(capacities, default=0.0)
    for kept, expected, got in (
        (prefill is None or 0 < prefill < inf, "prefill tokens a second above 0", prefill),
        (0 < wire < inf, "a wire of more than 0 GB/s", wire),
        (tp >= 1, "1 GPU or more an engine", tp),
        (gpus is None or gpus >= tp, f"at least the {tp} GPUs of one engine", gpus),
        (own is None or 0 <= own <= 1, "a hit rate of the engines of 0 to 1", own),
        (requests is None or 0 <= requests < inf, "0 requests a month or more", requests),
        (0 < least <= most < inf, "capacities above 0 GiB", capacities),
    ):
        if not kept:
            raise InputError(f"expected {expected}, got {got}")


def _check_prices(prices: Mapping[str, Price]) -> None:
    if unknown := [name for name in prices if name not in USED]:
        raise InputError(f"expected prices of {', '.join(USED)}, got {unknown[0]!r}")
    shares = [prices[name] for name in ("utilisation", "stall") if name in prices]
    if any(share.high > 1 for share in shares) or ("utilisation" in prices and not prices["utilisation"].low):
        raise InputError(f"expected shares of at most 1, and a utilisation above 0, got {shares}")


# --- the money ----------------------------------------------------------------------------------
Point = Mapping[str, float]
"""A value of each input."""


@dataclass(frozen=True)
class _World:
    """What does not change while inputs vary."""

    trace: Reuse
    kv_bytes: int
    tp: int
    capacities: tuple[float, ...]
    known: dict[float, NDArray[Any]]

    def blocks(self, gib: float) -> int:
        return int(gib * 2**30 // (self.kv_bytes * self.trace.block_tokens))

    def found(self, capacity: float) -> NDArray[Any]:
        """As that of the trace; of capacities that come again and again it is remembered."""
        if capacity not in self.known:
            if len(self.known) > 2 * len(self.capacities):
                self.known.clear()
            self.known[capacity] = self.trace.found(capacity)
        return self.known[capacity]

    def costs(self, at: Point) -> Costs:
        link = Link(REDIS.latency_s, at["wire"] * 1e9)
        return Costs(self.kv_bytes, prefill_token_s=1 / at["prefill"], store=link)

    def runs(self, gib: float, own: float) -> NDArray[Any]:
        """Tokens that the tier has behind those that the engine has, for each request."""
        near = self.found(self.trace.capacity(own))
        runs: NDArray[Any] = np.maximum(self.found(self.blocks(gib)), near) - near
        return runs * self.trace.block_tokens

    def hours(self, gib: float, at: Point) -> tuple[float, float, float]:
        """Tokens fetched in a month, the hours of an engine to compute them, and to fetch them."""
        runs, costs = self.runs(gib, at["own"]), self.costs(at)
        worth = runs[runs >= crossover(costs)]
        times, tokens = at["requests"] / self.trace.requests, float(worth.sum())
        fetch = len(worth) * costs.store.latency_s + tokens * costs.kv_bytes / costs.store.bytes_per_s
        return times * tokens, times * tokens * costs.prefill_token_s / 3600, times * fetch / 3600

    def net(self, gib: float, at: Point) -> float:
        """USD a month."""
        (_, computing, fetching), tier = self.hours(gib, at), _tier(gib)
        saved = (computing - at["stall"] * fetching) * self.tp / at["utilisation"] * at["gpu"]
        return saved - tier.gib * at["ram"] - tier.upkeep_hours * at["engineer"]

    def most(self, at: Point) -> float:
        """USD a month at the best capacity."""
        return max(self.net(gib, at) for gib in self.capacities)

    def long_share(self, at: Point) -> float:
        """The share of an endless cache's hit tokens in prefixes from the crossover length on."""
        hits = self.found(inf) * self.trace.block_tokens
        return float(hits[hits >= crossover(self.costs(at))].sum() / hits.sum()) if hits.any() else 0.0

    def pays(self, at: Point) -> bool:
        """Whether money is left, and the wire is not too slow for nearly all hits."""
        return self.long_share(at) >= NEARLY and self.most(at) > 0


def _tier(gib: float) -> Tier:
    return Tier(ceil(gib / SERVER_GIB) * SERVER_GIB)


def _row(world: _World, gib: float, inputs: Mapping[str, Price]) -> Row:
    ends, tier, trace = points(inputs), _tier(gib), world.trace
    mid, blocks, servers = ends[1], world.blocks(gib), round(tier.gib / SERVER_GIB)
    low, middle, high = (world.net(gib, at) for at in ends)
    slow, months, soon = (_months(world.net(gib, at), tier, at["engineer"]) for at in ends)
    added, found = float(world.runs(gib, mid["own"]).sum()), float(world.found(blocks).sum())
    fetched, computing, fetching = world.hours(gib, mid)
    times = mid["requests"] / trace.requests
    saved = times * trace.block_tokens * (trace.blocks - found)
    carried = servers * mid["wire"] * 1e9 * HOURS * 3600
    return Row(
        *(gib, blocks, servers, trace.hit_rate(blocks)),
        added / trace.block_tokens / trace.blocks if trace.blocks else 0.0,
        fetched / (times * added) if times * added else 0.0,
        (fetched + saved) * world.kv_bytes / carried,
        (computing - mid["stall"] * fetching) * world.tp,
        interval(lambda ram, hour: tier.gib * ram + tier.upkeep_hours * hour, inputs["ram"], inputs["engineer"]),
        (low, middle, high),
        (soon, months, slow),
    )


def _months(usd: float, tier: Tier, engineer: float) -> float:
    return tier.setup_hours * engineer / usd if usd > 0 else inf


# --- where it turns -----------------------------------------------------------------------------
def _range(name: str, value: float) -> tuple[float, float]:
    """Where a flip is looked for."""
    if name in ("own", "stall", "utilisation"):
        return (1e-3 if name == "utilisation" else 0.0), 1.0
    return value * 1e-6, value * 1e3


def _flip(world: _World, at: Point, name: str) -> float | None:
    """Bisect for the value of an input at which the tier begins or ceases to pay."""
    low, high = _range(name, at[name])
    below = world.pays({**at, name: low})
    if below == world.pays({**at, name: high}):
        return None
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if world.pays({**at, name: middle}) == below else (low, middle)
    return high


def _questions(world: _World, inputs: Mapping[str, Price], flips: Mapping[str, Flips]) -> list[Question]:
    """Inputs with a band: first those that can settle it alone, in each group by how far they move the money."""
    worst, _, best = points(inputs)
    told = []
    for name, price in inputs.items():
        if price.low < price.high:
            lost = world.most(best) - world.most({**best, name: worst[name]})
            won = world.most({**worst, name: best[name]}) - world.most(worst)
            ends = (flips[name].yes, flips[name].no)
            settles = any(end is not None and price.low <= end <= price.high for end in ends)
            told.append(Question(name, max(lost, won), settles, COMMANDS[name]))
    return sorted(told, key=lambda question: (not question.settles, -question.swing_usd))


# --- the verdict --------------------------------------------------------------------------------
def _judge(world: _World, shape: str, precision: str, gpus: int, inputs: dict[str, Price]) -> Decision:
    trace, mid = world.trace, {name: price.value for name, price in inputs.items()}
    rows = tuple(_row(world, gib, inputs) for gib in world.capacities)
    costs, best = world.costs(mid), max(rows, key=lambda row: row.net_usd[1])
    flips = {name: Flips(*(_flip(world, at, name) for at in points(inputs))) for name in inputs}
    break_even = break_even_gbps(world.kv_bytes, 1, costs.prefill_token_s)
    draft = Decision(
        verdict="no",
        reasons=(),
        changes=(),
        measure=(),
        shape=shape,
        precision=precision,
        kv_bytes=world.kv_bytes,
        gpus=gpus,
        gpus_per_engine=world.tp,
        busy_gpus=busy(trace, inputs) * world.tp,
        block_tokens=trace.block_tokens,
        requests=trace.requests,
        tokens=trace.tokens,
        span_s=trace.span_s,
        hit_rate=trace.hit_rate(),
        inputs=inputs,
        assumed=tuple(name for name, price in inputs.items() if price.source != GIVEN),
        break_even_gbps=break_even,
        above_break_even=mid["wire"] > break_even,
        crossover=crossover(costs),
        long_share=world.long_share(mid),
        rows=rows,
        best=best,
        flips=flips,
    )
    slowest = {**mid, "prefill": inputs["prefill"].low}
    too_short = _too_short(draft, world.long_share(slowest), crossover(world.costs(slowest)))
    if reasons := _against(draft, too_short[:1]):
        return replace(draft, reasons=reasons, changes=_changes(draft, too_short[1:]))
    sure = [row for row in rows if row.net_usd[0] > 0]
    if any(row.load <= 1 for row in sure) and "prefill" not in draft.assumed:
        return replace(draft, verdict="yes", reasons=_in_favour(draft, sure))
    questions = _questions(world, inputs, flips)
    return replace(draft, verdict="measure first", **_open(draft, sure, questions))


def _too_short(d: Decision, long_share: float, begin: float) -> tuple[str, ...]:
    """Why fetching is slower for nearly all hits, and what would have to be otherwise; nothing if it is not.

    Args:
        long_share, begin: the share of hit tokens in prefixes from the crossover length on, and this length in
            tokens, both with the slowest prefill that is assumed.
    """
    if long_share >= NEARLY:
        return ()
    wire, need = d.inputs["wire"].value, break_even_gbps(d.kv_bytes, 1, 1 / d.inputs["prefill"].low)
    slow = f"for {1 - long_share:.0%} of the hit tokens fetching takes longer than computing"
    if wire > need:
        why = f"a fetch takes some time before its first byte, so it is faster from {begin:,.0f} tokens on: {slow}"
        return why, f"shared prefixes of {begin:,.0f} tokens and more, or a wire with more than {wire:.3g} GB/s"
    slower = wire * 1e9 / d.kv_bytes
    return (
        f"the wire gives {wire:.3g} GB/s and the break-even is {need:.3g}: {slow}",
        f"a wire above {need:.3g} GB/s, an engine below {slower:,.0f} tokens/s, or fewer bytes a token "
        "(--precision int8)",
    )


def _against(d: Decision, too_short: tuple[str, ...]) -> tuple[str, ...]:
    """Why not; nothing if it is not certain."""
    if not d.hit_rate:
        return (f"no prompt begins with a full block ({d.block_tokens} tokens) of an earlier one: no cache finds any",)
    if too_short:
        return too_short
    if any(row.net_usd[2] > 0 for row in d.rows):
        return ()
    least, added = max(d.rows, key=lambda row: row.net_usd[2]), max(row.added for row in d.rows)
    return (
        f"even at the best ends of all bands {least.gib:,g} GiB lose {usd(-least.net_usd[2])} a month",
        f"a tier adds at most {added:.3f} to the {d.inputs['own'].value:.3f} that the engines find themselves",
    )


def _changes(d: Decision, too_short: tuple[str, ...]) -> tuple[str, ...]:
    """What would have to be otherwise."""
    if not d.hit_rate:
        return ("prompts that begin alike: first what never changes, then the user's text; or smaller blocks",)
    if too_short:
        return too_short
    sides = [
        f"{name} {'below' if name in FALLING else 'above'} {number(flip)} (now {number(d.inputs[name].value)})"
        for name in ("requests", "wire", "own", "ram")
        if (flip := d.flips[name].mid) is not None
    ]
    if sides:
        return (f"one of these, all else in the middle of its band: {', '.join(sides)}",)
    return ("none of requests, wire, own hit rate or RAM is enough by itself: more prompts that share long beginnings",)


def _in_favour(d: Decision, sure: Sequence[Row]) -> tuple[str, ...]:
    first = max((row for row in sure if row.load <= 1), key=lambda row: row.net_usd[1])
    told = [f"{first.gib:,g} GiB pay {usd(first.net_usd[0])} a month even at the worst ends of all bands"]
    if d.best not in sure or d.best.load > 1:
        told.append(
            f"{d.best.gib:,g} GiB would pay more in the middle ({usd(d.best.net_usd[1])}), but not for certain: "
            f"begin with {first.gib:,g}"
        )
    else:
        told.append(f"it adds {first.added:.3f} to the {d.inputs['own'].value:.3f} that the engines find themselves")
    return tuple(told)


def _open(d: Decision, sure: Sequence[Row], questions: Sequence[Question]) -> dict[str, Any]:
    """Why it is open, and what to measure: two things at most."""
    if not sure:
        top = max(d.rows, key=lambda row: row.net_usd[2])
        low, _, high = top.net_usd
        told = (
            f"{top.gib:,g} GiB make {usd(high)} a month at the best ends of all bands, {usd(low)} at the worst: what "
            "is not known decides"
        )
        return {"reasons": (told,), "measure": tuple(questions[:2])}
    if "prefill" in d.assumed:
        told = "all bands pay, but the prefill is computed from a data sheet and not measured"
        return {"reasons": (told,), "measure": tuple(q for q in questions if q.name == "prefill")}
    least = min(sure, key=lambda row: row.load)
    need = least.load * least.servers
    told = f"it would pay, but fetches and saves need {need:.1f} servers of this wire; {least.servers} hold the tier"
    return {"reasons": (told,), "measure": (Question("wire", 0.0, True, COMMANDS["wire"]),)}
