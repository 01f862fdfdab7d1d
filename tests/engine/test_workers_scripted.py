"""A group over workers that misbehave: every request ends, once, with the right tokens or with an error that says why.

The workers are scripted, so that each fault comes when it is wanted. `test_workers.py` has real ones.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from kvlab.engine import workers
from kvlab.engine.pages import PoolExhausted
from kvlab.engine.requests import Busy
from kvlab.engine.worker import WorkerSettings
from kvlab.engine.workers import STARTS, TRIES, Answer, WorkerError, WorkerGroup
from kvlab.errors import ConfigError, InputError
from tests.engine.scripted_groups import LONG_S, Groups, expected, groups, is_alive, loads, wait_for
from tests.engine.scripted_worker import POISON

__all__ = ["groups"]
SLOW = {"token_s": 0.01}


@pytest.fixture
def held(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A script: each process gives three tokens of a request and no more, until the file is there."""
    yield {"hold": 3, "release": str(tmp_path / "release")}


def release(script: dict[str, Any]) -> None:
    Path(script["release"]).touch()


def kill(group: WorkerGroup, number: int, how: signal.Signals = signal.SIGKILL) -> None:
    os.kill(group.pids[number], how)


# --- death --------------------------------------------------------------------------------------
def test_requests_of_a_killed_worker_go_on_elsewhere_and_no_token_comes_twice(groups: Groups) -> None:
    group = groups(2, SLOW, router="round_robin")
    prompts = [[i, i + 1, i + 2] for i in range(8)]
    answers = [group.submit(prompt, 60) for prompt in prompts]
    wait_for(lambda: all(len(answer.tokens) >= 3 for answer in answers))
    kill(group, 0)
    streamed = [[*answer] for answer in answers]
    assert streamed == [expected(prompt, 60) for prompt in prompts]
    assert sum(answer.workers[0] for answer in answers) == 4, "they were sent in turn"
    assert all((len(answer.workers) > 1) == (answer.workers[0] == 0) for answer in answers)
    assert all(len(answer.token_at) == 60 and answer.record is not None for answer in answers)
    wait_for(lambda: group.pids.keys() == {1, 2})
    assert loads(group) == {1: 0, 2: 0}


