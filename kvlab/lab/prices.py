"""Prices that the money of `kvlab.lab.cost` is computed from, each with a band, a date and a public source.

Prices change by the month. Where a vendor's page was seen through another publication, that one is named. What no
source was found for says "assumed" and has a wide band.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

from kvlab.errors import InputError

Interval = tuple[float, float, float]
"""Low, mid, high."""
HOURS: Final = 730.0
"""Of a month."""


@dataclass(frozen=True)
class Price:
    """A price, or another figure that money depends on, with its band.

    Attributes:
        name: what it buys.
        unit: for example "USD per GiB-month".
        value, low, high: the middle and the ends of the band.
        band: what they are.
        date: when the source said so.
        source: a public page, or "assumed".

    Raises:
        InputError: not 0 <= low <= value <= high.
    """

    name: str
    unit: str
    value: float
    low: float
    high: float
    band: str
    date: str
    source: str

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.value <= self.high < float("inf"):
            raise InputError(f"expected 0 <= low <= value <= high, got {self}")

    def times(self, factor: float) -> Price:
        """Return the price in a world in which this costs `factor` times as much."""
        return replace(self, value=self.value * factor, low=self.low * factor, high=self.high * factor)


def corners(*prices: Price) -> list[tuple[float, ...]]:
    """Return the middles of all bands, then every combination of their ends."""
    return [tuple(price.value for price in prices), *product(*((price.low, price.high) for price in prices))]


def triple(values: Sequence[float]) -> Interval:
    """Return the least value, the first one and the largest one: of results at `corners`, low, mid and high."""
    return min(values), values[0], max(values)


def interval(function: Callable[..., float], *prices: Price) -> Interval:
    """Return low, mid and high of a function of prices. The ends are right if it is monotonic in each of them.

    >>> interval(lambda tokens: round(tokens * 1000), RATES["deepseek"].input)
    (150, 150, 300)
    """
    return triple([function(*at) for at in corners(*prices)])


# --- the prices ---------------------------------------------------------------------------------
_SKYPILOT, _RECEIPTS = "github.com/skypilot-org/skypilot-catalog", "github.com/datareceipts/data-receipts, 109"
_COMMITTED: Final = 0.63
"""Committed for a year / on demand. Source: Google's list in Cyclenerd/google-cloud-pricing-cost-calculator, 2025."""

GPU: Final = Price(
    "NVIDIA H100 SXM, 80 GB, on demand", "USD per GPU-hour", (3.99 + 6.88) / 2, 3.99, 6.88,
    "low: Lambda, 8 GPUs; high: AWS p5.48xlarge / 8; their mean. Beyond it: RunPod Community 2.69, Azure ND96isr 12.29",
    "2026-11-09; Lambda 2026-09-20", f"{_RECEIPTS}; lambda.ai/instances, seen in api-evangelist/lambda-labs",
)  # fmt: skip
VM: Final = Price(
    "VM of 2 vCPUs and 8 GiB, on demand", "USD per hour", 0.0816, 0.0816 * _COMMITTED, 0.126,
    "m7g.large, which is Arm; low: committed; high: r6i.large, x86 with 16 GiB (a quarter of r6i.2xlarge)",
    "2026-06-17; r6i 2026", f"factualminds.com, Amazon EC2 On-Demand Pricing; {_SKYPILOT}, v9",
)  # fmt: skip
RAM: Final = Price(
    "self-run Redis, GiB of maxmemory", "USD per GiB-month",
    0.504 / 64 * HOURS / 0.65, 0.504 / 64 * HOURS * _COMMITTED / 0.7, 0.47321 / 52 * HOURS / 0.6,
    "65 % of an r6i.2xlarge's 64 GiB; low: committed, 70 %; high: 60 % of an n1-highmem-8's 52. No replica",
    "seen in a catalog of 2026", f"{_SKYPILOT}, v9, us-east-1 and us-central1; the shares of RAM are assumed",
)  # fmt: skip
MANAGED: Final = Price(
    "managed Redis, GiB for values", "USD per GiB-month",
    0.437 / 19.7 * HOURS, 0.8 * 0.437 / 19.7 * HOURS, 0.125 * HOURS,
    "cache.r7g.xlarge, 19.7 of 26.3 GiB usable; low: Valkey, 20 % less; high: serverless Redis, without its requests",
    "2026-04-01; serverless 2026-06; 0.437 undated",
    "cloudburn.io (usable GiB); usage.ai (0.125); 0.437 in public price tables (cachee.ai, 2026-05-10: 0.498)",
)  # fmt: skip
CROSS_ZONE: Final = Price(
    "transfer to another zone of a region", "USD per GB", 0.01, 0.0, 0.02,
    "Google; low: the same zone; high: AWS, 0.01 in each direction", "2026-09-20; AWS 2026-05",
    "cloud.google.com/vpc/network-pricing, seen in api-evangelist; awsnegotiations.com",
)  # fmt: skip
ENGINEER: Final = Price("engineer", "USD per hour", 100, 60, 200, "salary and overhead by country", "2026", "assumed")
UTILISATION: Final = Price(
    "time in which a rented GPU has work", "share", 0.4, 0.2, 0.8,
    "high: GPU servers that train are in use 80 % of the time, and inference varies more; mid and low are assumed",
    "2025-05", "Uptime Institute, UII update 362; assumed",
)  # fmt: skip
STALL: Final = Price(
    "part of a fetch in which the GPU waits", "share", 0.5, 0.0, 1.0,
    "low: other requests fill the time; high: there are none", "2026", "assumed",
)  # fmt: skip
PRICES: Final = {
    "gpu": GPU, "vm": VM, "ram": RAM, "managed": MANAGED, "cross_zone": CROSS_ZONE, "engineer": ENGINEER,
    "utilisation": UTILISATION, "stall": STALL,
}  # fmt: skip
"""By name."""


