"""What a model of Hugging Face transformers is, as far as its KV goes: its shape, its identity, and whether it fits.

Nothing is guessed from the config that a forward pass of two tokens shows: number of layers, heads, head dim, dtype
and devices. `fit` refuses every model whose KV is not plain keys and values that depend on earlier tokens only.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from kvlab.connectors.identity import LENGTH_DEPENDENT_ROPE, as_stored, foreign_config, foreign_fingerprint, rope_types
from kvlab.connectors.shadow import different_elements
from kvlab.core.keys import Origin, digest
from kvlab.errors import ConfigError
from kvlab.model.fingerprint import digest_tensors

# transformers 5.24 renamed the argument; the old name warns there, and is the only one before.
_PARAMETERS: Final = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME: Final = "cache" if "cache" in _PARAMETERS else "past_key_values"
KNOWN_HOOKS: Final = ("transformers.", "accelerate.", "peft.")  # they record, or move weights
PLAIN_LLAMA: Final = "transformers.models.llama.modeling_llama.LlamaForCausalLM"
SAMPLES: Final = 16  # numbers of each tensor that `stamp` looks at
CAUSAL_TOLERANCE: Final = 0.25  # far above rounding, far below the effect of a token that should not be seen


@dataclass(frozen=True)
class Fit:
    """The shape of a model's KV: L, H, D, its dtype, and the device of each layer."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]


def fit(model: Any) -> Fit:
    """Return the shape of the model's KV.

    Raises:
        ConfigError: blocks of this model's KV cannot be shared, or it is in training mode or under autocast.
    """
    _check_config(model)
    if problem := state_problem(model):
        raise ConfigError(problem)
    pairs, alone = _trial(model, [0, 1]), _trial(model, [0])
    first = pairs[0][0]
    for layer, pair in enumerate(pairs):
        for plane in pair:
            if plane is None or plane.shape != first.shape or plane.dtype != first.dtype or plane.shape[-2] != 2:
                raise ConfigError(
                    "expected keys and values [N, H, T, D] of the same shape and dtype in all layers, one per token, "
                    f"got {_shape(plane)} in layer {layer} and {_shape(first)} in layer 0; such KV is not supported"
                )
    for layer, (pair, short) in enumerate(zip(pairs, alone, strict=True)):
        for plane, same in zip(pair, short, strict=True):
            if different_elements(plane[..., :1, :], same, CAUSAL_TOLERANCE):
                raise ConfigError(
                    f"expected KV that depends on earlier tokens only, but layer {layer} sees later ones; a prefix of "
                    "bidirectional attention cannot be cached"
                )
    _, heads, _, dim = first.shape
    return Fit(len(pairs), heads, dim, first.dtype, tuple(keys.device for keys, _ in pairs))


def state_problem(model: Any) -> str:
    """Return why the model computes other KV than its weights say, or ""."""
    if any(module.training for module in model.modules()):
        return "expected a model in evaluation mode, because dropout changes the KV; call model.eval()"
    if torch.is_autocast_enabled(model.device.type):
        return "expected no autocast, which the block keys do not cover; load the model in the dtype to compute in"
    for name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if not getattr(hook, "__module__", "").startswith(KNOWN_HOOKS):
                return (
                    f"expected a model without forward hooks, which may change its KV, got one at {name or 'the top'}"
                )
    return ""


