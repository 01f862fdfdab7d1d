"""Conversion of text to tokens and back, with Hugging Face's `tokenizers` and a folder's tokenizer.json.

Only tokenizer.json determines the tokens of a text. Its settings for truncation, padding and dropout
are ignored, and so is `tokenizer_config.json`.

This module also has the frozen held-out text: modules written for this project, on which no model
was trained. Every exact number of the course is computed from this text, so it never changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer

from kvlab.errors import InputError, ModelError
from kvlab.model.digests import TOKENIZER, tokenizer_digest
from kvlab.model.files import read_folder
from kvlab.model.load import PRETRAINED

HELD_OUT = Path(__file__).parent / "heldout.txt"
_FILE_MARK = "=== "


class Tokenizer:
    """A model folder's tokenizer.

    Attributes:
        digest: the digest of tokenizer.json, for a fingerprint.

    Raises:
        ModelError: tokenizer.json is missing or damaged.

    >>> Tokenizer().decode(Tokenizer().encode("def f(x):"))
    'def f(x):'
    """

    def __init__(self, folder: str | Path = PRETRAINED) -> None:
        where = Path(folder) / TOKENIZER
        data = read_folder(folder, lambda files: files.read(TOKENIZER))
        if data is None:
            raise ModelError(f"{where}: not a tokenizer (the file is missing)")
        try:
            self.digest = tokenizer_digest(data, str(where))
            self._tokenizer = _Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises Exception itself for invalid files
            raise ModelError(f"{where}: not a tokenizer ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None

    @property
    def vocab_size(self) -> int:
        """The number of different tokens."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Convert text to tokens, without adding special tokens.

        Raises:
            InputError: the text is empty, or is not text that can be encoded as UTF-8.
        """
        if not text:
            raise InputError("expected a text that is not empty")
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except (TypeError, UnicodeError) as error:  # not text, or text with a lone surrogate
            raise InputError(f"expected text that can be encoded as UTF-8, got {text!r:.60}") from error

    def decode(self, tokens: Sequence[int]) -> str:
        """Convert tokens to text. Special tokens are left out.

        Raises:
            InputError: a value cannot be a token.
        """
        try:
            return str(self._tokenizer.decode(list(tokens)))
        except (TypeError, OverflowError) as error:
            raise InputError(f"expected a sequence of tokens of 0 or more ({error})") from error


def held_out() -> dict[str, str]:
    """Return the held-out text as {file name: text}, in the order of the file."""
    parts = HELD_OUT.read_text("utf-8").split(f"\n{_FILE_MARK}")
    named = (part.removeprefix(_FILE_MARK).partition("\n") for part in parts)
    return {name: text for name, _, text in named}


def held_out_tokens(tokenizer: Tokenizer, separator: int = 0) -> list[int]:
    """Return the held-out text as tokens, with `separator` before each file and at the end, as in training."""
    tokens: list[int] = []
    for text in held_out().values():
        tokens += [separator, *tokenizer.encode(text)]
    return [*tokens, separator]
