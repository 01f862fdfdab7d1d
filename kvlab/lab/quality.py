"""How good is a model, in the four numbers that matter for a KV-cache course.

A model whose loss does not depend on its context would make every measurement of KV quality
meaningless, so perplexity alone is not enough:

    perplexity        on held-out text, lower is better
    second-copy gain  how much easier the second copy of a text is than the first (nats a token)
    retrieval         a name defined early is asked for late: share of names completed exactly
    looping           share of 8-grams in greedy text that repeat an earlier one

Copying and looping are two sides of one skill: a model that copies well also loops. Report both.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.engine.generate import generate
from kvlab.model import Llama, Tokenizer

_SYLLABLES = "ba de fi go ku la me ni po ru sa te vi wo zu bri dra flo gre ska tri vel mor pan tol"


def windows(tokens: Sequence[int], count: int, length: int) -> Tensor:
    """`count` evenly spaced windows of `length` tokens. int64 [count, length]."""
    last = len(tokens) - length
    starts = [round(i * last / max(1, count - 1)) for i in range(count)]
    return torch.tensor([list(tokens[s : s + length]) for s in starts])


@torch.inference_mode()
def losses(model: Llama, batch: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it, nats. [N, T] -> [N, T - 1]."""
    rows = [model(row[None, :-1]).float().squeeze(0) for row in batch]
    logits = torch.stack(rows)
    return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")


def perplexity(model: Llama, tokens: Sequence[int], count: int = 32, length: int = 513) -> float:
    """Exp of the mean loss over windows of `length - 1` predictions."""
    return math.exp(losses(model, windows(tokens, count, length)).mean().item())


def second_copy(model: Llama, tokens: Sequence[int], count: int = 32, length: int = 256) -> tuple[float, float]:
    """Mean loss (nats a token) on the first and on the second copy of the same text."""
    once = windows(tokens, count, length)
    loss = losses(model, torch.cat([once, once], dim=1))
    return loss[:, : length - 1].mean().item(), loss[:, length:].mean().item()


def retrieval(
    model: Llama, tokenizer: Tokenizer, tokens: Sequence[int], count: int = 64, gap: int = 512, seed: int = 0
) -> float:
    """Share of made-up class names that greedy decoding completes from their first token, `gap` tokens later."""
    rng, hits, asked, syllables = random.Random(seed), 0, 0, _SYLLABLES.split()
    while asked < count:
        name = "".join(rng.choice(syllables) for _ in range(4)).capitalize()
        head = tokenizer.encode(f"class {name}:\n    pass\n\n\n")
        want = tokenizer.encode(f" {name}(")
        begin = rng.randrange(len(tokens) - gap)
        prompt = [*head, *tokens[begin : begin + gap], *tokenizer.encode("\n\nitem ="), want[0]]
        got = generate(model, prompt, len(want) - 1).tokens
        hits, asked = hits + (got == want[1:]), asked + 1
    return hits / asked


def looping(
    model: Llama, tokens: Sequence[int], count: int = 16, prompt: int = 128, new: int = 256, n: int = 8
) -> float:
    """Share of n-grams in greedy text that already occurred in the same continuation."""
    repeated = total = 0
    for row in windows(tokens, count, prompt):
        text = generate(model, row.tolist(), new, stop_at_eos=False).tokens
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        repeated, total = repeated + len(grams) - len(set(grams)), total + len(grams)
    return repeated / total


def report(model: Llama, tokenizer: Tokenizer, tokens: Sequence[int]) -> dict[str, float]:
    """All four numbers on one text."""
    first, second = second_copy(model, tokens)
    return {
        "perplexity": perplexity(model, tokens),
        "first_copy_loss": first,
        "second_copy_loss": second,
        "second_copy_gain": first - second,
        "retrieval": retrieval(model, tokenizer, tokens),
        "looping": looping(model, tokens),
    }
