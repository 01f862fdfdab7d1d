"""What a GPU makes of a model, computed: the work of a prefill and of a decode step, the roof over both, and the length
of a prefix from which fetching is faster than computing.

Nothing is measured here. `bench gpu` puts what it measures beside it. Source of the roofline: Williams, Waterman and
Patterson, 2009.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvlab.lab.calibrate import fit
from kvlab.lab.costs import H100, Costs, Device, Link, Model
from kvlab.model import LlamaConfig


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama.

    >>> LLAMA_8B.kv_bytes(), round(LLAMA_8B.parameters / 1e9, 2)
    (131072, 8.03)
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    mlp: int
    vocab: int
    tied: bool = True

    @classmethod
    def of(cls, name: str, config: LlamaConfig) -> Shape:
        """Return the shape of a config."""
        c = config
        heads = (c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        return cls(name, *heads, c.hidden_size, c.intermediate_size, c.vocab_size, c.tie_word_embeddings)

    def config(self, context: int) -> LlamaConfig:
        """Return the config of a model of this shape."""
        heads = (self.layers, self.heads, self.kv_heads, self.head_dim)
        return LlamaConfig(self.vocab, self.hidden, self.mlp, *heads, context, tie_word_embeddings=self.tied)

    @property
    def weights(self) -> int:
        """The weights of all layers that a token is multiplied with."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def head_weights(self) -> int:
        """The weights of the output head, which are those of the embedding if the two are tied."""
        return self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        """All weights, norms included."""
        return self.weights + (1 if self.tied else 2) * self.head_weights + (2 * self.layers + 1) * self.hidden

    def kv_bytes(self, element_bytes: int = 2) -> int:
        """Return the bytes of KV of a token."""
        return self.layers * 2 * self.kv_heads * self.head_dim * element_bytes


QWEN_05B: Final = Shape("Qwen2.5-0.5B", 24, 14, 2, 64, 896, 4864, 151_936)
"""Source: config.json of Qwen/Qwen2.5-0.5B. The model has biases too, which are left out: they cost no time."""
LLAMA_1B: Final = Shape("Llama-3.2-1B", 16, 32, 8, 64, 2048, 8192, 128_256)
"""Source: config.json of meta-llama/Llama-3.2-1B."""
LLAMA_8B: Final = Shape("Llama-3.1-8B", 32, 32, 8, 128, 4096, 14_336, 128_256, tied=False)
"""Source: config.json of meta-llama/Llama-3.1-8B."""


