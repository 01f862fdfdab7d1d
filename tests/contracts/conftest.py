"""Which stores and caches the contract suites run on. A new implementation is one more entry here.

The TTL suite has to know in addition how a test lets time pass in a new store (`aging`).
"""

from __future__ import annotations

import inspect
import itertools
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis

from kvlab.cache import DistributedKVCache, KVCache
from kvlab.core.keys import KVSpec
from kvlab.engine.tiers import TieredCache
from kvlab.stores import FileStore, MemoryStore, RedisStore, Store, Value, WriteBehind
from tests.harness.helpers import SpyStore, small_spec
from tests.harness.learner import LEARNER

TIMEOUT_S = 30.0  # no test here is about deadlines, and test machines can be busy


@dataclass(frozen=True)
class StoreKind:
    """One implementation of `Store`: how it is made, and what is its own."""

    name: str
    make: Callable[..., Store]
    server: str = ""  # the RedisServer property with the address
    marks: tuple[Any, ...] = ()
    fixture: str = "redis_server"  # which server
    has_ttl: bool = False  # of a learner's store: it is made with a client, and with a TTL in seconds
    yields: frozenset[str] = frozenset()  # why a write may be dropped when another thread writes the same key

    def store(self, request: pytest.FixtureRequest, **settings: Any) -> Store:
        if self.server:
            settings["url"] = getattr(request.getfixturevalue(self.fixture), self.server)
        return self.make(**settings)


def _redis(**settings: Any) -> RedisStore:
    return RedisStore(deadline_s=TIMEOUT_S, **settings)


def _files(**settings: Any) -> FileStore:
    folder = tempfile.TemporaryDirectory(prefix="kvlab-files-")
    store = FileStore(Path(folder.name, "store"), deadline_s=TIMEOUT_S, **settings)
    weakref.finalize(store, folder.cleanup)
    return store


class Flushed(WriteBehind):
    """Writes behind, but done when the call returns: the suite asks what finished writes have counted."""

    def put_many(self, keys: Sequence[bytes], values: Sequence[Value], ttl_s: float | None = None) -> int:
        queued = super().put_many(keys, values, ttl_s)
        assert self.flush(TIMEOUT_S)
        return queued


MEMORY = StoreKind("memory", MemoryStore)
BEHIND = StoreKind(
    "write-behind",
    lambda **settings: Flushed(MemoryStore(**settings)),
    yields=frozenset({"collapsed", "deleted"}),  # in its queue a newer write or a delete comes before an older write
)
FILES = StoreKind("files", _files)
FAKEREDIS = StoreKind("fakeredis", _redis)
REDIS_TCP = StoreKind("redis-tcp", _redis, "url", (pytest.mark.redis,))
REDIS_UNIX = StoreKind("redis-unix", _redis, "unix_url", (pytest.mark.redis,))
REDIS_TLS = StoreKind("redis-tls", _redis, "tls_url", (pytest.mark.redis,), "tls_server")
VALKEY = StoreKind("valkey", _redis, "url", (pytest.mark.valkey,), "valkey_server")
CLUSTER = StoreKind("redis-cluster", _redis, "url", (pytest.mark.cluster,), "redis_cluster")
SENTINEL = StoreKind("redis-sentinel", _redis, "url", (pytest.mark.cluster,), "redis_sentinel")
STORES = (MEMORY, BEHIND, FILES, FAKEREDIS, REDIS_TCP, REDIS_UNIX, REDIS_TLS, VALKEY, CLUSTER, SENTINEL)


@dataclass(frozen=True)
class CacheKind:
    """One implementation of `KVCache` over one kind of store.

    `settings` are keyword arguments of `DistributedKVCache`; a learner's class takes none.
    """

    name: str
    make: Callable[..., KVCache]
    backing: StoreKind
    settings: dict[str, Any]

    def cache(self, store: Store, spec: KVSpec, **changes: Any) -> KVCache:
        return self.make(store=store, model=spec, **{**self.settings, **changes})


def _distributed_kinds() -> Iterator[CacheKind]:
    stores, precisions, blocks = (MEMORY, FAKEREDIS, REDIS_TCP), ("fp32", "fp16", "bf16"), (None, 16)
    for store, compress, precision, block in itertools.product(stores, (False, True), precisions, blocks):
        name = f"{store.name}-{precision}-{'zstd' if compress else 'raw'}-{block or 'default'}"
        settings = {"precision": precision, "compress": compress, "block_tokens": block}
        yield CacheKind(name, DistributedKVCache, store, settings)


