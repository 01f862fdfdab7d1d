"""What a shared KV tier costs and saves in money: break-even points and the return on investment.

`kvlab.lab.costs` has what work costs in seconds, `kvlab.lab.prices` what seconds, GiB and tokens cost in US dollars.
No price is exact, so results are triples (low, mid, high): mid has the middle of every band of a price, low and high
are the extremes over all corners of the bands. All that is bad for a result comes together in one of its ends, which
is more than is likely. A month has 730 hours.

Not modelled: queues (see `simulate`), the value of a faster first token, whether a tier of a size reaches a hit rate
(see `replay`), and host memory of the GPU machines, which is often paid for already and then costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import ceil, inf
from typing import Any, Final

from kvlab.errors import InputError
from kvlab.lab.costs import H100, PCIE, REDIS, Costs, Device, Link, Model, compute
from kvlab.lab.prices import (
    CROSS_ZONE,
    ENGINEER,
    GPU,
    HOURS,
    RAM,
    STALL,
    UTILISATION,
    Interval,
    Price,
    Rates,
    corners,
    triple,
)

LLAMA_70B: Final = Model(70.6e9, layers=80, heads=64, kv_heads=8, head_dim=128)
"""Llama 3.1 70B in BF16. Source: its config.json; the number of parameters from its model card."""
CONTEXT: Final = 2**17
"""Of Llama 3.1."""


def _expect(kept: bool, expected: str, got: object) -> None:
    if not kept:
        raise InputError(f"expected {expected}, got {got}")


# --- tokens, hits and blocks --------------------------------------------------------------------
def usd_per_mtok(tok_per_s: float, usd_per_hour: float, utilisation: float = 1.0) -> float:
    """Dollars for a million generated tokens on a machine that has work for a share of the time that is paid for.

    >>> round(usd_per_mtok(1000, 3.6), 2), round(usd_per_mtok(1000, 3.6, utilisation=0.4), 2)
    (1.0, 2.5)

    Raises:
        InputError: no tokens, a negative price, or a utilisation that is not in (0, 1].
    """
    _expect(tok_per_s > 0 and usd_per_hour >= 0, "tokens a second above 0 and 0 USD or more", (tok_per_s, usd_per_hour))
    _expect(0 < utilisation <= 1, "a utilisation above 0 and up to 1", utilisation)
    return usd_per_hour / (tok_per_s * 3600 * utilisation) * 1e6


def cached_input_discount(rates: Rates, hit_rate: float, written: float | None = None) -> float:
    """The share of the bill for input that a vendor's cache saves. It is below 0 if writes cost more than hits save.

    Args:
        hit_rate: cached tokens / all input tokens.
        written: written tokens / all input tokens; None: all that is not cached is written.

    >>> from kvlab.lab.prices import RATES
    >>> round(cached_input_discount(RATES["anthropic"], 0.9), 3), round(cached_input_discount(RATES["anthropic"], 0), 3)
    (0.83, -0.25)

    Raises:
        InputError: a share is negative, or both together are more than 1.
    """
    share = 1 - hit_rate if written is None else written
    _expect(hit_rate >= 0 <= share and hit_rate + share <= 1 + 1e-9, "shares of 0 to 1 together", (hit_rate, written))
    saved = hit_rate * (rates.input.value - rates.cached.value) - share * (rates.write.value - rates.input.value)
    return saved / rates.input.value


def break_even_hit_rate(
    prefill_s: float, fetch_s: float, requests_per_s: float, usd_per_gpu_hour: float, tier_usd_per_hour: float
) -> float:
    """The hit rate by tokens from which on a tier saves more than it costs, if seconds are linear in tokens.

    Above 1: no hit rate is enough. `inf`: there are no requests, or a fetch takes as long as the prefill.

    Args:
        prefill_s: GPU-seconds to compute the whole prompt of a request.
        fetch_s: GPU-seconds that wait while the whole prompt is fetched; 0 if other requests fill the time.

    >>> break_even_hit_rate(0.5, 0.25, requests_per_s=2, usd_per_gpu_hour=4, tier_usd_per_hour=1)
    0.5

    Raises:
        InputError: a negative number.
    """
    numbers = (prefill_s, fetch_s, requests_per_s, usd_per_gpu_hour, tier_usd_per_hour)
    _expect(all(0 <= number < inf for number in numbers), "numbers of 0 or more", numbers)
    saved = (prefill_s - fetch_s) * requests_per_s * usd_per_gpu_hour
    return tier_usd_per_hour / saved if saved > 0 else inf


@dataclass(frozen=True)
class Node:
    """A model on its GPUs. `costs` are the seconds that all of them take together."""

    costs: Costs
    gpus: int = 1

    def __post_init__(self) -> None:
        _expect(self.gpus >= 1, "1 GPU or more", self.gpus)


def h100(model: Model, gpus: int = 1) -> Node:
    """A model on H100s, computed from data sheets, as if splitting it over several cost nothing."""
    device = Device(gpus * H100.flops_per_s, gpus * H100.bytes_per_s, H100.reached_flops, H100.reached_bytes)
    return Node(compute(model, device, PCIE, REDIS), gpus)


def measured(kv_bytes: int, prefill_tok_per_s: float, decode_tok_per_s: float, store: Link = REDIS) -> Costs:
    """Costs from measured rates: prompt tokens a second, and new tokens a second of the whole batch.

    Raises:
        InputError: a rate is 0 or less, or as of `Costs`.
    """
    _expect(min(prefill_tok_per_s, decode_tok_per_s) > 0, "rates above 0", (prefill_tok_per_s, decode_tok_per_s))
    prefill_s, token_s = 1 / prefill_tok_per_s, 1 / decode_tok_per_s
    return Costs(kv_bytes, prefill_token_s=prefill_s, step_request_s=token_s, store=store, source="measured")


def break_even_keep_s(
    node: Node, tokens: int, past: int, usd_per_gpu_hour: float, usd_per_gib_month: float, utilisation: float = 1.0
) -> float:
    """Seconds for which the RAM of `tokens` tokens' KV costs as much as computing them once more behind `past` tokens.

    KV that is not used again within this time is cheaper to compute. Source: the five-minute rule, Gray and Putzolu,
    SIGMOD 1987, with a GPU in the place of a disc. A saved GPU-second is worth more on a fleet that is not full, if
    the fleet then shrinks: `utilisation`.

    Raises:
        InputError: no tokens, a price of RAM of 0, a negative one of GPUs, or a utilisation that is not in (0, 1].
    """
    _expect(tokens >= 1 and past >= 0, "1 token or more, behind 0 or more", (tokens, past))
    _expect(usd_per_gib_month > 0 <= usd_per_gpu_hour, "a price of RAM above 0", (usd_per_gib_month, usd_per_gpu_hour))
    _expect(0 < utilisation <= 1, "a utilisation above 0 and up to 1", utilisation)
    computing = node.gpus * node.costs.prefill(tokens, past) / 3600 * usd_per_gpu_hour / utilisation
    rent_per_s = tokens * node.costs.kv_bytes / 2**30 * usd_per_gib_month / (HOURS * 3600)
    return computing / rent_per_s


# --- return on investment -----------------------------------------------------------------------
@dataclass(frozen=True)
class Load:
    """Requests a month (of a day: times 30.4), each with `prompt` and `new` tokens.

    Each finds the share `hit_rate` of its prompt's tokens in the tier. Engines have a prefix cache of their own: count
    only what the tier adds to it. `batch` requests generate together (assumed).
    """

    requests_per_month: float
    prompt: int = 2000
    new: int = 250
    hit_rate: float = 0.9
    batch: int = 32

    def __post_init__(self) -> None:
        sizes = 0 <= self.requests_per_month < inf and self.new >= 0 and min(self.prompt, self.batch) >= 1
        _expect(sizes and 0 <= self.hit_rate <= 1, "0 requests or more, sizes above 0 and a hit rate of 0 to 1", self)


@dataclass(frozen=True)
class Tier:
    """A shared tier of `gib` GiB. The hours of engineers, to set it up and each month, are assumed."""

    gib: float
    price: Price = RAM
    setup_hours: float = 160
    upkeep_hours: float = 8

    def __post_init__(self) -> None:
        numbers = (self.gib, self.setup_hours, self.upkeep_hours)
        _expect(all(0 <= number < inf for number in numbers), "GiB and hours of 0 or more", self)


def gpu_s(node: Node, load: Load, stall: float = STALL.value) -> float:
    """GPU-seconds of one request. Nothing is fetched where that keeps the GPUs longer than computing.

    Args:
        stall: the share of a fetch in which the GPUs wait.
    """
    costs, found = node.costs, min(int(load.prompt * load.hit_rate), load.prompt - 1)
    fetch = costs.store.latency_s + found * costs.kv_bytes / costs.store.bytes_per_s
    prefill = min(costs.prefill(load.prompt, 0), costs.prefill(load.prompt - found, found) + stall * fetch)
    step = costs.step(load.batch, load.batch * (load.prompt + load.new // 2)) / load.batch
    return node.gpus * (prefill + load.new * step)


@dataclass(frozen=True)
class Bill:
    """A month in USD without and with a tier, and the months until its set-up is paid: `inf` where that is never."""

    without_usd: Interval
    with_usd: Interval
    saving_usd: Interval
    break_even_months: Interval


@dataclass(frozen=True)
class Roi:
    """The return on investment of a tier.

    Attributes:
        fractional: GPUs are paid for by the second, as on a large shared fleet.
        whole_gpus: nodes come whole, and one at least is paid for all month.
        nodes: without and with the tier, before rounding.
        store_load: the share of the store's bandwidth that hits need on average. Above 1 they cannot be fetched.
        inputs: all that went in.
    """

    fractional: Bill
    whole_gpus: Bill
    nodes: tuple[Interval, Interval]
    store_load: float
    inputs: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return everything, with None in the place of `inf`, which JSON has not got."""
        told: dict[str, Any] = without_inf(asdict(self))
        return told


