"""Two workers over one real Redis: they hit each other's blocks; killed workers and a killed or hanging server change
no token and hang no request; memory, pages and connections are bounded."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvlab.engine import generate
from kvlab.engine.worker import WorkerSettings
from kvlab.engine.workers import Answer, WorkerGroup
from kvlab.testbed.server import RedisServer
from tests.engine.scripted_groups import loads, wait_for
from tests.engine.test_generate import words
from tests.faults import soak_workers
from tests.harness.helpers import attentive_model, save_folder

pytestmark = pytest.mark.redis
MODEL = attentive_model(context=1024)
PAGES, B, LONG_S = 128, 64, 180.0
KILLS, NEW = 20, 40


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started


@pytest.fixture(scope="module")
def group(server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerGroup]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        settings = WorkerSettings(
            str(save_folder(MODEL, tmp_path_factory.mktemp("model"))),
            server.url,
            pages=PAGES,
            host_bytes=1 << 20,
            tiers={"planner": False},
        )
        with WorkerGroup(2, settings) as made:
            yield made


@contextlib.contextmanager
def all_to(group: WorkerGroup, worker: int) -> Iterator[None]:
    before, group._route = group._route, lambda *_: worker
    yield
    group._route = before


def serve(group: WorkerGroup, worker: int, prompt: list[int], new: int = 4) -> dict[str, int]:
    """The sources of the prompt, after the answer was found right."""
    with all_to(group, worker):
        answer = group.submit(prompt, new, stop_at_eos=False)
    assert answer.result(LONG_S) == plain(prompt, new) and answer.workers == [worker]
    assert answer.record is not None
    return dict(answer.record.sources)


def plain(prompt: list[int], new: int) -> list[int]:
    return generate(MODEL, prompt, new, stop_at_eos=False).tokens


def check_all_back(group: WorkerGroup) -> None:
    def is_back() -> bool:
        pools = [s["pool"] for s in group.stats(LONG_S).values()]
        return len(pools) == 2 and all((p["tables"], p["free"] + p["idle"]) == (0, PAGES) for p in pools)

    wait_for(is_back, LONG_S)
    assert set(loads(group).values()) == {0}
    assert all(not process.answers for process in group._processes.values()) and not group._parked


def saved(group: WorkerGroup, worker: int) -> int:
    return int(group.stats(LONG_S)[worker]["cache"]["stored"])


def test_what_one_worker_computed_the_other_one_finds_in_the_store(group: WorkerGroup) -> None:
    one, other = sorted(group.pids)
    prompts = [words(5 * B + 9 * i + 1, seed=i) for i in range(6)]
    before = group.stats(LONG_S)
    for i, prompt in enumerate(prompts):
        blocks = len(prompt) // B
        computed, finds = ((one, other), (other, one))[i % 2]
        stored = saved(group, computed)
        assert serve(group, computed, prompt) == {"computed": len(prompt)}
        wait_for(lambda c=computed, s=stored, b=blocks: saved(group, c) >= s + b)
        assert serve(group, finds, prompt) == {"store": blocks * B, "computed": len(prompt) - blocks * B}
        assert serve(group, finds, prompt)["device"] == blocks * B, "and then it has them itself"
    after = group.stats(LONG_S)
    for number in (one, other):
        hits = after[number]["cache"]["hits"] - before[number]["cache"]["hits"]
        assert hits == 3 * 5, "three prompts of the other worker, five blocks each"
    check_all_back(group)


@pytest.mark.parametrize("fault", ["killed", "paused"])
def test_a_server_that_fails_while_requests_run_changes_no_token_and_hangs_none(
    group: WorkerGroup, server: RedisServer, fault: str
) -> None:
    prompts = [words(4 * B + 7 * i, seed=500 + i) for i in range(8)]
    right = [plain(prompt, 60) for prompt in prompts]
    one, other = sorted(group.pids)
    for prompt in prompts[:4]:  # these are in the store when it fails
        serve(group, one, prompt)
    wait_for(lambda: server.client().dbsize() > 0)
    with all_to(group, other):
        answers = [group.submit(prompt, 60, stop_at_eos=False) for prompt in prompts]
        server.kill() if fault == "killed" else server.stop()
        answers += [group.submit(prompt, 60, stop_at_eos=False) for prompt in prompts]
    assert [answer.result(LONG_S) for answer in answers] == right * 2
    server.start() if fault == "killed" else server.cont()
    assert all(answer.workers == [other] for answer in answers), "no worker died of it"
    check_all_back(group)
    fresh = iter(range(600 + 100 * (fault == "paused"), 10_000))

    def is_shared_again() -> bool:
        prompt = words(2 * B + 1, seed=next(fresh))
        serve(group, one, prompt, 1)
        time.sleep(0.2)
        return serve(group, other, prompt, 1).get("store") == 2 * B

    wait_for(is_shared_again)


class Clients:
    """Threads that submit and stream until they are to stop, and note each token's index."""

    def __init__(self, group: WorkerGroup, count: int) -> None:
        self.group, self.stop, self.served, self.wrong = group, threading.Event(), [], []  # type: ignore[var-annotated]
        start = words(3 * B, seed=77)
        self.prompts = [start[: B * (i % 4)] + words(20 + 9 * i, seed=800 + i) for i in range(16)]
        self.right = [plain(prompt, NEW) for prompt in self.prompts]
        self.threads = [threading.Thread(target=self.client, args=(seed,), daemon=True) for seed in range(count)]
        for thread in self.threads:
            thread.start()

    def client(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.stop.is_set():
            number = rng.randrange(len(self.prompts))
            answer: Answer | None = None
            try:
                answer = self.group.submit(self.prompts[number], NEW, stop_at_eos=False)
                streamed = [*answer]  # a token that came twice would be in here twice
                if not (streamed == self.right[number] == answer.tokens and len(answer.token_at) == NEW):
                    self.wrong.append((number, streamed))
            except Exception as error:
                self.wrong.append((number, repr(error)))
            self.served.append(answer)

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(LONG_S)
        assert not any(thread.is_alive() for thread in self.threads), "a request hangs"


@pytest.mark.slow
def test_workers_are_killed_twenty_times_under_load_and_no_request_notices(
    group: WorkerGroup, record_property: Any
) -> None:
    clients, rng = Clients(group, 6), random.Random(20)
    killed: list[int] = []
    begin = time.monotonic()
    while len(killed) < KILLS:
        time.sleep(rng.random() * 0.5)
        if not (pids := group.pids):
            continue
        victim = rng.choice(sorted(pids))
        if victim not in killed:
            before = len(clients.served)
            os.kill(pids[victim], signal.SIGKILL)
            killed.append(victim)
            wait_for(lambda b=before: len(clients.served) > b or clients.wrong, LONG_S)  # the load goes on
    clients.end()
    assert not clients.wrong, clients.wrong[:3]
    resumed = [answer for answer in clients.served if len(answer.workers) > 1]
    figures = {
        "kills": len(killed),
        "requests": len(clients.served),
        "resumed": len(resumed),
        "most workers of one request": max(len(answer.workers) for answer in clients.served),
        "without a record": sum(answer.record is None for answer in clients.served),
        "seconds": round(time.monotonic() - begin, 1),
    }
    record_property("figures", figures)
    print(figures)
    assert len(resumed) >= KILLS / 2, f"most kills met no request: {figures}"
    wait_for(lambda: len(group.pids) == 2, LONG_S)
    assert not set(group.pids) & set(killed)
    check_all_back(group)


@pytest.mark.slow
def test_a_mixed_load_leaves_memory_pages_and_connections_as_they_were() -> None:
    figures = soak_workers.run(15)
    print(figures)
    assert figures["wrong"] == 0 and figures["hanging_clients"] == 0, figures["first_wrong"]
    assert set(figures["workers"]) == {0, 1}, "a worker was started again"
    assert min(figures["requests"].get(kind, 0) for kind in ("whole", "streamed", "cancelled", "refused")) > 5
    assert all(figures["sources"][name] > 0 for name in ("computed", "device", "host", "store")), figures["sources"]
    assert [figures[name] for name in ("pages_missing", "tables", "requests_left", "load_left")] == [0] * 4
    assert figures["connections_most"] <= max(figures["connections_first_third"] + 2, 2 * 16)
    for name, before in figures["rss_mib_second_third"].items():
        assert figures["rss_mib_last_third"][name] < before + 24, figures


def test_the_soak_has_prompts_of_all_kinds() -> None:
    lengths = [len(soak_workers.prompt_of(number)) for number in range(soak_workers.PROMPTS)]
    assert min(lengths) < 16 and 500 < max(lengths) <= soak_workers.CONTEXT - soak_workers.NEW
    assert 4 * max(lengths) > 16 * soak_workers.PAGES, "a full batch is more than the pool has pages for"
    one, alike, other = (soak_workers.prompt_of(number)[:256] for number in (1, 13, 4))
    assert one == alike != other[:256]
