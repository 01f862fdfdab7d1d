"""Tiers over a real server that is killed, hangs or is slow; and an engine that is killed."""

from __future__ import annotations

import threading
import time

import pytest

from kvlab.cache import DistributedKVCache
from kvlab.engine import generate
from kvlab.engine.pages import PagePool
from kvlab.engine.tiers import TieredCache
from kvlab.lab.losses import lost_blocks
from kvlab.stores import RedisStore
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import RedisServer
from tests.engine.test_tiers import MODEL, words

D = 0.5  # the deadline of a call


def tiered(url: str, host_bytes: int = 0, wait_s: float | None = None) -> TieredCache:
    store = RedisStore(url, deadline_s=D)
    inner = DistributedKVCache(store=store, model=MODEL, precision="fp32", compress=False, block_tokens=16)
    return TieredCache(inner, host_bytes, planner=False, window_bytes=1, wait_s=wait_s)


@pytest.mark.redis
@pytest.mark.parametrize("fault", ["killed", "hangs", "resets"])
def test_a_server_that_fails_while_it_sends_changes_no_token_and_costs_one_deadline(fault: str) -> None:
    """Eight windows, of which the third meets the fault."""
    prompt = words(8 * 16 + 5)
    plain = generate(MODEL, prompt, 4, stop_at_eos=False).tokens
    with RedisServer() as server, FaultProxy(server.port) as proxy:
        with tiered(server.url) as cache:
            generate(MODEL, prompt, 1, cache)
        with tiered(proxy.url) as cache:
            pool = PagePool(MODEL, 20)
            assert generate(MODEL, prompt, 4, cache, stop_at_eos=False, pool=pool).sources == {"store": 128}
            record = cache.stats().bytes_read // 8
            proxy.bandwidth = record / 0.05
            faults = {
                "killed": server.kill,
                "hangs": lambda: setattr(proxy, "blackhole", True),
                "resets": lambda: proxy.truncate(1, reset=True),
            }
            timer = threading.Timer(0.12, faults[fault])
            timer.start()
            begin = time.monotonic()
            result = generate(MODEL, prompt, 4, cache, stop_at_eos=False, pool=pool)
            took = time.monotonic() - begin
            timer.join()
            assert result.tokens == plain and result.cached_tokens < 128
            assert took < 10 * D
            pool.check_integrity()
            cache.host.check_integrity()
            cache.stats().check()
            assert sum(cache.stats().misses.values()) == 8 - result.cached_tokens // 16


@pytest.mark.redis
def test_who_waits_for_a_slow_server_no_longer_than_wait_s_gets_the_blocks_next_time(redis_server: RedisServer) -> None:
    prompt = words(8 * 16 + 5, seed=4)
    with tiered(redis_server.url) as cache:
        plain = generate(MODEL, prompt, 4, cache, stop_at_eos=False).tokens
        record = cache.stats().bytes_written // 8
    with FaultProxy(redis_server.port) as proxy, tiered(proxy.url, host_bytes=1 << 20, wait_s=0) as cache:
        proxy.bandwidth = record / 0.02
        sources = []
        for _ in range(30):
            result = generate(MODEL, prompt, 4, cache, stop_at_eos=False)
            assert result.tokens == plain
            sources.append(result.sources)
            if result.sources == {"host": 128}:
                break
        assert sources[0] != {"store": 128} and sources[-1] == {"host": 128}


@pytest.mark.redis
@pytest.mark.slow
def test_what_a_killed_engine_loses_is_what_its_write_policy_says(redis_server: RedisServer) -> None:
    through, back, selective = (lost_blocks(redis_server.url, write) for write in ("through", "back", "selective"))
    assert through["lost"] == 0
    assert back["stored"] == 0
    assert selective["stored"] == 2  # the blocks that all prompts share
    behind = lost_blocks(redis_server.url, "through", behind=True)
    assert 0 <= behind["lost"] < through["blocks"]
