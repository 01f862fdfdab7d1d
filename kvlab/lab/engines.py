"""vLLM engines in this process, with and without the connector: for the benchmark, the lesson and the tests.

Call `prepare` first: vLLM reads its environment when it is imported.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvlab.model

if TYPE_CHECKING:
    from kvlab.connectors.vllm.scheduler import SchedulerSide
    from kvlab.connectors.vllm.worker import WorkerSide

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
}
MODEL = Path(kvlab.model.__file__).parent / "pretrained"
FASTEST: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "seed": 0,
    "enforce_eager": True,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "disable_log_stats": False,
}
"""The settings with which an engine on the CPU starts in seconds."""
NEW = 24


def prepare() -> None:
    """Set the environment in which vLLM runs in this process, on this machine only."""
    os.environ.update(ENVIRONMENT)


def transfer(store: str, name: str = "KVLabConnector", module: str = "kvlab.connectors.vllm", **extra: Any) -> Any:
    """Return the setting that turns the connector on."""
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector=name,
        kv_connector_module_path=module,
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"store": store, **extra},
    )


@contextmanager
def engine(kv: Any = None, **settings: Any) -> Iterator[Any]:
    """An engine; with `kv` from `transfer`, one with a connector. At the end, what is queued is written."""
    from vllm import LLM

    llm = LLM(**{"model": str(MODEL), **FASTEST, "kv_transfer_config": kv, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


@dataclass(frozen=True)
class Answers:
    """The tokens of each answer, how many tokens of each prompt were cached, and the seconds until each began."""

    tokens: list[list[int]]
    cached: list[int]
    first_s: list[float]


def ask(
    llm: Any, prompts: Sequence[Any], new: int = NEW, after: Callable[[int], object] = lambda step: None
) -> Answers:
    """Answer prompts greedily, all at the same time.

    Args:
        prompts: texts, or lists of tokens.
        after: called after each step of the engine with its number.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    begin = time.perf_counter()
    for i, prompt in enumerate(prompts):
        given = prompt if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)}
        llm.llm_engine.add_request(str(i), given, params)
    done: dict[int, Any] = {}
    first: dict[int, float] = {}
    step = 0
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            number = int(output.request_id.partition("-")[0])
            first.setdefault(number, time.perf_counter() - begin)
            if output.finished:
                done[number] = output
        step += 1
        after(step)
    outputs = [done[i] for i in range(len(prompts))]
    cached = [output.num_cached_tokens for output in outputs]
    return Answers([list(o.outputs[0].token_ids) for o in outputs], cached, [first[i] for i in range(len(prompts))])


def scheduler_of(llm: Any) -> SchedulerSide:
    """Return the scheduler's half of the connector of an engine in this process."""
    half: SchedulerSide = llm.llm_engine.engine_core.engine_core.scheduler.connector.scheduler
    return half


def worker_of_this_process() -> WorkerSide:
    """Return the worker's half of the connector of the current engine in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    half: WorkerSide = get_kv_transfer_group().worker
    return half


def counted(name: str, **labels: str) -> float:
    """Return a Prometheus counter of the current engine, summed over the labels that are not given."""
    import prometheus_client

    return sum(
        sample.value
        for metric in prometheus_client.REGISTRY.collect()
        if metric.name == f"vllm:kvlab_{name}"
        for sample in metric.samples
        if sample.name.endswith("_total") and labels.items() <= sample.labels.items()
    )
