"""A worker, in this process, over two pipes: what it says to which command, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from kvlab.cache import DistributedKVCache
from kvlab.engine import PagePool, TieredCache, generate
from kvlab.engine.router import BlockIndex
from kvlab.engine.scheduler import Scheduler
from kvlab.engine.worker import KEY_BYTES, Worker, WorkerSettings, build
from kvlab.engine.workers import COMMAND
from kvlab.errors import ConfigError, KVLabError
from kvlab.stores import MemoryStore
from tests.engine.test_generate import words
from tests.harness.helpers import attentive_model

MODEL = attentive_model()
LONG_S = 60.0
Message = dict[str, Any]


class Pipes:
    """A worker over a scheduler, in a thread, and the two ends that a group would have."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.heard, self.raised = scheduler, [], []  # type: ignore[var-annotated]
        commands, self._to_worker = os.pipe()
        from_worker, events = os.pipe()
        self._ends = [os.fdopen(commands, "rb"), os.fdopen(events, "wb")]
        self._from_worker: BinaryIO = os.fdopen(from_worker, "rb")
        self.worker = Worker(scheduler, *self._ends)  # type: ignore[arg-type]
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        threading.Thread(target=self._listen, daemon=True).start()
        self.ready = self.next("ready")

    def _run(self) -> None:
        try:
            self.worker.run()
        except BaseException as error:
            self.raised.append(error)
        self._ends[1].close()

    def _listen(self) -> None:
        for line in self._from_worker:
            self.heard.append(json.loads(line))

    def write(self, line: bytes) -> None:
        os.write(self._to_worker, line)

    def tell(self, command: str, **content: Any) -> None:
        self.write(json.dumps({"do": command, **content}).encode() + b"\n")

    def submit(self, id: str, tokens: list[int], new: int = 4) -> None:
        self.tell("submit", id=id, tokens=tokens, max_new_tokens=new, stop_at_eos=False)

    def wait_for(self, there: Callable[[], Any]) -> Any:
        give_up = time.monotonic() + LONG_S
        while not (found := there()):
            assert time.monotonic() < give_up and not self.raised, (self.raised, self.heard[-5:])
            time.sleep(0.005)
        return found

    def said(self, event: str, **content: Any) -> list[Message]:
        return [m for m in list(self.heard) if m["is"] == event and content.items() <= m.items()]

    def next(self, event: str, **content: Any) -> Message:
        found: Message = self.wait_for(lambda: self.said(event, **content))[0]
        return found

    def outputs(self, id: str) -> list[Message]:
        return [o for m in self.said("outputs") for o in m["outputs"] if o["id"] == id]

    def answer(self, id: str) -> tuple[list[int], Message]:
        self.wait_for(lambda: any(o["token"] is None for o in self.outputs(id)))
        *tokens, end = self.outputs(id)
        assert [o["index"] for o in tokens] == [*range(len(tokens))] and end["index"] == len(tokens)
        return [o["token"] for o in tokens], end["record"]

    def end(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._to_worker)
        self.thread.join(LONG_S)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def piped(pages: int = 64, tiers: bool = False, **settings: Any) -> Iterator[Pipes]:
    cache = DistributedKVCache(store=MemoryStore(), model=MODEL, precision="fp32", block_tokens=16)
    pool = PagePool(MODEL, pages, cache.namespace)
    tiered = TieredCache(cache, 1 << 20, planner=False) if tiers else None
    pipes = Pipes(Scheduler(MODEL, pool, tiered, **settings))
    yield pipes
    pipes.end()
    assert not pipes.raised
    assert pool.free.total + pool.index.idle == pages and not pool.tables, "pages are missing"
    pool.check_integrity()


def known_of(pipes: Pipes) -> tuple[BlockIndex, set[bytes]]:
    """What a group knows of the blocks from all events, each of which was the next one."""
    index = BlockIndex()
    for event in pipes.said("blocks"):
        added, removed = ([bytes.fromhex(key) for key in event[name]] for name in ("added", "removed"))
        assert added or removed
        assert index.apply(0, event["seq"], added, removed)
    return index, index._workers[0].keys


def test_it_says_what_a_router_needs_and_gives_the_tokens_of_generate() -> None:
    with piped() as pipes:
        names = pipes.scheduler.pool.namespace
        assert names is not None
        assert pipes.ready["fingerprint"] == names.fingerprint.hex()
        assert pipes.ready["block_tokens"] == names.block_tokens == 16
        assert pipes.ready["eos"] == list(MODEL.config.eos_token_ids)
        prompts = {f"r{i}": words(20 + 7 * i, seed=i) for i in range(6)}
        for id, prompt in prompts.items():
            pipes.submit(id, prompt, 5)
        for id, prompt in prompts.items():
            tokens, record = pipes.answer(id)
            assert tokens == record["tokens"] == generate(MODEL, prompt, 5, stop_at_eos=False).tokens
            assert (record["reason"], record["prompt_tokens"]) == ("length", len(prompt))
            assert sum(record["sources"].values()) == len(prompt)


