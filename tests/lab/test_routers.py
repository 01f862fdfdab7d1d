"""The published rules of four routers on cases worked out by hand, and the mask index against a plain one."""

from __future__ import annotations

import random

import pytest

from kvlab.engine.router import Balance
from kvlab.lab.routers import ROUTERS, Holders, Running, Seen, dynamo, llmd, lmetric, seen, sglang


def workers(**columns: list[float]) -> list[Seen]:
    """Workers 0, 1, … with these fields."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [Seen(number, **row) for number, row in enumerate(rows)]  # type: ignore[arg-type]


def test_dynamo_takes_the_least_sum_of_blocks_to_compute_and_blocks_held() -> None:
    assert dynamo(10, workers(matched=[8, 0], to_compute=[0, 0], held=[0, 0]), 0) == 0
    assert dynamo(10, workers(matched=[8, 0], to_compute=[9, 0], held=[0, 0]), 0) == 1, "9 + 10 - 8 > 10"
    assert dynamo(10, workers(matched=[8, 0], to_compute=[0, 0], held=[9, 0]), 0) == 1, "2 + 9 > 10"
    assert dynamo(10, workers(matched=[8, 0], to_compute=[0, 0], held=[7, 0]), 0) == 0


def test_lmetric_takes_the_least_product() -> None:
    assert lmetric(10, workers(matched=[8, 0], to_compute=[0, 0], held=[9, 0]), 0) == 1, "2 x 10 > 10 x 1"
    assert lmetric(10, workers(matched=[8, 0], to_compute=[0, 0], held=[3, 0]), 0) == 0, "2 x 4 < 10 x 1"
    assert dynamo(10, workers(matched=[8, 0], to_compute=[0, 0], held=[7, 0]), 0) == 0
    assert lmetric(10, workers(matched=[8, 0], to_compute=[0, 0], held=[7, 0]), 0) == 1, "where the sum says 0"


def test_sglang_follows_long_prefixes_until_one_worker_has_far_more_requests() -> None:
    def chosen(matched: list[float], requests: list[float]) -> int:
        return sglang(10, workers(matched=matched, requests=requests), 0)

    assert chosen([4, 0], [64, 0]) == 0, "64 more is not more than 64"
    assert chosen([4, 0], [65, 0]) == 1
    assert chosen([4, 0], [300, 201]) == 0, "not 1.5 times as many"
    assert chosen([3, 0], [2, 1]) == 1, "a share of 0.3 is not more than 0.3: the one with fewer requests"
    assert chosen([4, 0], [2, 1]) == 0


def test_llmd_weighs_prefix_queue_and_memory() -> None:
    def chosen(matched: list[float], waiting: list[float], memory: list[float]) -> int:
        return llmd(10, workers(matched=matched, waiting=waiting, memory=memory), 0)

    assert chosen([10, 0], [1, 0], [0, 0]) == 0, "3 against 2"
    assert chosen([6, 0], [1, 0], [0, 0]) == 1, "1.8 against 2"
    assert chosen([6, 0], [5, 5], [0, 0]) == 0, "equal queues say nothing"
    assert chosen([6, 0], [0, 0], [0.95, 0]) == 1, "1.8 + 0.1 against 2"


@pytest.mark.parametrize("name", ROUTERS)
def test_of_equal_workers_each_gets_its_share(name: str) -> None:
    same = workers(matched=[0] * 5)
    assert sorted(ROUTERS[name](7, same, routed) for routed in range(10)) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_holders_know_what_sets_know() -> None:
    rng, holders = random.Random(0), Holders()
    sets: list[set[int]] = [set() for _ in range(70)]
    for _ in range(3000):
        worker, key, has = rng.randrange(70), rng.randrange(12), rng.random() < 0.7
        holders.set(worker, key, has)
        (sets[worker].add if has else sets[worker].discard)(key)
        keys = rng.sample(range(12), rng.randint(0, 6))
        expected = {
            w: n
            for w, some in enumerate(sets)
            if (n := next((i for i, k in enumerate(keys) if k not in some), len(keys)))
        }
        assert {w: n for w, n in holders.matched(keys).items() if n} == expected


def test_what_routers_see_of_work() -> None:
    balance, running = Balance(range(2)), [Running(), Running()]
    running[1].begin(missing=3)
    running[1].begin(missing=2)
    running[1].generate(missing=3, blocks=8)
    balance.give(1, "r", 13)
    one, two = seen(balance, {1: 4}, running, room=20.0)
    assert one == Seen(0)
    assert (two.matched, two.load, two.share) == (4, 13, 13)
    assert (two.to_compute, two.held, two.waiting, two.requests) == (2, 8, 1, 2)
    assert two.memory == (2 + 8) / 20
    running[1].end(blocks=8)
    running[1].generate(missing=2, blocks=5)
    running[1].end(blocks=5)
    assert running[1] == Running()
    assert seen(balance, {}, running, room=0.0)[0].memory == 1.0, "without room, memory is always full"
