"""Three tiers as one cache: the pages of a pool, blocks in host memory, records in a store.

    device   pages         shared by requests, not copied       `pages`
    host     blocks        copied into pages                    `host`
    store    records       fetched, checked, unpacked, copied   `kvlab.cache`

`TieredCache` is the host tier in front of a store, as one `KVCache`. The engine has the pages. It tells the cache
which blocks a request needs (`locate`), starts a `Fetch`, computes what the planner says, and saves what is new.

What is written when: with write "through", a new block goes to the store at once; with "back", when it leaves host
memory, or at `flush` and `close`; with "selective", when a second request needs it. A save with a TTL of its own is
never written back later, because its TTL counts from the save. Queue and pace of the writes
are those of the store (`kvlab.stores.WriteBehind`). A block that could not be written is no hit anywhere else.

What is kept where: inclusive tiers (the default) keep a copy in host memory of what is on the device. Exclusive
tiers do not: a block goes from host memory to the device when it is used, and back when its pages are needed. What a
pin holds stays in host memory all the same. TTLs are those of the store: host memory has none.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Final

import torch
from torch import Tensor

from kvlab.cache.base import CacheStats, KVCache
from kvlab.cache.distributed import DistributedKVCache
from kvlab.cache.explain import Explanation, explain
from kvlab.cache.pins import Kept, Pin
from kvlab.core.keys import Namespace
from kvlab.core.precisions import Array, Unholdable, layout
from kvlab.engine.fetch import Fetch, Outer
from kvlab.engine.host import HostBlocks
from kvlab.engine.planner import Planner
from kvlab.errors import ConfigError
from kvlab.stores import WriteBehind
from kvlab.stores.base import Health, check_clock, check_number
from kvlab.stores.faults import Reason
from kvlab.stores.fork import reset_in_children

WRITES: Final = ("through", "back", "selective")
MAX_SEEN: Final = 1 << 16
MAX_WAIT_S: Final = 3600.0
logger = logging.getLogger(__name__)


class TieredCache(KVCache):
    """Host memory in front of a store. Thread-safe, but for the planner: one engine at a time asks for plans.

    Args:
        store: the outer tier. Closing this cache closes it.
        host_bytes: memory for blocks; 0 for no host tier. New blocks then go to the store at once, unless selective,
            and blocks that come too late are lost.
        write: when new blocks go to the store: "through", "back" or "selective". A request needs a block if `locate`
            or `load` names it; by `match` and `save` alone nothing is ever needed twice.
        exclusive: host memory has no copies of what is on the device. Blocks that the store lacks stay nevertheless.
        wait_s: how long a request waits for what it fetches, from the begin of the fetch; then it computes the rest.
            0: it takes what is there when it is ready. None: as long as one call of the store may take.
        policy: the eviction policy of host memory, a name in `kvlab.core.policies.POLICIES`.
        planner: decides between fetching and computing; False fetches whatever there is.
        pinned: page-locked host memory, for a GPU.
        max_held: the share of host memory that pins may hold.
        window_bytes: records that are fetched together; while they are unpacked, the next are fetched.
        clock: returns seconds. Can be replaced in tests.

    Raises:
        ConfigError: a setting is invalid, or `store` was made without a model.
    """

    def __init__(
        self,
        store: DistributedKVCache,
        host_bytes: int = 256 << 20,
        *,
        write: str = "through",
        exclusive: bool = False,
        wait_s: float | None = None,
        policy: str = "lru",
        planner: bool = True,
        pinned: bool = False,
        max_held: float = 0.5,
        window_bytes: int = 4 << 20,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not isinstance(store, DistributedKVCache):
            raise ConfigError(f"expected a DistributedKVCache, got {type(store).__name__}")
        if write not in WRITES:
            raise ConfigError(f"expected write as one of {', '.join(WRITES)}, got {write!r}")
        if wait_s is not None and wait_s != 0:
            check_number("wait_s", wait_s, 0, MAX_WAIT_S, "seconds")
        check_number("window_bytes", window_bytes, 0, 1 << 40, "bytes", whole=True)
        check_clock(clock)
        parts = layout(store.precision, store.block_shape, plane_axis=1)
        self.store, self.host = store, HostBlocks(parts, host_bytes, policy, pinned, max_held, clock)
        self.write, self.exclusive, self.wait_s = write, exclusive, wait_s
        self.planner = Planner(store.block_tokens, chooses=planner)
        self._setting = (window_bytes, clock, pinned)
        self._stats = CacheStats()
        self.reset_after_fork()
        reset_in_children(self)

    def __repr__(self) -> str:
        kind = "exclusive" if self.exclusive else "inclusive"
        return f"TieredCache({self.host.capacity} blocks, {kind}, write-{self.write}, {self.store!r})"

    @property
    def namespace(self) -> Namespace:
        """The family of keys of all tiers."""
        return self.store.namespace

    @property
    def precision(self) -> str:
        """See `KVCache.precision`."""
        return self.store.precision

    @property
    def block_tokens(self) -> int:
        """See `KVCache.block_tokens`."""
        return self.store.block_tokens

    # --- the contract ---------------------------------------------------------------------------
    def match(self, tokens: Sequence[int]) -> int:
        """See `KVCache.match`. It takes one round trip if host memory lacks a block."""
        where = self._where(self.namespace.keys(tokens))
        return next((i for i, tier in enumerate(where) if not tier), len(where)) * self.block_tokens

    def load(self, tokens: Sequence[int], start: int, stop: int, out: Tensor) -> int:
        """See `KVCache.load`."""
        B = self.block_tokens
        self.store.check_load(tokens, start, stop, out)
        chain = self.namespace.keys(tokens[:stop])
        before, keys = chain[: start // B], chain[start // B :]
        self._note_use(keys)
        where = ["host" if key in self.host else "store" for key in keys]
        near = [key for key, tier in zip(keys, where, strict=True) if tier == "host"]
        if near or start:  # used but not fetched: they must not expire in the store before the later blocks
            self.store.present([*before, *near])
        with self.fetch(keys, where, [out[:, :, :, i * B : (i + 1) * B] for i in range(len(keys))]) as fetch:
            filled = fetch.finish(self.wait_s)
        hits = filled.index(False) if False in filled else len(keys)
        first = [fetch.reasons[hits] or Reason.LATE] if hits < len(keys) else []
        reasons = [""] * hits + first + [Reason.GAP] * (len(keys) - hits - 1)
        self._count(fetch, [i < hits for i in range(len(keys))], reasons, range(start // B, stop // B))
        return start + hits * B

    def save(self, tokens: Sequence[int], kv: Tensor, start: int = 0, ttl_s: float | None = None) -> int:
        """See `DistributedKVCache.save`. The return value also counts the blocks that are in host memory only."""
        self.store.check_save(tokens, kv, start, ttl_s)
        B, keys = self.block_tokens, self.namespace.keys(tokens)
        first = -(-max(start, 0) // B)
        stored = self.store.present(keys, ttl_s)
        write = "through" if self.write == "back" and ttl_s is not None else self.write
        written: dict[bytes, list[Array]] = {}
        spilled: list[tuple[bytes, list[Array]]] = []
        self.store.recent.saved(tokens)
        for i, key in enumerate(keys):
            offered, dirty = i >= first, write == "back" and not stored[i]
            to_host = offered and (dirty or not self.exclusive) and key not in self.host
            to_store = not stored[i] and self._is_written(key, offered and write == "through")
            if to_host or to_store:
                try:
                    parts = self.store.parts_of(kv[:, :, :, i * B : (i + 1) * B])
                except Unholdable:
                    self.store.recent.blocks(keys[i:], Reason.OVERFLOW)
                    with self._lock:
                        self._stats.drops[Reason.OVERFLOW] += len(keys) - i
                    stored = stored[:i]
                    break
                spilled += self.host.put(key, parts, dirty) if to_host else []
                written |= {key: parts} if to_store else {}
            elif offered and dirty:
                self.host.mark_dirty(key)  # the store has lost it
        safe = {key for key, there in zip(keys, stored, strict=False) if there or key in self.host}
        safe |= {key for key, _ in spilled} if self._outer.write_back(spilled) else set()
        safe |= written.keys() if self.store.write([*written], [*written.values()], ttl_s) == len(written) else set()
        with self._lock:
            self._stats.kept += sum(stored[first:])
        return len(safe & set(keys[first : len(stored)]))

    def pin(self, tokens: Sequence[int], lease_s: float) -> Pin:
        """See `DistributedKVCache.pin`. Keeps the leading blocks that a tier has, in each tier that has them."""
        keys = self.namespace.keys(tokens)

        def begin(lease_s: float, holder: str) -> Kept:
            kept, where = Kept(), self._where(keys)
            there = keys[: where.index("") if "" in where else len(where)]
            kept.note("host", self.host.hold(there, lease_s, holder), True)
            with self._lock:
                self._stats.pinned += Counter(held=kept.held.get("host", 0))
            self.store.hold(there, lease_s, holder, kept)
            return kept

        def end(holder: str) -> None:
            self.host.release(holder)
            self.store.store.release(holder)

        return Pin(len(keys), lease_s, self.store.max_lease_s, begin, end)

    def explain(
        self,
        tokens: Sequence[int],
        against: Sequence[int] | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> Explanation:
        """See `DistributedKVCache.explain`. What host memory has is "host"; pages of an engine are not looked at."""
        view = replace(self.store.view(), is_near=self.host.__contains__, refusal=self._refusal)
        return explain(view, tokens, against, decode)

    def stats(self) -> CacheStats:
        """See `KVCache.stats`. `stored` and the bytes are those of the store.

        Blocks that the device shares, and those that a plan computes though a tier has them, are not requested.
        """
        with self._lock:
            own = copy.deepcopy(self._stats)
        inner = self.store.stats()
        return CacheStats(**{name: getattr(inner, name) + getattr(own, name) for name in vars(inner)})

    def health(self) -> Health:
        """See `KVCache.health`. It is that of the store; host memory has no state in which it does not work."""
        return self.store.health()

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Write what only host memory has, if blocks are written back; return whether nothing is left to write.

        With write-through and the selective rule there is nothing to write back, whatever the store dropped; its drops
        are in `stats`.

        Args:
            timeout_s: how long to wait for a `WriteBehind` in front of the store, again and again until all is written.
        """
        give_up = time.monotonic() + timeout_s
        behind = self.store.store if isinstance(self.store.store, WriteBehind) else None
        while keys := self.host.dirty():
            batch = keys[: self._outer.window]  # small, because the queue of a `WriteBehind` has an end
            self._outer.write_back(self.host.copies(batch))
            if behind is not None:
                behind.flush(max(0.0, give_up - time.monotonic()))
            there = self.store.present(batch)
            self.host.clean([key for key, stored in zip(batch, there, strict=True) if stored])
            if not any(there) or time.monotonic() > give_up:
                return False
        return True

    def close(self) -> None:
        """See `KVCache.close`. First calls `flush`, once: what the store does not take then is lost."""
        self.flush()
        self.host.close()
        self.store.close()

    # --- for an engine with pages ---------------------------------------------------------------
    def locate(self, keys: Sequence[bytes], shared: int = 0) -> list[str]:
        """Return for each block of a request the tier that it can be had from. To be called once for a request.

        Args:
            keys: the full blocks of its prompt.
            shared: so many leading ones are on the device; they are not looked for.

        Returns:
            One word for each block: "device", "host", "store", or "" for none. It may be gone when it is fetched.
        """
        found = self.locating(keys, shared)()
        assert found is not None, "it waits"
        return found

    def locating(
        self, keys: Sequence[bytes], shared: int = 0, waits: bool = True, counts: bool = True
    ) -> Callable[[], list[str] | None]:
        """Begin `locate`; the result returns its answer once it is there, until then None.

        Args:
            waits: whether this thread may wait for the store; else another one asks it.
            counts: whether it is one request more that needs the blocks; not if it is tried a second time.
        """
        if counts:
            self._note_use(keys)
        self.host.use(keys[:shared])  # else they leave host memory first, and are nowhere when they leave the device
        while self._outer.measured:
            self.planner.fetched(*self._outer.measured.popleft())
        answers: SimpleQueue[list[str]] = SimpleQueue()

        def ask() -> None:
            found = [""] * (len(keys) - shared)
            try:
                found = self._where(keys[shared:])
            except Exception:  # somebody waits for an answer
                logger.exception("a look-up failed")
            answers.put(["device"] * shared + found)

        if waits or shared == len(keys):
            ask()
        else:
            try:
                self._outer.readers.submit(ask)
            except RuntimeError:  # there is no thread; it may run later all the same, and nobody takes that answer
                ask()
        return lambda: None if answers.empty() else answers.get()

    def fetch(self, keys: Sequence[bytes], where: Sequence[str], outs: Sequence[Tensor]) -> Fetch:
        """Begin to fetch blocks; see `Fetch`."""
        return Fetch(self._outer, keys, where, outs)

    def prefetch(self, keys: Sequence[bytes], where: Sequence[str]) -> None:
        """Fetch blocks only to measure how long that takes, and for host memory. Nobody waits for it."""
        Fetch(self._outer, keys, where, [torch.empty(self.store.block_shape) for _ in keys], alone=True)

    def count(self, fetch: Fetch, filled: Sequence[bool], numbers: Sequence[int]) -> None:
        """Count the blocks of a fetch as hits by source, and as misses with their reasons.

        Args:
            numbers: of the blocks, in their prompt.
        """
        self._count(fetch, filled, [reason or Reason.LATE for reason in fetch.reasons], numbers)

    def on_device(self, keys: Sequence[bytes]) -> None:
        """Note that the page pool has these blocks in its index now."""
        if self.exclusive:
            for key in keys:
                self.host.remove(key)

    def evicted(self, key: bytes, kv: Tensor) -> None:
        """Take a block [L, P, H, B, D] that leaves the device, if host memory has no copy by its own rule."""
        if self.exclusive and key not in self.host:
            with contextlib.suppress(Unholdable):
                self._outer.keep(key, self.store.parts_of(kv))

    # --- helpers --------------------------------------------------------------------------------
    def reset_after_fork(self) -> None:
        """See `Forkable`."""
        self._lock = threading.Lock()
        self._seen: dict[bytes, int] = {}  # how many requests needed a block; the one not needed for longest first
        window_bytes, clock, pinned = self._setting
        self._outer = Outer(
            self.host, self.store, self.host.capacity > 0 and not self.exclusive, window_bytes, clock, pinned
        )

    def _where(self, keys: Sequence[bytes]) -> list[str]:
        where = ["host" if key in self.host else "" for key in keys]
        others = [i for i, tier in enumerate(where) if not tier]
        if others:
            for i, stored in zip(others, self.store.present([keys[i] for i in others]), strict=True):
                where[i] = "store" if stored else ""
        return where

    def _refusal(self, key: bytes) -> str:
        """Return why a block was not written, or ""."""
        with self._lock:
            once = self.write == "selective" and self._seen.get(key) == 1
        return "was not admitted: write is selective, and only one request needed the block so far" if once else ""

    def _note_use(self, keys: Sequence[bytes]) -> None:
        with self._lock:
            for key in reversed(keys):  # a parent is forgotten after its successors
                self._count_use(key, self._seen.pop(key, 0) + 1)

    def _count_use(self, key: bytes, times: int) -> None:
        self._seen[key] = times
        while len(self._seen) > MAX_SEEN:
            del self._seen[next(iter(self._seen))]

    def _is_written(self, key: bytes, is_due: bool) -> bool:
        """Whether a block that the store lacks is written now. `is_due`: unless admission is selective."""
        if self.write == "selective":
            with self._lock:
                if key not in self._seen:
                    self._count_use(key, 1)
                return self._seen[key] > 1
        return is_due

    def _avoided_s(self, numbers: Iterable[int]) -> float:
        """Estimate the seconds of prefill for some blocks, ascending; 0 as long as nothing was computed."""
        B, seconds = self.block_tokens, 0.0
        for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
            blocks = [number for _, number in run]
            seconds += self.planner.compute_s(blocks[0] * B, (blocks[-1] + 1) * B)
        return 0.0 if math.isnan(seconds) else seconds

    def _count(self, fetch: Fetch, filled: Sequence[bool], reasons: Sequence[str], numbers: Sequence[int]) -> None:
        pairs = list(zip(fetch.where, filled, reasons, strict=True))
        avoided_s = self._avoided_s(itertools.compress(numbers, filled))
        with self._lock:
            self._stats.loads += bool(pairs)
            self._stats.load_s += fetch.load_s if pairs else 0.0
            self._stats.avoided_s += avoided_s
            self._stats.requested += len(pairs)
            self._stats.hits += sum(filled)
            self._stats.sources += Counter(tier for tier, hit, _ in pairs if hit)
            self._stats.misses += Counter(reason for _, hit, reason in pairs if not hit)