def without_inf(told: Any) -> Any:
    """Return the same data with None in the place of `inf`, which JSON has not got."""
    if isinstance(told, dict):
        return {name: without_inf(value) for name, value in told.items()}
    if isinstance(told, list | tuple):
        return [without_inf(value) for value in told]
    return None if told == inf else told


def roi(
    load: Load,
    node: Node,
    tier: Tier,
    *,
    gpu: Price = GPU,
    engineer: Price = ENGINEER,
    utilisation: Price = UTILISATION,
    stall: Price = STALL,
    transfer: Price | None = None,
) -> Roi:
    """Compare a month without a tier and with it.

    Args:
        transfer: price of a GB between node and tier; None: they are in one zone. The KV of each prompt moves once: it
            is read where it is found, and written where not.

    Raises:
        InputError: the utilisation is not in (0, 1], or the stall above 1.
    """
    _expect(utilisation.low > 0 and utilisation.high <= 1, "a utilisation above 0 and up to 1", utilisation)
    _expect(stall.high <= 1, "a stall of 0 to 1", stall)
    prices = (gpu, tier.price, engineer, utilisation, stall, transfer or CROSS_ZONE.times(0))
    at = corners(*prices)
    kv_per_s = load.requests_per_month * load.prompt * node.costs.kv_bytes / (HOURS * 3600)

    def nodes(load: Load) -> list[float]:
        seconds = load.requests_per_month / node.gpus / (HOURS * 3600)
        return [seconds * gpu_s(node, load, stall) / used for _, _, _, used, stall, _ in at]

    def bill(count: Callable[[float], float]) -> Bill:
        month = node.gpus * HOURS
        without = [count(n) * month * usd for n, (usd, *_) in zip(cold, at, strict=True)]
        tiered = [
            count(n) * month * usd + tier.gib * gib + tier.upkeep_hours * hour + kv_per_s * HOURS * 3600 / 1e9 * gb
            for n, (usd, gib, hour, _, _, gb) in zip(warm, at, strict=True)
        ]
        saving = [a - b for a, b in zip(without, tiered, strict=True)]
        months = [tier.setup_hours * p[2] / usd if usd > 0 else inf for usd, p in zip(saving, at, strict=True)]
        return Bill(triple(without), triple(tiered), triple(saving), triple(months))

    cold, warm = nodes(replace(load, hit_rate=0.0)), nodes(load)
    return Roi(
        fractional=bill(lambda count: count),
        whole_gpus=bill(lambda count: max(1, ceil(count))),
        nodes=(triple(cold), triple(warm)),
        store_load=kv_per_s * load.hit_rate / node.costs.store.bytes_per_s,
        inputs={part: asdict(value) for part, value in (("load", load), ("node", node), ("tier", tier))}
        | {"prices": [asdict(price) for price in prices]},
    )


