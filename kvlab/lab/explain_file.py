"""Why the prompt in a file is not in a store: `python -m kvlab explain`. See `kvlab.cache.explain` for the causes.

The salt is KVLAB_SALT and the master keys are KVLAB_KEYS in the environment, as for the connector of vLLM, because
command lines are visible to other users. The store is opened without a TTL, so nothing there lives longer by it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch

from kvlab.cache import DistributedKVCache
from kvlab.cache.explain import Explanation
from kvlab.connectors.identity import files_digest
from kvlab.core.seals import read_master_keys
from kvlab.errors import ConfigError, InputError
from kvlab.model import PRETRAINED, Tokenizer
from kvlab.model.fingerprint import DTYPES, spec_of_folder

IN_PROCESS = ("memory://", "fakeredis://")


def run(
    file: str,
    store: str | None,
    model: str | None = None,
    against: str | None = None,
    precision: str = "float16",
    dtype: str = "float32",
    block: int | None = None,
    adapter: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Explanation:
    """Explain the prompt in a file to a reader with these settings.

    Args:
        file, against: text in UTF-8, or a JSON list of tokens.
        store: the URL of a store that outlives a process.
        model: a folder; by default that of the shipped model.
        precision, block: of the cache; see `DistributedKVCache`.
        dtype: the compute dtype.
        adapter: the folder of a LoRA.
        environment: by default that of this process.

    Raises:
        ConfigError, InputError, ModelError: a setting, a file or the model folder cannot be used.
        OSError: a file cannot be read.
    """
    environment = os.environ if environment is None else environment
    if store is None or store.startswith(IN_PROCESS):
        raise ConfigError(
            "expected --url with a store that others use, such as redis://localhost:6379, or KVLAB_STORE; "
            f"got {'none' if store is None else 'one in this process, which is empty'}"
        )
    if dtype not in DTYPES:
        raise ConfigError(f"expected a compute dtype of {', '.join(DTYPES)}, got {dtype!r:.40}")
    folder = PRETRAINED if model is None else Path(model)
    spec = spec_of_folder(folder, getattr(torch, dtype), b"" if adapter is None else files_digest(adapter))
    tokenizer = _Lazy(folder)
    tokens, other = _tokens(file, tokenizer), None if against is None else _tokens(against, tokenizer)
    keys = environment.get("KVLAB_KEYS")
    options: dict[str, Any] = {
        "salt": os.fsencode(environment.get("KVLAB_SALT", "")),
        "encryption_keys": read_master_keys(keys) if keys else None,
        "block_tokens": block,
    }
    if store.startswith("file:") and not Path(unquote(urlsplit(store).path)).is_dir():
        raise ConfigError(f"expected a folder that is there, got {store}")  # a store would make it, and find it empty
    with DistributedKVCache(
        store=store, model=spec, precision=precision, ttl_seconds=None, describe=False, **options
    ) as cache:
        return cache.explain(tokens, other, tokenizer.decode)


def lines(found: Explanation) -> Iterator[str]:
    """Yield an explanation for people: the sentence first, then the blocks, then the notes."""
    yield found.sentence
    for (where, cause), group in groupby(found.blocks, lambda block: (block.where, block.cause)):
        indices = [block.index for block in group]
        numbers = str(indices[0]) if len(indices) == 1 else f"{indices[0]} … {indices[-1]}"
        yield f"  {'block' if len(indices) == 1 else 'blocks'} {numbers}: {where or 'missing'}{cause and f', {cause}'}"
    if found.here or found.there:
        yield f"  here:  {found.here!r}"
        yield f"  there: {found.there!r}"
    yield from (f"note: {note}" for note in found.notes)


class _Lazy:
    """The tokenizer of a folder, read when it is first needed: a list of tokens needs none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokenizer: Tokenizer | None = None

    def get(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._folder)
        return self._tokenizer

    def decode(self, tokens: Any) -> str:
        return self.get().decode(tokens)


def _tokens(file: str, tokenizer: _Lazy) -> list[int]:
    try:
        text = Path(file).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected text in UTF-8, or a JSON list of tokens ({error})") from error
    try:
        value = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return value
    if file.endswith(".json") or (isinstance(value, list) and any(type(token) is int for token in value)):
        raise InputError(
            f"{file}: expected a JSON list of whole numbers, the tokens; a text ends in another name than .json"
        )
    if not text:
        raise InputError(f"{file}: expected a text that is not empty, or a JSON list of tokens")
    return tokenizer.get().encode(text)
