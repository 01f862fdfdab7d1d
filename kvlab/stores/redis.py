"""Blocks in Redis: one key a block, batched, with a TTL, and every fault a counted miss.

What this module decides is what a cache in front of a model needs, and a database client would
not do: each call has one deadline, nothing is retried (the fallback is to recompute, which must
not wait), and a server that does not answer is left alone for a while. How the bytes move is in
`wire`, when to leave a server alone in `breaker`.

fakeredis, a Redis inside this process, is the same store over another link: `fakeredis://`.
"""

from __future__ import annotations

import copy
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import redis

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
    pieces,
    renew_in_children,
)
from kvlab.stores.breaker import Breaker
from kvlab.stores.wire import MAX_VALUE_BYTES, Command, Deadline, FakeLink, Link, NoConnection, Reply, TooBig

SCHEMES: Final = ("redis", "rediss", "unix", "fakeredis")
KEY_PREFIX: Final = b"kv:"
COMMANDS: Final = ("GET", "SET", "DEL", "EXISTS", "PEXPIRE", "INFO")
"""All that the store ever asks of a server: the rights that its ACL user needs."""
WINDOW_BYTES: Final = 16 << 20  # more replies at once fall out of the server's cache: measured, docs/02
WINDOW_KEYS: Final = 1024
SHARE_OF_MEMORY: Final = 16  # no value may take more than this part of the server's maxmemory
MAX_DEADLINE_S: Final = 3600
_LIMIT_AGE_S: Final = 60.0  # how long the server's maxmemory is remembered

_fake_servers: dict[str, Any] = {}

# First match wins: in redis-py an authentication error is a ConnectionError too.
_REASONS: Final[tuple[tuple[type[BaseException], str], ...]] = (
    (TooBig, "too_big"),
    (NoConnection, "pool"),
    (redis.AuthenticationError, "auth"),
    (redis.exceptions.NoPermissionError, "auth"),
    (redis.TimeoutError, "timeout"),
    (TimeoutError, "timeout"),
    (redis.BusyLoadingError, "loading"),
    (redis.exceptions.MasterDownError, "loading"),
    (redis.ReadOnlyError, "readonly"),
    (redis.exceptions.OutOfMemoryError, "oom"),
    (redis.exceptions.InvalidResponse, "protocol"),
    (redis.ConnectionError, "conn"),
    (OSError, "conn"),
)
_BY_WORD: Final = {"BUSY": "busy", "MISCONF": "misconf"}  # error replies that redis-py has no class for
_LINK_FAULTS: Final = {"timeout", "conn", "protocol", "loading", "busy", "error"}
_WRITE_FAULTS: Final = {"oom", "readonly", "misconf", "auth"}
_OF_ONE_KEY: Final = {ABSENT, "too_big", "response"}


def reason_of(error: BaseException) -> str:
    """The counter that a fault belongs to."""
    known = next((reason for kind, reason in _REASONS if isinstance(error, kind)), None)
    if known is None and isinstance(error, redis.ResponseError):
        known = _BY_WORD.get(str(error).partition(" ")[0], "response")
    return known or "error"