def prompt_needed(
    saving_usd: float, load: Load, node: Node, tier: Tier, most: int = CONTEXT, **prices: Any
) -> Interval:
    """Prompt tokens from which on a tier saves so much a month, GPUs by the second: with the prices that are best for
    the tier, in the middle of the bands, and with the worst ones. `inf` if `most` tokens are not enough.

    Args:
        load: its `prompt` is not used.
        prices: as of `roi`.

    Raises:
        InputError: no saving is asked for, or as of `roi`.
    """
    _expect(saving_usd > 0, "a saving above 0", saving_usd)

    def saved(prompt: int) -> Interval:
        return roi(replace(load, prompt=prompt), node, tier, **prices).fractional.saving_usd

    def first(end: int) -> float:
        low, high = 0, most
        if saved(high)[end] < saving_usd:
            return inf
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if saved(middle)[end] >= saving_usd else (middle, high)
        return high

    return first(2), first(1), first(0)


def sensitivity(
    requests_per_month: Iterable[float], hit_rates: Sequence[float], load: Load, node: Node, tier: Tier, **prices: Any
) -> list[dict[str, Any]]:
    """Return a row for each load and hit rate: the saving a month in USD, GPUs by the second and in whole nodes.

    Signs say what is certain: "+" and "-" (or nothing saved) over all bands; "?": it depends on the prices.

    Args:
        prices: as of `roi`.
    """
    rows = []
    for requests, hit_rate in product(requests_per_month, hit_rates):
        result = roi(replace(load, requests_per_month=requests, hit_rate=hit_rate), node, tier, **prices)
        row: dict[str, Any] = {"requests_per_month": requests, "hit_rate": hit_rate, "store_load": result.store_load}
        for name, bill in (("fractional", result.fractional), ("whole_gpus", result.whole_gpus)):
            low, _, high = bill.saving_usd
            sign = "+" if low > 0 else "-" if high <= 0 else "?"
            row |= {f"{name}_saving_usd": list(bill.saving_usd), f"{name}_sign": sign}
        rows.append(row)
    return rows
