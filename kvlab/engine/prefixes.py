"""The prefix index of a page pool: the pages of full blocks, under the blocks' keys.

A block that no table uses stays until its pages are needed. An eviction policy then chooses among the blocks
without successors, so the parent of every block in the index is in the index too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvlab.core.policies import POLICIES, Policy
from kvlab.errors import ConfigError


@dataclass
class Block:
    """A full block in the index.

    Attributes:
        parent: the key of the block before it; None for a first block.
        children: the number of blocks in the index that follow it.
        users: the number of tables that hold it.
    """

    pages: list[int]
    parent: bytes | None
    children: int = 0
    users: int = 0


class PrefixIndex:
    """Blocks by key. It counts nobody's pages: the pool does that with the pages that the methods return.

    Args:
        pages: the pages of the pool, the most that the index can hold.
        policy: the eviction policy, a name in `kvlab.core.policies.POLICIES`.

    Attributes:
        idle: pages of blocks that no table holds, so that they may be evicted.
        evicted: how many blocks were evicted.

    Raises:
        ConfigError: the policy is unknown.
    """

    def __init__(self, pages: int, policy: str) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"expected one of the policies {', '.join(POLICIES)}, got {policy!r}")
        self.blocks: dict[bytes, Block] = {}
        self.idle = 0
        self.evicted = 0
        self._policy: Policy[Any] = POLICIES[policy](pages)  # a pin: a table or a successor needs the block

    def __contains__(self, key: bytes) -> bool:
        return key in self.blocks

    def find(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the leading keys that are in the index. To the policy this is a use of them."""
        found = []
        for key in keys:
            if key not in self.blocks:
                break
            self._policy.hit(key)
            found.append(key)
        return found

    def hold(self, key: bytes) -> list[int]:
        """Keep a block from being evicted, for one table more; return its pages."""
        block = self.blocks[key]
        self.idle -= 0 if block.users else len(block.pages)
        block.users += 1
        self._policy.pin(key)
        return block.pages

    def let_go(self, key: bytes) -> None:
        """Undo one `hold`."""
        block = self.blocks[key]
        block.users -= 1
        self.idle += 0 if block.users else len(block.pages)
        self._policy.unpin(key)

    def add(self, key: bytes, block: Block) -> list[int] | None:
        """Add a block that is not there, and whose parent is.

        Returns:
            The pages of blocks that it displaced, usually none. None: there is no room, and it was not added. Blocks
            of forks have pages in common, which count twice here.
        """
        evicted = self._policy.admit(key, len(block.pages))
        if evicted == [key]:
            return None
        displaced = [page for other in evicted for page in self._drop(other)]
        self.blocks[key] = block
        self.idle += len(block.pages)
        if block.parent is not None:
            self.blocks[block.parent].children += 1
            self._policy.pin(block.parent)
        return displaced

    def evict(self) -> tuple[bytes, list[int]] | None:
        """Remove the block that the policy chooses, and return its key and pages. None: every block is needed."""
        key = self._policy.evict()
        return None if key is None else (key, self._drop(key))

    def _drop(self, key: bytes) -> list[int]:
        """Remove a block that the policy has evicted; return its pages."""
        block = self.blocks.pop(key)
        if block.parent is not None:
            self.blocks[block.parent].children -= 1
            self._policy.unpin(block.parent)
        self.idle -= len(block.pages)
        self.evicted += 1
        return block.pages

    def check_integrity(self, users: Mapping[bytes, int]) -> None:
        """Assert that all counts are right.

        Args:
            users: how many tables hold each block.
        """
        children = Counter(block.parent for block in self.blocks.values() if block.parent is not None)
        assert users.keys() <= self.blocks.keys() and children.keys() <= self.blocks.keys(), "a block is missing"
        for key, block in self.blocks.items():
            assert (block.users, block.children) == (users.get(key, 0), children[key]), "users and children of a block"
            assert key in self._policy, "a block that the policy does not know"
        idle = sum(len(block.pages) for block in self.blocks.values() if not block.users)
        assert self.idle == idle, "the number of pages that can be evicted"
        assert len(self._policy) == len(self.blocks), "the policy has another block"
