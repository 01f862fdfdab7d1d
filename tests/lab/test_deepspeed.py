"""What is measured with DeepSpeed, on a stand-in for its engine. `alternatives/test_deepspeed` runs DeepSpeed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvlab import MemoryStore
from kvlab.errors import ConfigError, KVLabError
from kvlab.testbed.server import RedisServer

pytest.importorskip("transformers")

from kvlab.connectors.transformers import CachedModel
from kvlab.lab import deepspeed_engine, deepspeed_tries

pytestmark = pytest.mark.hf
ROOT = Path(__file__).parents[2]
TOKENS, BEGINNING = 200, 128  # 168 tokens are the same: two blocks of 64


@pytest.fixture(scope="module")
def plain() -> Any:
    return deepspeed_engine.load_plain()


def row_of(engine: Any, plain: Any, text: list[int], redis: str | None = None) -> dict[str, Any]:
    return deepspeed_engine.measure(engine, plain, text, TOKENS, 1, redis)[0]


def like_deepspeed(model: Any) -> SimpleNamespace:
    return SimpleNamespace(module=model, generate=model.generate)


# --- without DeepSpeed ----------------------------------------------------------------------------
def test_prompts_differ_in_the_question_alone(sample: list[int]) -> None:
    first, *others = itertools.islice(deepspeed_engine.prompts(sample, TOKENS), 40)
    same = TOKENS - deepspeed_engine.QUESTION
    questions = {tuple(prompt[0, same:].tolist()) for prompt in (first, *others)}
    assert all(prompt.shape == (1, TOKENS) and torch.equal(prompt[:, :same], first[:, :same]) for prompt in others)
    assert len(questions) == 40


def test_a_row_without_a_server_has_no_column_for_it(plain: Any, sample: list[int]) -> None:
    row = row_of(like_deepspeed(plain), plain, sample)
    assert (row["prompt_tokens"], row["cached_tokens"], row["same_tokens"]) == (TOKENS, BEGINNING, True)
    assert {name for name in row if name.endswith("_ms")} == {
        "plain_ms",
        "deepspeed_ms",
        "deepspeed_again_ms",
        "empty_ms",
        "memory_ms",
    }


@pytest.mark.redis
def test_plain_transformers_write_what_comes_out_of_redis(
    plain: Any, sample: list[int], redis_server: RedisServer
) -> None:
    row = row_of(like_deepspeed(plain), plain, sample, redis_server.url)
    assert row["same_tokens"] is True and row["redis_ms"] > 0 and row["speedup_redis"] > 0
    assert redis_server.client().dbsize() >= BEGINNING // 64


@pytest.mark.parametrize("wrong", ["engine", "module"])
def test_other_tokens_are_noticed(plain: Any, sample: list[int], wrong: str) -> None:
    def change_last(prompt: torch.Tensor, **settings: Any) -> torch.Tensor:
        output = plain.generate(prompt, **settings)
        output[:, -1] ^= 1
        return output

    engine = like_deepspeed(plain)
    if wrong == "engine":
        engine.generate = change_last
    else:
        engine.module = deepspeed_engine.load_plain()
        engine.module.lm_head.weight.data.neg_()  # other answers, under the connector alone
    assert row_of(engine, plain, sample)["same_tokens"] is False


@pytest.mark.parametrize("missing", [True, False])
def test_a_time_with_other_hits_is_no_measurement(plain: Any, sample: list[int], missing: bool) -> None:
    prompt = next(deepspeed_engine.prompts(sample, TOKENS))
    with CachedModel(plain, MemoryStore()) as cached:
        if not missing:
            cached.generate(prompt, max_new_tokens=1)
        ask = deepspeed_engine._checked(cached, BEGINNING if missing else 0)
        with pytest.raises(KVLabError, match=f"expected {BEGINNING if missing else 0} tokens from MemoryStore"):
            ask(prompt, max_new_tokens=1)


def test_before_each_prompt_its_blocks_are_deleted(plain: Any, sample: list[int]) -> None:
    with CachedModel(plain, MemoryStore()) as cached:
        source = deepspeed_engine.prompts(sample, TOKENS)
        for prompt in itertools.islice(deepspeed_engine._forgotten(cached, source), 3):
            cached.generate(prompt, max_new_tokens=1)
            assert (cached.last.cached_tokens, cached.last.saved_blocks) == (0, TOKENS // 64)


def test_without_deepspeed_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_engine, "find_spec", lambda name: None)
    with pytest.raises(KVLabError, match=r"needs DeepSpeed: sh scripts/setup\.sh --alternatives"):
        deepspeed_engine.run()


# --- a try ----------------------------------------------------------------------------------------
def test_a_try_that_works_says_what_it_gave() -> None:
    assert deepspeed_tries.attempt(lambda: "three blocks") == {"worked": True, "said": "three blocks", "where": ""}


def test_a_try_that_fails_names_the_line_that_refused() -> None:
    bench = deepspeed_tries.Bench(None, SimpleNamespace(), lambda: None)
    tried = deepspeed_tries.attempt(lambda: deepspeed_tries._around_engine(bench))
    assert not tried["worked"] and tried["said"].startswith("ConfigError: expected a causal LM of transformers")
    file, line = tried["where"].split(":")
    assert file == "kvlab/connectors/hf_models.py"
    assert "raise ConfigError" in (ROOT / file).read_text().splitlines()[int(line) - 1]


def test_errors_of_others_have_no_place_and_long_ones_are_cut() -> None:
    def refuse() -> str:
        raise ConfigError("x" * 5000)

    tried = deepspeed_tries.attempt(refuse)
    assert (tried["worked"], tried["where"]) == (False, "")
    assert len(tried["said"]) == deepspeed_tries.SAID + 2 and tried["said"].endswith("x …")


def test_the_committed_result_is_of_the_locked_version_and_has_every_try() -> None:
    result = json.loads((ROOT / "docs" / "results" / "deepspeed.json").read_text("utf-8"))
    assert f"deepspeed=={result['versions']['deepspeed']}" in (ROOT / "requirements-alternatives.lock").read_text()
    assert [row["prompt_tokens"] for row in result["rows"]] == list(deepspeed_engine.LENGTHS)
    assert all(row["same_tokens"] for row in result["rows"]) and result["same_fingerprint"]
    assert [row["name"] for row in result["tried"]] == list(deepspeed_tries.TRIES)
    assert result["about"] == deepspeed_engine.ABOUT
