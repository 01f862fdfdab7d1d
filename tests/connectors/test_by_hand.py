"""What goes wrong without a word when a cache of transformers is filled by hand, and goes right in the connector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.connectors.models import GREEDY, TEXT, answer, cached, ids_of, plain, prompt, tiny

pytestmark = pytest.mark.hf


def kv_of(model: Any, tokens: list[int]) -> Any:
    """A cache of transformers with the KV of the tokens."""
    from transformers import DynamicCache

    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids_of(tokens), use_cache=True, **{name(): past})
    return past


def name() -> str:
    from kvlab.connectors.hf_models import CACHE_NAME

    return CACHE_NAME


def is_wrong(call: Callable[[], Any], want: list[int]) -> bool:
    """Whether a call gives other tokens, or an error of transformers or torch."""
    try:
        return bool(call()[0, -len(want) :].tolist() != want)
    except (ValueError, RuntimeError, IndexError):
        return True


SUFFIX = ids_of(TEXT[32:])


def with_mask_of_suffix(model: Any) -> Any:
    return model.generate(SUFFIX, attention_mask=torch.ones_like(SUFFIX), **{name(): kv_of(model, TEXT[:32])}, **GREEDY)


def without_mask(model: Any) -> Any:
    return model.generate(SUFFIX, **{name(): kv_of(model, TEXT[:32])}, **GREEDY)


def with_positions_from_zero(model: Any) -> Any:
    places, mask = torch.arange(16)[None], torch.ones(1, 48, dtype=torch.long)
    past = {name(): kv_of(model, TEXT[:32])}
    return model.generate(SUFFIX, attention_mask=mask, position_ids=places, **past, **GREEDY)


def with_all_of_the_prompt(model: Any) -> Any:
    ids = ids_of(TEXT)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{name(): kv_of(model, TEXT)}, **GREEDY)


def with_more_than_the_prompt(model: Any) -> Any:
    ids, longer = ids_of(TEXT), kv_of(model, TEXT + prompt(16, 1))
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{name(): longer}, **GREEDY)


def with_use_cache_off(model: Any) -> Any:
    model.generation_config.use_cache = False  # as a config saved by training has it
    ids = ids_of(TEXT)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{name(): kv_of(model, TEXT[:32])}, **GREEDY)


def with_a_block_of_another_position(model: Any) -> Any:
    """The tokens 16 to 32 of the text, as they are stored where they begin a text."""
    from transformers import DynamicCache

    parts = [kv_of(model, TEXT[:16]), kv_of(model, TEXT[16:32])]
    past = DynamicCache(config=model.config)
    for i in range(len(parts[0].layers)):
        both = [torch.cat([getattr(p.layers[i], plane) for p in parts], 2) for plane in ("keys", "values")]
        past.update(*both, i)
    ids = ids_of(TEXT)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{name(): past}, **GREEDY)


NAIVE = [
    with_mask_of_suffix,
    without_mask,
    with_positions_from_zero,
    with_all_of_the_prompt,
    with_more_than_the_prompt,
    with_use_cache_off,
    with_a_block_of_another_position,
]


@pytest.mark.parametrize("naive", NAIVE, ids=lambda f: f.__name__)
def test_right_where_a_cache_given_by_hand_is_wrong(naive: Callable[[Any], Any]) -> None:
    model = tiny()
    want = plain(model, ids_of(TEXT))[0][48:]
    assert is_wrong(lambda: naive(model), want)
    wrapped = cached(model)
    for stored in (TEXT[16:32], TEXT + prompt(16, 1), TEXT[:32], TEXT):
        wrapped.generate(ids_of(stored), **GREEDY)
    assert answer(wrapped, TEXT)[0][48:] == want and wrapped.last.cached_tokens == 47


def test_a_cache_given_by_hand_may_be_right() -> None:
    """The cases above are wrong because of what they do, not because of how they are called."""
    model, ids = tiny(), ids_of(TEXT)
    past = {name(): kv_of(model, TEXT[:32])}
    got = model.generate(ids, attention_mask=torch.ones_like(ids), **past, **GREEDY)
    assert got.tolist() == plain(model, ids)
