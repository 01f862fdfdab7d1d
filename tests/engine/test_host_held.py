"""Leases on blocks of the host tier: what they hold, for how long, and how much."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvlab.core.policies import POLICIES
from kvlab.engine.host import HostBlocks
from kvlab.errors import ConfigError
from tests.engine.test_host import BLOCK_BYTES, PARTS, block, held, key
from tests.harness.helpers import FakeClock


def room_for(blocks: int, clock: FakeClock, policy: str = "lru", max_held: float = 0.5) -> HostBlocks:
    return HostBlocks(PARTS, blocks * BLOCK_BYTES, policy, max_held=max_held, clock=clock)


def fill(host: HostBlocks, *numbers: int) -> None:
    for n in numbers:
        host.put(key(n), block(n))
        host.check_integrity()


def present(host: HostBlocks, *numbers: int) -> list[bool]:
    return [key(n) in host for n in numbers]


@pytest.mark.parametrize("policy", POLICIES)
def test_eviction_takes_all_others_until_the_lease_ends(policy: str) -> None:
    clock = FakeClock()
    host = room_for(6, clock, policy)
    fill(host, 1, 2, 3)
    assert host.hold([key(1), key(2)], 10, "me") == 2
    fill(host, *range(10, 40))
    assert present(host, 1, 2, 3) == [True, True, False] and len(host) == 6
    clock.now += 9.99
    fill(host, *range(40, 60))
    assert present(host, 1, 2) == [True, True]
    clock.now += 0.01
    fill(host, *range(60, 200))
    assert present(host, 1, 2) == [False, False] and host.held == 0


def test_a_released_block_can_leave_and_a_renewed_one_stays() -> None:
    clock = FakeClock()
    host = room_for(4, clock)
    fill(host, 1, 2)
    host.hold([key(1)], 10, "a")
    host.hold([key(2)], 10, "b")
    clock.now += 9
    assert host.hold([key(1)], 10, "a") == 1
    host.release("b")
    host.release("b")
    host.release("nobody")
    clock.now += 9
    fill(host, *range(10, 20))
    assert present(host, 1, 2) == [True, False]
    host.hold([key(1)], 1, "a")  # a renewal may be shorter
    clock.now += 1
    fill(host, *range(20, 30))
    assert present(host, 1) == [False]


def test_what_two_hold_is_held_until_the_last_ends_and_counts_once() -> None:
    clock = FakeClock()
    host = room_for(4, clock)
    fill(host, 1, 2)
    assert host.hold([key(1), key(2)], 10, "a") == host.hold([key(2), key(1)], 20, "b") == 2
    assert host.held == 2
    clock.now += 10
    fill(host, *range(10, 20))
    assert present(host, 1, 2) == [True, True]
    host.release("b")
    fill(host, *range(20, 30))
    assert present(host, 1, 2) == [False, False]


def test_no_more_than_the_share_is_held_from_the_front() -> None:
    host = room_for(7, FakeClock())
    fill(host, 1, 2, 3, 4, 5)
    assert host.hold([key(9), *map(key, (1, 2, 1, 3, 4, 5))], 10, "a") == 3  # 9 is not here
    assert host.hold([key(4)], 10, "b") == 0 and host.hold([key(3), key(4)], 10, "b") == 1
    fill(host, *range(10, 20))
    assert present(host, 1, 2, 3, 4) == [True, True, True, False]
    host.release("a")
    assert host.hold([key(19), key(18), key(17)], 10, "c") == 2  # b still has one
    assert room_for(1, FakeClock()).hold([key(1)], 10, "a") == 0


def test_a_block_that_a_lease_holds_is_not_forgotten_either() -> None:
    clock = FakeClock()
    host = room_for(4, clock)
    fill(host, 1, 2)
    host.hold([key(1)], 10, "a")
    for n in (1, 2):
        host.remove(key(n))
    assert present(host, 1, 2) == [True, False]
    clock.now += 10
    host.remove(key(1))
    assert present(host, 1) == [False]
    host.check_integrity()


def test_a_borrowed_block_may_be_held_too_and_each_is_needed() -> None:
    clock = FakeClock()
    host = room_for(4, clock)
    fill(host, 1)
    host.borrow(key(1))
    host.hold([key(1)], 10, "a")
    host.release("a")
    fill(host, *range(10, 20))
    assert present(host, 1) == [True]
    host.hold([key(1)], 10, "a")
    host.give_back([key(1)])
    fill(host, *range(20, 30))
    assert present(host, 1) == [True]


def test_closing_ends_all_leases() -> None:
    host = room_for(4, FakeClock())
    fill(host, 1, 2)
    host.hold([key(1)], 10, "a")
    host.close()
    assert len(host) == 0 and host.held == 0 and host.hold([key(1)], 10, "a") == 0
    host.check_integrity()


def test_leases_survive_an_exception_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    host = room_for(4, clock)
    fill(host, 1, 2)
    host.hold([key(1)], 10, "a")
    monkeypatch.setattr(host, "_view", lambda row: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        host.put(key(3), block(3))
    monkeypatch.undo()
    host.check_integrity()
    fill(host, *range(10, 20))
    assert present(host, 1) == [True]
    clock.now += 10
    fill(host, *range(20, 30))
    assert present(host, 1) == [False]


@pytest.mark.parametrize("share", [0, -0.1, 1.1, "half", True])
def test_a_share_that_is_none_is_an_error(share: Any) -> None:
    with pytest.raises(ConfigError, match="max_held"):
        room_for(4, FakeClock(), max_held=share)


class Held(RuleBasedStateMachine):
    """LRU with leases, against an account of its own: who is evicted, who must not be, and who need not be."""

    ROOM, MOST = 6, 3
    numbers = st.integers(0, 11)

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.host = room_for(self.ROOM, self.clock)
        self.order: OrderedDict[int, None] = OrderedDict()  # not held, oldest first
        self.leases: dict[str, tuple[float, list[int]]] = {}

    def held(self) -> set[int]:
        return {n for _, numbers in self.leases.values() for n in numbers}

    def end(self, *names: str) -> None:
        """A block whose last lease ends is the newest, in the order of its lease."""
        for name, (until, numbers) in [*self.leases.items()]:
            if name in names or until <= self.clock.now:
                del self.leases[name]
                self.order |= {n: None for n in numbers if n not in self.held()}

    @rule(n=numbers)
    def put(self, n: int) -> None:
        self.end()
        self.host.put(key(n), block(n))
        if n not in self.order and n not in self.held():
            if len(self.order) + len(self.held()) == self.ROOM:
                self.order.popitem(False)
            self.order[n] = None

    @rule(n=numbers)
    def use(self, n: int) -> None:
        assert held(self.host, n) == (n if n in self.order or n in self.held() else None)
        if n in self.order:  # `held` borrows it: another use
            self.order.move_to_end(n)

    @rule(numbers=st.lists(numbers, max_size=5), name=st.sampled_from("ab"), lease_s=st.integers(1, 5))
    def hold(self, numbers: list[int], name: str, lease_s: int) -> None:
        self.end(name)
        chosen: list[int] = []
        for n in dict.fromkeys(numbers):
            if n not in self.order and n not in self.held():
                continue
            if n not in self.held() | {*chosen} and len(self.held() | {*chosen}) == self.MOST:
                break
            chosen.append(n)
        assert self.host.hold(map(key, numbers), lease_s, name) == len(chosen)
        if chosen:
            self.leases[name] = self.clock.now + lease_s, chosen
        for n in chosen:
            self.order.pop(n, None)

    @rule(name=st.sampled_from("ab"))
    def release(self, name: str) -> None:
        self.end(name)
        self.host.release(name)

    @rule(seconds=st.integers(1, 3))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @invariant()
    def what_is_here_is_what_should_be(self) -> None:
        self.host.check_integrity()
        expected = {*self.order} | self.held()
        assert {*self.host.keys()} == {*map(key, expected)}


TestHeld = Held.TestCase
TestHeld.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
