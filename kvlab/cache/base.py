"""The contract of a KV cache, which maps tokens to keys and values.

An engine makes three calls. `match` returns the length of the cached prefix, `load` reads its KV,
and `save` offers new KV. Blocks, cache keys, records and servers are internal to the cache.

`load` returns the KV that was saved for these tokens, rounded to the precision of the cache. This
KV has no gaps, and it may be empty: a cache may lose any block at any time. The result of `match`
is therefore only an estimate. Wrong arguments raise an error; a fault of the store never does. The
tests in `tests/contracts/test_cache.py` check every cache against this contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from torch import Tensor

from kvlab.stores.base import Health


@dataclass
class CacheStats:
    """Counters since the cache was created, in full blocks. A text call counts as one block.

    `load` and `get_cached_kv` request blocks. The blocks after a missing block are unusable even if
    they are stored, so they count as misses with the reason "gap". `stored` counts the blocks that
    the store accepted; a `WriteBehind` accepts a block when it queues it. `kept` counts the blocks
    offered to `save` that were already stored. `bytes_written` counts all records offered to the
    store. `pinned` counts the blocks that pins kept, by how: "held" or "refreshed", once for each tier and
    each renewal. `kvlab.stores.faults.Reason` defines the reasons. `sources` counts the hits by tier.

    `loads` counts loads of at least one block, and `load_s` the seconds that they took. `avoided_s` estimates the
    seconds of prefill that the loaded blocks made unnecessary; a cache that does not know what prefill costs has 0.
    """

    requested: int = 0
    hits: int = 0
    misses: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    stored: int = 0
    kept: int = 0
    pinned: Counter[str] = field(default_factory=Counter)
    drops: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0
    bytes_written: int = 0
    loads: int = 0
    load_s: float = 0.0
    avoided_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Hits / requested blocks; 0 before the first request."""
        return self.hits / self.requested if self.requested else 0.0

    @property
    def saved(self) -> int:
        """Blocks that were offered and afterwards were in the cache: `stored` + `kept`."""
        return self.stored + self.kept

    def check(self) -> None:
        """Assert that every requested block is a hit, from a tier if these are counted, or a miss with a reason."""
        assert not self.sources or self.hits == sum(self.sources.values()), self
        assert self.requested == self.hits + sum(self.misses.values()), self


class KVCache(ABC):
    """Base class of all caches. It is a context manager that closes the cache on exit."""

    @property
    def precision(self) -> str:
        """The precision of what `load` returns, a name in `kvlab.core.keys.PRECISION_BYTES`."""
        return "fp32"

    @property
    @abstractmethod
    def block_tokens(self) -> int:
        """B, the number of tokens per block. Prefixes are cached in whole blocks."""

    @abstractmethod
    def match(self, tokens: Sequence[int]) -> int:
        """Return the number of cached leading tokens, a multiple of `block_tokens`. They may be lost before `load`."""

    @abstractmethod
    def load(self, tokens: Sequence[int], start: int, stop: int, out: Tensor) -> int:
        """Fill `out` with the KV of tokens[start:stop].

        Args:
            tokens: the request from its first token on, because KV depends on all earlier tokens.
            start, stop: positions, multiples of `block_tokens`.
            out: [L, P, H, stop - start, D], with any strides.

        Returns:
            The position before which `out` is filled, from `start` (no KV) to `stop` (all KV). It
            is a multiple of `block_tokens`. The contents of `out` from there on are undefined.

        Raises:
            InputError: the positions or `out` do not fit.
        """

    @abstractmethod
    def save(self, tokens: Sequence[int], kv: Tensor, start: int = 0) -> int:
        """Offer the KV of `tokens`. Return the number of blocks that are now stored or already were.

        Args:
            tokens: the request from its first token on.
            kv: [L, P, H, len(tokens), D], valid at every position.
            start: blocks that begin before this position are not offered. A partial last block is
                not offered either.

        Raises:
            InputError: `kv` has another shape.
        """

    @abstractmethod
    def stats(self) -> CacheStats:
        """Return a copy of the counters."""

    @abstractmethod
    def health(self) -> Health:
        """Return whether the cache works, and one line about its state or the problem."""

    @abstractmethod
    def close(self) -> None:
        """Release all resources. Later calls are misses and drops. Further calls of `close` have no effect."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
