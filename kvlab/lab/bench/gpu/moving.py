"""Bytes on their way to the device: bare copies, conversions, and blocks from a tier into pages."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import torch
from torch import Tensor

from kvlab.cache import DistributedKVCache
from kvlab.core import precisions
from kvlab.core.keys import KVSpec
from kvlab.engine.fetch import Fetch
from kvlab.engine.pages import PAGE_TOKENS, PagePool
from kvlab.engine.prefill import Place
from kvlab.engine.tiers import TieredCache
from kvlab.errors import KVLabError
from kvlab.lab.bench.gpu.compute import prompt_of
from kvlab.lab.bench.gpu.limits import MIB, roof_of
from kvlab.lab.bench.gpu.plan import Plan
from kvlab.lab.bench.gpu.report import Report, Rows
from kvlab.lab.gpu_model import Shape
from kvlab.model import Llama
from kvlab.stores import MemoryStore

CHUNK_TOKENS = 64
COPIES = 8


def h2d(report: Report, mib: int, pinned: bool) -> Rows:
    """One copy of host memory to the device, waited for."""
    source = torch.ones(mib * MIB, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty_like(source, device=report.device, pin_memory=False)
    times = report.time({"copy": lambda: target.copy_(source, non_blocking=pinned)})
    same(target.cpu(), source)
    return [{"pinned": pinned, "mib": mib, "gbps": mib * MIB / 1e6 / times.median_ms("copy")}]


def cast(report: Report, plan: Plan, precision: str) -> Rows:
    """KV out of the parts of a precision that are on the device, into the dtype of the model.

    The same numbers must come out as on a CPU. Copies of all that take turns, more than a device's cache holds.
    """
    shape, mib = plan.cast
    tokens = max(1, mib * MIB // (shape.kv_bytes(plan.dtype.itemsize) * CHUNK_TOKENS)) * CHUNK_TOKENS
    seeded = torch.Generator().manual_seed(0)
    kv = torch.randn(shape.layers, 2, shape.kv_heads, tokens, shape.head_dim, generator=seeded).to(plan.dtype)
    arrays = precisions.to_parts(kv, precision, 1)
    device = torch.device(report.device)
    copies = [(precisions.to_device(arrays, device), torch.empty_like(kv, device=device)) for _ in range(COPIES)]

    def convert() -> None:
        for parts, out in copies:
            precisions.convert(parts, precision, 1, out)

    seconds = report.time({"cast": convert}).median_ms("cast") / 1000 / COPIES
    expected = torch.empty_like(kv)
    precisions.from_parts(arrays, precision, 1, expected)
    for _, out in copies:
        same(out.cpu(), expected)
    moved, roof = sum(part.nbytes for part in arrays) + kv.nbytes, roof_of(report)
    return [
        {
            "record": precision,
            "mib": kv.nbytes / MIB,
            "gbps": kv.nbytes / 1e9 / seconds,
            "share_of_copy": None if roof is None else moved / roof.bytes_per_s / seconds,
        }
    ]


def load_path(report: Report, plan: Plan, shape: Shape, model: Llama, tier: str, precision: str) -> Rows:
    """Blocks from a tier into the pages that a model reads, beside a bare copy of as many bytes out of pinned memory.

    What is in the pages afterwards must be what was stored, bit for bit, both before and after the measurement.
    """
    spec = spec_of(shape, model)
    B = spec.block_tokens(precision)
    mib = plan.load if precision == plan.precision else plan.load / 4  # of what is rounded: the CPU is slow at that
    blocks = max(1, math.ceil(mib * MIB / (B * spec.kv_bytes_per_token(plan.precision))))
    tokens = blocks * B
    with tiers(shape, model, precision, MemoryStore(), host_bytes=host_bytes(spec, tokens, precision)) as cache:
        table = PagePool(model, tokens // PAGE_TOKENS).new_table((), tokens)
        pages = table.read(tokens)  # a view: what the model reads
        prompt, stored = prompt_of(model, tokens), pages.normal_().clone()
        if cache.save(prompt, stored) != tokens // B:
            raise KVLabError("the tiers did not take all blocks")
        expected = rounded(cache, stored)
        keys = cache.namespace.keys(prompt)
        places = [Place(table, i * B, (i + 1) * B) for i in range(blocks)]
        bare = torch.ones(blocks * part_bytes(cache), dtype=torch.uint8, pin_memory=report.device == "cuda")
        target = torch.empty_like(bare, device=report.device, pin_memory=False)

        def load() -> Fetch:
            with cache.fetch(keys, [tier] * blocks, [place.out for place in places]) as fetch:
                if not all(fetch.finish()):
                    raise KVLabError(f"a block is missing: {Counter(fetch.reasons)}")
            for place in places:
                place.write()
            return fetch

        def check() -> Fetch:
            pages.zero_()
            fetch = load()
            same(pages, expected)
            return fetch

        check()
        times = report.time({"load": load, "copy": lambda: target.copy_(bare, non_blocking=True)})
        stages = dict.fromkeys(("fetch", "unpack", "copy"), 0.0)
        for span in check().trace:
            stages[span.stage] += 1000 * (span.end - span.begin)
    ms = times.median_ms("load")
    return [
        {
            "shape": shape.name,
            "tier": tier,
            "record": precision,
            "mib": bare.nbytes / MIB,
            "ms": ms,
            "gbps": bare.nbytes / 1e6 / ms,
            "ratio": times.ratio("copy", "load"),
            **{f"{stage}_ms": took for stage, took in stages.items()},
        }
    ]


# --- helpers --------------------------------------------------------------------------------------
def spec_of(shape: Shape, model: Llama) -> KVSpec:
    """Return the spec of a model's KV. Its weights are not hashed: no other process sees these blocks."""
    c, fingerprint = model.config, hashlib.sha256(f"bench gpu {shape.name}".encode()).digest()
    return KVSpec(c.num_hidden_layers, c.num_key_value_heads, c.head_dim, model.dtype, fingerprint)


def tiers(
    shape: Shape, model: Llama, precision: str, store: MemoryStore, host_bytes: int = 0, planner: bool = False
) -> TieredCache:
    """Return tiers in front of a store in this process."""
    inner = DistributedKVCache(store=store, model=spec_of(shape, model), precision=precision, compress=False)
    return TieredCache(inner, host_bytes, planner=planner, pinned=model.device.type == "cuda")


def host_bytes(spec: KVSpec, tokens: int, precision: str) -> int:
    """Return the size of a host tier with room for so many tokens and some more, with the scales of their blocks."""
    return int(1.25 * (tokens + 4 * spec.block_tokens(precision)) * spec.kv_bytes_per_token(precision))


def part_bytes(cache: TieredCache) -> int:
    """Return the bytes of a block that go to the device."""
    return precisions.layout_bytes(precisions.layout(cache.precision, cache.store.block_shape, plane_axis=1))


def rounded(cache: TieredCache, kv: Tensor) -> Tensor:
    """Return what a load of this KV [L, P, H, T, D] must give: its blocks converted and converted back on a CPU."""
    B, expected = cache.block_tokens, torch.empty(kv.shape, dtype=kv.dtype)
    for i in range(kv.shape[3] // B):
        block = slice(i * B, (i + 1) * B)
        precisions.from_parts(cache.store.parts_of(kv[:, :, :, block]), cache.precision, 1, expected[:, :, :, block])
    return expected.to(kv.device)


def same(got: Tensor, expected: Tensor) -> None:
    """Raise if two tensors differ in one bit."""
    if not torch.equal(got.view(torch.uint8), expected.view(torch.uint8)):
        raise KVLabError("expected the same bits on the device as were stored, got others")
