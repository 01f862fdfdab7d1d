"""`doctor --engine vllm`: a good set-up is described as the engine will see it, and bad ones are named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvlab.cli import main
from kvlab.testbed.server import RedisServer

pytest.importorskip("vllm", reason="needs vLLM: make test-engines")

from kvlab.lab.engines import MODEL, engine, scheduler_of, transfer, worker_of_this_process

pytestmark = [pytest.mark.engines, pytest.mark.redis]


def told(
    capsys: pytest.CaptureFixture[str], url: str, *arguments: str, model: object = MODEL, **changes: Any
) -> tuple[int, str]:
    """The status and the text of the doctor for a server with these settings."""
    kv = {
        "kv_connector": "KVLabConnector",
        "kv_connector_module_path": "kvlab.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"store": url},
        **changes,
    }
    capsys.readouterr()
    command = ["doctor", "--engine", "vllm", "--", str(model), "--dtype", "float32", "--block-size", "32"]
    status = main([*command, "--kv-transfer-config", json.dumps(kv), *arguments])
    return status, capsys.readouterr().out


def test_a_good_set_up(redis_server: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = told(capsys, redis_server.url)
    assert status == 0 and text.endswith("ready\n"), text
    assert "a prompt of 33 tokens" in text and "records of 196,608 bytes" in text and "problem" not in text
    namespace = re.search(r"namespace +(\w+)", text)
    with engine(transfer(redis_server.url)) as llm:
        assert namespace is not None and scheduler_of(llm).space.hex().startswith(namespace[1])


def test_the_dtype_of_the_cache_counts(redis_server: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = told(capsys, redis_server.url, "--kv-cache-dtype", "bfloat16")
    namespace = re.search(r"namespace +(\w+)", text)
    assert status == 0 and "records of 98,304 bytes" in text
    with engine(transfer(redis_server.url, shadow=1.0), kv_cache_dtype="bfloat16") as llm:
        assert namespace is not None and scheduler_of(llm).space.hex().startswith(namespace[1])
        assert worker_of_this_process().shadow.precision == "bf16"


def test_a_store_beside_the_arguments_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--engine", "vllm", "--store", "redis://127.0.0.1:9", "--", str(MODEL)]) == 1
    assert "--store is for transformers" in capsys.readouterr().out


def test_planted_faults_are_named(
    redis_server: RedisServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(MODEL, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    windowed = tmp_path / "windowed"
    shutil.copytree(MODEL, windowed)
    fields = json.loads((MODEL / "config.json").read_text())
    mistral = {**fields, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
    (windowed / "config.json").write_text(json.dumps(mistral))
    speculative = json.dumps({"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3})
    url = redis_server.url
    for says, status_text in {
        "connection refused": told(capsys, "redis://127.0.0.1:9"),
        "vllm's default": told(capsys, url, kv_load_failure_policy="fail"),
        "sha256 or sha256_cbor": told(capsys, url, "--prefix-caching-hash-algo", "xxhash"),
        "no speculative decoding": told(capsys, url, "--speculative-config", speculative),
        "safetensors": told(capsys, url, model=pickled),
        "sliding windows": told(capsys, url, model=windowed),
        "got storr": told(capsys, url, kv_connector_extra_config={"storr": url}),
        "scheduler and workers share": told(capsys, "fakeredis://"),
        "got exampleconnector": told(capsys, url, kv_connector="ExampleConnector", kv_connector_module_path=None),
        "class typo not found": told(capsys, url, kv_connector="Typo"),
        "vllm refuses its arguments": told(capsys, url, "--dtype", "float33"),
        "it does not know --no-such-flag": told(capsys, url, "--no-such-flag"),
    }.items():
        status, text = status_text
        assert status == 1 and says in text.lower(), f"{says}:\n{text}"
        assert "Traceback" not in text and re.search(r"^problems: 1$", text, re.MULTILINE), text
