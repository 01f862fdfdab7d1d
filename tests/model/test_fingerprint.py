"""Fingerprints: pinned, checked by a second implementation, the same however a model is written, and sensitive."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import kvlab
from kvlab.cache import DistributedKVCache
from kvlab.errors import ConfigError, KVLabError, ModelError
from kvlab.model import PRETRAINED, load_model
from kvlab.model import fingerprint as identity
from kvlab.model.config import KV_FIELDS
from kvlab.model.fingerprint import (
    config_bytes,
    digest_tensors,
    fingerprint,
    fingerprint_of_folder,
    fingerprint_of_model,
    folder_digests,
    spec_of,
    tokenizer_digest,
)
from kvlab.model.llama import RopeScaling
from kvlab.stores import MemoryStore
from tests.core.make_golden import VECTORS, plain_model
from tests.core.second import fingerprint2, tokenizer2
from tests.harness.helpers import build_model, config_json, edit_json, exact_kv, own_weights, save_folder, small_spec
from tests.model.folders import (
    EMBEDDING,
    HEAD,
    last_byte_changed,
    safetensors_bytes,
    save_weights,
    sharded,
    weights_of,
    with_tensors,
)

PINNED = json.loads(VECTORS.read_text())
PLAIN_CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
}


def print_of(folder: Path, **options: Any) -> bytes:
    """Of a loaded model, which the folder's own must equal."""
    model = load_model(folder, **options)
    found = fingerprint_of_model(model)
    assert fingerprint_of_folder(folder, model.dtype) == found == spec_of(model).fingerprint
    return found


# --- vectors, and who may call ------------------------------------------------------------------
def test_the_fingerprint_is_the_pinned_one() -> None:
    weights = digest_tensors(own_weights(plain_model()).items())
    for adapter, name in ((b"", "plain_model"), (b"lora", "plain_model_with_adapter")):
        second = fingerprint2(PLAIN_CONFIG, weights, b"", adapter, "float32")
        assert fingerprint_of_model(plain_model(), adapter).hex() == second.hex() == PINNED[name]
        assert fingerprint(PLAIN_CONFIG, weights, adapter=adapter).hex() == PINNED[name]
        assert fingerprint(plain_model().config, weights, adapter=adapter).hex() == PINNED[name]
    untied = plain_model(tied=False)
    weights = digest_tensors(own_weights(untied).items())
    second = fingerprint2(PLAIN_CONFIG, weights, b"", b"", "float32")
    assert fingerprint_of_model(untied).hex() == second.hex() == PINNED["plain_model_untied"]


def test_a_second_implementation_agrees_on_the_shipped_model() -> None:
    model, text = load_model(), (PRETRAINED / "tokenizer.json").read_text("utf-8")
    config = {name: getattr(model.config, name) for name in PLAIN_CONFIG}
    weights = digest_tensors(weights_of(PRETRAINED).items())
    for dtype in ("float32", "float16", "bfloat16"):
        second = fingerprint2(config, weights, tokenizer2(text), b"", dtype)
        assert fingerprint_of_folder(PRETRAINED, dtype) == second


def test_the_front_door_shows_it() -> None:
    assert kvlab.fingerprint is fingerprint and kvlab.spec_of is spec_of


IN_ANOTHER_PROCESS = """
from kvlab.model.fingerprint import fingerprint_of_folder, fingerprint_of_model
from tests.core.make_golden import plain_model
print(fingerprint_of_model(plain_model()).hex())
"""


