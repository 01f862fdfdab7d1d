"""What follows from a decision: each rule changes with the fact that it is about, and with no other."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import pytest

from kvlab.errors import ConfigError, InputError
from kvlab.lab.decide import Decision, decide
from kvlab.lab.recommend import Site, recommend
from kvlab.lab.reuse import reuse
from kvlab.lab.traces import from_blocks
from tests.lab.test_decide import money, tiny


def parts(decision: Decision, **facts: Any) -> dict[str, str]:
    return {choice.part: choice.take for choice in recommend(decision, Site(**facts))}


def paying(**options: Any) -> Decision:
    told = tiny(requests=4e9, wire=1e4, **options)
    assert told.verdict == "yes", told.reasons
    return told


def test_a_no_has_no_server_and_nothing_to_protect() -> None:
    told = tiny(requests=1)
    assert told.verdict == "no"
    found = parts(told, tenants=9, trusted=False, outlive=True)
    assert found["shared store"] == "none"
    assert not {"salt", "encryption_keys", "planner", "epoch"} & set(found)
    (why,) = [choice.why for choice in recommend(told, Site()) if choice.part == "shared store"]
    assert why == told.changes[0]


def test_what_must_be_measured_first_comes_with_its_command() -> None:
    told = tiny(requests=4e5, prices={})
    assert told.verdict == "measure first"
    first, second, *_ = recommend(told, Site())
    assert (first.take, second.take) == ("measure first", told.measure[0].name)
    assert second.why == told.measure[0].command


def test_the_store_grows_with_what_is_asked_of_it() -> None:
    one = paying()
    assert one.best.servers == 1 and one.best.load <= 1
    assert parts(one)["shared store"].startswith("one Redis on this machine")
    assert parts(one, machines=2)["shared store"] == "redis://: one server"
    assert parts(one, machines=2, outlive=True)["shared store"].startswith("redis-sentinel://")
    many = replace(one, rows=tuple(replace(row, servers=5) for row in one.rows), best=replace(one.best, servers=5))
    assert parts(many, machines=2)["shared store"] == "redis-cluster://: 6 masters"
    assert parts(many, machines=2, outlive=True)["shared store"].endswith("a replica of each")
    two = replace(one, rows=tuple(replace(row, servers=1) for row in one.rows), best=replace(one.best, load=1.5))
    open_ = replace(two, verdict="measure first")
    assert parts(open_, machines=2)["shared store"] == "redis-cluster://: 3 masters", "at least three can vote"


def test_only_a_wire_below_the_break_even_asks_for_smaller_records() -> None:
    assert "precision" not in parts(paying())
    slow = replace(paying(), above_break_even=False)
    assert parts(slow)["precision"].startswith("int8")
    assert "precision" not in parts(replace(slow, precision="int4"))


def test_a_wire_inside_the_band_of_the_break_even() -> None:
    """Slower than computing in the middle of the band, and faster at its slow end: no crossover in the middle."""
    trace = reuse(from_blocks([[i % 9, 10 + i % 9, 100 + i] for i in range(200)], 1000), 1000)
    told = decide(trace, "llama-3.1-8b", None, 3.0, own=0, requests_per_month=1e9)
    assert told.verdict == "measure first" and not told.above_break_even and told.crossover == inf
    assert parts(told)["precision"].startswith("int8")
    assert "always faster" in next(choice.why for choice in recommend(told, Site()) if choice.part == "planner")


@pytest.mark.parametrize(
    ("facts", "added"),
    [
        ({}, set()),
        ({"tenants": 2}, {"salt", "encryption_keys"}),
        ({"trusted": False}, {"encryption_keys"}),
    ],
)
def test_who_shares_the_store_decides_what_protects_it(facts: dict[str, Any], added: set[str]) -> None:
    found = set(parts(paying(), **facts))
    assert found & {"salt", "encryption_keys"} == added


def test_a_router_needs_engines_and_host_memory_needs_room() -> None:
    assert "router" not in parts(paying(gpus=1))
    assert "router" in parts(paying(gpus=2))
    assert "router" not in parts(paying(gpus=2, gpus_per_engine=2)), "one engine of two GPUs"
    assert "host memory" not in parts(paying(), host_gib=0)


def test_wrong_facts_are_refused() -> None:
    wrong: list[dict[str, Any]] = [
        {"machines": 0},
        {"tenants": 0},
        {"tenants": 1.5},
        {"host_gib": -1},
        {"host_gib": "64"},
    ]
    for facts in wrong:
        with pytest.raises(ConfigError, match=next(iter(facts))):
            Site(**facts)
    with pytest.raises(InputError, match="capacities"):
        recommend(replace(paying(), rows=()), Site())


def test_a_trace_without_hits_says_what_to_change() -> None:
    lonely = reuse(from_blocks([[1], [2], [3]], 1000), 1000)
    told = decide(lonely, "25x1x10", 1000, 1.0, money(), requests_per_month=1e6)
    assert "begin alike" in {c.part: c.why for c in recommend(told, Site())}["shared store"]
