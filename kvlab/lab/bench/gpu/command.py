"""`bench gpu`: all steps in their order, and the result."""

from __future__ import annotations

import functools
import math
import time
from typing import Any

import torch

from kvlab.errors import ConfigError
from kvlab.lab.bench.gpu.compute import activation_bytes, decode, prefill, roofline
from kvlab.lab.bench.gpu.limits import kernels, limits, roof_of
from kvlab.lab.bench.gpu.moving import cast, h2d, load_path
from kvlab.lab.bench.gpu.plan import CROSSOVER, PLANS, SHIPPED, Plan, random_model, shipped_model
from kvlab.lab.bench.gpu.report import Report, Rows
from kvlab.lab.bench.gpu.serving import SUFFIX, choices, ttft
from kvlab.lab.gpu_model import Shape, break_even_gbps, crossover, fitted, sides
from kvlab.lab.machine import describe_machine, versions
from kvlab.model import Llama

ABOUT = (
    "limits: a matmul, and a copy within the device (bytes read and written), in the models' dtype. attention: "
    "milliseconds of the first call of a kernel of torch with a new length, None if it does not take it; the models "
    "use flash where they can, and never cudnn. h2d: GB/s of one copy from host memory. cast: GB/s of KV out of "
    "records of a precision that are on the device; share_of_copy: by the bytes that move, at the bandwidth of the "
    "copy in limits. prefill, decode: milliseconds of a prompt and of a step. load_path: blocks from a tier in this "
    "process into the pages that the model reads, compared bit for bit; ratio: time of a bare copy out of pinned "
    "(on a CPU: any) memory by that of the load; fetch_ms, unpack_ms, copy_ms: of the stages of one load, which "
    f"overlap. ttft: cold, all computed, against a prefix from a tier; the {SUFFIX} tokens behind it are always "
    "computed. planner: a store that gives at most so many GB/s; regret: time of its plans by that of always "
    "fetching or always computing, whichever is faster. roofline: the least time that the limits allow, and its "
    "share of the measured one. break_even: KV bytes of a token x prefill tokens a second at the longest prompt: "
    "over a slower wire, computing is faster. crossover: from how many tokens on fetching is faster, over a wire "
    "with a millisecond until the first byte, computed from the measured prefills; longer prompts are extrapolated. "
    "aa_ratio: of the same work measured twice, the worst of all steps; noisy_steps: where it is over 10 % away from "
    "1. device cpu: no GPU was found, and small models test the steps; the numbers say nothing about a GPU"
)
TABLES = ("limits", "attention", "h2d", "cast", "prefill", "decode", "load_path", "ttft", "planner")