def test_two_processes_agree() -> None:
    runs = [
        subprocess.run(
            [sys.executable, "-c", IN_ANOTHER_PROCESS],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] == [PINNED["plain_model"]]


@pytest.mark.hf
def test_another_librarys_config_and_tensors_give_the_same(folder: Path) -> None:
    """What a connector calls: its own config object and state dict."""
    from transformers import LlamaForCausalLM

    other = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert HEAD in other.state_dict()  # the tied embedding again
    weights = digest_tensors(other.state_dict().items())
    assert weights == folder_digests(folder).weights
    tokenizer = tokenizer_digest((folder / "tokenizer.json").read_bytes())
    assert fingerprint(other.config.to_dict(), weights, tokenizer) == print_of(folder)
    half = fingerprint(other.config.to_dict(), weights, tokenizer, dtype=torch.float16)
    assert half == print_of(folder, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": b""}, "expected digests of 32 bytes"),
        ({"weights": bytes(31)}, "got 31 and 0"),
        ({"weights": "ab" * 16}, "digests as bytes"),
        ({"tokenizer": None}, "digests as bytes"),
        ({"adapter": "lora"}, "digests as bytes"),
        ({"tokenizer": bytes(33)}, "got 32 and 33"),
        ({"dtype": "fp16"}, "float32, float16, bfloat16, got 'fp16'"),
        ({"dtype": "float64"}, "compute dtype"),
        ({"dtype": torch.int8}, "compute dtype"),
        ({"config": build_model()}, r"got Llama; .*spec_of\(model\)"),
        ({"config": PRETRAINED}, "fields of a config.json"),
        ({"config": "config.json"}, "fields of a config.json"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_makes_no_fingerprint_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fingerprint(**{"config": PLAIN_CONFIG, "weights": bytes(32), **change})


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_a_dtype_may_be_named_as_torch_prints_it(name: str) -> None:
    forms = (name, f"torch.{name}", getattr(torch, name))
    assert len({fingerprint(PLAIN_CONFIG, bytes(32), dtype=form) for form in forms}) == 1


# --- the config ---------------------------------------------------------------------------------
FOUR = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}
FIVE = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000}}


def test_both_forms_of_a_config_have_the_same_bytes() -> None:
    plain = {name: value for name, value in PLAIN_CONFIG.items() if "rope" not in name}
    assert config_bytes({**plain, **FOUR}) == config_bytes({**plain, **FIVE, "model_type": "llama"})


def test_a_field_with_a_documented_default_may_be_missing_or_null() -> None:
    defaults = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "num_key_value_heads": 2, "head_dim": 4}
    whole = {**PLAIN_CONFIG, **defaults}
    for absent in ({}, dict.fromkeys(KV_FIELDS[4:7])):
        required = {name: whole[name] for name in KV_FIELDS[:4]}
        assert config_bytes({**required, **absent}) == config_bytes(whole)


@pytest.mark.parametrize("name", KV_FIELDS[:4])
def test_a_field_without_a_default_may_not(name: str) -> None:
    assert name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for config in ({**PLAIN_CONFIG, name: None}, {k: v for k, v in PLAIN_CONFIG.items() if k != name}):
        with pytest.raises(ModelError, match=name):
            fingerprint(config, bytes(32))


def test_a_config_of_another_kind_of_model_is_refused() -> None:
    for config in ({"model_type": "qwen2"}, {"sliding_window": 4096}, {"quantization_config": {}}):
        with pytest.raises(ModelError):
            fingerprint({**PLAIN_CONFIG, **config}, bytes(32))


def test_rope_kinds_with_the_same_factor_differ() -> None:
    scalings = (None, RopeScaling("linear", 8.0), RopeScaling("llama3", 8.0), RopeScaling("llama3", 8.0, 2.0))
    assert len({config_bytes(build_model(rope_scaling=s).config) for s in scalings}) == 4


def changed_config(**change: Any) -> bytes:
    return config_bytes(replace(build_model().config, **change))


@pytest.mark.parametrize("name", PLAIN_CONFIG)
def test_every_field_that_shapes_the_numbers_is_part_of_the_identity(name: str) -> None:
    assert set(PLAIN_CONFIG) == set(KV_FIELDS)
    old = getattr(build_model().config, name)
    new = RopeScaling("linear", 2.0) if old is None else not old if isinstance(old, bool) else old * 2
    assert changed_config(**{name: new}) != changed_config()


@pytest.mark.parametrize(
    "change", [{"vocab_size": 98}, {"max_position_embeddings": 512}, {"eos_token_ids": (3,)}], ids=str
)
def test_fields_that_change_no_kv_are_not_part_of_it(change: dict[str, Any]) -> None:
    assert changed_config(**change) == changed_config()


def test_every_field_of_a_rope_scaling_is_part_of_it() -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    doubled = [{f.name: getattr(scaling, f.name) * 2} for f in fields(scaling) if f.name != "kind"]
    configs = {changed_config(rope_scaling=replace(scaling, **d)) for d in ({}, {"kind": "linear"}, *doubled)}
    assert len(configs) == 1 + len(fields(scaling))


