"""What all stores share: values in pieces, checks of batches and settings, the sums of the counters."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from kvlab.errors import ConfigError, InputError
from kvlab.stores import StoreStats
from kvlab.stores.base import (
    MAX_TTL_S,
    check_buffers,
    check_clock,
    check_keys,
    check_number,
    check_pairs,
    check_ttl,
    check_values,
    deliver,
    joined,
    pieces,
)


def test_a_value_is_its_pieces_one_after_another() -> None:
    parts = (b"head", memoryview(b"-body"), b"")
    assert pieces(parts) is parts and joined(parts) == b"head-body"
    assert pieces(b"one") == (b"one",) and joined(b"one") == joined(memoryview(b"one")) == b"one"


@pytest.mark.parametrize(("size", "taken"), [(3, True), (9, True), (2, False), (0, False)])
def test_a_value_goes_to_the_start_of_its_buffer_or_nowhere(size: int, taken: bool) -> None:
    room = memoryview(bytearray(b"\xaa" * size))
    got = deliver(b"one", room)
    assert got == (b"one" if taken else None)
    assert bytes(room) == (b"one" + b"\xaa" * (size - 3) if taken else b"\xaa" * size)


def test_without_a_buffer_a_value_is_handed_over_as_it_is() -> None:
    value = b"one"
    assert deliver(value, None) is value


def test_batches_must_fit_each_other() -> None:
    check_pairs([b"a", b"b"], [b"1", b"2"], "value")
    check_pairs([], [], "value")
    with pytest.raises(InputError, match="one value per key, got 1 for 2 keys"):
        check_pairs([b"a", b"b"], [b"1"], "value")


@pytest.mark.parametrize(
    "key", ["text", 7, None, bytearray(b"a"), memoryview(b"a")], ids=lambda key: type(key).__name__
)
def test_keys_are_bytes_and_nothing_else(key: Any) -> None:
    with pytest.raises(InputError, match=f"keys as bytes, got {type(key).__name__}"):
        check_keys([b"a", key])


@pytest.mark.parametrize("keys", [None, 7, {b"a"}, {b"a": 1}, iter([b"a"])], ids=lambda b: type(b).__name__)
def test_a_batch_is_a_sequence(keys: Any) -> None:
    """Of a generator the first look would leave nothing: an empty batch, and no error."""
    for check in (check_keys, lambda batch: check_pairs([b"a"], batch, "value")):
        with pytest.raises(InputError, match=rf"expected .* list .*, got {type(keys).__name__}"):
            check(keys)


CONTIGUOUS = memoryview(b"abcdef")


@pytest.mark.parametrize("value", [b"one", bytearray(b"one"), CONTIGUOUS, (), (b"a", CONTIGUOUS, bytearray(2))])
def test_values_are_bytes_of_any_kind(value: Any) -> None:
    check_values([b"a"], [value])


@pytest.mark.parametrize(
    "value", ["text", 7, None, [b"a"], (b"a", "text"), (b"a", (b"b",)), CONTIGUOUS[::2], (b"a", CONTIGUOUS[::-1])]
)
def test_values_are_nothing_else(value: Any) -> None:
    with pytest.raises(InputError, match="values as bytes"):
        check_values([b"good", b"a"], [b"good", value])


@pytest.mark.parametrize(
    "out", [memoryview(b"read only"), memoryview(bytearray(9))[::2], bytearray(9), b"bytes", 7, None]
)
def test_buffers_are_views_that_can_be_written_from_end_to_end(out: Any) -> None:
    check_buffers([b"a"], [memoryview(bytearray(9))])
    check_buffers([b"a"], None)
    with pytest.raises(InputError, match="writable contiguous memoryviews"):
        check_buffers([b"good", b"a"], [memoryview(bytearray(9)), out])


def test_a_clock_can_be_asked() -> None:
    check_clock(lambda: 0.0)
    for wrong in (0.0, None, "now", True):
        with pytest.raises(ConfigError, match=rf"clock as a function .* got {type(wrong).__name__}"):
            check_clock(wrong)


@pytest.mark.parametrize("value", [0.001, 1, 2.5, 10])
def test_numbers_within_their_bounds_are_taken(value: float) -> None:
    check_number("n", value, 0, 10)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        *[(0, "0"), (-1, "-1"), (10.1, "10.1"), (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")],
        *[(10**400, "a number of 1329 bits"), (True, "True"), (False, "False")],
        *[("5", "str"), (None, "NoneType"), (b"5", "bytes"), ([5], "list"), (5j, "complex")],
    ],
    ids=lambda v: repr(v)[:12],
)
@pytest.mark.parametrize("whole", [False, True])
def test_anything_else_is_refused_by_name(value: Any, got: str, whole: bool) -> None:
    with pytest.raises(ConfigError, match=r"expected the size as a .* above 0 and at most 10 bytes, got") as refused:
        check_number("the size", value, 0, 10, "bytes", whole)
    assert f"got {got}" in str(refused.value) and len(str(refused.value)) < 200


def test_a_number_too_long_to_print_is_refused_too() -> None:
    with pytest.raises(ConfigError, match="got a number of 16610 bits"):
        check_number("n", -(10**5000), 0, 10)


def test_a_whole_number_is_no_fraction() -> None:
    check_number("n", 2, 0, 10, whole=True)
    for value in (2.5, 2.0):
        with pytest.raises(ConfigError, match="whole number"):
            check_number("n", value, 0, 10, whole=True)


def test_a_ttl_is_a_time_or_none() -> None:
    for ttl_s in (None, 0.001, 1, MAX_TTL_S):
        check_ttl(ttl_s)
    for wrong in (0, -1, math.nan, math.inf, MAX_TTL_S + 1, True, "60"):
        with pytest.raises(ConfigError, match="None for no expiry"):
            check_ttl(wrong)  # type: ignore[arg-type]


def test_both_sum_rules_are_checked() -> None:
    StoreStats(requested=3, hits=1, misses=Counter(absent=2), offered=2, stored=1, drops=Counter(oom=1)).check()
    for wrong in (StoreStats(requested=1), StoreStats(hits=1), StoreStats(offered=1), StoreStats(drops=Counter(x=1))):
        with pytest.raises(AssertionError):
            wrong.check()