@dataclass(frozen=True)
class Rates:
    """What a vendor's API asks for input: not cached, read from its cache, written to it; USD per million tokens."""

    name: str
    input: Price
    cached: Price
    write: Price


def _rates(name: str, usd: tuple[float, float, float], band: str, date: str, source: str, peak: float = 1.0) -> Rates:
    kinds = ("input", "cached input", "cache write")
    one, two, three = (
        Price(f"{name}, {kind}", "USD per million tokens", x, x, x * peak, band, date, source)
        for kind, x in zip(kinds, usd, strict=True)
    )
    return Rates(name, one, two, three)


_CLAUDE: Final = "platform.claude.com/docs/en/about-claude/pricing, seen in kurofune/claudit 1.9.2"
RATES: Final[dict[str, Rates]] = {
    "openai": _rates(
        "GPT-6.2 Sol", (2.0, 0.10, 2.50), "to 272K tokens; writes last 30 min",
        "2026-11", "developers.openai.com/api/docs/models/gpt-6.2-sol",
    ),
    "anthropic": _rates("Claude Sonnet 5.5", (2.0, 0.10, 2.50), "writes last 5 min", "2026-10-24", _CLAUDE),
    "anthropic_1h": _rates("Claude Sonnet 5.5", (2.0, 0.10, 4.0), "writes last 1 h", "2026-10-24", _CLAUDE),
    "google": _rates(
        "Gemini 4 Neon", (3.0, 0.15, 3.0), "implicit caching, writes are input",
        "2026-11-19", "ai.google.dev/gemini-api/docs/pricing, seen in feronovak/llm-preflight 2.25.9",
    ),
    "deepseek": _rates(
        "DeepSeek V4.1 Flash", (0.15, 0.003, 0.15), "off-peak; high: peak. Writes are input",
        "2026-10-27", "api-docs.deepseek.com/quick_start/pricing", peak=2,
    ),
}  # fmt: skip
"""By vendor."""


# --- your own -----------------------------------------------------------------------------------
GIVEN: Final = "given"
"""The source of what the user said."""


def given(price: Price, value: float, low: float | None = None, high: float | None = None) -> Price:
    """Return a price with the user's value; it has a band only if its ends are given."""
    ends = (value if low is None else low, value if high is None else high)
    return replace(price, value=value, low=ends[0], high=ends[1], band=GIVEN, date=GIVEN, source=GIVEN)


def read_prices(file: str | Path, names: Sequence[str] = tuple(PRICES)) -> dict[str, Price]:
    """Read the prices of contracts: JSON, by some names of `PRICES`, each a number or an object of value, low and high.

    Args:
        names: which are of use.

    Raises:
        InputError: the file cannot be read, or a price is none; the message names its key.
    """
    try:
        told = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{file}: expected a file of prices, got: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: expected JSON, got: {error}") from None
    if not isinstance(told, dict):
        raise InputError(f'{file}: expected an object such as {{"gpu": 2.5}}, got {type(told).__name__}')
    if unknown := [key for key in told if key not in names]:
        raise InputError(f"{file}: expected only {', '.join(names)}, got {unknown[0]!r:.60}")
    return {key: _read_price(f"{file}: {key}", key, row) for key, row in told.items()}


def _read_price(where: str, key: str, row: Any) -> Price:
    parts = row if isinstance(row, dict) else {"value": row}
    numbers = all(isinstance(part, int | float) and not isinstance(part, bool) for part in parts.values())
    if not numbers or "value" not in parts or parts.keys() - {"value", "low", "high"}:
        raise InputError(f'{where}: expected a number, or {{"value": …, "low": …, "high": …}}, got {row!r:.60}')
    try:
        price = given(PRICES[key], **{name: float(part) for name, part in parts.items()})
    except (InputError, OverflowError):
        raise InputError(f"{where}: expected 0 <= low <= value <= high, got {row!r:.60}") from None
    if PRICES[key].unit == "share" and (price.high > 1 or (key == "utilisation" and price.low <= 0)):
        raise InputError(f"{where}: expected a share of at most 1, and a utilisation above 0, got {row!r:.60}")
    return price
