"""Loading: what is written comes back, and a folder that is no model says what was expected and what was found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvlab.errors import ConfigError, ModelError
from kvlab.model import PRETRAINED, Llama, load_model
from kvlab.model.llama import RopeScaling
from kvlab.model.config import read_config
from tests.harness.helpers import build_model, edit_json, save_folder

TOKENS = torch.arange(20)[None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(build_model(tied=False), tmp_path / "model")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def save_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "model.safetensors")


# --- what works ---------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_computes_the_same(tmp_path: Path, tied: bool) -> None:
    model = build_model(tied=tied)
    again = load_model(save_folder(model, tmp_path))
    assert again.config == model.config
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert again.folder == tmp_path
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert not any(p.requires_grad for p in again.parameters())


def test_a_folder_may_be_named_by_a_string(folder: Path) -> None:
    assert torch.equal(load_model(str(folder))(TOKENS), load_model(folder)(TOKENS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_loaded_in_the_dtype_asked_for(folder: Path, dtype: torch.dtype) -> None:
    model = load_model(folder, dtype=dtype)
    assert model.dtype == model.new_kv(3).dtype == dtype
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_the_shipped_model_loads_without_an_argument() -> None:
    assert load_model().folder == PRETRAINED
    assert load_model(PRETRAINED).config == load_model().config


def rewritten(folder: Path, **changes: Any) -> Any:
    edit_json(folder / "config.json", **changes)
    return read_config(folder)


def test_configs_of_transformers_4_mean_the_same(folder: Path) -> None:
    now = read_config(folder)
    assert rewritten(folder, rope_parameters=..., rope_theta=10000, rope_scaling=None) == now


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("kind_field", ["type", "rope_type"])
def test_both_ways_to_write_rope_scaling_mean_the_same(folder: Path, kind_field: str) -> None:
    five = rewritten(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    four = rewritten(folder, rope_parameters=..., rope_theta=5e5, rope_scaling={kind_field: "llama3", **LLAMA3})
    assert five == four
    assert five.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64) and five.rope_theta == 5e5
    linear = rewritten(folder, rope_scaling={kind_field: "linear", "factor": 2})
    assert linear.rope_scaling == RopeScaling("linear", 2.0)


def test_what_a_config_leaves_out_has_the_defaults_of_llama(folder: Path) -> None:
    names = ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "hidden_act")
    config = rewritten(folder, rope_parameters=..., **dict.fromkeys(names, ...))
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-6, 10000.0, None)
    assert not (config.tie_word_embeddings or config.attention_bias)


@pytest.mark.parametrize(("eos", "ids"), [(7, (7,)), ([7, 8], (7, 8)), (None, ()), (..., ()), (0, (0,))])
def test_end_of_text_may_be_one_token_or_several(folder: Path, eos: Any, ids: tuple[int, ...]) -> None:
    assert rewritten(folder, eos_token_id=eos).eos_token_ids == ids


# --- what does not ------------------------------------------------------------------------------
def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text) and None


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: save_weights(folder, {k: v for k, v in weights_of(folder).items() if k not in names})


def with_shape(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: save_weights(folder, {**weights_of(folder), name: torch.zeros(shape)})


def pickled_only(folder: Path) -> None:
    torch.save(weights_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_to(share: float) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * share)])

    return cut


def not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"this is text" * 100)


def rope(**parameters: Any) -> Callable[[Path], None]:
    return config(rope_parameters=parameters)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (shutil.rmtree, r"not a model folder: config\.json cannot be read"),
    "no config": (no_config, r"config\.json cannot be read"),
    "config not JSON": (config_text("{model_type: llama"), r"config\.json cannot be read"),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}") and None, "cannot be read"),
    "config a list": (config_text("[]"), "expected a JSON object, got list"),
    "other model": (config(model_type="mistral"), "expected a model of type 'llama', got 'mistral'"),
    "no model type": (config(model_type=...), "expected a model of type 'llama', got None"),
    "other activation": (config(hidden_act="gelu"), "expected hidden_act 'silu', got 'gelu'"),
    "missing sizes": (config(hidden_size=..., vocab_size=...), "positive integers for vocab_size, hidden_size"),
    "size zero": (config(num_hidden_layers=0), "positive integers for num_hidden_layers"),
    "size a string": (config(hidden_size="32"), "positive integers for hidden_size"),
    "size a float": (config(hidden_size=32.0), "positive integers for hidden_size"),
    "size true": (config(num_hidden_layers=True), "positive integers for num_hidden_layers"),
    "KV heads do not divide": (config(num_key_value_heads=3), "4 heads, 3 KV heads"),
    "KV heads negative": (config(num_key_value_heads=-1), "KV heads"),
    "KV heads a string": (config(num_key_value_heads="2"), "num_key_value_heads|KV heads"),
    "head dim odd": (config(head_dim=15), "even head dim, got .*head dim 15"),
    "head dim a string": (config(head_dim="16"), "head_dim|head dim"),
    "head dim negative": (config(head_dim=-16), "head_dim|head dim"),
    "eps a word": (config(rms_norm_eps="small"), "rms_norm_eps"),
    "eos a word": (config(eos_token_id="end"), "eos_token_id"),
    "unknown rope": (rope(rope_type="yarn", factor=2.0), "default, linear or llama3, got 'yarn'"),
    "linear without factor": (rope(rope_type="linear"), "factor"),
    "llama3 without factors": (rope(rope_type="llama3", factor=8.0), "low_freq_factor"),
    "rope a list": (config(rope_parameters=[1]), "rope_parameters"),
    "theta a word": (rope(rope_type="default", rope_theta="large"), "rope_theta"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no \*\.safetensors file"),
    "pickled weights only": (pickled_only, r"pickled weights \(\*\.bin, \*\.pt\) are not read"),
    "missing weight": (without("model.norm.weight"), r"missing: model\.norm\.weight"),
    "missing head": (without("lm_head.weight"), r"missing: lm_head\.weight"),
    "missing embedding": (without("model.embed_tokens.weight"), r"missing: model\.embed_tokens\.weight"),
    "unknown weight": (with_shape("model.extra.weight", 3), r"unknown: model\.extra\.weight"),
    "wrong shape": (
        with_shape("model.norm.weight", 33),
        r"wrong shape: model\.norm\.weight \(33,\) instead of \(32,\)",
    ),
    "more layers promised": (config(num_hidden_layers=3), r"missing: model\.layers\.2\..* …"),
    "fewer layers promised": (config(num_hidden_layers=1), r"unknown: model\.layers\.1\..* …"),
    "other vocabulary": (config(vocab_size=98), r"wrong shape: .*\(97, 32\) instead of \(98, 32\)"),
    "biases promised": (config(attention_bias=True), r"missing: .*bias"),
    "cut in the data": (cut_to(0.9), r"model\.safetensors: damaged or cut short"),
    "cut in the header": (cut_to(0.01), "damaged or cut short"),
    "empty file": (cut_to(0), "damaged or cut short"),
    "not safetensors": (not_safetensors, "damaged or cut short"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_no_model_says_why(folder: Path, name: str) -> None:
    damage, said = BROKEN[name]
    damage(folder)
    with pytest.raises(ModelError, match=said) as refused:
        load_model(folder)
    assert str(folder) in str(refused.value)


def test_a_missing_shard_is_named_by_its_weights(folder: Path) -> None:
    weights = weights_of(folder)
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    save_file({n: weights[n] for n in names[:10]}, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match="missing: "):
        load_model(folder)


def test_a_pickle_beside_the_weights_is_not_touched(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nabort\n(tR.")
    assert isinstance(load_model(folder), Llama)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_a_clear_error(folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="no CUDA GPU; use device='cpu'"):
        load_model(folder, device=device)


def test_a_device_that_does_not_exist_is_a_clear_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match="device"):
        load_model(folder, device="gpu")


def test_loading_changes_no_random_state(folder: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_model(folder)
    assert torch.equal(torch.rand(3), expected)


def test_the_shipped_config_is_plain_json() -> None:
    assert json.loads((PRETRAINED / "config.json").read_text())["model_type"] == "llama"
