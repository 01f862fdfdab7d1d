"""What tests of stores under faults share: values that follow from their keys, alarms, children."""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import redis
import torch

from kvlab.cache import DistributedKVCache
from kvlab.stores import RedisStore, Store
from tests.faults.book import Row
from tests.faults.kit import SPEC, B
from tests.harness.helpers import blank

Result = TypeVar("Result")
D = 0.25  # the default deadline of a call
PATIENT_S = 20.0  # where a busy machine must not turn a good call into a timeout
HANG = 10  # deadlines: the only thing asserted about time


class Fault:
    """Runs calls under a fault: their time goes in the row, and none may hang."""

    def __init__(self, row: Row, deadline_s: float) -> None:
        self._row, self._bound_s = row, HANG * deadline_s
        row.added_ms = 0.0

    def __call__(self, call: Callable[[], Result], deadlines: int = 1) -> Result:
        begin = time.perf_counter()
        result = call()
        took = time.perf_counter() - begin
        self._row.added_ms = (self._row.added_ms or 0.0) + took * 1000
        assert took < self._bound_s * deadlines
        return result


def value_of(key: bytes, size: int = 1000) -> bytes:
    """The only value that is ever stored under this key."""
    seed = random.Random(key).randbytes(min(size, 1000))
    return (seed * (size // len(seed) + 1))[:size]


def ask(store: Store, keys: list[bytes], size: int = 1000) -> list[bool]:
    """Which keys are hits; what comes back is what was stored under that key."""
    got = store.get_many(keys)
    for key, value in zip(keys, got, strict=True):
        assert value is None or value == value_of(key, size)
    store.stats().check()
    return [value is not None for value in got]


def fill(store: Store, keys: list[bytes], size: int = 1000) -> None:
    assert store.put_many(keys, [value_of(key, size) for key in keys]) == len(keys)


def load_some(cache: DistributedKVCache, tokens: list[int], kv: torch.Tensor) -> int:
    """Load these blocks; what is said to be there must be right."""
    out = blank(SPEC, len(tokens))
    end = cache.load(tokens, 0, len(tokens), out)
    assert torch.equal(out[:, :, :, :end], kv[:, :, :, :end])
    cache.stats().check()
    cache.store.stats().check()
    return end // B


def calm(store: Store) -> None:
    """The fault is over; from here on a busy machine must not turn a good call into a timeout."""
    assert isinstance(store, RedisStore)
    store.deadline_s = PATIENT_S


def breakers(store: Store) -> tuple[str, str]:
    assert isinstance(store, RedisStore)
    return store.nodes[0].breaker.state, store.nodes[0].write_breaker.state


def calls_of(client: redis.Redis, command: str) -> dict[str, int]:
    """The server's own count of a command."""
    counts = client.info("commandstats").get(f"cmdstat_{command}", {})
    return {name: counts.get(name, 0) for name in ("calls", "rejected_calls", "failed_calls")}


class Interrupt(BaseException):
    """What KeyboardInterrupt is, without ending the test run."""


class Alarm(Exception):
    """A handler's exception that `except Exception` catches."""


@contextlib.contextmanager
def alarm(kind: type[BaseException], after_s: float = 0.05) -> Iterator[None]:
    """The main thread is in the middle of something when this is raised."""

    def ring(*_: object) -> None:
        raise kind

    old = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, after_s)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def in_child(work: Callable[[], object], meanwhile: Callable[[], object] = int) -> object:
    """What `work` returns in a forked child, as JSON; `meanwhile` runs here."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writer, json.dumps(work()).encode())
            code = 0
        except BaseException as error:
            os.write(writer, json.dumps(repr(error)).encode())
        finally:
            os._exit(code)
    os.close(writer)
    killer = threading.Timer(PATIENT_S, os.kill, (child, signal.SIGKILL))
    killer.start()
    try:
        meanwhile()
        with os.fdopen(reader, "rb") as answer:
            said = answer.read()
        assert os.waitpid(child, 0)[1] == 0, said
    finally:
        killer.cancel()
    return json.loads(said)


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def read_while_standing_still(store: Store, stops: int, threads: int) -> tuple[dict[str, int], float]:
    """The keys that were hits and misses meanwhile, and how long the worker stood still, in ms."""
    keys = [b"%d" % i for i in range(20)]
    fill(store, keys)
    stop, stood_s = threading.Event(), 0.0

    def read() -> None:
        while not stop.is_set():
            ask(store, keys)

    readers = [threading.Thread(target=read) for _ in range(threads)]
    for reader in readers:
        reader.start()
    for _ in range(stops):
        time.sleep(0.05)
        begin = time.perf_counter()
        ctypes.PyDLL(None).usleep(round(2 * D * 1e6))  # keeps the interpreter to itself
        stood_s += time.perf_counter() - begin
    stop.set()
    for reader in readers:
        reader.join()
    stats = store.stats()
    assert stats.hits and stood_s >= stops * 2 * D
    assert stats.misses.total() <= stops * threads * len(keys) / 10 and set(stats.misses) <= {"timeout"}
    return {"hits": stats.hits, "misses": stats.misses.total()}, 1000 * stood_s


FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
needs_fork = pytest.mark.skipif(FORK is None, reason="this system has no fork")


@contextlib.contextmanager
def processes(count: int, work: Callable[..., object], *arguments: object) -> Iterator[list[Any]]:
    """Children that run `work(number, …)`; those still alive at the end are waited for and must have ended well."""
    assert FORK is not None
    made = [FORK.Process(target=work, args=(i, *arguments), daemon=True) for i in range(count)]
    for child in made:
        child.start()
    try:
        yield made
        for child in made:
            child.join(60)
            assert child.exitcode == 0, f"a child ended with {child.exitcode}"
    finally:
        for child in made:
            if child.is_alive():
                child.kill()
            child.join()