DISTRIBUTED = tuple(_distributed_kinds())


def _tiered(store: Store, model: KVSpec, *, host_bytes: int, **settings: Any) -> TieredCache:
    return TieredCache(DistributedKVCache(store=store, model=model, **settings), host_bytes, **TIERS)


TIERS: dict[str, Any] = {"window_bytes": 16 << 10}  # so that loads have several windows
TIERED = tuple(
    CacheKind(f"tiered-{store.name}-{precision}-{room}", _tiered, store, {"precision": precision, "host_bytes": room})
    for store, precision, room in itertools.product((MEMORY, REDIS_TCP), ("fp32", "fp16"), (0, 1 << 20))
)


def _learners_store(c: type[Store]) -> Iterator[StoreKind]:
    """A learner's store: `cls()`, or `cls(client)` with a client of fakeredis, and with one of a real server."""
    if not _takes(c, "client"):
        yield StoreKind(f"impl-{c.__name__}", c)
        return
    for kind in (FAKEREDIS, REDIS_TCP):
        make = partial(_with_client, c)
        yield StoreKind(f"impl-{c.__name__}-{kind.name}", make, kind.server, kind.marks, has_ttl=_takes(c, "ttl_s"))


def _with_client(c: Callable[..., Store], url: str = "", client: redis.Redis | None = None, **settings: Any) -> Store:
    return c(client or client_of(url), **settings)


def client_of(url: str) -> redis.Redis:
    """A client of a server, or without a URL of a fakeredis of its own."""
    return redis.Redis.from_url(url, protocol=2, socket_timeout=TIMEOUT_S) if url else fakeredis.FakeRedis()


def _takes(c: Callable[..., object], *names: str) -> bool:
    return set(names) <= inspect.signature(c).parameters.keys()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`store_kind` and `cache_kind` run over everything; `own_…` only over what kvlab itself makes.

    `served_store_kind` runs over stores of one server, `ttl_store_kind` over stores with a TTL, and `set_cache_kind`
    over caches with a salt and a block size.
    """
    learner = metafunc.config.stash[LEARNER]
    stores = [kind for c in learner if issubclass(c, Store) for kind in _learners_store(c)]
    own = [c for c in learner if issubclass(c, KVCache)]
    caches = [CacheKind(f"impl-{c.__name__}-{k.name}", c, k, {}) for c in own for k in (MEMORY, REDIS_TCP)]
    every = {
        "store_kind": (*STORES, *stores),
        "own_store_kind": STORES,
        "served_store_kind": (REDIS_TCP, *(kind for kind in stores if kind.server)),
        "ttl_store_kind": (*STORES, *(kind for kind in stores if kind.has_ttl)),
        "cache_kind": (*DISTRIBUTED, *TIERED, *caches),
        "own_cache_kind": DISTRIBUTED,
        "set_cache_kind": (*DISTRIBUTED, *(kind for kind in caches if _takes(kind.make, "salt", "block_tokens"))),
    }
    for name, kinds in every.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, [pytest.param(k, id=k.name, marks=_marks(k)) for k in kinds])


def _marks(kind: StoreKind | CacheKind) -> tuple[Any, ...]:
    return kind.marks if isinstance(kind, StoreKind) else kind.backing.marks


@pytest.fixture
def store(store_kind: StoreKind, request: pytest.FixtureRequest) -> Iterator[Store]:
    """A fresh, empty store. After each test both sum rules must hold, open and closed."""
    made = store_kind.store(request)
    yield made
    made.stats().check()
    made.close()
    made.stats().check()


@pytest.fixture
def spec() -> KVSpec:
    """The model that the caches of this suite belong to."""
    return small_spec()


@pytest.fixture
def spy(cache_kind: CacheKind, request: pytest.FixtureRequest) -> Iterator[SpyStore]:
    """The store below the cache; it knows which keys were offered."""
    made = SpyStore(cache_kind.backing.store(request))
    yield made
    made.stats().check()
    made.close()


@pytest.fixture
def cache(cache_kind: CacheKind, spy: SpyStore, spec: KVSpec) -> Iterator[KVCache]:
    """A fresh cache over an empty store. After each test the sum rule must hold."""
    made = cache_kind.cache(spy, spec)
    yield made
    made.stats().check()
