"""The default engine: compiled, in bf16, with blocks of 128 tokens."""

from __future__ import annotations

import pytest

from kvlab.testbed.server import RedisServer

pytest.importorskip("vllm", reason="needs vLLM: make test-engines")

from kvlab.lab.engines import ask, counted, engine, transfer
from tests.engines.kit import PROMPTS

pytestmark = [pytest.mark.engines, pytest.mark.redis]


def test_compiled_bf16(redis_server: RedisServer) -> None:
    settings = {"dtype": "bfloat16", "enforce_eager": False, "block_size": 128}
    with engine(**settings) as llm:
        right = ask(llm, PROMPTS)
    for cached in (False, True):
        with engine(transfer(redis_server.url), **settings) as llm:
            answers = ask(llm, PROMPTS)
            assert answers.tokens == right.tokens and counted("failed_blocks") == 0
            assert (counted("hit_tokens") > 900) == cached
