"""Calibration: the fit, and real workers that are measured with few requests."""

from __future__ import annotations

import math

import pytest

from kvlab.engine.worker import WorkerSettings
from kvlab.engine.workers import Answer
from kvlab.errors import KVLabError
from kvlab.lab import calibrate as module
from kvlab.lab.calibrate import calibrate, fit
from kvlab.testbed.server import RedisServer


def test_a_fit_finds_the_terms_of_a_sum() -> None:
    terms = [(1, n, n * n) for n in (1, 2, 5, 9, 30)]
    seconds = [0.5 + 0.2 * n + 0.01 * n * n for _, n, _ in terms]
    assert fit(terms, seconds) == pytest.approx([0.5, 0.2, 0.01])


def test_a_fit_leaves_out_what_would_be_negative() -> None:
    terms = [(1, n) for n in (1, 2, 4, 8)]
    constant, slope = fit(terms, [5.0, 4.0, 3.0, 2.0])
    assert slope == 0 and 2 < constant < 5


def test_a_fit_counts_relative_errors() -> None:
    """A short time that is wrong by half weighs as much as a long one that is."""
    constant, slope = fit([(1, 1), (1, 1000)], [1.0, 1000.0])
    assert constant == pytest.approx(0, abs=1e-9) and slope == pytest.approx(1)


def _answer(worker: int, at: float) -> Answer:
    answer = Answer("", [1], 1, False, 0.0)
    answer.workers.append(worker)
    answer.token_at.append(at)
    return answer


def test_what_comes_out_of_one_step_counts_as_one() -> None:
    """Four prompts in the first step, four in the second one, two seconds later: half a second each."""
    answers = [_answer(1, at) for at in (10.0, 10.0001, 10.0002, 10.0003, 12.0, 12.0, 12.0001, 12.0)]
    answers += [_answer(2, at) for at in (10.0, 13.0, 16.0)]
    assert sorted(module._service(answers)) == pytest.approx([0.5, 3.0], rel=1e-3)


@pytest.mark.redis
def test_workers_are_calibrated_with_and_without_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "COLD": ((16, 0), (128, 0), (512, 0)), "WARM": ((16, 256), (64, 512)), "CONTEXTS": (64, 512),
        "FETCHED": (64, 512), "PAUSE_S": 0.01,
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)
    plain = calibrate(WorkerSettings(max_batch=2), workers=1, rounds=1)
    with RedisServer() as server:
        shared = calibrate(WorkerSettings(store=server.url, max_batch=2), workers=1, rounds=1)
    assert plain.idle.store.bytes_per_s == math.inf > shared.idle.store.bytes_per_s > 0
    for costs in (plain.idle, plain.streaming, shared.idle, shared.streaming):
        assert costs.prefill(512, 0) > costs.prefill(64, 0) > 0 and costs.step(1, 64) > 0
        assert (costs.batch, costs.kv_bytes) == (2, 6144)


def test_a_calibration_that_finds_something_else_is_an_error() -> None:
    with pytest.raises(KVLabError, match="was to find 64 tokens of host, and found None"):
        module._found(_answer(1, 0.0), "host", 64)
