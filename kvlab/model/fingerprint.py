"""The fingerprint of a model's KV: config, weights, tokenizer, adapter and compute dtype.

    for a folder on disk             fingerprint_of_folder(folder, "float16")
    for a model of another library   fingerprint(model.config.to_dict(), digest_tensors(model.state_dict().items()))
    for a model of this package      spec_of(model).fingerprint

For the same model, all three give the same fingerprint if they also have the same tokenizer, adapter
and dtype. This does not depend on the library that wrote the config, or on the division of the weights
into files. `kvlab.core.keys` defines what is hashed.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvlab.core.keys import KEY_BYTES, KVSpec, Origin, digest
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
    "spec_of_folder",
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
    """Return the fingerprint of everything that determines a model's KV. 32 bytes.

    Args:
        config: the fields of `config.json`, as in transformers 4 or 5 (`config.to_dict()`).
        weights: from `digest_tensors`, `folder_digests` or `WeightsDigest`.
        tokenizer: from `tokenizer_digest`.
        adapter: the digest of an adapter, such as a LoRA.
        dtype: the compute dtype.

    Raises:
        ModelError: the config is not that of a plain Llama, or a field without a documented default
            is missing.
        ConfigError: the config is not a mapping or a `LlamaConfig`, a digest has another type or
            length, or the dtype is unsupported.
    """
    if not all(isinstance(part, bytes) for part in (weights, tokenizer, adapter)):
        raise ConfigError("expected all digests as bytes; bytes.fromhex decodes a hexadecimal digest")
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
    """Return the allow-listed config fields as canonical JSON, the same for transformers 4 and 5.

    Raises:
        ModelError, ConfigError: as in `fingerprint`.
    """
    if not isinstance(config, Mapping | LlamaConfig):
        raise ConfigError(
            f"expected the fields of a config.json, got {type(config).__name__}; "
            "call config.to_dict() for a config of transformers, or spec_of(model) for a kvlab.Llama"
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
    """Return the digests of a folder's weights and tokenizer.

    `progress(done, total)` receives numbers of bytes while the weights are hashed. Their digest is
    cached in the user's cache directory, so unchanged weights are not hashed again.

    Raises:
        ModelError: as in `load_model`.
    """
    return read_folder(folder, lambda files: _read(files, progress)[1])


def fingerprint_of_folder(
    folder: str | Path,
    dtype: str | torch.dtype = "float32",
    adapter: bytes = b"",
    progress: Progress | None = None,
) -> bytes:
    """Return the fingerprint of a model folder without loading the model.

    Raises:
        ModelError, ConfigError: as in `folder_digests` and `fingerprint`.
    """
    config, found = read_folder(folder, lambda files: _read(files, progress))
    return fingerprint(config, found.weights, found.tokenizer, adapter, dtype)


def fingerprint_of_model(model: Llama, adapter: bytes = b"") -> bytes:
    """Return the fingerprint of a model of this package.

    A loaded model has the digests of the bytes that were loaded. Later changes of the folder have no
    effect. For a model without a folder, each call hashes the weights in memory and no tokenizer.
    """
    return spec_of(model, adapter).fingerprint


def spec_of(model: Llama, adapter: bytes = b"") -> KVSpec:
    """Return the `KVSpec` of a model of this package, with its fingerprint (see `fingerprint_of_model`)."""
    found = model.digests if model.folder is not None else None
    if found is None:
        found = Digests(digest_tensors(model.state_dict().items()))
    return _spec(model.config, found, adapter, model.dtype, "" if model.folder is None else str(model.folder))


def spec_of_folder(folder: str | Path, dtype: torch.dtype = torch.float32, adapter: bytes = b"") -> KVSpec:
    """Return the `KVSpec` of a model folder without loading the model.

    Raises:
        ModelError, ConfigError: as in `fingerprint_of_folder`.
    """
    config, found = read_folder(folder, lambda files: _read(files, None))
    return _spec(config, found, adapter, dtype, str(folder))


def _spec(config: LlamaConfig, found: Digests, adapter: bytes, dtype: torch.dtype, folder: str) -> KVSpec:
    sizes = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    whole = fingerprint(config, found.weights, found.tokenizer, adapter, dtype)
    name = Path(folder).name if folder else "Llama"  # paths of this machine are nobody's business
    parts = hashlib.sha256(config_bytes(config)).digest(), found.weights, found.tokenizer, adapter
    return KVSpec(*sizes, dtype, whole, Origin(name, "kvlab", *parts))


def _read(files: ModelFolder, progress: Progress | None) -> tuple[LlamaConfig, Digests]:
    config = config_of(files)
    weights = FolderWeights(files, config.tie_word_embeddings)
    return config, Digests(weights.digest(progress), tokenizer_of(files))
