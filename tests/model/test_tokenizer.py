"""The tokenizer, and the held-out text on which every exact number of the course stands."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlab.errors import InputError, ModelError
from kvlab.model import Tokenizer, held_out, held_out_tokens
from kvlab.model.tokenizer import HELD_OUT

HELD_OUT_SHA256 = "18fb637aae8709a6a1086a8275040bc1c33430c2aac958a29cecd0a0360f9adb"
TOKENIZER = Tokenizer()
EOF = "<|eof|>"


@given(st.text(min_size=1).filter(lambda text: EOF not in text))
def test_any_text_comes_back(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == text
    assert all(0 <= token < TOKENIZER.vocab_size for token in tokens)


def test_the_held_out_text_comes_back(tokenizer: Tokenizer) -> None:
    for text in held_out().values():
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert len(tokens) < len(text) / 2


def test_cutting_a_text_can_change_its_tokens(tokenizer: Tokenizer) -> None:
    """Why a text prefix is no token prefix."""
    text = next(iter(held_out().values()))
    whole = tokenizer.encode(text)
    prefixes = [tokenizer.encode(text[:cut]) for cut in range(1, 200)]
    assert any(prefix != whole[: len(prefix)] for prefix in prefixes)


def test_no_special_token_is_added_and_special_tokens_are_not_shown(tokenizer: Tokenizer) -> None:
    assert 0 not in tokenizer.encode("def f(): pass")
    assert tokenizer.decode([0, *tokenizer.encode("x = 1"), 0]) == "x = 1"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("text", ["", None, b"bytes", 5, ["a"], "half a surrogate pair \ud800"], ids=repr)
def test_what_is_no_text_is_refused(tokenizer: Tokenizer, text: Any) -> None:
    right = InputError if isinstance(text, str | None) else (InputError, TypeError)
    with pytest.raises(right):
        tokenizer.encode(text)


@pytest.mark.parametrize("tokens", [[-1], [2**40], [0.5], ["a"]], ids=repr)
def test_what_are_no_tokens_is_refused(tokenizer: Tokenizer, tokens: Any) -> None:
    right = InputError if isinstance(tokens[0], int) else (InputError, TypeError)
    with pytest.raises(right):
        tokenizer.decode(tokens)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: None,
        lambda file: file.write_text(""),
        lambda file: file.write_text("{}"),
        lambda file: file.write_text("[1]"),
        lambda file: file.write_bytes(b"\xff\xfe"),
    ],
    ids=["missing", "empty", "no fields", "a list", "not text"],
)
def test_a_folder_without_tokenizer_says_so(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    damage(tmp_path / "tokenizer.json")
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer(tmp_path)


# --- the held-out text --------------------------------------------------------------------------
def test_the_held_out_text_is_frozen() -> None:
    """Every exact number of the course comes from it: it never changes, line ends included."""
    assert hashlib.sha256(HELD_OUT.read_bytes()).hexdigest() == HELD_OUT_SHA256


def test_the_held_out_text_is_24_modules_that_compile() -> None:
    files = held_out()
    assert len(files) == 24
    for name, text in files.items():
        assert name.endswith(".py") and "\n" not in name
        assert len(text) > 1000
        compile(text, name, "exec")


def test_the_sample_is_the_files_with_a_mark_before_each_and_at_the_end(tokenizer: Tokenizer) -> None:
    tokens = held_out_tokens(tokenizer)
    assert tokens[0] == tokens[-1] == 0
    assert tokens.count(0) == 25
    first = tokenizer.decode(tokens[1 : tokens.index(0, 1)])
    assert first == next(iter(held_out().values()))
    other = held_out_tokens(tokenizer, separator=5)
    assert len(other) == len(tokens) and other[0] == 5
