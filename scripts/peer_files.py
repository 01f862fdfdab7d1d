"""What a damaged file does in kvlab's store, in LMCache's and in SGLang's: read, saved again, read again.

    sh scripts/setup.sh --engines
    pip install --target PEERS --no-deps lmcache==0.5.6 sglang==0.5.15 aiofiles==25.1.0 orjson==3.13.0 triton==3.9.0
    PYTHONPATH=PEERS .venv-engines/bin/python scripts/peer_files.py > docs/results/peer_files.json

The classes of the two projects are used as they are, without their engines. SGLang imports torchvision on the way to
its file tier, which does not use it; an empty module stands in.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

import kvlab
from kvlab.lab.machine import describe_machine
from kvlab.stores import FileStore

ABOUT = (
    "one value in a file; the file is changed (three bytes) or cut (to 1,000 bytes) by another program; read: what the "
    "next read gives; saved_again: what the next save of the same value says; read_again: what the read after it gives"
)
SIZE = 384 << 10
TOKENS = 64
VALUE = bytes(range(251)) * (SIZE // 251 + 1)


class FileTier(Protocol):
    """Saves and reads one value."""

    version: str

    def save(self) -> str:
        """Save the value; return what the store says."""

    def read(self) -> str:
        """Read the value; return what came: right, wrong, or no value."""


class KVLab:
    """One block of the shipped model, with numbers in place of KV."""

    def __init__(self, folder: Path) -> None:
        self.version = f"kvlab {kvlab.__version__}, DistributedKVCache over file://"
        spec = kvlab.spec_of(kvlab.load_model())
        self._kv = torch.randn(spec.layers, 2, spec.heads, TOKENS, spec.head_dim)
        self._cache = kvlab.DistributedKVCache(
            model=spec, precision="fp32", compress=False, store=FileStore(folder / "store", deadline_s=30.0)
        )

    def save(self) -> str:
        """See `FileTier`."""
        return f"{self._cache.save(range(TOKENS), self._kv)} block"

    def read(self) -> str:
        """See `FileTier`."""
        out, before = torch.zeros_like(self._kv), self._cache.stats()
        if self._cache.load(range(TOKENS), 0, TOKENS, out):
            return "right" if torch.equal(out, self._kv) else "WRONG BYTES AS A HIT"
        return f"miss ({', '.join(self._cache.stats().misses - before.misses)})"


def sglang(folder: Path) -> FileTier:
    """SGLang's file tier of its hierarchical cache."""
    from transformers.utils import import_utils

    import_utils.is_torchvision_available()  # asks before there is a stand-in
    sys.meta_path.insert(0, Empty("torchvision"))
    storage: Any = importlib.import_module("sglang.srt.mem_cache.hicache_storage")
    known = {
        "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "model_name": "m", "is_mla_model": False,
        "is_page_first_layout": True, "enable_storage_metrics": False, "attn_cp_rank": 0, "attn_cp_size": 1,
        "extra_config": {},
    }  # fmt: skip
    fields = inspect.signature(storage.HiCacheStorageConfig).parameters
    unknown = {name: 1 for name, field in fields.items() if field.default is field.empty and name not in known}
    tier = storage.HiCacheFile(
        storage.HiCacheStorageConfig(**{k: v for k, v in known.items() if k in fields}, **unknown), str(folder)
    )
    value = torch.frombuffer(bytearray(VALUE[:SIZE]), dtype=torch.uint8)

    class Tier:
        version = f"sglang {version('sglang')}, HiCacheFile"

        def save(self) -> str:
            return str(tier.set("key", value))

        def read(self) -> str:
            got = tier.get("key", torch.zeros(SIZE, dtype=torch.uint8))
            return told(None if got is None else bytes(got.numpy()))

    return Tier()


def lmcache(folder: Path) -> FileTier:
    """LMCache's file tier."""
    adapters: Any = importlib.import_module("lmcache.v1.distributed.l2_adapters.fs_l2_adapter")
    memory: Any = importlib.import_module("lmcache.v1.memory_management")
    api: Any = importlib.import_module("lmcache.v1.distributed.api")
    adapter = adapters.FSL2Adapter(adapters.FSL2AdapterConfig(str(folder)))
    key = api.ObjectKey(chunk_hash=bytes(32), model_name="m", kv_rank=0)

    def holder(data: bytes) -> Any:
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        about = memory.MemoryObjMetadata(raw.shape, torch.uint8, 0, SIZE, 1, shapes=[raw.shape], dtypes=[torch.uint8])
        return memory.TensorMemoryObj(raw, about, None)

    def wait(ask: Callable[[], Any]) -> Any:
        give_up = time.monotonic() + 30
        while (answer := ask()) is None:
            assert time.monotonic() < give_up, "no answer"
            time.sleep(0.01)
        return answer

    class Tier:
        version = f"lmcache {version('lmcache')}, FSL2Adapter"

        def save(self) -> str:
            task = adapter.submit_store_task([key], [holder(VALUE[:SIZE])])
            result = wait(lambda: adapter.pop_completed_store_tasks().get(task))
            return f"{result.is_successful()}, {result.bytes_transferred()} bytes written"

        def read(self) -> str:
            task = adapter.submit_lookup_and_lock_task([key], {})
            found = wait(lambda: adapter.query_lookup_and_lock_result(task))
            if not found.test(0):
                return "miss"
            into = holder(bytes(SIZE))
            task = adapter.submit_load_task([key], [into])
            if not wait(lambda: adapter.query_load_result(task)).test(0):
                return "found, and then not loaded"
            return told(bytes(into.byte_array))

    return Tier()


class Empty:
    """Finds an empty module for a name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        """Name an empty module."""
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == self._name else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        """Make it, with a class for every name that is asked of it."""

        class Module(types.ModuleType):
            def __getattr__(self, name: str) -> type:
                if name.startswith("__"):
                    raise AttributeError(name)
                return type(name, (), {})

        return Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing."""


def told(got: bytes | None) -> str:
    """Compare what came with what was saved."""
    if got is None:
        return "miss"
    return "right" if got == VALUE[:SIZE] else "WRONG BYTES AS A HIT"


def change(path: Path) -> None:
    """Change three bytes."""
    data = bytearray(path.read_bytes())
    data[-13:-10] = bytes(byte ^ 0xFF for byte in data[-13:-10])
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Keep the first 1,000 bytes."""
    os.truncate(path, 1000)


def tried(work: Callable[[], str]) -> str:
    """Return what `work` returns, or what it raises."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def rows() -> Iterator[dict[str, str]]:
    """Damage a file of each store in both ways."""
    for make in (KVLab, lmcache, sglang):
        for damage in (change, cut):
            with tempfile.TemporaryDirectory() as folder:
                tier = make(Path(folder))
                assert tier.save() and tier.read() == "right", (tier.version, tier.read())
                largest = max(
                    (file for file in Path(folder).rglob("*") if file.is_file()), key=lambda f: f.stat().st_size
                )
                damage(largest)
                steps = {"read": tried(tier.read), "saved_again": tried(tier.save), "read_again": tried(tier.read)}
                yield {"store": tier.version, "damage": damage.__name__, **steps}


if __name__ == "__main__":
    print(json.dumps({"about": ABOUT, "rows": [*rows()], "machine": describe_machine()}, indent=1))
