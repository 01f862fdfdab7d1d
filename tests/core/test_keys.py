"""Keys: pinned by vectors, checked by a second implementation, and sensitive to all they should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlab.core.keys import KVSpec, Namespace, text_key, token_bytes
from kvlab.errors import ConfigError, InputError
from tests.core.make_golden import VECTORS
from tests.core.second import keys2, root2, text_key2, u32

PINNED = json.loads(VECTORS.read_text())


# --- vectors ------------------------------------------------------------------------------------
@pytest.mark.parametrize("vector", PINNED["namespaces"], ids=lambda v: f"{v['precision']}-{v['B']}")
def test_block_keys_are_the_pinned_ones(vector: dict[str, Any]) -> None:
    print_, salt = bytes.fromhex(vector["fingerprint"]), bytes.fromhex(vector["salt"])
    inputs = (print_, vector["precision"], salt, vector["B"])
    assert Namespace(*inputs).root.hex() == root2(*inputs).hex() == vector["root"]
    keys = [key.hex() for key in Namespace(*inputs).keys(vector["tokens"])]
    assert keys == [key.hex() for key in keys2(*inputs, vector["tokens"])] == vector["keys"]
    assert len(keys) == len(vector["tokens"]) // vector["B"]


@pytest.mark.parametrize("vector", PINNED["texts"], ids=lambda v: v["prefix"])
def test_text_keys_are_the_pinned_ones(vector: dict[str, Any]) -> None:
    salt, print_ = bytes.fromhex(vector["salt"]), bytes.fromhex(vector["fingerprint"])
    inputs = (vector["prefix"], vector["layer"], vector["precision"], salt, print_)
    assert text_key(*inputs).hex() == text_key2(*inputs).hex() == vector["key"]


# --- properties of keys -------------------------------------------------------------------------
prints = st.binary(min_size=32, max_size=32)
tokens_lists = st.lists(st.integers(0, 2**32 - 1), max_size=70)
precisions = st.sampled_from(["fp32", "fp16", "bf16", "int8", "int4"])


@given(prints, precisions, st.binary(max_size=40), st.integers(1, 70), tokens_lists)
def test_both_implementations_agree(print_: bytes, precision: str, salt: bytes, B: int, tokens: list[int]) -> None:
    keys = Namespace(print_, precision, salt, B).keys(tokens)
    assert keys == keys2(print_, precision, salt, B, tokens)
    assert len(set(keys)) == len(keys) == len(tokens) // B


@given(st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=60), st.integers(1, 8), st.data())
def test_a_changed_token_changes_its_block_and_all_later_ones(tokens: list[int], B: int, data: st.DataObject) -> None:
    j = data.draw(st.integers(0, len(tokens) - 1))
    other = data.draw(st.integers(0, 2**32 - 1).filter(lambda t: t != tokens[j]))
    ns = Namespace(bytes(32), "fp32", b"", B)
    before, after = ns.keys(tokens), ns.keys([*tokens[:j], other, *tokens[j + 1 :]])
    same = [a == b for a, b in zip(before, after, strict=True)]
    assert same == [i < j // B for i in range(len(before))]
    assert not set(before[j // B :]) & set(after)


@given(tokens_lists, st.integers(1, 16))
def test_keys_of_a_prefix_are_a_prefix_of_the_keys(tokens: list[int], B: int) -> None:
    ns = Namespace(bytes(32), "fp32", b"", B)
    for cut in (0, len(tokens) // 2, max(0, len(tokens) - 1)):
        assert ns.keys(tokens[:cut]) == ns.keys(tokens)[: cut // B]


ROOT = {"fingerprint": bytes(32), "precision": "fp32", "salt": b"", "block_tokens": 4}


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": bytes(31) + b"\1"},
        {"precision": "fp16"},
        {"precision": "bf16"},
        {"salt": b"\0"},
        {"salt": b"tenant"},
        {"block_tokens": 2},
        {"block_tokens": 8},
        {"precision": "fp", "salt": b"32"},
    ],
    ids=str,
)
def test_another_root_shares_no_key(change: dict[str, Any]) -> None:
    tokens = [5] * 64
    own, other = Namespace(**ROOT), Namespace(**{**ROOT, **change})
    assert own.root != other.root
    assert not set(own.keys(tokens)) & set(other.keys(tokens))


@given(st.text(max_size=20), st.integers(0, 100), precisions, st.binary(max_size=8), st.sampled_from([b"", bytes(32)]))
def test_no_text_key_is_a_key_of_anything_else(
    text: str, layer: int, precision: str, salt: bytes, print_: bytes
) -> None:
    key = text_key(text, layer, precision, salt, print_)
    others = [
        text_key(text + "x", layer, precision, salt, print_),
        text_key(text, layer + 1, precision, salt, print_),
        text_key(text, layer, precision + "x", salt, print_),
        text_key(text, layer, precision, salt + b"x", print_),
        text_key(text, layer, precision, salt, b"\1" * 32),
    ]
    blocks = Namespace(bytes(32), precision, salt, 1).keys(list(text.encode()))
    assert key not in others and key not in blocks and len(key) == 32


IN_ANOTHER_PROCESS = """
import sys
from kvlab.core.keys import Namespace, text_key
print_ = bytes(range(32))
print(*[key.hex() for key in Namespace(print_, "fp16", b"salt", 4).keys(range(1000, 1020))])
print(text_key("prefix", 3, "fp16", b"salt", print_).hex())
print("torch" in sys.modules)
"""


def test_two_processes_agree_and_keys_need_no_torch() -> None:
    runs = [
        subprocess.run(
            [sys.executable, "-c", IN_ANOTHER_PROCESS],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for seed in ("1", "2")
    ]
    print_ = bytes(range(32))
    keys = Namespace(print_, "fp16", b"salt", 4).keys(list(range(1000, 1020)))
    here = [" ".join(key.hex() for key in keys), text_key("prefix", 3, "fp16", b"salt", print_).hex(), "False"]
    assert runs[0] == runs[1] == here


# --- tokens -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "tokens", [[1, 2, 3], (1, 2, 3), range(1, 4), torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3], dtype=torch.int32)]
)
def test_tokens_may_come_in_any_integer_sequence(tokens: Any) -> None:
    assert token_bytes(tokens) == u32(1, 2, 3)


@given(tokens_lists)
def test_every_kind_of_sequence_gives_the_same_bytes(tokens: list[int]) -> None:
    kinds = (tokens, tuple(tokens), np.array(tokens, np.uint32), np.array(tokens, np.int64), [*np.array(tokens, "u4")])
    assert {token_bytes(t) for t in kinds} == {u32(*tokens)}


@pytest.mark.parametrize(
    "tokens",
    [
        [-1],
        [2**32],
        [2**64],
        [2**63, -1],
        [0.0],
        [1, 2.5],
        [float("nan")],
        ["1"],
        "123",
        b"123",
        [None],
        None,
        [True, False],
        (False,),
        np.array([True]),
        [1, -1],
        [1, 2**32],
        [1, None],
        [1, "2"],
        [np.float32(1)],
        (1.0,),
        [[1], [2, 3]],
        [[1, 2], [3, 4]],
        5,
        {1: 2},
        torch.tensor([1.0]),
    ],
    ids=repr,
)
def test_what_is_no_sequence_of_tokens_is_refused(tokens: Any) -> None:
    with pytest.raises(InputError, match="expected tokens"):
        token_bytes(tokens)


# --- the spec -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": 0},
        {"heads": 0},
        {"head_dim": -1},
        {"layers": "1"},
        {"heads": 2.5},
        {"head_dim": None},
        {"fingerprint": bytes(31)},
        {"fingerprint": b""},
    ],
    ids=str,
)
def test_a_spec_with_impossible_numbers_is_refused(wrong: dict[str, Any]) -> None:
    right = {"layers": 1, "heads": 1, "head_dim": 2, "dtype": torch.float32, "fingerprint": bytes(32)}
    with pytest.raises(ConfigError, match="expected positive sizes"):
        KVSpec(**{**right, **wrong})


def test_a_spec_tells_what_a_token_takes() -> None:
    spec = KVSpec(6, 2, 64, torch.float32, bytes(32))
    assert [spec.kv_bytes_per_token(p) for p in ("fp32", "fp16", "bf16", "int8", "int4")] == [
        6144,
        3072,
        3072,
        1536,
        768,
    ]
    with pytest.raises(ConfigError, match="fp8"):
        spec.kv_bytes_per_token("fp8")
