"""One pass for many requests: the same KV and logits as one request at a time, wherever the pages are."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab.engine.batch import Row, forward
from kvlab.engine.pages import BlockTable, PagePool
from kvlab.model import Llama
from kvlab.model.llama import attention
from tests.harness.helpers import attentive_model

PAGE = 4
NEAR = {"rtol": 0.0, "atol": 2e-4}
LENGTHS = [(1, 0), (7, 0), (1, 13), (5, 9), (16, 0), (1, 40), (3, 8)]
"""New tokens, and tokens before them: prompts, chunks of prompts and decodes."""


def words(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(97), k=count)


def kv_and_logits(model: Llama, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Of one request alone: KV [L, P, H, T, D], and the logits [vocab] of its last token."""
    kv = model.new_kv(len(tokens))
    logits = model(torch.tensor([tokens]), kv)
    return kv[:, :, 0], logits[0, -1]


def scattered(pool: PagePool, tokens: int, rng: random.Random) -> BlockTable:
    """A table whose pages are no run: one of every two was taken by a table that is closed again."""
    table = pool.new_table()
    others = []
    for capacity in range(PAGE, tokens + PAGE, PAGE):
        pool.grow(table, capacity)
        others.append(pool.new_table(capacity=PAGE * rng.randint(1, 2)))
    for other in others:
        pool.close(other)
    assert table.is_run == (len(table.pages) < 2)
    return table


def rows_of(model: Llama, pool: PagePool, runs: bool, lengths: Any = LENGTHS) -> tuple[list[Row], list[list[int]]]:
    """Rows of requests whose earlier tokens have their KV, and all tokens of each."""
    rng = random.Random(3)
    rows, prompts = [], []
    for seed, (new, before) in enumerate(lengths):
        prompt = words(before + new, seed)
        table = pool.new_table(capacity=len(prompt)) if runs else scattered(pool, len(prompt), rng)
        if before:
            pool.write(pool.data, table, kv_and_logits(model, prompt)[0][:, :, :, :before], 0)
        rows.append(Row(table, prompt[before:], before))
        prompts.append(prompt)
    return rows, prompts


def blank_pool(model: Llama, pages: int = 200) -> PagePool:
    pool = PagePool(model, pages, page_tokens=PAGE)
    pool.data.fill_(torch.nan)  # what was not written must not be read
    return pool


def check_rows(model: Llama, rows: list[Row], prompts: list[list[int]], logits: Tensor) -> None:
    assert logits.shape == (len(rows), model.config.vocab_size)
    for row, prompt, row_logits in zip(rows, prompts, logits, strict=True):
        kv, expected = kv_and_logits(model, prompt)
        torch.testing.assert_close(row.table.read(row.stop), kv, **NEAR)
        torch.testing.assert_close(row_logits, expected, **NEAR)


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@torch.inference_mode()
def test_ragged_rows_have_the_kv_and_logits_of_one_request_at_a_time(kv_heads: int, runs: bool) -> None:
    model = attentive_model(kv_heads=kv_heads)
    pool = blank_pool(model)
    rows, prompts = rows_of(model, pool, runs)
    check_rows(model, rows, prompts, forward(model, pool, rows))


@torch.inference_mode()
def test_a_prompt_in_chunks_beside_decodes_is_the_prompt_at_once() -> None:
    model = attentive_model()
    pool = blank_pool(model)
    long, short = words(30, 1), words(20, 2)
    tables = [pool.new_table(capacity=40), pool.new_table(capacity=40)]
    forward(model, pool, [Row(tables[1], short[:9], 0)])
    cuts = [0, 1, 8, 9, 21, 30]
    for step, (start, stop) in enumerate(itertools.pairwise(cuts)):
        rows = [Row(tables[1], short[9 + step : 10 + step], 9 + step), Row(tables[0], long[start:stop], start)]
        check_rows(model, rows, [short[: 10 + step], long[:stop]], forward(model, pool, rows))


@torch.inference_mode()
def test_the_order_of_the_rows_does_not_matter() -> None:
    model = attentive_model()
    pool = blank_pool(model)
    rows, _ = rows_of(model, pool, runs=False)
    logits = forward(model, pool, rows)
    order = list(range(len(rows)))
    random.Random(1).shuffle(order)
    torch.testing.assert_close(forward(model, pool, [rows[i] for i in order]), logits[order], **NEAR)


