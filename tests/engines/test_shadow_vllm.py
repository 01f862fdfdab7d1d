"""Shadow mode in vLLM: one wrong number in one block is found; intact blocks raise no alarm."""

from __future__ import annotations

import time

import numpy as np
import pytest

from kvlab.core import record
from kvlab.core.record import Format
from kvlab.testbed.server import RedisServer

pytest.importorskip("vllm", reason="needs vLLM: make test-engines")

from kvlab.lab.engines import ask, counted, engine, scheduler_of, transfer
from tests.engines.kit import PROMPTS, TEXT

pytestmark = [pytest.mark.engines, pytest.mark.redis]

MANY = [TEXT[i : i + 1500] for i in range(0, 30_000, 3000)]


def compared(llm: object) -> float:
    """Wait for the comparisons in the background, which are counted by later steps."""
    for _ in range(50):
        ask(llm, ["x"], new=1)  # type: ignore[arg-type]
        time.sleep(0.02)
    return counted("shadow_blocks")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_intact_blocks_raise_no_alarm(redis_server: RedisServer, dtype: str) -> None:
    settings = {"dtype": dtype, "kv_cache_memory_bytes": 128 << 20}
    with engine(transfer(redis_server.url), **settings) as llm:
        right = ask(llm, MANY)
    chunks = {"max_num_batched_tokens": 80, "max_num_seqs": 3}
    with engine(transfer(redis_server.url, shadow=1.0), **settings, **chunks) as llm:
        answers = ask(llm, MANY)
        assert counted("requests", outcome="shadow") == len(MANY) and counted("hit_tokens") == 0
        assert compared(llm) > 100 and counted("shadow_different") == 0
        if dtype == "float32":
            assert answers.tokens == right.tokens


def test_one_wrong_number_is_found(redis_server: RedisServer) -> None:
    client, fmt = redis_server.client(), Format("opaque")
    with engine(transfer(redis_server.url)) as llm:
        ask(llm, PROMPTS, new=1)  # no block of an answer is saved, because only those of prompts are compared
    names = sorted(client.scan_iter("kv:*", count=1000), key=client.strlen)
    with engine() as llm:
        right = ask(llm, PROMPTS)
    name = names[-1]
    elements = record.decode_opaque(client.get(name), name[3:], fmt, None).copy()
    numbers = elements.view(np.float32)
    numbers[2, 1234] += np.abs(numbers[2]).max() / 20
    client.set(name, b"".join(record.encode_opaque(elements, name[3:], fmt)))
    with engine(transfer(redis_server.url, shadow=1.0)) as llm:
        answers = ask(llm, PROMPTS)
        assert compared(llm) == len(names) - 1, "all but the description of the namespace"
        assert counted("shadow_different") == 1
        assert answers.tokens == right.tokens, "what was compared was not loaded"
        assert scheduler_of(llm).shadow.share == 1.0
    assert client.get(name) is not None, "the record stays, to be looked at"


def test_the_share_is_kept(redis_server: RedisServer) -> None:
    with engine(transfer(redis_server.url), kv_cache_memory_bytes=128 << 20) as llm:
        ask(llm, MANY)
    with engine(transfer(redis_server.url, shadow=0.3), kv_cache_memory_bytes=128 << 20) as llm:
        scheduler_of(llm).shadow._random.seed(1)
        for i in range(0, len(MANY), 2):
            ask(llm, MANY[i : i + 2])
        assert 1 <= counted("requests", outcome="shadow") < len(MANY)
        assert counted("requests", outcome="hit") == len(MANY) - counted("requests", outcome="shadow")
