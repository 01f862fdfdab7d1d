"""What vLLM's blocks are identified by, and which of its set-ups this connector refuses.

A record holds the bytes of one vLLM block of all layers of one worker, in the memory layout of the engine, which
differs between attention backends, instruction sets and versions: bytes of another layout would be read as other
numbers. So all of this is a part of the key.

    layout     = JSON of what `Layout` holds, of every worker in the order of its rank
    namespace  = SHA256( field("kvlab/1/engine") field(layout) field(fingerprint) field(salt) field(epoch) )
    key        = SHA256( field("kvlab/1/engine-block") field(namespace) field(vLLM's block hash)
                         field(adapter digest or "") field(rank as u32) )

vLLM's block hash covers the tokens from the first one on, the request's salt, and the name of its LoRA adapter,
but neither the model nor what is in the adapter. `epoch` is empty until `reset_prefix_cache(reset_connector=True)`
makes a random one, after which nothing that was stored before is read.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvlab.connectors.identity import (
    LENGTH_DEPENDENT_ROPE,
    foreign_fingerprint,
    rope_types,
    safetensors_problem,
    weights_of_folder,
)
from kvlab.core.keys import digest
from kvlab.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

VERSIONS = ("0.32", "0.33")
HASHES = ("sha256", "sha256_cbor")


@dataclass(frozen=True)
class Layout:
    """The memory layout of the blocks of one worker.

    Attributes:
        engine: with the full version.
        device, isa: where the kernels run, and which instructions they were written for.
        backend: the attention backend.
        dtype: of the numbers, torch's name for it.
        hashes: vLLM's hash function, and PYTHONHASHSEED, which vLLM begins its hashes with.
        layers: the shape of a block in each layer, in the order of the record: that of the layers' names.
    """

    engine: str
    device: str
    isa: str
    backend: str
    dtype: str
    block_tokens: int
    hashes: str
    layers: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The dims of a record: layers, elements of a layer, bytes of an element."""
        return len(self.layers), math.prod(self.layers[0]), getattr(torch, self.dtype).itemsize


def layout_digest(layouts: Sequence[Layout]) -> bytes:
    """Return the digest of the layouts of all workers, in the order of their ranks."""
    text = json.dumps([asdict(layout) for layout in layouts], sort_keys=True, separators=(",", ":"))
    return digest("kvlab/1/engine-layout", text.encode())


def namespace(layouts: Sequence[Layout], fingerprint: bytes, salt: bytes, epoch: bytes = b"") -> bytes:
    """Return what all keys are derived from. 32 bytes."""
    return digest("kvlab/1/engine", layout_digest(layouts), fingerprint, salt, epoch)


def block_key(space: bytes, block_hash: bytes, adapter: bytes, rank: int) -> bytes:
    """Return the key of a block of one worker. 32 bytes."""
    return digest("kvlab/1/engine-block", space, bytes(block_hash), adapter, struct.pack("<I", rank))


# --- what this connector runs with -----------------------------------------------------------------------------------
def check_version(version: str) -> None:
    """Refuse a vLLM that this connector was not written for.

    Raises:
        ConfigError: as said.
    """
    if ".".join(re.split(r"[.+]", version)[:2]) not in VERSIONS:
        raise ConfigError(f"expected vLLM {' or '.join(VERSIONS)}, whose connector interface this is, got {version}")


def check_config(config: VllmConfig) -> None:
    """Refuse a set-up in which a hit could be wrong, or a failed load would fail a request.

    Raises:
        ConfigError: the first of `problems`.
    """
    for problem in problems(config):
        raise ConfigError(problem)


def problems(config: VllmConfig) -> Iterator[str]:
    """Yield what is set wrongly for this connector, and what to set instead."""
    transfer, parallel, cache = config.kv_transfer_config, config.parallel_config, config.cache_config
    if transfer.kv_role != "kv_both":
        yield f'expected kv_role "kv_both", got {transfer.kv_role!r}: a cache is read and written'
    if transfer.kv_load_failure_policy != "recompute":
        yield (
            f'expected kv_load_failure_policy "recompute", got {transfer.kv_load_failure_policy!r}, '
            "vLLM's default, with which a block that cannot be loaded fails its request"
        )
    if config.speculative_config is not None:
        yield "expected no speculative decoding: KV of draft tokens that were not accepted would be stored"
    if cache.prefix_caching_hash_algo not in HASHES:
        yield (
            f"expected --prefix-caching-hash-algo {' or '.join(HASHES)}, got {cache.prefix_caching_hash_algo}: "
            "its hashes can be forged, and differ between processes"
        )
    if cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        yield f"expected --kv-cache-dtype auto, got {cache.cache_dtype}: scaled KV is not supported"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            yield f"expected {name} 1, got {getattr(parallel, name)}: its blocks are split between workers"
    if config.load_config.load_format not in ("auto", "hf", "safetensors"):
        yield (
            f"expected --load-format auto or safetensors, got {config.load_config.load_format}: the fingerprint is "
            "that of the safetensors files"
        )
    model = config.model_config
    if model.is_hybrid or model.use_mla or model.get_sliding_window() is not None or model.is_encoder_decoder:
        yield (
            f"expected a model with plain keys and values of all tokens, got {model.hf_config.model_type}: sliding "
            "windows, hybrid models, MLA and encoders are not supported"
        )
    if found := LENGTH_DEPENDENT_ROPE.intersection(rope_types(model.hf_config.to_dict())):
        yield f"expected RoPE that depends on the position only, got {', '.join(sorted(found))}"


