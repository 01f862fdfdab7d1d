"""A difference is shown at its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvlab.course.exercises.differences import differences, same, short

T = torch.arange(24.0).reshape(2, 3, 4)


def changed(at: tuple[int, ...], value: float) -> torch.Tensor:
    tensor = T.clone()
    tensor[at] = value
    return tensor


@pytest.mark.parametrize(
    ("got", "expected", "said"),
    [
        (changed((1, 2, 3), 99.0), T, ["got      99 at [1, 2, 3], the worst of 1 wrong places of 24", "expected 23"]),
        (T[:1], T, ["got      shape (1, 3, 4)", "expected shape (2, 3, 4)"]),
        (3.0, T, ["got      3.0 (float)", "expected shape (2, 3, 4)"]),
        (
            changed((0, 1, 2), float("nan")),
            T,
            ["got      NaN in 1 of 24 places, the first at [0, 1, 2]", "expected 6"],
        ),
        (b"\0bcdef", b"\0bXdef", ["got      63 64 65 66 at index 2", "expected 58 64 65 66"]),
        (b"\0b", b"\0bc", ["got      nothing at index 2", "expected 63", "length   2 long, expected 3"]),
        ([1, 2, 3], [1, 5, 3], ["got      2 at index 1", "expected 5"]),
        ([bytes(32)], [bytes([1] * 32)], ["got      32 bytes: 00 00 00 00 00 00 00 00 … 00 00 00 00"]),
        ((1, 2), [1, 2], ["got      (1, 2) (tuple)", "expected [1, 2]"]),
        ("-" * 30 + "c", "-" * 30 + "d", ["got      'c' at index 30", "expected 'd'"]),
        (None, 4, ["got      None (NoneType)", "expected 4"]),
        ([], [], ["got      []", "expected []"]),
        ({"a": 1, "b": 2.5}, {"a": 1, "b": 3.5}, ["got      2.5 under 'b'", "expected 3.5"]),
        ({"a": 1}, {"b": 1}, ["got      {'a': 1}", "expected {'b': 1}"]),
    ],
    ids=str,
)
def test_differences(got: Any, expected: Any, said: list[str]) -> None:
    lines = differences(got, expected)
    assert lines[: len(said)] == said
    assert all(len(line) < 110 for line in lines)


def test_same_allows_for_the_order_of_sums() -> None:
    assert same(0.1 + 0.2, 0.3) and same(T + 1e-6, T) and same([1], [1])
    assert same(changed((0, 1, 2), float("nan")), changed((0, 1, 2), float("nan"))) and not same(T * float("nan"), T)
    assert not same(T[0], T) and not same("x", 1.0) and not same(1.001, 1.0) and not same(None, T)


def test_same_looks_into_lists_tuples_and_dicts() -> None:
    third = 1 / 3
    for inside in (lambda x: [1, x], lambda x: (x, "a"), lambda x: {"a": x, "b": [2]}, lambda x: [{"a": (x,)}]):
        assert same(inside(third + 1e-9), inside(third)) and not same(inside(0.34), inside(third))
    assert not same([1.0], (1.0,)) and not same([1.0], [1.0, 2.0]) and not same({"a": 1.0}, {"b": 1.0})
    assert same([T, None], [T, None]) and not same([T], [T + 1])


def test_short_fits_a_line() -> None:
    for value in (T, bytes(500), [bytes(32)] * 9, "x" * 500, list(range(500)), {"a": "b\n" * 90}):
        assert len(short(value)) <= 130 and "\n" not in short(value)


@pytest.mark.parametrize(("got", "expected"), [("length", "ok"), (b"abcABC", b"aAbBcC"), ("", "ok"), (b"", b"ab")])
def test_short_texts_are_shown_whole(got: object, expected: object) -> None:
    assert differences(got, expected) == [f"got      {got!r}", f"expected {expected!r}"]
