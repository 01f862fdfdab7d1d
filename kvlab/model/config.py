"""The config of a Llama, from `config.json` and `generation_config.json` of transformers 4 or 5.

If two fields contradict each other, the field that transformers 5 uses has priority. A config with
which this model would compute other numbers than transformers is rejected. `KV_FIELDS` lists the
fields that are part of a fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvlab.errors import ModelError
from kvlab.model.files import WEIGHTS, ModelFolder, read_folder
from kvlab.model.llama import LlamaConfig, RopeScaling

# Fields that change the numbers in the KV. The vocabulary size, the output head and the context
# limit do not change them, and are left out so that a model that is saved again keeps its cache.
KV_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "attention_bias",
    "mlp_bias",
)
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_KV_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Settings that change the numbers of a Llama in transformers, and that this model lacks.
_NOT_SUPPORTED = ("sliding_window", "attention_chunk_size", "per_layer_config", "quantization_config", "text_config")


def read_config(folder: str | Path) -> LlamaConfig:
    """Return the config of a model folder.

    Raises:
        ModelError: the folder has no config, or as in `parse_config`.
    """
    return read_folder(folder, config_of)


def config_of(files: ModelFolder) -> LlamaConfig:
    """Return the config of an open folder; see `read_config`."""
    raw = files.json("config.json")
    if raw is None:
        raise ModelError(f"{files.name}: not a model folder: config.json is missing")
    if (weights := raw.get("transformers_weights")) not in (None, WEIGHTS):
        raise ModelError(
            f"{files.name}/config.json: expected no transformers_weights other than {WEIGHTS}, got {weights!r:.80}; "
            f"remove the setting and rename the file to {WEIGHTS}"
        )
    generation = files.json("generation_config.json")
    try:
        return parse_config(raw, generation)
    except ModelError as error:
        raise ModelError(f"{files.name}/config.json: {error}") from error


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> LlamaConfig:
    """Return the complete config of a Llama.

    Args:
        raw: the content of `config.json`.
        generation: the content of `generation_config.json`, if it exists. Its `eos_token_id` has
            priority over that of `raw`, as in transformers.

    Raises:
        ModelError: the model is not a Llama, a field is missing or has a wrong type, or this model
            lacks a feature.
    """
    if raw.get("model_type") != "llama":
        raise ModelError(f"expected a model of type 'llama', got {raw.get('model_type')!r}")
    _sizes(raw, SIZES)
    eos = (generation or {}).get("eos_token_id")
    return LlamaConfig(
        **kv_fields(raw),
        vocab_size=raw["vocab_size"],
        max_position_embeddings=raw["max_position_embeddings"],
        tie_word_embeddings=_bool(raw, "tie_word_embeddings"),
        eos_token_ids=_token_ids(raw.get("eos_token_id") if eos is None else eos),
    )


def kv_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `KV_FIELDS`, each in the same form for transformers 4 and 5.

    Fields with a documented default in transformers may be missing or null, but `rope_theta` may
    not be null. `model_type` may be missing, because config objects store it elsewhere.

    Raises:
        ModelError: as in `parse_config`.
    """
    _check_supported(raw)
    sizes = _sizes(raw, _KV_SIZES)
    heads = sizes["num_attention_heads"]
    kv_heads = _whole(raw, "num_key_value_heads", heads)
    D = _head_dim(raw, sizes["hidden_size"], heads)
    if heads % kv_heads or D % 2:
        raise ModelError(
            "expected KV heads to divide heads and an even head dim, "
            f"got {heads} heads, {kv_heads} KV heads, head dim {D}"
        )
    theta, scaling = _rope(raw)
    fields = {
        **sizes,
        "num_key_value_heads": kv_heads,
        "head_dim": D,
        "rms_norm_eps": _number(raw, "rms_norm_eps", 1e-6, least=0.0),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "attention_bias": _bool(raw, "attention_bias"),
        "mlp_bias": _bool(raw, "mlp_bias"),
    }
    return {name: fields[name] for name in KV_FIELDS}


