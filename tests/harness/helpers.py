"""Helpers of several test modules: small models, KV with exact values, tampered records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from kvlab.core import record
from kvlab.core.keys import KVSpec
from kvlab.model import Llama, LlamaConfig
from kvlab.model.config import SIZES
from kvlab.stores import Health, Store, StoreStats, Value

HEADER_BYTES = 128
SEAL_AT = 96
KEY = bytes(range(32))
REASONS = {
    *("magic", "version", "kind", "length", "dims", "precision"),
    *("codec", "key", "key_id", "checksum", "forged", "overflow"),
}
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def build_model(
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    tied: bool = True,
    layers: int = 2,
    vocab: int = 97,
    hidden: int = 32,
    context: int = 256,
    seed: int = 0,
    **config: Any,
) -> Llama:
    """A small Llama with seeded random weights, made in memory."""
    numbers = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        **config,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Llama(numbers).requires_grad_(False).eval()


def attentive_model(**changes: Any) -> Llama:
    """A small model whose answers depend on all of the prompt. With weights of `build_model`, which are small, the
    last token alone decides, and a test of tokens would pass with any KV."""
    model = build_model(**changes)
    for layer in model.model.layers:
        for weight in layer.self_attn.parameters():
            weight.mul_(6.0)
    return model


def config_json(model: Llama) -> dict[str, Any]:
    """`config.json` of a model with default RoPE, as transformers 5 writes it."""
    c = model.config
    assert c.rope_scaling is None
    more = ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias")
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        **{name: getattr(c, name) for name in (*SIZES, *more)},
        "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"},
    }


def own_weights(model: Llama) -> dict[str, Tensor]:
    """The weights of a model folder, without the copy of a tied embedding."""
    tied = model.config.tie_word_embeddings
    return {n: t.clone() for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}


def save_folder(model: Llama, folder: Path) -> Path:
    """Write a model folder without transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(model)))
    save_file(own_weights(model), folder / "model.safetensors")
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    """Change fields of a JSON object on disk; the value `...` removes a field."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def small_spec(model: int = 0) -> KVSpec:
    """A spec with L = 2, H = 2, D = 4 in FP32; each number `model` gives a different fingerprint."""
    return KVSpec(layers=2, heads=2, head_dim=4, dtype=torch.float32, fingerprint=bytes([model]) * 32)


def exact_kv(spec: KVSpec, tokens: int, seed: int = 0) -> Tensor:
    """KV [L, P, H, T, D] with values that fp32, fp16 and bf16 represent exactly."""
    shape = (spec.layers, 2, spec.heads, tokens, spec.head_dim)
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).float() / 16


def blank(spec: KVSpec, tokens: int) -> Tensor:
    """KV [L, P, H, T, D] of NaN, so that tests detect values that were not filled."""
    return torch.full((spec.layers, 2, spec.heads, tokens, spec.head_dim), torch.nan)


def joined(pieces: tuple[bytes | memoryview, ...]) -> bytes:
    """A value's pieces as the bytes that a store keeps."""
    return b"".join(pieces)


def encoded(tensor: Tensor, fmt: record.Format, key: bytes = KEY, **options: Any) -> bytes:
    """A tensor's record as the bytes that a store keeps."""
    return joined(record.encode(tensor, key, fmt, **options))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are bitwise equal, including NaN payloads and signs of zero."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(BITS[a.dtype]), b.contiguous().view(BITS[b.dtype]))


def reason_of(value: bytes, fmt: record.Format, shape: Any = None, key: bytes = KEY, **options: Any) -> str:
    """The reason for which decoding refuses a value; fails if decoding succeeds."""
    with pytest.raises(record.BadRecord) as refused:
        record.decode(value, key, fmt, shape, **options)
    assert refused.value.reason in REASONS
    return refused.value.reason


def resealed(record: bytes) -> bytes:
    """The record with a correct checksum of its present bytes (implemented from the text of `core.record`)."""
    header = record[:SEAL_AT] + bytes(32)
    checksum = xxhash.xxh3_64(header + record[HEADER_BYTES:]).intdigest()
    return record[:SEAL_AT] + checksum.to_bytes(8, "little") + bytes(24) + record[HEADER_BYTES:]


def tampered(record: bytes, offset: int, new: bytes) -> bytes:
    """The record with replaced bytes and a matching checksum, as a forger makes it."""
    return resealed(record[:offset] + new + record[offset + len(new) :])


def flipped(data: bytes, at: int, mask: int = 1) -> bytes:
    """The bytes with one byte changed."""
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


class FakeClock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def cool_down(self) -> None:
        """Advance the clock by a breaker's cool-down."""
        self.now += 1.0


class SpyStore(Store):
    """Forwards every call to another store and records the keys that were put, in order."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.put_keys: list[bytes] = []

    def get_many(self, keys: Any, out: Any = None, reasons: Any = None) -> list[bytes | memoryview | None]:
        return self.inner.get_many(keys, out, reasons)

    def put_many(self, keys: Any, values: list[Value], ttl_s: float | None = None) -> int:
        self.put_keys += keys
        return self.inner.put_many(keys, values) if ttl_s is None else self.inner.put_many(keys, values, ttl_s)

    def probe(self, keys: Any) -> int:
        return self.inner.probe(keys)

    def touch_many(self, keys: Any, ttl_s: float | None = None) -> list[bool]:
        return self.inner.touch_many(keys) if ttl_s is None else self.inner.touch_many(keys, ttl_s)

    def hold_many(self, keys: Any, lease_s: float, holder: str) -> tuple[int, bool]:
        return self.inner.hold_many(keys, lease_s, holder)

    def release(self, holder: str) -> None:
        self.inner.release(holder)

    def delete_many(self, keys: Any) -> int:
        return self.inner.delete_many(keys)

    def health(self) -> Health:
        return self.inner.health()

    def stats(self) -> StoreStats:
        return self.inner.stats()

    def close(self) -> None:
        self.inner.close()
