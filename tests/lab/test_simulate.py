"""The simulator: small cases by hand. What must hold in all cases is in `test_laws`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kvlab.errors import InputError
from kvlab.lab.costs import COSTS, H100, LLAMA_8B, Costs, Link, compute
from kvlab.lab.replay import Setup
from kvlab.lab.simulate import Simulated, simulate
from kvlab.lab.traces import Request, Trace, spread

TRACE = Path(__file__).parents[3] / "shared" / "traces" / "conversation_trace.jsonl"
SECOND = Costs(kv_bytes=1, prefill_token_s=1.0, step_s=1.0, chunk=4)
"""A token of a prompt takes a second, and a decode step takes one."""
ALONE = Setup()


def firsts(requests: Sequence[Request], setup: Setup = ALONE, costs: Costs = SECOND) -> list[float]:
    """When each request has its first token; blocks of one token."""
    return [job.first_at for job in simulate(requests, 1, setup, costs).jobs]


def lasts(requests: Sequence[Request], costs: Costs = SECOND) -> list[float]:
    """When each request has its last token."""
    return [job.end_at for job in simulate(requests, 1, Setup(), costs).jobs]


def test_requests_of_a_node_wait_their_turn() -> None:
    requests = [Request(0, 4, 1, [1, 2, 3, 4]), Request(1, 2, 1, [5, 6]), Request(10, 2, 1, [7, 8])]
    assert firsts(requests) == [4, 6, 12]
    assert simulate(requests, 1, Setup(), SECOND).ttft_s == [4, 5, 2]
    assert firsts(requests, Setup(nodes=2)) == [4, 3, 12]


def test_what_the_device_has_is_not_computed_but_one_token_is() -> None:
    requests = [Request(0, 4, 1, [1, 2, 3, 4]), Request(10, 4, 1, [1, 2, 9, 10]), Request(20, 4, 1, [1, 2, 3, 4])]
    assert firsts(requests) == [4, 12, 21]


def test_a_request_finds_what_is_computed_before_it_in_the_queue() -> None:
    requests = [Request(0, 4, 1, [1, 2, 3, 4]), Request(0, 4, 1, [1, 2, 3, 5])]
    assert firsts(requests) == [4, 5]


def test_answers_are_generated_together() -> None:
    alone = [Request(0, 2, 3, [1, 2])]
    assert lasts(alone) == [4], "2 s of prefill, with the first token, and two steps"
    both = [*alone, Request(0, 2, 3, [3, 4])]
    assert lasts(both) == [5, 6], "the first one gets a token while the second one is computed"
    slower = replace(SECOND, step_request_s=0.5)
    assert lasts(alone, slower) == [2 + 2 * 1.5]
    assert lasts(both, slower) == [4.5 + 2.0, 4.5 + 2.0 + 1.5]


def test_a_prefill_begins_at_the_end_of_a_decode_step() -> None:
    requests = [Request(0, 1, 9, [1]), Request(3.5, 1, 1, [2])]
    assert firsts(requests) == [1, 5]


def test_a_long_prefill_takes_several_steps_and_carries_answers_along() -> None:
    requests = [Request(0, 1, 3, [1]), Request(1, 8, 1, range(2, 10))]
    assert lasts(requests) == [9, 9], "8 s in two steps of 4 tokens, each with a token of the first answer"


def test_a_full_batch_lets_others_wait() -> None:
    requests = [Request(0, 1, 5, [1]), Request(0, 1, 1, [2])]
    assert firsts(requests, costs=replace(SECOND, batch=1)) == [1, 6]


def test_requests_without_an_answer_end_with_their_prefill() -> None:
    assert lasts([Request(0, 2, 0, [1, 2])]) == [2]


def test_host_memory_is_fetched_over_a_link_of_its_own_node() -> None:
    costs = replace(SECOND, host=Link(latency_s=0.5, bytes_per_s=2.0))
    requests = [Request(0, 4, 1, [1, 2, 3, 4]), Request(10, 5, 1, [1, 2, 3, 4, 5])]
    setup = Setup(device=0, host=9)
    assert firsts(requests, setup, costs) == [4, 10 + 0.5 + 4 / 2 + 1]


def test_the_link_of_the_store_carries_one_transfer_after_the_other() -> None:
    costs = replace(SECOND, prefill_token_s=10.0, store=Link(latency_s=0.5, bytes_per_s=2.0))
    warm = Request(0, 4, 1, [1, 2, 3, 4])
    requests = [warm, *(Request(100, 5, 1, [1, 2, 3, 4, n]) for n in (5, 6, 7))]
    setup = Setup(device=0, store=9, nodes=4)
    assert firsts(requests, setup, costs) == [40, 100 + 2.5 + 10, 100 + 4.5 + 10, 100 + 6.5 + 10]


def test_the_store_has_blocks_when_they_are_computed_not_before() -> None:
    costs = replace(SECOND, store=Link(0.0, 1e9))
    requests = [Request(0, 4, 1, [1, 2, 3, 4]), *(Request(at, 4, 1, [1, 2, 3, 4]) for at in (3.9, 4.0))]
    assert [sum(job.found) for job in simulate(requests, 1, Setup(nodes=3, store=9), costs).jobs] == [0, 0, 4]


def test_a_request_is_looked_up_in_the_store_when_it_is_admitted() -> None:
    """All come at once; with one request at a time the last one finds what another node has computed meanwhile."""
    twice = [Request(0, 4, 1, [1, 2, 3, 4]), Request(0, 4, 1, [5, 6, 7, 8])]
    requests = [*twice, *(Request(0, 4, 1, request.blocks) for request in reversed(twice))]
    setup, costs = Setup(device=0, nodes=2, store=9), replace(SECOND, store=Link(0.0, 1e9))
    for batch, store in ((1, [0, 0, 4, 4]), (2, [0, 0, 0, 0])):
        jobs = simulate(requests, 1, setup, replace(costs, batch=batch)).jobs
        assert [job.found[2] for job in jobs] == store, batch


def test_what_an_action_ends_later_still_has_its_place() -> None:
    """The second one comes while the first is computed. It is looked up when that is done, and finds what came at 3."""
    costs = replace(SECOND, store=Link(0.0, 1e9), batch=1)
    first, other = Request(0, 4, 1, range(4)), Request(0, 3, 1, range(10, 13))
    requests = [first, other, Request(1, 3, 1, range(10, 13))]
    jobs = simulate(requests, 1, Setup(device=0, nodes=2, store=99), costs).jobs
    assert (jobs[2].node, jobs[2].found[2], jobs[2].first_at) == (0, 3, pytest.approx(5))


def test_memory_limits_how_many_requests_are_admitted() -> None:
    """Each needs 4 tokens, then one more for each token of its answer; what two begin with is there once."""
    costs, requests = replace(SECOND, room=8), [Request(0, 4, 3, range(4 * n, 4 * n + 4)) for n in range(2)]
    assert firsts(requests, costs=costs) == [4, 8]
    assert firsts(requests, costs=replace(SECOND, room=7)) == [4, 10], "the second one begins when the first has ended"
    assert firsts(requests[:1], costs=replace(SECOND, room=1)) == [4], "one alone is always admitted"
    again = [Request(0, 4, 3, range(4)), Request(0, 5, 3, range(5))]
    assert firsts(again, costs=replace(SECOND, room=7)) == [4, 5]


@pytest.mark.parametrize(("busy_s", "found"), [(2, 0), (10, 9)])
def test_nodes_work_in_the_order_of_time(busy_s: int, found: int) -> None:
    """Node 0 computes nine blocks until 9. Node 1 is busy, and then admits a request for the same blocks."""
    long, other = Request(0, 9, 1, range(9)), Request(0, busy_s, 1, range(20, 20 + busy_s))
    requests = [long, other, Request(0, 1, 1, [40]), Request(0, 9, 1, range(9))]
    setup, costs = Setup(device=0, nodes=2, store=99), replace(SECOND, store=Link(0.0, 1e9), batch=1)
    assert [sum(job.found) for job in simulate(requests, 1, setup, costs).jobs] == [0, 0, 0, found]


def test_a_fetch_that_is_slower_than_computing_is_not_made() -> None:
    slow = replace(SECOND, store=Link(latency_s=50.0))
    requests = [Request(at, 4, 1, [1, 2, 3, 4]) for at in (0.0, 10.0)]
    setup = Setup(device=0, store=9)
    planned, blind = (simulate(requests, 1, setup, slow, plan=plan) for plan in (True, False))
    assert planned.ttft_s == [4, 4] and planned.hits.by_source["store"] == 0
    assert blind.ttft_s == [4, 51] and blind.hits.by_source["store"] == 4
    fast = replace(SECOND, store=Link(latency_s=0.5))
    assert simulate(requests, 1, setup, fast).ttft_s == [4, 1.5]


def test_a_long_queue_hides_a_slow_fetch() -> None:
    costs = replace(SECOND, store=Link(latency_s=6.0))
    requests = [Request(0, 4, 1, [1, 2, 3, 4]), Request(10, 8, 1, range(10, 18)), Request(10, 4, 1, [1, 2, 3, 4])]
    assert firsts(requests, Setup(device=0, store=4), costs) == [4, 18, 19]


def test_results_have_names_that_do_not_change() -> None:
    requests = [Request(0, 4, 3, [1, 2, 3, 4]), Request(0, 4, 3, [1, 2, 3, 5])]
    told = simulate(requests, 1, Setup(nodes=2), SECOND).as_json()
    assert told["hits_by_source"] == {"device": 0, "host": 0, "store": 0} and told["imbalance"] == 1.0
    assert (told["ttft_mean_s"], told["ttft_p50_s"], told["end_to_end_p95_s"]) == (4, 4, 6)
    assert (told["busy"], told["requests_per_s"], told["tokens_per_s"]) == (1.0, 2 / 6, 1.0)


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(InputError, match="expected at least one request"):
        simulate([], 16, Setup(), SECOND)
    with pytest.raises(InputError, match="in the order of their arrival, got request 1 before"):
        simulate([Request(5, 1, 1, [1]), Request(4, 1, 1, [2])], 1, Setup(), SECOND)
    with pytest.raises(InputError, match="it knows the future"):
        simulate([Request(0, 1, 1, [1])], 1, Setup("belady", 5), SECOND)


# --- costs --------------------------------------------------------------------------------------
def test_costs_of_data_sheets() -> None:
    costs = compute(LLAMA_8B, H100, Link(), Link())
    assert LLAMA_8B.kv_bytes == costs.kv_bytes == 131_072
    assert 1 / costs.prefill_token_s == pytest.approx(30_790, rel=1e-3), "tokens a second, without attention"
    assert costs.prefill(8192, 0) == pytest.approx(8192 * 3.248e-5 + 8192**2 / 2 * 1.0602e-9, rel=1e-3)
    assert costs.step(1, 0) == pytest.approx(16.06e9 / 2.01e12)
    assert costs.source == "computed"
    break_even = costs.kv_bytes / costs.prefill_token_s
    assert break_even == pytest.approx(4.04e9, rel=0.01), "bytes a second that a fetch must reach"


def test_costs_that_make_no_sense_are_refused() -> None:
    for wrong in ({"prefill_s": -1.0}, {"step_s": float("nan")}, {"chunk": 0}, {"batch": 0}, {"kv_bytes": 0}):
        with pytest.raises(InputError, match="expected times of 0 or more"):
            replace(SECOND, **wrong)  # type: ignore[arg-type]
    for latency, bandwidth in ((-1.0, 1.0), (0.0, 0.0), (0.0, float("nan"))):
        with pytest.raises(InputError, match="expected a latency of 0 or more"):
            Link(latency, bandwidth)


# --- the real trace -----------------------------------------------------------------------------
@pytest.mark.skipif(not TRACE.exists(), reason="the trace (Mooncake's release) is not in the project")
def test_routers_on_ten_nodes_of_the_trace() -> None:
    requests = list(spread(Trace(TRACE), 3.0))

    def run(router: str) -> Simulated:
        return simulate(requests, 512, Setup(device=5_859, nodes=10, router=router), COSTS["llama8b_h100"])

    blind, cost = run("round_robin"), run("cost")
    assert round(blind.hits.rates()["blocks"], 3) == 0.104, "as in a replay"
    assert cost.hits.rates()["blocks"] > 0.34 and cost.imbalance < 1.1
    assert sum(cost.ttft_s) < 0.7 * sum(blind.ttft_s)