@pytest.mark.parametrize("seed", range(3))
def test_seeded_kills_under_load_lose_and_double_no_token(
    groups: Groups, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """As `tests/faults/test_workers.py` does with real workers, but every few milliseconds."""
    monkeypatch.setattr(workers, "TRIES", 1000)
    rng, group = random.Random(seed), groups(3, {"token_s": 0.002})
    answers, prompts = [], []
    for i in range(120):
        prompts.append([rng.randrange(200) for _ in range(rng.randrange(1, 30))])
        answers.append(group.submit(prompts[-1], 20))
        if i % 12 == 11:
            time.sleep(rng.random() * 0.05)
            wait_for(lambda: group.pids)
            os.kill(rng.choice([*group.pids.values()]), signal.SIGKILL)
    for answer, prompt in zip(answers, prompts, strict=True):
        assert answer.result(LONG_S) == expected(prompt, 20)
    assert sum(len(answer.workers) > 1 for answer in answers) >= 3, "no kill met a request"
    assert set(loads(group).values()) == {0}


def test_a_request_that_had_all_its_tokens_has_ended_though_its_worker_could_not_say_so(groups: Groups) -> None:
    group = groups(1, {"hold": 0, "release": "/no/such/file"})
    one, other = group.submit([1, 2, 3], 2), group.submit([4], 9)
    (process,) = group._processes.values()
    wait_for(lambda: process.answers.keys() == {one.id, other.id})
    for index, token in enumerate(expected([1, 2, 3], 2)):
        group._on_outputs(process, [{"id": one.id, "index": index, "token": token, "record": None}])
    group._eos = [77]
    group._on_outputs(process, [{"id": other.id, "index": 0, "token": 77, "record": None}])
    kill(group, 0)
    assert one.result(LONG_S) == expected([1, 2, 3], 2) and one.record is None
    assert other.result(LONG_S) == [77], "it had stopped at the end of text"
    assert len(one.workers) == len(other.workers) == 1


def test_a_hanging_worker_is_killed_and_its_requests_go_on(groups: Groups) -> None:
    group = groups(2, SLOW, router="round_robin", silent_s=1.5)
    answers = [group.submit([i], 30) for i in range(4)]
    wait_for(lambda: all(len(answer.tokens) >= 2 for answer in answers))
    hanging = group.pids[0]
    kill(group, 0, signal.SIGSTOP)
    assert [answer.result(LONG_S) for answer in answers] == [expected([i], 30) for i in range(4)]
    wait_for(lambda: not psutil.pid_exists(hanging))
    assert [len(answer.workers) for answer in answers] == [2 - answer.workers[0] for answer in answers]


def test_workers_are_not_taken_for_dead_because_this_process_was_stopped(
    groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-Z and fg, nobody has heard the workers for a while, and all of them are well."""
    stopped_s = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + stopped_s[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(workers, "time", clock)
    group = groups(2, {"alive_s": 2.5}, silent_s=4.0)  # it is watched once a second
    before = group.pids
    for _ in range(3):
        stopped_s[0] += 100
        time.sleep(1.2)
    assert group.pids == before
    assert all(process.heard_at <= clock.monotonic() for process in group._processes.values())


def test_a_request_that_kills_its_workers_fails_and_the_others_are_served(groups: Groups) -> None:
    group = groups(2)
    poison = group.submit([1, POISON], 5)
    with pytest.raises(WorkerError, match=f"{TRIES} workers in a row ended while they had this request"):
        poison.result(LONG_S)
    assert len(poison.workers) == TRIES == len(set(poison.workers))
    assert group.submit([1], 5).result(LONG_S) == expected([1], 5)
    wait_for(lambda: len(group.pids) == 2)


def test_without_restart_the_last_death_ends_all_requests_with_an_error(groups: Groups) -> None:
    group = groups(2, SLOW, restart=False)
    answers = [group.submit([i], 500) for i in range(5)]
    kill(group, 0)
    wait_for(lambda: group.pids.keys() == {1})
    assert all(answer.error is None for answer in answers)
    kill(group, 1)
    for answer in answers:
        with pytest.raises(WorkerError, match="no worker is left"):
            answer.result(LONG_S)
    with pytest.raises(WorkerError, match="no worker is left"):
        group.submit([1], 5)
    assert group.stats() == {} and group.pids == {}


def test_when_no_worker_can_be_started_again_the_requests_that_wait_fail(groups: Groups, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    group = groups(1, {**SLOW, "exit_later": str(tmp_path / "first"), "starts": str(starts)})
    answer = group.submit([1], 500)
    kill(group, 0)
    with pytest.raises(WorkerError, match="no worker is left"):
        answer.result(LONG_S)
    assert len(starts.read_text().split()) == 1 + STARTS


def test_a_system_that_starts_no_process_fails_the_requests_and_hangs_none(
    groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = groups(1, SLOW)
    answer = group.submit([1], 500)
    monkeypatch.setattr(workers, "COMMAND", ["/no/such/program"])
    kill(group, 0)
    with pytest.raises(WorkerError, match="no worker is left"):
        answer.result(LONG_S)


def test_a_worker_that_is_killed_while_it_starts_is_started_again(groups: Groups, tmp_path: Path) -> None:
    group = groups(2, {"exit_first": str(tmp_path / "first")})
    assert len(group.pids) == 2 and max(group.pids) == 2, "the third process has the place of the first"
    assert group.submit([1], 5).result(LONG_S) == expected([1], 5)


# --- start --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("script", "says", "most"),
    [({"exit": 1}, "status 7", 2 * STARTS), ({"fail": "no such folder"}, "no such folder", 2)],
)
def test_workers_that_do_not_start_are_an_error_with_the_reason_and_leave_nothing(
    groups: Groups, tmp_path: Path, script: dict[str, Any], says: str, most: int
) -> None:
    starts = tmp_path / "starts"
    with pytest.raises(WorkerError, match=says):
        groups(2, {**script, "starts": str(starts)})
    pids = [int(pid) for pid in starts.read_text().split()]
    assert 1 <= len(pids) <= most
    wait_for(lambda: not any(is_alive(pid) for pid in pids))


@pytest.mark.parametrize(
    ("script", "says"), [("other_later", "its model is another"), ("other_eos_later", "its eos_token_id is another")]
)
def test_a_worker_with_another_model_is_refused(groups: Groups, tmp_path: Path, script: str, says: str) -> None:
    with pytest.raises(WorkerError, match=f"{says} than that of the other workers"):
        groups(2, {script: str(tmp_path / "first")})


@pytest.mark.parametrize("script", ["other_later", "other_eos_later"])
def test_no_answer_goes_on_with_another_model(groups: Groups, tmp_path: Path, script: str) -> None:
    """Not even if no worker with the model that began it is left."""
    group = groups(1, {script: str(tmp_path / "first"), "hold": 5, "release": str(tmp_path / "never")})
    answer = group.submit([1, 2], 50)
    wait_for(lambda: len(answer.tokens) == 5)
    os.kill(*group.pids.values(), signal.SIGKILL)
    with pytest.raises(WorkerError, match="no worker is left"):
        answer.result(LONG_S)
    assert answer.tokens == expected([1, 2], 5) and len(answer.workers) == 1


def test_what_a_library_prints_at_the_start_disturbs_nothing(groups: Groups) -> None:
    group = groups(1, {"junk": 'Warning!\n[1]\n3\nnull\n{}\n{"is": "unheard_of"}\n\n'})
    assert group.submit([1], 5).result(LONG_S) == expected([1], 5)


@pytest.mark.parametrize("error", [OSError("no memory"), RuntimeError("can't start new thread")])
def test_a_place_that_could_not_be_filled_is_filled_later_and_no_request_is_lost(
    groups: Groups, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    group = groups(1)
    start, left = group._start, [3]

    def unlucky(place: int) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        start(place)

    monkeypatch.setattr(group, "_start", unlucky)
    os.kill(group.pids[0], signal.SIGKILL)
    wait_for(lambda: left[0] < 3)
    answer = group.submit([1], 5)
    assert answer.result(LONG_S) == expected([1], 5) and left[0] == -1
    assert group.counts() == Counter(ready=1, deaths=1)


def test_a_first_process_that_the_system_refuses_is_an_error(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(workers.subprocess, "Popen", refused)
    with pytest.raises(WorkerError, match="cannot be started: no memory"):
        groups(1)


def test_a_process_whose_thread_the_system_refuses_is_ended(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixture sees that no process, thread or pipe is left."""

    class NoReader(threading.Thread):
        def start(self) -> None:
            if "_read" in repr(self._target):  # type: ignore[attr-defined]
                raise RuntimeError("can't start new thread")
            super().start()

    monkeypatch.setattr(workers.threading, "Thread", NoReader)
    with pytest.raises(WorkerError, match="cannot be started: can't start"):
        groups(1)


@pytest.mark.parametrize(
    ("count", "options", "says"),
    [
        (0, {}, "workers"),
        (True, {}, "workers"),
        (2, {"max_requests": 0}, "max_requests"),
        (2, {"router": "best"}, "expected a router of round_robin"),
        (2, {"silent_s": 0}, "silent_s"),
        (2, {"silent_s": float("nan")}, "silent_s"),
        (2, {"script": {"clock": time.monotonic}}, "JSON"),
    ],
)
def test_a_bad_setting_is_refused_before_a_process_starts(
    groups: Groups, monkeypatch: pytest.MonkeyPatch, count: int, options: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(workers.subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(ConfigError, match=says):
        groups(count, **options)


def test_no_secret_is_on_a_command_line_or_in_an_environment(groups: Groups) -> None:
    settings = WorkerSettings(salt="TOPSECRET", store="redis://:TOPSECRET@h", encryption_keys={1: b"TOPSECRET" * 3})
    groups(1)
    with WorkerGroup(1, settings) as group:
        process = psutil.Process(group.pids[0])
        said = (
            f"{process.cmdline()} {process.environ()} {group.settings!r} {group._processes} {vars(group)['settings']}"
        )
        assert "TOPSECRET" not in said and b"TOPSECRET".hex() not in said


# --- cancel, refuse, close ----------------------------------------------------------------------
def test_a_cancelled_request_ends_with_what_it_has(groups: Groups, held: dict[str, Any]) -> None:
    group = groups(1, held)
    answer = group.submit([1], 9)
    wait_for(lambda: len(answer.tokens) == 3)
    answer.cancel()
    assert answer.result(LONG_S) == expected([1], 9)[:3] == [*answer]
    assert answer.record is not None and loads(group) == {0: 0}
    answer.cancel()  # once more, after the end
    assert group.submit([2], 3).result(LONG_S) == expected([2], 3)


def test_a_cancelled_request_does_not_come_back_to_life_when_its_worker_dies(groups: Groups, held: Any) -> None:
    group = groups(2, {**held, "ignore_cancel": True}, router=lambda blocks, candidates, routed: routed)
    cancelled, other = group.submit([1], 9), group.submit([2], 9)
    wait_for(lambda: len(cancelled.tokens) == 3)
    cancelled.cancel()
    kill(group, 0)
    release(held)
    assert cancelled.result(LONG_S) == expected([1], 9)[:3] and len(cancelled.workers) == 1
    assert other.result(LONG_S) == expected([2], 9)


def test_a_request_that_waits_for_a_worker_can_be_cancelled(groups: Groups, held: Any, tmp_path: Path) -> None:
    group = groups(1, {**held, "slow_later": str(tmp_path / "first")})
    cancelled, other = group.submit([1], 9), group.submit([2], 9)
    wait_for(lambda: len(cancelled.tokens) == len(other.tokens) == 3)
    kill(group, 0)
    wait_for(lambda: len(group._parked) == 2)
    cancelled.cancel()
    assert cancelled.is_done and cancelled.result() == expected([1], 9)[:3]
    release(held)
    assert other.result(LONG_S) == expected([2], 9), "the one that was not cancelled goes on"


@pytest.mark.parametrize("error", [Busy, InputError, PoolExhausted])
def test_what_a_worker_refuses_is_raised_by_the_answer(groups: Groups, error: type[Exception]) -> None:
    group = groups(2, {"refuse": error.__name__}, max_requests=1)
    for _ in range(3):  # it is no longer counted as open
        answer = group.submit([1], 5)
        with pytest.raises(error, match="because"):
            answer.result(LONG_S)
        with pytest.raises(error):
            next(iter(answer))
    assert loads(group) == {0: 0, 1: 0}


def test_more_requests_than_allowed_are_refused_until_one_ends(groups: Groups, held: dict[str, Any]) -> None:
    group = groups(2, held, max_requests=3)
    answers = [group.submit([i], 9) for i in range(3)]
    with pytest.raises(Busy, match="3 requests"):
        group.submit([9], 9)
    release(held)
    assert [answer.result(LONG_S) for answer in answers] == [expected([i], 9) for i in range(3)]
    assert group.submit([9], 9).result(LONG_S) == expected([9], 9)


@pytest.mark.parametrize(
    "request_of",
    [
        {"tokens": 5},
        {"tokens": "abc"},
        {"tokens": [1.5]},
        {"tokens": [None]},
        {"tokens": [-1]},
        {"tokens": [2**40]},
        {"tokens": [1], "max_new_tokens": 0},
        {"tokens": [1], "max_new_tokens": np.int64(3)},
        {"tokens": [1], "max_new_tokens": 2.5},
        {"tokens": [1], "max_new_tokens": None},
    ],
)
def test_what_is_no_request_is_refused_at_once_and_takes_no_room(groups: Groups, request_of: dict[str, Any]) -> None:
    group = groups(1, max_requests=1)
    for _ in range(2):
        with pytest.raises(InputError):
            group.submit(**request_of)
    assert loads(group) == {0: 0} and not group._processes[0].answers
    answer = group.submit(np.array([1, 2]), 3, stop_at_eos=np.bool_(False))
    assert answer.result(LONG_S) == expected([1, 2], 3)


def test_close_ends_requests_and_who_waits_for_them(groups: Groups, held: dict[str, Any]) -> None:
    group = groups(2, held)
    answers = [group.submit([i], 9) for i in range(4)]
    wait_for(lambda: all(len(answer.tokens) == 3 for answer in answers))
    got: list[str] = []

    def wait(read: Callable[[Answer], object], answer: Answer) -> None:
        try:
            read(answer)
        except WorkerError as error:  # not an answer that looks whole
            got.append(str(error))

    waiting = [threading.Thread(target=wait, args=(list, answer)) for answer in answers[:2]]
    waiting += [threading.Thread(target=wait, args=(Answer.result, answers[0])) for _ in range(3)]
    for thread in waiting:
        thread.start()
    processes = [*group._processes.values()]
    group.close()
    assert [process.popen.returncode for process in processes] == [0, 0], "they ended themselves, at the end of input"
    for thread in waiting:
        thread.join(LONG_S)
    assert len(got) == 5 and all("closed before this answer had ended" in error for error in got)
    assert all(answer.is_done and len(answer.tokens) == 3 for answer in answers)
    with pytest.raises(InputError, match="closed"):
        group.submit([1], 5)
    group.close()
    answers[0].cancel()


@pytest.mark.parametrize("script", [{"end_s": 60}, {"deaf": True}])
def test_a_worker_that_does_not_end_or_read_is_killed_and_blocks_nobody(groups: Groups, script: Any) -> None:
    group = groups(1, script)
    (pid,) = group.pids.values()
    answers = [group.submit([7] * 40_000, 5) for _ in range(3)] if "deaf" in script else []  # more than a pipe holds
    group.close(timeout_s=0.3)
    assert not psutil.pid_exists(pid) and all(answer.is_done for answer in answers)


# --- what the answer and the router do ----------------------------------------------------------
def test_an_answer_gives_its_tokens_once_and_ends_as_often_as_it_is_asked(groups: Groups) -> None:
    answer = groups(1).submit([1], 5)
    assert [next(iter(answer)), *answer] == expected([1], 5)
    ended: list[list[int]] = []
    again = threading.Thread(target=lambda: ended.append([*answer]), daemon=True)
    again.start()
    again.join(LONG_S)
    assert ended == [[]] and answer.result(0) == expected([1], 5)


def test_several_threads_may_wait_for_one_answer(groups: Groups, held: dict[str, Any]) -> None:
    answer, got = groups(1, held).submit([1], 5), []
    threads = [threading.Thread(target=lambda: got.append(answer.result()), daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    release(held)
    for thread in threads:
        thread.join(LONG_S)
    assert got == [expected([1], 5)] * 4


def test_result_in_time_or_an_error_and_the_request_goes_on(groups: Groups, held: dict[str, Any]) -> None:
    answer = groups(1, held).submit([1], 5)
    wait_for(lambda: len(answer.tokens) == 3)
    with pytest.raises(WorkerError, match=r"not ended after 0.1 s; it has 3 tokens"):
        answer.result(0.1)
    release(held)
    assert answer.result(LONG_S) == expected([1], 5)
    assert 0 <= answer.ttft_s <= answer.token_at[-1] - answer.submitted_at


@pytest.mark.parametrize("advice", [ZeroDivisionError, -1, None, "1", [], 1 << 70])
def test_a_router_that_raises_or_names_no_worker_is_replaced_by_round_robin(
    groups: Groups, caplog: pytest.LogCaptureFixture, advice: Any
) -> None:
    def route(*_: Any) -> Any:
        return advice if advice is not ZeroDivisionError else 1 // 0

    group = groups(2, router=route)
    with caplog.at_level(logging.ERROR, "kvlab"):
        answers = [group.submit([i], 3) for i in range(4)]
    assert [answer.result(LONG_S) for answer in answers] == [expected([i], 3) for i in range(4)]
    one, other = (answer.workers for answer in answers[:2])
    assert one != other and [answer.workers for answer in answers[2:]] == [one, other]
    assert "the router" in caplog.text


def test_the_router_is_told_blocks_candidates_and_requests_before(groups: Groups, held: dict[str, Any]) -> None:
    asked: list[tuple[Any, ...]] = []

    def route(blocks: int, candidates: Any, routed: int) -> int:
        asked.append((blocks, {c.worker: (c.matched, c.load) for c in candidates}, routed))
        return 1

    group = groups(2, held, router=route)
    answers = [group.submit([1] * 9, 7), group.submit([1] * 9, 7)]
    assert asked[0] == (2, {0: (0, 0), 1: (0, 0)}, 0)  # 9 tokens have 2 full blocks of 4
    assert asked[1] == (2, {0: (0, 0), 1: (2, 4)}, 1)  # 9 + 7 tokens are 4 blocks; and 2 are expected to be there
    release(held)
    assert {tuple(answer.result(LONG_S)) for answer in answers} == {tuple(expected([1] * 9, 7))}
    assert loads(group) == {0: 0, 1: 0}


def test_nonsense_from_a_worker_ends_the_worker_and_not_the_thread_that_reads(
    groups: Groups, caplog: pytest.LogCaptureFixture
) -> None:
    group = groups(1, {"nonsense": True})
    with pytest.raises(WorkerError, match=f"{TRIES} workers"):
        group.submit([1], 5).result(LONG_S)
    assert "cannot be used" in caplog.text


def test_stats_come_from_all_that_answer_in_time(groups: Groups) -> None:
    group = groups(2)
    assert {number: s["pid"] for number, s in group.stats().items()} == group.pids
    silent = groups(1, {"no_stats": True})
    assert silent.stats(timeout_s=0.1) == {} and not silent._asked


def test_many_threads_submit_and_each_gets_its_own_answers(groups: Groups) -> None:
    group, wrong, done = groups(2), [], []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(25):
            prompt = [rng.randrange(200) for _ in range(9)]
            answer = group.submit(prompt, 6)
            if [*answer] != expected(prompt, 6):
                wrong.append(answer)
            done.append(answer.id)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert not wrong and len(set(done)) == 200 and loads(group) == {0: 0, 1: 0}
    assert all(not process.answers for process in group._processes.values())


def test_a_token_that_comes_twice_is_taken_once() -> None:
    answer = Answer("a", [1], 5, False, 0.0)
    for index, token in [(0, 7), (0, 7), (1, 8), (0, 9)]:
        answer._add(index, token)
    answer._end()
    answer._end(error=WorkerError("too late"))
    assert [*answer] == answer.result(0) == [7, 8] and answer.error is None


def test_workers_that_gave_out_a_token_are_not_counted_against_a_request(groups: Groups) -> None:
    """Bad luck is no poison: this request outlives more workers than `TRIES`."""
    group = groups(2, SLOW)
    answer = group.submit([1], 500)
    for number in range(TRIES + 1):
        before = len(answer.tokens)
        wait_for(lambda before=before: len(answer.tokens) > before + 1)  # type: ignore[misc]
        wait_for(lambda: len(group.pids) == 2)
        kill(group, answer.workers[-1])
        wait_for(lambda known=number: len(answer.workers) > known + 1)  # type: ignore[misc]
    assert answer.error is None and not answer.is_done
    answer.cancel()
