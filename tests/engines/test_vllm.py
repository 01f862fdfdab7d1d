"""vLLM with the connector: the same tokens as without, whatever the store does."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kvlab.core import record
from kvlab.core.record import Format
from kvlab.testbed.server import RedisServer

pytest.importorskip("vllm", reason="needs vLLM: make test-engines")

from kvlab.lab.engines import Answers, ask, counted, engine, scheduler_of, transfer
from tests.engines.kit import PROMPTS

pytestmark = [pytest.mark.engines, pytest.mark.redis]


@pytest.fixture(scope="module")
def plain() -> Answers:
    """What the engine answers without a connector."""
    with engine() as llm:
        answers = ask(llm, PROMPTS)
    assert len({tuple(tokens) for tokens in answers.tokens}) == len(PROMPTS), "the answers depend on the prompts"
    return answers


@pytest.fixture
def stored(redis_server: RedisServer, plain: Answers) -> RedisServer:
    """A store that a first engine has filled."""
    with engine(transfer(redis_server.url)) as llm:
        assert ask(llm, PROMPTS).tokens == plain.tokens
        assert counted("requests", outcome="absent") == 3 and counted("hit_tokens") == 0
    return redis_server


def blocks(server: RedisServer) -> list[bytes]:
    """The keys of blocks; descriptions are smaller."""
    client = server.client()
    return [key for key in client.scan_iter("kv:*", count=1000) if client.strlen(key) > 10_000]


def intact(key: bytes, value: bytes) -> bool:
    """Whether a value is an intact record; recomputed numbers may differ by rounding."""
    return record.decode_opaque(value, key, Format("opaque"), None).size > 0


def test_a_fresh_engine_answers_from_what_another_stored(stored: RedisServer, plain: Answers) -> None:
    with engine(transfer(stored.url)) as llm:
        answers = ask(llm, PROMPTS)
        assert answers.tokens == plain.tokens
        assert all(n >= 12 * 32 for n in answers.cached), answers.cached
        assert counted("requests", outcome="hit") == 3
        assert counted("hit_tokens") == sum(answers.cached)
        assert counted("loaded_blocks") == sum(answers.cached) // 32 and counted("failed_blocks") == 0
        again = ask(llm, PROMPTS)
        assert again.tokens == plain.tokens
        assert counted("requests", outcome="local") == 3, "the device has these blocks now"
        assert counted("hit_tokens") == sum(answers.cached), "they are not hits of the store"


def test_loaded_bytes_are_used(stored: RedisServer, plain: Answers) -> None:
    """A control: the records of one prompt, resealed under the keys of another, are believed."""
    client, fmt = stored.client(), Format("opaque")
    names = sorted(blocks(stored))
    values = [record.decode_opaque(client.get(name), name[3:], fmt, None).copy() for name in names]
    for name, value in zip(names, values[1:] + values[:1], strict=True):
        client.set(name, b"".join(record.encode_opaque(value, name[3:], fmt)))
    with engine(transfer(stored.url)) as llm:
        answers = ask(llm, PROMPTS)
        assert answers.tokens != plain.tokens and counted("failed_blocks") == 0


def test_damaged_records_are_computed_and_repaired(stored: RedisServer, plain: Answers) -> None:
    client = stored.client()
    names = blocks(stored)
    good = {name: client.get(name) for name in names}
    for i, name in enumerate(names):
        value = good[name]
        at = 200 + 1009 * i % (len(value) - 200)
        client.set(name, value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :])
    with engine(transfer(stored.url)) as llm:
        # The third prompt begins like the first. A reader deletes a damaged record, so beside the first one it may find
        # that record damaged, gone or repaired.
        tokens = ask(llm, PROMPTS[:2]).tokens
        assert counted("requests", outcome="refused") == 2 and counted("hit_tokens") == 0
        tokens += ask(llm, PROMPTS[2:]).tokens
        assert tokens == plain.tokens and counted("failed_blocks", reason="checksum") > 30
    with engine(transfer(stored.url)) as llm:
        assert ask(llm, PROMPTS).tokens == plain.tokens
        assert counted("failed_blocks") == 0 and counted("requests", outcome="hit") == 3
    assert all(intact(name[3:], client.get(name)) for name in names)


@pytest.mark.parametrize("which", ["first", "middle", "last"])
def test_one_damaged_block_of_a_prompt(stored: RedisServer, plain: Answers, which: str) -> None:
    with engine(transfer(stored.url)) as llm:
        side = scheduler_of(llm)
        seen: list[bytes] = []
        original = side.store.touch_many
        side.store.touch_many = lambda keys: (seen.extend(keys), original(keys))[1]
        ask(llm, PROMPTS[:1])
    key = b"kv:" + seen[{"first": 0, "middle": len(seen) // 2, "last": -1}[which]]
    client = stored.client()
    value = client.get(key)
    client.set(key, value[:-1] + bytes([value[-1] ^ 1]))
    with engine(transfer(stored.url)) as llm:
        answers = ask(llm, PROMPTS[:1])
        assert answers.tokens == plain.tokens[:1]
        assert counted("failed_blocks", reason="checksum") == 1
        assert counted("requests", outcome="refused" if which == "first" else "partial") == 1
    assert intact(key[3:], client.get(key)), "repaired"


def test_a_store_that_never_answers(plain: Answers) -> None:
    with engine(transfer("redis://127.0.0.1:9")) as llm:
        assert ask(llm, PROMPTS).tokens == plain.tokens
        assert counted("requests", outcome="failed") == 3 and counted("hit_tokens") == 0
        assert ask(llm, [p[1:] for p in PROMPTS]).cached == plain.cached


def test_a_store_that_is_killed_while_requests_run(stored: RedisServer, plain: Answers) -> None:
    with RedisServer() as server:
        with engine(transfer(server.url)) as llm:
            assert ask(llm, PROMPTS).tokens == plain.tokens
        with engine(transfer(server.url)) as llm:
            answers = ask(llm, PROMPTS, after=lambda step: server.kill() if step == 1 else None)
            assert answers.tokens == plain.tokens


def test_a_hung_store_costs_one_deadline(stored: RedisServer, plain: Answers) -> None:
    with engine(transfer(stored.url)) as llm:
        side = scheduler_of(llm)
        with stored.paused():
            assert ask(llm, PROMPTS).tokens == plain.tokens
            first = counted("held_seconds")
            assert not side.gate.open
            assert ask(llm, [p[1:] for p in PROMPTS]).cached == plain.cached
            assert counted("held_seconds") == first, "nothing was asked again"
            assert counted("lookup_seconds") >= side.store.deadline_s > 0
        wait_until(lambda: side.gate.open)
        assert ask(llm, [PROMPTS[1][3:], PROMPTS[0]]).tokens[1] == plain.tokens[0]


def test_a_hang_between_look_up_and_load(stored: RedisServer, plain: Answers) -> None:
    with engine(transfer(stored.url)) as llm:
        side = scheduler_of(llm)
        original = side.admitted

        def hang_then_admit(*arguments: Any) -> None:
            stored.stop()
            original(*arguments)

        side.admitted = hang_then_admit
        try:
            assert ask(llm, PROMPTS).tokens == plain.tokens
        finally:
            stored.cont()
        assert counted("failed_blocks", reason="timeout") > 0 and not side.gate.open
        assert counted("requests", outcome="failed") == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 64, "max_num_seqs": 2},
        {"enable_prefix_caching": False},
        {"kv_cache_memory_bytes": 26 * 32 * 6144, "max_model_len": 800},
        {"async_scheduling": False},
        {"block_size": 128},
    ],
    ids=["chunked prefill", "no prefix caching", "preemption", "no async scheduling", "large blocks"],
)
def test_other_settings(redis_server: RedisServer, plain: Answers, settings: dict[str, Any]) -> None:
    answers = []
    for _ in range(2):
        with engine(transfer(redis_server.url), **settings) as llm:
            answers.append(ask(llm, PROMPTS))
            assert counted("failed_blocks") == counted("dropped_blocks") == 0
    assert [a.tokens for a in answers] == [plain.tokens] * 2
    assert sum(answers[1].cached) >= 3 * 384 - 3 * 128


def wait_until(holds: Any, timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
