"""The fingerprint of a model that another library runs.

A plain Llama gets the fingerprint that `kvlab.model.fingerprint` gives it, so that both libraries share blocks.
For every other model no list of the fields that change KV exists. All fields of its config therefore count,
except those of `IRRELEVANT`: two configs may differ without need, but never agree by mistake.

    fingerprint = SHA256( field("kvlab/1/fingerprint") field(config) field(weights digest)
                          field(tokenizer digest) field(adapter digest or "")
                          field(compute dtype) field(layout version as u32) )
    config      = JSON of all fields with model_type, sorted, without those of IRRELEVANT
    files       = SHA256( field("kvlab/1/files") field(e_1) … ), sorted: e = field(name) SHA256(content)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlab.core.keys import digest, field
from kvlab.errors import ModelError
from kvlab.model.digests import FolderWeights
from kvlab.model.files import INDEX, WEIGHTS, ModelFolder, read_folder
from kvlab.model.fingerprint import LAYOUT_VERSION, config_bytes, fingerprint

IRRELEVANT = frozenset(
    (
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "_attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",  # the compute dtype is a field of its own
        "eos_token_id",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)


LENGTH_DEPENDENT_ROPE = frozenset(("dynamic", "longrope"))
"""RoPE that turns early keys by an angle that depends on the length of the text, or of the longest one allowed."""


def rope_types(config: Any) -> Iterator[str]:
    """Yield the RoPE types anywhere in a config; newer models have one for each type of layer."""
    if isinstance(config, Mapping):
        yield from (str(config[name]) for name in ("rope_type", "type") if name in config)
        for value in config.values():
            yield from rope_types(value)


def foreign_fingerprint(
    config: Mapping[str, Any], weights: bytes, tokenizer: bytes = b"", adapter: bytes = b"", dtype: str = "float32"
) -> bytes:
    """Return the fingerprint of a model of another library. 32 bytes.

    Args:
        config: all fields, for example of `model.config.to_dict()`, with `model_type`.
        weights, tokenizer, adapter: digests, as in `kvlab.model.fingerprint.fingerprint`.
        dtype: the compute dtype, torch's name for it.
    """
    if config.get("model_type") == "llama":
        try:
            return fingerprint(config, weights, tokenizer, adapter, dtype)
        except ModelError:
            pass  # a Llama with a feature that this package lacks
    version = struct.pack("<I", LAYOUT_VERSION)
    text = foreign_config(config)
    return digest("kvlab/1/fingerprint", text, weights, tokenizer, adapter, dtype.encode(), version)


def foreign_config(config: Mapping[str, Any]) -> bytes:
    """Return the config as it is hashed into `foreign_fingerprint`."""
    if config.get("model_type") == "llama":
        with contextlib.suppress(ModelError):
            return config_bytes(config)
    kept = {str(name): value for name, value in config.items() if name not in IRRELEVANT}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"), default=str).encode()


def as_stored(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a loaded model as its file has them, for `digest_tensors`.

    A file of fp16 or bf16 weights is often loaded as fp32. If all weights are fp32 and one of these dtypes holds them
    exactly, they are yielded in it. Equal digests still mean equal numbers.
    """
    floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    dtype = None
    if all(tensor.dtype == torch.float32 for tensor in floats):
        narrow = (torch.bfloat16, torch.float16)  # weights of fp16 hardly ever fit in bf16; the reverse is common
        dtype = next((d for d in narrow if all(torch.equal(t.to(d).float(), t) for t in floats)), None)
    for name, tensor in tensors.items():
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def weights_of_folder(folder: str | Path, tied: bool = False) -> bytes:
    """Return the digest of the safetensors files of any model folder. Unchanged files are hashed once.

    Raises:
        ModelError: there are no safetensors, or they are damaged. Pickled weights are not read.
    """

    def read(files: ModelFolder) -> bytes:
        return FolderWeights(files, tied).digest()

    return read_folder(folder, read)


def safetensors_problem(folder: str | Path) -> str:
    """Return why an engine may load other weights of a folder than `weights_of_folder` hashes, or ""."""
    found = {path.name for path in Path(folder).glob("*.safetensors")}
    indexed = (Path(folder) / INDEX).exists()
    if WEIGHTS in found and (indexed or len(found) > 1):
        others = sorted((found - {WEIGHTS}) | ({INDEX} if indexed else set()))
        return f"expected {WEIGHTS} alone, or an index and its files, got also {', '.join(others)}; remove what is old"
    return ""


def files_digest(folder: str | Path) -> bytes:
    """Return the digest of all files directly in a folder, such as that of a LoRA adapter.

    Raises:
        ModelError: the folder cannot be read, or has no files.
    """
    try:
        paths = sorted(path for path in Path(folder).iterdir() if path.is_file())
        entries = [field(path.name.encode()) + hashlib.sha256(path.read_bytes()).digest() for path in paths]
    except OSError as error:
        raise ModelError(f"{folder}: the files of an adapter cannot be read ({error})") from error
    if not entries:
        raise ModelError(f"{folder}: expected the files of an adapter, found none")
    return digest("kvlab/1/files", *entries)
