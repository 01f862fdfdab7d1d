"""Shadow comparison: which differences count, how often it is chosen, and what it counts."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from kvlab.connectors.shadow import TOLERANCE, Shadow, different_elements
from kvlab.core import record
from kvlab.core.precisions import PRECISIONS
from kvlab.core.record import Format
from kvlab.errors import ConfigError
from tests.harness.helpers import KEY, encoded

NAN, INF = float("nan"), float("inf")


def count(stored: list[float], computed: list[float], tolerance: float = 0.1) -> int:
    return different_elements(torch.tensor([stored]), torch.tensor([computed]), tolerance)


def test_a_difference_is_measured_against_the_largest_of_its_row() -> None:
    assert count([10.0, 0.0], [10.0, 1.0]) == 0
    assert count([10.0, 0.0], [10.0, 1.01]) == 1
    assert count([-10.0, 0.0], [-10.0, 0.99]) == 0
    both = torch.tensor([[10.0, 0.0], [1.0, 0.0]])
    assert different_elements(both + torch.tensor([0.0, 0.5]), both, 0.1) == 1  # the same in a smaller row is too much


def test_rows_of_zeros_must_be_equal() -> None:
    assert count([0.0, -0.0], [0.0, 0.0]) == 0
    assert count([1e-30, 0.0], [0.0, 0.0]) == 1


def test_what_is_not_a_number_differs_from_everything() -> None:
    assert count([NAN, 1.0], [1.0, 1.0]) == 1
    assert count([1.0, 1.0], [NAN, 1.0]) == 1
    assert count([NAN, 1.0], [NAN, 1.0]) == 1
    assert count([INF, 1.0], [1.0, 1.0]) == 1


def test_an_infinite_number_does_not_forgive_its_row() -> None:
    assert count([1.0, 9.0], [INF, 1.0]) >= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_fp32(dtype: torch.dtype) -> None:
    big = torch.full((1, 4), 60000.0).to(dtype)
    assert different_elements(big, -big, 0.1) == 4 and different_elements(big, big.clone(), 0.0) == 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_to_a_precision_is_within_its_tolerance_and_other_kv_is_not(precision: str) -> None:
    kv = torch.randn(2, 2, 2, 64, 64, generator=torch.Generator().manual_seed(1))
    fmt = Format(precision)
    stored = record.decode(encoded(kv, fmt), KEY, fmt, tuple(kv.shape))
    assert different_elements(stored, kv, TOLERANCE[precision]) == 0
    assert different_elements(stored.roll(1, 3), kv, TOLERANCE[precision]) > 100  # the KV of the token before


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_wrong_number_is_found_and_logged(precision: str, caplog: pytest.LogCaptureFixture) -> None:
    kv = torch.randn(2, 2, 2, 64, 64, generator=torch.Generator().manual_seed(1))
    shadow, wrong = Shadow(1.0, precision), kv.clone()
    wrong[1, 0, 1, 3, 5] += 1.1 * TOLERANCE[precision] * kv[1, 0, 1, 3].abs().max()
    with caplog.at_level(logging.ERROR, "kvlab"):
        assert shadow.compare(kv.clone(), kv, "block 0") and not caplog.records
        assert not shadow.compare(wrong, kv, "block 7")
    assert (shadow.blocks, shadow.different) == (2, 1)
    assert "1 of 32768 numbers of block 7" in caplog.text


@pytest.mark.parametrize(("share", "low", "high"), [(0, 0, 0), (0.0, 0, 0), (0.25, 180, 320), (1, 1000, 1000)])
def test_the_share_is_the_share(share: float, low: int, high: int) -> None:
    shadow = Shadow(share, "fp32", seed=1)
    assert low <= sum(shadow.chooses() for _ in range(1000)) <= high


@pytest.mark.parametrize("share", [-0.1, 1.1, NAN, INF, "half", None, True])
def test_what_is_no_share_is_refused(share: object) -> None:
    with pytest.raises(ConfigError, match="shadow"):
        Shadow(share, "fp32")  # type: ignore[arg-type]


def test_threads_lose_no_count() -> None:
    shadow, kv = Shadow(1.0, "fp32"), torch.ones(1, 4)
    threads = [threading.Thread(target=lambda: [shadow.compare(kv, kv, "") for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (shadow.blocks, shadow.different) == (800, 0)
