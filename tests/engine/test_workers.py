"""Two real worker processes: the tokens of `generate`, streamed, routed, refused, cancelled, and resumed after a kill.

`test_workers_scripted.py` has the faults that need a worker that does as it is told.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvlab.engine import generate
from kvlab.engine.pages import PoolExhausted
from kvlab.engine.router import ROUTERS
from kvlab.engine.worker import WorkerSettings
from kvlab.engine.workers import WorkerError, WorkerGroup
from kvlab.errors import ConfigError, InputError
from kvlab.testbed.server import RedisServer
from tests.engine.scripted_groups import is_alive, loads, wait_for
from tests.engine.test_generate import words
from tests.harness.helpers import attentive_model, save_folder

MODEL = attentive_model(context=1024)
PAGES = 64
LONG_S = 120.0
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerSettings]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        folder = save_folder(MODEL, tmp_path_factory.mktemp("model of workers"))  # a path with spaces
        yield WorkerSettings(model=str(folder), pages=PAGES, max_batch=4, max_step_tokens=64)


@pytest.fixture(scope="module")
def workers(settings: WorkerSettings) -> Iterator[WorkerGroup]:
    with WorkerGroup(2, settings) as group:
        yield group
        processes = [psutil.Process(pid) for pid in group.pids.values()]
    assert not any(process.is_running() for process in processes)


@pytest.fixture
def group(workers: WorkerGroup) -> Iterator[WorkerGroup]:
    """The workers, with all pages back after the test."""
    yield workers
    wait_for(lambda: all(load == 0 for load in loads(workers).values()))
    for stats in workers.stats(LONG_S).values():
        pool = stats["pool"]
        assert (pool["tables"], pool["free"] + pool["idle"], stats["requests"]) == (0, PAGES, 0)


@contextlib.contextmanager
def routed(group: WorkerGroup, router: Any) -> Iterator[None]:
    before, group._route = group._route, router
    yield
    group._route = before


def plain(prompt: list[int], new: int) -> list[int]:
    return generate(MODEL, prompt, new, stop_at_eos=False).tokens


def test_answers_are_those_of_generate_and_both_workers_serve(group: WorkerGroup) -> None:
    start = words(192, seed=99)
    prompts = [start[: 64 * (i % 4)] + words(5 + 11 * (i % 7), seed=i) for i in range(24)]
    answers = [group.submit(prompt, 6, stop_at_eos=False) for prompt in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.result(LONG_S) == plain(prompt, 6)
        assert answer.record is not None and answer.record.tokens == answer.tokens
        assert answer.record.sources.total() == answer.record.prompt_tokens == len(prompt)
    assert {answer.workers[0] for answer in answers} == group.pids.keys()


def test_tokens_come_one_by_one_while_the_answer_goes_on(group: WorkerGroup) -> None:
    prompt, seen = words(30), []
    answer = group.submit(prompt, 600, stop_at_eos=False)
    for token in answer:
        seen.append(token)
        if len(seen) == 3:
            assert not answer.is_done
            answer.cancel()
    assert seen == answer.tokens == plain(prompt, len(seen)) and 3 <= len(seen) < 600
    assert answer.record is not None and answer.record.reason == "cancelled"
    assert answer.token_at == sorted(answer.token_at) and answer.ttft_s > 0


def test_the_router_decides_and_what_a_worker_has_is_not_computed_again(group: WorkerGroup) -> None:
    one, other = group.pids
    prompt = words(100, seed=7)
    sources = []
    for worker in (one, one, other):
        with routed(group, lambda blocks, candidates, routed, worker=worker: worker):
            answer = group.submit(prompt, 2)
            assert answer.result(LONG_S) == plain(prompt, 2) and answer.workers == [worker]
            assert answer.record is not None
            sources.append(dict(answer.record.sources))
    assert sources == [{"computed": 100}, {"device": 64, "computed": 36}, {"computed": 100}]  # blocks of 64


def test_the_cost_router_sends_a_prompt_to_the_worker_that_has_it(group: WorkerGroup) -> None:
    last = [*group.pids][-1]
    prompt = words(200, seed=8)
    with routed(group, lambda *_: last):
        group.submit(prompt, 1).result(LONG_S)
    with routed(group, ROUTERS["cost"]):
        answers = [group.submit(prompt + words(5, seed=i), 2) for i in range(3)]
        for answer in answers:
            answer.result(LONG_S)
    assert [answer.workers for answer in answers] == [[last]] * 3


def test_lost_news_of_blocks_is_noticed_and_mended_by_a_snapshot(
    group: WorkerGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    blocks, snapshot = group._on_blocks, group._on_snapshot

    def forgetful(process: Any, **event: Any) -> None:
        heard.append(f"blocks of {process.number}")
        if heard.count(heard[-1]) != 1:  # the first one of each worker is lost
            blocks(process, **event)

    def listening(process: Any, **event: Any) -> None:
        heard.append(f"snapshot of {process.number}")
        snapshot(process, **event)

    monkeypatch.setattr(group, "_on_blocks", forgetful)
    monkeypatch.setattr(group, "_on_snapshot", listening)
    for number in group.pids:
        with routed(group, lambda *_, number=number: number):
            for i in range(3):
                group.submit(words(70, seed=200 + i), 1).result(LONG_S)
                wait_for(lambda n=number, i=i: heard.count(f"blocks of {n}") > i)
        wait_for(lambda n=number: f"snapshot of {n}" in heard)
    assert group._names is not None
    keys = [[key[:8] for key in group._names.keys(words(70, seed=200 + i))] for i in range(3)]
    monkeypatch.setattr(group._index, "_clock", lambda: time.monotonic() + 1000)  # nothing is merely expected
    wait_for(lambda: all(group._index.matched(k) == dict.fromkeys(group.pids, 1) for k in keys))
    assert all(not process.asked_for_snapshot for process in group._processes.values())


def test_requests_can_be_cancelled_while_they_wait_fill_or_decode_and_after_their_end(group: WorkerGroup) -> None:
    with routed(group, lambda *_: min(group.pids)):
        answers = [group.submit(words(600, seed=i), 300) for i in range(8)]  # 4 run, over 64 pages even fewer
        decoding = next(a for a in iter(lambda: next((a for a in answers if a.tokens), None), 0) if a)
        states = [decoding, answers[-1], answers[1], answers[2]]
        for answer in states:
            answer.cancel()
        for answer in states:
            tokens = answer.result(LONG_S)
            assert answer.record is not None and answer.record.reason == "cancelled"
            assert tokens == plain(answer.prompt, max(len(tokens), 1))[: len(tokens)]
        assert answers[-1].tokens == [] and decoding.tokens != []
        for answer in answers:
            answer.cancel()
            answer.result(LONG_S)
            answer.cancel()


@pytest.mark.parametrize(
    ("tokens", "new", "error", "says"),
    [
        ([], 5, InputError, "at least one token"),
        ([97], 5, InputError, "expected tokens in 0 … 96"),
        ([1] * 1020, 5, InputError, "context is 1024"),
        ([1] * 1000, 24, PoolExhausted, "the pool has 64"),
    ],
)
def test_what_a_worker_refuses_is_raised_by_the_answer(
    group: WorkerGroup, tokens: list[int], new: int, error: type[Exception], says: str
) -> None:
    answer = group.submit(tokens, new)
    with pytest.raises(error, match=says):
        answer.result(LONG_S)
    with pytest.raises(error, match=says):
        next(iter(answer))


def test_stats_are_of_every_worker_and_count_what_it_did(group: WorkerGroup) -> None:
    before = group.stats(LONG_S)
    with routed(group, lambda *_: min(group.pids)):
        group.submit(words(40, seed=300), 4, stop_at_eos=False).result(LONG_S)
    after = group.stats(LONG_S)
    assert before.keys() == after.keys() == group.pids.keys()
    steps = {n: after[n]["scheduler"].get("steps", 0) - before[n]["scheduler"].get("steps", 0) for n in after}
    assert steps == {min(steps): 4, max(steps): 0}


def test_many_threads_submit_and_iterate(group: WorkerGroup) -> None:
    wrong: list[object] = []

    def client(seed: int) -> None:
        for i in range(4):
            prompt = words(20 + 9 * i, seed=seed % 3 * 10 + i)
            if [*group.submit(prompt, 5, stop_at_eos=False)] != right[seed % 3, i]:
                wrong.append((seed, i))

    right = {(k, i): plain(words(20 + 9 * i, seed=k * 10 + i), 5) for k in range(3) for i in range(4)}
    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_a_killed_worker_is_replaced_and_its_answers_go_on_token_by_token(group: WorkerGroup) -> None:
    """The last test of these workers: one of them has to start again."""
    prompts = [words(50 + i, seed=400 + i) for i in range(6)]
    answers = [group.submit(prompt, 150, stop_at_eos=False) for prompt in prompts]
    wait_for(lambda: sum(bool(answer.tokens) for answer in answers) >= 3)
    victim = next(answer.workers[0] for answer in answers if answer.tokens and not answer.is_done)
    os.kill(group.pids[victim], signal.SIGKILL)
    assert [[*answer] for answer in answers] == [plain(prompt, 150) for prompt in prompts]
    assert any(len(answer.workers) == 2 for answer in answers)
    wait_for(lambda: len(group.pids) == 2)
    assert victim not in group.pids and group.submit([1, 2], 1).result(LONG_S) == plain([1, 2], 1)


# --- start and end ------------------------------------------------------------------------------
def test_settings_that_no_worker_can_use_are_an_error_with_its_reason() -> None:
    """Three groups at the same time, because a process needs seconds to import PyTorch."""
    bad = {
        "/no/such/folder": WorkerSettings(model="/no/such/folder"),
        "bogus": WorkerSettings(store="bogus://h"),
        "fp64": WorkerSettings(precision="fp64"),
    }
    before = {p.pid for p in psutil.Process().children()}
    raised: dict[str, BaseException] = {}

    def start(reason: str, settings: WorkerSettings) -> None:
        try:
            WorkerGroup(1, settings).close()
        except BaseException as error:
            raised[reason] = error

    threads = [threading.Thread(target=start, args=item) for item in bad.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert {reason: type(error) for reason, error in raised.items()} == dict.fromkeys(bad, WorkerError)
    assert all(reason in str(error) and "cannot be started" in str(error) for reason, error in raised.items())
    wait_for(lambda: {p.pid for p in psutil.Process().children()} <= before)


@pytest.mark.redis
def test_a_request_says_how_long_its_blocks_are_kept(settings: WorkerSettings, redis_server: RedisServer) -> None:
    prompt = words(130)
    with WorkerGroup(1, replace(settings, store=redis_server.url)) as group:
        group.submit(prompt, 2, stop_at_eos=False, ttl_s=900).result(LONG_S)
    client = redis_server.client()  # the workers have saved everything before they ended
    left = [client.pttl(key) for key in client.scan_iter("kv:*")]
    assert sum(800_000 < pttl <= 900_000 for pttl in left) >= 1  # the description lives for a day


def test_a_ttl_that_cannot_be_kept_is_refused(group: WorkerGroup) -> None:
    with pytest.raises(ConfigError, match="a TTL"):
        group.submit(words(20), 2, ttl_s=-1)
    with pytest.raises(ConfigError, match="ttl_s=60"):  # these workers have no store
        group.submit(words(20), 2, ttl_s=60).result(LONG_S)


PARENT = """
import sys, time
from kvlab.engine.worker import WorkerSettings
from kvlab.engine.workers import WorkerGroup
print("junk before")
group = WorkerGroup(2, WorkerSettings(model=sys.argv[1], pages=64))
answers = [group.submit([1, 2, 3] * 9, 900, stop_at_eos=False) for _ in range(6)]
next(iter(answers[0]))
print("pids", *group.pids.values(), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_when_the_process_that_started_them_is_killed(settings: WorkerSettings, tmp_path: Path) -> None:
    """While they compute; from another folder, with a `PYTHONPATH` that has a space and a `json.py` in the way."""
    (tmp_path / "json.py").write_text("raise ImportError('the wrong json')")
    (tmp_path / "a b").mkdir()
    inherited = filter(None, [os.environ.get("PYTHONPATH")])  # an empty entry would be the folder with the wrong json
    path = os.pathsep.join([str(ROOT), str(tmp_path / "a b"), *inherited])
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", PARENT, str(settings.model)],
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
    )
    try:
        assert parent.stdout is not None
        said = [parent.stdout.readline().split() for _ in range(2)]
        assert said[0] == ["junk", "before"] and said[1][0] == "pids", said
        pids = [int(pid) for pid in said[1][1:]]
        assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
    finally:
        parent.kill()
        parent.communicate()
    wait_for(lambda: not any(psutil.pid_exists(pid) and is_alive(pid) for pid in pids))