def test_the_layout_version_is_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint_of_model(plain_model())
    monkeypatch.setattr(identity, "LAYOUT_VERSION", 2)
    assert fingerprint_of_model(plain_model()) != before


# --- a folder written in another way keeps its fingerprint --------------------------------------
def reversed_order(folder: Path) -> None:
    """The same tensors at other places of the file."""
    weights = weights_of(folder)
    data = safetensors_bytes(weights, sorted(weights, reverse=True))
    (folder / "model.safetensors").write_bytes(data)


def with_metadata(folder: Path) -> None:
    save_file(weights_of(folder), folder / "model.safetensors", metadata={"format": "pt", "note": "saved again"})


def in_shards(folder: Path) -> None:
    sharded(folder)


def with_a_copy_of_the_tied_head(folder: Path) -> None:
    weights = weights_of(folder)
    save_weights(folder, {**weights, HEAD: weights[EMBEDDING].clone()})


def with_the_tied_head_alone(folder: Path) -> None:
    weights = weights_of(folder)
    weights[HEAD] = weights.pop(EMBEDDING)
    save_weights(folder, weights)


def with_rotary_buffers(folder: Path) -> None:
    with_tensors(
        model__rotary_emb__inv_freq=torch.ones(8),
        **{f"model__layers__{i}__self_attn__rotary_emb__inv_freq": torch.ones(8) for i in (0, 1)},
    )(folder)


def beside_a_stray_file(folder: Path) -> None:
    save_weights(folder, {n: t + 1 for n, t in weights_of(folder).items()}, "model_old.safetensors")


def config_of_transformers_4(folder: Path) -> None:
    edit_json(folder / "config.json", rope_parameters=..., rope_theta=10000.0, rope_scaling=None, torch_dtype="float32")


def config_with_what_does_not_matter(folder: Path) -> None:
    edit_json(folder / "config.json", use_cache=False, transformers_version="9", max_position_embeddings=128)


