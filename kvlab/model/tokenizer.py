"""Text to tokens and back, by Hugging Face's `tokenizers` library from a folder's tokenizer.json.

That file alone says what the tokens of a text are. Other programs keep settings of a run in it
(truncation, padding, dropout); they are left aside, and so is `tokenizer_config.json`.

Also the frozen held-out text: modules written for this project that no model was trained
on. Every exact number of the course comes from it, so it never changes.
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
        digest: of the file that was read, for a fingerprint.

    Raises:
        ModelError: the folder has no tokenizer.json, or a damaged one.

    >>> Tokenizer().decode(Tokenizer().encode("def f(x):"))
    'def f(x):'
    """

    def __init__(self, folder: str | Path = PRETRAINED) -> None:
        where = Path(folder) / TOKENIZER
        data = read_folder(folder, lambda files: files.read(TOKENIZER))
        if data is None:
            raise ModelError(f"{where}: not a tokenizer (there is no such file)")
        try:
            self.digest = tokenizer_digest(data, str(where))
            self._tokenizer = _Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for what it does not understand
            raise ModelError(f"{where}: not a tokenizer ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None

    @property
    def vocab_size(self) -> int:
        """How many different tokens there are."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Text to tokens, with no special token added.

        Raises:
            InputError: the text is empty, or no text.
        """
        if not text:
            raise InputError("expected some text, got an empty prompt")
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except (TypeError, UnicodeError) as error:  # not text, or half a surrogate pair
            raise InputError(f"expected text that can be written as UTF-8, got {text!r:.60}") from error

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens to text. Special tokens are left out.

        Raises:
            InputError: something that cannot be a token.
        """
        try:
            return str(self._tokenizer.decode(list(tokens)))
        except (TypeError, OverflowError) as error:
            raise InputError(f"expected a sequence of tokens, each from 0 on ({error})") from error


def held_out() -> dict[str, str]:
    """The held-out sample as {file name: text}, in the order of the file."""
    parts = HELD_OUT.read_text("utf-8").split(f"\n{_FILE_MARK}")
    named = (part.removeprefix(_FILE_MARK).partition("\n") for part in parts)
    return {name: text for name, _, text in named}


def held_out_tokens(tokenizer: Tokenizer, separator: int = 0) -> list[int]:
    """The whole sample as one token sequence, `separator` before each file and at the end, as in training."""
    tokens: list[int] = []
    for text in held_out().values():
        tokens += [separator, *tokenizer.encode(text)]
    return [*tokens, separator]
