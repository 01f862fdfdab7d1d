"""What work costs, in seconds: the terms of a simulation, measured or computed from published figures."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from math import ceil
from typing import Any, Final

from kvlab.errors import InputError


@dataclass(frozen=True)
class Link:
    """A way for KV: so many seconds until the first byte, then so many bytes a second for all who use it."""

    latency_s: float = 0.0
    bytes_per_s: float = float("inf")

    def __post_init__(self) -> None:
        if not (self.latency_s >= 0 and self.bytes_per_s > 0):
            raise InputError(f"expected a latency of 0 or more and a bandwidth above 0, got {self}")


@dataclass(frozen=True)
class Costs:
    """Costs of one model on one kind of node. All terms are linear, but for the pairs of attention.

    Attributes:
        kv_bytes: KV of one token.
        prefill_s: of each prefill.
        prefill_token_s, prefill_past_s: of each token computed, and of each token before it whose KV is read.
        prefill_pair_s: of each pair of a computed token with a token that it attends to.
        step_s, step_request_s, step_token_s: of each decode step, of each request in it, and of each token that
            these requests attend to.
        chunk: tokens of a prompt that one step computes. The requests that generate go on in these steps.
        batch: the most requests that generate at the same time on a node.
        room: tokens whose KV fits into a node for the requests that are admitted; None: endless.
        host, store: from a node's host memory, and from the store that all share.
        source: where the numbers are from.
    """

    kv_bytes: int
    prefill_s: float = 0.0
    prefill_token_s: float = 0.0
    prefill_past_s: float = 0.0
    prefill_pair_s: float = 0.0
    step_s: float = 0.0
    step_request_s: float = 0.0
    step_token_s: float = 0.0
    chunk: int = 512
    batch: int = 256
    room: int | None = None
    host: Link = field(default_factory=Link)
    store: Link = field(default_factory=Link)
    source: str = ""

    def __post_init__(self) -> None:
        times = [f.name for f in fields(self) if f.name.endswith("_s")]
        if not all(getattr(self, name) >= 0 for name in times) or min(self.kv_bytes, self.chunk, self.batch) < 1:
            raise InputError(f"expected times of 0 or more and sizes of 1 or more, got {self}")

    def prefill(self, tokens: int, past: int) -> float:
        """Seconds to compute `tokens` tokens behind `past` tokens whose KV is there."""
        pairs = tokens * past + tokens * (tokens + 1) / 2
        return self.prefill_s + self.prefill_token_s * tokens + self.prefill_past_s * past + self.prefill_pair_s * pairs

    def step(self, requests: int, tokens: int) -> float:
        """Seconds of one decode step of so many requests that attend to so many tokens together."""
        return self.step_s + self.beside(requests, tokens)

    def beside(self, requests: int, tokens: int) -> float:
        """Seconds that the same requests add to a step that computes a part of a prompt."""
        return self.step_request_s * requests + self.step_token_s * tokens

    def chunks(self, tokens: int) -> int:
        """Steps of a prefill."""
        return ceil(tokens / self.chunk)

    def times(self, factor: float) -> Costs:
        """Return the costs of a world in which everything takes `factor` times as long."""
        times: dict[str, Any] = {f.name: getattr(self, f.name) * factor for f in fields(self) if f.name.endswith("_s")}
        for name in ("host", "store"):
            link: Link = getattr(self, name)
            times[name] = Link(link.latency_s * factor, link.bytes_per_s / factor)
        return replace(self, **times)


@dataclass(frozen=True)
class Model:
    """The sizes of a model that costs depend on, from its config."""

    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int = 2

    @property
    def kv_bytes(self) -> int:
        """KV of one token: keys and values of all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.element_bytes


@dataclass(frozen=True)
class Device:
    """What a data sheet says of a device, and the share of it that programs reach."""

    flops_per_s: float
    bytes_per_s: float
    reached_flops: float
    reached_bytes: float


LLAMA_8B: Final = Model(8.03e9, layers=32, heads=32, kv_heads=8, head_dim=128)
"""Llama 3.1 8B in BF16. Source: its config.json; the number of parameters from its model card."""
H100: Final = Device(989e12, 3.35e12, reached_flops=0.5, reached_bytes=0.6)
"""H100 SXM, dense BF16. Source: NVIDIA's data sheet; the reached shares are assumed."""


def compute(model: Model, device: Device, host: Link, store: Link) -> Costs:
    """Return costs from a model's sizes and a device's data sheet. Nothing of them is measured.

    A token takes two operations for each parameter, a pair of tokens four for each head and dimension in each layer.
    A prefill reads the KV before it once, a decode step the weights and the KV of all requests.
    """
    flops, bandwidth = device.flops_per_s * device.reached_flops, device.bytes_per_s * device.reached_bytes
    return Costs(
        kv_bytes=model.kv_bytes,
        prefill_token_s=2 * model.parameters / flops,
        prefill_past_s=model.kv_bytes / bandwidth,
        prefill_pair_s=4 * model.layers * model.heads * model.head_dim / flops,
        step_s=model.element_bytes * model.parameters / bandwidth,
        step_token_s=model.kv_bytes / bandwidth,
        host=host,
        store=store,
        source="computed",
    )


PCIE: Final = Link(latency_s=20e-6, bytes_per_s=50e9)
"""Host memory over PCIe 5.0 x16: 64 GB/s by its specification, 50 assumed."""
REDIS: Final = Link(latency_s=1e-3, bytes_per_s=2.5e9)
"""A Redis server: what `bench wire` reaches over TCP on one machine; a network of 25 Gbit/s carries 3.1."""
COSTS: Final[dict[str, Costs]] = {"llama8b_h100": compute(LLAMA_8B, H100, PCIE, REDIS)}
"""By name, for the command line."""
