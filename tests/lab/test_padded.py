"""The static batch gives the tokens of `generate`, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch

from kvlab.engine import generate
from kvlab.lab.padded import generate_padded
from tests.engine.test_generate import words
from tests.harness.helpers import attentive_model

MODEL = attentive_model()


@pytest.mark.parametrize("lengths", [[1], [1, 90], [7, 64, 65, 33, 2], [40, 40, 40]])
def test_ragged_prompts_get_the_tokens_of_generate(lengths: list[int]) -> None:
    prompts = [words(length, seed=i) for i, length in enumerate(lengths)]
    new = [3 + 5 * i for i in range(len(prompts))]
    right = [generate(MODEL, prompt, n, stop_at_eos=False).tokens for prompt, n in zip(prompts, new, strict=True)]
    assert generate_padded(MODEL, prompts, new) == right


def test_more_heads_than_kv_heads_or_as_many() -> None:
    for kv_heads in (1, 4):
        other = attentive_model(kv_heads=kv_heads, seed=kv_heads)
        prompts = [words(50, seed=1), words(9, seed=2)]
        right = [generate(other, prompt, 6, stop_at_eos=False).tokens for prompt in prompts]
        assert generate_padded(other, prompts, [6, 6]) == right


def test_the_model_attends_as_before_also_after_an_error() -> None:
    prompt = words(30)
    own, before = MODEL.attend, generate(MODEL, prompt, 5, stop_at_eos=False).tokens
    generate_padded(MODEL, [prompt, prompt[:9]], [2, 2])
    assert MODEL.attend == own
    with pytest.raises((IndexError, RuntimeError)):
        generate_padded(MODEL, [[5_000], prompt], [2, 2])  # no such token
    assert MODEL.attend == own
    assert generate(MODEL, prompt, 5, stop_at_eos=False).tokens == before


def test_no_row_of_padding_becomes_nan_and_no_gradient_is_kept() -> None:
    seen: list[torch.Tensor] = []
    handle = MODEL.register_forward_hook(lambda module, args, logits: seen.append(logits))
    try:
        generate_padded(MODEL, [words(60), [5]], [3, 3])
    finally:
        handle.remove()
    assert len(seen) == 3 and all(not logits.isnan().any() and not logits.requires_grad for logits in seen)
