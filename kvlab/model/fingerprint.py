"""The fingerprint of what made a piece of KV: config, weights, tokenizer, adapter, compute dtype.

    of a folder on disk            fingerprint_of_folder(folder, "float16")
    of another library's model     fingerprint(model.config.to_dict(), digest_tensors(model.state_dict().items()))
    of the model of this package   spec_of(model).fingerprint

All three agree on the same model, whichever library wrote its config and in whatever files its
weights lie. What is hashed stands in `kvlab.core.keys`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvlab.core.keys import KEY_BYTES, KVSpec, digest
from kvlab.errors import ConfigError
from kvlab.model.config import KV_FIELDS, config_of, kv_fields
from kvlab.model.digests import Digests, FolderWeights, Progress, digest_tensors, tokenizer_digest, tokenizer_of
from kvlab.model.files import ModelFolder, read_folder
from kvlab.model.llama import Llama, LlamaConfig

__all__ = [
    "Digests",
    "config_bytes",
    "digest_tensors",
    "fingerprint",
    "fingerprint_of_folder",
    "fingerprint_of_model",
    "folder_digests",
    "spec_of",
    "tokenizer_digest",
]

LAYOUT_VERSION = 1
DTYPES = ("float32", "float16", "bfloat16")


def fingerprint(
    config: Mapping[str, Any] | LlamaConfig,
    weights: bytes,
    tokenizer: bytes = b"",
    adapter: bytes = b"",
    dtype: str | torch.dtype = "float32",
) -> bytes:
    """Identity of everything that shapes a model's KV. 32 bytes.

    Args:
        config: the fields of `config.json`, as transformers 4 or 5 has them (`config.to_dict()`).
        weights: from `digest_tensors`, `folder_digests` or `WeightsDigest`.
        tokenizer: from `tokenizer_digest`.
        adapter: the digest of a LoRA or the like.
        dtype: what the model computes in.

    Raises:
        ModelError: a config that is no plain Llama's, or lacks a field without a documented default.
        ConfigError: no config fields, a digest of another length, or a dtype that no KV has.
    """
    if not all(isinstance(part, bytes) for part in (weights, tokenizer, adapter)):
        raise ConfigError("expected digests as bytes, got something else; bytes.fromhex reads a written one")
    if len(weights) != KEY_BYTES or len(tokenizer) not in (0, KEY_BYTES):
        raise ConfigError(
            f"expected digests of {KEY_BYTES} bytes for weights and tokenizer (or b'' for no tokenizer), "
            f"got {len(weights)} and {len(tokenizer)}"
        )
    version = struct.pack("<I", LAYOUT_VERSION)
    return digest(
        "kvlab/1/fingerprint", config_bytes(config), weights, tokenizer, adapter, _dtype_name(dtype).encode(), version
    )


def config_bytes(config: Mapping[str, Any] | LlamaConfig) -> bytes:
    """The allow-listed config fields as canonical JSON, the same whichever library wrote them.

    Raises:
        ModelError, ConfigError: as `fingerprint`.
    """
    if not isinstance(config, Mapping | LlamaConfig):
        raise ConfigError(
            f"expected the fields of a config.json, got {type(config).__name__}; "
            "config.to_dict() gives them for a config of transformers, spec_of(model) does it all for a kvlab.Llama"
        )
    fields = vars(config) if isinstance(config, LlamaConfig) else kv_fields(config)
    kept = {name: fields[name] for name in KV_FIELDS}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"), default=asdict).encode()


def _dtype_name(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"expected a compute dtype of {', '.join(DTYPES)}, got {dtype!r:.40}")
    return name


def folder_digests(folder: str | Path, progress: Progress | None = None) -> Digests:
    """The digests of a folder's weights and tokenizer, as they are now.

    `progress(done, total)` is called in bytes of weights while they are hashed. Their digest is
    remembered in the user's cache directory: unchanged weights are not hashed again.

    Raises:
        ModelError: as `load_model`.
    """
    return read_folder(folder, lambda files: _read(files, progress)[1])


def fingerprint_of_folder(
    folder: str | Path,
    dtype: str | torch.dtype = "float32",
    adapter: bytes = b"",
    progress: Progress | None = None,
) -> bytes:
    """`fingerprint` of a model folder, without loading the model.

    Raises:
        ModelError, ConfigError: as `folder_digests` and `fingerprint`.
    """
    config, found = read_folder(folder, lambda files: _read(files, progress))
    return fingerprint(config, found.weights, found.tokenizer, adapter, dtype)


def fingerprint_of_model(model: Llama, adapter: bytes = b"") -> bytes:
    """`fingerprint` of a model of this package.

    A loaded model has the digests of the bytes that it was loaded from, whatever becomes of the
    folder. A model without a folder is hashed as it is in memory, at every call.
    """
    found = model.digests if model.folder is not None else None
    if found is None:
        found = Digests(digest_tensors(model.state_dict().items()))
    return fingerprint(model.config, found.weights, found.tokenizer, adapter, model.dtype)


def spec_of(model: Llama, adapter: bytes = b"") -> KVSpec:
    """The `KVSpec` of a model of this package, fingerprint computed (see `fingerprint_of_model`)."""
    c = model.config
    return KVSpec(
        c.num_hidden_layers, c.num_key_value_heads, c.head_dim, model.dtype, fingerprint_of_model(model, adapter)
    )


def _read(files: ModelFolder, progress: Progress | None) -> tuple[LlamaConfig, Digests]:
    config = config_of(files)
    weights = FolderWeights(files, config.tie_word_embeddings)
    return config, Digests(weights.digest(progress), tokenizer_of(files))
