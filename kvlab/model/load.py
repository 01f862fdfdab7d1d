"""Load a model folder in Hugging Face's format: config.json, safetensors, tokenizer.json.

Nothing is downloaded, and only JSON and safetensors are read (`kvlab.model.files`). Without an
argument, `load_model()` loads the trained model of this package; `pretrained/README.md` describes
its training and its limits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kvlab.errors import ConfigError, ModelError
from kvlab.model.config import config_of
from kvlab.model.digests import Digests, FolderWeights, Progress, tokenizer_of
from kvlab.model.files import ModelFolder, read_folder
from kvlab.model.llama import Llama, LlamaConfig
from kvlab.model.stored import EMBEDDING, OUTPUT_HEAD, StoredTensor

PRETRAINED = Path(__file__).parent / "pretrained"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_STORED_DTYPES = (*DTYPES, torch.float64)
log = logging.getLogger("kvlab")


def load_model(
    folder: str | Path = PRETRAINED,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Llama:
    """Load a Llama for inference.

    Later changes of the folder do not affect the model: weights are copied, and the model stores
    the digests of the files. Weights are hashed while they are read, once per state of their files
    (`kvlab.model.digests`).

    Args:
        folder: a folder in Hugging Face's format; by default the model of this package.
        dtype: the compute dtype. FP32 is the default, because a cached prefix gives exactly the same
            tokens as no cache only in FP32.
        device: the device of the weights, for example "cpu" or "cuda".
        progress: receives numbers of bytes, as `progress(done, total)`.

    Raises:
        ModelError: the folder is not that of a plain Llama, weights are missing, truncated or of the
            wrong shape, or files change while they are read.
        ConfigError: the dtype is unsupported, or the device is unknown or unavailable.
    """
    _check_settings(dtype, device)
    return read_folder(folder, lambda files: _load(files, dtype, device, progress))


def _load(files: ModelFolder, dtype: torch.dtype, device: str, progress: Progress | None) -> Llama:
    config = config_of(files)
    weights = FolderWeights(files, config.tie_word_embeddings)
    _check_weights(config, weights.stored, files)
    state = {name: t.to(device=device, dtype=dtype) for name, t in weights.tensors(progress)}
    config = _with_head(config, state, files)
    with torch.device("meta"):  # without memory or random initialisation
        model = Llama(config)
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:  # `assign` created two Parameters of one tensor
        model.lm_head.weight = model.model.embed_tokens.weight
    model.folder, model.digests = files.name, Digests(weights.digest(), tokenizer_of(files))
    return model.requires_grad_(False).eval()


def _with_head(config: LlamaConfig, state: dict[str, Tensor], files: ModelFolder) -> LlamaConfig:
    """Return the config with the stored output head: a head that differs from the embedding is not tied to it."""
    if not config.tie_word_embeddings:
        return config
    if OUTPUT_HEAD in state and not torch.equal(state[OUTPUT_HEAD], state[EMBEDDING]):
        log.warning("%s: config.json ties the output head, but the stored head differs and is used", files.name)
        return replace(config, tie_word_embeddings=False)
    state[OUTPUT_HEAD] = state[EMBEDDING]
    return config


def _check_settings(dtype: torch.dtype, device: str) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"expected a compute dtype of {', '.join(map(str, DTYPES))}, got {dtype!r:.40}")
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"expected a device such as 'cpu' or 'cuda', got {device!r:.40}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was requested, but torch finds no CUDA GPU; use device='cpu'")
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used here ({error}); use device='cpu'") from error


def _check_weights(config: LlamaConfig, stored: Mapping[str, StoredTensor], files: ModelFolder) -> None:
    """Compare the stored weights with those of the config before reading them."""
    expected = _expected_shapes(config, len(stored), files)
    got = {name: tensor.shape for name, tensor in stored.items()}
    if config.tie_word_embeddings:
        got.setdefault(OUTPUT_HEAD, expected[OUTPUT_HEAD])
    faults = {
        "missing": sorted(expected.keys() - got.keys()),
        "unknown": sorted(got.keys() - expected.keys()),
        "wrong shape": [
            f"{n} {got[n]} instead of {expected[n]}"
            for n in sorted(expected.keys() & got.keys())
            if expected[n] != got[n]
        ],
        "not floating point": [f"{n} {t.dtype}" for n, t in stored.items() if t.dtype not in _STORED_DTYPES],
    }
    parts = [
        f"{what}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}" for what, names in faults.items() if names
    ]
    if any(name.endswith(".bias") for name in faults["missing"] + faults["unknown"]):
        parts.append(f"attention_bias is {config.attention_bias} and mlp_bias {config.mlp_bias}")
    if parts:
        raise ModelError(f"{files.name}: the weights do not fit config.json; {'; '.join(parts)}")


def _expected_shapes(config: LlamaConfig, stored: int, files: ModelFolder) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the config's weights. Impossible sizes are rejected without allocating memory."""
    if config.num_hidden_layers > stored:
        raise ModelError(
            f"{files.name}: the weights do not fit config.json; "
            f"num_hidden_layers is {config.num_hidden_layers}, but there are only {stored} weights"
        )
    try:
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in Llama(config).state_dict().items()}
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ModelError(f"{files.name}: config.json has impossible sizes ({error})") from error
