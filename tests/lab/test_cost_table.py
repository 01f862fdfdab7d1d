"""The table of costs: complete, finite where JSON needs it, and in agreement with what it is computed from."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvlab.lab import cost_table
from kvlab.lab.cost import Load, Tier, h100, roi
from kvlab.lab.costs import LLAMA_8B


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return cost_table.run()


def test_each_row_is_what_the_function_says(table: dict[str, Any]) -> None:
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert len(table["rows"]) == len(table["larger_model"]) == 4 * len(cost_table.REQUESTS)
    row = next(row for row in table["rows"] if row["workload"] == "chat")
    load = Load(row["requests_per_month"], row["prompt"], row["new"], row["hit_rate"])
    bill = roi(load, h100(LLAMA_8B), Tier(64)).fractional
    assert row["saving_usd"] == [*bill.saving_usd] and row["saved_usd_per_month"] == bill.saving_usd[1]


def test_prompts_that_share_nothing_save_nothing_at_any_load(table: dict[str, Any]) -> None:
    unique = [row for row in table["rows"] if row["workload"] == "unique"]
    assert all(row["hit_rate"] == 0 and row["saving_usd"][2] < 0 for row in unique)
    assert {row["break_even_months"] for row in unique} == {None}


def test_more_requests_never_save_less(table: dict[str, Any]) -> None:
    for kind in {row["workload"] for row in table["rows"]}:
        saved = [row["saved_usd_per_month"] for row in table["rows"] if row["workload"] == kind]
        assert saved == sorted(saved)


def test_bands_have_their_middle_between_their_ends(table: dict[str, Any]) -> None:
    for row in table["keep"]:
        assert row["low_s"] < row["seconds"] < row["high_s"] and row["managed_s"] < row["seconds"]
    for row in table["prompt_needed"]:
        needed = [row[name] or float("inf") for name in ("best", "middle", "worst")]
        assert needed == sorted(needed)
    for row in table["discounts"]:
        rates = [value for name, value in row.items() if name.startswith("hit_rate")]
        assert rates == sorted(rates) and rates[0] <= 0
