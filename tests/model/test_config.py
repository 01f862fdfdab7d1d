"""A Llama's settings: both forms mean the same, contradictions mean what transformers means, the rest is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlab.errors import ModelError
from kvlab.model import PRETRAINED, load_model
from kvlab.model.config import parse_config, read_config
from kvlab.model.llama import LlamaConfig, RopeScaling, rope_frequencies
from tests.harness.helpers import build_model, config_json, edit_json

BASE = config_json(build_model(tied=False))
FOUR = {k: v for k, v in BASE.items() if k != "rope_parameters"} | {"rope_theta": 10000.0, "rope_scaling": None}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def parsed(base: dict[str, Any] = BASE, **changes: Any) -> LlamaConfig:
    """A config with changes; `...` removes a field."""
    return parse_config({k: v for k, v in {**base, **changes}.items() if v is not ...})


def rope(**params: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **params}}


# --- both forms ---------------------------------------------------------------------------------
def test_configs_of_transformers_4_mean_the_same() -> None:
    assert parsed(FOUR) == parsed() == build_model(tied=False).config
    assert parsed(FOUR, rope_theta=10000) == parsed()


@pytest.mark.parametrize("kind_field", ["type", "rope_type"])
def test_both_ways_to_write_rope_scaling_mean_the_same(kind_field: str) -> None:
    five = parsed(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    four = parsed(FOUR, rope_theta=5e5, rope_scaling={kind_field: "llama3", **LLAMA3})
    assert five == four
    assert five.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64) and five.rope_theta == 5e5
    assert parsed(FOUR, rope_scaling={kind_field: "linear", "factor": 2}).rope_scaling == RopeScaling("linear", 2.0)


def test_what_a_config_leaves_out_has_the_defaults_of_llama() -> None:
    names = ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias")
    for absent in (..., None):
        config = parsed(rope_parameters=absent, hidden_act=..., **dict.fromkeys(names, absent))
        assert (config.num_key_value_heads, config.head_dim) == (4, 8)
        assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-6, 10000.0, None)
        assert not (config.tie_word_embeddings or config.attention_bias or config.mlp_bias)


# --- contradictions: what transformers 5 does ---------------------------------------------------
LINEAR2, LINEAR4 = ({"rope_type": "linear", "factor": factor, "rope_theta": 1e4} for factor in (2.0, 4.0))
PAIRS: dict[str, tuple[dict[str, Any], float, RopeScaling | None]] = {
    "scaling beside parameters": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 1e4, RopeScaling("linear", 4)),
    "scaling beside other scaling": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": LINEAR2},
        1e4,
        RopeScaling("linear", 4),
    ),
    "default scaling beside parameters": ({"rope_scaling": {"type": "default"}, "rope_parameters": LINEAR2}, 1e4, None),
    "empty scaling beside parameters": (
        {"rope_scaling": {}, "rope_parameters": LINEAR2},
        1e4,
        RopeScaling("linear", 2),
    ),
    "null scaling beside parameters": (
        {"rope_scaling": None, "rope_parameters": LINEAR2},
        1e4,
        RopeScaling("linear", 2),
    ),
    "scaling takes its own theta": (
        {"rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        500.0,
        RopeScaling("linear", 4),
    ),
    "scaling takes the theta beside it": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0},
        500.0,
        RopeScaling("linear", 4),
    ),
    "scaling drops the theta of parameters": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {**LINEAR2, "rope_theta": 500.0}},
        1e4,
        RopeScaling("linear", 4),
    ),
    "theta in both": ({"rope_theta": 500.0}, 1e4, None),
    "theta beside parameters without": (
        {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}},
        500.0,
        None,
    ),
    "theta beside null parameters": ({"rope_theta": 500.0, "rope_parameters": None}, 500.0, None),
    "theta beside empty parameters": ({"rope_theta": 500.0, "rope_parameters": {}}, 500.0, None),
    "null theta beside parameters": ({"rope_theta": None}, 1e4, None),
    "rope_type before type": (rope(rope_type="default", type="linear", factor=2.0), 1e4, None),
    "rope_type before type, turned": (
        rope(rope_type="linear", type="default", factor=2.0),
        1e4,
        RopeScaling("linear", 2),
    ),
    "a factor that the type does not have": (rope(rope_type="default", factor=2.0), 1e4, None),
    "a whole rotary part": ({"partial_rotary_factor": 1.0}, 1e4, None),
    "original context beside parameters": (
        {"original_max_position_embeddings": 32, **rope(rope_type="llama3", **LLAMA3)},
        1e4,
        RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
    ),
    "original context left out": (
        rope(rope_type="llama3", **{k: v for k, v in LLAMA3.items() if k[0] != "o"}),
        1e4,
        RopeScaling("llama3", 8.0, 1.0, 4.0, 256),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_of_two_fields_the_one_that_transformers_follows_counts(name: str) -> None:
    """`test_against_transformers` compares the numbers."""
    changes, theta, scaling = PAIRS[name]
    config = parsed(**changes)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


IGNORED: dict[str, Any] = {
    "torch_dtype": "float16",
    "dtype": "nonsense",
    "pretraining_tp": 2,
    "attention_dropout": 0.5,
    "layer_types": ["full_attention"] * 2,
    "sliding_window": None,
    "quantization_config": None,
    "use_cache": False,
    "is_causal": True,
    "pad_token_id": 3,
    "architectures": ["LlamaModel"],
    "hidden_act": "swish",
    "layer_norm_eps": 0.5,
    "num_kv_shared_layers": 1,
    "head_dim": 16,
    "rope_interleaved": False,
}


@pytest.mark.parametrize("name", IGNORED)
def test_what_changes_no_number_is_left_aside(name: str) -> None:
    assert parsed(**{name: IGNORED[name]}) == parsed()


# --- refused ------------------------------------------------------------------------------------
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "other model": ({"model_type": "mistral"}, "expected a model of type 'llama', got 'mistral'"),
    "no model type": ({"model_type": ...}, "expected a model of type 'llama', got None"),
    "other activation": ({"hidden_act": "gelu"}, "expected hidden_act 'silu', got 'gelu'"),
    "no activation": ({"hidden_act": None}, "expected hidden_act 'silu', got None"),
    "activation a list": ({"hidden_act": ["silu"]}, "expected hidden_act 'silu'"),
    "missing sizes": ({"hidden_size": ..., "vocab_size": ...}, "positive integers for vocab_size, hidden_size"),
    "size zero": ({"num_hidden_layers": 0}, "positive integers for num_hidden_layers"),
    "size negative": ({"max_position_embeddings": -1}, "positive integers for max_position_embeddings"),
    "size a string": ({"hidden_size": "32"}, "positive integers for hidden_size"),
    "size a float": ({"hidden_size": 32.0}, "positive integers for hidden_size"),
    "size true": ({"num_hidden_layers": True}, "positive integers for num_hidden_layers"),
    "size a list": ({"vocab_size": [97]}, "positive integers for vocab_size"),
    "KV heads do not divide": ({"num_key_value_heads": 3}, "4 heads, 3 KV heads"),
    "more KV heads than heads": ({"num_key_value_heads": 8}, "4 heads, 8 KV heads"),
    "KV heads zero": ({"num_key_value_heads": 0}, "num_key_value_heads"),
    "KV heads negative": ({"num_key_value_heads": -1}, "num_key_value_heads"),
    "KV heads true": ({"num_key_value_heads": True}, "num_key_value_heads"),
    "KV heads a string": ({"num_key_value_heads": "2"}, "num_key_value_heads"),
    "head dim odd": ({"head_dim": 15}, "even head dim, got .*head dim 15"),
    "head dim zero": ({"head_dim": 0}, "head_dim"),
    "head dim true": ({"head_dim": True}, "head_dim"),
    "head dim a string": ({"head_dim": "16"}, "head_dim"),
    "head dim a float": ({"head_dim": 16.0}, "head_dim"),
    "head dim negative": ({"head_dim": -16}, "head_dim"),
    "hidden does not divide": ({"head_dim": None, "hidden_size": 33}, "hidden_size 33 .* num_attention_heads 4"),
    "eps a word": ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    "eps a number in quotes": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    "eps negative": ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    "eps no number": ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
    "eps infinite": ({"rms_norm_eps": math.inf}, "rms_norm_eps"),
    "eps true": ({"rms_norm_eps": True}, "rms_norm_eps"),
    "eps beyond floats": ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    "bias a word": ({"attention_bias": "false"}, "attention_bias as true or false, got 'false'"),
    "bias a number": ({"mlp_bias": 0}, "mlp_bias as true or false, got 0"),
    "tied a word": ({"tie_word_embeddings": "false"}, "tie_word_embeddings as true or false, got 'false'"),
    "tied a number": ({"tie_word_embeddings": 1}, "tie_word_embeddings as true or false, got 1"),
    "eos a word": ({"eos_token_id": "end"}, "eos_token_id"),
    "eos a number in quotes": ({"eos_token_id": "7"}, "eos_token_id"),
    "eos true": ({"eos_token_id": True}, "eos_token_id"),
    "eos a float": ({"eos_token_id": 7.0}, "eos_token_id"),
    "eos nested": ({"eos_token_id": [[7]]}, "eos_token_id"),
    "eos null in a list": ({"eos_token_id": [7, None]}, "eos_token_id"),
    "unknown rope": (rope(rope_type="yarn", factor=2.0), "default, linear or llama3, got 'yarn'"),
    "dynamic rope": (rope(rope_type="dynamic", factor=2.0), "default, linear or llama3, got 'dynamic'"),
    "rope type null": (rope(rope_type=None, type="linear", factor=2.0), "default, linear or llama3, got None"),
    "rope type a list": (rope(rope_type=["default"]), "default, linear or llama3"),
    "linear without factor": (rope(rope_type="linear"), "factor"),
    "factor zero": (rope(rope_type="linear", factor=0), "factor"),
    "factor in quotes": (rope(rope_type="linear", factor="2"), "factor"),
    "factor true": (rope(rope_type="linear", factor=True), "factor"),
    "factor no number": (rope(rope_type="linear", factor=math.nan), "factor"),
    "llama3 without factors": (rope(rope_type="llama3", factor=8.0), "low_freq_factor"),
    "llama3 upside down": (
        rope(rope_type="llama3", **{**LLAMA3, "high_freq_factor": 0.5}),
        "low_freq_factor 1",
    ),
    "llama3 without a middle": (rope(rope_type="llama3", **{**LLAMA3, "high_freq_factor": 1.0}), "low_freq_factor"),
    "original context null": (
        {"original_max_position_embeddings": None, **rope(rope_type="llama3", **LLAMA3)},
        "original_max_position_embeddings",
    ),
    "original context in quotes": (
        rope(rope_type="llama3", **{**LLAMA3, "original_max_position_embeddings": "64"}),
        "original_max_position_embeddings",
    ),
    "rope a list": ({"rope_parameters": [1]}, "rope_parameters"),
    "scaling a word": ({"rope_scaling": "linear"}, "rope_scaling"),
    "rope by layer type": (rope(full_attention={"rope_type": "default"}), "one object for all layers"),
    "theta a word": (rope(rope_theta="large"), "rope_theta"),
    "theta in quotes": (rope(rope_theta="10000"), "rope_theta"),
    "theta zero": (rope(rope_theta=0), "rope_theta"),
    "theta negative": (rope(rope_theta=-1.0), "rope_theta"),
    "theta too small for fp32": (rope(rope_theta=1e-40), "rope_theta"),
    "factor too small for fp32": (rope(rope_type="linear", factor=1e-40), "factor"),
    "theta infinite": (rope(rope_theta=math.inf), "rope_theta"),
    "theta null": (rope(rope_theta=None), "rope_theta"),
    "theta null beside one": ({"rope_theta": 500.0, **rope(rope_theta=None)}, "rope_theta"),
    "theta null and no other": ({"rope_theta": None, "rope_parameters": None}, "rope_theta"),
    "half of the dims turned": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor, got 0.5"),
    "half of the dims turned, inside": (rope(partial_rotary_factor=0.5), "partial_rotary_factor, got 0.5"),
    "sliding window": ({"sliding_window": 8}, "sliding_window is 8"),
    "sliding window switched off": ({"sliding_window": 8, "use_sliding_window": False}, "sliding_window is 8"),
    "chunks": ({"attention_chunk_size": 8}, "attention_chunk_size is 8"),
    "sliding layers": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "too few layer types": ({"layer_types": ["full_attention"]}, "layer_types"),
    "layer types a word": ({"layer_types": "full_attention"}, "layer_types"),
    "layers that differ": ({"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, "per_layer_config"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "quantised, unsaid how": ({"quantization_config": {}}, "quantization_config"),
    "both directions": ({"is_causal": False}, "is_causal False"),
    "a model inside": ({"text_config": {"hidden_size": 32}}, "text_config"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_this_model_cannot_be_is_refused(name: str, folder: Path) -> None:
    changes, said = REFUSED[name]
    with pytest.raises(ModelError, match=said):
        parsed(**changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**BASE, **changes}.items() if v is not ...}))
    with pytest.raises(ModelError, match=said) as refused:
        load_model(folder)
    assert str(folder / "config.json") in str(refused.value)


NAMES = sorted({*BASE, *FOUR, *IGNORED, *(name for changes, _ in REFUSED.values() for name in changes)})
ROPE_NAMES = ["rope_type", "type", "rope_theta", "partial_rotary_factor", "full_attention", *LLAMA3]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["llama3", 2])
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.sampled_from(ROPE_NAMES), scalars, max_size=4)


@given(
    st.dictionaries(st.sampled_from(NAMES), values, max_size=4),
    st.none() | st.fixed_dictionaries({"eos_token_id": values}),
)
def test_any_settings_are_a_config_or_a_clear_error(changes: dict[str, Any], generation: dict[str, Any] | None) -> None:
    try:
        config = parse_config({**BASE, **changes}, generation)
    except ModelError:
        return
    assert rope_frequencies(config).isfinite().all() if config.head_dim < 2**20 else True
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert all(type(t) is int for t in config.eos_token_ids)


# --- the end of a text, which stands in two places ----------------------------------------------
@pytest.mark.parametrize(
    ("eos", "ids"), [(7, (7,)), ([7, 8], (7, 8)), (None, ()), (..., ()), (0, (0,)), ([], ()), (-1, (-1,))]
)
def test_end_of_text_may_be_one_token_or_several(eos: Any, ids: tuple[int, ...]) -> None:
    assert parsed(eos_token_id=eos).eos_token_ids == ids


GENERATION: dict[str, tuple[dict[str, Any] | None, tuple[int, ...]]] = {
    "no file": (None, (5,)),
    "another token": ({"eos_token_id": 7}, (7,)),
    "several": ({"eos_token_id": [0, 7]}, (0, 7)),
    "the same": ({"eos_token_id": 5}, (5,)),
    "none at all": ({"eos_token_id": []}, ()),
    "not named": ({"temperature": 0.5}, (5,)),
    "null": ({"eos_token_id": None}, (5,)),
}


@pytest.mark.parametrize("name", GENERATION)
def test_generation_config_counts_before_config(folder: Path, name: str) -> None:
    """As in transformers. A file that does not name the token leaves it to the other, in which it stands."""
    generation, ids = GENERATION[name]
    edit_json(folder / "config.json", eos_token_id=5)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert read_config(folder).eos_token_ids == load_model(folder).config.eos_token_ids == ids


def test_generation_config_alone_is_enough(folder: Path) -> None:
    edit_json(folder / "config.json", eos_token_id=...)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    assert read_config(folder).eos_token_ids == (0, 7)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", "[" * 100_000, '{"eos_token_id": "7"}', '{"eos_token_id": true}']
)
def test_a_damaged_generation_config_is_refused(folder: Path, text: str) -> None:
    (folder / "generation_config.json").write_text(text)
    for call in (read_config, load_model):
        with pytest.raises(ModelError, match=r"generation_config\.json|eos_token_id"):
            call(folder)


def test_the_shipped_model_names_its_end() -> None:
    assert read_config(PRETRAINED).eos_token_ids == (0,)
