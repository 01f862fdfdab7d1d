"""What one process remembers of its own saves and loads, so that a miss can be explained. It stays in this process.

All of it is bounded: MAX_REQUESTS requests of at most MAX_TOKENS tokens, and the keys of MAX_KEYS blocks.
"""

from __future__ import annotations

import threading
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from kvlab.core.keys import token_bytes
from kvlab.stores.fork import reset_in_children

MAX_REQUESTS: Final = 16
MAX_TOKENS: Final = 1 << 15
MAX_KEYS: Final = 1 << 15
STORED: Final = ""


class Recent:
    """The requests that this process saved last, and what became of the blocks that it offered. Thread-safe."""

    def __init__(self) -> None:
        self._requests: deque[array[int]] = deque(maxlen=MAX_REQUESTS)
        self._fates: dict[bytes, str] = {}  # STORED, or why the block was refused; the oldest one first
        self.reset_after_fork()
        reset_in_children(self)

    def saved(self, tokens: Sequence[int]) -> None:
        """Remember a request. A request that goes on takes the place of its beginning."""
        ids = array("I", token_bytes(tokens[:MAX_TOKENS]))
        with self._lock:
            for i, older in enumerate(self._requests):
                if older == ids[: len(older)]:
                    del self._requests[i]
                    break
            self._requests.append(ids)

    def blocks(self, keys: Iterable[bytes], fate: str = STORED) -> None:
        """Remember what became of blocks: STORED, or the reason why they were refused."""
        with self._lock:
            for key in keys:
                self._fates.pop(key, None)
                self._fates[key] = fate
            while len(self._fates) > MAX_KEYS:
                del self._fates[next(iter(self._fates))]

    def fate(self, key: bytes) -> str | None:
        """Return what became of a block, or None if this process does not know."""
        with self._lock:
            return self._fates.get(key)

    def requests(self) -> list[array[int]]:
        """Return the remembered requests, the newest first."""
        with self._lock:
            return list(reversed(self._requests))

    def reset_after_fork(self) -> None:
        """See `kvlab.stores.fork.Forkable`."""
        self._lock = threading.Lock()
