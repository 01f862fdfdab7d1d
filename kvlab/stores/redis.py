"""Blocks in Redis: one key a block, batched, with a TTL, and every fault a counted miss.

redis-py with hiredis does the talking. Its defaults suit a database, not a cache in front of
a model, so they are replaced: short timeouts and no client retries (the fallback is to
recompute, which must not wait), RESP2 (with RESP3 redis-py drops the guard that notices
left-over bytes on a pooled connection), a bounded pool.

fakeredis, a Redis inside this process, is the same code with another client: `fakeredis://`.
"""

from __future__ import annotations

import copy
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvlab.errors import ConfigError
from kvlab.stores.base import (
    ABSENT,
    Health,
    Store,
    StoreStats,
    Value,
    check_buffers,
    check_pairs,
    check_ttl,
    joined,
    pieces,
    place,
)

SCHEMES = ("redis", "rediss", "unix", "fakeredis")
KEY_PREFIX = b"kv:"
WINDOW_BYTES = 64 << 20
WINDOW_KEYS = 64
MAX_VALUE_BYTES = 64 << 20

_fake_servers: dict[str, Any] = {}

# First match wins: in redis-py an authentication error is a ConnectionError too.
_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (redis.AuthenticationError, "auth"),
    (redis.exceptions.NoPermissionError, "auth"),
    (redis.TimeoutError, "timeout"),
    (redis.BusyLoadingError, "loading"),
    (redis.ReadOnlyError, "readonly"),
    (redis.exceptions.OutOfMemoryError, "oom"),
    (redis.exceptions.InvalidResponse, "protocol"),
    (redis.ConnectionError, "conn"),
    (redis.ResponseError, "response"),
    (OSError, "conn"),
)


def reason_of(error: BaseException) -> str:
    """The counter that a fault of the client library belongs to."""
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), "error")


class RedisStore(Store):
    """Values in a Redis that `url` names.

    Args:
        url: redis://host:port/db, rediss:// (TLS), unix:///path/to.sock, all with an optional
            user:password@; or fakeredis:// for one in this process, which fakeredis://NAME
            shares between all stores of the process that use the same name.
        ttl_s: how long a value lives after it was last written or read; None keeps it until
            the server evicts it.
        timeout_s: for connecting and for each read or write on the socket.
        max_connections: the pool's bound; further threads wait for at most `timeout_s`.

    Nothing is connected until the first call: an unreachable server shows in `health()` and
    in the counters, not as an error.

    Raises:
        ConfigError: an unknown scheme, or a TTL or timeout that is not positive.
    """

    def __init__(
        self, url: str = "fakeredis://", ttl_s: float | None = None, timeout_s: float = 0.5, max_connections: int = 16
    ) -> None:
        check_ttl(ttl_s)
        if not timeout_s > 0:
            raise ConfigError(f"expected a positive timeout in seconds, got {timeout_s}")
        self.url = url
        self._ttl_ms = None if ttl_s is None else max(1, round(ttl_s * 1000))
        self._client = _client(url, timeout_s, max_connections)
        self._stats = StoreStats()
        self._lock = threading.Lock()  # guards the counters; the client has its own
        self._closed = False

    def get_many(
        self, keys: Sequence[bytes], out: Sequence[memoryview] | None = None
    ) -> list[bytes | memoryview | None]:
        """See `Store.get_many`. A hit renews the TTL of its whole batch, so a chain's root outlives its leaves."""
        check_buffers(keys, out)
        got: list[bytes | memoryview | None] = []
        reasons: Counter[str] = Counter()
        for start in range(0, len(keys), WINDOW_KEYS):
            part = [KEY_PREFIX + key for key in keys[start : start + WINDOW_KEYS]]
            for i, value in enumerate(self._fetch(part), start):
                placed = place(value, None if out is None else out[i]) if isinstance(value, bytes) else None
                got.append(placed)
                if placed is None:
                    reasons["too_big" if isinstance(value, bytes) else value] += 1
        with self._lock:
            self._stats.requested += len(keys)
            self._stats.misses += reasons
            self._stats.hits += len(keys) - reasons.total()
            self._stats.bytes_out += sum(len(v) for v in got if v is not None)
        return got

    def put_many(self, keys: Sequence[bytes], values: Sequence[Value]) -> int:
        """See `Store.put_many`. A value over 64 MiB is dropped before a byte of it is sent."""
        check_pairs(keys, values, "value")
        stored, stored_bytes, drops = 0, 0, Counter[str]()
        for batch in _windows(keys, values):
            fitting = [(k, v) for k, v in batch if len(v) <= MAX_VALUE_BYTES]
            drops["too_big"] += len(batch) - len(fitting)
            for (_, value), fault in zip(fitting, self._send(fitting), strict=True):
                if fault:
                    drops[fault] += 1
                else:
                    stored, stored_bytes = stored + 1, stored_bytes + len(value)
        with self._lock:
            self._stats.offered += len(keys)
            self._stats.stored += stored
            self._stats.bytes_in += stored_bytes
            self._stats.drops += drops
        return stored

    def probe(self, keys: Sequence[bytes]) -> int:
        """See `Store.probe`. 0 when the server does not answer."""
        if self._closed or not keys:
            return 0
        try:
            pipe = self._client.pipeline(transaction=False)
            for key in keys:
                pipe.exists(KEY_PREFIX + key)
            answers = pipe.execute(raise_on_error=False)
        except Exception:  # advice only: no answer means "plan without the store"
            return 0
        return next((i for i, there in enumerate(answers) if there != 1), len(keys))

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """See `Store.delete_many`. 0 when the server does not answer."""
        if self._closed or not keys:
            return 0
        try:
            return int(self._client.delete(*(KEY_PREFIX + key for key in keys)))
        except Exception:  # a cache entry that stays is only stale space
            return 0

    def health(self) -> Health:
        """See `Store.health`."""
        where = _without_password(self.url)
        if self._closed:
            return Health(False, f"{where}: closed")
        try:
            self._client.ping()
        except Exception as error:  # every kind of fault is the answer here
            return Health(False, f"{where}: {reason_of(error)}: {error}")
        return Health(True, f"{where}: answers")

    def stats(self) -> StoreStats:
        """See `Store.stats`."""
        with self._lock:
            return copy.deepcopy(self._stats)

    def close(self) -> None:
        """See `Store.close`."""
        self._closed = True
        self._client.close()

    def _fetch(self, keys: list[bytes]) -> list[bytes | str]:
        """Each key's value, or the reason why there is none; one round trip."""
        if self._closed:
            return ["closed"] * len(keys)
        try:
            pipe = self._client.pipeline(transaction=False)
            pipe.mget(keys)
            if self._ttl_ms is not None:
                for key in keys:
                    pipe.pexpire(key, self._ttl_ms)
            values = pipe.execute(raise_on_error=False)[0]
            if isinstance(values, Exception):
                raise values
            if not isinstance(values, list) or len(values) != len(keys):
                return ["protocol"] * len(keys)
            return [v if isinstance(v, bytes) else ABSENT if v is None else "protocol" for v in values]
        except Exception as error:  # a broken parser raises anything, RecursionError included
            return [reason_of(error)] * len(keys)

    def _send(self, batch: list[tuple[bytes, bytes]]) -> list[str | None]:
        """Store a window; per value None, or why it was dropped."""
        if self._closed or not batch:
            return ["closed"] * len(batch)
        try:
            pipe = self._client.pipeline(transaction=False)
            for key, value in batch:
                pipe.set(KEY_PREFIX + key, value, px=self._ttl_ms)
            answers = pipe.execute(raise_on_error=False)
        except Exception as error:
            return [reason_of(error)] * len(batch)
        return [None if a is True else reason_of(a) if isinstance(a, Exception) else "protocol" for a in answers]


