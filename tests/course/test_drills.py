"""Watching a store while a server is lost, and clients of servers that are far away."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from kvlab.course.drills import far_away, watch
from kvlab.stores import MemoryStore
from kvlab.testbed.server import RedisServer

VALUES = {b"a": b"1", b"b": b"2", b"c": b"3"}


class Losing(MemoryStore):
    """Misses key a from `lose` on, for some seconds."""

    def __init__(self, seconds: float, spoil: bytes = b"") -> None:
        super().__init__()
        self.put_many(list(VALUES), list(VALUES.values()))
        self.seconds, self.spoil, self.until = seconds, spoil, 0.0

    def lose(self) -> None:
        self.until = time.perf_counter() + self.seconds

    def get_many(self, keys: Sequence[bytes], out=None, reasons=None):  # type: ignore[no-untyped-def]
        got = super().get_many(keys, out, reasons)
        if time.perf_counter() < self.until:
            got[keys.index(b"a")] = None
            reasons[keys.index(b"a")] = "timeout"
        return [self.spoil if key == self.spoil else value for key, value in zip(keys, got, strict=True)]


def test_what_was_found_before_and_after_and_when_it_was_back() -> None:
    store = Losing(0.6)
    run = watch(store, VALUES, [b"a"], store.lose)
    assert (run["before"], run["after"] < 1, run["others"], run["wrong"]) == (1.0, True, 1.0, 0)
    assert 0.6 <= run["back_s"] < 10
    assert run["first"] == "timeout"
    assert run["quarters"]["-0.50"].keys() == {""}
    assert run["quarters"]["0.00"].keys() == {"timeout"}


def test_other_keys_that_were_never_at_risk_and_wrong_values_are_counted() -> None:
    store = Losing(0.3, spoil=b"c")
    run = watch(store, VALUES, [b"a"], store.lose)
    assert run["wrong"] > 1
    store = Losing(0.3)
    assert watch(store, VALUES, [b"b"], store.lose)["others"] == 0.5


def test_a_server_that_was_not_hurt_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlab.course.drills.GIVE_UP_S", 1.2)
    run = watch(Losing(0), VALUES, [b"a"], lambda: None)
    assert run["after"] == 1.0
    assert run["back_s"] > 1
    assert run["first"] == ""
    assert run["others"] != run["others"]  # there was no round to count


@pytest.mark.redis
def test_far_servers_answer_late_and_round_trips_are_counted() -> None:
    with RedisServer() as one, RedisServer() as other, far_away({"A": one, "B": other}, 0.05) as far:
        before, begin = far.round_trips(), time.perf_counter()
        assert far.clients["A"].set("x", 1)
        assert far.clients["B"].get("x") is None
        assert far.round_trips() - before == 2
        assert time.perf_counter() - begin >= 0.1
