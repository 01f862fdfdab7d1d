"""A cache of prefix blocks with LRU eviction, in seven lines that are not kvlab's, and the rules of Dynamo's engine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from kvlab.errors import KVLabError
from kvlab.lab.traces import Request

BLOCK_TOKENS = 512


class Use(NamedTuple):
    """What a request looks up, what stays when it has ended (first what is evicted first), and the blocks it needs."""

    looked_up: Sequence[int]
    kept: Sequence[int]
    held: int


def as_dynamo(requests: Iterable[Request], answers: bool = True) -> Iterator[Use]:
    """Only full blocks are found and stay, those of the answer too, and a request's last block is evicted first.

    One token at least is computed, so that there is a first token. The answer's last token is not in the cache.
    """
    new = count(-1, -1)
    for request in requests:
        tokens = request.tokens + (request.new if answers else 1) - 1
        full = list(request.blocks[: request.tokens // BLOCK_TOKENS])
        answer = [next(new) for _ in range(tokens // BLOCK_TOKENS - len(full))]
        yield Use(full[: (request.tokens - 1) // BLOCK_TOKENS], [*full, *answer][::-1], -(-tokens // BLOCK_TOKENS))


class Cache:
    """One worker's blocks. The first of the dict is evicted first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blocks: dict[int, None] = {}

    def serve(self, use: Use) -> int:
        """Return how many leading blocks are there, then keep those of the request."""
        found = next((i for i, block in enumerate(use.looked_up) if block not in self._blocks), len(use.looked_up))
        for block in use.kept:
            self._blocks.pop(block, None)
        while self._blocks and len(self._blocks) + use.held > self.capacity:
            del self._blocks[next(iter(self._blocks))]
        self._blocks.update(dict.fromkeys(use.kept))
        return found


def main(measure: Callable[[Path], dict[str, Any] | str]) -> None:
    """Print what a script measures on the trace that is its argument: a text, or JSON."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} TRACE, a file in Mooncake's format")
    try:
        result = measure(Path(sys.argv[1]))
    except (KVLabError, OSError) as error:
        sys.exit(f"alternatives: {error}")
    print(result if isinstance(result, str) else json.dumps(result, indent=2))
