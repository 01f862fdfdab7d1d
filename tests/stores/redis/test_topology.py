"""One server that has all keys: the simplest topology."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import AskError, MovedError

from kvlab.stores import RedisStore
from kvlab.stores.deadline import Deadline
from kvlab.stores.faults import Reason
from kvlab.stores.redis.node import Node
from kvlab.stores.redis.pool import Pool
from kvlab.stores.redis.topology import Shard, SingleServer, SubBatch
from tests.stores.redis.scripted import LONG_S, Many, opened


@pytest.fixture
def alone() -> SingleServer:
    return SingleServer(Node("alone", Pool("redis://127.0.0.1:1", 1), 1))


@given(names=st.lists(st.binary(max_size=8), max_size=20), reading=st.booleans())
def test_one_server_gets_the_whole_batch(names: list[bytes], reading: bool) -> None:
    alone = SingleServer(Node("alone", Pool("redis://127.0.0.1:1", 1), 1))
    (part,), unserved = alone.split(names, Deadline(LONG_S), reading)
    assert (part.node.name, list(part.indices), part.asking) == ("alone", list(range(len(names))), False)
    assert unserved is None


def test_there_is_nothing_to_find_out(alone: SingleServer) -> None:
    shards = alone.refresh(Deadline(0))
    assert len(shards) == len(alone.shards()) == 1 and shards[0].replicas == ()
    assert (alone.unserved(), alone.multi_node, alone.health_commands, alone.faults) == (0, False, (), {})
    assert alone.hint(set(Reason)) is None  # nothing is asked again


def test_redirects_are_not_followed(alone: SingleServer) -> None:
    part = SubBatch(alone.shards()[0].master, [0, 1])
    assert alone.redirect(part, [MovedError("1 127.0.0.1:7000"), AskError("1 127.0.0.1:7000")]) == []


def test_two_shards_are_never_the_same_though_their_servers_are(alone: SingleServer) -> None:
    node = alone.shards()[0].master
    assert Shard(node) != Shard(node) and len({Shard(node), Shard(node)}) == 2


def test_closing_closes_its_server() -> None:
    with Many(1) as many, opened(f"redis://{many.address(0)}", RedisStore) as store:
        store.get_many([b"a"])
        (connection,) = store.nodes[0].pool._idle
        assert connection.is_connected
        store._topology.close()
        assert not connection.is_connected
