"""Read a model folder in Hugging Face's layout: config.json, *.safetensors, tokenizer.json.

Only safetensors are read, never a pickle, and nothing is downloaded. `load_model()` without an
argument gives the trained model that ships with the package; `pretrained/README.md` says
how it was trained and what it is not.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvlab.errors import ConfigError, ModelError
from kvlab.model.llama import Llama, LlamaConfig, RopeScaling

T = TypeVar("T")

PRETRAINED = Path(__file__).parent / "pretrained"
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def load_model(folder: str | Path = PRETRAINED, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Llama:
    """Load a Llama for inference.

    Args:
        folder: a Hugging Face-format folder; the shipped model by default.
        dtype: what to compute in. FP32 is the default because only there does a cached
            prefix give exactly the tokens that no cache gives.
        device: "cpu", or "cuda" if asked.

    Raises:
        ModelError: not a model folder, not a plain Llama, or weights missing, truncated or
            of the wrong shape.
        ConfigError: an unknown device, or CUDA was asked for and is not there.
    """
    folder = Path(folder)
    config = read_config(folder)
    _check_device(device)
    with torch.device("meta"):  # no memory, no random initialisation
        model = Llama(config)
    state = {name: t.to(device=device, dtype=dtype) for name, t in read_weights(folder)}
    if config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    _check_weights(model, state, folder)
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:  # assign made two Parameters of the one tensor
        model.lm_head.weight = model.model.embed_tokens.weight
    model.folder = folder
    return model.requires_grad_(False).eval()


def read_config(folder: Path) -> LlamaConfig:
    """Parse `config.json`, as transformers 4 or 5 writes it.

    Raises:
        ModelError: missing, not JSON, not a Llama, or with a feature this model does not have.
    """
    raw = read_json(folder, "config.json")
    kind = raw.get("model_type")
    if kind != "llama":
        raise ModelError(f"{folder}: expected a model of type 'llama', got {kind!r}")
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{folder}: expected hidden_act 'silu', got {raw['hidden_act']!r}")
    missing = [k for k in SIZES if not (type(raw.get(k)) is int and raw[k] > 0)]
    if missing:
        raise ModelError(f"{folder}/config.json: expected positive integers for {', '.join(missing)}")
    try:
        config = _parse(raw)
    except KeyError as error:
        raise ModelError(f"{folder}/config.json: {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise ModelError(f"{folder}/config.json: {error}") from error
    heads, kv_heads, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if not (kv_heads > 0 and heads % kv_heads == 0 and D > 0 and D % 2 == 0):
        raise ModelError(
            f"{folder}: expected KV heads to divide heads and an even head dim, got "
            f"{heads} heads, {kv_heads} KV heads, head dim {D}"
        )
    return config


def _parse(raw: dict[str, Any]) -> LlamaConfig:
    """The config's fields; a field of a wrong type raises ValueError and names it."""
    heads = raw["num_attention_heads"]
    theta, scaling = _rope(raw)
    return LlamaConfig(
        **{k: raw[k] for k in SIZES},
        num_key_value_heads=_field(raw, "num_key_value_heads", operator.index, heads),
        head_dim=_field(raw, "head_dim", operator.index, raw["hidden_size"] // heads),
        rms_norm_eps=_field(raw, "rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        eos_token_ids=_field(raw, "eos_token_id", _token_ids, ()),
    )


def _field(raw: dict[str, Any], name: str, convert: Callable[[Any], T], default: T) -> T:
    value = raw.get(name)
    try:
        return default if value is None else convert(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {value!r} ({error})") from error


def _token_ids(value: object) -> tuple[int, ...]:
    ids: list[Any] = value if isinstance(value, list) else [value]
    return tuple(operator.index(t) for t in ids)


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for every weight of the folder, in order of name within each file.

    Raises:
        ModelError: no safetensors, or a file that is damaged or cut short.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder}: no *.safetensors file; pickled weights (*.bin, *.pt) are not read: convert them first"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                for name in sorted(weights.keys()):
                    yield name, weights.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: damaged or cut short ({error}); copy the file again") from error


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of a model folder.

    Raises:
        ModelError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads((folder / name).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: not a model folder: {name} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{folder}/{name}: expected a JSON object, got {type(value).__name__}")
    return value


def _rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Transformers 5 keeps everything in `rope_parameters`; 4 had `rope_theta` and `rope_scaling`."""
    params = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(params, dict):
        raise ValueError(f"expected rope_parameters to be an object, got {params!r}")
    theta = _field({"rope_theta": raw.get("rope_theta"), **params}, "rope_theta", float, 10000.0)
    kind = params.get("rope_type", params.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind, float(params["factor"]))
    if kind == "llama3":
        return theta, RopeScaling(
            kind,
            float(params["factor"]),
            float(params["low_freq_factor"]),
            float(params["high_freq_factor"]),
            int(params["original_max_position_embeddings"]),
        )
    raise ValueError(f"expected RoPE of type default, linear or llama3, got {kind!r}")


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"expected a device such as 'cpu' or 'cuda', got {device!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch finds no CUDA GPU; use device='cpu'")


def _check_weights(model: Llama, state: dict[str, Tensor], folder: Path) -> None:
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in state.items()}
    if expected == got:
        return
    missing = sorted(expected.keys() - got.keys())
    extra = sorted(got.keys() - expected.keys())
    wrong = [
        f"{n} {got[n]} instead of {expected[n]}" for n in sorted(expected.keys() & got.keys()) if expected[n] != got[n]
    ]
    parts = [
        f"{what}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unknown", extra), ("wrong shape", wrong))
        if names
    ]
    raise ModelError(f"{folder}: the weights do not fit config.json; {'; '.join(parts)}")
