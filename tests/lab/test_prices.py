"""Prices: each says what it is and where it is from, and its band is one."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from kvlab.errors import InputError
from kvlab.lab.prices import CROSS_ZONE, GIVEN, GPU, MANAGED, PRICES, RAM, RATES, Price, corners, interval, read_prices

ALL = [*PRICES.values(), *(price for rates in RATES.values() for price in (rates.input, rates.cached, rates.write))]
every_price = pytest.mark.parametrize("price", ALL, ids=lambda price: price.name)


@every_price
def test_every_price_says_all_of_itself(price: Price) -> None:
    assert all(getattr(price, part.name) != "" for part in fields(price))
    assert "202" in price.date


@every_price
def test_what_is_assumed_has_a_wide_band(price: Price) -> None:
    if "assumed" in price.source and price is not RAM:  # of which only the share of the RAM is assumed
        assert price.high >= 3 * price.low


def test_prices_worked_out_by_hand() -> None:
    """$0.504 an hour / 64 GiB is $5.75 a GiB-month, of which 65 % hold values; $0.437 for 19.7 GiB is $16.19."""
    assert round(RAM.value, 2) == 8.84
    assert round(MANAGED.value, 2) == 16.19
    assert round(MANAGED.high, 2) == 91.25
    assert (GPU.low, round(GPU.value, 3), GPU.high) == (3.99, 5.435, 6.88)
    assert CROSS_ZONE.low == 0, "in the same zone"


def test_cached_input_costs_less_and_no_write_less_than_input() -> None:
    shares = {name: rates.cached.value / rates.input.value for name, rates in RATES.items()}
    assert shares == pytest.approx(dict.fromkeys(RATES, 0.05) | {"deepseek": 0.02})
    writes = {name: rates.write.value / rates.input.value for name, rates in RATES.items()}
    assert writes == {"openai": 1.25, "anthropic": 1.25, "anthropic_1h": 2.0, "google": 1.0, "deepseek": 1.0}


@pytest.mark.parametrize("wrong", [{"low": 9.0}, {"high": 1.0}, {"low": -1.0}, {"high": float("inf")}])
def test_a_band_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected 0 <= low <= value <= high, got"):
        replace(GPU, **wrong)


def test_corners_begin_with_the_middle_and_have_all_ends() -> None:
    one, two = replace(GPU, value=2, low=1, high=3), replace(GPU, value=5, low=5, high=7)
    assert corners(one, two) == [(2, 5), (1, 5), (1, 7), (3, 5), (3, 7)]
    assert interval(lambda a, b: b / a, one, two) == (5 / 3, 2.5, 7)


def test_times_scales_the_whole_band() -> None:
    assert [getattr(GPU.times(2), part) for part in ("low", "value", "high")] == [2 * 3.99, 2 * GPU.value, 2 * 6.88]


def test_own_prices_take_the_place_of_ours(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"gpu": 2.5, "ram": {"value": 4, "high": 5}}', "utf-8")
    told = read_prices(tmp_path / "p.json")
    assert [*told] == ["gpu", "ram"]
    assert (told["gpu"].low, told["gpu"].value, told["gpu"].high) == (2.5,) * 3
    assert (told["ram"].low, told["ram"].value, told["ram"].high) == (4, 4, 5)
    assert told["gpu"].unit == GPU.unit and {told["gpu"].source, told["ram"].date} == {GIVEN}
    with pytest.raises(InputError, match="expected only gpu, got 'ram'"):
        read_prices(tmp_path / "p.json", ["gpu"])
