"""The four quality numbers, against their definitions."""

from __future__ import annotations

import math
import random

import pytest
import torch

from kvlab.engine import generate
from kvlab.lab import quality
from kvlab.model import Llama, Tokenizer
from tests.harness.helpers import build_model


def words(count: int) -> list[int]:
    return random.Random(0).choices(range(97), k=count)


def uniform() -> Llama:
    """A model that thinks every token equally likely."""
    model = build_model(tied=False)
    model.lm_head.weight.zero_()
    return model


@pytest.mark.parametrize(("count", "starts"), [(1, [0]), (2, [0, 90]), (4, [0, 30, 60, 90])])
def test_windows_are_evenly_spaced_over_the_whole_text(count: int, starts: list[int]) -> None:
    rows = quality.windows(range(100), count, 10)
    assert rows.tolist() == [list(range(s, s + 10)) for s in starts]


def test_losses_are_those_of_each_next_token() -> None:
    model, batch = build_model(), quality.windows(words(100), 3, 20)
    got = quality.losses(model, batch)
    assert tuple(got.shape) == (3, 19)
    for row, tokens in zip(got, batch, strict=True):
        chances = model(tokens[None]).squeeze(0).softmax(-1)
        want = [-math.log(float(chances[t, tokens[t + 1]])) for t in range(19)]
        torch.testing.assert_close(row, torch.tensor(want), rtol=0, atol=1e-4)


def test_the_perplexity_of_no_idea_is_the_size_of_the_vocabulary() -> None:
    assert quality.perplexity(uniform(), words(300), 4, 65) == pytest.approx(97, rel=1e-4)


def test_no_idea_gains_nothing_from_a_second_copy() -> None:
    first, second = quality.second_copy(uniform(), words(300), 4, 32)
    assert first == pytest.approx(second, abs=1e-5) == pytest.approx(math.log(97), abs=1e-4)


def test_looping_is_the_share_of_repeated_grams() -> None:
    stuck = uniform()  # argmax of equal logits: always token 0
    assert generate(stuck, [5], 20, stop_at_eos=False).tokens == [0] * 20
    assert quality.looping(stuck, words(200), count=2, prompt=16, new=20, n=8) == pytest.approx(12 / 13)


def test_the_shipped_model_uses_its_context(model: Llama, tokenizer: Tokenizer, sample: list[int]) -> None:
    """Were this not so, no measurement of the quality of cached KV would mean anything."""
    first, second = quality.second_copy(model, sample, count=4, length=128)
    assert first - second > 1.0
    assert quality.perplexity(model, sample, count=4, length=257) < 200
