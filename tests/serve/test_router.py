"""kvlab's router in Ray Serve's own routing loop, over replicas that are faked. No Ray is started."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from kvlab.core.keys import Namespace
from kvlab.engine.router import ROUTERS

pytestmark = pytest.mark.ray
NAMES = Namespace(bytes(32), "fp32", b"", 4)
PROMPT = list(range(1, 18))  # four blocks and a token
WAIT_S = 5.0


def replica(name, held=(), seq=1, running=0):
    from ray.serve._private.common import DeploymentID, ReplicaID

    async def get_queue_len(*, deadline_s):
        return running

    return SimpleNamespace(
        replica_id=ReplicaID(name, DeploymentID("kvlab", "kvlab")),
        node_id="node",
        availability_zone=None,
        multiplexed_model_ids=set(),
        max_ongoing_requests=8,
        get_queue_len=get_queue_len,
        replica_metadata={"root": NAMES.root.hex(), "block_tokens": 4},
        routing_stats={"seq": seq, "keys": [key[:8].hex() for key in NAMES.keys(held)]} if seq else {},
    )


def request(*args, method="generate", id="a"):
    from ray.serve._private.common import RequestMetadata
    from ray.serve.request_router import PendingRequest

    return PendingRequest(list(args), {}, RequestMetadata(id, id, call_method=method))


def made(kind, router="cost"):
    from ray.serve._private.common import DeploymentHandleSource, DeploymentID

    one = kind(DeploymentID("kvlab", "kvlab"), DeploymentHandleSource.UNKNOWN, use_replica_queue_len_cache=True)
    one.initialize_state(router=router)
    return one


async def send(one, pending, complete=False):
    """Route a request with Ray Serve's loop and tell the router, as Ray Serve does."""
    chosen = await asyncio.wait_for(one._choose_replica_for_request(pending), WAIT_S)
    one.on_request_routed(pending, chosen.replica_id, None)
    if complete:
        one.on_request_completed(chosen.replica_id, pending.metadata.internal_request_id)
    return chosen.replica_id.unique_id


@pytest.fixture
def router():
    from kvlab.serve.router import KVLabRouter

    return KVLabRouter


def test_a_request_goes_where_its_blocks_are_and_others_where_least_is_done(router):
    async def go():
        one = made(router)
        one.update_replicas([replica("a"), replica("b", held=PROMPT)])
        return [
            await send(one, request(PROMPT, 4, id="1")),
            await send(one, request(list(range(100, 117)), 4, id="2")),
            await send(one, request(list(range(200, 217)), 4, id="3"), complete=True),
        ]

    assert asyncio.run(go())[:2] == ["b", "a"]


def test_what_was_just_sent_is_expected_there_before_the_report_comes(router):
    async def go():
        one = made(router)
        one.update_replicas([replica("a", seq=0), replica("b", seq=0)])
        first = await send(one, request(PROMPT, 4, id="1"), complete=True)
        return first, [await send(one, request(PROMPT, 4, id=str(n)), complete=True) for n in range(2, 6)]

    first, others = asyncio.run(go())
    assert others == [first] * 4


def test_a_newer_report_replaces_an_older_one(router):
    async def go():
        one = made(router, "longest_prefix")
        one.update_replicas([replica("a", held=PROMPT), replica("b", held=PROMPT[:8])])
        before = await send(one, request(PROMPT, 4, id="1"), complete=True)
        one._index._clock = lambda: 1e12  # what is expected is forgotten
        one.update_replicas([replica("a", seq=2), replica("b", held=PROMPT[:8], seq=2)])
        return before, await send(one, request(PROMPT, 4, id="2"))

    assert asyncio.run(go()) == ("a", "b")


def test_requests_of_the_same_moment_are_spread_and_one_that_is_cancelled_leaves_no_load(router):
    async def go():
        one = made(router)
        one.update_replicas([replica("a", seq=0), replica("b", seq=0)])
        pending = [request(list(range(n, n + 17)), 4, id=str(n)) for n in range(100, 160, 20)]
        chosen = [await one.choose_replicas(one._replicas_list, each) for each in pending]
        pending[0].future.cancel()
        await asyncio.sleep(0.01)
        return [ranks[0][0].replica_id.unique_id for ranks in chosen], [c.load for c in one._balance.candidates({})]

    assert asyncio.run(go()) == (["a", "b", "a"], [6.0, 6.0])


def test_one_that_has_failed_comes_last(router):
    async def go():
        one = made(router)
        a = replica("a", held=PROMPT)
        one.update_replicas([a, replica("b")])
        a.routing_stats = {"failed": True}
        one.update_replicas([a, replica("b")])
        return await send(one, request(PROMPT, 4))

    assert asyncio.run(go()) == "b"


def test_a_full_replica_passes_the_request_on(router):
    async def go():
        one = made(router)
        one.update_replicas([replica("a", held=PROMPT, running=8), replica("b")])
        return await send(one, request(PROMPT, 4))

    assert asyncio.run(go()) == "b"


def test_one_that_is_gone_is_forgotten_with_its_load(router):
    async def go():
        one = made(router)
        a, b = replica("a", held=PROMPT), replica("b")
        one.update_replicas([a, b])
        assert await send(one, request(PROMPT, 4, id="1")) == "a"
        one.on_replica_actor_died(a.replica_id)
        assert [await send(one, request(PROMPT, 4, id=str(n))) for n in (2, 3)] == ["b", "b"]
        one.update_replicas([b, replica("c", seq=0)])
        assert [c.worker for c in one._balance.candidates({})] == [1, 2]
        one._index.check_integrity()
        return await send(one, request(list(range(100, 117)), 4, id="4"))

    assert asyncio.run(go()) == "c"


@pytest.mark.parametrize("args", [(), ("text", 4), ([10**12], 4), ([], None), (None, None)])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_call_with_nonsense_reaches_a_replica_which_says_so(router, name, args):
    async def go():
        one = made(router, name)
        one.update_replicas([replica("a"), replica("b")])
        return await send(one, request(*args)), await send(one, request(method="status", id="2"))

    assert set(asyncio.run(go())) <= {"a", "b"}


def test_a_router_that_raises_hangs_nobody_and_requests_go_in_turn():
    from tests.serve.routers import RaisingRouter

    async def go():
        one = made(RaisingRouter)
        one.update_replicas([replica("a"), replica("b")])
        return [await send(one, request(PROMPT, 4, id=str(n)), complete=True) for n in range(6)]

    went = asyncio.run(go())
    assert went.count("a") == went.count("b") == 3


def test_reports_that_cannot_be_used_hang_nobody(router):
    async def go():
        one = made(router)
        bad = replica("a")
        bad.routing_stats = {"seq": 1, "keys": ["no hex"]}
        one.update_replicas([bad, replica("b")])
        return await send(one, request(PROMPT, 4))

    assert asyncio.run(go()) in ("a", "b")