def generation_settings(folder: Path) -> None:
    settings = {"eos_token_id": [0, 7], "do_sample": True, "temperature": 0.5, "max_new_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))


def tokenizer_settings(folder: Path) -> None:
    settings = {"model_max_length": 3, "padding_side": "left", "truncation_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def tokenizer_reformatted(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(content.items())), indent=7, ensure_ascii=True))


def tokenizer_with_run_time_settings(folder: Path) -> None:
    edit_json(
        folder / "tokenizer.json",
        version="2.0",
        truncation={"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
    )


@pytest.mark.parametrize(
    "change",
    [
        reversed_order,
        with_metadata,
        in_shards,
        with_a_copy_of_the_tied_head,
        with_the_tied_head_alone,
        with_rotary_buffers,
        beside_a_stray_file,
        config_of_transformers_4,
        config_with_what_does_not_matter,
        generation_settings,
        tokenizer_settings,
        tokenizer_reformatted,
        tokenizer_with_run_time_settings,
    ],
)
@pytest.mark.usefixtures("settled")
def test_saving_the_same_model_in_another_way_keeps_its_fingerprint(
    folder: Path, change: Callable[[Path], None]
) -> None:
    before, files = print_of(folder), contents(folder)
    change(folder)
    assert contents(folder) != files
    assert print_of(folder) == before


@pytest.mark.hf
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_a_model_that_transformers_saved_again_keeps_its_fingerprint(folder: Path, shard: str) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    before = print_of(folder)
    saved = folder.with_name("saved")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(saved, max_shard_size=shard)
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(saved)
    assert (len(list(saved.glob("*.safetensors"))) > 1) == (shard == "20KB")
    assert contents(saved)["config.json"] != contents(folder)["config.json"]
    assert print_of(saved) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_moved_folder_keeps_its_fingerprint(folder: Path) -> None:
    before = print_of(folder)
    assert print_of(folder.rename(folder.with_name("elsewhere"))) == before


# --- another model has another one --------------------------------------------------------------
def last_weight_byte(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(last_byte_changed(file.read_bytes()))


def renamed_weights(folder: Path) -> None:
    """Two weights of one shape change places."""
    weights = weights_of(folder)
    a, b = "model.layers.0.input_layernorm.weight", "model.norm.weight"
    weights[a], weights[b] = weights[a] + 1, weights[b] + 2
    save_weights(folder, weights)


def head_of_its_own(folder: Path) -> None:
    weights = weights_of(folder)
    save_weights(folder, {**weights, HEAD: weights[EMBEDDING] + 1})


def changed_vocabulary(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    first, second = sorted(vocab)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def other_theta(folder: Path) -> None:
    edit_json(folder / "config.json", rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})


def scaled_rope(folder: Path) -> None:
    edit_json(folder / "config.json", rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0})


def scaled_as_of_old(folder: Path) -> None:
    edit_json(folder / "config.json", rope_scaling={"type": "linear", "factor": 2.0})


def other_eps(folder: Path) -> None:
    edit_json(folder / "config.json", rms_norm_eps=1e-6)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


CHANGES = [
    last_weight_byte,
    renamed_weights,
    head_of_its_own,
    changed_vocabulary,
    other_theta,
    scaled_rope,
    scaled_as_of_old,
    other_eps,
    no_tokenizer,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("settled")
def test_another_model_has_another_fingerprint(folder: Path, change: Callable[[Path], None]) -> None:
    before = print_of(folder)
    change(folder)
    assert print_of(folder) != before


def test_every_compute_dtype_has_its_own_fingerprint(folder: Path) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    assert len({print_of(folder, dtype=dtype) for dtype in dtypes}) == 3


def test_an_adapter_changes_the_fingerprint(folder: Path) -> None:
    model = load_model(folder)
    prints = [fingerprint_of_model(model, adapter) for adapter in (b"", b"one", b"two")]
    assert len(set(prints)) == 3
    assert prints == [fingerprint_of_folder(folder, adapter=adapter) for adapter in (b"", b"one", b"two")]


def test_a_folder_that_is_no_model_has_none(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for call in (fingerprint_of_folder, folder_digests):
        with pytest.raises(KVLabError, match="safetensors"):
            call(folder)
    with pytest.raises(ModelError, match=r"config\.json"):
        fingerprint_of_folder(folder / "nowhere")


# --- a model in memory --------------------------------------------------------------------------
def test_the_spec_of_a_model_has_its_sizes_and_fingerprint() -> None:
    model = build_model(heads=4, kv_heads=2, head_dim=16, layers=3)
    spec = spec_of(model)
    assert (spec.layers, spec.heads, spec.head_dim, spec.dtype) == (3, 2, 16, torch.float32)
    assert spec.fingerprint == fingerprint_of_model(model)
    assert spec_of(model, adapter=b"lora").fingerprint == fingerprint_of_model(model, b"lora") != spec.fingerprint


def test_a_model_in_memory_and_a_folder_without_tokenizer_are_one(folder: Path) -> None:
    no_tokenizer(folder)
    assert print_of(folder) == fingerprint_of_model(build_model())


def test_tied_and_untied_models_differ() -> None:
    assert fingerprint_of_model(build_model(tied=True)) != fingerprint_of_model(build_model(tied=False))


def test_an_untied_head_that_is_the_embedding_is_a_tied_one(tmp_path: Path) -> None:
    """The flag is no part of the identity, the numbers are."""
    model = build_model(tied=False)
    model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    tied = {**config_json(model), "tie_word_embeddings": True}
    folder = save_folder(model, tmp_path)
    assert print_of(folder) == fingerprint(tied, digest_tensors(model.state_dict().items()))


def test_any_change_of_a_weight_changes_a_model_in_memory() -> None:
    model = build_model()
    before = fingerprint_of_model(model)
    model.model.norm.weight[0] += 1e-6
    assert fingerprint_of_model(model) != before


def test_compression_is_not_identity_and_precision_is() -> None:
    store, spec = MemoryStore(), small_spec()
    options = {"store": store, "model": spec, "block_tokens": 16}
    writer = DistributedKVCache(precision="fp32", compress="gzip", **options)
    assert writer.save(list(range(32)), exact_kv(spec, 32)) == 2
    for compress in (False, True, "gzip", "zstd"):
        reader = DistributedKVCache(precision="fp32", compress=compress, **options)
        assert reader.match(list(range(32))) == 32
    for precision in ("fp16", "bf16", "int8", "int4"):
        assert DistributedKVCache(precision=precision, compress="gzip", **options).match(list(range(32))) == 0


def test_a_copied_folder_is_the_same_model(folder: Path) -> None:
    assert print_of(Path(shutil.copytree(folder, folder.with_name("copy")))) == print_of(folder)
