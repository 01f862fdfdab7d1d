"""From prompts to a trace: texts become salted ids, so that the file can be shared.

    python -m kvlab trace import prompts.jsonl --out trace.jsonl --tokenizer FOLDER

Each line is a JSON object with one of

    {"prompt": "…"}                               encoded as it is, without tokens that a tokenizer adds
    {"messages": [{"role": "…", "content": "…"}]} by the chat template of the folder, with "tools" if the line has any
    {"tokens": [1, 2, 3]}

and, if known, "answer" (a text), "output_length" (tokens), and "timestamp" (milliseconds) or "at_s" (seconds).
Nothing else of a line is written. Times count from the first request.

Where the folder has no chat template, or transformers is not installed to render it, messages are joined: a line
"role: content" for each, then "assistant:", and an answer follows after a space.

The ids are those of `kvlab.lab.trace_ids`. The salt is random and not kept, or it is that of a file: then several
files share ids, and whoever has the salt can test whether a text is in them. An answer is encoded from its text, so
splits of its tokens that only the model made are not seen.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvlab.errors import InputError
from kvlab.lab.trace_ids import trace_ids
from kvlab.lab.traces import BLOCK_TOKENS, FORMS, Request, write
from kvlab.model import PRETRAINED, Tokenizer

SALT_BYTES: Final = 32
SHORTEST_SALT: Final = 16
DEFAULT_BLOCK: Final = {"kvlab": 16, **BLOCK_TOKENS}
_PROMPTS: Final = ("prompt", "messages", "tokens")
_TIMES: Final = {"timestamp": 1000, "at_s": 1}
_UNITS: Final = {"timestamp": "milliseconds", "at_s": "seconds"}
SECONDS_NOW: Final = (1e9, 1e10)
"""Seconds since 1970 in our days. As milliseconds, they would be days of January 1970."""
_TOLD: Final = (
    "the file tells its reader when each request came, how long its prompt and its answer are, and which prompts "
    "begin alike, so whoever knows one of these prompts finds those that begin like it; "
)


@dataclass
class Imported:
    """What was imported.

    Attributes:
        form, block_tokens: of the trace.
        requests, tokens: how many, and tokens of all prompts.
        answers: requests whose answer has a known length; the length of others is written as 0.
        texts: requests whose answer has a text; their blocks are in the trace if its form has a place for them.
        timed: the field that times are from. Without, the requests come one second apart.
        first, span_s: the first value of that field, and seconds from the first request to the last.
        joined: why messages were joined without a chat template; None if none were.
        salt_file: where the salt is from; None if it was not kept.
    """

    form: str
    block_tokens: int
    salt_file: Path | None
    requests: int = 0
    tokens: int = 0
    answers: int = 0
    texts: int = 0
    timed: str = ""
    first: float = 0.0
    span_s: float = 0.0
    joined: str | None = None

    def lines(self) -> list[str]:
        """Return what the user should know, as lines of text; the last one is what the file gives away."""
        count, unknown = f"{self.requests:,} requests", self.requests - self.answers
        lines = [f"{count} with {self.tokens:,} prompt tokens, form {self.form}, blocks of {self.block_tokens} tokens"]
        if self.timed:
            lines.append(f"times: from {self.timed} ({_UNITS[self.timed]}), over {self.span_s:g} s")
            if self.timed == "timestamp" and SECONDS_NOW[0] < self.first < SECONDS_NOW[1]:
                lines.append("warning: these times look like seconds since 1970; if so, name the field at_s")
        else:
            lines.append("times: the lines have none, so the requests come one second apart")
        if unknown:
            lines.append(
                f"answers: {unknown:,} have no length, which is written as 0; a simulation makes them in no time"
            )
        if self.texts and self.form != "kvlab":
            lines.append("answers: their blocks are not written; only the form kvlab has a place for them")
        if self.joined:
            lines.append(f"messages: joined as lines 'role: content', because {self.joined}")
        if self.salt_file:
            return [
                *lines,
                f"{_TOLD}whoever has the salt in {self.salt_file} can test for any text whether it is in it",
            ]
        return [*lines, f"{_TOLD}the salt was not kept, so nobody can test whether a text is in it"]


def import_prompts(
    file: str | Path,
    out: str | Path,
    tokenizer: str | Path | None = None,
    block_tokens: int | None = None,
    salt_file: str | Path | None = None,
    form: str = "kvlab",
) -> Imported:
    """Write a trace of the prompts in a file. It is read a line at a time, and `out` is replaced at the end.

    Args:
        tokenizer: a folder in Hugging Face's format; by default that of the shipped model.
        block_tokens: by default 512 for mooncake, else 16.
        salt_file: a file of at least 16 random bytes.
        form: one of `kvlab.lab.traces.FORMS`.

    Raises:
        InputError: a file cannot be used, or a line is not a request: its number is named, and nothing is written.
        ModelError: the folder has no tokenizer.
    """
    if form not in FORMS:
        raise InputError(f"expected one of the forms {', '.join(FORMS)}, got {form!r}")
    source, target = Path(file), Path(out)
    folder = PRETRAINED if tokenizer is None else Path(tokenizer)
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder with a tokenizer.json")
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f"{target}: expected the name of a file in a folder that exists")
    if any(path.exists() and source.exists() and path.samefile(source) for path in (target, Path(f"{target}.part"))):
        raise InputError(f"{target}: expected another file than the one that is read")
    done = Imported(form, block_tokens or DEFAULT_BLOCK[form], None if salt_file is None else Path(salt_file))
    write(_Reader(source, folder, done).requests(), target, done.block_tokens, form)
    return done


class _Reader:
    def __init__(self, file: Path, folder: Path, done: Imported) -> None:
        self._file, self._folder, self._done = file, folder, done
        self._tokenizer = Tokenizer(folder)
        self._salt = _salt(done.salt_file) if done.salt_file else secrets.token_bytes(SALT_BYTES)
        self._chat: _Chat | None = None
        self._time: str | None = None
        self._begin = self._last = 0.0

    def requests(self) -> Iterator[Request]:
        for number, row in self._rows():
            try:
                request = self._request(row)
            except InputError as error:
                raise self._wrong(number, str(error)) from None
            self._done.requests += 1
            self._done.tokens += request.tokens
            yield request
        if not self._done.requests:
            raise InputError(f"{self._file}: expected a prompt on each line, got an empty file")

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            with self._file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield number, self._row(number, line)
        except OSError as error:
            raise InputError(f"{self._file}: expected a file of prompts, got: {error.strerror}") from None

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise self._wrong(number, "expected text in UTF-8; is this a compressed file?") from None
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise self._wrong(number, f"expected a JSON object, got {text[:60]!r}")
        return row

    def _wrong(self, number: int, text: str) -> InputError:
        return InputError(f"{self._file}, line {number}: {text}")

    def _request(self, row: dict[str, Any]) -> Request:
        at_s = self._at(row)
        tokens, lead = self._prompt(row)
        answer = self._answer(row, lead)
        new = row.get("output_length")
        if new is not None and not (type(new) is int and 0 <= new < 1 << 40):
            raise InputError(f"expected output_length as a whole number of tokens, got {new!r:.60}")
        length = len(answer) if new is None else new
        self._done.answers += new is not None or row.get("answer") is not None
        blocks, kept = trace_ids(tokens, self._done.block_tokens, self._salt, answer[:length])
        return Request(at_s, len(tokens), length, blocks, kept if self._done.form == "kvlab" else None)

    def _at(self, row: dict[str, Any]) -> float:
        names = [name for name in _TIMES if row.get(name) is not None]
        if len(names) > 1:
            raise InputError("expected timestamp (ms) or at_s, got both")
        name = names[0] if names else ""
        if self._time is None:
            self._time = self._done.timed = name
        if name != self._time:
            raise InputError(
                f"expected {self._time or 'no time'} as in the first line, got {name or 'no time'}; "
                f"times must be in all lines or in none"
            )
        if not name:
            return float(self._done.requests)
        at: float = row[name]
        if not (type(at) in (int, float) and abs(at) < 1e15):  # so neither NaN nor inf
            raise InputError(f"expected {name} as a number, got {at!r:.60}")
        at_s = at / _TIMES[name]
        if not self._done.requests:
            self._begin = self._last = at_s
            self._done.first = at
        if at_s < self._last:
            raise InputError(f"comes {self._last - at_s:g} s before the line before it; sort the lines by time")
        self._last = at_s
        self._done.span_s = at_s - self._begin
        return at_s - self._begin

    def _prompt(self, row: dict[str, Any]) -> tuple[list[int], str]:
        """The tokens of a prompt, and what stands between it and the text of its answer."""
        names = [name for name in _PROMPTS if row.get(name) is not None]
        if len(names) != 1:
            raise InputError(f"expected one of {', '.join(_PROMPTS)}, got {' and '.join(names) or 'none of them'}")
        (name,) = names
        value = row[name]
        if name == "messages":
            self._chat = self._chat or _Chat(self._folder)
            self._done.joined = self._chat.why_joined
            text, lead = self._chat.render(value, row.get("tools"))
            return self._tokenizer.encode(text), lead
        if name == "prompt":
            if not isinstance(value, str):
                raise InputError(f"expected a text as prompt, got {value!r:.60}; lists of numbers are called tokens")
            return self._tokenizer.encode(value), ""
        if not isinstance(value, list) or set(map(type, value)) != {int}:
            raise InputError(f"expected tokens as a list of whole numbers, got {value!r:.60}")
        return value, ""

    def _answer(self, row: dict[str, Any], lead: str) -> list[int]:
        text = row.get("answer")
        if text is None or text == "":
            return []
        if not isinstance(text, str):
            raise InputError(f"expected a text as answer, got {text!r:.60}")
        self._done.texts += 1
        return self._tokenizer.encode(lead + text)


def _salt(file: Path) -> bytes:
    try:
        salt = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: expected a file with a salt, got: {error.strerror}") from None
    if len(salt) < SHORTEST_SALT:
        raise InputError(f"{file}: expected a salt of {SHORTEST_SALT} random bytes or more, got {len(salt)}")
    return salt


class _Chat:
    """Messages as one text, by the chat template of a folder, or joined.

    Attributes:
        why_joined: why there is no template; None if there is one.
    """

    def __init__(self, folder: Path) -> None:
        self.why_joined: str | None = None
        self._template: Any = None
        config = folder / "tokenizer_config.json"
        if not (folder / "chat_template.jinja").exists() and not (
            config.exists() and '"chat_template"' in config.read_text("utf-8", "replace")
        ):
            self.why_joined = f"{'the shipped tokenizer' if folder == PRETRAINED else folder} has no chat template"
            return
        try:
            from transformers import PreTrainedTokenizerFast
        except ImportError:
            self.why_joined = 'transformers, which renders chat templates, is not installed: pip install "kvlab[hf]"'
            return
        try:
            self._template = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # of whatever kind the damage of the folder causes
            raise InputError(f"{folder}: transformers cannot read its chat template ({error})") from error

    def render(self, messages: Any, tools: Any) -> tuple[str, str]:
        if not isinstance(messages, list) or not messages or not all(_is_message(one) for one in messages):
            raise InputError(f"expected messages as a list of objects with a role, got {messages!r:.60}")
        if self._template is not None:
            return self._by_template(messages, tools), ""
        if tools or any(one.keys() != {"role", "content"} or type(one["content"]) is not str for one in messages):
            raise InputError(
                "expected messages of a role and a text, and no tools: only a chat template has a place for more, "
                "use --tokenizer with a folder that has one"
            )
        return "".join(f"{one['role']}: {one['content']}\n" for one in messages) + "assistant:", " "

    def _by_template(self, messages: list[dict[str, Any]], tools: Any) -> str:
        try:
            return str(
                self._template.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
            )
        except Exception as error:  # a template raises what it likes
            raise InputError(f"the chat template refuses the messages: {error}") from error


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)
