"""What DeepSpeed does with a prompt whose beginning it has seen, alone and with kvlab's connector under it.

.venv-alternatives/bin/python -m kvlab.lab.deepspeed_engine --json

`sh scripts/setup.sh --alternatives` makes the environment. With a `redis-server`, the blocks also come out of a real
Redis, into which plain transformers wrote them. DeepSpeed reads its settings once and leaves process groups behind,
so tests run this in a process of its own.

The connector goes around `engine.module`, the model of transformers that `engine.generate` calls. What else DeepSpeed
has for keys and values, and for weights, is tried in `kvlab.lab.deepspeed_tries`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvlab.connectors.transformers import CachedModel
from kvlab.errors import KVLabError
from kvlab.lab import deepspeed_tries, tables
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.reachable import open_reachable
from kvlab.lab.timing import Timings, time_rounds
from kvlab.model import PRETRAINED, Tokenizer, held_out_tokens, load_model
from kvlab.model.fingerprint import spec_of
from kvlab.stores import MemoryStore, Store
from kvlab.testbed.server import RedisServer, free_port

ABOUT = (
    "rows: milliseconds of a `generate` of one token for prompts of prompt_tokens, FP32. Their beginning is always the "
    "same, the last question_tokens are another question each time. plain: transformers; deepspeed: init_inference "
    "without kernel injection; deepspeed_again: a prompt that it has answered before; empty, memory, redis: kvlab's "
    "connector around the engine's module, over an empty store (it computes and saves all), over a dict and over a "
    "real Redis that have the beginning. What is in Redis was computed by plain transformers. cached_tokens: how many "
    "came from the store. reuse: deepspeed by deepspeed_again, speedup_…: deepspeed by the connector, medians of the "
    "ratios of each round. same_tokens: whether all of them gave the tokens of plain transformers, answer_tokens each "
    "for `questions` questions, with hits where they must be. same_fingerprint: whether the connector takes the "
    "engine's module for the model that kvlab.load_model gives. tried: what else DeepSpeed has, and what it said; "
    "where: the line that refused. sources: the lines behind the text"
)
LENGTHS = (500, 1000, 1900)
QUESTION, QUESTIONS, ANSWER = 32, 3, 16
BEGIN = 4000  # the questions are taken from the text behind the longest beginning
DEADLINE_S = 10.0
INSTALL = "sh scripts/setup.sh --alternatives, then .venv-alternatives/bin/python -m kvlab.lab.deepspeed_engine"

Generate = Callable[..., Tensor]


# --- the engine -----------------------------------------------------------------------------------
def load_deepspeed() -> Any:
    """Import DeepSpeed for one process on the CPU. It prints to stdout.

    Raises:
        KVLabError: DeepSpeed is not installed.
    """
    if find_spec("deepspeed") is None:
        raise KVLabError(f"this measurement needs DeepSpeed: {INSTALL}")
    os.environ.update({"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})  # or it searches for MPI
    import deepspeed

    # One process has nobody to share memory with, and DeepSpeed would compile this for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def load_plain() -> Any:
    """The shipped model as transformers runs it, in FP32."""
    model: Any = AutoModelForCausalLM.from_pretrained(PRETRAINED, dtype=torch.float32)
    return model.eval()


def run(lengths: Sequence[int] = LENGTHS, rounds: int = 7, tries: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, then try.

    Args:
        lengths: tokens of the prompts.
        tries: names out of `deepspeed_tries.TRIES`; by default all.

    Raises:
        KVLabError: DeepSpeed is missing, or a store lost what it had to have.
    """
    deepspeed = load_deepspeed()
    plain, text = load_plain(), held_out_tokens(Tokenizer())
    # The engine refuses a longer `input_ids=`; without kernels nothing else depends on the number.
    settings = {"dtype": torch.float32, "replace_with_kernel_inject": False, "max_out_tokens": BEGIN}
    engine = deepspeed.init_inference(load_plain(), **settings)
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer()).url if shutil.which("redis-server") else None
        rows, times = zip(*(measure(engine, plain, text, n, rounds, redis) for n in lengths), strict=True)
    return {
        "about": ABOUT,
        "rows": list(rows),
        "same_fingerprint": _same_fingerprint(engine),
        "tried": deepspeed_tries.run(deepspeed, engine, load_plain, tries),
        "sources": deepspeed_tries.sources(),
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "aa_ratio": max((round(t.aa_ratio, 3) for t in times), key=lambda ratio: abs(ratio - 1)),
        "noisy": any(t.noisy for t in times),
        "machine": describe_machine(),
        "versions": {**versions(), **{name: version(name) for name in ("transformers", "deepspeed")}},
    }


def _same_fingerprint(engine: Any) -> bool:
    with CachedModel(engine.module, MemoryStore(), tokenizer=PRETRAINED) as cached:
        return cached.cache.namespace.fingerprint == spec_of(load_model()).fingerprint


