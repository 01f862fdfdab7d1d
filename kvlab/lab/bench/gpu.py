"""What a GPU changes: prefill, copies to the device, the way of a block, and time to first token from each tier.

python -m kvlab bench gpu --json

One command, no network, no server, at most five minutes: after BUDGET_S it skips what is left and says so. Without a
GPU the same steps run on the CPU, with small models, which is how they are tested. The models have random weights,
which take the same time as learned ones.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvlab.cache import DistributedKVCache
from kvlab.core.keys import KVSpec
from kvlab.engine import Generation, generate
from kvlab.engine.pages import PAGE_TOKENS, PagePool
from kvlab.engine.tiers import TieredCache
from kvlab.errors import ConfigError
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.timing import Timings, time_rounds
from kvlab.model import Llama, LlamaConfig
from kvlab.stores import MemoryStore

ABOUT = (
    "prefill: milliseconds for a prompt. h2d: GB/s of a copy from host memory. load_path: GB/s from records in a store "
    "in this process, checked and unpacked, into pages on the device, and their ratio to a bare copy out of pinned (on "
    "a CPU: any) memory. ttft: cold, all computed, against a prefix from a tier; the last 16 tokens are always "
    "computed. break_even: KV bytes of a token x prefill tokens a second at the longest prompt of `prefill`: over a "
    "slower wire, computing is faster than fetching"
)
BUDGET_S = 240.0
SUFFIX = 16
MIB = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What is measured: by default for a GPU or for a CPU.

    Attributes:
        shapes: (name, hidden, layers, heads, KV heads, head dim, MLP) of a model.
        tokens: lengths of prompts.
        copies: sizes in MiB.
    """

    shapes: Sequence[tuple[str, int, int, int, int, int, int]]
    tokens: Sequence[int]
    copies: Sequence[int]
    dtype: torch.dtype
    rounds: int = 5


PLANS = {
    "cuda": Plan(
        (
            ("about 1B", 2048, 16, 32, 8, 64, 8192),
            ("about 3B", 3072, 28, 24, 8, 128, 8192),
            ("about 8B", 4096, 32, 32, 8, 128, 14336),
        ),
        (512, 2048, 8192, 16384),
        (1, 16, 256),
        torch.bfloat16,
    ),
    "cpu": Plan(
        (("about 5M", 256, 6, 4, 2, 64, 704), ("about 25M", 512, 8, 8, 2, 64, 1408)),
        (256, 1024),
        (1, 16),
        torch.float32,
        3,
    ),
}


@dataclass
class _Report:
    """Rows by table, and what was skipped because the time was over."""

    deadline: float
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    times: list[Timings] = field(default_factory=list)

    def add(self, table: str, what: str, step: Callable[[], tuple[dict[str, Any], Timings]]) -> None:
        """Run a step and keep its row, if there is time left."""
        rows = self.tables.setdefault(table, [])
        if time.monotonic() > self.deadline:
            self.skipped.append(f"{table} {what}")
            return
        row, times = step()
        rows.append(row)
        self.times.append(times)


