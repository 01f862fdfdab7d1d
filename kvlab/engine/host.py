"""The host tier: blocks in the memory of this machine, ready to be copied into pages.

A block is kept as the parts of its precision (`core.precisions`), which is what its record has inside, without
seal and compression. So a block is the same whether it comes from here or from the store, int8 blocks take a
quarter of fp32, and the device converts the numbers.

All blocks are rows of one allocation, which is pinned if the device is a GPU. An eviction policy of `core.policies`
chooses which block leaves. It never leaves while it is borrowed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvlab.core import codecs
from kvlab.core.policies import POLICIES, Policy
from kvlab.core.precisions import Array, Layout, layout_bytes
from kvlab.errors import ConfigError
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

    Attributes:
        capacity: the number of blocks that fit.

    Raises:
        ConfigError: `max_bytes` is negative, holds no block, or is more than the machine gives; there is no GPU for
            `pinned`; or the policy is unknown.
    """

    def __init__(self, parts: Layout, max_bytes: int, policy: str = "lru", pinned: bool = False) -> None:
        size = -(-layout_bytes(parts) // ALIGNMENT) * ALIGNMENT
        if type(max_bytes) is not int or not (max_bytes == 0 or size <= max_bytes < MOST):
            raise ConfigError(f"expected host_bytes as 0 or {size:,} (one block) … {MOST:,}, got {max_bytes!r}")
        if policy not in POLICIES:
            raise ConfigError(f"expected one of the policies {', '.join(POLICIES)}, got {policy!r}")
        self.capacity = max_bytes // size
        if pinned and not torch.cuda.is_available():
            raise ConfigError("expected pinned=True only on a machine with an NVIDIA GPU")
        try:
            memory = torch.empty((self.capacity, size), dtype=torch.uint8, pin_memory=pinned and self.capacity > 0)
        except RuntimeError as error:
            raise ConfigError(f"expected host_bytes that this machine has, got {max_bytes:,}: {error}") from None
        self._parts, self._rows, self._policy_name = parts, memory.numpy(), policy
        self._closed = False
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
        """Forget a block. One that is borrowed or dirty stays."""
        with self._lock, self._repaired():
            if key in self._row_of and key not in self._dirty and not self._borrowed[key]:
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

    def reset_after_fork(self) -> None:
        """See `Forkable`. The child starts with no blocks: its parent's threads may have been writing one."""
        self._lock = threading.Lock()
        self._row_of: dict[bytes, int] = {}
        self._dirty: dict[bytes, None] = {}
        self._borrowed: Counter[bytes] = Counter()
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
            for key, times in self._borrowed.items():
                for _ in range(times):
                    self._policy.pin(key)
            raise

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
