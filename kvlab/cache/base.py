"""The KV cache contract: tokens in, keys and values out.

An engine asks three things of a cache: how long a prefix of these tokens do you have
(`match`), give it to me (`load`), take this (`save`). Everything behind that (blocks, keys,
records, tiers, servers) is the cache's own affair.

What a cache promises: what comes back is exactly what was saved for these tokens, joined on
without a gap, or it is nothing. What it does not promise: that anything comes back. No call
raises for a fault of the store; wrong arguments do raise. `match` is advice, `load` is the
truth. One suite, `tests/contracts/test_cache.py`, holds every cache to this.
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
    """Counters since the cache was made, in FULL blocks (text calls count one layer as a block).

    A block is requested when `load` or `get_cached_kv` asks for it. Blocks after a gap are
    not usable even if they are stored: they count as misses with the reason "gap".
    Of the blocks that `save` was offered, the store took `stored` (a `WriteBehind` takes what it
    queues) and `kept` were there already: together they are `saved`. `bytes_written` counts all
    records that were offered. Reasons are those of `kvlab.stores.faults.Reason`.
    """

    requested: int = 0
    hits: int = 0
    misses: Counter[str] = field(default_factory=Counter)
    stored: int = 0
    kept: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0
    bytes_written: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits / requested, over full blocks; 0 before the first request."""
        return self.hits / self.requested if self.requested else 0.0

    @property
    def saved(self) -> int:
        """Blocks that `save` was offered and that the cache had afterwards."""
        return self.stored + self.kept

    def check(self) -> None:
        """Assert that every requested block is a hit or a miss with a reason."""
        assert self.requested == self.hits + sum(self.misses.values()), self


class KVCache(ABC):
    """Base of all caches. A context manager: leaving it closes the cache."""

    @property
    @abstractmethod
    def block_tokens(self) -> int:
        """B: a prefix is cached in whole blocks of so many tokens."""

    @abstractmethod
    def match(self, tokens: Sequence[int]) -> int:
        """How many leading tokens are cached, a multiple of `block_tokens`. Advice: they may be gone when loaded."""

    @abstractmethod
    def load(self, tokens: Sequence[int], start: int, stop: int, out: Tensor) -> int:
        """Fill `out` with the KV of tokens[start:stop].

        Args:
            tokens: the request from its first token on: KV depends on everything before it.
            start, stop: positions, multiples of `block_tokens`.
            out: [L, P, H, stop - start, D], any strides.

        Returns:
            The position up to which the KV is there: `start` (nothing) to `stop` (all),
            a multiple of `block_tokens`. Beyond it `out` may hold anything.

        Raises:
            InputError: positions or `out` do not fit.
        """

    @abstractmethod
    def save(self, tokens: Sequence[int], kv: Tensor, start: int = 0) -> int:
        """Offer the KV of `tokens`; return how many blocks are saved: just stored, or there already.

        Args:
            tokens: the request from its first token on.
            kv: [L, P, H, len(tokens), D], valid at every position.
            start: position before which nothing needs saving. A partial last block is left out.

        Raises:
            InputError: `kv` has another shape.
        """

    @abstractmethod
    def stats(self) -> CacheStats:
        """A copy of the counters."""

    @abstractmethod
    def health(self) -> Health:
        """Whether the cache can work, and one line that says why not."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything. Calls after this are misses and drops. Closing twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
