"""What must not share blocks does not: other weights, salts, dtypes, block sizes, adapters, epochs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from kvlab.cache import describe
from kvlab.core import record
from kvlab.core.record import Format
from kvlab.core.seals import AesGcm, Xxh3
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


def test_other_weights_in_the_same_folder_have_no_hits(
    redis_server: RedisServer, other_weights: Path, tmp_path: Path
) -> None:
    """They are written over those of an engine that runs, which goes on with its own; later the old ones come back."""
    folder = tmp_path / MODEL.name
    shutil.copytree(MODEL, folder)
    file, old = folder / "model.safetensors", (MODEL / "model.safetensors").read_bytes()
    with engine(model=str(other_weights)) as llm:
        right = ask(llm, PROMPTS)
    with engine(transfer(redis_server.url), model=str(folder)) as llm:
        ours = ask(llm, PROMPTS)
        file.write_bytes((other_weights / file.name).read_bytes())
        assert llm.llm_engine.reset_prefix_cache()
        assert ask(llm, PROMPTS).tokens == ours.tokens and counted("hit_tokens") > 900
    for cached in (False, True):
        with engine(transfer(redis_server.url), model=str(folder)) as llm:
            answers = ask(llm, PROMPTS)
        assert answers.tokens == right.tokens and (sum(answers.cached) > 900) == cached
    assert ours.tokens != right.tokens, "the models answer differently, so a shared block would show"
    file.write_bytes(old)
    with engine(transfer(redis_server.url), model=str(folder)) as llm:
        answers = ask(llm, PROMPTS)
    assert answers.tokens == ours.tokens and sum(answers.cached) > 900


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
    """Who lacks the key computes, and overwrites; who has it, also as the old one of two, hits."""
    ours, strange, both = "1:" + "11" * 32, "1:" + "22" * 32, f"1:{'11' * 32},2:{'22' * 32}"
    answers = []
    for keys, hits, refused in (
        (ours, 0, ""),
        (ours, 3, ""),
        (strange, 0, "forged"),
        (ours, 0, "forged"),
        (both, 3, ""),
        ("", 0, "key_id"),
    ):
        monkeypatch.setenv("KVLAB_KEYS", keys) if keys else monkeypatch.delenv("KVLAB_KEYS")
        with engine(transfer(redis_server.url, compress=True)) as llm:
            answers.append(ask(llm, PROMPTS).tokens)
            assert counted("requests", outcome="hit") == hits, keys
            assert counted("failed_blocks") == counted("failed_blocks", reason=refused or "forged"), keys
            assert (counted("failed_blocks") > 0) == bool(refused), keys
    assert answers == answers[:1] * 6


def test_forged_records_are_refused_by_who_has_keys(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Valid records of other prompts' bytes; `test_vllm.py` shows that without keys they are believed."""
    monkeypatch.setenv("KVLAB_KEYS", "1:" + "11" * 32)
    with engine(transfer(redis_server.url)) as llm:
        right = ask(llm, PROMPTS)
    client, ours = redis_server.client(), Format("opaque", seal=AesGcm({1: b"\x11" * 32}))
    names = sorted(name for name in client.scan_iter("kv:*", count=1000) if client.strlen(name) > 10_000)
    values = [record.decode_opaque(client.get(name), name[3:], ours, None).copy() for name in names]
    assert len(names) > 30
    for i, (name, value) in enumerate(zip(names, values[1:] + values[:1], strict=True)):
        seal = (Xxh3(), AesGcm({1: b"\x22" * 32}))[i % 2]
        client.set(name, b"".join(record.encode_opaque(value, name[3:], Format("opaque", seal=seal))))
    with engine(transfer(redis_server.url)) as llm:
        answers = ask(llm, PROMPTS)
        assert answers.tokens == right.tokens and counted("requests", outcome="hit") == 0
        assert counted("failed_blocks", reason="key_id") > 0 < counted("failed_blocks", reason="forged")
    with engine(transfer(redis_server.url)) as llm:
        answers = ask(llm, PROMPTS)
        assert answers.tokens == right.tokens and counted("requests", outcome="hit") == 3, "repaired"


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
