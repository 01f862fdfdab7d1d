"""Poisoned stores, replaced weights, wrong keys and foreign tenants, through the whole system: worker processes with
pages and host memory over one real Redis.

The same faults against a cache alone are in `test_values.py`, `test_login.py` and `test_crowds.py`. Here every answer
is compared with that of `generate` without a cache, and what is refused when it is spoilt is accepted when it is whole.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import random
import signal
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from safetensors.torch import save
from torch import Tensor

from kvlab.cache import DistributedKVCache
from kvlab.core import record
from kvlab.core.keys import Namespace
from kvlab.core.record import BadRecord, Format
from kvlab.core.seals import AesGcm
from kvlab.engine import generate
from kvlab.engine.tiers import TieredCache
from kvlab.engine.worker import WorkerSettings
from kvlab.engine.workers import STARTS, WorkerGroup
from kvlab.model import Llama, load_model
from kvlab.testbed.server import RedisServer, free_port
from tests.engine.scripted_groups import wait_for
from tests.engine.test_generate import words
from tests.faults.book import Book
from tests.faults.kit import Bomb
from tests.faults.test_workers import all_to
from tests.harness.helpers import attentive_model, encoded, flipped, own_weights, save_folder, tampered

pytestmark = pytest.mark.redis
OLD, NEW = attentive_model(context=1024), attentive_model(context=1024, seed=1)
B, BLOCKS, TAIL, ANSWER, LONG_S = 64, 3, 7, 6, 120.0
KEYS = {1: bytes(range(32)), 2: bytes(range(32, 64))}
STRANGER = {1: bytes(range(64, 96))}
SHAPE = (OLD.config.num_hidden_layers, 2, OLD.config.num_key_value_heads, B, OLD.config.head_dim)
seeds = itertools.count(10_000)


# --- what the tests share -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started


@pytest.fixture
def client(server: RedisServer) -> redis.Redis:
    return server.client()


@pytest.fixture(scope="module", autouse=True)
def digests_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(OLD, tmp_path_factory.mktemp("old"))


@contextlib.contextmanager
def running(server: RedisServer, folder: Path, *changes: dict[str, Any]) -> Iterator[list[WorkerGroup]]:
    """A group for each set of changed settings; they start and end at the same time, because that takes seconds."""

    def make(changed: dict[str, Any]) -> WorkerGroup:
        own = {"pages": 128, "host_bytes": 1 << 20, "tiers": {"planner": False}, **changed}
        workers, port = own.pop("workers", 1), own.pop("metrics_port", None)
        return WorkerGroup(workers, WorkerSettings(str(folder), server.url, **own), metrics_port=port)

    with ThreadPoolExecutor() as threads:
        starts = [threads.submit(make, changed) for changed in changes]
        try:
            yield [started.result() for started in starts]
        finally:
            ends = [threads.submit(started.result().close) for started in starts if started.exception() is None]
            wait(ends)


@pytest.fixture(scope="module")
def groups(server: RedisServer, folder: Path) -> Iterator[list[WorkerGroup]]:
    two = {"workers": 2}
    settings = two | {"metrics_port": free_port(3)}, two | {"encryption_keys": {1: KEYS[1]}}
    with running(server, folder, *settings) as started:
        yield started


@pytest.fixture
def group(groups: list[WorkerGroup]) -> WorkerGroup:
    """Two workers without salt and keys."""
    return groups[0]


@pytest.fixture
def sealed(groups: list[WorkerGroup]) -> WorkerGroup:
    """Two workers that encrypt."""
    return groups[1]


def fresh_prompt() -> list[int]:
    return words(BLOCKS * B + TAIL, seed=next(seeds))


def plain(prompt: list[int], model: Llama = OLD, new: int = ANSWER) -> list[int]:
    """The answer without any cache."""
    return generate(model, prompt, new, stop_at_eos=False).tokens


def pinned(group: WorkerGroup, worker: int, prompt: list[int], new: int = ANSWER) -> Any:
    with all_to(group, worker):
        return group.submit(prompt, new, stop_at_eos=False)


@dataclass
class Served:
    """An answer of one worker, where its prompt came from, and the misses that it was counted for."""

    tokens: list[int]
    sources: dict[str, int]
    misses: Counter[str]


def serve(group: WorkerGroup, worker: int, prompt: list[int]) -> Served:
    before = misses_of(group, worker)
    answer = pinned(group, worker, prompt)
    tokens = answer.result(LONG_S)
    assert answer.workers == [worker] and answer.record is not None
    return Served(tokens, dict(answer.record.sources), misses_of(group, worker) - before)


def misses_of(group: WorkerGroup, worker: int) -> Counter[str]:
    return Counter(group.stats(LONG_S)[worker]["cache"]["misses"])


def check_hits(group: WorkerGroup, worker: int, prompt: list[int], model: Llama = OLD) -> None:
    """All full blocks come from the store, and the answer is right."""
    served = serve(group, worker, prompt)
    assert served.tokens == plain(prompt, model)
    assert (served.sources, served.misses) == ({"store": BLOCKS * B, "computed": TAIL}, Counter())


def check_computes(group: WorkerGroup, worker: int, prompt: list[int], misses: dict[str, int]) -> None:
    """Nothing comes from the store, for these reasons, and the answer is right."""
    served = serve(group, worker, prompt)
    assert served.tokens == plain(prompt)
    assert served.sources == {"computed": BLOCKS * B + TAIL} and served.misses == Counter(misses)


def cache_of(server: RedisServer, model: Llama = OLD, **settings: Any) -> DistributedKVCache:
    return DistributedKVCache(store=server.url, model=model, precision="fp32", compress=False, **settings)


def write_whole(server: RedisServer, prompt: list[int], names: list[bytes], folder: Path, **settings: Any) -> None:
    """An engine in this process stores a prompt, as a worker would."""
    with TieredCache(cache_of(server, load_model(folder), **settings), 0, planner=False) as cache:
        assert [b"kv:" + key for key in cache.namespace.keys(prompt)] == names
        generate(load_model(folder), prompt, 1, cache)
    assert server.client().exists(*names) == BLOCKS


def names_of(group: WorkerGroup, prompt: list[int]) -> list[bytes]:
    assert group._names is not None
    return [b"kv:" + key for key in group._names.keys(prompt)]


def is_whole(name: bytes, value: bytes | None, fmt: Format) -> bool:
    try:
        return value is not None and record.decode(value, name[3:], fmt, SHAPE).isfinite().all().item()
    except BadRecord:
        return False


def wait_until_whole(client: redis.Redis, names: list[bytes], fmt: Format | None = None) -> None:
    fmt = fmt or Format()
    wait_for(lambda: all(is_whole(name, value, fmt) for name, value in zip(names, client.mget(names), strict=True)))


def deletes(client: redis.Redis) -> int:
    told = client.info("commandstats")
    return sum(told.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("del", "unlink", "flushdb", "flushall"))


def kv_of(prompt: list[int], model: Llama = OLD) -> Tensor:
    """KV [L, P, H, T, D] of the full blocks of a prompt."""
    with DistributedKVCache(store="memory://", model=model, precision="fp32", compress=False) as cache:
        generate(model, prompt, 1, cache)
        out = torch.empty(*SHAPE[:3], BLOCKS * B, SHAPE[4])
        assert cache.load(prompt, 0, BLOCKS * B, out) == BLOCKS * B
    return out


def records_of(kv: Tensor, names: list[bytes], fmt: Format | None = None) -> list[bytes]:
    """Valid records of blocks under these names, as anybody can make them who knows the format."""
    blocks = [kv[:, :, :, i * B : (i + 1) * B] for i in range(len(names))]
    return [encoded(block, fmt or Format(), name[3:]) for block, name in zip(blocks, names, strict=True)]


# --- a poisoned store ---------------------------------------------------------------------------
@dataclass
class Store:
    """The store as who poisons it sees it: the names of one prompt's records."""

    client: redis.Redis
    names: list[bytes]
    prompt: list[int]
    folder: Path

    def each(self, change: Callable[[bytes], bytes]) -> None:
        for name in self.names:
            self.client.set(name, change(self.client.get(name)))

    def flip(self) -> None:
        for i, name in enumerate(self.names):
            at = 200 + 1009 * i
            self.client.setrange(name, at, bytes([self.client.getrange(name, at, at)[0] ^ 1]))

    def swap(self) -> None:
        values = self.client.mget(self.names)
        for name, value in zip(self.names, values[1:] + values[:1], strict=True):
            self.client.set(name, value)

    def put_other_model(self) -> None:
        other = Namespace(b"\7" * 32, "fp32", b"", B).keys(self.prompt)
        values = records_of(kv_of(self.prompt, NEW), [b"kv:" + key for key in other])
        for name, value in zip(self.names, values, strict=True):
            self.client.set(name, value)

    def truncate(self) -> None:
        self.each(lambda value: value[: len(value) // 2])

    def empty(self) -> None:
        self.each(lambda value: b"")

    def age(self) -> None:
        self.each(lambda value: tampered(value, 4, b"\2"))

    def put_noise(self) -> None:
        noise = random.Random(0)
        self.each(lambda value: noise.randbytes(len(value)))

    def put_pickle(self) -> None:
        bomb = pickle.dumps([Bomb(self.folder / "executed"), "x" * 200])
        pickle.loads(bomb)
        (self.folder / "executed").unlink()  # it is armed
        self.each(lambda value: bomb)

    def put_lists(self) -> None:
        for name in self.names:
            self.client.delete(name)
            self.client.rpush(name, b"x")


POISONS = [
    pytest.param("flip", "checksum", id="with flipped bits", marks=pytest.mark.fault(number=9)),
    pytest.param("put_noise", "magic", id="of random bytes", marks=pytest.mark.fault(number=9)),
    pytest.param("put_lists", "response", id="that are lists", marks=pytest.mark.fault(number=9)),
    pytest.param("truncate", "length", id="cut in half", marks=pytest.mark.fault(number=8)),
    pytest.param("empty", "length", id="emptied", marks=pytest.mark.fault(number=8)),
    pytest.param("put_other_model", "key", id="of another model", marks=pytest.mark.fault(number=10)),
    pytest.param("age", "version", id="of another version", marks=pytest.mark.fault(number=11)),
    pytest.param("swap", "key", id="swapped", marks=pytest.mark.fault(number=12)),
    pytest.param("put_pickle", "magic", id="that are pickles", marks=pytest.mark.fault(number=14)),
]


def test_unspoilt_records_of_another_process_are_used(group: WorkerGroup, server: RedisServer, folder: Path) -> None:
    prompt = fresh_prompt()
    write_whole(server, prompt, names_of(group, prompt), folder)
    for worker in group.pids:
        check_hits(group, worker, prompt)


@pytest.mark.parametrize(("poison", "reason"), POISONS)
def test_a_poisoned_store_changes_no_answer_and_is_repaired(
    group: WorkerGroup,
    server: RedisServer,
    client: redis.Redis,
    folder: Path,
    tmp_path: Path,
    book: Book,
    request: pytest.FixtureRequest,
    poison: str,
    reason: str,
) -> None:
    one, other = sorted(group.pids)
    prompt = fresh_prompt()
    names = names_of(group, prompt)
    write_whole(server, prompt, names, folder)
    getattr(Store(client, names, prompt, tmp_path), poison)()
    with book(
        f"whole system, records {request.node.callspec.id}",
        injected=f"all {BLOCKS} records of a prompt",
        expected=f"{reason}, right tokens, repaired, then hits",
    ) as row:
        check_computes(group, one, prompt, {reason: BLOCKS})
        wait_until_whole(client, names)
        check_hits(group, other, prompt)
        row.seen = {reason: BLOCKS, "then hits": BLOCKS}
    assert not (tmp_path / "executed").exists()


@pytest.mark.fault(number=9)
def test_one_bad_record_is_computed_and_the_others_are_used(
    group: WorkerGroup, server: RedisServer, client: redis.Redis, folder: Path, book: Book
) -> None:
    one, other = sorted(group.pids)
    with book("whole system, one bad record", injected="the second record of three", expected="two hits") as row:
        prompt = fresh_prompt()
        names = names_of(group, prompt)
        write_whole(server, prompt, names, folder)
        client.set(names[1], flipped(client.get(names[1]), 500))
        served = serve(group, one, prompt)
        assert served.tokens == plain(prompt)
        assert served.sources == {"store": 2 * B, "computed": B + TAIL}
        assert served.misses == Counter(checksum=1)
        wait_until_whole(client, names)
        check_hits(group, other, prompt)
        row.seen = {"hits": 2, **served.misses}


@pytest.mark.fault(number=13)
def test_a_forger_who_knows_the_format_changes_answers_unless_records_are_sealed_with_a_key(
    group: WorkerGroup, sealed: WorkerGroup, server: RedisServer, client: redis.Redis, folder: Path, book: Book
) -> None:
    """Without keys this is the documented limit: a checksum stops nobody."""
    lie = kv_of(fresh_prompt())
    one, other = sorted(group.pids)
    prompt = fresh_prompt()
    names = names_of(group, prompt)
    stranger = Format(seal=AesGcm(STRANGER))
    with book(
        "whole system, forged records",
        injected="KV of another prompt in valid records",
        expected="xxh3: accepted, other tokens; AES: key_id, forged, right tokens",
    ) as row:
        client.mset(dict(zip(names, records_of(lie, names), strict=True)))
        served = serve(group, one, prompt)
        assert served.sources["store"] == BLOCKS * B and not served.misses
        assert served.tokens != plain(prompt), "the forger decides"
        row.seen = {"xxh3": "accepted, other tokens"}
        ours = Format(seal=AesGcm({1: KEYS[1]}))
        one, other = sorted(sealed.pids)
        forgeries: dict[str, Callable[[list[bytes]], list[bytes]]] = {
            "key_id": lambda names: records_of(lie, names),
            "forged": lambda names: records_of(lie, names, stranger),
            "key": lambda names: client.mget(names[1:] + names[:1]),
        }
        for reason, forge in forgeries.items():
            prompt = fresh_prompt()
            names = names_of(sealed, prompt)
            write_whole(server, prompt, names, folder, encryption_keys={1: KEYS[1]})
            client.mset(dict(zip(names, forge(names), strict=True)))
            check_computes(sealed, one, prompt, {reason: BLOCKS})
            wait_until_whole(client, names, ours)
            check_hits(sealed, other, prompt)
            row.seen |= {f"AES, {reason}": BLOCKS}
        prompt = fresh_prompt()
        write_whole(server, prompt, names_of(sealed, prompt), folder, encryption_keys={1: KEYS[1]})
        check_hits(sealed, one, prompt)


# --- keys and logins ----------------------------------------------------------------------------
@pytest.mark.fault(number=13)
@pytest.mark.slow
def test_workers_with_other_master_keys_answer_right_delete_nothing_and_read_what_they_have_the_key_for(
    group: WorkerGroup,
    sealed: WorkerGroup,
    server: RedisServer,
    client: redis.Redis,
    folder: Path,
    book: Book,
) -> None:
    (plain_one, _), (one, other) = sorted(group.pids), sorted(sealed.pids)
    with (
        running(server, folder, {"encryption_keys": STRANGER}, {"encryption_keys": KEYS}) as (strange, rotated),
        book(
            "whole system, other master keys",
            injected="workers with another key, none, and {1: old, 2: new}",
            expected="forged; key_id; all hits, nothing rewritten",
        ) as row,
    ):
        row.seen = {}
        deleted = deletes(client)
        for name, (third, worker), reason, fmt in (
            ("another key", (strange, *strange.pids), "forged", Format(seal=AesGcm(STRANGER))),
            ("no key", (group, plain_one), "key_id", Format()),
        ):
            prompt = fresh_prompt()
            names = names_of(sealed, prompt)
            write_whole(server, prompt, names, folder, encryption_keys={1: KEYS[1]})
            assert names == names_of(third, prompt), "the keys of records do not depend on the master keys"
            check_computes(third, worker, prompt, {reason: BLOCKS})
            wait_until_whole(client, names, fmt)  # as documented: it overwrites them with its own
            check_computes(sealed, one, prompt, {"key_id" if fmt.seal.key_id == 0 else "forged": BLOCKS})
            wait_until_whole(client, names, Format(seal=AesGcm({1: KEYS[1]})))
            check_hits(sealed, other, prompt)
            row.seen |= {name: {reason: BLOCKS}}
        prompt = fresh_prompt()
        names = names_of(sealed, prompt)
        write_whole(server, prompt, names, folder, encryption_keys={1: KEYS[1]})
        before = client.mget(names)
        check_hits(rotated, *rotated.pids, prompt)
        assert client.mget(names) == before, "records of the old key are read and stay"
        prompt = fresh_prompt()
        names = names_of(sealed, prompt)
        check_computes(rotated, *rotated.pids, prompt, {})
        wait_until_whole(client, names, Format(seal=AesGcm({2: KEYS[2]})))
        check_computes(sealed, one, prompt, {"key_id": BLOCKS})
        assert deletes(client) == deleted
        row.seen |= {"old and new": {"hits": BLOCKS}, "of the new key for who has the old one": {"key_id": BLOCKS}}


@pytest.mark.fault(number=26)
def test_a_password_that_changes_under_running_workers_changes_no_answer(
    group: WorkerGroup, server: RedisServer, client: redis.Redis, folder: Path, book: Book
) -> None:
    one, other = sorted(group.pids)
    prompt = fresh_prompt()
    write_whole(server, prompt, names_of(group, prompt), folder)
    before = auth_faults(group)
    with book(
        "whole system, password changed", injected="CONFIG SET requirepass, CLIENT KILL", expected="auth, then all hits"
    ) as row:
        client.config_set("requirepass", "another")
        admin = server.client(password="another")
        admin.client_kill_filter(_type="normal", skipme=True)
        try:
            check_computes(group, one, prompt, {})  # it is not even looked for: what is not found is no miss
            refused = auth_faults(group) - before
        finally:
            admin.config_set("requirepass", "")
        assert refused["0"] > 0 and not refused["1"], "the worker that asked"
        row.seen = {"auth": refused["0"], "then hits": BLOCKS}

        def is_back() -> bool:
            known = fresh_prompt()
            write_whole(server, known, names_of(group, known), folder)
            served = serve(group, one, known)
            assert served.tokens == plain(known)
            return served.sources.get("store") == BLOCKS * B

        wait_for(is_back)
        check_hits(group, other, prompt)


def auth_faults(group: WorkerGroup) -> Counter[str]:
    """How often the store of each worker was refused for its login, by place, as Prometheus is told."""
    port, address = group._metrics
    assert port is not None
    found: Counter[str] = Counter()
    for place in (0, 1):
        with urllib.request.urlopen(f"http://{address}:{port + 1 + place}/metrics", timeout=LONG_S) as page:
            lines = page.read().decode().splitlines()
        (line,) = [line for line in lines if line.startswith('kvlab_store_faults_total{reason="auth"')]
        found[str(place)] = int(float(line.split()[-1]))
    return found


# --- tenants ------------------------------------------------------------------------------------
@pytest.mark.fault(number=38)
@pytest.mark.slow
def test_tenants_share_nothing_learn_nothing_and_an_epoch_rolls_forward_and_back(
    server: RedisServer, folder: Path, book: Book
) -> None:
    salts = {"salt": "one/0", "workers": 2}, {"salt": "other/0"}, {"salt": "one/1"}
    with (
        running(server, folder, *salts) as (one, other, later),
        book(
            "whole system, tenants and epochs",
            injected="the same prompt under other salts",
            expected="no hit across; hits under the same salt, before and after another epoch",
        ) as row,
    ):
        first, second = sorted(one.pids)
        prompt, never, only_one = fresh_prompt(), fresh_prompt(), fresh_prompt()
        check_computes(one, first, prompt, {})
        wait_until_whole(server.client(), names_of(one, prompt))
        check_computes(other, *other.pids, prompt, {})
        check_hits(one, second, prompt)
        check_computes(one, first, only_one, {})
        wait_until_whole(server.client(), names_of(one, only_one))
        with cache_of(server, load_model(folder), salt="other/0") as theirs:
            wait_for(lambda: theirs.explain(never).cause == "never_stored")  # once its worker has described itself
            assert theirs.explain(only_one) == theirs.explain(never), "it looks like what nobody stored"
            assert theirs.explain(prompt).hit_blocks == BLOCKS
        with cache_of(server, load_model(folder), salt="one/0") as ours:
            assert ours.explain(only_one).hit_blocks == BLOCKS
        check_computes(later, *later.pids, prompt, {})  # another epoch: the old blocks are out of reach, and stay
        wait_until_whole(server.client(), names_of(later, prompt))
        with TieredCache(cache_of(server, load_model(folder), salt="one/1"), 0, planner=False) as cache:
            assert generate(load_model(folder), prompt, 1, cache).sources["store"] == BLOCKS * B
        check_hits(one, second, only_one)  # back to the epoch before
        row.seen = {"hits across": 0, "hits of the same salt": BLOCKS, "in the next epoch": 0, "back": BLOCKS}


# --- other weights under running workers --------------------------------------------------------
def replace_at_once(folder: Path, weights: bytes) -> None:
    (folder / "new").write_bytes(weights)
    (folder / "new").replace(folder / "model.safetensors")


def cut_in_place(folder: Path, weights: bytes) -> None:
    with (folder / "model.safetensors").open("r+b") as file:  # the same inode, as `cp` does it
        file.truncate(len(weights) // 2)


def rewrite_in_place(folder: Path, weights: bytes) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(weights)
        file.truncate()


FLIPS = [
    pytest.param(replace_at_once, "another than that of the other workers", STARTS, id="replaced"),
    pytest.param(cut_in_place, "damaged or cut short", 1, id="half rewritten"),
]


@pytest.mark.fault(number=10)
@pytest.mark.slow
@pytest.mark.parametrize(("change", "refusal", "starts"), FLIPS)
def test_other_weights_in_the_folder_of_running_workers_are_never_mixed_with_the_old_ones(
    server: RedisServer,
    client: redis.Redis,
    tmp_path: Path,
    book: Book,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    change: Callable[[Path, bytes], None],
    refusal: str,
    starts: int,
) -> None:
    folder = save_folder(OLD, tmp_path / "model")
    old, new = (save(own_weights(model)) for model in (OLD, NEW))
    prompts = [fresh_prompt() for _ in range(3)]
    assert all(plain(prompt) != plain(prompt, NEW) for prompt in prompts), "a shared block would show"
    with (
        running(server, folder, {"workers": 2}) as (group,),
        caplog.at_level(logging.WARNING, "kvlab"),
        book(
            f"whole system, weights {request.node.callspec.id}",
            injected="model.safetensors of running workers; one of them killed in an answer",
            expected="old tokens and hits; no worker on other weights joins; a new group shares nothing; back: hits",
        ) as row,
    ):
        one, other = sorted(group.pids)
        for prompt in prompts:
            write_whole(server, prompt, names_of(group, prompt), folder)
        check_hits(group, one, prompts[0])
        change(folder, new)
        check_hits(group, other, prompts[0])
        long = fresh_prompt()
        answer = pinned(group, one, long, 400)
        wait_for(lambda: len(answer.tokens) > 3)
        os.kill(group.pids[one], signal.SIGKILL)
        assert answer.result(LONG_S) == plain(long, new=400) and answer.workers == [one, other]
        wait_for(lambda: group.counts() == Counter(ready=1, deaths=1 + starts), LONG_S)
        assert refusal in caplog.text and "is given up" in caplog.text and set(group.pids) == {other}
        check_hits(group, other, prompts[1])
        rewrite_in_place(folder, new)
        with running(server, folder, {}) as (later,):
            served = serve(later, 0, prompts[0])
            assert (served.tokens, served.sources) == (plain(prompts[0], NEW), {"computed": BLOCKS * B + TAIL})
            wait_until_whole(client, names_of(later, prompts[0]))
            written = fresh_prompt()
            write_whole(server, written, names_of(later, written), folder)
            check_hits(later, 0, written, NEW)
        rewrite_in_place(folder, old)
        with running(server, folder, {}) as (back,):
            check_hits(back, 0, prompts[0])
        check_hits(group, other, prompts[2])
        row.seen = {"refused": f"{starts} starts: {refusal}", "resumed": "old tokens", "new group": 0, "back": BLOCKS}
