"""vLLM on the CPU with the connector: the same tokens, time to first token, and what two kinds of faults do.

python -m kvlab bench engines --json          in an environment with vLLM: .venv-engines of make test-engines

Every engine runs in this process, one after another, over one real Redis.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvlab.core import record
from kvlab.core.record import OPAQUE, BadRecord, Format
from kvlab.errors import KVLabError
from kvlab.lab import engines
from kvlab.lab.engines import Answers, ask, engine, transfer
from kvlab.lab.machine import describe_machine, versions
from kvlab.model import Tokenizer, held_out_tokens
from kvlab.testbed.server import RedisServer

ABOUT = (
    "rows: a prompt of `tokens` tokens, FP32. cold_ms: milliseconds to the first token, nothing is stored; loaded_ms: "
    "the same prompt in an engine whose device cache is empty, out of Redis; speedup: median of the ratios of each "
    "round; lookup_share: what the look-up adds to a miss, as a share of cold; copy_share: what saving holds up the "
    "worker, as a share of cold. identical: three engines one after another, none, an empty store, a full one. poison: "
    "three fresh engines after all stored blocks were damaged, right or wrong. layout: what an engine answers from "
    "blocks whose numbers are arranged in another way, if the keys are right, and with the keys of another layout"
)
TOKENS = 1536
LARGER = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 7, "num_attention_heads": 8}
LARGER |= {"num_key_value_heads": 4}


def run(parts: Sequence[str] = ("identical", "ttft", "poison", "layout"), rounds: int = 7) -> dict[str, Any]:
    """Measure the named parts.

    Raises:
        KVLabError: vLLM or `redis-server` is missing.
    """
    if find_spec("vllm") is None:
        raise KVLabError(
            "bench engines needs vLLM: make test-engines, then .venv-engines/bin/python -m kvlab bench engines"
        )
    engines.prepare()
    work: dict[str, Callable[[RedisServer], Any]] = {
        "identical": _identical,
        "ttft": lambda server: _ttfts(server, rounds),
        "poison": _poison,
        "layout": _layout,
    }
    results: dict[str, Any] = {}
    for part in parts:
        with RedisServer() as server:
            results["rows" if part == "ttft" else part] = work[part](server)
    return {
        "about": ABOUT,
        **results,
        "threads": torch.get_num_threads(),
        "machine": describe_machine(),
        "versions": versions(),
    }


def _prompts() -> list[list[int]]:
    text = held_out_tokens(Tokenizer())
    return [text[:400], text[1000:1500], text[:200] + text[5000:5300]]


def _identical(server: RedisServer) -> dict[str, Any]:
    answers: list[Answers] = []
    for kv in (None, transfer(server.url), transfer(server.url)):
        with engine(kv) as llm:
            answers.append(ask(llm, _prompts()))
    return {
        "prompt_tokens": [len(prompt) for prompt in _prompts()],
        "cached": {name: a.cached for name, a in zip(("none", "empty", "full"), answers, strict=True)},
        "same_tokens": all(a.tokens == answers[0].tokens for a in answers),
    }


# --- time to first token ----------------------------------------------------------------------------------------------
def _ttfts(server: RedisServer, rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="kvlab-") as folder:
        models = (engines.MODEL, _larger(Path(folder) / "random x4"))
        return [_ttft(server, model, rounds) for model in models]


def _ttft(server: RedisServer, model: Path, rounds: int) -> dict[str, Any]:
    text, config = held_out_tokens(Tokenizer()), json.loads((model / "config.json").read_text("utf-8"))
    cold, loaded, cached = [], [], []
    counted: dict[str, list[float]] = {}
    settings = {"model": str(model), "max_model_len": TOKENS + 64, "max_num_batched_tokens": TOKENS + 64}
    with engine(transfer(server.url), **settings, kv_cache_memory_bytes=512 << 20) as llm:
        ask(llm, [text[:TOKENS]], new=1)  # the first run of every shape is slow
        for i in range(rounds):
            before = {name: engines.counted(name) for name in ("held_seconds", "copy_seconds")}
            prompt = [7 + i, *text[: TOKENS - 1]]
            cold.append(ask(llm, [prompt], new=1).first_s[0])
            after = {name: engines.counted(name) - value for name, value in before.items()}
            counted = {name: [*counted.get(name, []), value] for name, value in after.items()}
            engines.worker_of_this_process().queue.flush(30)  # type: ignore[attr-defined]
            assert llm.llm_engine.reset_prefix_cache()
            answers = ask(llm, [prompt], new=1)
            loaded.append(answers.first_s[0])
            cached.append(answers.cached[0])
    median = statistics.median
    shares = {name: median(v / c for v, c in zip(values, cold, strict=True)) for name, values in counted.items()}
    return {
        "model": model.name,
        "layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "tokens": TOKENS,
        "cached_tokens": median(cached),
        "cold_ms": round(1000 * median(cold), 1),
        "loaded_ms": round(1000 * median(loaded), 1),
        "speedup": round(median(c / w for c, w in zip(cold, loaded, strict=True)), 1),
        "lookup_share": round(shares["held_seconds"], 5),
        "copy_share": round(shares["copy_seconds"], 4),
    }


def _larger(folder: Path) -> Path:
    """A Llama of four times the shipped model's size with random weights, whose time does not depend on them."""
    from safetensors.torch import save_file

    shutil.copytree(engines.MODEL, folder)
    config = {**json.loads((folder / "config.json").read_text("utf-8")), **LARGER}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    torch.manual_seed(0)
    H, D, F = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    heads, kv = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
    shapes = {"self_attn.q_proj": (heads, H), "self_attn.k_proj": (kv, H), "self_attn.v_proj": (kv, H)}
    shapes |= {"self_attn.o_proj": (H, heads), "mlp.gate_proj": (F, H), "mlp.up_proj": (F, H), "mlp.down_proj": (H, F)}
    weights = {
        "model.embed_tokens.weight": torch.randn(config["vocab_size"], H) / 8,
        "model.norm.weight": torch.ones(H),
    }
    for i in range(config["num_hidden_layers"]):
        here = f"model.layers.{i}."
        weights |= {f"{here}{name}.weight": torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
        weights |= {f"{here}{name}.weight": torch.ones(H) for name in ("input_layernorm", "post_attention_layernorm")}
    save_file({name: w.half() for name, w in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# --- faults -----------------------------------------------------------------------------------------------------------
def _poison(server: RedisServer) -> dict[str, Any]:
    """Store a prompt, damage its blocks, and ask three fresh engines for a longer one."""
    text = held_out_tokens(Tokenizer())
    short, long = text[:350], text[:700]
    with engine() as llm:
        right = ask(llm, [long]).tokens
    naive = {"name": "NaiveConnector", "module": "kvlab.lab.naive_connector"}
    outcomes = {}
    for name, which in (("naive", naive), ("kvlab", {})):
        server.client().flushall()
        with engine(transfer(server.url, **which)) as llm:
            ask(llm, [short])
        _damage(server)
        answers = []
        for _ in range(3):
            with engine(transfer(server.url, **which)) as llm:
                answers.append(ask(llm, [long]))
        outcomes[name] = {"right": [a.tokens == right for a in answers], "cached": [a.cached[0] for a in answers]}
    return outcomes


def _damage(server: RedisServer) -> None:
    """Flip a bit of every value."""
    client: Any = server.client()
    for name in client.scan_iter("kv:*", count=1000):
        value = client.get(name)
        client.set(name, value[:-1] + bytes([value[-1] ^ 1]))


def _layout(server: RedisServer) -> dict[str, Any]:
    """Arrange the numbers of all stored blocks as another layout would, under the keys of this one and of another."""
    prompt = [_prompts()[1]]
    with engine(transfer(server.url)) as llm:
        right = ask(llm, prompt)
    _rearrange(server)
    with engine(transfer(server.url)) as llm:
        salad = ask(llm, prompt)
    with engine(transfer(server.url), block_size=64) as llm:
        refused = ask(llm, prompt)
    answers = {"computed": right, "same keys": salad, "other keys": refused}
    return {
        name: {
            "cached": answer.cached[0],
            "right": answer.tokens == right.tokens,
            "text": Tokenizer().decode(answer.tokens[0]),
        }
        for name, answer in answers.items()
    }


def _rearrange(server: RedisServer) -> None:
    """Exchange the halves of the numbers of each layer in all stored blocks, as another layout would have them."""
    client: Any = server.client()
    fmt = Format(OPAQUE)
    for name in list(client.scan_iter("kv:*", count=1000)):
        key = name.removeprefix(b"kv:")
        try:
            elements = record.decode_opaque(client.get(name), key, fmt, None)
        except BadRecord:  # a description
            continue
        rolled = np.ascontiguousarray(np.roll(elements, elements.shape[1] // 2, axis=1))
        client.set(name, b"".join(record.encode_opaque(rolled, key, fmt)))
