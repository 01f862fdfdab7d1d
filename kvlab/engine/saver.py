"""Saves beside the computation: another thread puts blocks into the cache, and holds their pages until then."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from kvlab.cache import DistributedKVCache, KVCache
from kvlab.engine.pages import BlockTable, PagePool
from kvlab.engine.tiers import TieredCache
from kvlab.errors import ConfigError
from kvlab.stores.base import check_own_ttl
from kvlab.stores.latch import Latch
from kvlab.stores.workers import Workers

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Save:
    """Leading blocks of a request. `table` keeps their pages; whoever acquires `claim` may begin or revoke it."""

    table: BlockTable
    ttl_s: float | None
    claim: threading.Lock = field(default_factory=threading.Lock)
    done: Latch = field(default_factory=Latch)


class Saver:
    """Saves blocks in the order in which they come. All methods are called by the engine's thread.

    Args:
        most: saves that are under way or wait. Of more, the blocks are not saved.
        counts: takes note of "saves", of "saves dropped", and of "saves failed".
    """

    def __init__(self, pool: PagePool, cache: TieredCache, most: int, counts: Counter[str]) -> None:
        self._pool, self._cache, self._most, self._counts = pool, cache, most, counts
        self._saves: list[_Save] = []
        self._thread = Workers(1, "kvlab-save")

    def begin(self, table: BlockTable, tokens: Sequence[int], first: int, ttl_s: float | None = None) -> None:
        """Save the blocks of `table.keys` from number `first` on.

        Args:
            tokens: of the request, from its first token on.
            ttl_s: see `DistributedKVCache.save`.
        """
        self._counts["saves"] += 1
        if len(self._saves) >= self._most:
            self._counts["saves dropped"] += 1
            return
        B = self._cache.block_tokens
        save = _Save(self._pool.fork(table, blocks=len(table.keys)), ttl_s)
        self._saves.append(save)
        try:
            self._thread.submit(partial(self._run, save, tokens[: len(table.keys) * B], first * B))
        except RuntimeError:  # there is no thread; it may run later all the same
            self.revoke()

    @torch.inference_mode()
    def _run(self, save: _Save, tokens: Sequence[int], start: int) -> None:
        if not save.claim.acquire(blocking=False):
            return
        try:
            self._cache.save(tokens, save.table.read(len(tokens)), start, save.ttl_s)
        except Exception:
            logger.exception("a save failed")
            self._counts["saves failed"] += 1
        finally:
            save.done.set()

    def collect(self) -> None:
        """Give back the pages of saves that are done."""
        self._end([save for save in self._saves if save.done.is_set])

    def revoke(self) -> int:
        """Give up the saves that have not begun, because others need their pages; return how many."""
        revoked = [save for save in self._saves if save.claim.acquire(blocking=False)]
        self._counts["saves dropped"] += len(revoked)
        self._end(revoked)
        return len(revoked)

    def close(self) -> None:
        """Wait for all saves. They end by the deadlines of the store."""
        for save in self._saves:
            save.done.wait()
        self.collect()

    def _end(self, saves: Sequence[_Save]) -> None:
        for save in saves:
            self._pool.close(save.table)
            self._saves.remove(save)


def check_retention(cache: KVCache | None, ttl_s: float | None) -> None:
    """Check the TTL of a request before anything is computed for it.

    Raises:
        ConfigError: it is no TTL, or there is no cache or store that could keep it.
    """
    if ttl_s is None:
        return
    own = cache.store if isinstance(cache, TieredCache) else cache
    if not isinstance(own, DistributedKVCache):
        raise ConfigError(f"expected a DistributedKVCache or tiers with ttl_s={ttl_s}, got {type(cache).__name__}")
    check_own_ttl(ttl_s, own.store.ttl_s)
