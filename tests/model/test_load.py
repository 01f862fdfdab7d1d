"""Loading: what is written comes back, and a folder that is no model says what was expected and what was found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlab.errors import ConfigError, ModelError
from kvlab.model import PRETRAINED, load_model
from tests.harness.helpers import build_model, edit_json, save_folder
from tests.model.folders import EMBEDDING, HEAD, Change, run, save_weights, weights_of, with_tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Untied, unlike the folder of the other files."""
    return save_folder(build_model(tied=False), tmp_path / "model")


# --- what works ---------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_computes_the_same(tmp_path: Path, tied: bool) -> None:
    model = build_model(tied=tied)
    again = load_model(save_folder(model, tmp_path))
    assert again.config == model.config
    assert torch.equal(run(again), run(model))
    assert again.folder == tmp_path
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert not any(p.requires_grad for p in again.parameters())


def test_a_folder_may_be_named_by_a_string(folder: Path) -> None:
    assert torch.equal(run(load_model(str(folder))), run(load_model(folder)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_loaded_in_the_dtype_asked_for(folder: Path, dtype: torch.dtype) -> None:
    model = load_model(folder, dtype=dtype)
    assert model.dtype == model.new_kv(3).dtype == dtype
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_the_shipped_model_loads_without_an_argument() -> None:
    assert load_model().folder == PRETRAINED
    assert load_model(PRETRAINED).config == load_model().config


# --- what does not ------------------------------------------------------------------------------
def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_text(text: str) -> Change:
    return lambda folder: (folder / "config.json").write_text(text) and None


def config(**changes: Any) -> Change:
    return lambda folder: edit_json(folder / "config.json", **changes)


def without(*names: str) -> Change:
    return lambda folder: save_weights(folder, {k: v for k, v in weights_of(folder).items() if k not in names})


def with_shape(name: str, *shape: int) -> Change:
    return lambda folder: save_weights(folder, {**weights_of(folder), name: torch.zeros(shape)})


def pickled_only(folder: Path) -> None:
    torch.save(weights_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def config_of_a_biased_model(folder: Path) -> None:
    save_folder(build_model(tied=False, attention_bias=True, mlp_bias=True), folder)
    edit_json(folder / "config.json", attention_bias=False, mlp_bias=False)


def cut_to(share: float) -> Change:
    def cut(folder: Path) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * share)])

    return cut


def not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"this is text" * 100)


BROKEN: dict[str, tuple[Change, str]] = {
    "no folder": (shutil.rmtree, r"not a model folder: config\.json is missing"),
    "no config": (no_config, r"config\.json is missing"),
    "config not JSON": (config_text("{model_type: llama"), r"config\.json cannot be read"),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}") and None, "cannot be read"),
    "config a list": (config_text("[]"), "expected a JSON object, got list"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"expected model\.safetensors or .*, found neither"),
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
    "biases promised": (config(attention_bias=True), r"missing: .*bias .*; attention_bias is True and mlp_bias False"),
    "biases not promised": (
        config_of_a_biased_model,
        r"unknown: .*bias .*; attention_bias is False and mlp_bias False",
    ),
    "other head dim": (config(head_dim=8), r"wrong shape: .*k_proj\.weight \(32, 32\) instead of \(16, 32\)"),
    "KV heads left out": (
        config(num_key_value_heads=...),
        r"wrong shape: .*k_proj\.weight \(32, 32\) instead of \(64, 32\)",
    ),
    "whole numbers": (with_tensors(model__norm__weight=torch.ones(32).to(torch.int8)), "not floating point: .*int8"),
    "eight bits": (
        with_tensors(model__norm__weight=torch.ones(32).to(torch.float8_e4m3fn)),
        r"not floating point: model\.norm\.weight torch\.float8_e4m3fn",
    ),
    "layers without end": (config(num_hidden_layers=10**30), "num_hidden_layers is 10+, but there are only 21 weights"),
    "a billion layers": (config(num_hidden_layers=10**9), "there are only 21 weights"),
    "a vocabulary without end": (config(vocab_size=10**30), "impossible sizes"),
    "a width without end": (config(intermediate_size=10**18), "impossible sizes"),
    "a wide vocabulary": (config(vocab_size=10**13), r"instead of \(10000000000000, 32\)"),
    "heads without end": (config(num_attention_heads=10**30, num_key_value_heads=10**30), "impossible sizes"),
    "head dim without end": (config(head_dim=10**30), "impossible sizes"),
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_a_clear_error(folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="no CUDA GPU; use device='cpu'"):
        load_model(folder, device=device)