def test_events_tell_of_every_block_that_comes_and_goes_and_are_numbered() -> None:
    with piped(pages=12) as pipes:
        pool = pipes.scheduler.pool
        for i in range(6):  # 4 pages each, so that earlier ones must go
            pipes.submit(f"r{i}", words(60, seed=i))
            pipes.answer(f"r{i}")
        have = lambda: {key[:KEY_BYTES] for key in [*pool.index.blocks]}  # noqa: E731
        pipes.wait_for(lambda: known_of(pipes)[1] == have())
        events = pipes.said("blocks")
        assert [event["seq"] for event in events] == [*range(1, len(events) + 1)]
        assert any(event["removed"] for event in events) and have()
        assert pool.namespace is not None
        keys = [key[:KEY_BYTES] for key in pool.namespace.keys(words(60, seed=5))]
        assert known_of(pipes)[0].matched(keys) == {0: 3}


def test_blocks_in_host_memory_count_too() -> None:
    with piped(pages=6, tiers=True) as pipes:
        for i in range(3):
            pipes.submit(f"r{i}", words(60, seed=i))
            pipes.answer(f"r{i}")
        names = pipes.scheduler.pool.namespace
        assert names is not None
        keys = [[key[:KEY_BYTES] for key in names.keys(words(60, seed=i))] for i in range(3)]
        pipes.wait_for(lambda: all(known_of(pipes)[0].matched(k) == {0: 3} for k in keys))


def test_a_snapshot_is_all_blocks_and_the_events_go_on_behind_it() -> None:
    with piped() as pipes:
        pipes.submit("a", words(60))
        pipes.answer("a")
        pipes.wait_for(lambda: pipes.said("blocks"))
        pipes.tell("snapshot")
        snapshot = pipes.next("snapshot")
        before = pipes.said("blocks")
        assert snapshot["seq"] == before[-1]["seq"]
        assert {bytes.fromhex(key) for key in snapshot["keys"]} == known_of(pipes)[1]
        pipes.submit("b", words(60, seed=1))
        pipes.answer("b")
        after = pipes.wait_for(lambda: pipes.said("blocks")[len(before) :])
        assert after[0]["seq"] == snapshot["seq"] + 1
        assert not set(after[0]["added"]) & set(snapshot["keys"])


def test_stats_are_of_the_cache_the_scheduler_and_the_pool() -> None:
    with piped(tiers=True) as pipes:
        pipes.submit("a", words(60))
        pipes.answer("a")
        pipes.submit("b", words(60))
        _, record = pipes.answer("b")
        assert record["sources"] == {"device": 48, "computed": 12}
        cache = pipes.scheduler.cache
        assert cache is not None
        pipes.wait_for(lambda: cache.stats().stored >= 3)
        pipes.tell("stats", number=7)
        stats = pipes.next("stats", number=7)["stats"]
        assert stats["pool"]["blocks"] == {"requested": 6, "hits": 3}
        assert stats["pool"]["pages"] == 64 and stats["pool"]["tables"] <= 2  # of saves under way
        assert stats["scheduler"]["steps"] >= 8 and stats["scheduler"]["saves"] >= 1
        assert stats["cache"]["stored"] >= 3 and stats["requests"] == 0


