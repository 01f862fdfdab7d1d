"""A failed load does not stop the step that loads: what this step computes is wrong, and must not be stored.

With a connector that loads in the step that computes the rest, the engine itself answers right, because vLLM
computes the request again. But what the step had computed on top of the missing block is stored with a valid
checksum, and a later engine believes it.
"""

from __future__ import annotations

import pytest

from kvlab.testbed.server import RedisServer

pytest.importorskip("vllm", reason="needs vLLM: make test-engines")

from kvlab.lab.engines import Answers, ask, engine, transfer
from tests.engines.kit import TEXT

pytestmark = [pytest.mark.engines, pytest.mark.redis]

SHORT, LONG = [TEXT[:1000]], [TEXT[:2000]]
NAIVE = {"name": "NaiveConnector", "module": "kvlab.lab.naive_connector"}
CONNECTORS = {"naive": NAIVE, "kvlab": {}}


@pytest.fixture(scope="module")
def right() -> Answers:
    with engine() as llm:
        return ask(llm, LONG)


def stored_then_damaged(server: RedisServer, which: dict[str, str]) -> None:
    """Store the blocks of the short prompt, and flip a bit of each."""
    with engine(transfer(server.url, **which)) as llm:
        ask(llm, SHORT)
    client = server.client()
    for key in client.scan_iter("kv:*", count=1000):
        value = client.get(key)
        client.set(key, value[:-1] + bytes([value[-1] ^ 1]))


def answers_of_fresh_engines(server: RedisServer, which: dict[str, str], count: int) -> list[Answers]:
    answers = []
    for _ in range(count):
        with engine(transfer(server.url, **which)) as llm:
            answers.append(ask(llm, LONG))
    return answers


def test_a_naive_connector_poisons_the_store(redis_server: RedisServer, right: Answers) -> None:
    stored_then_damaged(redis_server, NAIVE)
    answers = answers_of_fresh_engines(redis_server, NAIVE, 3)
    assert answers[0].tokens == right.tokens, "the engine whose load failed answers right"
    assert answers[2].tokens != right.tokens, "a later one does not"


def test_this_connector_does_not(redis_server: RedisServer, right: Answers) -> None:
    stored_then_damaged(redis_server, {})
    answers = answers_of_fresh_engines(redis_server, {}, 4)
    assert [a.tokens for a in answers] == [right.tokens] * 4
    assert answers[0].cached == [0] and answers[1].cached[0] > 600, "the damaged blocks were repaired"
