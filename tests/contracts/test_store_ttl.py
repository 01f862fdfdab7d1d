"""What every store with a TTL does: entries end, and each use refreshes them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import redis

from kvlab.stores import RedisStore, Store
from kvlab.stores.redis.pool import FakePool
from tests.contracts.conftest import BEHIND, FAKEREDIS, FILES, MEMORY, REDIS_TCP, REDIS_UNIX, StoreKind, client_of
from tests.contracts.test_store import EXPIRY_BOUND_S, buffers, named
from tests.harness.helpers import FakeClock


@dataclass
class Aging:
    """A store with a TTL, and a way to let its entries grow older without waiting."""

    store: Store
    age: Callable[[float], None]


def plain_client(store: RedisStore) -> redis.Redis | redis.RedisCluster:
    """A client that sees what the store sees."""
    link = store.nodes[0].pool if store.nodes else None
    if isinstance(link, FakePool):
        return link._client
    if store.url.startswith("redis-cluster"):
        return redis.RedisCluster.from_url(store.url.replace("redis-cluster", "redis").partition(",")[0])
    if store.url.startswith("redis-sentinel"):
        return redis.Redis.from_url(f"redis://{store.nodes[0].name}")
    return redis.Redis.from_url(store.url)


def _age_keys(client: redis.Redis | redis.RedisCluster, seconds: float) -> None:
    """Shorten what is left of every key's life, as so much passing time would."""
    for key in client.scan_iter():
        left = client.pttl(key) - round(seconds * 1000)
        client.pexpire(key, left) if left > 0 else client.delete(key)


def _advance(clock: FakeClock, seconds: float) -> None:
    clock.now += seconds


@pytest.fixture
def aging(ttl_store_kind: StoreKind, request: pytest.FixtureRequest) -> Iterator[Aging]:
    """Each store with a TTL of 100 seconds."""
    kind = ttl_store_kind
    if kind in (MEMORY, BEHIND, FILES):
        clock = FakeClock()
        made = Aging(kind.make(ttl_s=100, clock=clock), lambda s: _advance(clock, s))
    elif kind.has_ttl:
        client = client_of(getattr(request.getfixturevalue(kind.fixture), kind.server) if kind.server else "")
        made = Aging(kind.make(client=client, ttl_s=100), lambda s: _age_keys(client, s))
    else:
        store = kind.store(request, ttl_s=100)
        made = Aging(store, lambda s: _age_keys(plain_client(store), s))
    yield made
    made.store.stats().check()
    made.store.close()


def test_entries_end_with_their_ttl(aging: Aging) -> None:
    store = aging.store
    store.put_many([b"a", b"b"], [b"one", b"two"])
    aging.age(60)
    store.put_many([b"b"], [b"new"])
    assert store.probe([b"a", b"b"]) == 2
    aging.age(60)
    assert store.probe([b"a"]) == 0
    assert store.get_many([b"a", b"b"]) == [None, b"new"]
    assert store.stats().misses == Counter(absent=1)
    assert store.delete_many([b"a"]) == 0


def test_a_hit_renews_the_ttl(aging: Aging) -> None:
    store = aging.store
    store.put_many([b"read", b"probed"], [b"one", b"two"])
    for _ in range(3):
        aging.age(60)
        assert store.get_many([b"read"]) == [b"one"]
        store.probe([b"probed"])
    assert store.get_many([b"read", b"probed"]) == [b"one", None]


def test_a_read_renews_every_hit_of_its_batch(aging: Aging) -> None:
    store = aging.store
    keys, values = named(100)
    store.put_many(keys, values)
    aging.age(60)
    store.get_many(keys, buffers(*[32] * 100))
    aging.age(60)
    assert store.get_many(keys) == values


def test_a_touch_renews_the_ttl(aging: Aging) -> None:
    store = aging.store
    store.put_many([b"touched", b"left"], [b"one", b"two"])
    for _ in range(3):
        aging.age(60)
        store.touch_many([b"touched"])
    assert store.touch_many([b"touched", b"left"]) == [True, False]
    assert store.get_many([b"touched", b"left"]) == [b"one", None]


def test_without_ttl_entries_stay(own_store_kind: StoreKind, request: pytest.FixtureRequest) -> None:
    clock = FakeClock()
    settings = {"clock": clock} if own_store_kind in (MEMORY, BEHIND, FILES) else {}
    with own_store_kind.store(request, **settings) as store:
        store.put_many([b"a"], [b"one"])
        _advance(clock, 1e9)
        assert store.get_many([b"a"]) == [b"one"]
        if isinstance(store, RedisStore):
            assert plain_client(store).pttl(b"kv:a") == -1


@pytest.mark.parametrize(
    "kind", [pytest.param(k, id=k.name, marks=k.marks) for k in (FAKEREDIS, REDIS_TCP, REDIS_UNIX)]
)
def test_the_server_itself_ends_entries(kind: StoreKind, request: pytest.FixtureRequest) -> None:
    with kind.store(request, ttl_s=0.2) as store:
        store.put_many([b"a"], [b"one"])
        give_up = time.monotonic() + EXPIRY_BOUND_S
        while store.probe([b"a"]) and time.monotonic() < give_up:
            time.sleep(0.05)
        assert store.get_many([b"a"]) == [None]


# --- a TTL per value ----------------------------------------------------------------------------
