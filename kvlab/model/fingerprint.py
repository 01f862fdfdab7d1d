"""The fingerprint of what made a piece of KV: config, weights, tokenizer, adapter, compute dtype.

Its text stands in `kvlab.core.keys`, with all that is hashed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from kvlab.core.keys import KEY_BYTES, KVSpec, digest, field
from kvlab.model.llama import Llama
from kvlab.model.load import read_json, read_weights

LAYOUT_VERSION = 1

# Fields that change the numbers in the KV. The vocabulary, the output head and the context
# limit do not; they are left out so that a re-saved model keeps its cache.
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
Progress = Callable[[int, int], None]
log = logging.getLogger("kvlab")


def spec_of(model: Llama, adapter: bytes = b"", progress: Progress | None = None) -> KVSpec:
    """The `KVSpec` of a loaded model, fingerprint computed (see `fingerprint`)."""
    c = model.config
    print_ = fingerprint(model, adapter, progress)
    return KVSpec(c.num_hidden_layers, c.num_key_value_heads, c.head_dim, model.dtype, print_)


def fingerprint(model: Llama, adapter: bytes = b"", progress: Progress | None = None) -> bytes:
    """Identity of everything that shapes a model's KV, computed from its folder (or its weights in memory).

    A model with a folder has the identity of the folder's files: after changing its weights in
    memory set `model.folder = None`. `adapter` is the digest of a LoRA or the like.
    `progress(done, total)` is called in bytes while weights are read; their digest is
    remembered, so only the first call is slow.
    """
    folder = model.folder
    if folder is None:
        weights, tokenizer = digest_tensors(_own_tensors(model)), b""
    else:
        weights, tokenizer = weights_digest(folder, progress), tokenizer_digest(folder)
    return digest(
        "kvlab/1/fingerprint",
        config_bytes(model),
        weights,
        tokenizer,
        adapter,
        str(model.dtype).removeprefix("torch.").encode(),
        struct.pack("<I", LAYOUT_VERSION),
    )


def config_bytes(model: Llama) -> bytes:
    """The allow-listed config fields as canonical JSON, the same whichever library wrote config.json."""
    fields = asdict(model.config)
    kept = {name: fields[name] for name in KV_FIELDS}
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()


def tokenizer_digest(folder: Path) -> bytes:
    """SHA-256 of what turns text into tokens, whatever its spacing and run-time settings; b"" if there is none."""
    if not (folder / "tokenizer.json").exists():
        return b""
    content = read_json(folder, "tokenizer.json")
    for setting in ("version", "truncation", "padding"):
        content.pop(setting, None)
    return digest("kvlab/1/tokenizer", json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """SHA-256 over names, dtypes, shapes and bytes, independent of file layout and of the order given."""
    entries = []
    for name, t in tensors:
        flat = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        shape = struct.pack(f"<{t.ndim}Q", *t.shape)
        dtype = str(t.dtype).removeprefix("torch.").encode()
        entries.append(field(name.encode()) + field(dtype) + field(shape) + hashlib.sha256(flat).digest())
    return digest("kvlab/1/weights", *sorted(entries))


def weights_digest(folder: Path, progress: Progress | None = None) -> bytes:
    """Digest of a folder's weights, remembered in the user's cache directory.

    The memory is keyed by each file's path, inode, size and change time, so a file that was
    touched in any way is read again.
    """
    files = sorted(folder.resolve().glob("*.safetensors"))
    stamp = digest("kvlab/1/stamp", *(_stamp(f) for f in files)).hex()
    memory = _cache_home() / "digests" / stamp
    try:
        return _known_digest(memory.read_text())
    except (OSError, ValueError):
        total = sum(f.stat().st_size for f in files)
        log.info("reading %.1f GB of weights in %s for the fingerprint, this once", total / 1e9, folder)
        value = digest_tensors(_folder_tensors(folder, total, progress))
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        part = memory.with_name(f"{stamp}.{os.getpid()}")
        part.write_text(value.hex())
        part.replace(memory)
    except OSError:
        pass  # a read-only home costs a second digest, nothing else
    return value


def _known_digest(text: str) -> bytes:
    value = bytes.fromhex(text)
    if len(value) != KEY_BYTES:
        raise ValueError("not a digest")
    return value


def _stamp(file: Path) -> bytes:
    s = file.stat()
    return f"{file}|{s.st_dev}|{s.st_ino}|{s.st_size}|{s.st_ctime_ns}|{s.st_mtime_ns}".encode()


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvlab"


def _folder_tensors(folder: Path, total: int, progress: Progress | None) -> Iterator[tuple[str, Tensor]]:
    """A folder's tensors but for an output head that is only a copy of the tied embedding."""
    tied = bool(read_json(folder, "config.json").get("tie_word_embeddings", False))
    done = 0
    for name, t in read_weights(folder):
        if not (tied and name == "lm_head.weight"):
            yield name, t
        done += t.nbytes
        if progress:
            progress(done, total)
    if progress:
        progress(total, total)  # the files hold headers too


def _own_tensors(model: Llama) -> Iterator[tuple[str, Tensor]]:
    tied = model.config.tie_word_embeddings
    return ((n, t) for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight"))