# --- one length -----------------------------------------------------------------------------------
def measure(
    engine: Any, plain: Any, text: Sequence[int], tokens: int, rounds: int, redis: str | None = None
) -> tuple[dict[str, Any], Timings]:
    """Time prompts of one length, then compare the tokens of longer answers.

    Args:
        engine: has `module`, a model of transformers, and `generate`.
        redis: the URL of a server; without one there is no column for it.

    Raises:
        KVLabError: a store did not give the beginning that it has.
    """
    with _connectors(engine, plain, next(prompts(text, tokens)), redis) as under:
        block = under["memory"].cache.block_tokens
        beginning = (tokens - QUESTION) // block * block

        def asks() -> dict[str, tuple[Generate, Iterator[Tensor]]]:
            return {
                "plain": (plain.generate, prompts(text, tokens)),
                "deepspeed": (engine.generate, prompts(text, tokens)),
                "deepspeed_again": (engine.generate, itertools.repeat(next(prompts(text, tokens)))),
                "empty": (_checked(under["empty"], 0), _forgotten(under["empty"], prompts(text, tokens))),
                **{
                    name: (_checked(under[name], beginning), prompts(text, tokens)) for name in under if name != "empty"
                },
            }

        times = time_rounds({name: _timed(*ask) for name, ask in asks().items()}, rounds, seconds_of=float)
        row = {
            "prompt_tokens": tokens,
            "question_tokens": QUESTION,
            "cached_tokens": beginning,
            **{f"{name}_ms": round(times.median_ms(name), 1) for name in asks()},
            "reuse": round(times.ratio("deepspeed", "deepspeed_again"), 2),
            **{f"speedup_{name}": round(times.ratio("deepspeed", name), 2) for name in under},
            "questions": QUESTIONS,
            "answer_tokens": ANSWER,
            "same_tokens": _same_tokens(plain, asks()),
        }
    return row, times


def prompts(text: Sequence[int], tokens: int) -> Iterator[Tensor]:
    """Prompts [1, T] with the same beginning, as of a system prompt and a document, and a question of their own."""
    for start in range(BEGIN, len(text) - QUESTION, QUESTION):
        yield torch.tensor([[*text[: tokens - QUESTION], *text[start : start + QUESTION]]])


@contextmanager
def _connectors(engine: Any, plain: Any, prompt: Tensor, redis: str | None) -> Iterator[dict[str, CachedModel]]:
    """The connector around the engine's module over each store; all but "empty" have the blocks of the prompt."""

    def over(model: Any, store: Store) -> CachedModel:
        return CachedModel(model, store, tokenizer=PRETRAINED)

    with ExitStack() as stack:
        under = {name: stack.enter_context(over(engine.module, MemoryStore())) for name in ("empty", "memory")}
        _generate(under["memory"].generate, prompt, 1)
        if redis is not None:
            with over(plain, open_reachable(redis, deadline_s=DEADLINE_S)) as writer:
                _generate(writer.generate, prompt, 1)
            under["redis"] = stack.enter_context(over(engine.module, open_reachable(redis, deadline_s=DEADLINE_S)))
        yield under


def _generate(generate: Generate, prompt: Tensor, new: int) -> Tensor:
    return generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)


def _timed(generate: Generate, source: Iterator[Tensor]) -> Callable[[], float]:
    """A contender for `time_rounds`, which returns the seconds to the first token of the next prompt."""

    def contender() -> float:
        prompt = next(source)
        begin = time.perf_counter()
        _generate(generate, prompt, 1)
        return time.perf_counter() - begin

    return contender


def _forgotten(cached: CachedModel, source: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same prompts; before each, its blocks are deleted from the store."""
    for prompt in source:
        cached.store.delete_many(cached.cache.namespace.keys(prompt[0].tolist()))
        yield prompt


def _checked(cached: CachedModel, tokens: int) -> Generate:
    """`generate` with the connector, which fails if fewer tokens came from the store, or any where `tokens` is 0."""

    def generate(prompt: Tensor, **settings: Any) -> Tensor:
        output: Tensor = cached.generate(prompt, **settings)
        found = cached.last.cached_tokens
        if found < tokens or (found and not tokens):
            raise KVLabError(f"expected {tokens} tokens from {cached.store!r}, got {cached.last}; measure again")
        return output

    return generate


def _same_tokens(plain: Any, asks: Mapping[str, tuple[Generate, Iterator[Tensor]]]) -> bool:
    @functools.cache
    def right(tokens: tuple[int, ...]) -> Tensor:
        return _generate(plain.generate, torch.tensor([tokens]), ANSWER)

    return all(
        torch.equal(_generate(generate, prompt, ANSWER), right(tuple(prompt[0].tolist())))
        for generate, source in asks.values()
        for prompt in itertools.islice(source, QUESTIONS)
    )


# --- the command ----------------------------------------------------------------------------------
def _own_stdout() -> TextIO:
    """Return stdout, and send to stderr what DeepSpeed, its loggers and its compilers print."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the result, as tables or as JSON."""
    parser = argparse.ArgumentParser(prog="python -m kvlab.lab.deepspeed_engine", description=ABOUT)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the prompts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tries", nargs="*", choices=list(deepspeed_tries.TRIES), help="by default all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # two that wait for each other make times of a shared machine useless
    with _own_stdout() as out:
        try:
            result = run(options.lengths, options.rounds, options.tries)
        except KVLabError as error:
            sys.exit(f"deepspeed_engine: {error}")
        out.write(f"{json.dumps(result, indent=2) if options.json else tables.text(result)}\n")


if __name__ == "__main__":
    main()
