"""What DeepSpeed has for keys and values and for weights, each tried on this machine: what it gave, or what it said.

Nothing here is known before: a try that fails is a row like any other, with the line of DeepSpeed that refused.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from transformers import DynamicCache

from kvlab.connectors import hf_models
from kvlab.connectors.transformers import CachedModel
from kvlab.model import PRETRAINED
from kvlab.stores import MemoryStore

PROMPT, ANSWER = 64, 8
SAID: Final = 240  # characters of an error's text that are kept
PACKAGES: Final = ("deepspeed", "kvlab")
ZERO: Final[dict[str, Any]] = {
    "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants it, also where nothing is trained
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # by default the small weights stay where they are
        "offload_param": {"device": "cpu"},
    },
}


@dataclass(frozen=True)
class Bench:
    """What the tries need: the package, an engine of `init_inference`, and a function that loads the plain model."""

    deepspeed: Any
    engine: Any
    load: Callable[[], Any]


def run(
    deepspeed: Any, engine: Any, load: Callable[[], Any], names: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Try what is named, by default all of `TRIES`, in their order: the last ones change more of the process."""
    bench = Bench(deepspeed, engine, load)
    chosen = [name for name in TRIES if names is None or name in names]
    return [{"name": name, "what": TRIES[name][0], **attempt(partial(TRIES[name][1], bench))} for name in chosen]


def attempt(work: Callable[[], str]) -> dict[str, Any]:
    """Run it. Return whether it worked, what it gave or said, and the line of DeepSpeed or kvlab that refused."""
    try:
        return {"worked": True, "said": work(), "where": ""}
    except Exception as error:  # of code that is not ours
        said = f"{type(error).__name__}: {error}"
        return {"worked": False, "said": said if len(said) <= SAID else f"{said[:SAID]} …", "where": _where(error)}


