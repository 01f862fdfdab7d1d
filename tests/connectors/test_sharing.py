"""kvlab.generate and the connector for transformers share blocks of the same model, whoever computed them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvlab
from kvlab import DistributedKVCache, MemoryStore
from kvlab.model import PRETRAINED, Llama, load_model
from tests.connectors.models import answer, cached
from tests.model.test_against_transformers import saved

pytestmark = pytest.mark.hf


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("kind", ["shipped fp32", "shipped fp16", "random"])
def test_blocks_are_shared_with_this_package_both_ways(kind: str, random_folder: Path, sample: list[int]) -> None:
    import transformers

    folder = random_folder if kind == "random" else PRETRAINED
    dtype = torch.float16 if kind == "shipped fp16" else torch.float32
    ours = load_model(folder, dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    tokenizer = None if kind == "random" else folder
    texts = [[token % 131 if kind == "random" else token for token in sample[at : at + 150]] for at in (0, 3000)]
    for first in ("ours", "theirs"):
        store, precision = MemoryStore(), "fp16" if dtype == torch.float16 else "fp32"
        cache = DistributedKVCache(store=store, model=ours, precision=precision)
        wrapped = cached(theirs, store, tokenizer=tokenizer, block_tokens=None)
        assert wrapped._cache.namespace == cache.namespace
        for text in texts:
            plain = kvlab.generate(ours, text, 8, stop_at_eos=False).tokens
            for who, hit in ((first, 0), ("theirs" if first == "ours" else "ours", 128)):
                tokens, cached_tokens = ask(who, ours, wrapped, cache, text)
                assert cached_tokens == hit
                assert dtype == torch.float16 or tokens == plain
        shadow = cached(theirs, store, tokenizer=tokenizer, block_tokens=None, shadow=1.0)
        answer(shadow, texts[0], 1)
        assert (shadow.shadow.blocks, shadow.shadow.different) == (2, 0)  # whoever saved them


def ask(who: str, ours: Llama, wrapped: Any, cache: DistributedKVCache, text: list[int]) -> tuple[list[int], int]:
    """New tokens of one of the two, and how many tokens of the prompt it loaded."""
    if who == "ours":
        done = kvlab.generate(ours, text, 8, cache, stop_at_eos=False)
        return done.tokens, done.cached_tokens
    return answer(wrapped, text, 8, eos_token_id=None)[0][150:], wrapped.last.cached_tokens
