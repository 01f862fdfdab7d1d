"""The identity of a piece of KV: the fingerprint of its model and the chained keys of its blocks.

Two requests may share KV only if everything that determines it is the same: weights, config,
tokenizer, adapter, compute dtype, precision, tenant, block size, and every token from the first
on. A SHA-256 chain covers all of these. The following definition is version 1 and frozen.
`kvlab.model.fingerprint` computes the fingerprint and its digests; this module computes the keys.

    field(x)    = length of x as u32 little-endian, then x
    fingerprint = SHA256( field("kvlab/1/fingerprint") field(config) field(weights digest)
                          field(tokenizer digest) field(adapter digest or "")
                          field(compute dtype) field(layout version as u32) )
    root        = SHA256( field("kvlab/1/root") field(fingerprint) field(precision)
                          field(salt) field(B as u32) )
    key_0       = SHA256( field("kvlab/1/block") field(root)      field(tokens as u32 each) )
    key_i       = SHA256( field("kvlab/1/block") field(key_{i-1}) field(tokens as u32 each) )
    text key    = SHA256( field("kvlab/1/text") field(fingerprint or "") field(precision)
                          field(salt) field(prefix in UTF-8) field(layer as u32) )

    weights     = SHA256( field("kvlab/1/weights") field(e_1) field(e_2) … ), the entries sorted as bytes:
                  e = field(name) field(dtype) field(shape as u64 each) SHA256(the tensor's bytes)
    tokenizer   = SHA256( field("kvlab/1/tokenizer") field(JSON of tokenizer.json without its keys
                  version, truncation and padding) ), or b"" where there is no tokenizer.json

All integers are little-endian, and all text is UTF-8. JSON is the result of
`json.dumps(x, sort_keys=True, separators=(",", ":"))`: its keys are sorted, it has no spaces, all
characters outside ASCII are escaped, and a float has the shortest form that reads back exactly.
`config` is the JSON of the allow-listed fields (`KV_FIELDS`); `rope_scaling` is null or an object
with the five fields of `kvlab.model.llama.RopeScaling`. A dtype is torch's name for it, for
example "float32". Tensor bytes are row-major and little-endian. Two kinds of tensor are left out,
because they follow from the rest: an output head ("lm_head.weight") that equals the embedding
("model.embed_tokens.weight"), and the RoPE buffers of older files ("….rotary_emb.inv_freq").

A key keeps all 32 bytes. SHA-256 is used because the builtin `hash` differs between processes, and
because non-cryptographic hashes can be forged. In a shared cache, a forged key reads another
tenant's KV. Source: CVE-2025-25183.

The precision is part of the identity, so a reader never gets less precision than it requested.
Lossless compression is not part of the identity.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvlab.errors import ConfigError, InputError

if TYPE_CHECKING:
    import torch

KEY_BYTES = 32
PRECISION_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}
"""Bytes per element at each precision, without the scales and lows of the integer precisions."""
MIN_BLOCK, MAX_BLOCK, TARGET_RECORD_BYTES = 16, 64, 1 << 20


def field(data: bytes) -> bytes:
    """Prefix one hash input with its length, so that different inputs never concatenate to the same bytes."""
    return struct.pack("<I", len(data)) + data


def digest(domain: str, *parts: bytes) -> bytes:
    """Return the SHA-256 of a domain tag and the parts, each with a length prefix. 32 bytes."""
    return hashlib.sha256(b"".join(field(p) for p in (domain.encode(), *parts))).digest()


@dataclass(frozen=True)
class Origin:
    """What a fingerprint was made of, for `kvlab.cache.describe`: digests of 32 bytes, b"" for none or not known.

    Attributes:
        model: its name, for readers.
        engine: name and version of what computes the KV.
        config, weights, tokenizer, adapter: the parts of the fingerprint.
    """

    model: str
    engine: str
    config: bytes
    weights: bytes
    tokenizer: bytes = b""
    adapter: bytes = b""


@dataclass(frozen=True)
class KVSpec:
    """What a cache needs to know of a model: the shape of its KV, and the fingerprint.

    Attributes:
        layers, heads, head_dim: L, H (KV heads) and D. P is always 2: keys and values.
        dtype: the dtype in which the model computes its KV.
        fingerprint: 32 bytes from `kvlab.model.fingerprint`.
        origin: what the fingerprint was made of, if that is known. It is no part of the identity.

    Raises:
        ConfigError: a size is not a positive integer, or the fingerprint has another length.
    """

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    fingerprint: bytes
    origin: Origin | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        sizes = (self.layers, self.heads, self.head_dim)
        if not all(isinstance(n, int) and n > 0 for n in sizes) or len(self.fingerprint) != KEY_BYTES:
            raise ConfigError(f"expected positive sizes and a fingerprint of {KEY_BYTES} bytes, got {self}")

    def kv_bytes_per_token(self, precision: str = "fp32") -> int:
        """Return the bytes of KV per token over all layers: L x 2 x H x D x bytes per element."""
        return int(self.layers * 2 * self.heads * self.head_dim * element_bytes(precision))

    def block_tokens(self, precision: str = "fp32") -> int:
        """Return B: the largest power of two in 16 … 64 whose KV takes at most 1 MiB, or 16 if none does."""
        B = MAX_BLOCK
        while B > MIN_BLOCK and B * self.kv_bytes_per_token(precision) > TARGET_RECORD_BYTES:
            B //= 2
        return B


@dataclass(frozen=True)
class Namespace:
    """One family of block keys with the same fingerprint, precision, salt and block size. Families share no keys.

    >>> ns = Namespace(fingerprint=bytes(32), precision="fp32", salt=b"", block_tokens=2)
    >>> [k.hex()[:8] for k in ns.keys([1, 2, 3, 4, 5])]
    ['2f71f828', '95c81436']
    """

    fingerprint: bytes
    precision: str
    salt: bytes = dataclasses.field(repr=False)  # the tenant's secret
    block_tokens: int

    @property
    def root(self) -> bytes:
        """The parent key of every first block."""
        B = struct.pack("<I", self.block_tokens)
        return digest("kvlab/1/root", self.fingerprint, self.precision.encode(), self.salt, B)

    def keys(self, tokens: Sequence[int]) -> list[bytes]:
        """Return one 32-byte key per full block of `tokens`. A partial last block has no key.

        Raises:
            InputError: a token is not an integer in 0 … 2**32 - 1.
        """
        return block_keys(self.root, self.block_tokens, tokens)


def block_keys(root: bytes, block_tokens: int, tokens: Sequence[int]) -> list[bytes]:
    """See `Namespace.keys`. A router that has only the root of a namespace does not learn the tenant's salt.

    Raises:
        InputError: a token is not an integer in 0 … 2**32 - 1.
    """
    data, step = token_bytes(tokens), 4 * block_tokens
    domain = hashlib.sha256(field(b"kvlab/1/block") + struct.pack("<I", KEY_BYTES))  # all blocks share this prefix
    size, key, out = struct.pack("<I", step), root, []
    for i in range(0, len(data) - step + 1, step):
        block = domain.copy()
        block.update(key + size + data[i : i + step])
        key = block.digest()
        out.append(key)
    return out


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Return the tokens as little-endian u32, the canonical form that is hashed.

    Raises:
        InputError: a token is not an integer in 0 … 2**32 - 1.
    """
    try:
        ids = np.asarray(_array_of(tokens) if isinstance(tokens, list | tuple) else tokens)
        if ids.ndim != 1:
            raise ValueError(f"got {ids.ndim} dims instead of 1")
        if ids.size and ids.dtype.kind not in "iu":
            raise TypeError(f"got {ids.dtype}")
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= 2**32):
            raise ValueError(f"got {int(ids.min())} … {int(ids.max())}")
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"expected tokens as integers in 0 … 2**32 - 1: {error}") from error
    return ids.astype("<u4").tobytes()


def _array_of(tokens: list[int] | tuple[int, ...]) -> array[int]:
    """Convert Python ints to an array. `array` rejects values outside u32 and takes a quarter of numpy's time."""
    if tokens and isinstance(tokens[0], bool):
        raise TypeError("got bool")
    return array("I", tokens)


def text_key(prefix: str, layer: int, precision: str, salt: bytes = b"", fingerprint: bytes = b"") -> bytes:
    """Return the key of one layer's KV under an exact text. Without a fingerprint the key is not bound to a model."""
    return digest("kvlab/1/text", fingerprint, precision.encode(), salt, prefix.encode(), struct.pack("<I", layer))


def element_bytes(precision: str) -> float:
    """Return the bytes per element at a precision.

    Raises:
        ConfigError: the precision is unknown.
    """
    if precision not in PRECISION_BYTES:
        raise ConfigError(f"expected one of the precisions {', '.join(PRECISION_BYTES)}, got {precision!r}")
    return PRECISION_BYTES[precision]
