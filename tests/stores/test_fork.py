"""The child of a fork: everything that registered is reset there, once, before the program goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from kvlab.cache import DistributedKVCache
from kvlab.stores import MemoryStore, RedisStore, WriteBehind
from kvlab.stores.breaker import Breaker
from kvlab.stores.fork import reset_in_children

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


class Counts:
    """Counts how often it was reset."""

    def __init__(self) -> None:
        self.resets = 0
        reset_in_children(self)

    def reset_after_fork(self) -> None:
        self.resets += 1


def in_child(good: Callable[[], bool]) -> bool:
    """What a forked child finds."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if good() else 1)
        except BaseException:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_registered_is_reset_in_the_child_alone() -> None:
    counts = Counts()
    assert in_child(lambda: counts.resets == 1) and counts.resets == 0


def test_a_child_of_a_child_is_reset_again() -> None:
    counts = Counts()
    assert in_child(lambda: in_child(lambda: counts.resets == 2) and counts.resets == 1)


def test_registering_keeps_nothing_alive() -> None:
    gone: list[str] = []

    class Watched(Counts):
        def __del__(self) -> None:
            gone.append("gone")

    made = Watched()
    del made
    assert gone == ["gone"]
    assert in_child(lambda: True)


@pytest.mark.parametrize(
    ("make", "lock"),
    [
        (Breaker, "_lock"),
        (MemoryStore, "_lock"),
        (RedisStore, "_lock"),
        (lambda: WriteBehind(MemoryStore()), "_lock"),
        (DistributedKVCache, "_lock"),
    ],
    ids=["breaker", "memory", "redis", "write behind", "cache"],
)
def test_a_lock_that_was_held_is_free_in_the_child(make: Callable[[], object], lock: str) -> None:
    made = make()
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with getattr(made, lock):
            held.set()
            go_on.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(30)
    free = in_child(lambda: getattr(made, lock).acquire(blocking=False))
    go_on.set()
    holder.join()
    assert free
