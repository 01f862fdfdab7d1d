"""A replica as Ray Serve calls it, without Ray."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

import kvlab
from kvlab.engine.worker import KEY_BYTES, WorkerSettings
from kvlab.engine.workers import WorkerError
from kvlab.errors import ConfigError, InputError
from kvlab.serve import application
from kvlab.serve.replica import Replica
from tests.serve.kit import FragileReplica, prompts

(PROMPT,) = prompts(1)


@pytest.fixture(scope="module")
def replica():
    replica = Replica(WorkerSettings(pages=64).to_message(), 4)
    yield replica
    replica.__del__()


async def whole(replica, prompt, new):
    parts = [part async for part in replica.generate(prompt, new)]
    return [token for part in parts for token in part["tokens"]], parts[-1]["record"]


def test_it_answers_and_says_where_the_prompt_came_from(replica, model):
    first = asyncio.run(whole(replica, PROMPT, 20))
    second = asyncio.run(whole(replica, PROMPT, 20))
    assert first[0] == second[0] == kvlab.generate(model, PROMPT, 20).tokens
    assert first[1]["sources"] == {"computed": 300}
    assert second[1]["sources"] == {"device": 256, "computed": 44}


def test_a_router_learns_the_blocks_but_not_the_salt(replica):
    async def look():
        return await replica.record_replica_metadata(), [await replica.record_routing_stats() for _ in range(2)]

    family, reports = asyncio.run(look())
    names = replica.scheduler.pool.namespace
    assert family == {"root": names.root.hex(), "block_tokens": names.block_tokens}
    assert [report["seq"] for report in reports] == [1, 2]
    assert {key[:KEY_BYTES].hex() for key in names.keys(PROMPT)} <= set(reports[0]["keys"])


def test_closing_the_generator_takes_the_request_out(replica):
    async def leave():
        async with aclosing(replica.generate(PROMPT, 500)) as parts:
            await anext(parts)
            assert (await replica.status())["requests"] == 1
        assert (await replica.status())["requests"] == 0
        async with asyncio.timeout(30):
            while (await replica.status())["available_pages"] < 64:  # a save may hold some for a moment
                await asyncio.sleep(0.01)

    asyncio.run(leave())


def test_a_bad_prompt_is_an_input_error(replica):
    for prompt, new in (([], 4), ("text", 4), ([10**9], 4), ([1], 0), ([1], 10**6)):
        with pytest.raises(InputError):
            asyncio.run(whole(replica, prompt, new))


def test_a_scheduler_that_fails_ends_streams_and_the_health_check():
    replica = FragileReplica(WorkerSettings(pages=64).to_message(), 4)

    async def fail():
        await replica.check_health()
        async with aclosing(replica.generate(PROMPT, 500)) as parts:
            await anext(parts)
            await replica.break_scheduler()
            with pytest.raises(WorkerError, match="out of memory, says the test"):
                async for _ in parts:
                    pass
        with pytest.raises(WorkerError):
            await replica.check_health()
        assert await replica.record_routing_stats() == {"failed": True}

    asyncio.run(fail())
    replica.__del__()


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, {"replicas": 0}, "replicas as a whole number"),
        ({}, {"max_queued": True}, "max_queued as a whole number"),
        ({}, {"router": "best"}, "expected one of the routers round_robin"),
        ({"store": "http://127.0.0.1"}, {}, "http"),
        ({"precision": "fp12"}, {}, "fp12"),
    ],
)
def test_a_wrong_setting_is_said_before_anything_starts(settings, options, message):
    with pytest.raises(ConfigError, match=message):
        application(WorkerSettings(**settings), **options)
