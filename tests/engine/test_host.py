"""The host tier against a second account of its contents."""

from __future__ import annotations

import itertools
import random
import sys
from typing import Any

import numpy as np
import pytest

from kvlab.core.policies import POLICIES
from kvlab.core.precisions import Array, layout
from kvlab.engine.host import HostBlocks
from kvlab.errors import ConfigError

SHAPE = (2, 2, 1, 16, 4)
PARTS = layout("fp32", SHAPE, 1)
BLOCK_BYTES = 2 * 2 * 16 * 4 * 4


def block(number: int) -> list[Array]:
    return [np.full(SHAPE, number, np.uint32)]


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def number_in(parts: list[Array] | None) -> int | None:
    """What `block` was given, if all of it is there."""
    if parts is None:
        return None
    (whole,) = parts
    assert (whole == whole.flat[0]).all()
    return int(whole.flat[0])


def room_for(blocks: int, policy: str = "lru") -> HostBlocks:
    return HostBlocks(PARTS, blocks * BLOCK_BYTES, policy)


def held(host: HostBlocks, number: int) -> int | None:
    got = number_in(host.borrow(key(number)))
    if got is not None:
        host.give_back([key(number)])
    return got


@pytest.mark.parametrize("policy", POLICIES)
def test_many_operations_against_a_second_account(policy: str) -> None:
    """A block that is found is the one that was put; a borrowed or dirty one is never lost."""
    host, rng = room_for(6, policy), random.Random(1)
    borrowed: dict[int, list[Array]] = {}
    dirty: set[int] = set()
    most = 0
    for _ in range(20_000):
        n = rng.randrange(20)
        match rng.randrange(7):
            case 0 | 1:
                is_dirty = rng.random() < 0.3
                displaced = host.put(key(n), block(n), is_dirty)
                spilled = [(int.from_bytes(k, "little"), number_in(parts)) for k, parts in displaced]
                assert all(a == b for a, b in spilled)
                dirty |= {n} if is_dirty else set()
                dirty -= {a for a, _ in spilled}
            case 2:
                parts = host.borrow(key(n)) if n not in borrowed else None
                assert (parts is not None) == (key(n) in host and n not in borrowed)
                if parts is not None:
                    borrowed[n] = parts
            case 3 if borrowed:
                n = rng.choice([*borrowed])
                assert number_in(borrowed.pop(n)) == n
                host.give_back([key(n)])
            case 4:
                host.remove(key(n))
                assert (key(n) in host) <= (n in borrowed or n in dirty)
            case 5:
                host.use([key(n)])
            case 6 if rng.random() < 0.05:
                copies = host.copies(host.dirty())
                assert {number_in(parts) for _, parts in copies} == dirty
                host.clean(host.dirty())
                dirty = set()
        assert all(key(n) in host for n in [*borrowed, *dirty])
        host.check_integrity()
        most = max(most, len(host))
    assert most == 6


def test_a_block_that_is_copied_only_halfway_is_not_found() -> None:
    host = room_for(2)
    with pytest.raises(ValueError):
        host.put(key(1), [np.zeros((3, 3), np.uint32)])
    assert key(1) not in host
    host.check_integrity()
    host.put(key(1), block(1))
    assert held(host, 1) == 1


def test_when_all_is_borrowed_a_block_is_left_out_and_a_dirty_one_handed_back() -> None:
    host = room_for(1)
    host.put(key(1), block(1))
    host.borrow(key(1))
    assert host.put(key(2), block(2)) == []
    ((back, parts),) = host.put(key(3), block(3), dirty=True)
    assert (back, number_in(parts), key(2) in host, key(3) in host) == (key(3), 3, False, False)
    host.give_back([key(1)])
    host.put(key(2), block(2))
    assert held(host, 2) == 2


def test_a_tier_of_size_zero_holds_nothing() -> None:
    host = room_for(0)
    assert host.put(key(1), block(1)) == [] and len(host.put(key(1), block(1), dirty=True)) == 1
    assert held(host, 1) is None and host.capacity == 0
    host.use([key(1)])
    host.remove(key(1))
    host.check_integrity()


@pytest.mark.parametrize(
    ("max_bytes", "said"),
    [
        (-1, "1,024"),
        (BLOCK_BYTES - 1, "one block"),
        (1 << 60, "this machine"),
        (1 << 80, "got 1208925819614629174706176"),
        (1.5, "got 1.5"),
    ],
)
def test_memory_that_holds_no_block_or_is_refused_is_a_clear_error(max_bytes: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        HostBlocks(PARTS, max_bytes)


def test_an_unknown_policy_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="policies"):
        room_for(2, "best")


@pytest.mark.parametrize("sabotage", ["lost row", "row twice", "policy", "dirty"])
def test_a_broken_account_is_noticed(sabotage: str) -> None:
    host = room_for(3)
    for n in (1, 2):
        host.put(key(n), block(n), dirty=True)
    host.check_integrity()
    if sabotage == "lost row":
        host._free.pop()
    elif sabotage == "row twice":
        host._row_of[key(1)] = host._row_of[key(2)]
    elif sabotage == "policy":
        host._policy.remove(key(1))
    else:
        host._dirty[key(9)] = None
    with pytest.raises(AssertionError):
        host.check_integrity()


def test_whatever_is_raised_in_the_middle_of_a_call_leaves_a_right_account() -> None:
    """A trace function raises before the n-th line of the module, as a signal handler may."""
    for n in range(1, 200):
        host = room_for(3)
        for number in range(3):
            host.put(key(number), block(number), dirty=number == 1)
        lines = itertools.count()

        def interrupt(frame: Any, event: str, _: Any, lines: Any = lines, n: int = n) -> Any:
            if not frame.f_code.co_filename.endswith("host.py") or frame.f_code.co_name == "_repaired":
                return None
            if event == "line" and next(lines) == n:
                raise KeyboardInterrupt
            return interrupt

        sys.settrace(interrupt)
        try:
            for number in (3, 0, 4):
                host.put(key(number), block(number), dirty=True)
                host.borrow(key(number))
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        host.check_integrity()
        assert all(held(host, number) in (None, number) for number in range(5))
        host.put(key(9), block(9))
        host.check_integrity()