def check_cache(cache: KVCacheConfig) -> None:
    """Refuse caches that are not plain keys and values of every token.

    Raises:
        ConfigError: as said.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    if len(cache.kv_cache_groups) != 1:
        raise ConfigError(
            f"expected a model with one KV cache group, got {len(cache.kv_cache_groups)}: "
            "hybrid and sliding-window models are not supported"
        )
    spec = cache.kv_cache_groups[0].kv_cache_spec
    plain = type(spec) is FullAttentionSpec and not (
        spec.sliding_window or spec.attention_chunk_size or spec.non_causal
    )
    if not plain:
        raise ConfigError(f"expected plain causal attention over all tokens, got {spec}")


# --- identity of the model ------------------------------------------------------------------------------------------
def model_fingerprint(config: VllmConfig) -> bytes:
    """Return the fingerprint of the model that vLLM loads: config, weights, compute dtype and quantisation.

    Raises:
        ConfigError: the weights are not safetensors on this machine.
    """
    model = config.model_config
    folder = model_folder(model.model, model.revision, config.load_config.download_dir)
    if problem := safetensors_problem(folder):
        raise ConfigError(f"{folder}: {problem}")
    fields = model.hf_config.to_dict()
    try:
        weights = weights_of_folder(folder, bool(fields.get("tie_word_embeddings")))
        code = [path.read_bytes() for path in sorted(folder.glob("*.py"))] if model.trust_remote_code else []
    except (ModelError, OSError) as error:
        raise ConfigError(f"the connector needs the weights of the model as safetensors: {error}") from error
    # Not `model_type` alone: vLLM chooses its code by these, and a plain Llama shares nothing with kvlab here.
    fields["model_type"] = f"vllm {fields.get('model_type')} {model.architectures} {model.model_impl}"
    how = (str(model.quantization), str(getattr(model, "quantization_config", None)))
    adapter = digest("kvlab/1/engine-model", *(part.encode() for part in how), *code)
    return foreign_fingerprint(fields, weights, adapter=adapter, dtype=str(model.dtype).removeprefix("torch."))


def model_folder(name: str, revision: str | None = None, cache: str | None = None) -> Path:
    """Return the folder of a model: a path, or the local snapshot of a name on the Hugging Face hub.

    Raises:
        ConfigError: there is no such folder.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
    except Exception as error:
        raise ConfigError(
            f"expected the files of {name} on this machine, found none ({type(error).__name__})"
        ) from error


def blocks_of(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Return a view of a layer's KV, [count, …]. Kernels may divide a block into several rows of the first axis.

    Raises:
        ConfigError: the first axis is not that of blocks.
    """
    if tensor.ndim < 2 or tensor.shape[0] % count:
        raise ConfigError(f"expected the KV of {count} blocks along the first axis, got {tuple(tensor.shape)}")
    return tensor if tensor.shape[0] == count else tensor.unflatten(0, (count, -1))


def layout_of(config: VllmConfig, spec: Any, tensors: Sequence[torch.Tensor], layer: str) -> Layout:
    """Return the layout of KV in this engine.

    Args:
        spec: of the KV cache group.
        tensors: of each layer, [blocks, …]; their contents do not matter.
        layer: the name of one layer, whose attention backend is that of all.

    Raises:
        ConfigError: layers differ in size.
    """
    import vllm

    first = tensors[0]
    if any(tensor.shape[1:].numel() != first.shape[1:].numel() or tensor.dtype != first.dtype for tensor in tensors):
        raise ConfigError("expected layers with KV of the same size and dtype, got different ones")
    return Layout(
        f"vllm {vllm.__version__}",
        first.device.type,
        _isa(first, spec),
        _backend(config, layer, spec),
        str(first.dtype).removeprefix("torch."),
        config.cache_config.block_size,
        f"{config.cache_config.prefix_caching_hash_algo} {os.environ.get('PYTHONHASHSEED', '')}".rstrip(),
        tuple(tuple(tensor.shape[1:]) for tensor in tensors),
    )


def _isa(tensor: torch.Tensor, spec: Any) -> str:
    """The instruction set that determines how the CPU kernels of vLLM arrange a block; "" on other devices."""
    if tensor.device.type != "cpu":
        return ""
    flags = f"{platform.machine()} avx512={torch.cpu._is_avx512_supported()} amx={torch.cpu._is_amx_tile_supported()}"
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        return f"{_get_attn_isa(tensor.dtype, spec.block_size, spec.head_size)} {flags}"
    except (ImportError, TypeError):
        return flags


def _backend(config: VllmConfig, layer: str, spec: Any) -> str:
    """The name of the attention backend: that of a layer, or before there are layers, the one that vLLM selects."""
    backend = getattr(config.compilation_config.static_forward_context.get(layer), "attn_backend", None)
    if backend is None:
        from vllm.config import set_current_vllm_config
        from vllm.v1.attention.selector import get_attn_backend

        with set_current_vllm_config(config):
            backend = get_attn_backend(spec.head_size, spec.dtype, config.cache_config.cache_dtype)
    return str(backend.get_name())