def _windows(keys: Sequence[bytes], values: Sequence[Value]) -> Iterator[list[tuple[bytes, bytes]]]:
    """Split a batch so that at most `WINDOW_BYTES` and `WINDOW_KEYS` are in flight; a value alone may be larger."""
    batch: list[tuple[bytes, bytes]] = []
    size = 0
    for key, value in zip(keys, values, strict=True):
        length = sum(len(p) for p in pieces(value))
        if batch and (len(batch) == WINDOW_KEYS or size + length > WINDOW_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((key, joined(value)))
        size += length
    if batch:
        yield batch


def _client(url: str, timeout_s: float, max_connections: int) -> Any:
    scheme = _checked_scheme(url)
    if scheme == "fakeredis":
        import fakeredis  # here: with a real server nobody needs it

        name = urlsplit(url).netloc
        server = _fake_servers.setdefault(name, fakeredis.FakeServer()) if name else fakeredis.FakeServer()
        return fakeredis.FakeRedis(server=server)
    try:
        pool = redis.BlockingConnectionPool.from_url(
            url,
            max_connections=max_connections,
            timeout=timeout_s,
            protocol=2,
            decode_responses=False,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
        pool.connection_class(**pool.connection_kwargs)  # connects nowhere; an unknown setting shows here
    except (ValueError, TypeError) as error:
        raise ConfigError(f"not a usable store URL: {_without_password(url)!r} ({error})") from error
    return redis.Redis.from_pool(pool)  # the client owns the pool: closing it closes the connections


def _checked_scheme(url: str) -> str:
    shown = _without_password(url)
    try:
        parts = urlsplit(url)
        _ = parts.port  # parsed only when asked for
    except ValueError as error:
        raise ConfigError(f"not a usable store URL: {shown!r} ({error})") from error
    if parts.scheme not in SCHEMES:
        raise ConfigError(
            f"expected a store URL that begins with {', '.join(s + '://' for s in SCHEMES)}, got {shown!r}"
        )
    database = parts.path.strip("/")
    if parts.scheme in ("redis", "rediss") and database and not database.isdigit():
        raise ConfigError(f"not a usable store URL: {shown!r} (expected a database number after the host)")
    return parts.scheme


def _without_password(url: str) -> str:
    """The URL as it may be shown and logged."""
    return re.sub(r"(?<=://)([^:@/]*):[^@/]*@|([?&]password=)[^&]*", _starred, url)


def _starred(match: re.Match[str]) -> str:
    return f"{match[1]}:***@" if match[2] is None else f"{match[2]}***"
