"""The store contract: bytes by key, in batches, and never an exception for a fault.

A store is the outermost tier and the least reliable one: a server on the other end of a
wire. So its contract is about failure. A fault of the store (down, slow, full, answering
nonsense) turns a read into a miss and a write into a drop, each counted under one reason,
and for every store, always:

    requested == hits + sum(misses by reason)
    offered   == stored + sum(drops by reason)

What a store does not do: it does not look inside values, decide what to evict, or promise
that what was stored is still there. `probe` is advice for the planner; only `get_many` tells
the truth. Deciding whether bytes are a good record is `kvlab.core.record`'s work.

One suite, `tests/contracts/test_store.py`, holds every implementation to this text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from kvlab.errors import ConfigError, InputError

Value = bytes | memoryview | tuple[bytes | memoryview, ...]
"""What is put: bytes, or pieces whose concatenation is the value (a header and a payload, say)."""

MAX_TTL_S = 100 * 365 * 86400  # what any server takes
MAX_VALUE_BYTES = 64 << 20  # no store takes a larger value
_BYTES = frozenset((bytes, memoryview, bytearray))


@dataclass
class StoreStats:
    """Counters since the store was made. `misses`, `drops` and `faults` are by reason.

    Misses and drops count values. Faults count round trips that failed, those of `probe`,
    `touch_many` and `delete_many` included, which are no requests: when a store is down, an
    engine that probes first never gets as far as a miss. Redirects count keys that a server
    of a cluster said another has; a few while slots move. Reasons are those of `faults.Reason`.
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
        """Assert both sum rules."""
        assert self.requested == self.hits + sum(self.misses.values()), self
        assert self.offered == self.stored + sum(self.drops.values()), self


@dataclass(frozen=True)
class Health:
    """Whether a store answers, and one line that says what it is or what is wrong."""

    ok: bool
    detail: str


class Store(ABC):
    """Base of all stores. Safe to use from several threads."""

    @abstractmethod
    def get_many(
        self, keys: Sequence[bytes], out: Sequence[memoryview] | None = None, reasons: list[str] | None = None
    ) -> list[bytes | memoryview | None]:
        """Fetch values, in the order of `keys`; None for a miss.

        Args:
            out: one writable buffer a key. A value is written to the start of its buffer and
                that part is returned; a value that does not fit is a miss ("too_big"). The
                caller owns the buffers, and no later call touches them. Without it, each
                value is a `bytes` of its own.
            reasons: a list to which one word a key is added: the `Reason` that a miss was counted
                under, "" for a hit.
        """

    @abstractmethod
    def put_many(self, keys: Sequence[bytes], values: Sequence[Value]) -> int:
        """Store values, replacing what is there; return how many were taken. Values may be reused after the call."""

    @abstractmethod
    def probe(self, keys: Sequence[bytes]) -> int:
        """Length of the longest prefix of `keys` that is present now, in one round trip. Counts as no request."""

    @abstractmethod
    def touch_many(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys are there, in one round trip; those that are live as long again as if just written.

        For blocks that are used without being fetched: a chain's root must not expire before its
        leaves. Advice like `probe`, and like it no request.
        """

    @abstractmethod
    def delete_many(self, keys: Sequence[bytes]) -> int:
        """Remove keys; return how many were there."""

    @abstractmethod
    def health(self) -> Health:
        """Ask the store whether it works. Costs at most one deadline, two if nobody tells which servers there are."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """A copy of the counters."""

    @abstractmethod
    def close(self) -> None:
        """Let go of connections. Calls after this are misses and drops ("closed"). Closing twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def pieces(value: Value) -> tuple[bytes | memoryview, ...]:
    """A value as a tuple of pieces."""
    return value if isinstance(value, tuple) else (value,)


def joined(value: Value) -> bytes:
    """A value as one `bytes`."""
    return value if isinstance(value, bytes) else b"".join(pieces(value))


def check_keys(keys: Sequence[bytes]) -> None:
    """Check that a batch is a sequence of keys: a generator would be used up by the first look at it.

    Raises:
        InputError: it is not.
    """
    if not isinstance(keys, Sequence):
        raise InputError(f"expected keys as a list of bytes, got {type(keys).__name__}")
    for key in keys:
        if type(key) is not bytes:
            raise InputError(f"expected keys as bytes, got {type(key).__name__}")


def check_pairs(keys: Sequence[bytes], others: Sequence[object], what: str) -> None:
    """Check a batch of keys, and that another batch has as many members.

    Raises:
        InputError: it is no such batch.
    """
    check_keys(keys)
    if not isinstance(others, Sequence):
        raise InputError(f"expected a list with one {what} a key, got {type(others).__name__}")
    if len(keys) != len(others):
        raise InputError(f"expected one {what} a key, got {len(keys)} keys and {len(others)}")


def check_values(keys: Sequence[bytes], values: Sequence[Value]) -> None:
    """Check a batch of keys, and that there is one value a key, in bytes.

    Raises:
        InputError: it is no such batch.
    """
    check_pairs(keys, values, "value")
    for value in values:
        for part in pieces(value):
            if type(part) not in _BYTES or (type(part) is memoryview and not part.c_contiguous):
                raise InputError(f"expected values as bytes, contiguous ones, got {type(part).__name__}")


def check_buffers(keys: Sequence[bytes], out: Sequence[memoryview] | None) -> None:
    """Check a batch of keys, and that there is one writable buffer a key, or none at all.

    Raises:
        InputError: it is no such batch.
    """
    if out is None:
        return check_keys(keys)
    check_pairs(keys, out, "buffer")
    for buffer in out:
        if type(buffer) is not memoryview or buffer.readonly or not buffer.c_contiguous:
            raise InputError(f"expected buffers as memoryviews, writable and contiguous, got {type(buffer).__name__}")


def check_number(name: str, value: object, above: float, most: float, unit: str = "", whole: bool = False) -> None:
    """Check a setting: a number above `above` and at most `most`. True and False are no numbers.

    Raises:
        ConfigError: it is not.
    """
    kinds = int if whole else int | float
    if isinstance(value, kinds) and not isinstance(value, bool) and above < value <= most:
        return
    what = "a whole number" if whole else "a number"
    most_in_words = f"{most:g}{unit and f' {unit}'}"
    raise ConfigError(f"expected {name} as {what} above {above} and at most {most_in_words}, got {told(value)}")


def check_clock(clock: object) -> None:
    """Check a clock.

    Raises:
        ConfigError: nobody can ask it for the time.
    """
    if not callable(clock):
        raise ConfigError(f"expected clock as a function that returns seconds, got {type(clock).__name__}")


def told(value: object) -> str:
    """A wrong setting as a message names it: a number as it is, anything else by its type. It may be a secret."""
    if isinstance(value, bool | float):
        return repr(value)
    if type(value) is int:
        return str(value) if value.bit_length() <= 64 else f"a number of {value.bit_length()} bits"
    return type(value).__name__


def check_ttl(ttl_s: float | None) -> None:
    """Check a lifetime in seconds; None is "keep until evicted".

    Raises:
        ConfigError: not a positive number, or more than a hundred years.
    """
    if ttl_s is not None:
        check_number("a TTL (None keeps until evicted)", ttl_s, 0, MAX_TTL_S, "seconds")


def place(value: bytes, out: memoryview | None) -> bytes | memoryview | None:
    """Hand a fetched value over: as it is, or copied to the start of `out`; None where it does not fit."""
    if out is None:
        return value
    if len(value) > out.nbytes:
        return None
    out.cast("B")[: len(value)] = value
    return out.cast("B")[: len(value)]
