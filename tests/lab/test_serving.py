"""Loads that are the same for the same seed, and summaries that are what their names say."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kvlab.cli import FAILURE, main
from kvlab.engine import PagePool, generate
from kvlab.engine.requests import Record
from kvlab.engine.scheduler import Scheduler
from kvlab.lab import serving
from kvlab.lab.serving import Arrival, Served, hit_rate, imbalance, latencies, offer, offer_here, percentile, skewed
from kvlab.model import held_out_tokens
from kvlab.testbed.server import free_port
from tests.engine.scripted_groups import Groups, expected, groups
from tests.engine.test_generate import words
from tests.harness.helpers import attentive_model

__all__ = ["groups"]


def served(
    worker: int = 0, tokens: int = 2, at: tuple[float, ...] = (0.5, 0.75), arrived: float = 0.25, **sources: int
) -> Served:
    record = Record("r", sum(sources.values()), sources=Counter(sources)) if sources else None
    return Served(Arrival(0.0, [1] * 10, tokens), worker, arrived, list(at), [7] * tokens, record)


# --- the load -----------------------------------------------------------------------------------
def test_a_skewed_load_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    one, again, other = (skewed(50, 10, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


def test_requests_of_a_group_begin_alike_and_end_differently() -> None:
    arrivals = skewed(200, 10, groups=5, prefix=30, own=7, new=3)
    starts = {(arrival.group, tuple(arrival.tokens[:30])) for arrival in arrivals}
    assert len(starts) == len({start for _, start in starts}) == 5
    assert {len(arrival.tokens) for arrival in arrivals} == {37} and {arrival.new for arrival in arrivals} == {3}
    assert len({tuple(arrival.tokens[30:]) for arrival in arrivals}) > 150
    text = ",".join(map(str, held_out_tokens(serving.Tokenizer())))
    assert all(",".join(map(str, arrival.tokens[:30])) in text for arrival in arrivals[:5])


def test_the_shares_of_groups_are_those_of_zipf_and_the_gaps_those_of_poisson() -> None:
    arrivals = skewed(4000, 50, groups=4, prefix=4, own=2, seed=3)
    shares = Counter(arrival.group for arrival in arrivals)
    total = 1 + 1 / 2 + 1 / 3 + 1 / 4
    for group in range(4):
        assert shares[group] / 4000 == pytest.approx(1 / (1 + group) / total, abs=0.03)
    times = [arrival.at_s for arrival in arrivals]
    assert times == sorted(times) and times[0] > 0
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 50, rel=0.1)
    assert sum(gap > 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)  # exponential, not even


# --- summaries ----------------------------------------------------------------------------------
def test_latency_counts_from_the_intended_arrival() -> None:
    request = served(at=(0.5, 0.75, 1.75), arrived=0.25)
    assert request.ttft_ms == 250 and request.itl_ms == [250, 1000]
    assert latencies([request]) == {
        "ttft_p50_ms": 250,
        "ttft_p95_ms": 250,
        "itl_p50_ms": 625,
        "itl_p99_ms": pytest.approx(992.5),
    }
    assert latencies([served(tokens=1, at=(0.5,))])["itl_p99_ms"] == 0, "one token has no gap"


@pytest.mark.parametrize(("percent", "value"), [(50, 50), (95, 95), (99, 99), (99.9, 99.9), (0.1, 0.1), (25, 25)])
def test_a_percentile_is_interpolated(percent: float, value: float) -> None:
    assert percentile([*range(100, -1, -1)], percent) == pytest.approx(value)
    assert percentile([3.0], percent) == 3.0


def test_the_hit_rate_is_the_share_of_prompt_tokens_that_were_not_computed() -> None:
    requests = [served(computed=30, device=10), served(host=20, store=40), served()]
    assert hit_rate(requests) == 70 / 100
    assert hit_rate(requests, near=True) == 30 / 100
    assert hit_rate([]) == hit_rate([served()]) == 0


def test_imbalance_is_the_busiest_workers_work_by_the_mean() -> None:
    even = [served(worker, computed=100, device=w) for w, worker in enumerate((0, 1, 2))]
    assert imbalance(even, 3) == 1
    assert imbalance(even[:1], 3) == 3, "workers without any work count"
    uneven = [served(0, tokens=1, computed=92), served(1, tokens=1, computed=292, device=5000)]
    assert imbalance(uneven, 2) == 300 * 2 / 400  # 8 for a token of an answer
    lost = [served(0, tokens=1), served(1, tokens=1, computed=10)]
    assert imbalance(lost, 2) == 1, "a request without a record counts as computed"


# --- offers -------------------------------------------------------------------------------------
class Watched:
    """A group that calls `then` with the number of each request after it was sent."""

    def __init__(self, group: Any, then: Callable[[int], object]) -> None:
        self._group, self._then, self._sent = group, then, itertools.count()

    def submit(self, *args: Any, **options: Any) -> Any:
        answer = self._group.submit(*args, **options)
        self._then(next(self._sent))
        return answer


def test_offer_sends_at_the_intended_times_and_returns_what_was_served(groups: Groups) -> None:
    sent: list[int] = []
    group: Any = Watched(groups(2), sent.append)
    arrivals = [Arrival(0.05 * i, [i, 7], 3 + i) for i in range(5)]
    begin = time.perf_counter()
    requests = offer(group, arrivals)
    assert time.perf_counter() - begin >= 0.2 and sent == [0, 1, 2, 3, 4]
    assert [request.arrival for request in requests] == arrivals
    assert [request.tokens for request in requests] == [expected(a.tokens, a.new) for a in arrivals]
    first = requests[0].arrived_at
    assert [request.arrived_at - first for request in requests] == pytest.approx([0.05 * i for i in range(5)])
    assert all(request.token_at[0] >= request.arrived_at >= begin for request in requests)
    assert {request.worker for request in requests} <= {0, 1}
    assert all(request.record is not None for request in requests)


def test_a_slow_system_delays_no_arrival_so_that_waiting_is_measured(groups: Groups, tmp_path: Any) -> None:
    release = tmp_path / "release"
    held = groups(1, {"hold": 0, "release": str(release)})
    group: Any = Watched(held, lambda i: i == 1 and release.touch())
    requests = offer(group, [Arrival(0.0, [1], 2), Arrival(0.3, [2], 2)])
    assert requests[0].ttft_ms >= 290 and requests[0].ttft_ms > requests[1].ttft_ms


def test_offer_raises_what_a_request_raises(groups: Groups) -> None:
    group = groups(1, {"refuse": "PoolExhausted"})
    with pytest.raises(Exception, match="because"):
        offer(group, [Arrival(0.0, [1], 2)])


def test_offer_here_serves_in_this_process() -> None:
    model = attentive_model()
    arrivals = [Arrival(0.02 * i, words(20 + 5 * i, seed=i), 3) for i in range(6)]
    scheduler = Scheduler(model, PagePool(model, 64))
    begin = time.perf_counter()
    requests = offer_here(scheduler, arrivals)
    right = [generate(model, a.tokens, a.new, stop_at_eos=False).tokens for a in arrivals]
    assert [request.tokens for request in requests] == right and len(scheduler) == 0
    assert time.perf_counter() - begin >= 0.1 and [request.arrival for request in requests] == arrivals
    assert all(request.ttft_ms > 0 and request.worker == 0 for request in requests)
    assert serving.sources(requests) == {"computed": sum(len(a.tokens) for a in arrivals)}


def test_the_port_of_metrics_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--store", "memory://", "--metrics-port", str(port)]) == FAILURE
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"kvlab: expected a free port for metrics, got {port} on 127.0.0.1: {os.strerror(errno.EADDRINUSE)}\n"


def test_the_addresses_of_the_metrics_are_said_and_answer() -> None:
    said, port = list[str](), free_port(2)

    def ask(line: str) -> None:
        said.append(line)
        with urllib.request.urlopen(f"http://127.0.0.1:{port + 1}/metrics", timeout=10) as page:
            said.append(page.read().decode())

    serving.run(1, store="memory://", requests=2, metrics_port=port, say=ask)
    assert said[0] == f"metrics: http://127.0.0.1:{port}/metrics (the group), {port + 1} to {port + 1}"
    assert "kvlab_steps_total" in said[1]
