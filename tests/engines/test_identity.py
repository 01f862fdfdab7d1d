"""What must not share blocks does not: other weights, salts, dtypes, block sizes, adapters, epochs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from kvlab.cache import describe
from kvlab.core.seals import Xxh3
from kvlab.stores import open_store
from kvlab.testbed.server import RedisServer

pytest.importorskip("vllm", reason="needs vLLM: make test-engines")

from kvlab.lab.engines import MODEL, ask, counted, engine, scheduler_of, transfer
from tests.engines.kit import PROMPTS

pytestmark = [pytest.mark.engines, pytest.mark.redis]


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same name and config whose second layer differs."""
    folder = tmp_path_factory.mktemp("other") / MODEL.name
    shutil.copytree(MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.1" in name and "k_proj" in name)
    weights[name] = -weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_another_model_under_the_same_name_has_no_hits(redis_server: RedisServer, other_weights: Path) -> None:
    with engine(model=str(other_weights)) as llm:
        right = ask(llm, PROMPTS)
    with engine(transfer(redis_server.url)) as llm:
        ours = ask(llm, PROMPTS)
    for cached in (False, True):
        with engine(transfer(redis_server.url), model=str(other_weights)) as llm:
            answers = ask(llm, PROMPTS)
        assert answers.tokens == right.tokens and (sum(answers.cached) > 900) == cached
    assert ours.tokens != right.tokens, "the models answer differently, so a shared block would show"


@pytest.mark.parametrize(
    "settings", [{"dtype": "bfloat16"}, {"block_size": 64}, {"prefix_caching_hash_algo": "sha256_cbor"}]
)
def test_other_settings_have_no_hits(redis_server: RedisServer, settings: dict[str, Any]) -> None:
    with engine(transfer(redis_server.url)) as llm:
        ask(llm, PROMPTS)
    with engine(transfer(redis_server.url), **settings) as llm:
        ask(llm, PROMPTS)
        assert counted("hit_tokens") == 0 and counted("requests", outcome="absent") == 3


def test_salts_share_nothing(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hits = []
    for salt in ("one", "two", "one"):
        monkeypatch.setenv("KVLAB_SALT", salt)
        with engine(transfer(redis_server.url)) as llm:
            ask(llm, PROMPTS)
            hits.append(counted("hit_tokens"))
            assert salt not in repr(vars(scheduler_of(llm)))
    assert hits[0] == hits[1] == 0 and hits[2] > 900


def test_encrypted_records(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLAB_KEYS", "1:" + "11" * 32)
    answers, outcomes = [], []
    for keys in ("1:" + "11" * 32, "1:" + "11" * 32, "1:" + "22" * 32, "1:" + "11" * 32):
        monkeypatch.setenv("KVLAB_KEYS", keys)
        with engine(transfer(redis_server.url, compress=True)) as llm:
            answers.append(ask(llm, PROMPTS).tokens)
            outcomes.append((counted("requests", outcome="hit"), counted("failed_blocks", reason="forged") > 0))
    assert answers == answers[:1] * 4
    assert outcomes[:3] == [(0, False), (3, False), (0, True)]


def test_a_reset_of_the_connector_reads_nothing_that_is_older(redis_server: RedisServer) -> None:
    with engine(transfer(redis_server.url)) as llm:
        first = ask(llm, PROMPTS)
        assert llm.llm_engine.reset_prefix_cache(reset_connector=True)
        assert ask(llm, PROMPTS).tokens == first.tokens and counted("hit_tokens") == 0
        assert llm.llm_engine.reset_prefix_cache()
        assert ask(llm, PROMPTS).tokens == first.tokens and counted("hit_tokens") > 900, "without the reset it hits"
    with engine(transfer(redis_server.url)) as llm:
        assert sum(ask(llm, PROMPTS).cached) > 900, "a new engine starts in the first epoch"


def test_the_namespace_is_described_in_the_store(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLAB_SALT", "tenant")
    with engine(transfer(redis_server.url)) as llm:
        ask(llm, PROMPTS[:1])
        space = scheduler_of(llm).space
    with open_store(redis_server.url) as store:
        (found,) = describe.read_all(store, Xxh3())
    assert found.engine.startswith("vllm 0.3") and found.layout
    assert found == replace(found, tenant="").of_tenant(b"tenant") and space.hex() not in found.to_bytes().decode()
    assert (found.model, found.precision, found.block_tokens) == ("pretrained", "float32", 32)
