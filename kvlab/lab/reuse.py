"""What a trace has to find: how much of each prompt an LRU cache of any size would have, from one pass over the trace.

Only full blocks count, because engines share no others: the hit rate is found full blocks / all full blocks, the
`full_blocks` of `kvlab.lab.replay`. A cache stands for engines whose router sends each request where its blocks are;
on Mooncake's trace ten such engines find .178, one cache with the memory of all ten .183 (docs/traces.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvlab.errors import InputError
from kvlab.lab.replay import lru_needs
from kvlab.lab.traces import Request


@dataclass(frozen=True)
class Reuse:
    """The reuse in a trace.

    Attributes:
        block_tokens: tokens in a block.
        requests, tokens, blocks: how many, tokens of all prompts, and full blocks of all prompts.
        span_s: from the first request to the last.
        needs: for each block that some capacity finds, the least such capacity in blocks; in the order of the trace.
        owners: the request, 0, 1, 2, …, of each of them.
    """

    block_tokens: int
    requests: int
    tokens: int
    blocks: int
    span_s: float
    needs: NDArray[Any]
    owners: NDArray[Any]

    def found(self, capacity: float) -> NDArray[Any]:
        """Return the leading blocks of each request that a cache of so many blocks finds."""
        return np.bincount(self.owners[self.needs <= capacity], minlength=self.requests)

    def hit_rate(self, capacity: float = float("inf")) -> float:
        """Return found full blocks / all full blocks; 0 where there are none."""
        return int((self.needs <= capacity).sum()) / self.blocks if self.blocks else 0.0

    def capacity(self, hit_rate: float) -> float:
        """Return the least capacity that finds so much, or the one that finds most, if none finds it."""
        count = min(len(self.needs), int(np.ceil(hit_rate * self.blocks - 1e-6)))
        return float(np.partition(self.needs, count - 1)[count - 1]) if count > 0 else 0.0


def reuse(requests: Iterable[Request], block_tokens: int) -> Reuse:
    """Read a trace once.

    >>> from kvlab.lab.traces import from_blocks
    >>> told = reuse(from_blocks([[1, 2], [3, 4], [1, 2]]), 1)
    >>> [told.hit_rate(blocks) for blocks in (3, 4)], told.capacity(0.3)
    ([0.0, 0.3333333333333333], 4.0)

    Raises:
        InputError: there are no requests.
    """
    seen = _Counted(requests, block_tokens)
    needs = [*lru_needs(seen)]
    if not needs:
        raise InputError("expected a trace with requests, got an empty one")
    flat = np.array([need for each in needs for need in each], dtype=np.int64)
    owners = np.repeat(np.arange(len(needs)), [len(each) for each in needs])
    return Reuse(block_tokens, len(needs), seen.tokens, seen.blocks, seen.end_s - seen.begin_s, flat, owners)


class _Counted:
    """Passes requests on without their last part that fills no block, and counts what it has passed."""

    def __init__(self, requests: Iterable[Request], block_tokens: int) -> None:
        self._requests, self._size = requests, block_tokens
        self.tokens = self.blocks = 0
        self.begin_s = self.end_s = 0.0

    def __iter__(self) -> Iterator[Request]:
        for number, request in enumerate(self._requests):
            if not number:
                self.begin_s = request.at_s
            self.end_s = request.at_s
            full = request.tokens // self._size
            self.tokens += request.tokens
            self.blocks += full
            yield replace(request, blocks=request.blocks[:full])
