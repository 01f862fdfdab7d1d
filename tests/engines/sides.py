"""The two halves of the connector without an engine, over a store in memory."""

from __future__ import annotations

import time
from types import SimpleNamespace as Fake
from typing import Any

import torch

from kvlab.connectors.shadow import Shadow
from kvlab.connectors.vllm.namespace import Layout, block_key
from kvlab.connectors.vllm.protocol import Blocks, Work
from kvlab.connectors.vllm.scheduler import SchedulerSide
from kvlab.connectors.vllm.worker import WorkerSide
from kvlab.core import record
from kvlab.core.record import Format
from kvlab.stores import MemoryStore

B, L, BLOCKS, SPACE = 4, 3, 20, b"s" * 32
FMT = Format("opaque")
LAYOUT = Layout("vllm 0.32.0", "cpu", "vec", "CPU_ATTN", "float32", B, "sha256", ((2, B, 5),) * L)


def hashes(count: int, name: str = "h") -> list[bytes]:
    return [f"{name}{i}".encode().ljust(32, b".") for i in range(count)]


def request(name: str, tokens: int, **members: Any) -> Any:
    defaults = {"num_preemptions": 0, "lora_request": None, "skip_reading_prefix_cache": False}
    return Fake(request_id=name, num_tokens=tokens, block_hashes=hashes(tokens // B), **{**defaults, **members})


def scheduler(store: Any, ranks: int = 1, share: float = 0.0, clock: Any = time.monotonic) -> SchedulerSide:
    side = SchedulerSide(store, B, Shadow(share, "fp32"), lambda _: b"", clock, wait_s=20.0)
    side.enter(SPACE, ranks)
    return side


def step(side: SchedulerSide, *scheduled: tuple[str, int, int]) -> Work:
    """A step of the engine with requests of (name, computed tokens, scheduled tokens); block i is at 100 + i."""
    table = Fake(get_block_ids=lambda name: ([100 + i for i in range(50)],))
    cached = Fake(req_ids=[name for name, _, _ in scheduled], num_computed_tokens=[c for _, c, _ in scheduled])
    tokens = {name: n for name, _, n in scheduled}
    return side.work(
        Fake(
            scheduled_cached_reqs=cached,
            scheduled_new_reqs=[],
            num_scheduled_tokens=tokens,
            kv_connector_block_state=table,
        )
    )


def put(store: MemoryStore, indices: Any, rank: int = 0) -> None:
    for i in indices:
        key = block_key(SPACE, hashes(50)[i], b"", rank)
        value = record.encode_opaque(torch.full((L, 40), i + rank / 10).view(torch.int32).numpy().view("<u4"), key, FMT)
        store.put_many([key], [value])


def worker(store: MemoryStore, rank: int = 0, share: float = 0.0, fmt: Format = FMT) -> WorkerSide:
    tensors = [torch.zeros(BLOCKS, 2, B, 5) for _ in range(L)]
    return WorkerSide(store, store, fmt, LAYOUT, tensors, rank, Shadow(share, "fp32"))


def load(side: WorkerSide, indices: list[int], ids: list[int], name: str = "a") -> set[str]:
    done: set[str] = set()
    side.start_loads(Work(SPACE, loads=[Blocks(name, b"", [hashes(50)[i] for i in indices], ids)]))
    wait_until(lambda: done.update(side.finished()) or name in done)
    return done


def wait_until(holds: Any, timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)
