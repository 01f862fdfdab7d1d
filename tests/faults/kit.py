"""What tests of caches under faults share: one request of four blocks, its records, and what must hold."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis
import torch
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvlab.cache import DistributedKVCache
from kvlab.core import record
from kvlab.core.keys import Namespace
from kvlab.core.record import Format
from kvlab.stores import RedisStore, Store
from kvlab.testbed.server import RedisServer
from tests.faults.book import Row
from tests.harness.helpers import blank, encoded, exact_kv, joined, small_spec

B, BLOCKS = 16, 4
SPEC = small_spec()
TOKENS = list(range(100, 100 + B * BLOCKS))
KV = exact_kv(SPEC, B * BLOCKS)
OTHER_TOKENS, OTHER_KV = TOKENS[::-1], exact_kv(SPEC, B * BLOCKS, seed=9)
KEYS = Namespace(SPEC.fingerprint, "fp32", b"", B).keys(TOKENS)
LOST = 1  # the block that is spoilt
TIMEOUT_S = 0.5
LONG_S = 30.0
MIB = 1 << 20
NAMES = [b"kv:" + key for key in KEYS]  # as the server knows them
RECORDS = [encoded(KV[:, :, :, i * B : (i + 1) * B], Format(), key) for i, key in enumerate(KEYS)]
HEAD = len(b"$%d\r\n" % len(RECORDS[0]))
REPLY = HEAD + len(RECORDS[0]) + 2  # bytes of the answer to one GET
RECORD = joined(record.encode(KV[:, :, :, LOST * B : (LOST + 1) * B], KEYS[LOST], Format()))


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.sentinel), "w")


def cache_over(store: Store, compress: bool = False) -> DistributedKVCache:
    """A cache whose keys are `KEYS`."""
    return DistributedKVCache(precision="fp32", compress=compress, store=store, model=SPEC, block_tokens=B)


def load_all(cache: DistributedKVCache) -> int:
    """Load the whole request; what is said to be there must be right. Returns the number of blocks."""
    out = blank(SPEC, B * BLOCKS)
    end = cache.load(TOKENS, 0, B * BLOCKS, out)
    assert torch.equal(out[:, :, :, :end], KV[:, :, :, :end])
    cache.stats().check()
    cache.store.stats().check()
    return end // B


def load_others(cache: DistributedKVCache) -> int:
    """As `load_all`, for the other request."""
    out = blank(SPEC, B * BLOCKS)
    end = cache.load(OTHER_TOKENS, 0, B * BLOCKS, out)
    assert torch.equal(out[:, :, :, :end], OTHER_KV[:, :, :, :end])
    return end // B


def check_is_no_help(cache: DistributedKVCache, reason: str) -> None:
    """Every call is answered, nothing comes back, and the store's counters say why."""
    before = cache.store.stats()
    calls = (lambda: cache.match(TOKENS), lambda: load_all(cache), lambda: cache.save(TOKENS, KV))
    for call in (*calls, lambda: cache.store.delete_many(KEYS)):
        heal_breakers(cache)  # each call as if it were the first
        assert call() == 0
    after = cache.store.stats()
    assert after.misses - before.misses == Counter({reason: BLOCKS})
    assert after.drops - before.drops == Counter({reason: BLOCKS})
    assert after.hits == before.hits
    health = cache.health()
    assert not health.ok and f" {reason}: " in health.detail and "\n" not in health.detail
    heal_breakers(cache)


def heal_breakers(cache: DistributedKVCache) -> None:
    """Forget earlier faults; how breakers work has tests of its own."""
    assert isinstance(cache.store, RedisStore)
    cache.store.nodes[0].breaker.reset_after_fork()
    cache.store.nodes[0].write_breaker.reset_after_fork()


def check_works_again(cache: DistributedKVCache) -> None:
    """Saved blocks come back, and each under its own tokens."""
    assert cache.save(TOKENS, KV) == BLOCKS
    assert cache.save(OTHER_TOKENS, OTHER_KV) == BLOCKS
    assert load_all(cache) == BLOCKS
    out = blank(SPEC, B * BLOCKS)
    assert cache.load(OTHER_TOKENS, 0, B * BLOCKS, out) == B * BLOCKS
    assert torch.equal(out, OTHER_KV)
    assert cache.health().ok


def check_sums(*caches: DistributedKVCache) -> None:
    for each in caches:
        each.stats().check()
        each.store.stats().check()


def check_repaired(cache: DistributedKVCache) -> None:
    """A save puts right what is wrong; afterwards everything is there."""
    assert cache.save(TOKENS, KV) == BLOCKS
    assert load_all(cache) == BLOCKS


@contextlib.contextmanager
def under_fault(row: Row) -> Iterator[None]:
    """What runs in here adds to the row's time."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        row.added_ms = (row.added_ms or 0.0) + 1000 * (time.perf_counter() - begin)


def check_bad_value(row: Row, cache: DistributedKVCache, plant: Callable[[], object], reason: str) -> None:
    """Plant something under one block's key: what comes before it is right, it is a miss, a save repairs."""
    plant()
    before = cache.stats().misses
    with under_fault(row):
        assert load_all(cache) == LOST
    assert cache.stats().misses - before == Counter({reason: 1, "gap": BLOCKS - LOST - 1})
    row.seen = dict(Counter(row.seen or {}) + Counter({reason: 1}))
    check_repaired(cache)


def wait_for(there: Callable[[], bool], seconds: float = 30) -> None:
    give_up = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < give_up, "it never came back"
        time.sleep(0.05)


def within(seconds: float, call: Callable[[], object]) -> None:
    """Run it; it must not take longer. A hang bound, not a measurement."""
    begin = time.monotonic()
    call()
    assert time.monotonic() - begin < seconds


@contextlib.contextmanager
def monitored(server: RedisServer) -> Iterator[list[str]]:
    """The commands that the server gets meanwhile; filled in when the block ends."""
    commands: list[str] = []
    last = server.client()
    last.ping()  # its greeting comes before what is listened to
    with server.client().monitor() as monitor:
        yield commands
        last.echo("that is all")
        for heard in monitor.listen():
            if "that is all" in heard["command"]:
                return
            commands.append(heard["command"])


def impatient(server: RedisServer) -> redis.Redis:
    """A plain client that does not try again, as redis-py does by default."""
    return server.client(retry=Retry(NoBackoff(), 0))


def names_of(commands: list[str]) -> set[str]:
    return {command.split(" ")[0].upper() for command in commands}