def _where(error: BaseException) -> str:
    """The innermost frame in one of the two packages, but not in this file: deepspeed/inference/engine.py:634."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    return next((place for frame in reversed(frames) if (place := _place(frame.filename, frame.lineno))), "")


def _place(file: str, line: int | None) -> str:
    for name in PACKAGES:
        root = Path(getattr(sys.modules.get(name), "__file__", None) or "/nowhere").parent
        if Path(file).is_relative_to(root) and root.name == name:
            return f"{Path(file).relative_to(root.parent).as_posix()}:{line}"
    return ""


# --- the tries ------------------------------------------------------------------------------------
def _kernels(bench: Bench) -> str:
    engine = bench.deepspeed.init_inference(bench.load(), dtype=torch.float32, replace_with_kernel_inject=True)
    return f"{type(engine.module).__name__} with {type(engine.module.model.layers[0]).__name__}"


def _longer(bench: Bench) -> str:
    engine = bench.deepspeed.init_inference(bench.load(), dtype=torch.float32, replace_with_kernel_inject=False)
    prompt = torch.arange(1, 1101)[None]
    engine.generate(prompt, max_new_tokens=1, do_sample=False)  # by position it is not looked at
    return f"{engine.generate(input_ids=prompt, max_new_tokens=1, do_sample=False).shape[1]} tokens"


def _fastgen(bench: Bench) -> str:
    from deepspeed.inference.v2 import RaggedInferenceEngineConfig, build_hf_engine

    return type(build_hf_engine(str(PRETRAINED), RaggedInferenceEngineConfig())).__name__


def _fastgen_kv(bench: Bench, offload: bool) -> str:
    from deepspeed.inference.v2.ragged.kv_cache import BlockedKVCache
    from deepspeed.inference.v2.ragged.manager_configs import AllocationMode, KVCacheConfig, MemoryConfig

    shape = {"block_size": 64, "cache_shape": (6, 2, 64), "cache_dtype": torch.float16}  # of the shipped model
    memory = MemoryConfig(mode=AllocationMode.ALLOCATE, size=8)
    config = KVCacheConfig(**shape, max_blocks_per_allocation_group=8)
    return f"{BlockedKVCache((config,), memory, offload=offload).free_blocks} blocks"


def _fastgen_move(bench: Bench, name: str) -> str:
    from deepspeed.inference.v2.ragged.kv_cache import BlockedKVCache

    blocks = BlockedKVCache.__new__(BlockedKVCache)  # `__init__` takes memory of a GPU
    return f"{getattr(blocks, name)([0, 1, 2])}"


def _around_engine(bench: Bench) -> str:
    return repr(CachedModel(bench.engine, MemoryStore()))


def _zero_engine(bench: Bench) -> Any:
    engine, *_ = bench.deepspeed.initialize(model=bench.load(), config=ZERO)
    engine.eval()
    return engine


def _zero(bench: Bench) -> str:
    prompt = torch.arange(100, 100 + PROMPT)[None]
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": ANSWER, "do_sample": False}
    module = _zero_engine(bench).module
    kv: Any = DynamicCache(config=module.config)
    output = module.generate(prompt, **settings, **{hf_models.CACHE_NAME: kv})
    same = torch.equal(output, bench.load().generate(prompt, **settings))
    weights: list[Any] = list(module.parameters())
    offloaded = sum(weight.ds_tensor.numel() for weight in weights)
    places = sorted({f"{weight.ds_tensor.device}" for weight in weights})
    planes = [plane for layer in kv.layers for plane in (layer.keys, layer.values)]
    return (
        f"same tokens: {same}; weights: {sum(weight.ds_numel for weight in weights):,}, offloaded to "
        f"{', '.join(places)}: {offloaded:,}, in the module between calls: {sum(w.numel() for w in weights):,}; KV: "
        f"{sum(plane.nbytes for plane in planes):,} bytes on {planes[0].device}, all in the cache of transformers"
    )


def _around_zero(bench: Bench) -> str:
    return repr(CachedModel(_zero_engine(bench).module, MemoryStore()))


TRIES: Final[dict[str, tuple[str, Callable[[Bench], str]]]] = {
    "kernel injection": (
        "init_inference(replace_with_kernel_inject=True): layers of DeepSpeed, which keep KV in a workspace",
        _kernels,
    ),
    "long prompt": (
        "generate(input_ids=…) with 1,100 tokens and max_out_tokens as it is by default",
        _longer,
    ),
    "FastGen": ("build_hf_engine: the engine with paged KV, on the shipped model", _fastgen),
    "FastGen, paged KV": (
        "BlockedKVCache: the paged KV of FastGen by itself, 8 blocks of 64 tokens",
        partial(_fastgen_kv, offload=False),
    ),
    "FastGen, paged KV with offload": (
        "BlockedKVCache(offload=True): the same, of which blocks may be moved to host memory",
        partial(_fastgen_kv, offload=True),
    ),
    "FastGen, offload": (
        "BlockedKVCache.offload: move three blocks to host memory",
        partial(_fastgen_move, name="offload"),
    ),
    "FastGen, restore": (
        "BlockedKVCache.restore: bring three blocks back",
        partial(_fastgen_move, name="restore"),
    ),
    "connector around the engine": ("CachedModel(engine), not engine.module", _around_engine),
    "ZeRO stage 3": (
        "deepspeed.initialize with offload_param to the CPU: weights out of the module between uses",
        _zero,
    ),
    "connector around ZeRO stage 3": ("CachedModel(engine.module) of that engine", _around_zero),
}


# --- where it is written --------------------------------------------------------------------------
def sources() -> dict[str, str]:
    """The lines of the installed DeepSpeed behind what is said about it: file:line in the package."""
    from deepspeed.inference.config import DeepSpeedInferenceConfig
    from deepspeed.inference.engine import InferenceEngine
    from deepspeed.inference.v2.ragged.manager_configs import DSStateManagerConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "generate calls the model of transformers": _line(InferenceEngine._generate, "self.module.generate("),
        "the limit of a prompt": _line(InferenceEngine._generate, "self._config.max_out_tokens:"),
        "its default": _line(DeepSpeedInferenceConfig, "max_out_tokens: int"),
        "ZeRO offloads parameters": _line(DeepSpeedZeroConfig, "offload_param: "),
        "ZeRO offloads the optimizer": _line(DeepSpeedZeroConfig, "offload_optimizer: "),
        "FastGen's setting for KV": _line(DSStateManagerConfig, "offload: bool"),
        "FastGen's setting is unsupported": _line(DSStateManagerConfig, "Currently unsupported"),
    }


def _line(thing: Any, words: str) -> str:
    """The first line of a class or function that has these words; "" if none has."""
    lines, start = inspect.getsourcelines(thing)
    found = next((start + i for i, line in enumerate(lines) if words in line), None)
    return "" if found is None else _place(inspect.getsourcefile(thing) or "", found)
