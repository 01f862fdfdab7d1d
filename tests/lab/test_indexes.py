"""What a router knows: at once, from what it sent, and from events that are late, lost and repeated."""

from __future__ import annotations

import pytest

from kvlab.engine.router import EXPECT_S
from kvlab.lab.indexes import INDEXES, Events, Exact, Faults, Index, Naive, Sent

HAS_ALL = range(1000)


def matched(index: Index, now: float, *keys: int) -> int:
    """How many leading blocks node 1 is said to have."""
    return index.matched(now, keys)[1]


def test_an_exact_index_knows_what_a_node_has_and_will_have() -> None:
    index = Exact()
    index.sent(0.0, 1, [1, 2, 3], {1, 2, 3}, [])
    assert matched(index, 0.0, 1, 2, 3, 4) == 3 and index.matched(0.0, [1])[0] == 0
    index.sent(1.0, 1, [4], {1, 4}, [2, 3])
    assert matched(index, 1.0, 1, 2) == 1 and matched(index, 1.0, 4) == 1


def test_an_index_of_what_was_sent_forgets_the_oldest() -> None:
    index = Sent(room=3)
    index.sent(0.0, 1, [1, 2, 3], HAS_ALL, [])
    index.sent(1.0, 1, [1, 4], (), [])
    assert [matched(index, 9.0, key) for key in (1, 2, 3, 4)] == [1, 0, 1, 1]


@pytest.mark.parametrize("kind", [Events, Naive])
def test_events_take_their_time(kind: type[Events]) -> None:
    index = kind(Faults(lag_s=2.0))
    index.changed(1.0, 1, [1, 2], [])
    assert (matched(index, 2.9, 1, 2), matched(index, 3.0, 1, 2)) == (0, 2)
    index.changed(4.0, 1, [3], [2])
    assert (matched(index, 5.9, 1, 2), matched(index, 6.0, 1, 2)) == (2, 1) and matched(index, 6.0, 3) == 1


def test_blocks_that_were_just_sent_are_expected_for_a_while() -> None:
    index = Events()
    index.sent(10.0, 1, [1, 2], HAS_ALL, [])
    assert matched(index, 10.0 + EXPECT_S - 0.01, 1, 2) == 0, "not before it has looked at the time"
    index.matched(10.0, [])
    index.sent(10.0, 1, [1, 2], HAS_ALL, [])
    assert matched(index, 10.0 + EXPECT_S - 0.01, 1, 2) == 2
    assert matched(index, 10.0 + EXPECT_S + 0.01, 1, 2) == 0


def test_after_a_lost_event_a_snapshot_comes() -> None:
    index = Events(Faults(lag_s=1.0, lost=1.0))
    index.changed(0.0, 1, [1], [])
    index._faults = Faults(lag_s=1.0)
    index.changed(0.5, 1, [2], [1])
    assert matched(index, 1.5, 2) == 0, "the second event is known, and that the first is missing"
    assert (matched(index, 3.4, 2), matched(index, 3.5, 2), matched(index, 3.5, 1)) == (0, 1, 0)


def test_a_late_repeat_brings_removed_blocks_back_to_a_naive_index_only() -> None:
    for kind, back in ((Naive, 1), (Events, 0)):
        index = kind(Faults(repeated=1.0, late_s=50.0))
        index.changed(0.0, 1, [1], [])
        index._faults = Faults()
        index.changed(1.0, 1, [], [1])
        assert matched(index, 49.0, 1) == 0
        assert matched(index, 50.0, 1) == back


def test_a_share_of_the_events_is_lost_or_repeated_the_same_for_each_seed() -> None:
    def arrivals(seed: int) -> list[int]:
        index = Events(Faults(lost=0.1, repeated=0.2), seed)
        return [len(index._arrivals(0.0)) for _ in range(2000)]

    counts = [arrivals(0).count(n) / 2000 for n in range(3)]
    assert counts == pytest.approx([0.08, 0.74, 0.18], abs=0.03)
    assert arrivals(0) == arrivals(0) != arrivals(1)


def test_every_index_by_name_begins_empty() -> None:
    for make in INDEXES.values():
        index = make()
        assert index.matched(0.0, [1, 2]).total() == 0