@pytest.mark.parametrize(
    ("tokens", "new", "error", "says"),
    [
        ([], 4, "InputError", "at least one token"),
        ([97], 4, "InputError", "expected tokens in 0 … 96, got 97"),
        ([1] * 250, 10, "InputError", "context is 256"),
        ([1], 0, "InputError", "max_new_tokens"),
        ([1] * 120, 10, "PoolExhausted", "the pool has 8"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(tokens: list[int], new: int, error: str, says: str) -> None:
    with piped(pages=8) as pipes:
        pipes.submit("a", tokens, new)
        refused = pipes.next("refused", id="a")
        assert refused["error"] == error and says in refused["message"]
        pipes.submit("b", [1, 2, 3])
        assert len(pipes.answer("b")[0]) == 4


def test_more_than_may_wait_and_an_id_that_is_in_use_are_refused() -> None:
    with piped(max_batch=1, max_waiting=1) as pipes:
        pipes.submit("a", words(20), 200)
        pipes.wait_for(lambda: pipes.outputs("a"))
        pipes.submit("a", words(20))
        assert pipes.next("refused", id="a")["error"] == "InputError"
        pipes.submit("b", words(20))
        pipes.submit("c", words(20))
        assert pipes.next("refused", id="c")["error"] == "Busy"
        pipes.tell("cancel", id="a")
        pipes.tell("cancel", id="nobody")
        tokens, record = pipes.answer("a")
        assert record["reason"] == "cancelled" and len(tokens) < 200
        assert len(pipes.answer("b")[0]) == 4


def test_an_idle_worker_says_that_it_is_alive() -> None:
    with piped() as pipes:
        pipes.wait_for(lambda: len(pipes.said("alive", load=0)) >= 2)


@pytest.mark.parametrize("last", [b"", b'{"do": "sub', b"\xff\xfe"])
def test_the_end_of_its_input_ends_it_and_its_requests(last: bytes) -> None:
    """Half a line is what comes from a process that is killed while it writes."""
    with piped() as pipes:
        pipes.submit("a", words(20), 230)
        pipes.wait_for(lambda: pipes.outputs("a"))
        if last:
            pipes.write(last)
        pipes.end()
        assert len(pipes.outputs("a")) < 230 and len(pipes.scheduler) == 0


# --- settings -----------------------------------------------------------------------------------
SECRETS = WorkerSettings(
    model="folder",
    store="redis://me:TOPSECRET@h",
    precision="int8",
    compress=True,
    salt="TOPSECRET",
    encryption_keys={3: bytes(range(32)), 7: b"TOPSECRET" + bytes(23)},
    pages=7,
    host_bytes=9,
    tiers={"write": "back", "planner": False},
    max_batch=2,
    max_step_tokens=33,
    threads=2,
)


@pytest.mark.parametrize("settings", [WorkerSettings(), SECRETS])
def test_settings_are_the_same_after_they_went_through_a_pipe(settings: WorkerSettings) -> None:
    line = json.dumps(settings.to_message())
    assert WorkerSettings.from_message(json.loads(line)) == settings
    assert WorkerSettings.from_message(json.loads(line)) != replace(settings, pages=99)


def test_no_secret_is_in_the_repr_or_on_the_command_line() -> None:
    said = repr(SECRETS) + " ".join(COMMAND)
    assert "TOPSECRET" not in said and b"TOPSECRET".hex() not in said and str(bytes(range(4)))[2:-1] not in said
    assert "int8" in said and "write" in said, "what is no secret is of use"


def test_without_a_store_a_worker_has_pages_and_no_other_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scheduler = build(WorkerSettings(pages=9, max_batch=3, max_step_tokens=50), 5)
    assert scheduler.cache is None and len(scheduler.pool.refs) == 9
    assert (scheduler.max_batch, scheduler.max_step_tokens, scheduler.max_waiting) == (3, 50, 5)
    scheduler = build(WorkerSettings(store="memory://", host_bytes=1 << 20, tiers={"write": "back"}), 5)
    assert scheduler.cache is not None
    scheduler.cache.close()


@pytest.mark.parametrize(
    "settings",
    [WorkerSettings(model="/no/folder"), WorkerSettings(store="bogus://h"), WorkerSettings(precision="fp64")],
)
def test_bad_settings_are_errors_of_the_package(settings: WorkerSettings) -> None:
    with pytest.raises(KVLabError, match=r"/no/folder|bogus|fp64"):
        build(settings, 5)


def test_prefix_caching_can_be_switched_off_but_not_with_a_store() -> None:
    for caching, found in ((True, 64), (False, 0)):
        scheduler = build(WorkerSettings(pages=32, prefix_caching=caching), 5)
        for name in ("first", "again"):
            record = scheduler.submit(name, words(70), 2)
            assert [*scheduler.run()][-1].record is record
        assert (record.sources["device"], scheduler.pool.index.idle) == (found, found // 16), caching
        scheduler.pool.check_integrity()
    with pytest.raises(ConfigError, match="prefix_caching with a store"):
        build(WorkerSettings(store="memory://", prefix_caching=False), 5)


def start(first: bytes) -> tuple[int, list[str], str]:
    done = subprocess.run(COMMAND, input=first, capture_output=True, timeout=LONG_S, cwd=Path(__file__).parents[2],
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    return done.returncode, done.stdout.decode().splitlines(), done.stderr.decode()


def test_what_no_setting_may_be_is_a_reason_too_and_not_a_traceback() -> None:
    settings = WorkerSettings(store="memory://", tiers={"no_such_setting": 1})
    first = json.dumps({"settings": settings.to_message(), "max_waiting": 5})
    status, said, log = start(first.encode() + b"\n")
    assert status == 1 and "Traceback" not in log
    assert [json.loads(line)["is"] for line in said] == ["failed"]
    assert "no_such_setting" in said[0]
