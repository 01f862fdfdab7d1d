"""Traces of requests: which blocks came when. No text and no tokens, so they can be shared.

A trace is a JSONL file, one request a line. Three forms are read and written:

    mooncake  {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}, blocks of 512 tokens.
              Source: github.com/kvcache-ai/Mooncake, FAST25-release
    bailian   the same with seconds, and chat_id, parent_chat_id, type, turn; blocks of 16 tokens.
              Source: github.com/alibaba-edu/qwen-bailian-usagetraces-anon
    kvlab     a mooncake line with "block_size": n, so that no reader has to guess it, and "kept_ids" if it is known
              which blocks the answer adds

`hash_ids` has an id for each block of the prompt, and for its last part too if that is shorter than a block. An id
stands for its block and all blocks before it. Where ids stand for the content of one block only, the reader chains
them. The block size is not in the files of others: a wrong one gives other hit rates and no error, so each line is
checked to have as many ids as its length needs.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TextIO

from kvlab.errors import InputError

BLOCK_TOKENS: Final = {"mooncake": 512, "bailian": 16}
FORMS: Final = ("kvlab", "mooncake", "bailian")
IDS: Final = ("prefix", "content")
CHECKED_IDS: Final = 1_000_000
"""Of so many ids the block before them is remembered, to find ids that do not stand for prefixes."""
_OWN: Final = ("timestamp", "input_length", "output_length", "hash_ids", "kept_ids", "block_size")


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        at_s: when it comes, in seconds.
        tokens, new: of its prompt, and of its answer.
        blocks: the ids of its prompt's blocks. The last one may be a part of a block.
        kept: the ids of the blocks that are cached when it has ended, those of the answer included; None: `blocks`.
        extra: all other fields of its line.
    """

    at_s: float
    tokens: int
    new: int
    blocks: Sequence[int]
    kept: Sequence[int] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def used(self) -> Sequence[int]:
        """The blocks that the request uses or leaves."""
        return self.blocks if self.kept is None else self.kept


def from_blocks(chains: Iterable[Sequence[int]], block_tokens: int = 1) -> list[Request]:
    """Return a request for each list of block ids, one a second, of full blocks and one new token."""
    return [Request(float(at), len(blocks) * block_tokens, 1, blocks) for at, blocks in enumerate(chains)]


def spread(requests: Iterable[Request], bucket_s: float = 0.0, speed: float = 1.0) -> Iterator[Request]:
    """Spread requests of one time evenly over the `bucket_s` seconds after it, then let all come `speed` times as fast.

    Their order stays: where the next time is sooner, they are spread up to it.
    Many traces have coarse times: that of Mooncake has all requests of three seconds at one of them.
    """
    before: list[Request] = []
    for at, group in itertools.groupby(requests, lambda request: request.at_s):
        if before:
            yield from _spread(before, min(bucket_s, at - before[0].at_s), speed)
        before = list(group)
    yield from _spread(before, bucket_s, speed)


def _spread(same: list[Request], seconds: float, speed: float) -> Iterator[Request]:
    for place, request in enumerate(same):
        yield replace(request, at_s=(request.at_s + seconds * place / len(same)) / speed)


