"""The host tier: blocks in the memory of this machine, ready to be copied into pages.

A block is kept as the parts of its precision (`core.precisions`), which is what its record has inside, without
seal and compression. So a block is the same whether it comes from here or from the store, int8 blocks take a
quarter of fp32, and the device converts the numbers.

All blocks are rows of one allocation, which is pinned if the device is a GPU. An eviction policy of `core.policies`
chooses which block leaves. It never leaves while it is borrowed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from kvlab.core import codecs
from kvlab.core.policies import POLICIES, Policy
from kvlab.core.precisions import Array, Layout, layout_bytes
from kvlab.errors import ConfigError, InputError
from kvlab.stores.fork import reset_in_children

ALIGNMENT = 64


class HostBlocks:
    """Blocks by key, at most `max_bytes`. Thread-safe.

    Args:
        parts: the layout of a block.
        max_bytes: 0 for no host tier; else the memory that is taken at once.
        policy: the eviction policy, a name in `kvlab.core.policies.POLICIES`.
        pinned: page-locked memory, which a GPU reads without the CPU.

    Attributes:
        capacity: the number of blocks that fit.

    Raises:
        ConfigError: `max_bytes` is negative, holds no block, or is more than the machine gives; or the policy is
            unknown.
    """

    def __init__(self, parts: Layout, max_bytes: int, policy: str = "lru", pinned: bool = False) -> None:
        size = -(-layout_bytes(parts) // ALIGNMENT) * ALIGNMENT
        if type(max_bytes) is not int or max_bytes < 0 or 0 < max_bytes < size:
            raise ConfigError(f"expected host_bytes as 0 or at least {size:,}, one block, got {max_bytes!r}")
        if policy not in POLICIES:
            raise ConfigError(f"expected one of the policies {', '.join(POLICIES)}, got {policy!r}")
        self.capacity = max_bytes // size
        try:
            memory = torch.empty((self.capacity, size), dtype=torch.uint8, pin_memory=pinned and self.capacity > 0)
        except RuntimeError as error:
            raise ConfigError(f"expected host_bytes that this machine has, got {max_bytes:,}: {error}") from None
        self._parts, self._rows, self._policy_name = parts, memory.numpy(), policy
        self.reset_after_fork()
        reset_in_children(self)

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, key: bytes) -> bool:
        return key in self._row_of

    def use(self, keys: Iterable[bytes]) -> None:
        """Note for the eviction policy that these blocks were needed, though another tier delivered them."""
        with self._lock:
            for key in keys:
                if key in self._row_of:
                    self._policy.hit(key)

    def borrow(self, key: bytes) -> list[Array] | None:
        """Return the parts of a block, which stay as they are until `give_back`; None if it is not here."""
        with self._lock:
            row = self._row_of.get(key)
            if row is None:
                return None
            self._policy.hit(key)
            self._policy.pin(key)
            return self._view(row)

    def give_back(self, keys: Iterable[bytes]) -> None:
        """End a `borrow` of each of these blocks."""
        with self._lock:
            for key in keys:
                self._policy.unpin(key)

    def put(self, key: bytes, parts: Sequence[Array], dirty: bool = False) -> list[tuple[bytes, list[Array]]]:
        """Copy a block in. One that is here already stays as it is; one for which there is no room is left out.

        Args:
            dirty: no other tier may have the block.

        Returns:
            The dirty blocks that were evicted for it: copies, which the caller hands on.
        """
        with self._lock:
            if key in self._row_of:
                if dirty:
                    self._dirty[key] = None
                return []
            evicted = self._policy.admit(key)
            if evicted == [key]:
                return [(key, list(parts))] if dirty else []
            spilled = [self._drop(other) for other in evicted]
            row = self._free.pop()
            try:
                for place, part in zip(self._view(row), parts, strict=True):
                    place[...] = part
            except BaseException:
                self._policy.remove(key)
                self._free.append(row)
                raise
            self._row_of[key] = row  # only now: a block that was copied halfway is never found
            if dirty:
                self._dirty[key] = None
            return [block for block in spilled if block is not None]

    def remove(self, key: bytes) -> None:
        """Forget a block. One that is borrowed or dirty stays."""
        with self._lock:
            if key not in self._row_of or key in self._dirty:
                return
            with contextlib.suppress(InputError):  # it is borrowed
                self._policy.remove(key)
                self._free.append(self._row_of.pop(key))

    def dirty(self) -> list[tuple[bytes, list[Array]]]:
        """Return copies of all dirty blocks, oldest first. They are clean from now on."""
        with self._lock:
            blocks = [(key, self._copy(self._row_of[key])) for key in self._dirty]
            self._dirty.clear()
            return blocks

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
        self._free = list(range(self.capacity))
        self._policy: Policy[Any] = POLICIES[self._policy_name](self.capacity)

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
