"""The tokenizer, and the held-out text on which every exact number of the course stands."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlab.errors import InputError, ModelError
from kvlab.model import PRETRAINED, Tokenizer, held_out, held_out_tokens
from kvlab.model.tokenizer import HELD_OUT
from tests.harness.helpers import edit_json

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
        lambda file: file.write_text("[" * 100_000),
        lambda file: file.write_text('{"model":' * 100_000),
        lambda file: file.mkdir(),
        lambda file: file.symlink_to(file),
    ],
    ids=["missing", "empty", "no fields", "a list", "not text", "deep", "deep inside", "a folder", "a circle"],
)
def test_a_folder_without_tokenizer_says_so(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    damage(tmp_path / "tokenizer.json")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


# --- what other programs leave in the file ------------------------------------------------------
TEXT = "x = 1\n" * 100
EOF_FIRST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": EOF, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {EOF: {"id": EOF, "ids": [0], "tokens": [EOF]}},
}
PADDING = {
    "strategy": {"Fixed": 2000},
    "direction": "Left",
    "pad_to_multiple_of": 7,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": EOF,
}
TRUNCATION = {"direction": "Right", "max_length": 32, "strategy": "LongestFirst", "stride": 0}
LEFT_BEHIND: dict[str, dict[str, Any]] = {
    "truncation": {"truncation": TRUNCATION},
    "truncation from the left": {"truncation": {**TRUNCATION, "direction": "Left", "max_length": 1, "stride": 0}},
    "padding": {"padding": PADDING},
    "padding to the longest": {"padding": {**PADDING, "strategy": "BatchLongest"}},
    "both": {"truncation": TRUNCATION, "padding": PADDING},
    "a special token before every text": {"post_processor": EOF_FIRST},
    "a special token and truncation": {"post_processor": EOF_FIRST, "truncation": TRUNCATION},
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with the shipped tokenizer."""
    return Path(shutil.copytree(PRETRAINED, tmp_path / "own", ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_the_run_time_state_of_another_program_changes_no_token(own: Path, name: str, tokenizer: Tokenizer) -> None:
    edit_json(own / "tokenizer.json", **LEFT_BEHIND[name])
    other = Tokenizer(own)
    assert len(tokenizer.encode(TEXT)) == 500
    assert other.encode(TEXT) == tokenizer.encode(TEXT)
    assert other.decode(other.encode(TEXT)) == TEXT
    assert (other.digest == tokenizer.digest) == ("post_processor" not in LEFT_BEHIND[name])


def test_merges_that_training_leaves_out_by_chance_are_all_applied(own: Path, tokenizer: Tokenizer) -> None:
    """BPE dropout makes tokens random: a text would never find its own prefix."""
    model = json.loads((own / "tokenizer.json").read_text())["model"]
    edit_json(own / "tokenizer.json", model={**model, "dropout": 0.9})
    other = Tokenizer(own)
    assert all(other.encode(TEXT) == tokenizer.encode(TEXT) for _ in range(5))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"])
def test_settings_beside_the_file_change_no_token(own: Path, file: str, tokenizer: Tokenizer) -> None:
    settings = {
        **{"model_max_length": 5, "padding_side": "left", "truncation_side": "left", "add_bos_token": True},
        **{"add_prefix_space": True, "do_lower_case": True, "split_special_tokens": True, "max_length": 5},
        **{"additional_special_tokens": ["x = 1"], "pad_token": "=", "max_new_tokens": 1, "temperature": 2.0},
    }
    (own / file).write_text(json.dumps(settings))
    assert Tokenizer(own).encode(TEXT) == tokenizer.encode(TEXT)
    assert Tokenizer(own).digest == tokenizer.digest
    (own / file).write_text("{ damaged")
    assert Tokenizer(own).encode(TEXT) == tokenizer.encode(TEXT)


def test_a_token_that_was_added_is_one_token(own: Path) -> None:
    """Added tokens are no state: they stand in tokenizer.json and count, in the digest too."""
    added = json.loads((own / "tokenizer.json").read_text())["added_tokens"]
    edit_json(own / "tokenizer.json", added_tokens=[*added, {**added[0], "id": 4096, "content": "<|new|>"}])
    other = Tokenizer(own)
    assert other.encode("<|new|>") == [4096] and len(TOKENIZER.encode("<|new|>")) > 1
    assert other.digest != TOKENIZER.digest


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
