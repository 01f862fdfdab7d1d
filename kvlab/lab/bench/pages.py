"""Speed of attention over pages, and the memory that paging saves.

python -m kvlab bench pages --json

"run": the prefix is in neighbouring pages, which attention reads in place. "scattered": the same number of
pages in random order, which attention gathers first. "contiguous" is the tensor of `Llama.new_kv`. "page_major" is
a layout that kvlab rejected: a page's KV of all layers lies together, and gathering picks small pieces.

The chat workload is made from a seed: log-normal prompts (median 300 tokens) and answers (median 150) up to
the model's context. A contiguous server reserves the context for every request, because it does not know how
long the answer will be. A paged one has whole pages, so it wastes the rest of the last one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvlab.engine.pages import PAGE_TOKENS, BlockTable, PagePool
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.timing import Timings, time_rounds
from kvlab.model import Llama, Tokenizer, held_out_tokens, load_model

ABOUT = (
    "rows: time to the logits of the last token of a prompt, whose prefix is computed (cold), read in place from a run "
    "of pages, or gathered from scattered pages; the last 16 tokens are always computed. layouts: the same for the "
    "longest prefix, in all layouts, as speed-up over cold. decode_ratio: one new token "
    "at 1,024 tokens of context, over a run of pages by contiguous KV; decode_ratio_scattered: over scattered pages. "
    "waste: share of the reserved memory that holds no token, for a chat workload"
)
PREFIXES = (128, 256, 512, 1024, 2048)
SUFFIX = 16
DECODE_CONTEXT = 1024
REQUESTS = 10_000


def run(prefixes: tuple[int, ...] = PREFIXES, rounds: int = 9) -> dict[str, Any]:
    """Measure prefill after a prefix in pages, one step of decoding, and the waste of both layouts.

    Args:
        rounds: timed repetitions.
    """
    model = load_model()
    text = held_out_tokens(Tokenizer())
    with torch.inference_mode():
        rows, times = zip(*(_row(model, text, n, rounds) for n in prefixes), strict=True)
        decode = _decode(model, text, rounds)
        layouts = _layouts(model, text, prefixes[-1], rounds)
    all_times = (*times, decode, layouts)
    return {
        "about": ABOUT,
        "rows": list(rows),
        "layouts": {name: layouts.ratio("cold", name) for name in layouts.seconds if not name.startswith("cold")},
        "decode_ratio": decode.ratio("run", "contiguous"),
        "decode_ratio_scattered": decode.ratio("scattered", "contiguous"),
        "waste": waste(model.config.max_position_embeddings),
        "aa_ratio": max((t.aa_ratio for t in all_times), key=lambda ratio: abs(ratio - 1)),
        "noisy": any(t.noisy for t in all_times),
        "machine": describe_machine(),
        "versions": versions(),
    }


def _row(model: Llama, text: list[int], prefix: int, rounds: int) -> tuple[dict[str, Any], Timings]:
    prompt = torch.tensor([text[: prefix + SUFFIX]])
    run_table, scattered = _filled(model, prompt[:, :prefix], SUFFIX)
    times = time_rounds(
        {
            "cold": lambda: model(prompt, model.new_kv(prefix + SUFFIX), last_only=True),
            "run": lambda: model(prompt[:, prefix:], run_table, prefix, last_only=True),
            "scattered": lambda: model(prompt[:, prefix:], scattered, prefix, last_only=True),
        },
        rounds,
    )
    row = {
        "prefix_tokens": prefix,
        **{f"{name}_ms": times.median_ms(name) for name in ("cold", "run", "scattered")},
        **{f"speedup_{name}": times.ratio("cold", name) for name in ("run", "scattered")},
    }
    return row, times


def _filled(model: Llama, tokens: Tensor, more: int) -> tuple[BlockTable, BlockTable]:
    """Two tables with the KV of `tokens` and room for `more`: a run of pages, and pages in random order."""
    capacity = tokens.shape[1] + more
    tables = []
    for shuffled in (False, True):
        pool = PagePool(model, 2 * -(-capacity // PAGE_TOKENS))
        table = pool.new_table(capacity=capacity)
        if shuffled:
            random.Random(0).shuffle(table.pages)
        model(tokens, table, last_only=True)
        tables.append(table)
    return tables[0], tables[1]


class _PageMajor:
    """KV as [pages, L, P, H, 16, D]: what a pool would be whose pages are the unit of copying."""

    def __init__(self, model: Llama, table: BlockTable, tokens: int) -> None:
        self.data = table.pool.data.permute(3, 0, 1, 2, 4, 5).contiguous()
        self.pages, self.capacity, self.layer = torch.tensor(table.pages), tokens, 0

    def __getitem__(self, layer: int) -> _PageMajor:
        self.layer = layer
        return self

    def extend(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """See `kvlab.model.llama.LayerKV`."""
        stop, layer = start + k.shape[2], self.data[:, self.layer]  # [pages, P, H, 16, D]
        at = torch.arange(start, stop)
        layer[self.pages[at // PAGE_TOKENS], :, :, at % PAGE_TOKENS] = torch.stack((k[0], v[0])).permute(2, 0, 1, 3)
        read = layer[self.pages[: -(-stop // PAGE_TOKENS)]].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :stop]
        return read[0][None], read[1][None]


def _layouts(model: Llama, text: list[int], prefix: int, rounds: int) -> Timings:
    prompt = torch.tensor([text[: prefix + SUFFIX]])
    run_table, scattered = _filled(model, prompt[:, :prefix], SUFFIX)
    contiguous = model.new_kv(prefix + SUFFIX)
    model(prompt[:, :prefix], contiguous, last_only=True)
    places: dict[str, Any] = {"contiguous": contiguous, "run": run_table, "scattered": scattered}
    places["page_major"] = _PageMajor(model, scattered, prefix + SUFFIX)

    def suffix(kv: Any) -> Callable[[], Tensor]:
        return lambda: model(prompt[:, prefix:], kv, prefix, last_only=True)

    logits: list[Tensor] = [suffix(kv)() for kv in places.values()]
    assert all(torch.allclose(a, logits[0], atol=1e-3) for a in logits), "all layouts hold the same KV"
    cold = {"cold": lambda: model(prompt, model.new_kv(prefix + SUFFIX), last_only=True)}
    return time_rounds({**cold, **{name: suffix(kv) for name, kv in places.items()}}, rounds)


def _decode(model: Llama, text: list[int], rounds: int) -> Timings:
    tokens, step = torch.tensor([text[:DECODE_CONTEXT]]), torch.tensor([[text[DECODE_CONTEXT]]])
    kv = model.new_kv(DECODE_CONTEXT + 1)
    model(tokens, kv, last_only=True)
    run_table, scattered = _filled(model, tokens, 1)

    def steps(where: Any) -> Callable[[], object]:
        return lambda: [model(step, where, DECODE_CONTEXT, last_only=True) for _ in range(20)]

    return time_rounds({"contiguous": steps(kv), "run": steps(run_table), "scattered": steps(scattered)}, rounds)


def waste(context: int, requests: int = REQUESTS) -> dict[str, float]:
    """Return the share of reserved room that holds no token when the requests end, for contiguous KV and for pages."""
    lengths = chat_lengths(context, requests)
    used = sum(lengths)
    pages = sum(-(-length // PAGE_TOKENS) for length in lengths)
    return {"contiguous": 1 - used / (context * len(lengths)), "paged": 1 - used / (pages * PAGE_TOKENS)}


def chat_lengths(context: int, requests: int = REQUESTS, seed: int = 0) -> list[int]:
    """Return tokens of prompt and answer of the requests of a chat workload."""
    rng = random.Random(seed)
    return [min(context, round(rng.lognormvariate(5.7, 0.8) + rng.lognormvariate(5.0, 0.8))) for _ in range(requests)]