def run(device: str | None = None, plan: Plan | None = None, budget_s: float = BUDGET_S) -> dict[str, Any]:
    """Measure on a device; by default a GPU if there is one.

    Raises:
        ConfigError: there is no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in PLANS or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"expected cpu, or cuda on a machine with an NVIDIA GPU, got {device!r}")
    plan = plan or PLANS[device]
    report = _Report(time.monotonic() + budget_s)
    with torch.inference_mode():
        for mib in plan.copies:
            for pinned in (True, False) if device == "cuda" else (False,):
                report.add("h2d", f"{mib} MiB", functools.partial(_h2d, device, mib, pinned, plan.rounds))
        for shape in plan.shapes:
            _measure(report, shape[0], _model(shape, plan, device), plan)
            if device == "cuda":
                torch.cuda.empty_cache()  # nothing refers to that model any more
    prefill = report.tables.get("prefill", [])
    return {
        "about": ABOUT,
        "device": device,
        "store": "memory:// (records in this process)",
        "dtype": str(plan.dtype).removeprefix("torch."),
        **{table: report.tables.get(table, []) for table in ("prefill", "h2d", "load_path", "ttft")},
        "break_even": [_break_even(shape, plan.dtype, prefill) for shape in plan.shapes if _rows_of(shape[0], prefill)],
        "skipped": report.skipped,
        "aa_ratio": max((t.aa_ratio for t in report.times), key=lambda ratio: abs(ratio - 1), default=1.0),
        "noisy": any(t.noisy for t in report.times),
        "machine": describe_machine(),
        "versions": versions(),
    }


def _measure(report: _Report, name: str, model: Llama, plan: Plan) -> None:
    """All steps that need a model."""
    for tokens in plan.tokens:
        report.add("prefill", f"{name}, {tokens}", lambda n=tokens: _prefill(name, model, n, plan.rounds))  # type: ignore[misc]
    longest = plan.tokens[-1]
    report.add("load_path", name, lambda: _load_path(name, model, longest, plan.rounds))
    for tokens in plan.tokens[1:]:
        for tier in ("device", "host", "store"):
            step = functools.partial(_ttft, name, model, tier, tokens - SUFFIX, plan.rounds)
            report.add("ttft", f"{name}, {tier}, {tokens}", step)


def _model(shape: tuple[str, int, int, int, int, int, int], plan: Plan, device: str) -> Llama:
    """A model with random weights."""
    _, hidden, layers, heads, kv_heads, head_dim, mlp = shape
    config = LlamaConfig(4096, hidden, mlp, layers, heads, kv_heads, head_dim, plan.tokens[-1] + 2 * SUFFIX)
    before = torch.get_default_dtype()
    torch.set_default_dtype(plan.dtype)
    try:
        with torch.device(device):
            return Llama(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _prompt(model: Llama, tokens: int) -> list[int]:
    seeded = torch.Generator().manual_seed(tokens)
    return [int(token) for token in torch.randint(0, model.config.vocab_size, (tokens,), generator=seeded)]


# --- steps --------------------------------------------------------------------------------------
def _h2d(device: str, mib: int, pinned: bool, rounds: int) -> tuple[dict[str, Any], Timings]:
    source = torch.ones(mib * MIB, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty_like(source, device=device)

    def copy() -> None:
        target.copy_(source, non_blocking=pinned)
        _sync(target.device)

    times = time_rounds({"copy": copy}, rounds)
    return {"pinned": pinned, "mib": mib, "gbps": mib * MIB / 1e6 / times.median_ms("copy")}, times


def _prefill(name: str, model: Llama, tokens: int, rounds: int) -> tuple[dict[str, Any], Timings]:
    prompt, kv = torch.tensor([_prompt(model, tokens)], device=model.device), model.new_kv(tokens)

    def prefill() -> None:
        model(prompt, kv, last_only=True)
        _sync(model.device)

    times = time_rounds({"prefill": prefill}, rounds)
    return {"shape": name, "tokens": tokens, "ms": times.median_ms("prefill")}, times


def _load_path(name: str, model: Llama, tokens: int, rounds: int) -> tuple[dict[str, Any], Timings]:
    """Blocks from the store to pages, beside a bare copy of as many bytes."""
    on_gpu = model.device.type == "cuda"
    with _cache(model, name, tier="store") as cache:
        blocks = tokens // cache.block_tokens
        prompt = _prompt(model, blocks * cache.block_tokens)
        generate(model, prompt, 1, cache)
        keys = cache.namespace.keys(prompt)
        kv = model.new_kv(len(prompt))[:, :, 0]
        outs = list(kv.split(cache.block_tokens, dim=3))
        bare = torch.ones(kv.nbytes, dtype=torch.uint8, pin_memory=on_gpu)
        target = torch.empty_like(bare, device=model.device)

        def load() -> None:
            filled = cache.fetch(keys, ["store"] * blocks, outs).finish()
            assert all(filled)
            _sync(model.device)

        def copy() -> None:
            target.copy_(bare, non_blocking=True)
            _sync(model.device)

        times = time_rounds({"load": load, "copy": copy}, rounds)
    gbps = kv.nbytes / 1e6 / times.median_ms("load")
    return {"shape": name, "mib": kv.nbytes / MIB, "gbps": gbps, "ratio": times.ratio("copy", "load")}, times


def _ttft(name: str, model: Llama, tier: str, prefix: int, rounds: int) -> tuple[dict[str, Any], Timings]:
    prompt = _prompt(model, prefix + SUFFIX)
    pages = -(-(len(prompt) + 1) // PAGE_TOKENS)
    with _cache(model, name, tier) as cache:
        warm_pool = PagePool(model, pages, cache.namespace if tier == "device" else None)
        cold = functools.partial(generate, model, prompt, 1, pool=PagePool(model, pages))
        warm = functools.partial(generate, model, prompt, 1, None if tier == "device" else cache, pool=warm_pool)
        assert _tier_of(warm()) == "" and _tier_of(warm()) == tier
        times = time_rounds({"cold": cold, "warm": warm}, rounds, seconds_of=lambda result: result.ttft_s)
    row = {"shape": name, "tier": tier, "prefix_tokens": prefix}
    return {**row, "cold_ms": times.median_ms("cold"), "warm_ms": times.median_ms("warm")}, times


def _tier_of(result: Generation) -> str:
    """The tier of a prefix that has only one."""
    return next(iter(result.sources), "")


def _cache(model: Llama, name: str, tier: str) -> TieredCache:
    """A tiered cache whose prefix can only come from one tier. Weights are not hashed: no other process sees it."""
    c, on_gpu = model.config, model.device.type == "cuda"
    fingerprint = hashlib.sha256(f"bench gpu {name}".encode()).digest()
    spec = KVSpec(c.num_hidden_layers, c.num_key_value_heads, c.head_dim, model.dtype, fingerprint)
    precision = "bf16" if model.dtype == torch.bfloat16 else "fp32"
    inner = DistributedKVCache(store=MemoryStore(), model=spec, precision=precision, compress=False)
    host_bytes = 0 if tier == "store" else 4 << 30 if on_gpu else 256 << 20
    write = "through" if tier == "store" else "back"
    return TieredCache(inner, host_bytes, planner=False, pinned=on_gpu, write=write)


def _rows_of(name: str, prefill: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in prefill if row["shape"] == name]


def _break_even(
    shape: tuple[str, int, int, int, int, int, int], dtype: torch.dtype, prefill: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    name, _, layers, _, kv_heads, head_dim, _ = shape
    longest = _rows_of(name, prefill)[-1]
    bytes_per_token = layers * 2 * kv_heads * head_dim * dtype.itemsize
    return {"shape": name, "gbps": bytes_per_token * longest["tokens"] / longest["ms"] / 1e6}
