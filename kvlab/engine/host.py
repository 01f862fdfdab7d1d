"""The host tier: blocks in the memory of this machine, ready to be copied into pages.

A block is kept as the parts of its precision (`core.precisions`), which is what its record has inside, without
seal and compression. So a block is the same whether it comes from here or from the store, int8 blocks take a
quarter of fp32, and the device converts the numbers.

All blocks are rows of one allocation, which is pinned if the device is a GPU. An eviction policy of `core.policies`
chooses which block leaves. It never leaves while it is borrowed, or while a lease holds it (`kvlab.cache.pins`).
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvlab.core import codecs
from kvlab.core.policies import POLICIES, Policy
from kvlab.core.precisions import Array, Layout, layout_bytes
from kvlab.errors import ConfigError
from kvlab.stores.base import check_clock, check_number
from kvlab.stores.fork import reset_in_children

ALIGNMENT = 64
MOST = 1 << 62


class HostBlocks:
    """Blocks by key, at most `max_bytes`. Thread-safe.

    Args:
        parts: the layout of a block.
        max_bytes: 0 for no host tier.
        policy: the eviction policy, a name in `kvlab.core.policies.POLICIES`.
        pinned: page-locked memory, which a GPU reads without the CPU.
        max_held: the share of the blocks that all leases together may hold.
        clock: returns seconds. Can be replaced in tests.

    Attributes:
        capacity: the number of blocks that fit.

    Raises:
        ConfigError: `max_bytes` is negative, holds no block, or is more than the machine gives; there is no GPU for
            `pinned`; the policy is unknown; or `max_held` is not above 0 and at most 1.
    """

    def __init__(
        self,
        parts: Layout,
        max_bytes: int,
        policy: str = "lru",
        pinned: bool = False,
        max_held: float = 0.5,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        size = -(-layout_bytes(parts) // ALIGNMENT) * ALIGNMENT
        if type(max_bytes) is not int or not (max_bytes == 0 or size <= max_bytes < MOST):
            raise ConfigError(f"expected host_bytes as 0 or {size:,} (one block) … {MOST:,}, got {max_bytes!r}")
        if policy not in POLICIES:
            raise ConfigError(f"expected one of the policies {', '.join(POLICIES)}, got {policy!r}")
        check_number("max_held", max_held, 0, 1, "of the room")
        check_clock(clock)
        self.capacity = max_bytes // size
        self._most_held, self._clock = int(max_held * self.capacity), clock
        if pinned and not torch.cuda.is_available():
            raise ConfigError("expected pinned=True only on a machine with an NVIDIA GPU")
        try:
            memory = torch.empty((self.capacity, size), dtype=torch.uint8, pin_memory=pinned and self.capacity > 0)
        except RuntimeError as error:
            raise ConfigError(f"expected host_bytes that this machine has, got {max_bytes:,}: {error}") from None
        self._parts, self._rows, self._policy_name = parts, memory.numpy(), policy
        self._closed = False
        self._first_end: float
        self.reset_after_fork()
        reset_in_children(self)

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, key: bytes) -> bool:
        return key in self._row_of

    def keys(self) -> list[bytes]:
        """Return the keys of all blocks."""
        with self._lock:
            return [*self._row_of]

    def use(self, keys: Iterable[bytes]) -> None:
        """Note for the eviction policy that these blocks were needed, though another tier delivered them."""
        with self._lock, self._repaired():
            for key in keys:
                if key in self._row_of:
                    self._policy.hit(key)

    def borrow(self, key: bytes) -> list[Array] | None:
        """Return the parts of a block, which stay as they are until `give_back`; None if it is not here."""
        with self._lock, self._repaired():
            row = self._row_of.get(key)
            if row is None:
                return None
            self._policy.hit(key)
            self._policy.pin(key)
            self._borrowed[key] += 1
            return self._view(row)

    def give_back(self, keys: Iterable[bytes]) -> None:
        """End a `borrow` of each of these blocks."""
        with self._lock, self._repaired():
            for key in keys:
                self._borrowed[key] -= 1
                self._policy.unpin(key)

    def hold(self, keys: Iterable[bytes], lease_s: float, holder: str) -> int:
        """Keep those of these blocks that are here, from the first on, until the lease ends; return how many.

        All leases together hold at most `max_held` of the blocks. An earlier lease of `holder` ends.
        """
        with self._lock, self._repaired():
            self._end_leases(holder)
            held: list[bytes] = []
            for key in dict.fromkeys(keys):
                if key not in self._row_of:
                    continue
                if key not in self._held and len(self._held) >= self._most_held:
                    break
                self._policy.pin(key)
                self._held[key] += 1
                held.append(key)
            if held:
                self._leases[holder] = self._clock() + lease_s, held
                self._first_end = min(self._first_end, self._leases[holder][0])
            return len(held)

    def release(self, holder: str) -> None:
        """End the lease of a holder, if there is one."""
        with self._lock, self._repaired():
            self._end_leases(holder)

    @property
    def held(self) -> int:
        """The number of blocks that leases hold."""
        with self._lock, self._repaired():
            self._end_leases()
            return len(self._held)

    def put(self, key: bytes, parts: Sequence[Array], dirty: bool = False) -> list[tuple[bytes, list[Array]]]:
        """Copy a block in. One that is here already stays as it is; one for which there is no room is left out.

        Args:
            dirty: no other tier may have the block.

        Returns:
            The dirty blocks that were evicted for it: copies, which the caller hands on.
        """
        with self._lock, self._repaired():
            if key in self._row_of:
                self._dirty |= {key: None} if dirty else {}
                return []
            self._end_leases()
            evicted = [key] if self._closed else self._policy.admit(key)
            if evicted == [key]:
                return [(key, list(parts))] if dirty else []
            spilled = [self._drop(other) for other in evicted]
            row = self._free.pop()
            for place, part in zip(self._view(row), parts, strict=True):
                place[...] = part
            self._row_of[key] = row  # only now: a block that was copied halfway is never found
            if dirty:
                self._dirty[key] = None
            return [block for block in spilled if block is not None]

    def remove(self, key: bytes) -> None:
        """Forget a block. One that is borrowed, dirty or held stays."""
        with self._lock, self._repaired():
            self._end_leases()
            is_needed = key in self._dirty or key in self._held or self._borrowed[key]
            if key in self._row_of and not is_needed:
                self._policy.remove(key)
                self._free.append(self._row_of.pop(key))

    def mark_dirty(self, key: bytes) -> None:
        """Note that no other tier may have a block, if it is here."""
        with self._lock:
            self._dirty |= {key: None} if key in self._row_of else {}

    def dirty(self) -> list[bytes]:
        """Return the keys of all dirty blocks, oldest first."""
        with self._lock:
            return [*self._dirty]

    def copies(self, keys: Iterable[bytes]) -> list[tuple[bytes, list[Array]]]:
        """Return copies of those of these blocks that are here."""
        with self._lock:
            return [(key, self._copy(self._row_of[key])) for key in keys if key in self._row_of]

    def clean(self, keys: Iterable[bytes]) -> None:
        """Note that another tier has these blocks."""
        with self._lock:
            for key in keys:
                self._dirty.pop(key, None)

    def close(self) -> None:
        """Forget all blocks, and take no more. Borrowed ones stay until they are given back."""
        with self._lock, self._repaired():
            self._closed = True
            self._dirty.clear()
            self._end_leases(*self._leases)
            for key in [key for key in self._row_of if not self._borrowed[key]]:
                self._policy.remove(key)
                self._free.append(self._row_of.pop(key))

    def check_integrity(self) -> None:
        """Assert that every row is free or has one block, and that the policy knows these blocks."""
        with self._lock:
            rows = sorted([*self._free, *self._row_of.values()])
            assert rows == list(range(self.capacity)), "a row is lost or used twice"
            assert len(self._policy) == len(self._row_of), "the policy has another block"
            assert all(key in self._policy for key in self._row_of), "a block that the policy does not know"
            assert self._dirty.keys() <= self._row_of.keys(), "a dirty block that is not here"
            held = Counter(key for _, keys in self._leases.values() for key in keys)
            assert held == self._held and held.keys() <= self._row_of.keys(), "a held block that is not here"
            assert len(held) <= self._most_held, "more blocks are held than allowed"

    def reset_after_fork(self) -> None:
        """See `Forkable`. The child starts with no blocks: its parent's threads may have been writing one."""
        self._lock = threading.Lock()
        self._row_of: dict[bytes, int] = {}
        self._dirty: dict[bytes, None] = {}
        self._borrowed: Counter[bytes] = Counter()
        self._held: Counter[bytes] = Counter()  # by how many leases
        self._leases: dict[str, tuple[float, list[bytes]]] = {}  # by holder: when it ends, and what it holds
        self._first_end = math.inf  # no lease ends before
        self._free = list(range(self.capacity))
        self._policy: Policy[Any] = POLICIES[self._policy_name](self.capacity)

    @contextmanager
    def _repaired(self) -> Iterator[None]:
        """Whatever raises in the block (Ctrl-C may, anywhere), the account is right afterwards."""
        try:
            yield
        except BaseException:
            self._borrowed += Counter()  # without what is 0
            self._dirty = {key: None for key in self._dirty if key in self._row_of}
            self._free = sorted(set(range(self.capacity)) - set(self._row_of.values()))
            self._policy = POLICIES[self._policy_name](self.capacity)
            for key in self._row_of:
                self._policy.admit(key)
            self._held = Counter(key for _, keys in self._leases.values() for key in keys)
            self._first_end = -math.inf  # it is looked for anew
            for key, times in (self._borrowed + self._held).items():
                for _ in range(times):
                    self._policy.pin(key)
            raise

    def _end_leases(self, *holders: str) -> None:
        """End the leases of these holders, and all whose time is over."""
        now = self._clock()
        if now < self._first_end and not holders:
            return
        for holder, (expires_at, keys) in [*self._leases.items()]:
            if holder in holders or expires_at <= now:
                for key in keys:
                    self._policy.unpin(key)
                self._held -= Counter(keys)
                del self._leases[holder]
        self._first_end = min((expires_at for expires_at, _ in self._leases.values()), default=math.inf)

    def _view(self, row: int) -> list[Array]:
        whole = self._rows[row, : layout_bytes(self._parts)]
        return codecs.unpack(whole.data, codecs.CODECS["raw"], self._parts)

    def _copy(self, row: int) -> list[Array]:
        return [part.copy() for part in self._view(row)]

    def _drop(self, key: bytes) -> tuple[bytes, list[Array]] | None:
        """Forget a block that the policy has evicted; return a copy if it is dirty."""
        row = self._row_of.pop(key)
        self._free.append(row)
        if key not in self._dirty:
            return None
        del self._dirty[key]
        return key, self._copy(row)
