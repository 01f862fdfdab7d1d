"""A distributed KV cache on one page: what the exercises of the course add up to.

The functions are the exercises' solutions. A learner's `work/mykv.py` is this module with the learner's
functions in their place. Keys and records are those of the package (`kvlab.core.keys`, `kvlab.core.record`):
`MiniCache` and `DistributedKVCache` (FP32, not compressed, not encrypted) read each other's blocks. What the
package has and this page leaves out: lower precisions, compression, encryption, deadlines, circuit breakers,
Redis Cluster and Sentinel, and not sending what the store already has.
"""

from __future__ import annotations

import copy
import hashlib
import struct
from collections.abc import Sequence

import redis
import torch
import xxhash
from torch import Tensor

from kvlab.cache import CacheStats, KVCache
from kvlab.core.keys import KVSpec, token_bytes
from kvlab.errors import InputError
from kvlab.stores import Health


# --- keys: lesson 03 ----------------------------------------------------------------------------
def root_key(fingerprint: bytes, precision: str, salt: bytes, block_tokens: int) -> bytes:
    """The parent of every first block: everything that a key depends on, but for the tokens."""
    parts = (b"kvlab/1/root", fingerprint, precision.encode(), salt, struct.pack("<I", block_tokens))
    return hashlib.sha256(b"".join(struct.pack("<I", len(p)) + p for p in parts)).digest()


def block_keys(tokens: list[int], root: bytes, block_tokens: int) -> list[bytes]:
    """One chained SHA-256 key for each full block of `tokens`."""
    keys, parent = [], root
    for i in range(0, len(tokens) - block_tokens + 1, block_tokens):
        data = struct.pack(f"<{block_tokens}I", *tokens[i : i + block_tokens])
        parts = (b"kvlab/1/block", parent, data)
        parent = hashlib.sha256(b"".join(struct.pack("<I", len(p)) + p for p in parts)).digest()
        keys.append(parent)
    return keys


# --- records: lesson 04 -------------------------------------------------------------------------
def pack_record(block: Tensor, key: bytes) -> bytes:
    """One block of FP32 numbers as bytes: a header of 128 bytes with the key and a checksum, then the numbers."""
    payload = block.contiguous().numpy().tobytes()
    dims = [*block.shape, *[0] * (8 - block.ndim)]
    header = struct.pack("<4s8BI8IQQ32s", b"KVL1", 1, 1, 0, 1, 1, 1, block.ndim, 0, 0, *dims, len(payload), 0, key)
    checksum = xxhash.xxh3_64_intdigest(header + bytes(32) + payload)
    return header + checksum.to_bytes(8, "little") + bytes(24) + payload


def open_record(value: bytes, key: bytes) -> str:
    """ok, or the first reason not to use it: length, magic, version, length, checksum, key."""
    if len(value) < 128:
        return "length"
    if value[:4] != b"KVL1":
        return "magic"
    if value[4] != 1:
        return "version"
    if struct.unpack_from("<Q", value, 48)[0] != len(value) - 128:
        return "length"
    digest = xxhash.xxh3_64_intdigest(value[:96] + bytes(32) + value[128:])
    if value[96:128] != digest.to_bytes(8, "little") + bytes(24):
        return "checksum"
    return "ok" if value[64:96] == key else "key"


# --- a Redis: lesson 05 -------------------------------------------------------------------------
def read_values(client: redis.Redis, names: list[bytes], ttl_ms: int) -> list[bytes | None]:
    """The values of `names`, None where there is none, in one round trip. What is read lives `ttl_ms` from now."""
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.get(name)
    for name in names:
        pipe.pexpire(name, ttl_ms)
    return list(pipe.execute()[: len(names)])


def write_values(client: redis.Redis, names: list[bytes], values: list[bytes], ttl_ms: int) -> int:
    """Store all values in one round trip, each for `ttl_ms`; return how many the server took."""
    pipe = client.pipeline(transaction=False)
    for name, value in zip(names, values, strict=True):
        pipe.set(name, value, px=ttl_ms)
    return sum(reply is True for reply in pipe.execute(raise_on_error=False))


