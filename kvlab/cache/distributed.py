"""The distributed cache. It stores blocks of KV as sealed records in a shared store.

    tokens -> block keys (`core.keys`) -> values (`stores`) -> tensors (`core.record`)

An engine uses the `KVCache` calls, which match tokens block by block. A script can cache the tensors of
one layer under a text with `cache_kv` and `get_cached_kv`, which use `kvlab.cache.text`.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor

from kvlab.cache.base import CacheStats, KVCache
from kvlab.cache.describe import DIRECTORY, WRITTEN, Description, description_of, every_s, write
from kvlab.cache.elsewhere import View
from kvlab.cache.explain import Explanation, explain
from kvlab.cache.pins import MAX_LEASE_S, Kept, Pin
from kvlab.cache.recent import STORED, Recent
from kvlab.cache.text import TextRecords
from kvlab.core import record
from kvlab.core.keys import KVSpec, Namespace, element_bytes
from kvlab.core.precisions import Array, Unholdable, to_parts
from kvlab.core.record import BadRecord, Format
from kvlab.core.seals import AesGcm, Xxh3
from kvlab.errors import ConfigError, InputError
from kvlab.model import Llama
from kvlab.model.fingerprint import spec_of
from kvlab.stores import Health, Store, open_store
from kvlab.stores.base import MAX_TTL_S, MAX_VALUE_BYTES, check_number, check_own_ttl, described
from kvlab.stores.faults import Reason
from kvlab.stores.fork import reset_in_children
from kvlab.stores.url import url_of

WINDOW_BYTES = 16 << 20  # of the records that one fetch returns
MAX_SUSPECTS = 1 << 16
DAY_S = 86400.0
logger = logging.getLogger(__name__)
DESCRIBE_AGAIN_S = 1.0  # at least, after the store took nothing: while it refuses writes, each save says so
_NO_RECORD = (Reason.TOO_BIG, Reason.RESPONSE)  # the value under this key is not a record
_PRECISION_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class _Default:
    """Marks an argument that was not given."""

    def __repr__(self) -> str:
        return "default"


_DEFAULT = _Default()


class DistributedKVCache(KVCache):
    """A KV cache in a Redis that several processes and machines share.

    Without `redis_host` and `store`, the cache uses an in-process Redis (fakeredis) of its own. This
    Redis suits learning and tests.

    Args:
        redis_host, redis_port: a single Redis without a password. `store` supports all others.
        precision: fp32, fp16, bf16, int8 or int4 (or float32, float16, bfloat16). The cache keys
            depend on it. docs/02_architecture_deep_dive.md compares the quality.
        compress: lossless compression of payloads: True or "zstd", "gzip", or False for none. A
            reader accepts records with any of these.
        ttl_seconds: the lifetime after the last write or read, by default a day. With None the
            server decides. A `Store` object has its own TTL.
        store: a URL (see `kvlab.stores.open_store`) or a `Store`. Closing the cache closes it.
        model: the model whose KV is cached, as a loaded `Llama` or its `KVSpec`. The token calls
            need it. Without a model, the cache keys of the text calls are not bound to one: a second
            model that uses the same text reads the tensors of the first one.
        salt: the tenant's secret. The cache keys depend on it, so tenants with different salts
            cannot see each other's hits.
        encryption_keys: master keys (32 random bytes) by key id. Records are then encrypted and
            authenticated, and all other records are rejected. Without master keys, anyone who can
            write to the store can forge records. See `kvlab.core.seals`.
        encryption_key_id: the id of the master key for new records; by default the highest one.
        block_tokens: B; by default `KVSpec.block_tokens`.
        max_lease_s: the longest lease of a `pin`.
        describe: leave a description of model, precision and salted tenant in the store, so that a miss can be
            explained: with the first save, each ten minutes (or quarter of a shorter TTL), and after the store took
            nothing. `kvlab.cache.describe` says what it gives away.

    Raises:
        ConfigError: a setting is invalid (an unknown precision or URL scheme, a negative TTL),
            contradicts another setting, or would have no effect.
    """

    def __init__(
        self,
        redis_host: str | None = None,
        redis_port: int | _Default = _DEFAULT,
        precision: str = "float16",
        compress: bool | str = True,
        ttl_seconds: float | _Default | None = _DEFAULT,
        *,
        store: str | Store | None = None,
        model: Llama | KVSpec | None = None,
        salt: str | bytes = b"",
        encryption_keys: Mapping[int, bytes] | None = None,
        encryption_key_id: int | None = None,
        block_tokens: int | None = None,
        max_lease_s: float = MAX_LEASE_S,
        describe: bool = True,
    ) -> None:
        check_number("max_lease_s", max_lease_s, 0, MAX_TTL_S, "seconds")
        self.max_lease_s = max_lease_s
        self._salt = _salt_bytes(salt)
        self.format = _format(precision, compress, encryption_keys, self._salt, encryption_key_id)
        if not (model is None or isinstance(model, Llama | KVSpec)):
            raise ConfigError(f"expected model= as a loaded Llama or a KVSpec, got {type(model).__name__}")
        self.spec = spec_of(model) if isinstance(model, Llama) else model
        self._namespace = self._make_namespace(block_tokens)
        self.store = _store(redis_host, redis_port, store, ttl_seconds)
        fingerprint = b"" if self.spec is None else self.spec.fingerprint
        self._text = TextRecords(self.store, self.format, self._salt, fingerprint)
        self._stats = CacheStats()
        self._suspects: dict[bytes, None] = {}  # cache keys to write even if the store has them; oldest first
        self._scratch = threading.local()
        self.recent = Recent()
        self._directory_seal = self.format.seal
        if encryption_keys is not None:  # that of all tenants who share the master keys
            self._directory_seal = AesGcm(encryption_keys, DIRECTORY, encryption_key_id)
        self._founded = False  # whether this process was the first one to describe the namespace
        self._described: Description | None = None
        self.describe_every_s = describe_every(store, ttl_seconds)
        self._describe_at = -math.inf if describe else math.inf
        self.reset_after_fork()
        reset_in_children(self)

    def __repr__(self) -> str:
        return f"DistributedKVCache({self.store!r}, {self.format.precision}, {self.format.codec})"

    @property
    def namespace(self) -> Namespace:
        """The family of keys of the token calls."""
        return self._bound()[1]

    @property
    def precision(self) -> str:
        """See `KVCache.precision`."""
        return self.format.precision

    @property
    def block_tokens(self) -> int:
        """See `KVCache.block_tokens`."""
        return self._bound()[1].block_tokens

    def match(self, tokens: Sequence[int]) -> int:
        """See `KVCache.match`. It takes one round trip."""
        ns = self._bound()[1]
        return self.store.probe(ns.keys(tokens)) * ns.block_tokens

    def load(self, tokens: Sequence[int], start: int, stop: int, out: Tensor) -> int:
        """See `KVCache.load`."""
        ns = self._bound()[1]
        B = ns.block_tokens
        self.check_load(tokens, start, stop, out)
        chain = ns.keys(tokens[:stop])
        before, keys = chain[: start // B], chain[start // B :]
        if before:  # used but not fetched; they must not expire before the later blocks
            self.store.touch_many(before)
        begin = time.perf_counter()
        hits, reason = self._load_blocks(keys, out, B)
        if keys:
            with self._lock:
                self._stats.loads += 1
                self._stats.load_s += time.perf_counter() - begin
        self.recent.blocks(keys[:hits])
        if hits and self._stats.stored:  # a reader that never saves does not write
            self._describe()
        self._count(len(keys), hits, {reason: 1, Reason.GAP: len(keys) - hits - 1} if reason else {})
        return start + hits * B

    def save(self, tokens: Sequence[int], kv: Tensor, start: int = 0, ttl_s: float | None = None) -> int:
        """See `KVCache.save`. Blocks that are already stored are not sent again, but their TTL is renewed.

        After a load found an unusable record, `save` writes this block and the later blocks of that
        load even if they are stored. If the precision cannot represent a number of a block, this
        block and all later blocks are dropped.

        Args:
            ttl_s: how long the store keeps these blocks and those before them if nothing uses them; None: as its own
                TTL says. A block that several saves name lives as long as the longest of them says, and a later use
                counts like a save without `ttl_s`.

        Raises:
            InputError: see `KVCache.save`.
            ConfigError: `ttl_s` is no TTL, or the store has none of its own.
        """
        ns = self._bound()[1]
        B = ns.block_tokens
        self.check_save(tokens, kv, start, ttl_s)
        chain = ns.keys(tokens)
        first = -(-max(start, 0) // B)
        self.recent.saved(tokens)
        kept = self.present(chain, ttl_s)
        keys: list[bytes] = []
        blocks: list[list[Array]] = []
        overflow = 0
        for i in range(first, len(chain)):
            if kept[i]:
                continue
            try:
                blocks.append(self.parts_of(kv[:, :, :, i * B : (i + 1) * B]))
            except Unholdable:
                overflow = len(chain) - i
                self.recent.blocks(chain[i:], Reason.OVERFLOW)
                break
            keys.append(chain[i])
        stored = self.write(keys, blocks, ttl_s)
        kept_count = sum(kept[first : len(chain) - overflow])
        with self._lock:
            self._stats.kept += kept_count
            self._stats.drops += Counter({Reason.OVERFLOW: overflow})
        return stored + kept_count

    def pin(self, tokens: Sequence[int], lease_s: float) -> Pin:
        """Keep the leading blocks of `tokens` that are stored, until the lease ends. See `kvlab.cache.pins`.

        Takes two round trips. A fault of the store gives a pin that keeps nothing; the store counts its reason.

        Raises:
            ConfigError: `lease_s` is not a positive number, or exceeds `max_lease_s`.
            InputError: a token is not an integer in 0 … 2**32 - 1.
        """
        keys = self._bound()[1].keys(tokens)

        def begin(lease_s: float, holder: str) -> Kept:
            kept = Kept()
            self.hold(keys[: self.store.probe(keys)], lease_s, holder, kept)
            return kept

        return Pin(len(keys), lease_s, self.max_lease_s, begin, self.store.release)

    def explain(
        self,
        tokens: Sequence[int],
        against: Sequence[int] | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> Explanation:
        """Explain block by block where a prompt is, or why it is not there. See `kvlab.cache.explain`.

        Takes two round trips, at most six if a block is missing; writes nothing and counts nothing.

        Args:
            against: a request that should share its beginning with this one.
            decode: turns tokens into text, to show where the two differ.

        Raises:
            InputError: a token is not an integer in 0 … 2**32 - 1.
        """
        return explain(self.view(), tokens, against, decode)

    def cache_kv(self, prefix: str, layer: int, k_tensor: Tensor, v_tensor: Tensor) -> bool:
        """Store one layer's keys and values under an exact text. Return whether the store accepted them.

        Tensors that are already stored under this text remain if the store does not accept the new ones.

        Args:
            k_tensor, v_tensor: tensors of the same shape (up to 7 dims) and dtype, for example
                [N, H, T, D]. int8 and int4 use the last two dims as tokens and channels.

        Raises:
            InputError: the prefix is empty, the layer is negative, or the tensors differ in shape
                or dtype.
        """
        dropped, size = self._text.put(prefix, layer, k_tensor, v_tensor)
        with self._lock:
            self._stats.stored += dropped is None
            self._stats.bytes_written += size
            if dropped is not None:
                self._stats.drops[dropped] += 1
        return dropped is None

    def get_cached_kv(self, prefix: str, layer: int) -> tuple[Tensor, Tensor] | None:
        """Return the keys and values that `cache_kv` stored, or None on a miss.

        They have their original shape and dtype. The numbers are rounded to the cache's precision.
        """
        pair, reason, size = self._text.get(prefix, layer)
        self._count(1, int(pair is not None), {reason: 1} if reason else {}, size)
        return pair

    def stats(self) -> CacheStats:
        """See `KVCache.stats`. `cache.store.stats()` returns the counters of the store, such as faults."""
        with self._lock:
            return copy.deepcopy(self._stats)

    def health(self) -> Health:
        """See `KVCache.health`."""
        return self.store.health()

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def reset_after_fork(self) -> None:
        """See `kvlab.stores.fork.Forkable`."""
        self._lock = threading.Lock()

    # --- for a tier in front (`kvlab.engine.tiers`), which keeps blocks as parts of their precision ------------------
    def check_load(self, tokens: Sequence[int], start: int, stop: int, out: Tensor) -> None:
        """Raise InputError if the arguments of `load` do not fit."""
        spec, ns = self._bound()
        B, count = ns.block_tokens, _length(tokens)
        _check_positions(start, stop)
        if start % B or stop % B or not 0 <= start <= stop <= count:
            got = f"{described(start)} and {described(stop)}"
            raise InputError(f"expected 0 <= start <= stop <= {count} in steps of {B}, got {got}")
        _check_kv(out, spec, stop - start)

    def check_save(self, tokens: Sequence[int], kv: Tensor, start: int, ttl_s: float | None = None) -> None:
        """Raise InputError or ConfigError if the arguments of `save` do not fit."""
        check_own_ttl(ttl_s, self.store.ttl_s)
        _check_kv(kv, self._bound()[0], _length(tokens))
        _check_positions(start)
        if kv.dtype not in record.DTYPES.values() or kv.layout != torch.strided or kv.is_meta:
            raise InputError(
                f"expected dense KV of float32, float16 or bfloat16, got {kv.dtype}, {kv.layout}, {kv.device}"
            )

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """The shape [L, P, H, B, D] of a block."""
        spec, ns = self._bound()
        return spec.layers, 2, spec.heads, ns.block_tokens, spec.head_dim

    @property
    def record_bytes(self) -> int:
        """The size of a buffer for a record of one block."""
        return record.max_record_bytes(self.format, self.block_shape)

    def parts_of(self, block: Tensor) -> list[Array]:
        """Return the parts of a block, which may share its memory.

        Raises:
            Unholdable: the precision cannot represent a number.
        """
        return to_parts(block, self.format.precision, plane_axis=1)

    def hold(self, keys: Sequence[bytes], lease_s: float, holder: str, kept: Kept) -> None:
        """Keep blocks in the store; add what it keeps to `kept`."""
        kept.note("store", *self.store.hold_many(keys, lease_s, holder))
        with self._lock:
            self._stats.pinned += Counter(held=kept.held.get("store", 0), refreshed=kept.refreshed.get("store", 0))

    def present(self, keys: Sequence[bytes], ttl_s: float | None = None) -> list[bool]:
        """Return which blocks the store has, without those whose last load found an unusable record. Renews TTLs."""
        stored = self.store.touch_many(keys) if ttl_s is None else self.store.touch_many(keys, ttl_s)
        return [there and key not in self._suspects for there, key in zip(stored, keys, strict=True)]

    def write(self, keys: Sequence[bytes], blocks: Sequence[list[Array]], ttl_s: float | None = None) -> int:
        """Write blocks, whether they are present or not. Return how many the store accepted."""
        shape, dtype = self.block_shape, self._bound()[0].dtype
        pairs = zip(keys, blocks, strict=True)
        values = [record.encode_parts(parts, shape, dtype, key, self.format) for key, parts in pairs]
        stored = self.store.put_many(keys, values) if ttl_s is None else self.store.put_many(keys, values, ttl_s)
        self.recent.blocks(keys, STORED if stored == len(keys) else Reason.STORE)
        if stored:
            self._describe()
        elif values and self._describe_at < math.inf:  # it took nothing, and may come back empty
            self._describe_at = min(self._describe_at, time.monotonic() + DESCRIBE_AGAIN_S)
        with self._lock:
            for key in keys if stored == len(keys) else ():
                self._suspects.pop(key, None)
            self._stats.stored += stored
            self._stats.bytes_written += sum(len(p) for v in values for p in v)
            self._stats.drops += Counter({Reason.STORE: len(values) - stored})
        return stored

    def unpack(self, key: bytes, value: bytes | memoryview | None, reason: str) -> tuple[list[Array], str]:
        """Return the parts of a fetched value, which may share its memory, and "", or no parts and the reason why.

        Args:
            value, reason: the answer of `Store.get_many`.
        """
        parts: list[Array] = []
        if value is not None:
            try:
                parts = record.decode_parts(value, key, self.format, self.block_shape)[0]
            except BadRecord as error:
                self._remove_if_damaged(key, error)
                reason = error.reason
        with self._lock:
            self._stats.bytes_read += len(value) if parts and value is not None else 0
        if reason and (value is not None or reason in _NO_RECORD):
            self._suspect([key])
        return parts, reason

    def view(self) -> View:
        """Return what `kvlab.cache.explain` looks at."""
        spec, ns = self._bound()
        return View(
            store=self.store,
            namespace=ns,
            check=self._problem,
            record_bytes=self.record_bytes,
            description=description_of(spec, ns),
            seal=self._directory_seal,
            recent=self.recent,
            founded=self._founded,
        )

    def _problem(self, key: bytes, value: bytes | memoryview) -> str:
        """Return why a value is not a valid record of a block, or ""."""
        try:
            record.decode_parts(value, key, self.format, self.block_shape)
        except BadRecord as error:
            return error.reason
        return ""

    def _describe(self) -> None:
        """Leave the description in the store, if it is time."""
        with self._lock:
            if time.monotonic() < self._describe_at:
                return
            self._describe_at = time.monotonic() + self.describe_every_s
        spec, ns = self._bound()
        if (description := description_of(spec, ns)) is not None:
            if self._described is None:
                try:
                    self._described = description.of_tenant(self._salt)
                except (AttributeError, ValueError, MemoryError):  # no scrypt in this Python, or no 32 MiB for it
                    logger.warning("no description is left in the store: the digest of the salt cannot be computed")
                    self._describe_at = math.inf
                    return
            self._founded |= write(self.store, self._directory_seal, self._described) == WRITTEN

    def _make_namespace(self, block_tokens: int | None) -> Namespace | None:
        if not (block_tokens is None or (type(block_tokens) is int and 0 < block_tokens < 2**32)):
            raise ConfigError(
                f"expected a block size as a whole number in 1 … 2**32 - 1, got {described(block_tokens)}"
            )
        if self.spec is None:
            if block_tokens is not None:
                raise ConfigError("expected model= with block_tokens=, because only the token calls use blocks")
            return None
        precision = self.format.precision
        B = block_tokens or self.spec.block_tokens(precision)
        if B * self.spec.kv_bytes_per_token(precision) > MAX_VALUE_BYTES:
            raise ConfigError(
                f"expected a block whose record is at most {MAX_VALUE_BYTES >> 20} MiB, got {B} tokens of "
                f"{self.spec.kv_bytes_per_token(precision):,} bytes each"
            )
        return Namespace(self.spec.fingerprint, precision, self._salt, B)

    def _bound(self) -> tuple[KVSpec, Namespace]:
        if self.spec is None or self._namespace is None:
            raise ConfigError(
                "expected a cache with model= for the token calls, got one without; pass model= to its constructor"
            )
        return self.spec, self._namespace

    def _load_blocks(self, keys: Sequence[bytes], out: Tensor, B: int) -> tuple[int, str]:
        """Fill `out` block by block. Return the number of hits and the reason for the first miss ("" for none).

        Records are received in buffers that this thread reuses, because new memory causes page faults.
        """
        room = record.max_record_bytes(self.format, (*out.shape[:3], B, out.shape[4]))
        window = max(1, WINDOW_BYTES // room)
        for at in range(0, len(keys), window):
            part = keys[at : at + window]
            reasons: list[str] = []
            values = self.store.get_many(part, self._buffers(len(part), room), reasons)
            for i, (key, value) in enumerate(zip(part, values, strict=True), at):
                reason = reasons[i - at]
                if value is not None:
                    reason = self._decode_into(value, key, out[:, :, :, i * B : (i + 1) * B])
                if reason:
                    if value is not None or reason in _NO_RECORD:  # the later blocks were not checked
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
            for key in reversed(keys):  # the first key is deleted last: the later blocks are unusable without it
                self._suspects.pop(key, None)
                self._suspects[key] = None
            while len(self._suspects) > MAX_SUSPECTS:
                del self._suspects[next(iter(self._suspects))]

    def _decode_into(self, value: bytes | memoryview, key: bytes, out: Tensor) -> str:
        """Fill one block. Return the reason for a failure, or "" for none."""
        try:
            record.decode(value, key, self.format, tuple(out.shape), out=out)
        except BadRecord as error:
            self._remove_if_damaged(key, error)
            return error.reason
        with self._lock:
            self._stats.bytes_read += len(value)
        return ""

    def _remove_if_damaged(self, key: bytes, error: BadRecord) -> None:
        """Delete a damaged record. Keep other bad records, which a newer reader or other master keys may decode."""
        if error.damaged:
            self.store.delete_many([key])

    def _count(self, requested: int, hits: int, misses: dict[str, int], read: int = 0) -> None:
        with self._lock:
            self._stats.requested += requested
            self._stats.hits += hits
            self._stats.sources += Counter({"store": hits})
            self._stats.misses += Counter(misses)
            self._stats.bytes_read += read


def _format(
    precision: str, compress: bool | str, keys: Mapping[int, bytes] | None, salt: bytes, key_id: int | None
) -> Format:
    """Return how records are written."""
    if not isinstance(precision, str) or not isinstance(compress, bool | str):
        raise ConfigError(
            "expected precision as text and compress as True, False or text, "
            f"got {type(precision).__name__} and {type(compress).__name__}"
        )
    if keys is None and key_id is not None:
        raise ConfigError(
            "expected encryption_keys= with encryption_key_id=; records are not encrypted without master keys"
        )
    codec = {True: "zstd", False: "raw"}[compress] if isinstance(compress, bool) else compress
    element_bytes(_PRECISION_NAMES.get(precision, precision))  # a record may also be opaque, but not of a tensor
    seal = Xxh3() if keys is None else AesGcm(keys, salt, key_id)
    return Format(_PRECISION_NAMES.get(precision, precision), codec, seal)


def _store(
    redis_host: str | None, redis_port: int | _Default, store: str | Store | None, ttl: float | _Default | None
) -> Store:
    """Return the store that the arguments describe."""
    if redis_host is not None and store is not None:
        raise ConfigError("expected at most one of redis_host and store")
    if redis_host is None and not isinstance(redis_port, _Default):
        raise ConfigError("expected redis_host= with redis_port=; without a host, the cache uses an in-process Redis")
    if isinstance(store, Store):
        if not isinstance(ttl, _Default):
            raise ConfigError("expected no ttl_seconds= with a Store object: it has a TTL of its own")
        return store
    if not (store is None or isinstance(store, str)):
        raise ConfigError(f"expected store= as a URL or a kvlab.stores.Store, got {type(store).__name__}")
    url = store if store is not None else "fakeredis://"
    if redis_host is not None:
        url = url_of(redis_host, 6379 if isinstance(redis_port, _Default) else redis_port)
    return open_store(url, ttl_s=DAY_S if isinstance(ttl, _Default) else ttl)


def describe_every(store: str | Store | None, ttl: float | _Default | None) -> float:
    """Return the seconds between two writes of a description, by the arguments of a cache."""
    if isinstance(store, Store):
        return every_s(store.ttl_s)
    return every_s(DAY_S if isinstance(ttl, _Default) else ttl)


def _salt_bytes(salt: str | bytes) -> bytes:
    if isinstance(salt, bytes):
        return salt
    if not isinstance(salt, str):
        raise ConfigError(
            f"expected the salt as text or bytes, got {type(salt).__name__}; check that its setting is not missing"
        )
    try:
        return salt.encode()
    except UnicodeEncodeError:
        pass  # an error raised here would carry the salt in its context
    raise ConfigError("expected a salt that can be encoded as UTF-8, got text with a lone surrogate")


def _length(tokens: Sequence[int]) -> int:
    try:
        return len(tokens)
    except TypeError:
        raise InputError(f"expected tokens as a sequence of integers, got {type(tokens).__name__}") from None


def _check_positions(*positions: int) -> None:
    for position in positions:
        if not isinstance(position, Integral) or isinstance(position, bool):
            raise InputError(f"expected positions as whole numbers, got {described(position)}")


def _check_kv(kv: Tensor, spec: KVSpec, tokens: int) -> None:
    want = (spec.layers, 2, spec.heads, tokens, spec.head_dim)
    if not isinstance(kv, Tensor):
        raise InputError(f"expected KV as a tensor of shape [L, P, H, T, D] = {want}, got {type(kv).__name__}")
    if tuple(kv.shape) != want or not kv.is_floating_point():
        raise InputError(f"expected KV of shape [L, P, H, T, D] = {want}, got {tuple(kv.shape)} {kv.dtype}")