class Trace:
    """A trace file. Each iteration reads it from the start, a line at a time, so it may be larger than memory.

    Args:
        block_tokens: tokens in a block; by default what the lines say, else that of the form.
        form: one of `FORMS`; by default it is recognised by the fields of the first line.
        ids: "prefix" or "content"; by default "content" for bailian, which is right for both, else "prefix".

    Raises:
        InputError: the file cannot be read, its first line is not a request, or an option is unknown. While it is
            read: a line is not a request of this block size, or comes before the line before it.
    """

    def __init__(
        self, file: str | Path, block_tokens: int | None = None, form: str | None = None, ids: str | None = None
    ) -> None:
        self.file = Path(file)
        if form not in (*FORMS, None) or ids not in (*IDS, None):
            raise InputError(f"expected a form of {FORMS} and ids of {IDS}, got {form!r} and {ids!r}")
        first = next(self._rows(), None)
        if first is None:
            raise InputError(f"{self.file}: expected a request on each line, got an empty file")
        said = first[1].get("block_size")
        self.form = form or ("bailian" if "chat_id" in first[1] else "kvlab" if said else "mooncake")
        size = block_tokens or said or BLOCK_TOKENS.get(self.form)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"{self.file}: expected a block size of 1 or more tokens, got {size!r}")
        self.block_tokens: int = size
        self.ids = ids or ("content" if self.form == "bailian" else "prefix")
        self._request(*first)  # its mistakes are told before anything is done

    def __iter__(self) -> Iterator[Request]:
        at, order = float("-inf"), _Chained() if self.ids == "content" else _Prefixes()
        for number, row in self._rows():
            request = self._request(number, row)
            if request.at_s < at:
                raise self._wrong(
                    number, f"comes at {request.at_s:g} s, after a line at {at:g} s; sort the lines by time"
                )
            at = request.at_s
            try:
                yield order.checked(request)
            except InputError as error:
                raise self._wrong(number, str(error)) from None

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            with self.file.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield number, self._row(number, line)
        except UnicodeDecodeError:
            raise InputError(f"{self.file}: expected text in UTF-8; is this a compressed file?") from None
        except OSError as error:
            raise InputError(f"{self.file}: expected a trace file, got: {error.strerror}") from None

    def _row(self, number: int, line: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise self._wrong(number, f"expected a JSON object, got {line.strip()[:60]!r}") from None
        if not isinstance(row, dict):
            raise self._wrong(number, f"expected a JSON object, got {line.strip()[:60]!r}")
        return row

    def _request(self, number: int, row: dict[str, Any]) -> Request:
        if missing := [name for name in _OWN[:4] if name not in row]:
            raise self._wrong(number, f"expected the fields {', '.join(_OWN[:4])}; missing: {', '.join(missing)}")
        at, tokens, new, ids = (row[name] for name in _OWN[:4])
        kept = row.get("kept_ids")
        if not _is_number(at):
            raise self._wrong(number, f"expected timestamp as a number below 1e15, got {at!r:.60}")
        for name, length, least in (("input_length", tokens, 1), ("output_length", new, 0)):
            if not _is_count(length) or length < least:
                raise self._wrong(number, f"expected {name} as a whole number from {least}, got {length!r:.60}")
        if not all(_are_ids(some) for some in (ids, ids if kept is None else kept)):
            raise self._wrong(number, "expected hash_ids to be a list of whole numbers or of texts")
        if row.get("block_size", self.block_tokens) != self.block_tokens:
            raise self._wrong(number, f"expected a block size of {self.block_tokens}, got {row['block_size']!r}")
        if kept is not None and len(kept) > -(-(tokens + new) // self.block_tokens):
            raise self._wrong(number, f"expected at most one of kept_ids for each block of {tokens} + {new} tokens")
        self._check_length(number, tokens, len(ids))
        extra = {name: value for name, value in row.items() if name not in _OWN}
        return Request(at if self.form == "bailian" else at / 1000, tokens, new, ids, kept, extra)

    def _check_length(self, number: int, tokens: int, ids: int) -> None:
        size = self.block_tokens
        if ids == -(-tokens // size):
            return
        fitting = [2**i for i in range(21) if -(-tokens // 2**i) == ids]
        remedy = f"; this fits blocks of {' or '.join(map(str, fitting))}: use --block" if fitting else ""
        raise self._wrong(
            number, f"expected {-(-tokens // size)} hash_ids for {tokens} tokens in blocks of {size}, got {ids}{remedy}"
        )

    def _wrong(self, number: int, text: str) -> InputError:
        return InputError(f"{self.file}, line {number}: {text}")


class _Prefixes:
    """Refuses ids that follow different ids: they cannot stand for a whole prefix."""

    def __init__(self) -> None:
        self._before: dict[int, int | None] = {}

    def checked(self, request: Request) -> Request:
        before: int | None = None
        known = self._before
        for i, key in enumerate(request.blocks):
            if known.get(key, before) != before:
                raise InputError(
                    f"block {i} has the id {key!r}, which followed another block before: ids must stand for whole "
                    f"prefixes; if they stand for the content of single blocks: --ids content"
                )
            if len(known) < CHECKED_IDS:
                known[key] = before
            before = key
        return request


class _Chained:
    """Replaces ids of contents by ids of prefixes, 0, 1, 2, … in the order of their first use."""

    def __init__(self) -> None:
        self._ids: dict[tuple[int, Any], int] = {}

    def checked(self, request: Request) -> Request:
        kept = None if request.kept is None else self._chain(request.kept)
        return Request(request.at_s, request.tokens, request.new, self._chain(request.blocks), kept, request.extra)

    def _chain(self, contents: Sequence[Any]) -> list[int]:
        chain, last = [], -1
        for content in contents:
            last = self._ids.setdefault((last, content), len(self._ids))
            chain.append(last)
        return chain


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
    )  # so neither NaN nor inf


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int, str}


# --- writing ------------------------------------------------------------------------------------
def write(requests: Iterable[Request], file: str | Path | TextIO, block_tokens: int, form: str = "kvlab") -> int:
    """Write requests, and return how many. A file is replaced when all of them are written.

    Raises:
        InputError: the form is unknown, or has no place for `kept`.
    """
    if form not in FORMS:
        raise InputError(f"expected one of the forms {', '.join(FORMS)}, got {form!r}")
    if not isinstance(file, str | Path):
        return _write(requests, file, block_tokens, form)
    partial = Path(f"{file}.part")
    try:
        with partial.open("w", encoding="utf-8") as lines:
            count = _write(requests, lines, block_tokens, form)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _write(requests: Iterable[Request], lines: TextIO, block_tokens: int, form: str) -> int:
    count = 0
    for count, request in enumerate(requests, 1):  # noqa: B007 (it is returned)
        lines.write(json.dumps(_line(request, block_tokens, form)) + "\n")
    return count


def _line(request: Request, block_tokens: int, form: str) -> dict[str, Any]:
    at = request.at_s if form == "bailian" else round(request.at_s * 1000, 3)
    row: dict[str, Any] = {
        "timestamp": int(at) if at == int(at) else at,
        "input_length": request.tokens,
        "output_length": request.new,
        "hash_ids": list(request.blocks),
    }
    if form == "bailian":
        row = {"chat_id": -1, "parent_chat_id": -1, **request.extra, **row}
    else:
        row |= request.extra
    if form == "kvlab":
        row["block_size"] = block_tokens
    if request.kept is not None:
        if form != "kvlab":
            raise InputError(f"expected the form kvlab for requests with kept blocks, got {form}: it would lose them")
        row["kept_ids"] = list(request.kept)
    return row
