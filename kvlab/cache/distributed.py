"""The distributed cache: blocks of KV as sealed records in a shared store.

    tokens -> block keys (`core.keys`) -> values (`stores`) -> tensors (`core.record`)

One class serves two callers. An engine uses the `KVCache` calls, which match tokens block by
block. A script that wants to park one layer's tensors under a text uses `cache_kv` and
`get_cached_kv`. The two never meet: other record kind, other key domain. A text prefix is
not a token prefix, because cutting a text changes its tokens.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from kvlab.cache.base import CacheStats, KVCache
from kvlab.core import record
from kvlab.core.keys import KVSpec, Namespace, text_key
from kvlab.core.record import BadRecord, Format, Unholdable
from kvlab.core.seals import AesGcm, Pieces, Xxh3
from kvlab.errors import ConfigError, InputError
from kvlab.model import Llama
from kvlab.model.fingerprint import spec_of
from kvlab.stores import Health, RedisStore, Store
from kvlab.stores.base import check_ttl, renew_in_children

WINDOW_BYTES = 16 << 20  # of records that a load holds at once
MAX_SUSPECTS = 1 << 16
_UNFIT = ("too_big", "response")  # the store has something under this key that is no record
_PRECISION_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class DistributedKVCache(KVCache):
    """KV in a Redis that several processes and machines share.

    Without `redis_host`, `url` or `store` it lives in an in-process Redis (fakeredis), private
    to this cache: good for learning and tests, shared with nobody.

    Args:
        redis_host, redis_port: a plain Redis. `url` names any other kind (see `RedisStore`).
        precision: fp32, fp16, bf16, int8 or int4 (or float32, float16, bfloat16). Part of a key's
            identity. What the small ones cost in quality is in docs/02_architecture_deep_dive.md.
        compress: pack payloads without loss: True or "zstd", or "gzip", or False. Readers accept
            records written any of these ways.
        ttl_seconds: lifetime after the last write or read; None leaves it to the server. A store
            that is given as `store=` keeps its own.
        store: any `Store`, instead of a Redis. The cache closes it with itself.
        model: whose KV this is: a loaded `Llama`, or its `KVSpec`. Needed for the token calls;
            for the text calls optional, and then keys are bound to no model: a second model
            using the same text reads the first one's tensors.
        salt: the tenant's secret. Other salt, other keys: tenants cannot see each other's hits.
        encryption_keys: master keys (32 random bytes) by key id. Records are then encrypted and
            authenticated, and no others are accepted. Without it, whoever can write to the store
            can forge records. See `kvlab.core.seals`.
        encryption_key_id: the id that new records are written with; by default the highest.
        block_tokens: B, if not the default for the model.

    Raises:
        ConfigError: settings that do not work: unknown precision or URL scheme, negative TTL.
    """

    def __init__(
        self,
        redis_host: str | None = None,
        redis_port: int = 6379,
        precision: str = "float16",
        compress: bool | str = True,
        ttl_seconds: float | None = 86400,
        *,
        url: str | None = None,
        store: Store | None = None,
        model: Llama | KVSpec | None = None,
        salt: str | bytes = b"",
        encryption_keys: Mapping[int, bytes] | None = None,
        encryption_key_id: int | None = None,
        block_tokens: int | None = None,
    ) -> None:
        if sum(x is not None for x in (redis_host, url, store)) > 1:
            raise ConfigError("expected at most one of redis_host, url and store")
        self._salt = _salt_bytes(salt)
        codec = {True: "zstd", False: "raw"}[compress] if isinstance(compress, bool) else compress
        seal = Xxh3() if encryption_keys is None else AesGcm(encryption_keys, self._salt, encryption_key_id)
        self.format = Format(_PRECISION_NAMES.get(precision, precision), codec, seal)
        if not (model is None or isinstance(model, Llama | KVSpec)):
            raise ConfigError(f"expected model= as a loaded Llama or a KVSpec, got {type(model).__name__}")
        if not (store is None or isinstance(store, Store)):
            raise ConfigError(f"expected store= as a kvlab.stores.Store, got {type(store).__name__}")
        self.spec = spec_of(model) if isinstance(model, Llama) else model
        self._namespace = self._make_namespace(block_tokens)
        check_ttl(ttl_seconds)
        address = "fakeredis://" if url is None else url
        if redis_host is not None:
            if not redis_host:
                raise ConfigError("expected a host name in redis_host, got an empty text")
            if "://" in redis_host:
                raise ConfigError(f"expected a host name in redis_host, got a URL; write url={redis_host!r}")
            if redis_port == 0:
                raise ConfigError("expected a redis_port of 1 … 65535, got 0")
            address = f"redis://{redis_host}:{redis_port}"
        self.store = RedisStore(address, ttl_s=ttl_seconds) if store is None else store
        self._stats = CacheStats()
        self._lock = threading.Lock()
        self._suspects: dict[bytes, None] = {}  # keys to write even if the store has them; oldest first
        self._scratch = threading.local()
        renew_in_children(self)

    @property
    def block_tokens(self) -> int:
        """See `KVCache.block_tokens`."""
        return self._bound()[1].block_tokens

    def match(self, tokens: Sequence[int]) -> int:
        """See `KVCache.match`. One round trip."""
        ns = self._bound()[1]
        return self.store.probe(ns.keys(tokens)) * ns.block_tokens

    def load(self, tokens: Sequence[int], start: int, stop: int, out: Tensor) -> int:
        """See `KVCache.load`."""
        spec, ns = self._bound()
        B = ns.block_tokens
        if start % B or stop % B or not 0 <= start <= stop <= len(tokens):
            raise InputError(f"expected 0 <= start <= stop <= {len(tokens)} in steps of {B}, got {start} and {stop}")
        _check_kv(out, spec, stop - start)
        chain = ns.keys(tokens[:stop])
        before, keys = chain[: start // B], chain[start // B :]
        if before:  # used, though not fetched: a root must not expire before its leaves
            self.store.touch_many(before)
        good, reason = self._load_blocks(keys, out, B)
        self._count(len(keys), good, {reason: 1, "gap": len(keys) - good - 1} if reason else {})
        return start + good * B

    def save(self, tokens: Sequence[int], kv: Tensor, start: int = 0) -> int:
        """See `KVCache.save`. Blocks that are there already are not sent again, but live as long as new ones.

        Blocks at and after one that was seen damaged are always written: that repairs them.
        Blocks with a value that the precision cannot hold are dropped, and all after them.
        """
        spec, ns = self._bound()
        B = ns.block_tokens
        _check_kv(kv, spec, len(tokens))
        chain = ns.keys(tokens)
        first = -(-max(start, 0) // B)
        present = self.store.touch_many(chain)
        there = [is_there and key not in self._suspects for is_there, key in zip(present, chain, strict=True)]
        keys: list[bytes] = []
        values: list[Pieces] = []
        overflow = 0
        for i in range(first, len(chain)):
            if there[i]:
                continue
            try:
                values.append(record.encode(kv[:, :, :, i * B : (i + 1) * B], chain[i], self.format))
            except Unholdable:
                overflow = len(chain) - i
                break
            keys.append(chain[i])
        stored = self.store.put_many(keys, values)
        kept = sum(there[first : len(chain) - overflow])
        with self._lock:
            for key in keys if stored == len(keys) else ():
                self._suspects.pop(key, None)
            self._stats.saved += stored
            self._stats.kept += kept
            self._stats.bytes_written += sum(len(p) for v in values for p in v)
            self._stats.drops += Counter(overflow=overflow, store=len(values) - stored)
        return stored + kept

    def cache_kv(self, prefix: str, layer: int, k_tensor: Tensor, v_tensor: Tensor) -> bool:
        """Keep one layer's keys and values under an exact text; True if the store took them.

        Args:
            k_tensor, v_tensor: same shape (any, up to 7 dims) and dtype, say [N, H, T, D]. int8 and
            int4 take the last two dims as tokens and channels.

        Raises:
            InputError: an empty prefix, a negative layer, tensors that differ in shape or dtype.

        What was kept under this text before stays if the store does not take the new tensors.
        """
        key = self._text_key(prefix, layer)
        if not (isinstance(k_tensor, Tensor) and isinstance(v_tensor, Tensor)):
            raise InputError(f"expected two tensors, got {type(k_tensor).__name__} and {type(v_tensor).__name__}")
        if k_tensor.shape != v_tensor.shape or k_tensor.dtype != v_tensor.dtype:
            raise InputError(
                "expected keys and values of one shape and dtype, got "
                f"{tuple(k_tensor.shape)} {k_tensor.dtype} and {tuple(v_tensor.shape)} {v_tensor.dtype}"
            )
        if k_tensor.ndim >= record.MAX_DIMS or k_tensor.layout != torch.strided or k_tensor.is_meta:
            raise InputError(f"expected dense tensors of up to 7 dims, got {tuple(k_tensor.shape)} {k_tensor.layout}")
        try:
            value = record.encode(torch.stack((k_tensor, v_tensor)), key, self.format, record.KIND_TEXT)
        except Unholdable:
            stored, reason = 0, "overflow"
        else:
            stored, reason = self.store.put_many([key], [value]), "store"
        with self._lock:
            self._stats.saved += stored
            self._stats.bytes_written += sum(len(p) for p in value) if stored else 0
            self._stats.drops += Counter({reason: 1 - stored})
        return stored == 1

    def get_cached_kv(self, prefix: str, layer: int) -> tuple[Tensor, Tensor] | None:
        """The keys and values that `cache_kv` kept, in their original shape and dtype; None on a miss.

        With precision float16 the values are those of the float16 rounding.
        """
        key = self._text_key(prefix, layer)
        why: list[str] = []
        value = self.store.get_many([key], why=why)[0]
        try:
            if value is None:
                raise BadRecord(why[0])
            both = record.decode(value, key, self.format, None, record.KIND_TEXT)
            if both.shape[0] != 2:
                raise BadRecord("dims")
        except BadRecord as error:
            self._remove_if_damaged(key, error)
            self._count(1, 0, {error.reason: 1})
            return None
        self._count(1, 1, {}, len(value))
        return both[0], both[1]

    def stats(self) -> CacheStats:
        """See `KVCache.stats`. The store's own view, in bytes and faults, is `cache.store.stats()`."""
        with self._lock:
            return copy.deepcopy(self._stats)

    def health(self) -> Health:
        """See `KVCache.health`."""
        return self.store.health()

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def renew_after_fork(self) -> None:
        """See `kvlab.stores.base.Forkable`."""
        self._lock = threading.Lock()

    def _make_namespace(self, block_tokens: int | None) -> Namespace | None:
        if not (block_tokens is None or (isinstance(block_tokens, int) and 0 < block_tokens < 2**32)):
            raise ConfigError(f"expected a block of at least one token, a whole number, got {block_tokens!r}")
        if self.spec is None:
            return None
        B = block_tokens or self.spec.block_tokens(self.format.precision)
        return Namespace(self.spec.fingerprint, self.format.precision, self._salt, B)

    def _bound(self) -> tuple[KVSpec, Namespace]:
        if self.spec is None or self._namespace is None:
            raise ConfigError("this cache was made without model=; the token calls need to know whose KV it holds")
        return self.spec, self._namespace

    def _text_key(self, prefix: str, layer: int) -> bytes:
        if not (isinstance(prefix, str) and prefix and prefix.encode(errors="replace").decode() == prefix):
            raise InputError(f"expected a non-empty text as prefix, got {prefix!r}")
        if not (isinstance(layer, int) and 0 <= layer < 2**32):
            raise InputError(f"expected a layer number of 0 … 2**32 - 1, got {layer!r}")
        bound = b"" if self.spec is None else self.spec.fingerprint
        return text_key(prefix, layer, self.format.precision, self._salt, bound)

    def _load_blocks(self, keys: Sequence[bytes], out: Tensor, B: int) -> tuple[int, str]:
        """Fill `out` block by block; how many are good, and what was wrong with the next one, "" for nothing.

        Records arrive in buffers that the next call of this thread uses again: fresh memory costs page faults.
        """
        room = record.max_record_bytes(self.format, (*out.shape[:3], B, out.shape[4]))
        window = max(1, WINDOW_BYTES // room)
        for at in range(0, len(keys), window):
            part = keys[at : at + window]
            why: list[str] = []
            values = self.store.get_many(part, self._buffers(len(part), room), why)
            for i, (key, value) in enumerate(zip(part, values, strict=True), at):
                reason = why[i - at]
                if value is not None:
                    reason = self._decode_into(value, key, out[:, :, :, i * B : (i + 1) * B])
                if reason:
                    if value is not None or reason in _UNFIT:  # what follows was not looked at
                        self._suspect(keys[i:])
                    return i, reason
        return len(keys), ""

    def _buffers(self, count: int, size: int) -> list[memoryview]:
        whole = getattr(self._scratch, "whole", memoryview(b""))
        if len(whole) < count * size:
            self._scratch.whole = whole = memoryview(bytearray(count * size))
        return [whole[i * size : (i + 1) * size] for i in range(count)]

    def _suspect(self, keys: Sequence[bytes]) -> None:
        with self._lock:
            for key in reversed(keys):  # the first one is the one to remember longest: without it no load goes on
                self._suspects.pop(key, None)
                self._suspects[key] = None
            while len(self._suspects) > MAX_SUSPECTS:
                del self._suspects[next(iter(self._suspects))]

    def _decode_into(self, value: bytes | memoryview, key: bytes, out: Tensor) -> str:
        """Fill one block; the reason if it cannot be."""
        try:
            record.decode(value, key, self.format, tuple(out.shape), out=out)
        except BadRecord as error:
            self._remove_if_damaged(key, error)
            return error.reason
        with self._lock:
            self._stats.bytes_read += len(value)
        return ""

    def _remove_if_damaged(self, key: bytes, error: BadRecord) -> None:
        """Never remove what another reader, newer or with other keys, may still use."""
        if error.damaged:
            self.store.delete_many([key])

    def _count(self, requested: int, hits: int, misses: dict[str, int], read: int = 0) -> None:
        with self._lock:
            self._stats.requested += requested
            self._stats.hits += hits
            self._stats.misses += Counter(misses)
            self._stats.bytes_read += read


def _salt_bytes(salt: str | bytes) -> bytes:
    try:
        if isinstance(salt, str | bytes):
            return salt.encode() if isinstance(salt, str) else salt
    except UnicodeEncodeError:
        pass
    raise ConfigError(f"expected the salt as text or bytes, got {type(salt).__name__}; is a setting missing?")


def _check_kv(kv: Tensor, spec: KVSpec, tokens: int) -> None:
    want = (spec.layers, 2, spec.heads, tokens, spec.head_dim)
    if not isinstance(kv, Tensor):
        raise InputError(f"expected KV as a tensor [L, P, H, T, D] = {want}, got {type(kv).__name__}")
    if tuple(kv.shape) != want or not kv.is_floating_point():
        raise InputError(f"expected KV of shape [L, P, H, T, D] = {want}, got {tuple(kv.shape)} {kv.dtype}")