@torch.inference_mode()
def test_a_row_writes_its_own_tokens_only() -> None:
    model = attentive_model()
    pool = blank_pool(model)
    rows, _ = rows_of(model, pool, runs=False)
    before = pool.data.clone()
    forward(model, pool, rows)
    changed = (pool.data.nan_to_num(-99.0) != before.nan_to_num(-99.0)).any(-1).all(2).all(1).all(0)
    expected = {(r.table.pages[at // PAGE], at % PAGE) for r in rows for at in range(r.start, r.stop)}
    assert {(int(page), int(offset)) for page, offset in changed.nonzero()} == expected
    touched = (pool.data.nan_to_num(-99.0) != before.nan_to_num(-99.0)).any(-1).any(2).any(1).any(0)
    assert torch.equal(touched, changed)


@torch.inference_mode()
def test_a_replaced_attention_is_called_for_each_row_and_layer() -> None:
    model = attentive_model()
    pool = blank_pool(model)
    rows, _ = rows_of(model, pool, runs=True)
    calls = []

    def attend(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        calls.append((q.shape[2], k.shape[2], v.shape[2], start))
        return attention(q, k, v, start) * 0.5

    plain = forward(model, pool, rows)
    model.attend = attend
    changed = forward(model, pool, rows)
    assert calls == [(len(row.tokens), row.stop, row.stop, row.start) for row in rows] * 2
    assert not torch.allclose(plain, changed)


@torch.inference_mode()
def test_rows_that_share_pages_of_a_prefix_read_the_same_ones() -> None:
    model = attentive_model()
    pool = blank_pool(model)
    prefix = words(8, 1)
    one = pool.new_table(capacity=8)
    forward(model, pool, [Row(one, prefix, 0)])
    two = pool.fork(one)
    rows, prompts = [], []
    for table, seed in ((one, 2), (two, 3)):
        pool.grow(table, 14)
        prompts.append([*prefix, *words(6, seed)])
        rows.append(Row(table, prompts[-1][8:], 8))
    check_rows(model, rows, prompts, forward(model, pool, rows))
    assert one.pages[:2] == two.pages[:2] and not {*one.pages[2:]} & {*two.pages[2:]}


@torch.inference_mode()
def test_the_logits_are_those_of_each_rows_last_token() -> None:
    """The ragged pass itself, without pages: one sequence cut at different places."""
    model = attentive_model()
    tokens = torch.tensor(words(12, 5))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, 0)

    all_logits = model(tokens[None])[0]
    for last in ([11], [0, 5, 11], [3]):
        logits = model.forward_ragged(tokens, torch.arange(12), torch.tensor(last), attend)
        torch.testing.assert_close(logits, all_logits[last], **NEAR)


@torch.inference_mode()
def test_positions_far_beyond_the_angles_so_far_are_right() -> None:
    model = attentive_model(context=4096)
    token, v = torch.tensor([5, 5]), torch.tensor([0, 1])

    def keys(position: int) -> Tensor:
        kept: list[Tensor] = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept.append(k)
            return q

        model.forward_ragged(token, torch.tensor([position, 3]), v, attend)
        return kept[0]

    early = keys(7)
    late = keys(3000)
    assert torch.equal(early[:, :, 1], late[:, :, 1]) and not torch.equal(early[:, :, 0], late[:, :, 0])
    cos, sin = model.rope(3000, 1)
    again = attentive_model(context=4096)
    assert torch.equal(cos, again.rope(3000, 1)[0]) and torch.equal(sin, again.rope(3000, 1)[1])


@torch.inference_mode()
def test_another_thread_with_shorter_prompts_changes_nothing() -> None:
    """Two schedulers in two threads may have one model; either may replace the angles right after the other."""

    class Shared(Llama):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_angles" and len(value) > 10:
                super().__setattr__(name, value[:10].clone())

    plain = attentive_model()
    shared = Shared(plain.config)
    shared.load_state_dict(plain.state_dict())
    pools = [blank_pool(model) for model in (plain, shared)]
    logits = [
        forward(model, pool, [Row(pool.new_table(capacity=60), words(60, 1), 0)])
        for model, pool in zip((plain, shared), pools, strict=True)
    ]
    assert len(shared._angles) == 10 and torch.equal(*logits)
