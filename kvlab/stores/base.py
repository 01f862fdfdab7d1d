"""The contract of a store: bytes by key, in batches. A fault of the store never raises an exception.

A store is the outermost tier and the least reliable one, because its values may be on a server
behind a network. If the store has a fault (it is down, slow or full, or its replies are invalid),
a read becomes a miss and a write is dropped. Each miss and each dropped write is counted under one
reason. Two sum rules always hold, for every store:

    requested == hits + sum(misses by reason)
    offered   == stored + sum(drops by reason)

A store does not interpret values, does not choose what to evict, and does not promise that a stored
value is still there. `probe` is advice for the planner; only `get_many` is authoritative.
`kvlab.core.record` decides whether bytes are a valid record.

`tests/contracts/test_store.py` runs the same suite against every implementation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from kvlab.errors import ConfigError, InputError

Value = bytes | memoryview | tuple[bytes | memoryview, ...]
"""A value to store: one buffer, or a tuple of pieces whose concatenation is the value (such as header and payload)."""

MAX_TTL_S = 100 * 365 * 86400  # 100 years; every server accepts this TTL
MAX_VALUE_BYTES = 64 << 20  # a store drops a larger value
_BYTES = frozenset((bytes, memoryview, bytearray))


@dataclass
class StoreStats:
    """Counters since the store was created. `misses`, `drops` and `faults` are counted by `Reason`.

    `misses` and `drops` count values. `faults` counts failed round trips. It includes those of `probe`,
    `touch_many` and `delete_many`, which are not requests: while a store is down, an engine that probes
    first records faults but no misses. `redirects` counts keys that a cluster node redirected to
    another node, once for each command. A few redirects are normal while slots move.
    """

    requested: int = 0
    hits: int = 0
    misses: Counter[str] = field(default_factory=Counter)
    offered: int = 0
    stored: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    bytes_in: int = 0
    bytes_out: int = 0
    redirects: int = 0

    def check(self) -> None:
        """Assert that both sum rules hold."""
        assert self.requested == self.hits + sum(self.misses.values()), self
        assert self.offered == self.stored + sum(self.drops.values()), self


@dataclass(frozen=True)
class Health:
    """Whether a store works, and one line that describes the store or its fault."""

    ok: bool
    detail: str


class Store(ABC):
    """Base class of all stores. Thread-safe.

    Attributes:
        deadline_s: the most seconds that a call takes, without what large values add (`kvlab.stores.deadline`).
        ttl_s: how long a value lives after its last use. None: until it is evicted, or it is not known.
    """

    deadline_s: float = math.inf
    ttl_s: float | None = None

    @abstractmethod
    def get_many(
        self, keys: Sequence[bytes], out: Sequence[memoryview] | None = None, reasons: list[str] | None = None
    ) -> list[bytes | memoryview | None]:
        """Fetch values, in the order of `keys`; None for a miss. A hit restarts the TTL of its value.

        Args:
            out: one writable buffer per key. A value is written to the start of its buffer, and that part
                of the buffer is returned. A value larger than its buffer is a miss ("too_big"). The caller
                owns the buffers, and no later call writes to them. Without `out`, each value is a new `bytes`.
            reasons: a list to which one string per key is appended: the `Reason` of a miss, or "" for a hit.
        """

    @abstractmethod
    def put_many(self, keys: Sequence[bytes], values: Sequence[Value], ttl_s: float | None = None) -> int:
        """Store values, replacing existing ones; return how many were accepted. Values may be reused after the call.

        Args:
            ttl_s: how long these values live if nothing uses them; None: as long as the TTL of the store says. A
                later use keeps a value for at least the TTL of the store.

        Raises:
            ConfigError: `ttl_s` is no TTL, or the store has none of its own, so that a use could not refresh it.
        """

    @abstractmethod
    def probe(self, keys: Sequence[bytes]) -> int:
        """Return the length of the longest present prefix of `keys`, in one round trip. Not counted as a request."""

    @abstractmethod
    def touch_many(self, keys: Sequence[bytes], ttl_s: float | None = None) -> list[bool]:
        """Return which keys are present, and restart their TTLs, in one round trip. No life gets shorter by that.

        This is for blocks that are used without being fetched: the root of a chain must not expire before
        its leaves. Like `probe`, the result is advice and not counted as a request.

        Args:
            ttl_s: they live for at least so long from now; None: the TTL of the store.
        """

    def hold_many(self, keys: Sequence[bytes], lease_s: float, holder: str) -> tuple[int, bool]:
        """Keep the values that are present, from the first on, until a lease ends. An earlier lease of `holder` ends.

        Returns:
            How many are kept, and whether eviction spares them. A store that cannot promise that refreshes their TTLs
            and returns False, as here: its server may evict them at any time.
        """
        return sum(self.touch_many(keys, lease_s)), False

    def release(self, holder: str) -> None:  # noqa: B027  # where nothing is held there is nothing to do
        """End the lease of a holder, if there is one. TTLs stay as they are."""

    @abstractmethod
    def delete_many(self, keys: Sequence[bytes]) -> int:
        """Delete keys; return how many were present."""

    @abstractmethod
    def health(self) -> Health:
        """Check whether the store works. Takes at most one deadline, or two if no map of the servers is available."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """Return a copy of the counters."""

    def breakers(self) -> dict[tuple[str, str], str]:
        """Return the state of each circuit breaker, by the server and what it refuses: "calls" or "writes" only."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Close the connections. Later reads are misses, later writes are dropped ("closed"). May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def pieces(value: Value) -> tuple[bytes | memoryview, ...]:
    """Return a value as a tuple of pieces."""
    return value if isinstance(value, tuple) else (value,)


