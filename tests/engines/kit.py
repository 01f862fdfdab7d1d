"""vLLM engines in this process, with and without the connector."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prometheus_client
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

import kvlab.model

MODEL = Path(kvlab.model.__file__).parent / "pretrained"
TEXT = (Path(kvlab.model.__file__).parent / "heldout.txt").read_text("utf-8")
PROMPTS = [TEXT[:1200], TEXT[2000:3500], TEXT[:600] + TEXT[7000:8000]]
FASTEST = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "seed": 0,
    "enforce_eager": True,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "disable_log_stats": False,
}
NEW = 24


def transfer(store: str, *, name: str = "KVLabConnector", module: str = "kvlab.connectors.vllm", **extra: Any) -> Any:
    """The setting that turns the connector on."""
    return KVTransferConfig(
        kv_connector=name,
        kv_connector_module_path=module,
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"store": store, **extra},
    )


@contextmanager
def engine(kv: Any = None, **settings: Any) -> Iterator[LLM]:
    """An engine; with `kv` from `transfer`, one with a connector. What its workers queued is written at the end."""
    llm = LLM(**{"model": str(MODEL), **FASTEST, "kv_transfer_config": kv, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


@dataclass(frozen=True)
class Answers:
    """The tokens of each answer, and how many tokens of each prompt were cached."""

    tokens: list[list[int]]
    cached: list[int]


def ask(
    llm: LLM, prompts: Sequence[Any] = PROMPTS, new: int = NEW, after: Callable[[int], None] = lambda step: None
) -> Answers:
    """Answer prompts greedily. `after` is called after each step of the engine."""
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        llm.llm_engine.add_request(
            str(i), prompt if isinstance(prompt, str | dict) else {"prompt_token_ids": prompt}, params
        )
    done: dict[str, Any] = {}
    step = 0
    while llm.llm_engine.has_unfinished_requests():
        done |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
        step += 1
        after(step)
    outputs = [done[name] for name in sorted(done, key=lambda name: int(name.partition("-")[0]))]
    return Answers([list(o.outputs[0].token_ids) for o in outputs], [o.num_cached_tokens for o in outputs])


def connector(llm: LLM) -> Any:
    """The scheduler's connector of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler.connector


def worker(llm: LLM) -> Any:
    """The worker's connector of an engine in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def counted(name: str, **labels: str) -> float:
    """A Prometheus counter of the current engine, summed over the labels that are not given."""
    return sum(
        sample.value
        for metric in prometheus_client.REGISTRY.collect()
        if metric.name == f"vllm:kvlab_{name}"
        for sample in metric.samples
        if sample.name.endswith("_total") and labels.items() <= sample.labels.items()
    )
