"""The exercises of notebook 01, attention by hand: attention, positions, bytes per token, break-even bandwidth."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.course.exercises.engine import Exercise, Wrong


def causal_attention(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """Attention of T new tokens over themselves and the `start` tokens before them."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    T, S = scores.shape[2:]
    sees = torch.arange(S) <= start + torch.arange(T)[:, None]
    return scores.masked_fill(~sees, float("-inf")).softmax(dim=3) @ v


def _variant(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, offset: int, causal: bool = True) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(2, 3) * scale
    T, S = scores.shape[2:]
    sees = (torch.arange(S) <= offset + torch.arange(T)[:, None]) | (not causal)
    return scores.masked_fill(~sees, float("-inf")).softmax(dim=3) @ v


def _mask_restarts(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    return _variant(q, k, v, start, q.shape[3] ** -0.5, 0)


def _no_scale(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    return _variant(q, k, v, start, 1.0, start)


def _no_mask(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    return _variant(q, k, v, start, q.shape[3] ** -0.5, start, causal=False)


def _heads_interleaved(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    group = q.shape[1] // k.shape[1]
    return causal_attention(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), start)


def _qkv(heads: int, kv_heads: int, new: int, start: int) -> tuple[Tensor, Tensor, Tensor, int]:
    g = torch.Generator().manual_seed(heads * 100 + new * 10 + start)
    shapes = ((1, heads, new, 8), (1, kv_heads, start + new, 8), (1, kv_heads, start + new, 8))
    q, k, v = (torch.randn(s, generator=g) for s in shapes)
    return q, k, v, start


CAUSAL_ATTENTION = Exercise(
    name="causal_attention",
    number="01.1",
    difficulty=4,
    reference=causal_attention,
    cases=(_qkv(1, 1, 4, 0), _qkv(4, 2, 5, 0), _qkv(4, 2, 3, 6), _qkv(4, 1, 1, 7)),
    wrong=(
        Wrong(_mask_restarts, "new token t sits at position start + t: the mask must begin there, not at 0"),
        Wrong(_no_scale, "divide the scores by the square root of the head dim"),
        Wrong(_no_mask, "token t must not see what comes after position start + t: mask those scores with -inf"),
        Wrong(_heads_interleaved, "neighbouring query heads share a KV head: repeat_interleave, not repeat"),
    ),
    hint="four steps: repeat the KV heads, scaled scores, mask, softmax over the last dim times v",
    forbidden="attention",
)


def suffix_positions(cached_tokens: int, prompt_tokens: int) -> list[int]:
    """Positions of the tokens that are left to compute."""
    return list(range(cached_tokens, prompt_tokens))


def _positions_restarted(cached_tokens: int, prompt_tokens: int) -> list[int]:
    return list(range(prompt_tokens - cached_tokens))


def _positions_off_by_one(cached_tokens: int, prompt_tokens: int) -> list[int]:
    return list(range(cached_tokens + 1, prompt_tokens + 1))


SUFFIX_POSITIONS = Exercise(
    name="suffix_positions",
    number="01.2",
    difficulty=1,
    reference=suffix_positions,
    cases=((4, 7), (0, 3), (64, 66)),
    wrong=(
        Wrong(_positions_restarted, "the suffix goes on where the cached prefix ended; restarting at 0 is silent"),
        Wrong(_positions_off_by_one, "positions count from 0: the first token after n cached ones is at n"),
    ),
    hint="a list of positions, from the first token that is not cached to the last of the prompt",
)


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, bytes_per_element: int) -> int:
    """Bytes of KV that one token takes over all layers."""
    return layers * 2 * kv_heads * head_dim * bytes_per_element


def _one_plane(layers: int, kv_heads: int, head_dim: int, bytes_per_element: int) -> int:
    return layers * kv_heads * head_dim * bytes_per_element


def _one_layer(layers: int, kv_heads: int, head_dim: int, bytes_per_element: int) -> int:
    return 2 * kv_heads * head_dim * bytes_per_element


KV_BYTES_PER_TOKEN = Exercise(
    name="kv_bytes_per_token",
    number="01.3",
    difficulty=1,
    reference=kv_bytes_per_token,
    cases=((6, 2, 64, 4), (32, 8, 128, 2), (80, 8, 128, 2)),
    wrong=(
        Wrong(_one_plane, "both keys and values are kept: two planes"),
        Wrong(_one_layer, "every layer has its own keys and values"),
    ),
    hint="multiply everything that one token leaves behind: layers, planes, KV heads, head dim, bytes",
)


def break_even_bandwidth(bytes_per_token: int, prefill_tokens_per_s: float) -> float:
    """Bytes a second that a store must deliver so that fetching KV is as fast as computing it."""
    return float(bytes_per_token * prefill_tokens_per_s)


def _divided(bytes_per_token: int, prefill_tokens_per_s: float) -> float:
    return bytes_per_token / prefill_tokens_per_s


def _in_bits(bytes_per_token: int, prefill_tokens_per_s: float) -> float:
    return 8.0 * bytes_per_token * prefill_tokens_per_s


BREAK_EVEN_BANDWIDTH = Exercise(
    name="break_even_bandwidth",
    number="01.4",
    difficulty=1,
    reference=break_even_bandwidth,
    cases=((6144, 5000.0), (131072, 15300.0)),
    wrong=(
        Wrong(_divided, "in one second the model computes so many tokens, each worth so many bytes: multiply"),
        Wrong(_in_bits, "the answer is in bytes a second, not bits"),
    ),
    hint="how many bytes of KV does the model itself produce in a second?",
)
