"""Lives of single values, and leases: what every store of the package does whose entries have a TTL."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kvlab.errors import ConfigError
from kvlab.stores import FileStore
from tests.contracts.conftest import StoreKind
from tests.contracts.test_store_ttl import Aging, aging

__all__ = ["aging"]  # a fixture


def test_a_value_can_live_shorter_or_longer_than_the_store_says(aging: Aging) -> None:
    store = aging.store
    for key, ttl_s in ((b"short", 30), (b"plain", None), (b"long", 300)):
        assert store.put_many([key], [key], ttl_s) == 1
    for age, alive in ((20, [True, True, True]), (20, [False, True, True]), (70, [False, False, True])):
        aging.age(age)
        assert [store.probe([key]) == 1 for key in (b"short", b"plain", b"long")] == alive
    aging.age(180)
    assert store.probe([b"long"]) == 1  # 290 of 300
    aging.age(20)
    assert store.get_many([b"long"]) == [None]


def test_a_use_never_shortens_a_life_and_keeps_for_at_least_the_ttl_of_the_store(aging: Aging) -> None:
    store = aging.store
    for use in (lambda key: store.get_many([key]), lambda key: store.touch_many([key])):
        assert store.put_many([b"short"], [b"s"], 30) == store.put_many([b"long"], [b"l"], 300) == 1
        for key in (b"short", b"long"):
            use(key)
        aging.age(90)
        assert [store.probe([b"short"]), store.probe([b"long"])] == [1, 1]
        aging.age(190)
        assert [store.probe([b"short"]), store.probe([b"long"])] == [0, 1]
        assert store.delete_many([b"long"]) == 1


def test_a_touch_names_the_least_life_and_the_longest_counts(aging: Aging) -> None:
    store = aging.store
    store.put_many([b"a"], [b"a"], 50)
    assert store.touch_many([b"x", b"a"], 200) == [False, True]
    assert store.touch_many([b"a"], 10) == [True]  # shorter than what is left: nothing changes, but it is there
    aging.age(190)
    assert store.probe([b"a"]) == 1
    aging.age(20)
    assert store.touch_many([b"a"], 100) == [False] and store.probe([b"a"]) == 0


def test_values_of_one_batch_and_of_different_ttls_stay_apart(aging: Aging) -> None:
    store = aging.store
    for number, ttl_s in enumerate((20, 200, None, 20)):
        store.put_many([b"%d %d" % (number, i) for i in range(3)], [b"v"] * 3, ttl_s)
    aging.age(50)
    assert [store.probe([b"%d %d" % (number, i) for i in range(3)]) for number in range(4)] == [0, 3, 3, 0]


@pytest.mark.parametrize("ttl_s", [0, -1, math.nan, True, "60", 1e12])
def test_what_is_no_ttl_is_an_error_and_stores_nothing(aging: Aging, ttl_s: Any) -> None:
    with pytest.raises(ConfigError, match="TTL"):
        aging.store.put_many([b"a"], [b"a"], ttl_s)
    with pytest.raises(ConfigError, match="TTL"):
        aging.store.touch_many([b"a"], ttl_s)
    assert aging.store.probe([b"a"]) == 0


def test_a_store_without_a_ttl_takes_no_value_with_one(
    own_store_kind: StoreKind, request: pytest.FixtureRequest
) -> None:
    with own_store_kind.store(request) as store:
        with pytest.raises(ConfigError, match="a store with a TTL of its own"):
            store.put_many([b"a"], [b"a"], 60)
        store.put_many([b"a"], [b"a"])
        assert store.touch_many([b"a"], 60) == [True]  # it lives longer than that anyway
        assert store.hold_many([b"a", b"x"], 60, "me")[0] == 1
        store.release("me")


# --- leases -------------------------------------------------------------------------------------
def test_what_is_kept_by_a_lease_lives_until_it_ends(aging: Aging) -> None:
    store = aging.store
    store.put_many([b"a", b"b", b"c"], [b"1"] * 3)
    kept, held = store.hold_many([b"a", b"x", b"b"], 500, "me")
    assert (kept, held) == (2, isinstance(store, FileStore))
    aging.age(400)
    assert [store.probe([key]) for key in (b"a", b"b", b"c")] == [1, 1, 0]
    aging.age(101)
    assert [store.probe([key]) for key in (b"a", b"b")] == [0, 0]


def test_a_release_leaves_the_values(aging: Aging) -> None:
    store = aging.store
    store.put_many([b"a"], [b"1"])
    store.hold_many([b"a"], 50, "me")
    for _ in range(2):
        store.release("me")
    assert store.get_many([b"a"]) == [b"1"]
