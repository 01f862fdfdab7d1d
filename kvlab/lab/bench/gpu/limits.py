"""What the device reaches at most, measured: a matmul and a copy, and which attention kernels it has."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvlab.errors import KVLabError
from kvlab.lab.bench.gpu.plan import Plan
from kvlab.lab.bench.gpu.report import Report, Rows
from kvlab.lab.gpu_model import Roof
from kvlab.model import attention

MIB = 1 << 20
REPEATS = 8
"""Calls in a row, so that starting them takes no time of its own."""
WARM_UP_S = 1.0
"""An idle GPU has a low clock."""
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

    begin = time.monotonic()
    while report.device == "cuda" and time.monotonic() - begin < WARM_UP_S:
        matmul()
        report.sync()
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
    """Milliseconds of the first call with a new length, for each kernel of torch; None if it does not take the case.

    The cases are a prompt, a step, and a prompt behind a prefix. Some kernels need a plan for each length. First, what
    `kvlab.model` takes on this device is compared with plain FP32 on the CPU.

    Raises:
        KVLabError: it computes something else.
    """
    for new, before in ((15, 0), (1, 19), (15, 5)):
        q, k, v = _queries_and_kv(report, plan, new, before)
        expected = attention(q.cpu().float(), k.cpu().float(), v.cpu().float(), before)
        if not torch.allclose(attention(q, k, v, before).cpu().float(), expected, rtol=0.02, atol=0.02):
            raise KVLabError(f"attention of {new} tokens behind {before} is not that of the CPU")
    cases = {"prefill": (1024, 0), "decode": (1, 1024), "behind a prefix": (15, 1024)}
    return [
        {"attention": name, **{_name(b): _first_call_ms(report, plan, b, *sizes) for b in BACKENDS}}
        for name, sizes in cases.items()
    ]


def _name(backend: SDPBackend) -> str:
    return str(backend.name).removesuffix("_ATTENTION").lower() + "_ms"


def _first_call_ms(report: Report, plan: Plan, backend: SDPBackend, new: int, before: int) -> float | None:
    took = 0.0
    for more in (0, 16):  # with the first length, the kernel itself is loaded
        q, k, v = _queries_and_kv(report, plan, new if new == 1 or before else new + more, before and before + more)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(before + more)
        masked: dict[str, Any] = {"attn_mask": mask} if before and new > 1 else {"is_causal": new > 1}
        report.sync()
        begin = time.perf_counter()
        try:
            with warnings.catch_warnings(), sdpa_kernel(backend):
                warnings.simplefilter("ignore")
                F.scaled_dot_product_attention(q, k, v, **masked, enable_gqa=q.shape[1] != k.shape[1])
        except RuntimeError:  # it does not take these shapes, or this device
            return None
        report.sync()
        took = time.perf_counter() - begin
    return 1000 * took


def _queries_and_kv(report: Report, plan: Plan, new: int, before: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = plan.shapes[-1]
    sizes = ((shape.heads, new), (shape.kv_heads, before + new), (shape.kv_heads, before + new))
    q, k, v = (
        torch.randn(1, heads, tokens, shape.head_dim, device=report.device, dtype=plan.dtype) for heads, tokens in sizes
    )
    return q, k, v
