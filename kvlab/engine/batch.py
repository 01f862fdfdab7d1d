"""One pass of the model for many requests: their new tokens side by side, each attending to its own pages.

    request A   decode                [a]
    request B   decode                [b]           tokens  a b c c c c
    request C   a chunk of its prompt [c c c c]     starts  ↑ ↑ ↑

All products with weights are done once for all tokens, and the weights are read once. That is why a batch is
faster: with one token at a time, reading them is most of the work. No request waits for a longer one, and nothing
is padded. Sources: Yu et al., 2022 (Orca), Kwon et al., 2023 (PagedAttention).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kvlab.engine.pages import BlockTable, PagePool
from kvlab.model import Llama


@dataclass(frozen=True)
class Row:
    """New tokens of one request.

    Attributes:
        table: has room for them; the KV of the tokens before `start` is in its pages.
        start: the position of the first one.
    """

    table: BlockTable
    tokens: Sequence[int]
    start: int

    @property
    def stop(self) -> int:
        """The position after the last one."""
        return self.start + len(self.tokens)


def forward(model: Llama, pool: PagePool, rows: Sequence[Row]) -> Tensor:
    """Compute the KV of the rows' tokens into their pages.

    Args:
        rows: one or more, of different tables. Nobody else reads the pages that they write: `make_writable`.

    Returns:
        Logits [N, vocab] of the last token of each row.
    """
    size, device = pool.page_tokens, model.device
    tokens = torch.tensor([token for row in rows for token in row.tokens], device=device)
    positions = torch.cat([torch.arange(row.start, row.stop, device=device) for row in rows])
    page = torch.tensor(
        [row.table.pages[at // size] for row in rows for at in range(row.start, row.stop)], device=device
    )
    offset = positions % size
    cuts = [0, *accumulate(len(row.tokens) for row in rows)]
    views = [pool.view(row.table, 0, row.stop) for row in rows]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        data = pool.data[layer]
        data[:, :, page, offset] = torch.cat((k, v))
        parts = []
        for row, view, first, last in zip(rows, views, cuts, cuts[1:], strict=False):
            kv = pool.read(data, row.table, row.stop) if view is None else view[layer]
            parts.append(model.attend(q[:, :, first:last], kv[:1], kv[1:], row.start))
        return torch.cat(parts, dim=2)

    return model.forward_ragged(tokens, positions, torch.tensor(cuts[1:], device=device) - 1, attend)
