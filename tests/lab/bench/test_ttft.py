"""`bench ttft` measures what it names: each contender gets its prefix from one tier, and gives the same token."""

from __future__ import annotations

import itertools
import json

import pytest

from kvlab.cache import DistributedKVCache
from kvlab.engine.generate import generate
from kvlab.lab.bench import ttft
from kvlab.model import Tokenizer, held_out_tokens
from kvlab.stores import MemoryStore
from kvlab.testbed.server import RedisServer


@pytest.mark.redis
def test_bench_ttft_reports_every_tier_and_leaves_no_record(redis_server: RedisServer) -> None:
    result = ttft.run(redis_server.url, (64, 192), rounds=1)
    assert [row["prefix_tokens"] for row in result["rows"]] == [64, 192]
    assert all(min(row.values()) > 0 for row in [*result["rows"], *result["others"].values()])
    assert set(result["others"]) == set(ttft.OTHERS)
    small, large = (row["bytes"] for row in result["rows"])
    assert 2.9 < large / small < 3.1 and small > 64 * 3072
    assert redis_server.client().dbsize() == 0
    json.dumps(result)


@pytest.mark.redis
def test_each_contender_gets_its_prefix_from_its_tier(redis_server: RedisServer) -> None:
    model, prompt = ttft.model_for(100), held_out_tokens(Tokenizer())[: 192 + ttft.SUFFIX]
    plain = generate(model, prompt, 1).tokens
    with ttft._tiers(model, prompt, redis_server.url, "fp32", False) as (host, redis):
        for cache, source in ((host, "host"), (redis, "store")):
            result = ttft._first_token(model, prompt, cache, ttft._pool(model, prompt))
            assert (result.tokens, result.sources) == (plain, {source: 192})
        for scattered in (False, True):
            result = ttft._device(model, prompt, host.namespace, scattered)()
            assert (result.tokens, result.sources) == (plain, {"device": 192})


@pytest.mark.parametrize("scattered", [False, True])
def test_scattered_pages_have_no_neighbours(scattered: bool) -> None:
    model, prompt = ttft.model_for(100), held_out_tokens(Tokenizer())[:144]
    names = DistributedKVCache(store=MemoryStore(), model=model).namespace
    pool = ttft._device(model, prompt, names, scattered).args[3]  # type: ignore[attr-defined]
    pages = [page for block in pool.index.blocks.values() for page in block.pages]
    assert any(b == a + 1 for a, b in itertools.pairwise(pages)) != scattered


def test_a_model_for_a_longer_context_is_the_same_model() -> None:
    longer = ttft.model_for(5000)
    assert longer.config.max_position_embeddings == 5000
    assert generate(longer, [5, 6, 7], 4).tokens == generate(ttft.model_for(10), [5, 6, 7], 4).tokens