def _check_supported(raw: Mapping[str, Any]) -> None:
    if raw.get("model_type", "llama") != "llama":
        raise ModelError(f"expected a model of type 'llama', got {raw['model_type']!r}")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):  # two names for the same function
        raise ModelError(f"expected hidden_act 'silu', got {raw['hidden_act']!r}")
    for name in _NOT_SUPPORTED:
        if raw.get(name) is not None:
            raise ModelError(f"{name} is {raw[name]!r:.80}, which this model does not support; expected null")
    if raw.get("is_causal") not in (None, True):
        raise ModelError(f"expected causal attention, got is_causal {raw['is_causal']!r}")
    if (kinds := raw.get("layer_types")) is not None:
        full = isinstance(kinds, list) and all(kind in ("full_attention", "attention") for kind in kinds)
        if not full or len(kinds) != raw.get("num_hidden_layers"):
            raise ModelError(f"expected layer_types 'full_attention' for every layer, got {kinds!r:.80}")


def _sizes(raw: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, int]:
    wrong = [name for name in names if not _is_size(raw.get(name))]
    if wrong:
        raise ModelError(f"expected positive integers for {', '.join(wrong)}")
    return {name: raw[name] for name in names}


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _whole(raw: Mapping[str, Any], name: str, default: int) -> int:
    value = raw.get(name)
    if value is None:
        return default
    if not _is_size(value):
        raise ModelError(f"expected {name} as a positive integer, got {value!r}")
    return int(value)


def _head_dim(raw: Mapping[str, Any], hidden: int, heads: int) -> int:
    if raw.get("head_dim") is None and hidden % heads:
        raise ModelError(f"expected hidden_size {hidden} to be a multiple of num_attention_heads {heads}")
    return _whole(raw, "head_dim", hidden // heads)


def _number(raw: Mapping[str, Any], name: str, default: float | None = None, least: float = 1e-10) -> float:
    """Return a number from `least` to 1e30, which fp32 can represent."""
    value = raw.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 1e30:
        raise ModelError(f"expected {name} as a number from {least:g} to 1e30, got {value!r:.40}")
    return float(value)


def _bool(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"expected {name} as true or false, got {value!r}")
    return bool(value)


def _token_ids(value: object) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(t, int) and not isinstance(t, bool) for t in ids):
        raise ModelError(f"expected eos_token_id as a token or a list of tokens, got {value!r:.80}")
    return tuple(ids)


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return the theta and the scaling of RoPE.

    transformers 5 has both in `rope_parameters`; transformers 4 has `rope_theta` and `rope_scaling`.
    A non-empty `rope_scaling` replaces `rope_parameters` completely. A `rope_theta` inside this
    object has priority over one beside it.
    """
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    params = raw.get(name) or {}
    if not isinstance(params, Mapping) or any(isinstance(value, Mapping) for value in params.values()):
        raise ModelError(f"expected {name} to be one object for all layers, got {params!r:.80}")
    for holder in (raw, params):
        if holder.get("partial_rotary_factor") not in (None, 1):
            raise ModelError(f"expected no partial_rotary_factor, got {holder['partial_rotary_factor']!r}")
    theta = _number({"rope_theta": raw.get("rope_theta", 10000.0), **params}, "rope_theta")
    kind = params.get("rope_type", params.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind, _number(params, "factor"))
    if kind == "llama3":
        return theta, _llama3(raw, params)
    raise ModelError(f"expected RoPE of type default, linear or llama3, got {kind!r}")


def _llama3(raw: Mapping[str, Any], params: Mapping[str, Any]) -> RopeScaling:
    """Return the scaling. The original context is taken from `raw`, then `params`, then the model's context."""
    field = "original_max_position_embeddings"
    original = {field: raw.get(field, params.get(field, raw.get("max_position_embeddings")))}
    low, high = (_number(params, f"{speed}_freq_factor") for speed in ("low", "high"))
    if low >= high:
        raise ModelError(f"expected low_freq_factor {low} below high_freq_factor {high}")
    return RopeScaling("llama3", _number(params, "factor"), low, high, _sizes(original, (field,))[field])
