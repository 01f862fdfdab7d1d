"""Small Hugging Face models with random weights, what `generate` gives without a cache, and checks of one with it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvlab.model import PRETRAINED
from kvlab.stores import MemoryStore
from tests.harness.helpers import SpyStore

VOCAB = 97
B = 16
NEW = 12
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
KINDS = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "gemma")
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
GPT2_SIZES: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}
NO_SPECIALS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}


def build(model_class: str, config_class: str, **fields: Any) -> Any:
    """A seeded random model by the names of its classes."""
    import transformers

    config = getattr(transformers, config_class)(**fields)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return getattr(transformers, model_class)(config).requires_grad_(False).eval()


def tiny(kind: str = "llama", **changes: Any) -> Any:
    """A model whose answers depend on all of the prompt.

    With small weights the last token alone decides, and a test of tokens would pass with any KV. The weights are
    therefore large, those of attention most of all (see `tests.harness.helpers.attentive_model`).
    """
    sizes = GPT2_SIZES if kind == "gpt2" else SIZES
    own: dict[str, Any] = {"mistral": {"sliding_window": None}, "qwen2": {}, "gpt2": {}}.get(kind, {})
    if kind == "qwen2":  # its head dim is not a field
        sizes = {name: size for name, size in sizes.items() if name != "head_dim"}
    names = {"gpt2": ("GPT2LMHeadModel", "GPT2Config")}
    prefix = kind.capitalize()
    model_class, config_class = names.get(kind, (f"{prefix}ForCausalLM", f"{prefix}Config"))
    model = build(model_class, config_class, **{**sizes, **NO_SPECIALS, "initializer_range": 0.08, **own, **changes})
    for name, weight in model.named_parameters():
        if "attn" in name and (weight.ndim == 2 or "norm" in name):  # Qwen 3 normalises queries and keys
            weight.mul_(4.0)
    return model


def shipped(dtype: torch.dtype = torch.float32) -> Any:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(PRETRAINED, dtype=dtype, local_files_only=True)
    return model.requires_grad_(False).eval()


def prompt(count: int, seed: int = 0) -> list[int]:
    """Tokens without the token 0, which is Gemma's padding."""
    return random.Random(seed).choices(range(1, VOCAB), k=count)


TEXT = prompt(48)


def ids_of(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def plain(model: Any, input_ids: Tensor, new: int = 12, **settings: Any) -> list[list[int]]:
    """The answer of a model without any cache: the whole text again for every token."""
    mask = torch.ones_like(input_ids)
    settings = {"do_sample": False, "max_new_tokens": new, "use_cache": False, **settings}
    return list(model.generate(input_ids=input_ids, attention_mask=mask, **settings).tolist())


def cached(model: Any, store: Any = None, **options: Any) -> Any:
    from kvlab.connectors.transformers import CachedModel

    return CachedModel(model, store or MemoryStore(), **{"block_tokens": B, **options})


def answer(wrapped: Any, rows: list[int] | Tensor, new: int = NEW, **settings: Any) -> list[list[int]]:
    ids = rows if isinstance(rows, Tensor) else ids_of(rows)
    return list(wrapped.generate(ids, max_new_tokens=new, do_sample=False, **settings).tolist())


def check(wrapped: Any, rows: list[int] | Tensor, cached_tokens: int, reason: str, new: int = NEW) -> list[list[int]]:
    """The tokens are those of no cache, and the report is as expected."""
    ids = rows if isinstance(rows, Tensor) else ids_of(rows)
    got = answer(wrapped, ids, new)
    assert got == plain(wrapped.model, ids, new)
    last = wrapped.last
    assert (last.prompt_tokens, last.cached_tokens, last.reason) == (ids.shape[1], cached_tokens, reason)
    wrapped.stats().check()
    return got


def rewrite(wrapped: Any, tokens: list[int], block: int, change: Callable[[Tensor], Any]) -> None:
    """Replace one stored block by a correct record of changed numbers."""
    cache = wrapped._cache
    kv = torch.empty(*cache.block_shape[:3], len(tokens) // B * B, cache.block_shape[4])
    assert cache.load(tokens, 0, kv.shape[3], kv) == kv.shape[3]
    change(part := kv[:, :, :, block * B : (block + 1) * B].clone())
    assert cache.write([cache.namespace.keys(tokens)[block]], [cache.parts_of(part)]) == 1


class EventStore(SpyStore):
    """Runs a function once, before the first read of values: what happens between a match and a load."""

    def __init__(self, event: Callable[[], object], inner: Any = None) -> None:
        super().__init__(inner or MemoryStore())
        self.event: Callable[[], object] | None = event
        self.armed = False

    def get_many(self, keys: Any, out: Any = None, reasons: Any = None) -> Any:
        if self.armed and self.event:
            event, self.event = self.event, None
            event()
        return super().get_many(keys, out, reasons)
