"""The model: what it computes agrees with itself however it is split, and bad calls get clear errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab.errors import InputError, ModelError
from kvlab.model import Llama, Tokenizer, attention, llama
from kvlab.model.fingerprint import spec_of
from kvlab.model.llama import RMSNorm, RopeScaling, rope_frequencies
from tests.harness.helpers import build_model

CLOSE = {"rtol": 0, "atol": 1e-4}
KINDS: dict[str, dict[str, Any]] = {
    "mha": {"heads": 4, "kv_heads": 4},
    "gqa": {"heads": 4, "kv_heads": 2},
    "mqa": {"heads": 4, "kv_heads": 1},
    "untied, biased": {"tied": False, "attention_bias": True, "mlp_bias": True},
    "llama3 rope": {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 32)},
    "linear rope": {"rope_scaling": RopeScaling("linear", 2.0)},
}


def prompt(count: int, vocab: int = 97, rows: int = 1) -> Tensor:
    return torch.randint(0, vocab, (rows, count), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(1,), (39,), (16, 32), (5, 6, 7, 20), tuple(range(1, 40))], ids=str)
def test_a_prefill_in_pieces_equals_the_whole(kind: str, cuts: tuple[int, ...]) -> None:
    model, tokens = build_model(**KINDS[kind]), prompt(40)
    whole, kv = model(tokens), model.new_kv(64)
    pieces = [model(tokens[:, a:b], kv, a) for a, b in zip((0, *cuts), (*cuts, 40), strict=True)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **CLOSE)


def test_the_shipped_model_in_pieces_equals_the_whole(model: Llama, sample: list[int]) -> None:
    tokens = torch.tensor([sample[:300]])
    kv = model.new_kv(300)
    with torch.inference_mode():
        pieces = [model(tokens[:, a:b], kv, a) for a, b in ((0, 64), (64, 65), (65, 256), (256, 300))]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_kv_of_a_prefix_is_the_prefix_of_the_kv(kind: str) -> None:
    """The fact that the whole project stands on."""
    model, tokens = build_model(**KINDS[kind]), prompt(40)
    long, short = model.new_kv(40), model.new_kv(24)
    model(tokens, long)
    model(tokens[:, :24], short)
    torch.testing.assert_close(long[:, :, :, :, :24], short, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_kv_that_was_moved_gives_the_same_logits(kind: str) -> None:
    """Filled from somewhere else, the first positions need no prefill."""
    model, tokens = build_model(**KINDS[kind]), prompt(40)
    filled = model.new_kv(40)
    whole = model(tokens, filled)
    fresh = torch.full_like(model.new_kv(48), torch.nan)
    fresh[:, :, :, :, :32] = filled[:, :, :, :, :32]
    torch.testing.assert_close(model(tokens[:, 32:], fresh, 32), whole[:, 32:], **CLOSE)
    assert bool(fresh[:, :, :, :, 40:].isnan().all())
    assert torch.equal(fresh[:, :, :, :, :32], filled[:, :, :, :, :32])


@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_do_not_change_earlier_logits(kind: str) -> None:
    model, tokens = build_model(**KINDS[kind]), prompt(20)
    other = tokens.clone()
    other[0, 12] = (other[0, 12] + 1) % 97
    before, after = model(tokens), model(other)
    torch.testing.assert_close(after[:, :12], before[:, :12], **CLOSE)
    assert float((after[:, 12:] - before[:, 12:]).abs().amax(dim=(0, 2)).min()) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_two_is_two_requests(kind: str) -> None:
    model, tokens = build_model(**KINDS[kind]), prompt(30, rows=2)
    kv = model.new_kv(30, batch=2)
    both = torch.cat((model(tokens[:, :20], kv), model(tokens[:, 20:], kv, 20)), dim=1)
    for row in range(2):
        own = model.new_kv(30)
        torch.testing.assert_close(both[row : row + 1], model(tokens[row : row + 1], own), **CLOSE)
        torch.testing.assert_close(kv[:, :, row : row + 1], own, **CLOSE)


def test_last_only_is_the_last_of_all_logits() -> None:
    model, tokens = build_model(), prompt(17)
    last = model(tokens, last_only=True)
    assert tuple(last.shape) == (1, 1, 97)
    torch.testing.assert_close(last, model(tokens)[:, -1:], **CLOSE)


def test_attention_agrees_with_its_definition() -> None:
    g = torch.Generator().manual_seed(0)
    for heads, kv_heads, T, start in ((4, 4, 5, 0), (4, 2, 5, 3), (4, 1, 1, 7), (6, 3, 8, 1), (2, 1, 1, 0)):
        q = torch.randn(2, heads, T, 8, generator=g)
        k, v = torch.randn(2, 2, kv_heads, start + T, 8, generator=g)
        expected = torch.empty_like(q)
        for h in range(heads):
            kh, vh = k[:, h // (heads // kv_heads)], v[:, h // (heads // kv_heads)]
            for t in range(T):
                seen = start + t + 1
                weights = (kh[:, :seen] @ q[:, h, t, :, None] / 8**0.5).softmax(dim=1)
                expected[:, h, t] = (weights * vh[:, :seen]).sum(dim=1)
        torch.testing.assert_close(attention(q, k, v, start), expected, **CLOSE)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_attention_without_a_mask_behind_a_prefix_is_the_same(
    heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    q, (k, v) = torch.randn(2, heads, 5, 8, generator=g), torch.randn(2, 2, kv_heads, 12, 8, generator=g)
    expected = attention(q, k, v, 7)
    monkeypatch.setattr(llama, "can_use_flash_attention", lambda params: True)  # as on a GPU
    monkeypatch.setattr(torch.Tensor, "tril", lambda *_: pytest.fail("a mask"))
    with torch.inference_mode():
        torch.testing.assert_close(attention(q, k, v, 7), expected, **CLOSE)


def test_on_a_gpu_no_kernel_that_plans_first_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def own(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(q, k, v, start)

    model = Llama(build_model().config, attend=own)
    model(prompt(4))
    monkeypatch.setattr(Llama, "device", torch.device("cuda"))
    monkeypatch.setattr(Llama, "rope", lambda self, start, T: (torch.ones(T, 8), torch.zeros(T, 8)))
    model(prompt(4))  # on the CPU
    assert seen == [True, True, False, False] and torch.backends.cuda.cudnn_sdp_enabled()


def test_the_attention_can_be_replaced() -> None:
    seen: list[tuple[int, int]] = []

    def own(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        seen.append((q.shape[2], start))
        return attention(q, k, v, start)

    model = build_model()
    replaced = Llama(model.config, attend=own)
    replaced.load_state_dict(model.state_dict())
    kv = replaced.new_kv(12)
    with torch.inference_mode():
        both = torch.cat((replaced(prompt(12)[:, :8], kv), replaced(prompt(12)[:, 8:], kv, 8)), dim=1)
    torch.testing.assert_close(both, model(prompt(12)), **CLOSE)
    assert seen == [(8, 0), (8, 0), (4, 8), (4, 8)]


def test_norms_of_large_fp16_values_are_finite() -> None:
    norm = RMSNorm(4, 1e-5).half()
    got = norm(torch.full((1, 4), 60000.0, dtype=torch.float16))
    torch.testing.assert_close(got, torch.ones(1, 4, dtype=torch.float16), rtol=0, atol=1e-2)


def test_linear_scaling_slows_every_pair_by_its_factor() -> None:
    plain, scaled = (rope_frequencies(build_model(rope_scaling=s).config) for s in (None, RopeScaling("linear", 4.0)))
    torch.testing.assert_close(scaled * 4, plain)


def test_llama3_scaling_keeps_fast_pairs_and_slows_slow_ones() -> None:
    plain, scaled = (
        rope_frequencies(build_model(head_dim=64, rope_scaling=s).config)
        for s in (None, RopeScaling("llama3", 8.0, 1.0, 4.0, 64))
    )
    assert float(scaled[0]) == float(plain[0])
    assert float(scaled[-1] * 8) == pytest.approx(float(plain[-1]))
    assert bool((scaled[:-1] >= scaled[1:]).all())


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(ModelError, match="llama3 or linear, got 'yarn'"):
        rope_frequencies(dataclasses.replace(build_model().config, rope_scaling=RopeScaling("yarn", 8.0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precisions_run_and_are_near(dtype: torch.dtype, model: Llama, sample: list[int]) -> None:
    tokens = torch.tensor([sample[:200]])
    low = Llama(model.config)
    low.load_state_dict(model.state_dict())
    low = low.to(dtype).eval()
    with torch.inference_mode():
        got, want = low(tokens, low.new_kv(200)), model(tokens)
    assert got.dtype == low.dtype == dtype
    assert float((got.float().softmax(-1) - want.softmax(-1)).abs().sum(-1).mean()) < 0.1


# --- bad calls ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([], "at least one token"),
        ([97], "0 … 96, got 97"),
        ([1, -1], "0 … 96, got -1"),
        ([1.0, 2.0], "integer tokens, got torch.float32"),
        ([True], "integer tokens, got torch.bool"),
        ([[1, 2]], "at least one token"),
        (5, "at least one token"),
        (list(range(97)) * 3, "context is 256 tokens, got a prompt of 291"),
        ([2**40], "0 … 96"),
        ([2**70], "expected"),
        (["a"], "expected"),
        ("def f():", "expected"),
        ([None], "expected"),
        (None, "expected"),
        ([[1], [2, 3]], "expected"),
    ],
    ids=lambda x: repr(x)[:20],
)
def test_what_is_no_prompt_is_refused(tokens: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        build_model().check_tokens(tokens)


@pytest.mark.parametrize("make", [list, tuple, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_prompts_come_in_any_integer_sequence(make: Callable[[list[int]], Any]) -> None:
    got = build_model().check_tokens(make([1, 2, 96]))
    assert got.dtype == torch.int64 and got.tolist() == [[1, 2, 96]]


def test_new_tokens_must_fit_the_context_too() -> None:
    model = build_model(context=32)
    model.check_tokens([1] * 30, new_tokens=2)
    with pytest.raises(InputError, match="30 plus 3 new tokens"):
        model.check_tokens([1] * 30, new_tokens=3)


@pytest.mark.parametrize(("T", "start", "capacity"), [(9, 0, 8), (1, 8, 8), (4, 5, 8), (1, -1, 8), (257, 0, None)])
def test_tokens_that_do_not_fit_are_refused(T: int, start: int, capacity: int | None) -> None:
    model = build_model()
    with pytest.raises(InputError, match="do not fit"):
        model(prompt(T), None if capacity is None else model.new_kv(capacity), start)


def test_room_in_the_kv_does_not_widen_the_context() -> None:
    model = build_model(context=32)
    kv = model.new_kv(64)
    model(prompt(32), kv)
    with pytest.raises(InputError, match="room for 32"):
        model(prompt(1), kv, 32)


def test_angles_do_not_depend_on_how_far_they_were_computed_before() -> None:
    """They are computed as far as a call needs them."""
    step, whole = build_model(), build_model()
    want = whole.rope(0, 256)
    for start, T in ((0, 1), (1, 1), (5, 3), (0, 100), (250, 6), (40, 60)):
        got = step.rope(start, T)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w[start : start + T], rtol=0, atol=1e-6)
    assert step._angles.shape[0] < 1000


def test_a_start_without_kv_is_refused() -> None:
    with pytest.raises(InputError, match="no earlier tokens"):
        build_model()(prompt(3), None, 2)


def test_the_shipped_model_is_what_the_course_says(model: Llama, tokenizer: Tokenizer) -> None:
    """Its sizes are in every notebook; its weights may be trained further."""
    c = model.config
    assert (c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim) == (6, 4, 2, 64)
    assert tokenizer.vocab_size == c.vocab_size == 4096
    assert model.dtype == torch.float32 and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_spec_of_the_shipped_model_has_64_token_blocks(spec: Any) -> None:
    assert spec.block_tokens("fp32") == spec.block_tokens("fp16") == 64
    assert spec.kv_bytes_per_token("fp32") == 6144
    assert spec_of(build_model()).fingerprint != spec.fingerprint