# --- the roof -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Work:
    """Operations, and the bytes that have to move at least: weights and KV. Activations are left out."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.flops / self.bytes


@dataclass(frozen=True)
class Roof:
    """What a device does at most: operations a second, and bytes a second out of its memory and into it."""

    flops_per_s: float
    bytes_per_s: float

    @classmethod
    def of(cls, device: Device) -> Roof:
        """Return what a device reaches of its data sheet.

        >>> round(Roof.of(H200).ridge)
        172
        """
        return cls(device.flops_per_s * device.reached_flops, device.bytes_per_s * device.reached_bytes)

    @property
    def ridge(self) -> float:
        """The intensity at which both limits are reached."""
        return self.flops_per_s / self.bytes_per_s

    def seconds(self, work: Work) -> float:
        """Return the least time for this work."""
        return max(work.flops / self.flops_per_s, work.bytes / self.bytes_per_s)

    def bound(self, work: Work) -> str:
        """Return which limit that is: "compute" or "memory"."""
        return "compute" if work.intensity >= self.ridge else "memory"


def prefill_work(shape: Shape, tokens: int, element_bytes: int = 2) -> Work:
    """Return the work of a prompt: two operations for each weight and token, four for each pair of tokens and channel.

    Only the last token's logits are computed. The KV is written.
    """
    pairs = tokens * (tokens + 1) / 2
    flops = 2 * shape.weights * tokens + 2 * shape.head_weights + _pair_flops(shape) * pairs
    return Work(flops, _weight_bytes(shape, element_bytes) + shape.kv_bytes(element_bytes) * tokens)


def decode_work(shape: Shape, context: int, batch: int = 1, element_bytes: int = 2) -> Work:
    """Return the work of one step: a token for each of `batch` sequences, each behind `context` tokens.

    All weights are read once, and the KV of each sequence.
    """
    flops = batch * (2 * (shape.weights + shape.head_weights) + _pair_flops(shape) * (context + 1))
    return Work(flops, _weight_bytes(shape, element_bytes) + batch * shape.kv_bytes(element_bytes) * (context + 1))


def _pair_flops(shape: Shape) -> int:
    return 4 * shape.layers * shape.heads * shape.head_dim


def _weight_bytes(shape: Shape, element_bytes: int) -> int:
    return (shape.weights + shape.head_weights) * element_bytes


# --- fetch or compute ---------------------------------------------------------------------------
def break_even_gbps(kv_bytes: int, tokens: int, seconds: float) -> float:
    """Return the bandwidth over which fetching takes as long as computing `tokens` tokens in `seconds`.

    >>> break_even_gbps(131072, 20_000, 1.0)
    2.62144
    """
    return kv_bytes * tokens / seconds / 1e9


def fitted(kv_bytes: int, prefills: Mapping[int, float], store: Link) -> Costs:
    """Return the costs that come closest to the times of prefills: a call, its tokens, and their pairs.

    Args:
        prefills: seconds by tokens; two lengths or more.
    """
    terms = [(1.0, n, n * (n + 1) / 2) for n in prefills]
    call, token, pair = fit(terms if len(terms) > 2 else [(0.0, *rest) for _, *rest in terms], [*prefills.values()])
    return Costs(kv_bytes, call, token, prefill_pair_s=pair, store=store, source="fitted")


def fetch_s(costs: Costs, tokens: int) -> float:
    """Return the seconds to fetch a prefix from the store."""
    return costs.store.latency_s + tokens * costs.kv_bytes / costs.store.bytes_per_s


def crossover(costs: Costs) -> float:
    """Return the number of tokens from which on fetching a prefix is faster than computing it; infinity for never.

    >>> wire = Link(latency_s=0.010, bytes_per_s=1e9)
    >>> crossover(Costs(kv_bytes=100_000, prefill_token_s=0.0002, store=wire))
    101
    """
    square = costs.prefill_pair_s / 2
    linear = costs.prefill_token_s + square - costs.kv_bytes / costs.store.bytes_per_s
    constant = costs.prefill_s - costs.store.latency_s
    under = linear * linear - 4 * square * constant
    if under < 0:
        return 1
    if linear > 0:  # this form of the root loses no digits where pairs cost next to nothing
        return max(1, math.floor(-2 * constant / (linear + math.sqrt(under)) + 1e-9) + 1)
    return max(1, math.floor((math.sqrt(under) - linear) / (2 * square)) + 1) if square else math.inf


def sides(costs: Costs, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Return for each length what computing and fetching take, and which of them wins."""
    both = [(n, 1000 * costs.prefill(n, 0), 1000 * fetch_s(costs, n)) for n in lengths]
    return [
        {"tokens": n, "compute_ms": compute, "fetch_ms": fetch, "wins": "fetch" if fetch < compute else "compute"}
        for n, compute, fetch in both
    ]


H200: Final = Device(989e12, 4.8e12, reached_flops=0.5, reached_bytes=0.6)
"""H200 SXM, dense BF16. Source: NVIDIA's data sheet; the reached shares are assumed."""
GPUS: Final = {
    "L4": Device(121e12, 0.3e12, reached_flops=0.5, reached_bytes=0.6),
    "A100": Device(312e12, 2.039e12, reached_flops=0.5, reached_bytes=0.6),
    "H100": H100,
    "B200": Device(2250e12, 8e12, reached_flops=0.5, reached_bytes=0.6),
}
"""Dense BF16 of L4, A100 SXM 80 GB, H100 SXM and B200. Source: NVIDIA's data sheets; the reached shares are assumed."""
GPT_OSS_120B: Final = Model(5.1e9, layers=36, heads=64, kv_heads=8, head_dim=64)
"""Source: config.json of openai/gpt-oss-120b; the active parameters from its model card. Every second layer attends to
128 tokens only, so that less KV than `kv_bytes` may have to move."""
PUBLISHED: Final = {2048: (78, 35), 8192: (250, 57), 16384: (510, 86), 32768: (1173, 165), 49152: (1988, 235)}
"""Milliseconds to compute and to pull a prefix, by its tokens: gpt-oss-120b on H200. Source: llm-d's blog, 15 August
2026. It also has a model of 93 KB a token for which both take the same time near 8K tokens, because a pull takes 1.2
to 1.3 s at least."""


def published() -> Costs:
    """Return the costs that come closest to the published times. The wire's bandwidth is what explains them."""
    floor, token = fit([(1, n) for n in PUBLISHED], [pull / 1000 for _, pull in PUBLISHED.values()])
    store = Link(floor, GPT_OSS_120B.kv_bytes / token)
    return fitted(GPT_OSS_120B.kv_bytes, {n: ms / 1000 for n, (ms, _) in PUBLISHED.items()}, store)
