"""Shadow mode: a small share of hits is computed instead of loaded, and compared with what the store has.

A checksum proves that a record is what was written, not that what was written is the KV of these tokens. Shadow
mode proves that, on the traffic of a deployment. Two correct computations of the same KV differ by rounding,
because prompts are cut into chunks and batches differently, and because a block may have been computed from earlier
blocks that a coarse precision had rounded. Numbers therefore count as different only if they are further apart than
TOLERANCE times the largest magnitude in their row, which is one token of one head: D numbers.
"""

from __future__ import annotations

import logging
import random
import threading
from typing import Final

import torch
from torch import Tensor

from kvlab.stores.base import check_number

TOLERANCE: Final = {
    "fp32": 1e-4,
    "fp16": 2e-2,
    "bf16": 1e-1,
    "int8": 2e-1,
    "int4": 1.0,
}
"""By the coarser of the precision of the store and of the compute dtype.

The largest differences of the shipped model, over 6 x 1024 tokens of held-out text in one chunk, in chunks of 64 and
17, and token by token, were 3e-6, 3e-3, 2e-2, 4e-2 and 2e-1. The margin is about five, and more for fp32, whose
differences grow with the depth of a model. Models with large random weights enlarge every rounding. They reached 6e-6,
7e-3, 5e-2, 1.4e-1 and 1.8, so only their int4 raises false alarms. KV of other tokens differs by 1 to 2.
"""
log = logging.getLogger("kvlab")


class Shadow:
    """Chooses hits, compares blocks, and counts. Thread-safe.

    Args:
        share: of the hits that are computed, 0 to 1.
        precision: the key of TOLERANCE that applies.
        seed: for tests.

    Raises:
        ConfigError: the share is not a number from 0 to 1.
    """

    def __init__(self, share: float, precision: str, seed: int | None = None) -> None:
        if share != 0:
            check_number("shadow", share, 0, 1)
        self.share, self.precision = share, precision
        self.blocks = self.different = 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def chooses(self) -> bool:
        """Whether this hit is computed."""
        return self.share > 0 and self._random.random() < self.share

    def compare(self, stored: Tensor, computed: Tensor, what: str) -> bool:
        """Compare two tensors of the same shape; the last dim is a row. Count and log a difference.

        Args:
            what: which block this is, for the log.

        Returns:
            Whether they agree.
        """
        differing = different_elements(stored, computed, TOLERANCE[self.precision])
        with self._lock:
            self.blocks += 1
            self.different += differing > 0
        if differing:
            log.error(
                "shadow: %d of %d numbers of %s differ from the recomputed ones; the store serves wrong KV",
                differing, stored.numel(), what,
            )  # fmt: skip
        return not differing


def different_elements(stored: Tensor, computed: Tensor, tolerance: float) -> int:
    """Return how many numbers differ by more than `tolerance` times the largest magnitude of their row."""
    stored, computed = stored.float(), computed.float()
    largest = torch.nan_to_num(computed).abs().amax(-1, keepdim=True)
    return int((~((stored - computed).abs() <= tolerance * largest)).sum())  # NaN counts as different
