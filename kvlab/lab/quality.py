"""Four quality measures of a model for a KV-cache course.

Measurements of KV quality need a model whose loss depends on its context. Perplexity alone does
not show this dependence:

    perplexity        on held-out text; lower is better
    second-copy gain  how much lower the loss is on the second copy of a text (nats per token)
    retrieval         a name is defined early and completed later: share of exact completions, and
                      how much the definition lowers the loss (nats per token)
    looping           share of 8-grams in greedily generated text that repeat an earlier one

A model that copies well also loops. Report both.
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
    """Cross-entropy of each token given the tokens before it, in nats. [N, T] -> [N, T - 1]."""
    rows = [model(row[None, :-1]).float().squeeze(0) for row in batch]
    logits = torch.stack(rows)
    return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")


def perplexity(model: Llama, tokens: Sequence[int], count: int = 32, length: int = 513) -> float:
    """Exponential of the mean loss over `count` windows with `length - 1` predictions each."""
    return math.exp(losses(model, windows(tokens, count, length)).mean().item())


def second_copy(model: Llama, tokens: Sequence[int], count: int = 32, length: int = 256) -> tuple[float, float]:
    """Mean loss (nats per token) on the first and on the second copy of the same text."""
    once = windows(tokens, count, length)
    loss = losses(model, torch.cat([once, once], dim=1))
    return loss[:, : length - 1].mean().item(), loss[:, length:].mean().item()


@torch.inference_mode()
def retrieval(
    model: Llama, tokenizer: Tokenizer, tokens: Sequence[int], count: int = 64, gap: int = 128, seed: int = 0
) -> tuple[float, float]:
    """Complete invented class names, defined `gap` tokens earlier, from their first token.

    Returns:
        Share of names that greedy decoding completes exactly, and the loss without the
        definition minus the loss with the definition (mean, nats per token).
    """
    rng, syllables, exact, gained = random.Random(seed), _SYLLABLES.split(), 0, 0.0
    for _ in range(count):
        name = "".join(rng.choice(syllables) for _ in range(3)).capitalize()
        definition = tokenizer.encode(f"class {name}(Base):\n    pass\n\n\n")
        begin = rng.randrange(len(tokens) - gap)
        asked = tokenizer.encode(f" {name}(")
        rest = [*tokens[begin : begin + gap], *tokenizer.encode("\n\nitem ="), *asked]
        want = torch.tensor(asked[1:])
        defined = model(torch.tensor([definition + rest]))[0, -len(asked) : -1].float()
        undefined = model(torch.tensor([rest]))[0, -len(asked) : -1].float()
        exact += bool((defined.argmax(-1) == want).all())  # then greedy decoding completes the name exactly
        gained += (F.cross_entropy(undefined, want) - F.cross_entropy(defined, want)).item()
    return exact / count, gained / count


def looping(
    model: Llama, tokens: Sequence[int], count: int = 16, prompt: int = 128, new: int = 256, n: int = 8
) -> float:
    """Share of n-grams in greedily generated text that already occurred in the same continuation."""
    repeated = total = 0
    for row in windows(tokens, count, prompt):
        text = generate(model, row.tolist(), new, stop_at_eos=False).tokens
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        repeated, total = repeated + len(grams) - len(set(grams)), total + len(grams)
    return repeated / total


def report(model: Llama, tokenizer: Tokenizer, tokens: Sequence[int]) -> dict[str, float]:
    """All four measures on one text."""
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