def fingerprint(model: Any, tokenizer: bytes, adapter: bytes, dtype: torch.dtype) -> tuple[bytes, Origin]:
    """Hash the weights, and return the fingerprint and its parts. For a plain Llama they are those of `kvlab.Llama`.

    Raises:
        ConfigError: the weights cannot be read.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = f"{type(base).__module__}.{type(base).__qualname__}"
    config = model.config.to_dict()
    changed = _changed_buffers(model)
    if kind != PLAIN_LLAMA or changed:  # other code may compute other KV from the same weights
        config["model_type"] = f"{kind} {changed}".rstrip()
    try:
        weights = digest_tensors(as_stored(model.state_dict()))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"expected weights whose bytes can be read, got {error}") from error
    name = str(getattr(model.config, "_name_or_path", "")) or type(model).__name__
    name = Path(name).name if Path(name).is_absolute() else name  # paths of this machine are nobody's business
    parts = hashlib.sha256(foreign_config(config)).digest(), weights, tokenizer, adapter
    whole = foreign_fingerprint(config, weights, tokenizer, adapter, str(dtype).removeprefix("torch."))
    return whole, Origin(name, f"transformers {transformers.__version__}", *parts)


def _changed_buffers(model: Any) -> str:
    """Return the digest of the numbers that are in no file and not what the config says, or "".

    `model.to(torch.bfloat16)` also rounds the frequencies of RoPE, `from_pretrained(dtype=torch.bfloat16)` does not,
    and `model.bfloat16().float()` leaves them rounded: the same weights then give other keys.
    """
    found = []
    for path, module in model.named_modules():
        buffers = {name: getattr(module, name) for name in sorted(module._non_persistent_buffers_set)}
        expected = _new_buffers(module) if buffers else {}
        for name, buffer in buffers.items():
            fresh = expected.get(name)
            if buffer is None or not buffer.is_floating_point() or (fresh is not None and _close(buffer, fresh)):
                continue
            found.append((f"{path}.{name} {name}", buffer))  # the digest leaves names of RoPE buffers out
    return digest_tensors(found).hex() if found else ""


def _new_buffers(module: Any) -> dict[str, Tensor]:
    """Return the buffers of a new module of RoPE; nothing of other modules, which need more than a config."""
    if "inv_freq" not in module._non_persistent_buffers_set or not hasattr(module, "config"):
        return {}
    try:
        return dict(type(module)(module.config).named_buffers())
    except (TypeError, ValueError, AttributeError):  # of another signature
        return {}


def _close(buffer: Tensor, fresh: Tensor) -> bool:
    """Whether two buffers are the same up to the last bits, which differ between devices."""
    same = buffer.dtype == fresh.dtype and buffer.shape == fresh.shape
    return same and torch.allclose(buffer.cpu(), fresh.cpu(), rtol=1e-5, atol=0)


def adapter_digest(model: Any) -> bytes:
    """Return the digest of which adapters (PEFT) are active, merged and scaled how in every layer; b"" without any."""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    layers = [
        [name, *(getattr(module, attribute, None) for attribute in names)]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "disable_adapters", None), bool)  # it is a method of models, a bool of layers
    ]
    state = json.dumps(layers, sort_keys=True, separators=(",", ":"), default=_plain)
    return digest("kvlab/1/adapters", state.encode()) if layers else b""


def stamp(model: Any) -> tuple[object, ...]:
    """Return what changes when weights, adapters, config or devices change, without reading all weights.

    Fused optimizers and writes through `.data` change neither address nor version, so some numbers count as well.
    """
    tensors = model.state_dict(keep_vars=True)
    places = [
        (name, t.data_ptr(), None if t.is_inference() else t._version, t.dtype, t.shape, t.device)
        for name, t in tensors.items()
    ]
    return places, _samples(tensors.values()), adapter_digest(model), model.config.to_dict()


def _samples(tensors: Any) -> dict[tuple[torch.device, torch.dtype], bytes]:
    """Return the bytes of some numbers of each tensor, with one transfer for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        groups.setdefault((tensor.device, tensor.dtype), []).append(flat[:: max(1, flat.numel() // SAMPLES)])
    return {key: torch.cat(parts).cpu().view(torch.uint8).numpy().tobytes() for key, parts in groups.items()}


def _check_config(model: Any) -> None:
    if not all(hasattr(model, name) for name in ("config", "generate", "generation_config", "state_dict")):
        raise ConfigError(f"expected a causal LM of transformers, got {type(model).__name__}")
    config = model.config.get_text_config(decoder=True)
    for adapter in getattr(model, "peft_config", {}).values():
        if getattr(adapter, "is_prompt_learning", False) or getattr(adapter, "alora_invocation_tokens", None):
            raise ConfigError(
                f"expected adapters that change weights only, got {type(adapter).__name__}, which adds virtual tokens "
                "or waits for invocation tokens"
            )
    if model.config.is_encoder_decoder:
        raise ConfigError("expected a decoder-only model, got an encoder-decoder")
    if any(tensor.is_meta for tensor in model.state_dict(keep_vars=True).values()):
        raise ConfigError("expected all weights in memory, got some on the meta device (offloaded); load them first")
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None):
        raise ConfigError("expected causal attention, got bidirectional, whose KV depends on later tokens")
    if found := LENGTH_DEPENDENT_ROPE.intersection(rope_types(model.config.to_dict())):
        raise ConfigError(f"expected RoPE that depends on the position only, got {', '.join(sorted(found))}")
    if (chosen := model.generation_config.cache_implementation) is not None:
        raise ConfigError(f"expected generation_config.cache_implementation=None, got {chosen!r}; unset it")
    kinds = {
        type(layer).__name__ for layer in DynamicCache(config=model.config).layers if type(layer) is not DynamicLayer
    }
    if kinds:
        raise ConfigError(
            f"expected plain keys and values in all layers, got {', '.join(sorted(kinds))}; models with sliding "
            "windows, linear attention or shared KV are not supported"
        )


@torch.no_grad()
def _trial(model: Any, tokens: list[int]) -> list[tuple[Any, Any]]:
    """Return keys and values of each layer for a few tokens."""
    cache: Any = DynamicCache(config=model.config)
    try:
        model(input_ids=torch.tensor([tokens], device=model.device), use_cache=True, **{CACHE_NAME: cache})
    except Exception as error:  # of code that is not ours
        raise ConfigError(
            f"expected a model that runs with a DynamicCache, got {type(error).__name__}: {error}"
        ) from error
    if not cache.layers:
        raise ConfigError("expected a model that fills a DynamicCache, got one that does not use it")
    return [(layer.keys, layer.values) for layer in cache.layers]


def _shape(tensor: Any) -> str:
    return "nothing" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else sorted(value) if isinstance(value, set) else str(value)
