"""A static batch with padding, as many tutorials write it: what continuous batching is compared with.

All prompts are padded on the left to the longest one, start together, and the batch ends with its longest answer. A
row that is done is computed on, and nobody joins. The answers are right: padding is masked, and RoPE is relative, so
that a prompt may begin at any position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.model import Llama


@torch.inference_mode()
def generate_padded(model: Llama, prompts: Sequence[Sequence[int]], new: Sequence[int]) -> list[list[int]]:
    """Continue all prompts greedily, as one batch.

    Args:
        new: how many tokens each answer has; there is no earlier end.
    """
    N, longest = len(prompts), max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    kv = model.new_kv(longest + max(new), N)
    real = torch.arange(longest + max(new))[None] >= padding[:, None]  # [N, C]

    def attend(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        T, S = q.shape[2], k.shape[2]
        sees = torch.ones(T, S, dtype=torch.bool).tril(start)[None, None] & real[:, None, None, :S]
        sees = sees | torch.eye(T, S, dtype=torch.bool).roll(start, 1)  # a row of padding sees itself, or it is NaN
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=q.shape[1] != k.shape[1])

    own, model.attend = model.attend, attend
    try:
        answers: list[Tensor] = []
        step, start = tokens, 0
        for _ in range(max(new)):
            step, start = model(step, kv, start, last_only=True).argmax(-1), start + step.shape[1]
            answers.append(step)
    finally:
        model.attend = own
    rows: list[list[int]] = torch.cat(answers, 1).tolist()
    return [row[:length] for row, length in zip(rows, new, strict=True)]
