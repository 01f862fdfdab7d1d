"""What `bench gpu` measures: by default for a GPU, and for a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from kvlab.core.precisions import PRECISIONS
from kvlab.lab.costs import Link
from kvlab.lab.gpu_model import LLAMA_1B, LLAMA_8B, QWEN_05B, Shape
from kvlab.model import Llama, load_model

SHIPPED: Final = "shipped"
NAMES: Final = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Plan:
    """Sizes of everything that is measured.

    Attributes:
        shapes: of models with random weights. The shipped model comes before them.
        dtype: of weights and KV.
        prefill: lengths of prompts.
        decode, batches, steps: tokens before a decode step, sequences in it, and steps in a row.
        prefixes: lengths that come from a tier, multiples of 64.
        planned, slower, learning: prefixes of the planner's cells; the bandwidth at which fetching and computing take
            the same time is multiplied by each of `slower`; requests of each length before any counts.
        copies, load: MiB that are copied, and that go the way of a block.
        stream, matmul: MiB and side of a square matrix, for the limits.
        cast: the shape whose KV is converted, MiB at `dtype`.
        wires: for the table of break-evens.
        rounds: repetitions of everything.
        step_s: seconds after which a step ends with the rounds that it has.
        budget_s: seconds after which no step begins.
    """

    shapes: Sequence[Shape]
    dtype: torch.dtype
    prefill: Sequence[int]
    decode: Sequence[int]
    batches: Sequence[int]
    prefixes: Sequence[int]
    planned: Sequence[int]
    copies: Sequence[int]
    load: int
    stream: int
    matmul: int
    cast: tuple[Shape, int]
    slower: Sequence[float] = (0.25, 1.0, 4.0)
    learning: int = 8
    steps: int = 16
    rounds: int = 5
    step_s: float = 20.0
    budget_s: float = 420.0
    wires: Sequence[Link] = tuple(Link(0.001, 1e9 * gbps) for gbps in (1.25, 3.125, 12.5, 50.0))
    """10, 25, 100 and 400 Gbit/s, a millisecond until the first byte."""
    precisions: Sequence[str] = tuple(PRECISIONS)

    @property
    def precision(self) -> str:
        """The precision of records that are not rounded."""
        return NAMES[self.dtype]

    @property
    def context(self) -> int:
        """Room for the longest prompt."""
        return 64 + max(*self.prefill, *(n + self.steps for n in self.decode), *self.prefixes, *self.planned)


CROSSOVER: Final = (2048, 8192, 16_384, 32_768, 49_152)
"""Lengths of the table of break-evens: those that were published (`kvlab.lab.gpu_model.PUBLISHED`)."""
SMALL: Final = Shape("about 4M", 4, 4, 2, 64, 256, 704, 4096)
PLANS: Final = {
    "cuda": Plan(
        shapes=(QWEN_05B, LLAMA_1B, LLAMA_8B),
        dtype=torch.bfloat16,
        prefill=(512, 2048, 8192, 16_384, 32_768, 49_152),
        decode=(512, 8192, 32_768),
        batches=(1, 16),
        prefixes=(2048, 8192, 16_384),
        planned=(2048, 8192),
        copies=(1, 16, 64, 256),
        load=256,
        stream=1024,
        matmul=8192,
        cast=(LLAMA_8B, 64),
    ),
    "cpu": Plan(
        shapes=(SMALL,),
        dtype=torch.float32,
        prefill=(64, 256),
        decode=(256,),
        batches=(1, 2),
        prefixes=(128,),
        planned=(128,),
        copies=(1, 64),
        load=16,
        stream=128,
        matmul=512,
        cast=(SMALL, 8),
        slower=(0.5, 2.0),
        learning=3,
        steps=2,
        rounds=2,
        step_s=4.0,
        budget_s=70.0,
    ),
}
"""On a CPU it is a dry run of the same steps, in a minute on a busy machine with two cores."""


def random_model(shape: Shape, plan: Plan, device: str) -> Llama:
    """Return a model of a shape with random weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(plan.dtype)
    try:
        with torch.device(device):
            return Llama(shape.config(plan.context)).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def shipped_model(plan: Plan, device: str) -> Llama:
    """Return the shipped model with room for the longest prompt, which changes no time."""
    model = load_model(dtype=plan.dtype)
    if plan.context > model.config.max_position_embeddings:
        longer = Llama(replace(model.config, max_position_embeddings=plan.context)).to(plan.dtype)
        longer.load_state_dict(model.state_dict())
        model = longer
    return model.to(device).requires_grad_(False).eval()
