"""How good is a model, in the four numbers that matter for a KV-cache course.

A model whose loss does not depend on its context would make every measurement of KV quality
meaningless, so perplexity alone is not enough:

    perplexity        on held-out text, lower is better
    second-copy gain  how much easier the second copy of a text is than the first (nats a token)
    retrieval         a name defined early is asked for late: share of names completed exactly,
                      and what the definition is worth in nats a token
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


@torch.inference_mode()
def retrieval(
    model: Llama, tokenizer: Tokenizer, tokens: Sequence[int], count: int = 64, gap: int = 128, seed: int = 0
) -> tuple[float, float]:
    """Ask for made-up class names that were defined `gap` tokens earlier, given only their first token.

    Returns:
        Share of names that greedy decoding completes exactly, and how many nats a token the
        definition is worth (the loss without it minus the loss with it).
    """
    rng, syllables, exact, gained = random.Random(seed), _SYLLABLES.split(), 0, 0.0
    for _ in range(count):
        name = "".join(rng.choice(syllables) for _ in range(3)).capitalize()
        definition = tokenizer.encode(f"class {name}(Base):\n    pass\n\n\n")
        begin = rng.randrange(len(tokens) - gap)
        asked = tokenizer.encode(f" {name}(")
        rest = [*tokens[begin : begin + gap], *tokenizer.encode("\n\nitem ="), *asked]
        want = torch.tensor(asked[1:])
        told = model(torch.tensor([definition + rest]))[0, -len(asked) : -1].float()
        untold = model(torch.tensor([rest]))[0, -len(asked) : -1].float()
        exact += bool((told.argmax(-1) == want).all())  # each right given the ones before: what greedy decoding does
        gained += (F.cross_entropy(untold, want) - F.cross_entropy(told, want)).item()
    return exact / count, gained / count


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
    exact, gain = retrieval(model, tokenizer, tokens)
    return {
        "perplexity": perplexity(model, tokens),
        "first_copy_loss": first,
        "second_copy_loss": second,
        "second_copy_gain": first - second,
        "retrieval_exact": exact,
        "retrieval_gain": gain,
        "looping": looping(model, tokens),
    }