class MiniRedis:
    """Bytes by key in one Redis. A fault of the server is a miss or a drop, never an exception."""

    def __init__(self, client: redis.Redis, ttl_s: float = 86400) -> None:
        self.client, self.ttl_ms = client, round(ttl_s * 1000)

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        """The values of keys, None for a miss."""
        try:
            return read_values(self.client, [b"kv:" + key for key in keys], self.ttl_ms)
        except redis.RedisError:
            return [None] * len(keys)

    def put_many(self, keys: list[bytes], values: list[bytes]) -> int:
        """Store values; return how many the server took."""
        try:
            return write_values(self.client, [b"kv:" + key for key in keys], values, self.ttl_ms)
        except redis.RedisError:
            return 0

    def probe(self, keys: list[bytes]) -> int:
        """How many keys are there, counted from the first to the first that is not."""
        try:
            pipe = self.client.pipeline(transaction=False)
            for key in keys:
                pipe.exists(b"kv:" + key)
            return [*pipe.execute(), 0].index(0)
        except redis.RedisError:
            return 0

    def health(self) -> Health:
        """Whether the server answers."""
        try:
            return Health(bool(self.client.ping()), "answers")
        except redis.RedisError as error:
            return Health(False, str(error))

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


# --- the cache around them ----------------------------------------------------------------------
class MiniCache(KVCache):
    """KV of token prefixes, block by block, in any store with `get_many`, `put_many` and `probe`."""

    def __init__(self, store: MiniRedis, model: KVSpec, salt: bytes = b"", block_tokens: int = 0) -> None:
        self.store, self.spec = store, model
        self.B = block_tokens or model.block_tokens("fp32")
        self.root = root_key(model.fingerprint, "fp32", salt, self.B)
        self.counters = CacheStats()

    @property
    def block_tokens(self) -> int:
        """Tokens in a block. Only full blocks are cached."""
        return self.B

    def keys(self, tokens: Sequence[int]) -> list[bytes]:
        """One key for each full block of a prompt."""
        token_bytes(tokens)  # raises for anything that is no token
        return block_keys(list(tokens), self.root, self.B)

    def match(self, tokens: Sequence[int]) -> int:
        """How many leading tokens of a prompt are cached now."""
        return self.store.probe(self.keys(tokens)) * self.B

    def load(self, tokens: Sequence[int], start: int, stop: int, out: Tensor) -> int:
        """Fill `out` with the KV of tokens[start:stop], block by block; return the position that it got to."""
        keys = self.keys(tokens)
        if start % self.B or stop % self.B or not 0 <= start <= stop <= len(tokens):
            raise InputError(f"expected start <= stop <= {len(tokens)} in steps of {self.B}, got {start}, {stop}")
        self.check_shape(out, stop - start)
        keys = keys[start // self.B : stop // self.B]
        good = 0
        for key, value in zip(keys, self.store.get_many(keys), strict=True):
            reason = "absent" if value is None else open_record(value, key)
            block = out[:, :, :, good * self.B : (good + 1) * self.B]
            if value is None or reason != "ok":
                self.counters.misses += {reason: 1, "gap": len(keys) - good - 1}
                break
            self.counters.bytes_read += len(value)
            block.copy_(torch.frombuffer(bytearray(value), dtype=torch.float32, offset=128).reshape(block.shape))
            good += 1
        self.counters.requested += len(keys)
        self.counters.hits += good
        return start + good * self.B

    def save(self, tokens: Sequence[int], kv: Tensor, start: int = 0) -> int:
        """Store the KV of every full block from `start` on; return how many the store took."""
        keys = self.keys(tokens)
        self.check_shape(kv, len(tokens))
        blocks = range(-(-start // self.B), len(keys))
        values = [pack_record(kv[:, :, :, i * self.B : (i + 1) * self.B].float(), keys[i]) for i in blocks]
        stored = self.store.put_many([keys[i] for i in blocks], values)
        self.counters.stored += stored
        self.counters.drops["store"] += len(values) - stored
        self.counters.bytes_written += sum(len(value) for value in values)
        return stored

    def check_shape(self, kv: Tensor, tokens: int) -> None:
        """Refuse a tensor that is no KV of so many tokens of this model."""
        shape = (self.spec.layers, 2, self.spec.heads, tokens, self.spec.head_dim)
        if tuple(kv.shape) != shape or not kv.is_floating_point():
            raise InputError(f"expected floating-point KV of shape {shape}, got {kv.dtype} {tuple(kv.shape)}")

    def stats(self) -> CacheStats:
        """A copy of the counters."""
        return copy.deepcopy(self.counters)

    def health(self) -> Health:
        """Whether the store answers."""
        return self.store.health()

    def close(self) -> None:
        """Close the store."""
        self.store.close()
