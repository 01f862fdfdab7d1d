"""Greedy generation with a KV cache before the prefill.

    match -> load -> prefill the rest -> decode -> save

The generated tokens are the same for an empty, partly filled, slow or broken cache, if the model and
the cache use fp32. This module runs one request at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlab.cache.base import KVCache
from kvlab.errors import InputError
from kvlab.model import Llama


@dataclass(frozen=True)
class Generation:
    """The result of one request.

    Attributes:
        tokens: the new tokens.
        prompt_tokens: the length of the prompt.
        cached_tokens: the number of prompt tokens whose KV came from the cache.
        ttft_s: seconds from the call to the first new token, including cache look-up and load.
        total_s: seconds from the call to the last new token, without the save.
        saved_blocks: the result of `KVCache.save`.
    """

    tokens: list[int]
    prompt_tokens: int
    cached_tokens: int
    ttft_s: float
    total_s: float
    saved_blocks: int = 0


@torch.inference_mode()
def generate(
    model: Llama,
    tokens: Sequence[int],
    max_new_tokens: int = 32,
    cache: KVCache | None = None,
    stop_at_eos: bool = True,
) -> Generation:
    """Continue `tokens` greedily.

    Raises:
        InputError: the prompt is empty or too long, or a token is not in the vocabulary.
    """
    begin = time.perf_counter()
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise InputError(f"expected max_new_tokens as a whole number of at least 1, got {max_new_tokens!r}")
    prompt = model.check_tokens(tokens, max_new_tokens)
    tokens = prompt[0].tolist()  # a copy, so that block keys and KV belong to the same tokens
    T = prompt.shape[1]
    kv = model.new_kv(T + max_new_tokens)
    cached = fill_from(cache, tokens, kv[:, :, 0]) if cache else 0
    logits = model(prompt[:, cached:], kv, cached, last_only=True)
    new = [int(logits.argmax())]
    ttft = time.perf_counter() - begin
    while len(new) < max_new_tokens and not (stop_at_eos and new[-1] in model.config.eos_token_ids):
        step = torch.tensor([[new[-1]]], device=model.device)
        new.append(int(model(step, kv, T + len(new) - 1, last_only=True).argmax()))
    total = time.perf_counter() - begin
    saved = 0
    if cache:  # the KV of the last token was not computed
        known = [*tokens, *new[:-1]]
        saved = cache.save(known, kv[:, :, 0, :, : len(known)], cached)
    return Generation(new, T, cached, ttft, total, saved)


def fill_from(cache: KVCache, tokens: Sequence[int], kv: Tensor) -> int:
    """Load the longest cached prefix of `tokens` into `kv` [L, P, H, C, D], and return its length.

    The length excludes the last token: its logits are needed for the first new token, and a cache
    holds no logits.
    """
    found = cache.match(tokens)
    if not found:
        return 0
    loaded = cache.load(tokens, 0, found, kv[:, :, :, :found])
    return min(loaded, len(tokens) - 1)
