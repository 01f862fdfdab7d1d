"""Routers, the index of who has what against a second account, and the balance of work."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest

from kvlab.engine.router import EXPECT_S, HALF_LIFE, LOAD, ROUTERS, SHARE, Balance, BlockIndex, Candidate
from kvlab.errors import InputError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def keys(text: str) -> list[bytes]:
    """A block for each letter."""
    return [letter.encode() for letter in text]


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_needs_a_worker(name: str) -> None:
    with pytest.raises(InputError, match="at least one worker"):
        ROUTERS[name](4, [], 0)


@pytest.mark.parametrize("name", ROUTERS)
def test_equal_workers_are_chosen_in_order_one_after_the_other(name: str) -> None:
    equal = [Candidate(worker) for worker in (7, 3, 5)]
    assert [ROUTERS[name](4, equal, routed) for routed in range(5)] == [7, 3, 5, 7, 3]


@pytest.mark.parametrize("routed", range(3))
def test_each_router_looks_at_its_numbers(routed: int) -> None:
    workers = [Candidate(7, matched=3, load=4), Candidate(3, matched=1, load=1), Candidate(5, load=3)]
    expected = {"round_robin": workers[routed].worker, "least_loaded": 3, "longest_prefix": 7, "cost": 7}
    assert {name: route(4, workers, routed) for name, route in ROUTERS.items()} == expected


@pytest.mark.parametrize("routed", range(2))
def test_of_equal_workers_the_one_with_less_load_comes_first(routed: int) -> None:
    assert ROUTERS["longest_prefix"](4, [Candidate(7, 2, load=2), Candidate(3, 2, load=1, share=99)], routed) == 3
    assert ROUTERS["cost"](4, [Candidate(7, 2, load=SHARE), Candidate(3, 2, share=LOAD)], routed) == 3, "equal cost"


def test_cost_leaves_a_worker_when_its_load_or_share_outweighs_its_blocks() -> None:
    for what, weight in (("load", LOAD), ("share", SHARE)):
        for amount, chosen in ((0.99 * 8 / weight, 0), (1.01 * 8 / weight, 1)):
            workers = [Candidate(0, 8, **{what: amount}), Candidate(1)]
            assert [ROUTERS["cost"](9, workers, routed) for routed in range(2)] == [chosen] * 2


def cluster(name: str, prompts: list[list[bytes]], workers: int, room: int) -> tuple[float, list[int]]:
    """Route prompts to workers with LRU pools; each ends at once. Return the hit rate and the blocks each computed."""
    pools: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(workers)]
    index, balance = BlockIndex(Clock()), Balance(range(workers))
    computed, seqs = [0] * workers, [0] * workers
    for routed, prompt in enumerate(prompts):
        matched = index.matched(prompt)
        worker = ROUTERS[name](len(prompt), balance.candidates(matched), routed)
        pool, before = pools[worker], set(pools[worker])
        balance.give(worker, routed, len(prompt) - matched[worker])
        computed[worker] += len(prompt) - matched[worker]
        for key in prompt:
            pool[key] = None
            pool.move_to_end(key)
        while len(pool) > room:
            pool.popitem(last=False)
        seqs[worker] += 1
        assert index.apply(worker, seqs[worker], pool.keys() - before, before - pool.keys())
        balance.report(routed, 0)
    return 1 - sum(computed) / sum(map(len, prompts)), computed


def skewed(count: int, common: bool) -> Iterator[list[bytes]]:
    """Prompts of 16 groups with Zipf popularity: a long prefix of the group, and four own blocks."""
    rng = random.Random(3)
    for n, group in enumerate(rng.choices(range(16), [1 / (g + 1) for g in range(16)], k=count)):
        shared = [f"group {group} block {i}".encode() for i in range(32)]
        yield [b"the system prompt"] * common + shared + [f"own {n} block {i}".encode() for i in range(4)]


def test_cost_shares_work_and_hits_like_one_worker_with_all_the_memory() -> None:
    prompts, room = list(skewed(600, common=False)), 8 * 32 + 16
    one, _ = cluster("cost", prompts, 1, 2 * room)
    hits, computed = cluster("cost", prompts, 2, room)
    spread, _ = cluster("round_robin", prompts, 2, room)
    assert 0.95 * one < hits and max(computed) < 1.05 * sum(computed) / 2
    assert spread < 0.8 * one


def test_longest_prefix_sends_everything_to_one_worker_if_all_prompts_begin_alike() -> None:
    prompts, room = list(skewed(600, common=True)), 8 * 32 + 16
    crowded, computed = cluster("longest_prefix", prompts, 2, room)
    assert computed[1] == 0
    hits, computed = cluster("cost", prompts, 2, room)
    assert hits > crowded + 0.1 and max(computed) < 1.05 * sum(computed) / 2


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def index(clock: Clock) -> Iterator[BlockIndex]:
    index = BlockIndex(clock)
    yield index
    index.check_integrity()


def test_leading_blocks_count_up_to_the_first_that_is_missing(index: BlockIndex) -> None:
    assert index.apply(1, 1, keys("abd"), []) and index.apply(2, 1, keys("bc"), [])
    assert index.matched(keys("abcd")) == {1: 2, 2: 0} and index.matched(keys("bcd")) == {1: 1, 2: 2}
    assert index.matched(keys("abcd"))[3] == 0, "a worker that nobody heard of"
    assert index.matched([]) == {1: 0, 2: 0}


def test_a_late_repeat_brings_no_removed_block_back(index: BlockIndex) -> None:
    assert index.apply(1, 1, keys("ab"), []) and index.apply(1, 2, [], keys("b"))
    assert index.apply(1, 1, keys("ab"), []), "nothing is missing"
    assert index.matched(keys("ab")) == {1: 1}
    assert index.apply(1, 3, keys("a"), keys("a")), "evicted, then computed again"
    assert index.matched(keys("ab")) == {1: 1}


def test_after_a_gap_events_wait_for_a_snapshot_and_what_is_known_stays_in_use(index: BlockIndex) -> None:
    assert index.apply(1, 1, keys("ab"), [])
    assert not index.apply(1, 3, keys("c"), []) and not index.apply(1, 4, [], keys("a"))
    assert not index.apply(1, 1, [], []), "an old event does not mend a gap"
    assert index.matched(keys("abc")) == {1: 2}
    assert index.reset(1, 4, keys("bc")) and index.matched(keys("bca")) == {1: 2}
    assert index.apply(1, 5, keys("a"), []) and index.matched(keys("bca")) == {1: 3}


def test_missing_events_that_are_sent_again_in_order_are_as_good_as_a_snapshot(index: BlockIndex) -> None:
    assert not index.apply(1, 2, keys("b"), []), "the first one is missing"
    assert not index.apply(1, 1, keys("a"), []), "number 2 was not used"
    assert index.apply(1, 2, keys("b"), []) and index.matched(keys("ab")) == {1: 2}


def test_an_old_snapshot_is_ignored_and_an_early_one_is_not_all(index: BlockIndex) -> None:
    assert index.apply(1, 1, keys("ab"), []) and index.apply(1, 2, [], keys("b"))
    assert index.reset(1, 1, keys("ab")) and index.matched(keys("ab")) == {1: 1}
    assert not index.apply(1, 5, keys("x"), [])
    assert not index.reset(1, 3, keys("abc")), "4 and 5 came after it"
    assert index.matched(keys("abc")) == {1: 3}
    assert index.reset(1, 6, []) and index.matched(keys("abc")) == {1: 0}
    assert index.reset(1, 6, keys("a")) and index.matched(keys("a")) == {1: 1}, "a repair"


def test_expected_blocks_count_for_a_while(index: BlockIndex, clock: Clock) -> None:
    assert index.apply(1, 1, keys("a"), [])
    index.expect(1, keys("abc"))
    index.expect(2, keys("a"))
    clock.now += EXPECT_S - 0.5
    assert index.matched(keys("abc")) == {1: 3, 2: 1}
    index.expect(1, keys("ab"))  # once more: b has longer
    clock.now += 0.5
    assert index.matched(keys("abc")) == {1: 2, 2: 0}


def test_news_of_an_expected_block_ends_the_expectation(index: BlockIndex, clock: Clock) -> None:
    index.expect(1, keys("abc"))
    index.expect(2, keys("ab"))
    assert index.apply(1, 1, keys("ab"), []) and index.apply(1, 2, [], keys("bc")) and index.reset(2, 1, keys("a"))
    assert index.matched(keys("ab")) == {1: 1, 2: 2} and index.matched(keys("c"))[1] == 0
    index.check_integrity()
    clock.now += EXPECT_S
    assert index.matched(keys("ab")) == {1: 1, 2: 1}, "what was confirmed stays"


def test_expected_blocks_need_no_more_memory_than_those_of_the_last_seconds(index: BlockIndex, clock: Clock) -> None:
    for n in range(1000):
        index.expect(1, [n.to_bytes(4, "little")])
        clock.now += EXPECT_S / 8
    assert len(index._workers[1].expected) == 8


def test_a_forgotten_worker_is_gone(index: BlockIndex) -> None:
    index.apply(1, 4, keys("a"), [])
    index.forget(1)
    index.forget(2)
    assert index.matched(keys("a")) == {}
    assert index.apply(1, 1, keys("a"), []), "a new account, without the gap"


@pytest.mark.parametrize("damage", [{"seq": 2}, {"expected": {b"a": 0.0}}])
def test_the_integrity_check_sees_damage(damage: dict[str, Any]) -> None:
    index = BlockIndex()
    index.apply(1, 1, keys("a"), [])
    vars(index._workers[1]).update(damage)
    with pytest.raises(AssertionError):
        index.check_integrity()


@pytest.mark.parametrize("seed", range(20))
def test_events_that_are_lost_repeated_and_reordered_against_the_workers_own_history(seed: int) -> None:
    """The index is always a state that the worker really had, never an older one than before, and the last in the end.

    `apply` says that nothing is missing exactly if no later event was delivered.
    """
    rng, index = random.Random(seed), BlockIndex(Clock())
    alphabet = keys("abcdefgh")
    states: list[set[bytes]] = [set()]  # of the worker, after each of its events
    events: list[tuple[list[bytes], list[bytes]]] = []
    known = heard = gaps = 0
    for _ in range(400):
        if not events or rng.random() < 0.5:
            added, removed = (rng.sample(alphabet, rng.randint(0, 3)) for _ in range(2))
            events.append((added, removed))
            states.append(states[-1] - set(removed) | set(added))
        if rng.random() < 0.1:
            seq = rng.randint(max(0, len(events) - 4), len(events))
            complete = index.reset(1, seq, list(states[seq]))
            known = max(known, seq)
        else:
            near = (known + 1, len(events), rng.randint(max(1, known - 3), len(events)))
            seq = min(rng.choice(near), len(events))
            complete = index.apply(1, seq, *events[seq - 1])
            known += seq == known + 1
        heard = max(heard, seq)
        gaps += not complete
        assert complete == (known == heard)
        assert {key for key in alphabet if index.matched([key])[1]} == states[known]
        index.check_integrity()
    assert index.reset(1, len(events), states[-1]) and gaps > 20
    assert {key for key in alphabet if index.matched([key])[1]} == states[-1]


def loads(balance: Balance) -> dict[int, float]:
    return {c.worker: c.load for c in balance.candidates({})}


def shares(balance: Balance) -> dict[int, Any]:
    return {c.worker: c.share for c in balance.candidates({})}


def test_load_is_what_remains_of_the_requests_that_a_worker_has() -> None:
    balance = Balance([4, 2])
    balance.give(4, "x", 5)
    balance.give(4, "y", 7)
    balance.give(2, "z", 1)
    assert loads(balance) == {4: 12, 2: 1}
    balance.report("y", 3)
    balance.report("x", 0)
    assert loads(balance) == {4: 3, 2: 1}
    balance.give(2, "x", 2)  # it has ended, so it may come again
    assert [(c.worker, c.matched, c.load) for c in balance.candidates({2: 6, 8: 1})] == [(4, 0, 3), (2, 6, 3)]


def test_share_outlives_a_request_and_halves_with_the_requests_after_it() -> None:
    balance = Balance([0, 1])
    balance.give(0, "x", 64)
    balance.report("x", 0)
    assert loads(balance) == {0: 0, 1: 0} and shares(balance) == {0: 64, 1: 0}
    for n in range(2 * HALF_LIFE):
        balance.give(1, n, 0)
    assert shares(balance) == {0: pytest.approx(32), 1: 0}
    balance.give(1, "y", 40)
    assert shares(balance) == {0: 0, 1: pytest.approx(8, abs=0.2)}


def test_a_new_worker_starts_level_with_the_one_with_the_least() -> None:
    balance = Balance([])
    assert balance.candidates({}) == []
    balance.add(0)
    balance.add(1)
    balance.give(0, "x", 9)
    balance.give(1, "y", 4)
    balance.add(2)
    balance.add(0)  # is there: nothing changes
    assert shares(balance) == {0: pytest.approx(5, abs=0.1), 1: 0, 2: 0}


def test_a_removed_worker_leaves_its_unfinished_requests_to_others() -> None:
    balance = Balance([0, 1])
    for worker, request in ((0, "x"), (1, "y"), (0, "z"), (0, "w")):
        balance.give(worker, request, 3)
    balance.report("x", 0)
    assert balance.remove(0) == ["z", "w"] and balance.remove(0) == []
    balance.report("z", 2)  # too late
    balance.give(1, "z", 3)
    assert loads(balance) == {1: 6}


def test_a_request_needs_a_known_worker_and_one_name() -> None:
    balance = Balance([0, 1])
    balance.give(0, "x", 3)
    for worker, request in ((5, "new"), (1, "x")):
        with pytest.raises(InputError, match="a new request and a worker of"):
            balance.give(worker, request, 3)
    assert loads(balance) == {0: 3, 1: 0}
