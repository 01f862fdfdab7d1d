"""Prefill and decode of a model by length, and how far that is from the roof."""

from __future__ import annotations

from typing import Any

import torch

from kvlab.lab.bench.gpu.plan import Plan
from kvlab.lab.bench.gpu.report import Report, Rows
from kvlab.lab.gpu_model import Roof, Shape, Work, decode_work, prefill_work
from kvlab.model import Llama


def prompt_of(model: Llama, tokens: int, seed: int = 0) -> list[int]:
    """Return random tokens; a shorter prompt is a prefix of a longer one."""
    seeded = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, model.config.vocab_size, (tokens,), generator=seeded).tolist()
    return ids


def prefill(report: Report, shape: Shape, model: Llama, tokens: int) -> Rows:
    """One prompt, all of it computed, the logits of its last token."""
    prompt, kv = torch.tensor([prompt_of(model, tokens)], device=model.device), model.new_kv(tokens)
    ms = report.time({"prefill": lambda: model(prompt, kv, last_only=True)}).median_ms("prefill")
    return [{"shape": shape.name, "tokens": tokens, "ms": ms, "tok_s": 1000 * tokens / ms}]


def decode(report: Report, shape: Shape, model: Llama, context: int, batch: int, steps: int) -> Rows:
    """Greedy steps in a row, each with the token of the one before, which never leaves the device."""
    kv = model.new_kv(context + steps, batch).normal_()
    first = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)

    def decode() -> None:
        token = first
        for step in range(steps):
            token = model(token, kv, context + step, last_only=True).argmax(-1)

    ms = report.time({"decode": decode}).median_ms("decode") / steps
    return [{"shape": shape.name, "context": context, "batch": batch, "ms": ms, "tok_s": 1000 * batch / ms}]


def activation_bytes(shape: Shape, plan: Plan, tokens: int) -> float:
    """About what a prefill needs beside weights and KV: copies of the hidden state, some in FP32, and of the MLP's."""
    return tokens * plan.dtype.itemsize * (16 * shape.hidden + 4 * shape.mlp)


def roofline(report: Report, plan: Plan, roof: Roof | None, shapes: dict[str, Shape]) -> list[dict[str, Any]]:
    """Return for each measured prefill and decode step the least time that the measured limits allow."""
    if roof is None:
        return []
    size = plan.dtype.itemsize
    rows = []
    for row in report.tables.get("prefill", []):
        work = prefill_work(shapes[row["shape"]], row["tokens"], size)
        rows.append(_under(roof, row, f"prefill {row['tokens']}", work))
    for row in report.tables.get("decode", []):
        work = decode_work(shapes[row["shape"]], row["context"] + plan.steps // 2, row["batch"], size)
        rows.append(_under(roof, row, f"decode {row['batch']} at {row['context']}", work))
    return rows


def _under(roof: Roof, row: dict[str, Any], what: str, work: Work) -> dict[str, Any]:
    least = 1000 * roof.seconds(work)
    return {
        "shape": row["shape"],
        "what": what,
        "flops_per_byte": work.intensity,
        "bound": roof.bound(work),
        "roof_ms": least,
        "ms": row["ms"],
        "share": least / row["ms"],
    }