def run(device: str | None = None, plan: Plan | None = None, budget_s: float | None = None) -> dict[str, Any]:
    """Measure on a device; by default a GPU if there is one.

    Args:
        budget_s: seconds after which no step begins; by default the plan's.

    Returns:
        Tables, what was skipped and what failed, each with its reason; "ok" is false if a step failed.

    Raises:
        ConfigError: there is no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in PLANS or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"expected cpu, or cuda on a machine with an NVIDIA GPU, got {device!r}")
    plan, begin = plan or PLANS[device], time.monotonic()
    ends = begin + (plan.budget_s if budget_s is None else budget_s)
    report, shapes = Report(device, plan.rounds, ends, plan.step_s), dict[str, Shape]()
    machine = describe_machine()  # now, because after some errors a device says nothing any more
    with torch.inference_mode():
        _without_model(report, plan)
        for name, shape, make in _models(plan, device):
            _with_model(report, plan, name, shape, make, shapes)
            report.clean()  # nothing refers to that model any more
    conclusions = _conclusions(report, plan, shapes)
    return {
        "about": ABOUT,
        "device": device,
        "store": "memory:// (records in this process)",
        "dtype": str(plan.dtype).removeprefix("torch."),
        **{table: report.tables.get(table, []) for table in TABLES},
        **conclusions,
        "skipped": report.skipped,
        "failed": report.failed,
        "ok": not report.failed,
        "seconds": time.monotonic() - begin,
        "aa_ratio": max((t.aa_ratio for _, t in report.times), key=lambda ratio: abs(ratio - 1), default=1.0),
        "noisy": any(t.noisy for _, t in report.times),
        "noisy_steps": sorted({step for step, t in report.times if t.noisy}),
        "machine": machine,
        "versions": versions(),
    }


def _models(plan: Plan, device: str) -> list[tuple[str, Shape | None, Any]]:
    """The shipped model, whose shape is known once it is loaded, then random weights, small ones first."""
    others = [(shape.name, shape, functools.partial(random_model, shape, plan, device)) for shape in plan.shapes]
    return [(SHIPPED, None, functools.partial(shipped_model, plan, device)), *others]


def _without_model(report: Report, plan: Plan) -> None:
    report.add("limits", "", lambda: limits(report, plan))
    report.add("attention", "", lambda: kernels(report, plan))
    for mib in plan.copies:
        for pinned in (True, False) if report.device == "cuda" else (False,):
            what = f"{mib} MiB, {'pinned' if pinned else 'pageable'}"
            report.add("h2d", what, functools.partial(h2d, report, mib, pinned))
    for precision in plan.precisions:
        report.add("cast", precision, functools.partial(cast, report, plan, precision))


def _with_model(
    report: Report, plan: Plan, name: str, shape: Shape | None, make: Any, shapes: dict[str, Shape]
) -> None:
    """All steps that need a model."""
    weights = 0 if shape is None else shape.parameters * plan.dtype.itemsize
    made: list[Llama] = []

    def build() -> list[dict[str, Any]]:
        made.append(make())
        report.sync()
        return []

    report.add("model", name, build, 1.05 * weights)
    if not made:
        return
    model = made.pop()
    shape = shapes[name] = shape or Shape.of(name, model.config)
    for table, what, step, need, host_need in _steps(report, plan, shape, model):
        report.add(table, f"{name}, {what}", step, need, host_need)


def _steps(report: Report, plan: Plan, shape: Shape, model: Llama) -> list[tuple[str, str, Any, float, float]]:
    """Table, name, function, bytes on the device and bytes in host memory of each step."""
    steps: list[tuple[str, str, Any, float, float]] = []
    kv = shape.kv_bytes(plan.dtype.itemsize)

    def add(table: str, what: str, function: Any, *args: Any, device: float = 0, host: float = 0) -> None:
        steps.append((table, what, functools.partial(function, *args), device, host))

    for n in plan.prefill:
        need = kv * n + activation_bytes(shape, plan, n)
        add("prefill", f"{n}", prefill, report, shape, model, n, device=need)
    for batch in plan.batches:
        for n in plan.decode:
            args = (report, shape, model, n, batch, plan.steps)
            add("decode", f"{batch} at {n}", decode, *args, device=1.1 * batch * n * kv)
    for tier, precision in (("host", plan.precision), ("store", plan.precision), ("store", "int8")):
        size = 4.0 * max(plan.load << 20, 64 * kv)
        add("load_path", f"{tier}, {precision}", load_path, report, plan, shape, model, tier, precision, host=size)
    for prefix in plan.prefixes:
        need = 4 * kv * prefix + activation_bytes(shape, plan, prefix)
        add("ttft", f"{prefix}", ttft, report, plan, shape, model, prefix, device=need, host=4.0 * kv * prefix)
    for factor in plan.slower:
        need = 2.0 * kv * max(plan.planned)
        add("planner", f"{factor:g} x break-even", choices, report, plan, shape, model, factor, device=need, host=need)
    return steps


def _conclusions(report: Report, plan: Plan, shapes: dict[str, Shape]) -> dict[str, Any]:
    """What follows from the tables. One that cannot be drawn takes nothing from what was measured."""
    regrets = sorted(row["regret"] for row in report.tables.get("planner", []))
    prefills = {name: _seconds(report, name) for name in shapes}
    report.deadline = math.inf  # it is only arithmetic
    report.add("roofline", "", lambda: roofline(report, plan, roof_of(report), shapes))
    for name, seconds in prefills.items():
        if seconds:
            report.add("break_even", name, functools.partial(_break_even, shapes[name], plan, seconds))
        if len(seconds) > 1:
            report.add("crossover", name, functools.partial(_crossovers, shapes[name], plan, seconds))
    return {
        **{table: report.tables.get(table, []) for table in ("roofline", "break_even", "crossover")},
        "planner_within_1.1": sum(regret <= 1.1 for regret in regrets) / len(regrets) if regrets else None,
        "planner_p95_regret": regrets[math.ceil(0.95 * len(regrets)) - 1] if regrets else None,
    }


def _seconds(report: Report, name: str) -> dict[int, float]:
    return {row["tokens"]: row["ms"] / 1000 for row in report.tables.get("prefill", []) if row["shape"] == name}


def _break_even(shape: Shape, plan: Plan, seconds: dict[int, float]) -> Rows:
    kv, longest = shape.kv_bytes(plan.dtype.itemsize), max(seconds)
    gbps = break_even_gbps(kv, longest, seconds[longest])
    return [{"shape": shape.name, "kv_bytes": kv, "tok_s": longest / seconds[longest], "gbps": gbps}]


def _crossovers(shape: Shape, plan: Plan, seconds: dict[int, float]) -> Rows:
    rows = []
    for wire in plan.wires:
        costs = fitted(shape.kv_bytes(plan.dtype.itemsize), seconds, wire)
        wins = {f"{row['tokens'] // 1024}K": row["wins"] for row in sides(costs, CROSSOVER)}
        at = crossover(costs)
        rows.append(
            {
                "shape": shape.name,
                "gbit_s": 8 * wire.bytes_per_s / 1e9,
                "floor_ms": 1000 * wire.latency_s,
                "from_tokens": None if math.isinf(at) else int(at),
                **wins,
            }
        )
    return rows