class RedisStore(Store):
    """Values in a Redis that `url` names.

    Args:
        url: redis://host:port/db, rediss:// (TLS), unix:///path/to.sock, all with an optional
            user:password@; or fakeredis:// for one in this process, which fakeredis://NAME
            shares between all stores of the process that use the same name. A private CA is
            named by rediss://…?ssl_ca_certs=FILE.
        ttl_s: how long a value lives after it was last written or read; None keeps it until
            the server evicts it, and is the choice for a user who may only read.
        deadline_s: for a whole call: connecting, waiting, sending, receiving. Large calls get
            one second more for each 50 MB, because no slower wire is worth asking.
        max_connections: the bound of the pool; further threads wait, in order, for at most half
            their deadline.
        clock: what the breakers go by; tests bring their own.

    Nothing is connected until the first call: an unreachable server shows in `health()` and
    in the counters, not as an error. After three faults in a row the server is left alone for
    a second (`Breaker`); after three refused writes, writes are.

    Raises:
        ConfigError: an unknown scheme, or a TTL, deadline or bound that is not positive.
    """

    def __init__(
        self,
        url: str = "fakeredis://",
        ttl_s: float | None = None,
        deadline_s: float = 0.25,
        max_connections: int = 16,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_ttl(ttl_s)
        if not 0 < deadline_s <= MAX_DEADLINE_S:
            raise ConfigError(f"expected a positive deadline of at most {MAX_DEADLINE_S} seconds, got {deadline_s}")
        if not max_connections >= 1:
            raise ConfigError(f"expected at least one connection, got {max_connections}")
        self.url = url
        self._ttl_ms = None if ttl_s is None else max(1, round(ttl_s * 1000))
        self._deadline_s = deadline_s
        self._link = _link(url, max_connections)
        self.breaker = Breaker(clock=clock)
        self.write_breaker = Breaker(clock=clock)
        self._clock = clock
        self._stats = StoreStats()
        self._lock = threading.Lock()  # guards the counters
        self._limit = MAX_VALUE_BYTES  # of a value, as long as `_limit_until`; fakeredis has no other
        self._limit_until = math.inf if isinstance(self._link, FakeLink) else -math.inf
        self._value_bytes = 1 << 20  # what values were like lately: how many fit a window
        self._closed = False
        renew_in_children(self)

    def get_many(
        self, keys: Sequence[bytes], out: Sequence[memoryview] | None = None, why: list[str] | None = None
    ) -> list[bytes | memoryview | None]:
        """See `Store.get_many`. Hits renew their TTL, in the same round trip.

        One round trip for each 16 MiB: of buffers, or of values as large as those seen lately.
        """
        check_buffers(keys, out)
        got: list[bytes | memoryview | None] = []
        reasons: list[str] = []
        deadline = Deadline(self._deadline_s)
        fault = ""
        while len(got) < len(keys):
            at = len(got)
            window = self._read_window(at, len(keys), out)
            if fault:  # nor would the server answer now
                replies: Sequence[Reply] = [_Refused(fault)] * window
            else:
                replies = self._get(keys[at : at + window], out[at : at + window] if out else None, deadline)
            for reply in replies:
                there = type(reply) is memoryview or type(reply) is bytes
                reasons.append("" if there else ABSENT if reply is None else _reason(reply))
                got.append(reply if there else None)  # type: ignore[arg-type]
            fault = next((r for r in reasons[at:] if r and r not in _OF_ONE_KEY), "")
        hits = reasons.count("")
        with self._lock:
            self._stats.requested += len(keys)
            self._stats.hits += hits
            self._stats.bytes_out += sum([len(value) for value in got if value is not None])
            if hits < len(keys):
                self._stats.misses.update(filter(None, reasons))
        if why is not None:
            why += reasons
        return got

    def put_many(self, keys: Sequence[bytes], values: Sequence[Value]) -> int:
        """See `Store.put_many`. A value too large for the server is dropped before a byte of it is sent."""
        check_pairs(keys, values, "value")
        deadline = Deadline(self._deadline_s)
        sizes = [_nbytes(value) for value in values]
        limit = self._limit if self._clock() < self._limit_until or not keys else self._value_limit(deadline)
        reasons = ["too_big" if isinstance(limit, int) else limit] * len(keys)  # of those that no window takes
        for window in _windows(sizes, limit if isinstance(limit, int) else -1):
            answers = self._set([(keys[i], values[i]) for i in window], sum([sizes[i] for i in window]), deadline)
            for i, answer in zip(window, answers, strict=True):
                reasons[i] = answer
        stored = reasons.count("")
        with self._lock:
            self._stats.offered += len(keys)
            self._stats.stored += stored
            self._stats.bytes_in += sum([size for size, reason in zip(sizes, reasons, strict=True) if not reason])
            if stored < len(keys):
                self._stats.drops.update(filter(None, reasons))
        return stored

    def probe(self, keys: Sequence[bytes]) -> int:
        """See `Store.probe`. 0 when the server does not answer."""
        answers = self._advice([(b"EXISTS", KEY_PREFIX + key) for key in keys])
        return next((i for i, there in enumerate(answers) if there != 1), len(keys))

    def touch_many(self, keys: Sequence[bytes]) -> list[bool]:
        """See `Store.touch_many`. All False when the server does not answer."""
        return [answer == 1 for answer in self._advice(list(map(self._touch, keys)))]

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """See `Store.delete_many`. 0 when the server does not answer."""
        answers = self._advice([(b"DEL", KEY_PREFIX + key) for key in keys])
        return sum(answer == 1 for answer in answers)

    def health(self) -> Health:
        """See `Store.health`. Tries every command that the store uses, on a key of its own that expires at once.

        A worker that may only read is not healthy by this measure; its line says "reads work".
        """
        where = without_password(self.url)
        if self._closed:
            return Health(False, f"{where}: closed")
        key = KEY_PREFIX + b"health:" + os.urandom(8).hex().encode()
        trials: list[Command] = [(b"GET", key), (b"EXISTS", key), (b"SET", key, b"", b"PX", b"1000")]
        trials += [(b"PEXPIRE", key, b"1000"), (b"DEL", key)]
        if isinstance(self._link, Link):
            trials.append((b"INFO", b"memory"))
        replies = self._link.exchange(trials, Deadline(self._deadline_s))
        faults = [reply for reply in replies if isinstance(reply, Exception)]
        self.breaker.record(_verdict(faults))
        if not faults:
            return Health(True, f"{where}: answers")
        reads = "" if isinstance(replies[0], Exception) or isinstance(replies[1], Exception) else "reads work, but "
        return Health(False, f"{where}: {reads}{reason_of(faults[0])}: {' '.join(str(faults[0]).split())}")

    def stats(self) -> StoreStats:
        """See `Store.stats`."""
        with self._lock:
            return copy.deepcopy(self._stats)

    def close(self) -> None:
        """See `Store.close`."""
        self._closed = True
        self._link.close()

    def renew_after_fork(self) -> None:
        """See `Forkable`."""
        self._lock = threading.Lock()
        self.breaker.renew()
        self.write_breaker.renew()
        self._link.renew()

    def _get(self, keys: Sequence[bytes], out: Sequence[memoryview] | None, deadline: Deadline) -> Sequence[Reply]:
        """One round trip: each key's value, None where there is none, or why it is not known."""
        commands: list[Command] = [(b"GET", KEY_PREFIX + key) for key in keys]
        if self._ttl_ms is not None:
            commands += map(self._touch, keys)
        replies = self._exchange(commands, deadline, out)
        if any(isinstance(r, redis.exceptions.NoPermissionError) for r in replies[len(keys) :]):
            # Chains would die of age with nobody noticing: such a user needs ttl_s=None.
            return [_Refused("auth")] * len(keys)
        values = replies[: len(keys)]
        if out is None:
            self._value_bytes = max([len(v) for v in values if isinstance(v, bytes)], default=self._value_bytes)
        return values

    def _set(self, pairs: list[tuple[bytes, Value]], nbytes: int, deadline: Deadline) -> list[str]:
        """Store a window; per value "", or why it was dropped."""
        if not self.write_breaker.allow():
            return ["breaker"] * len(pairs)
        expiry = () if self._ttl_ms is None else (b"PX", b"%d" % self._ttl_ms)
        verdict: bool | None = None
        try:
            deadline.extend(nbytes)
            replies = self._exchange([(b"SET", KEY_PREFIX + key, value, *expiry) for key, value in pairs], deadline)
            answers = ["" if reply in (True, b"OK") else _reason(reply) for reply in replies]
            verdict = True if "" in answers else False if _WRITE_FAULTS.intersection(answers) else None
        finally:
            self.write_breaker.record(verdict)
        return answers

    def _advice(self, commands: list[Command]) -> list[Reply]:
        """Replies to a call that counts as no request."""
        return self._exchange(commands, Deadline(self._deadline_s))

    def _exchange(
        self, commands: list[Command], deadline: Deadline, out: Sequence[memoryview] | None = None
    ) -> list[Reply]:
        """One round trip, if the breaker lets it through. Says afterwards how the link did."""
        if self._closed or not commands:
            return [_Refused("closed")] * len(commands)
        if not self.breaker.allow():
            self._count_fault({"breaker"})
            return [_Refused("breaker")] * len(commands)
        verdict: bool | None = None
        try:
            replies = self._link.exchange(commands, deadline, out)
            faults = [reply for reply in replies if isinstance(reply, Exception)]
            verdict = _verdict(faults) if faults else True
        finally:
            self.breaker.record(verdict)
        if faults:
            self._count_fault({_reason(fault) for fault in faults})
        return replies

    def _count_fault(self, reasons: set[str]) -> None:
        reasons = reasons - _OF_ONE_KEY
        if reasons:
            with self._lock:
                self._stats.faults[min(reasons)] += 1

    def _touch(self, key: bytes) -> Command:
        """Renews a TTL where there is one; the answer is 1 if the key is there."""
        if self._ttl_ms is None:
            return (b"EXISTS", KEY_PREFIX + key)
        return (b"PEXPIRE", KEY_PREFIX + key, b"%d" % self._ttl_ms)

    def _read_window(self, start: int, stop: int, out: Sequence[memoryview] | None) -> int:
        """How many keys to ask for at once."""
        count, size = 0, 0
        while start + count < stop and count < WINDOW_KEYS:
            size += self._value_bytes if out is None else out[start + count].nbytes
            if count and size > WINDOW_BYTES:
                break
            count += 1
        return count

    def _value_limit(self, deadline: Deadline) -> int | str:
        """Ask for the most bytes that a value may have here; else why that cannot be known."""
        (reply,) = self._exchange([(b"INFO", b"memory")], deadline)
        found = re.search(rb"^maxmemory:(\d+)", reply, re.MULTILINE) if isinstance(reply, bytes) else None
        if found is None:
            return _reason(reply)
        share = int(found[1]) // SHARE_OF_MEMORY
        self._limit = min(MAX_VALUE_BYTES, share or MAX_VALUE_BYTES)
        self._limit_until = self._clock() + _LIMIT_AGE_S
        return self._limit


class _Refused(Exception):
    """A command that was not sent; the text is the reason."""


def _verdict(faults: Sequence[Exception]) -> bool | None:
    """Whether the link worked; None when that was not found out."""
    reasons = {_reason(fault) for fault in faults}
    if "pool" in reasons:
        return None
    return not (reasons & _LINK_FAULTS or any(isinstance(fault, redis.AuthenticationError) for fault in faults))


def _reason(reply: Reply) -> str:
    """Why a reply is not the one hoped for."""
    if isinstance(reply, _Refused):
        return str(reply)
    return reason_of(reply) if isinstance(reply, Exception) else "protocol"


def _nbytes(value: Value) -> int:
    return sum([part.nbytes if type(part) is memoryview else len(part) for part in pieces(value)])


def _windows(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Numbers of the values that fit `limit`, at most `WINDOW_BYTES` and `WINDOW_KEYS` together; one may be larger."""
    window: list[int] = []
    total = 0
    for i, size in enumerate(sizes):
        if size > limit:
            continue
        if window and (len(window) == WINDOW_KEYS or total + size > WINDOW_BYTES):
            yield window
            window, total = [], 0
        window.append(i)
        total += size
    if window:
        yield window


def _link(url: str, max_connections: int) -> Link | FakeLink:
    if _checked_scheme(url) == "fakeredis":
        import fakeredis  # here: with a real server nobody needs it

        name = urlsplit(url).netloc
        server = _fake_servers.setdefault(name, fakeredis.FakeServer()) if name else fakeredis.FakeServer()
        return FakeLink(fakeredis.FakeRedis(server=server))
    try:
        return Link(url, max_connections)
    except (ValueError, TypeError, redis.RedisError) as error:
        raise ConfigError(f"not a usable store URL: {without_password(url)!r} ({error})") from error


def _checked_scheme(url: str) -> str:
    if not isinstance(url, str):
        raise ConfigError(f"expected a store URL as text, got {type(url).__name__}")
    shown = without_password(url)
    try:
        parts = urlsplit(url)
        _ = parts.port  # parsed only when asked for
    except ValueError as error:
        # The parser's own words may show a part of the password that it took for the port.
        why = "special characters in user and password must be percent-encoded" if "@" in url else str(error)
        raise ConfigError(f"not a usable store URL: {shown!r} ({why})") from None
    if parts.scheme not in SCHEMES:
        raise ConfigError(
            f"expected a store URL that begins with {', '.join(s + '://' for s in SCHEMES)}, got {shown!r}"
        )
    for setting, files in parse_qs(parts.query).items():
        if setting in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile") and not Path(files[0]).exists():
            raise ConfigError(f"not a usable store URL: {shown!r} (there is no file {files[0]!r} for {setting})")
    database = parts.path.strip("/")
    if parts.scheme in ("redis", "rediss") and database and not database.isdigit():
        raise ConfigError(f"not a usable store URL: {shown!r} (expected a database number after the host)")
    return parts.scheme


def without_password(url: str) -> str:
    """The URL as it may be shown and logged: whatever stands between user name and last @ may be secret."""
    return re.sub(r"(?<=://)([^:@/]*):.*@|([?&]password=)[^&]*", _starred, url)


def _starred(match: re.Match[str]) -> str:
    return f"{match[1]}:***@" if match[2] is None else f"{match[2]}***"
