"""Fixtures of the fault tests: the book, servers and clusters that a test may harm, a cache that has saved."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import redis

from kvlab.cache import DistributedKVCache
from kvlab.stores import RedisStore
from kvlab.testbed.cluster import RedisCluster
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.sentinel import RedisSentinel
from kvlab.testbed.server import RedisServer
from tests.faults.book import Book, Row, open_book, record
from tests.faults.clusters import agree, ask_sentinel, awake, client_at, heal, masters
from tests.faults.kit import BLOCKS, KV, LONG_S, TOKENS, cache_over, check_sums, wait_for
from tests.faults.tiny import prompt
from tests.harness.helpers import FakeClock

ROWS = pytest.StashKey[list[Row]]()


@pytest.fixture
def book(request: pytest.FixtureRequest) -> Book:
    """Opens a row of the test's number; it is kept when the block ends without an error."""
    numbers = [mark.kwargs["number"] for mark in request.node.iter_markers("fault")]
    return open_book(numbers, request.config.stash.setdefault(ROWS, []))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep this run's rows, if that was asked for."""
    new = session.config.stash.get(ROWS, [])
    if new and os.environ.get("KVLAB_RECORD"):
        record(new)


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server that the test may stop and kill."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def client(redis_server: RedisServer) -> redis.Redis:
    """Somebody else who may write to the same server."""
    return redis_server.client()


@pytest.fixture
def cache(redis_server: RedisServer, clock: FakeClock) -> Iterator[DistributedKVCache]:
    """A cache that has saved all blocks."""
    with cache_over(RedisStore(redis_server.url, deadline_s=LONG_S, clock=clock)) as made:
        assert made.save(TOKENS, KV) == BLOCKS
        yield made
        check_sums(made)


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[FaultProxy]:
    """The way to a server that is well."""
    with FaultProxy(redis_server.port, seed=1) as made:
        prompt(made)
        yield made


@pytest.fixture(scope="package")
def harmed() -> Iterator[RedisCluster]:
    """Three masters with a replica each, whose faults stop no other shard; use `cluster`."""
    with RedisCluster() as made:
        yield made


@pytest.fixture
def cluster(harmed: RedisCluster) -> Iterator[RedisCluster]:
    """An empty cluster in its right mind. A test may stop and kill what it likes, and leave it so."""
    heal(harmed)
    for port in masters(harmed):
        client_at(port).flushall()  # which also lets replicas be known: one that has copied nothing is not told of
    wait_for(lambda: agree(harmed), 60)
    yield harmed


@pytest.fixture(scope="package")
def groups() -> Iterator[list[RedisSentinel]]:
    """The group that is in use, if any; use `group`."""
    with contextlib.ExitStack() as stack:
        used: list[RedisSentinel] = []
        yield used
        for each in used:
            stack.push(each)


@pytest.fixture
def group(groups: list[RedisSentinel]) -> RedisSentinel:
    """A master with two replicas, all in sync, and three sentinels. A test may kill nodes, and hang anything."""
    if not groups:
        groups.append(RedisSentinel().__enter__())
    made = groups[0]
    awake([*made.nodes, *made.sentinels])
    agreed = lambda: {int(ask_sentinel(s, "GET-MASTER-ADDR-BY-NAME")[1]) for s in made.sentinels}  # noqa: E731
    wait_for(lambda: len(agreed()) == 1, 60)
    (master,) = agreed()
    for node in made.nodes:  # what the sentinels would do too, after eight seconds
        client = client_at(node.port)
        told = client.info("replication")
        if node.port != master and (told["role"] == "master" or told["master_port"] != master):
            client.replicaof("127.0.0.1", master)
    made.wait_until_ok()
    client_at(master).flushall()
    return made
