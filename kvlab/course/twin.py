"""A second model for experiments: other weights, other KV, and the same answers."""

from __future__ import annotations

import copy

from kvlab.model import Llama


def twin_of(model: Llama) -> Llama:
    """A copy of a model whose attention heads stand in the opposite order.

    The order of heads has no meaning, so the twin computes the same logits. Its KV has the same shape
    and other numbers. `folder` is None, so that its fingerprint is that of the weights in memory.
    """
    twin = copy.deepcopy(model)
    twin.folder = None
    H, hidden = model.config.num_key_value_heads, model.config.hidden_size
    for name, weight in twin.state_dict().items():  # the tensors of the twin itself
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):  # [heads x D, hidden]
            weight.copy_(weight.view(H, -1, hidden).flip(0).reshape(-1, hidden))
        elif name.endswith("o_proj.weight"):  # [hidden, heads x D]
            weight.copy_(weight.view(hidden, H, -1).flip(1).reshape(hidden, -1))
    return twin