def joined(value: Value) -> bytes:
    """Return a value as one `bytes`."""
    return value if isinstance(value, bytes) else b"".join(pieces(value))


def check_keys(keys: Sequence[bytes]) -> None:
    """Check that a batch is a sequence of keys. A generator is refused, because it can be read only once.

    Raises:
        InputError: `keys` is not a sequence, or a key is not `bytes`.
    """
    if not isinstance(keys, Sequence):
        raise InputError(f"expected keys as a list of bytes, got {type(keys).__name__}")
    for key in keys:
        if type(key) is not bytes:
            raise InputError(f"expected keys as bytes, got {type(key).__name__}")


def check_pairs(keys: Sequence[bytes], others: Sequence[object], noun: str) -> None:
    """Check a batch of keys, and a second batch of the same length.

    Raises:
        InputError: a key is invalid, a batch is not a sequence, or the lengths differ.
    """
    check_keys(keys)
    if not isinstance(others, Sequence):
        raise InputError(f"expected a list with one {noun} per key, got {type(others).__name__}")
    if len(keys) != len(others):
        raise InputError(f"expected one {noun} per key, got {len(others)} for {len(keys)} keys")


def check_values(keys: Sequence[bytes], values: Sequence[Value]) -> None:
    """Check a batch of keys, and one value per key.

    Raises:
        InputError: a key is invalid, the lengths differ, or a value is not bytes or a contiguous memoryview.
    """
    check_pairs(keys, values, "value")
    for value in values:
        for part in pieces(value):
            if type(part) not in _BYTES or (type(part) is memoryview and not part.c_contiguous):
                raise InputError(f"expected values as bytes or contiguous memoryviews, got {type(part).__name__}")


def check_buffers(keys: Sequence[bytes], out: Sequence[memoryview] | None) -> None:
    """Check a batch of keys, and one writable buffer per key unless `out` is None.

    Raises:
        InputError: a key is invalid, the lengths differ, or a buffer is not a writable contiguous memoryview.
    """
    if out is None:
        return check_keys(keys)
    check_pairs(keys, out, "buffer")
    for buffer in out:
        if type(buffer) is not memoryview or buffer.readonly or not buffer.c_contiguous:
            raise InputError(f"expected buffers as writable contiguous memoryviews, got {type(buffer).__name__}")


def check_number(name: str, value: object, above: float, most: float, unit: str = "", whole: bool = False) -> None:
    """Check that a setting is a number above `above` and at most `most`. Booleans are refused.

    Raises:
        ConfigError: the value is not a number, is not whole if `whole` is set, or is out of range.
    """
    kinds = int if whole else int | float
    if isinstance(value, kinds) and not isinstance(value, bool) and above < value <= most:
        return
    number, limit = "a whole number" if whole else "a number", f"{most} {unit}".rstrip()
    raise ConfigError(f"expected {name} as {number} above {above} and at most {limit}, got {described(value)}")


def check_clock(clock: object) -> None:
    """Check that a clock can be called.

    Raises:
        ConfigError: `clock` is not callable.
    """
    if not callable(clock):
        raise ConfigError(f"expected clock as a function that returns seconds, got {type(clock).__name__}")


def described(value: object) -> str:
    """Describe an invalid setting for a message: a number by its value, all else by its type, as it may be a secret."""
    if isinstance(value, bool | float):
        return repr(value)
    if type(value) is int:
        return str(value) if value.bit_length() <= 64 else f"a number of {value.bit_length()} bits"
    return type(value).__name__


def check_ttl(ttl_s: float | None) -> None:
    """Check a TTL in seconds. None means that values do not expire.

    Raises:
        ConfigError: the TTL is not a positive number, or exceeds 100 years.
    """
    if ttl_s is not None:
        check_number("a TTL (None for no expiry)", ttl_s, 0, MAX_TTL_S, "seconds")


def check_own_ttl(ttl_s: float | None, of_store: float | None) -> None:
    """Check the TTL of some values.

    Args:
        of_store: the TTL of their store.

    Raises:
        ConfigError: it is no TTL, or the store has none.
    """
    check_ttl(ttl_s)
    if ttl_s is not None and of_store is None:
        raise ConfigError(f"expected a store with a TTL of its own for values with one ({ttl_s} s), got one without")


def deliver(value: bytes, out: memoryview | None) -> bytes | memoryview | None:
    """Return a fetched value: as it is, or copied to the start of `out`; None if it does not fit `out`."""
    if out is None:
        return value
    if len(value) > out.nbytes:
        return None
    out.cast("B")[: len(value)] = value
    return out.cast("B")[: len(value)]
