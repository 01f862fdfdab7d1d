"""What the device reaches at most, measured: a matmul and a copy, and which attention kernels it has."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvlab.lab.bench.gpu.plan import Plan
from kvlab.lab.bench.gpu.report import Report, Rows
from kvlab.lab.gpu_model import Roof

MIB = 1 << 20
REPEATS = 8
"""Calls in a row, so that starting them takes no time of its own."""
BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


def limits(report: Report, plan: Plan) -> Rows:
    """A square matmul in the dtype of the models, and a copy from device memory to device memory (read and written)."""
    side, dtype = plan.matmul, plan.dtype
    a, b = (torch.randn(side, side, device=report.device, dtype=dtype) for _ in range(2))
    c = torch.empty_like(a)
    source = torch.randn(plan.stream * MIB // 4, device=report.device)
    target = torch.empty_like(source)

    def matmul() -> None:
        for _ in range(REPEATS):
            torch.mm(a, b, out=c)

    def copy() -> None:
        for _ in range(REPEATS):
            target.copy_(source)

    times = report.time({"matmul": matmul, "copy": copy})
    flops, moved = 2 * side**3 * REPEATS, 2 * source.nbytes * REPEATS
    return [
        {
            "matmul_tflops": flops / 1e9 / times.median_ms("matmul"),
            "copy_gbps": moved / 1e6 / times.median_ms("copy"),
        }
    ]


def roof_of(report: Report) -> Roof | None:
    """Return the measured limits, if they were measured."""
    for row in report.tables.get("limits", []):
        return Roof(1e12 * row["matmul_tflops"], 1e9 * row["copy_gbps"])
    return None


def kernels(report: Report, plan: Plan) -> Rows:
    """Which kernels of torch take the attention of `kvlab.model`: a prompt, a step, and a prompt behind a prefix.

    Only what is behind a prefix needs a mask, which not every kernel takes.
    """
    shape = plan.shapes[-1]

    def taken(backend: SDPBackend, new: int, before: int) -> bool:
        q = torch.randn(1, shape.heads, new, shape.head_dim, device=report.device, dtype=plan.dtype)
        k = torch.randn(1, shape.kv_heads, before + new, shape.head_dim, device=report.device, dtype=plan.dtype)
        mask = torch.ones(new, before + new, dtype=torch.bool, device=report.device).tril(before)
        masked: dict[str, Any] = {"attn_mask": mask} if before and new > 1 else {"is_causal": new > 1}
        try:
            with warnings.catch_warnings(), sdpa_kernel(backend):
                warnings.simplefilter("ignore")
                F.scaled_dot_product_attention(q, k, k, **masked, enable_gqa=shape.heads != shape.kv_heads)
        except RuntimeError:  # it does not take these shapes, or this device
            return False
        return True

    cases = {"prefill": (64, 0), "decode": (1, 64), "behind a prefix": (15, 64)}
    return [
        {"attention": name, **{b.name.removesuffix("_ATTENTION").lower(): taken(b, *sizes) for b in BACKENDS}}
        for name, sizes in cases.items()
    ]