@pytest.mark.parametrize("device", ["gpu", "", "cpu:x", "meta", None, 5.5, ["cpu"]], ids=repr)
def test_a_device_that_cannot_be_used_is_a_clear_error(folder: Path, device: Any) -> None:
    with pytest.raises(ConfigError, match="device"):
        load_model(folder, device=device)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn, "float16", None, float], ids=str)
def test_a_dtype_that_no_kv_has_is_a_clear_error(folder: Path, dtype: Any) -> None:
    with pytest.raises(ConfigError, match="compute dtype of torch"):
        load_model(folder, dtype=dtype)


# --- the output head ----------------------------------------------------------------------------
@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return save_folder(build_model(tied=True), tmp_path / "tied")


def test_a_stored_head_that_differs_is_used_though_the_config_ties_it(
    tied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As transformers does. The config that comes back says so."""
    head = torch.randn(97, 32, generator=torch.Generator().manual_seed(1))
    with_tensors(**{HEAD: head})(tied)
    model = load_model(tied)
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.model.embed_tokens.weight, weights_of(tied)[EMBEDDING])
    assert not model.config.tie_word_embeddings
    assert "stored head differs and is used" in caplog.text


@pytest.mark.parametrize("stored", ["both", "the head alone"])
def test_a_stored_head_that_is_the_embedding_stays_tied(tied: Path, stored: str) -> None:
    logits, weights = run(load_model(tied)), weights_of(tied)
    weights[HEAD] = weights[EMBEDDING].clone()
    if stored == "the head alone":
        del weights[EMBEDDING]
    save_weights(tied, weights)
    model = load_model(tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert torch.equal(run(model), logits)


def test_a_head_that_differs_only_before_rounding_is_tied(tied: Path) -> None:
    """transformers compares what it computes with."""
    weights = weights_of(tied)
    weights[EMBEDDING] = weights[EMBEDDING].bfloat16().float()
    save_weights(tied, {**weights, HEAD: weights[EMBEDDING] * (1 + 2**-20)})
    assert not load_model(tied).config.tie_word_embeddings
    assert load_model(tied, dtype=torch.bfloat16).config.tie_word_embeddings


def test_a_head_of_the_wrong_shape_is_refused(tied: Path) -> None:
    with_tensors(**{HEAD: torch.zeros(96, 32)})(tied)
    with pytest.raises(ModelError, match=r"lm_head\.weight \(96, 32\) instead of \(97, 32\)"):
        load_model(tied)


# --- settings that would fail late --------------------------------------------------------------
@pytest.mark.parametrize("context", [10**13, 10**30, 2**63])
def test_a_context_without_end_costs_nothing(folder: Path, context: int) -> None:
    logits = run(load_model(folder))
    edit_json(folder / "config.json", max_position_embeddings=context)
    model = load_model(folder)
    assert torch.equal(run(model), logits)
    assert model.check_tokens([1, 2, 3], new_tokens=1000).shape == (1, 3)


def test_loading_changes_no_random_state(folder: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_model(folder)
    assert torch.equal(torch.rand(3), expected)


def test_the_shipped_config_is_plain_json() -> None:
    assert json.loads((PRETRAINED / "config.json").read_text())["model_type"] == "llama"
