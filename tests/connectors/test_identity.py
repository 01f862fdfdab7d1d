"""Fingerprints of models of other libraries: a plain Llama keeps its own, and what changes KV changes the print."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlab.connectors.identity import (
    IRRELEVANT,
    as_stored,
    files_digest,
    foreign_fingerprint,
    rope_types,
    safetensors_problem,
    weights_of_folder,
)
from kvlab.core.keys import field
from kvlab.errors import KVLabError, ModelError
from kvlab.model import PRETRAINED, load_model
from kvlab.model.fingerprint import digest_tensors, fingerprint, folder_digests
from tests.harness.helpers import build_model, config_json, own_weights, save_folder

WEIGHTS = bytes(range(32))
LLAMA = config_json(build_model())
QWEN: dict[str, Any] = {"model_type": "qwen2", "hidden_size": 64, "layer_types": ["full_attention"], "rope": {"a": 1.5}}


# --- fingerprints ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_plain_llama_has_the_fingerprint_of_this_package(dtype: str) -> None:
    parts = (WEIGHTS, b"t" * 32, b"a" * 32, dtype)
    assert foreign_fingerprint(LLAMA, *parts) == fingerprint(LLAMA, *parts)


def test_a_llama_that_this_package_cannot_run_has_one_of_its_own() -> None:
    """It must not be taken for the plain one."""
    odd = {**LLAMA, "hidden_act": "relu2"}
    with pytest.raises(ModelError):
        fingerprint(odd, WEIGHTS)
    assert foreign_fingerprint(odd, WEIGHTS) != foreign_fingerprint(LLAMA, WEIGHTS)
    assert foreign_fingerprint(odd, WEIGHTS) != foreign_fingerprint({**odd, "hidden_act": "tanh"}, WEIGHTS)


def test_the_bytes_are_those_of_the_text() -> None:
    kept = json.dumps(QWEN, sort_keys=True, separators=(",", ":")).encode()
    parts = (b"kvlab/1/fingerprint", kept, WEIGHTS, b"t" * 32, b"", b"float16", (1).to_bytes(4, "little"))
    want = hashlib.sha256(b"".join(field(part) for part in parts)).digest()
    assert foreign_fingerprint(QWEN, WEIGHTS, b"t" * 32, b"", "float16") == want


def test_every_input_counts() -> None:
    inputs: list[tuple[Any, ...]] = [
        (QWEN, WEIGHTS),
        ({**QWEN, "hidden_size": 65}, WEIGHTS),
        ({**QWEN, "model_type": "qwen3"}, WEIGHTS),
        ({**QWEN, "rope": {"a": 2.5}}, WEIGHTS),
        ({**QWEN, "new_field": None}, WEIGHTS),
        (QWEN, bytes(32)),
        (QWEN, WEIGHTS, b"t" * 32),
        (QWEN, WEIGHTS, b"", b"t" * 32),
        (QWEN, WEIGHTS, b"", b"", "float16"),
    ]
    assert len({foreign_fingerprint(*parts) for parts in inputs}) == len(inputs)


@pytest.mark.parametrize("name", sorted(IRRELEVANT))
def test_what_changes_no_kv_changes_no_fingerprint(name: str) -> None:
    assert foreign_fingerprint({**QWEN, name: "x"}, WEIGHTS) == foreign_fingerprint(QWEN, WEIGHTS)
    assert foreign_fingerprint({**QWEN, "inner": {name: "x"}}, WEIGHTS) != foreign_fingerprint(QWEN, WEIGHTS)


def test_the_order_of_fields_does_not_count_and_objects_count_by_their_text() -> None:
    assert foreign_fingerprint(dict(reversed(QWEN.items())), WEIGHTS) == foreign_fingerprint(QWEN, WEIGHTS)
    half = foreign_fingerprint({**QWEN, "kv_dtype": torch.float16}, WEIGHTS)
    assert half == foreign_fingerprint({**QWEN, "kv_dtype": "torch.float16"}, WEIGHTS)


# --- weights ----------------------------------------------------------------------------------------------
def test_the_weights_of_a_folder_are_those_of_the_model(tmp_path: Path) -> None:
    model = build_model()
    save_folder(model, tmp_path)
    assert weights_of_folder(tmp_path, tied=True) == digest_tensors(own_weights(model).items())
    assert weights_of_folder(PRETRAINED, tied=True) == folder_digests(PRETRAINED).weights


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x")])
def test_a_folder_without_safetensors_is_refused(tmp_path: Path, make: Any) -> None:
    make(tmp_path)
    with pytest.raises(KVLabError):
        weights_of_folder(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_loaded_as_fp32_are_hashed_as_their_file_has_them(dtype: torch.dtype) -> None:
    model = build_model(tied=False)
    stored = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
    loaded = {name: weight.float() for name, weight in stored.items()}
    assert digest_tensors(as_stored(loaded)) == digest_tensors(stored.items()) != digest_tensors(loaded.items())


def test_the_shipped_model_in_fp32_has_the_digest_of_its_file() -> None:
    model = load_model(dtype=torch.float32)
    assert digest_tensors(as_stored(model.state_dict())) == folder_digests(PRETRAINED).weights


OTHERS: dict[str, dict[str, torch.Tensor]] = {
    "real fp32": {"a": torch.tensor([1.0, 1 / 3])},
    "one number of fp32": {"a": torch.ones(1000), "b": torch.tensor([1 + 2**-20])},
    "NaN": {"a": torch.tensor([float("nan")])},
    "too large for fp16, too fine for bf16": {"a": torch.tensor([70000.0, 1.001])},
    "fp16": {"a": torch.ones(3, dtype=torch.float16)},
    "mixed": {"a": torch.ones(3), "b": torch.ones(3, dtype=torch.float16)},
    "whole numbers": {"a": torch.arange(3)},
    "nothing": {},
}


@pytest.mark.parametrize("case", OTHERS)
def test_weights_that_no_narrower_dtype_holds_stay_as_they_are(case: str) -> None:
    for name, tensor in as_stored(OTHERS[case]):
        assert tensor is OTHERS[case][name]


def test_a_change_too_small_for_half_precision_is_still_another_digest() -> None:
    weights = {"a": torch.ones(4), "b": torch.arange(4.0)}
    changed = {**weights, "a": weights["a"].clone()}
    changed["a"][2] += 2**-20
    assert digest_tensors(as_stored(weights)) != digest_tensors(as_stored(changed))


def test_buffers_that_are_no_floats_keep_their_dtype() -> None:
    found = dict(as_stored({"a": torch.ones(3), "steps": torch.tensor(5)}))
    assert found["a"].dtype == torch.bfloat16 and found["steps"].dtype == torch.int64


# --- files of an adapter ------------------------------------------------------------------------------------
def test_the_files_of_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"abc")
    entries = [
        field(name) + hashlib.sha256(content).digest()
        for name, content in ((b"adapter_config.json", b"{}"), (b"adapter_model.safetensors", b"abc"))
    ]
    want = hashlib.sha256(b"".join(field(part) for part in (b"kvlab/1/files", *entries))).digest()
    assert files_digest(tmp_path) == files_digest(str(tmp_path)) == want
    (tmp_path / "inner").mkdir()  # folders do not count
    assert files_digest(tmp_path) == want
    (tmp_path / "adapter_config.json").write_text("{ }")
    assert files_digest(tmp_path) != want
    (tmp_path / "adapter_config.json").rename(tmp_path / "config.json")
    assert files_digest(tmp_path) != want


def test_an_adapter_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="found none"):
        files_digest(tmp_path)
    with pytest.raises(ModelError, match="cannot be read"):
        files_digest(tmp_path / "nothing")


# --- what an engine may read otherwise ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("files", "fits"),
    [
        (["model.safetensors"], True),
        (["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"], True),
        (["model-1.safetensors", "model.safetensors.index.json", "consolidated.safetensors"], True),
        (["model.safetensors", "z-finetuned.safetensors"], False),
        (["model.safetensors", "model-1.safetensors", "model.safetensors.index.json"], False),
        (["model.safetensors", "model.safetensors.index.json"], False),
    ],
)
def test_folders_that_engines_read_differently_are_noticed(tmp_path: Path, files: list[str], fits: bool) -> None:
    for name in files:
        (tmp_path / name).touch()
    problem = safetensors_problem(tmp_path)
    assert (problem == "") == fits and (fits or "model.safetensors alone" in problem)


def test_rope_types_are_found_wherever_they_are() -> None:
    nested = {"rope_parameters": {"full": {"rope_type": "default"}, "sliding": {"type": "longrope"}}, "type": "x"}
    assert set(rope_types(nested)) == {"default", "longrope", "x"} and not list(rope_types({"a": [1]}))
