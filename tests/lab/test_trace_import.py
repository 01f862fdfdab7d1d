"""`trace import`: prompts become ids that share exactly what the prompts share, and no text is left in the file."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kvlab.cli import FAILURE, SUCCESS, main
from kvlab.errors import InputError
from kvlab.lab.replay import replay
from kvlab.lab.trace_ids import trace_ids
from kvlab.lab.trace_import import Imported, import_prompts
from kvlab.lab.traces import Request, Trace
from kvlab.model import PRETRAINED, Tokenizer, held_out

TOKENIZER = Tokenizer()
SALT = bytes(range(32))
CHAT = [{"role": "system", "content": "You answer."}, {"role": "user", "content": "What is a KV cache?"}]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<|eof|>{% endif %}{% for m in messages %}"
    "{% if m.role == 'odd' %}{{ raise_exception('no such role') }}{% endif %}"
    "[{{ m.role }}]\n{{ m.content }}<|eof|>{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def file_of(folder: Path, *rows: Any, name: str = "prompts.jsonl") -> Path:
    file = folder / name
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return file


def imported(folder: Path, *rows: Any, **settings: Any) -> tuple[Imported, Trace]:
    done = import_prompts(file_of(folder, *rows), folder / "out.jsonl", **settings)
    return done, Trace(folder / "out.jsonl", done.block_tokens, done.form, "prefix")


def alike(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def template_folder(folder: Path) -> Path:
    where = folder / "with a template"
    where.mkdir()
    shutil.copy(PRETRAINED / "tokenizer.json", where)
    (where / "chat_template.jinja").write_text(TEMPLATE)
    return where


# --- what is written ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """1,000 prompts from the held-out text; many begin with one of ten texts, some are equal."""
    rng, text = random.Random(1), "".join(held_out().values())
    begins = [text[(start := rng.randrange(90_000)) : start + rng.randrange(100, 1500)] for _ in range(10)]
    made = []
    for _ in range(980):
        start = rng.randrange(90_000)
        made.append((rng.choice(begins) if rng.random() < 0.7 else "") + text[start : start + rng.randrange(1, 900)])
    return [*made, *made[:20]]


def test_a_thousand_prompts_come_back_with_what_they_share(
    prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = file_of(tmp_path, *({"prompt": prompt} for prompt in prompts))
    assert main(["trace", "import", str(file), "--out", str(tmp_path / "t.jsonl")]) == SUCCESS
    tokens = [TOKENIZER.encode(prompt) for prompt in prompts]
    lines = capsys.readouterr().out.splitlines()
    total = sum(map(len, tokens))
    assert lines[0] == f"1,000 requests with {total:,} prompt tokens, form kvlab, blocks of 16 tokens"
    assert lines[1] == "times: the lines have none, so the requests come one second apart"
    trace = Trace(tmp_path / "t.jsonl")
    requests = list(trace)
    assert (trace.form, trace.block_tokens) == ("kvlab", 16)
    assert [request.tokens for request in requests] == [len(one) for one in tokens]
    assert [request.at_s for request in requests] == list(range(1000))
    for a in range(0, 1000, 7):
        for b in range(a + 1, 1000, 13):
            same = len(requests[a].blocks) if tokens[a] == tokens[b] else alike(tokens[a], tokens[b]) // 16
            assert alike(list(requests[a].blocks), list(requests[b].blocks)) == same
    wanted = replay(by_hand(tokens), 16).hits.rates()
    assert replay(requests, 16).hits.rates() == wanted and 0.3 < wanted["blocks"] < 0.9


def by_hand(tokens: list[list[int]]) -> list[Request]:
    """The same trace with the texts of prefixes as ids."""
    made = []
    for at, one in enumerate(tokens):
        chain: list[Any] = [str(one[: i + 16]) for i in range(0, len(one), 16)]
        made.append(Request(float(at), len(one), 0, chain, chain[: len(one) // 16]))
    return made


def test_no_text_and_no_token_is_in_the_file(prompts: list[str], tmp_path: Path) -> None:
    row = {"prompt": prompts[0], "answer": "a secret", "user": "Ada", "messages": None, "timestamp": 1_700_000_000_123}
    imported(tmp_path, row, {**row, "prompt": prompts[1], "timestamp": 1_700_000_000_623.5})
    written = (tmp_path / "out.jsonl").read_text()
    names = {"timestamp", "input_length", "output_length", "hash_ids", "kept_ids", "block_size"}
    assert [set(json.loads(line)) for line in written.splitlines()] == [names, names]
    assert not any(text in written for text in ("secret", "Ada", "user", "1700000000"))
    assert [json.loads(line)["timestamp"] for line in written.splitlines()] == [0, 500.5], "from the first request on"


def test_every_import_has_a_salt_of_its_own(prompts: list[str], tmp_path: Path) -> None:
    rows = [{"prompt": prompt} for prompt in prompts[:30]]
    seen = []
    for _ in range(2):
        requests = list(imported(tmp_path, *rows)[1])
        seen.append({one for request in requests for one in request.blocks})
    assert len(seen[0]) == len(seen[1]) > 300 and not seen[0] & seen[1]


def test_files_with_one_salt_share_ids(prompts: list[str], tmp_path: Path) -> None:
    salt = tmp_path / "salt"
    salt.write_bytes(SALT)
    first = list(imported(tmp_path, {"prompt": prompts[0]}, salt_file=salt)[1])
    second = list(imported(tmp_path, {"prompt": prompts[1]}, {"prompt": prompts[0]}, salt_file=salt)[1])
    assert first[0].blocks == second[1].blocks == trace_ids(TOKENIZER.encode(prompts[0]), 16, SALT)[0]
    salt.write_bytes(SALT + b"\n")
    other = list(imported(tmp_path, {"prompt": prompts[0]}, salt_file=salt)[1])
    assert not set(other[0].blocks) & set(first[0].blocks)


@pytest.mark.parametrize(("form", "block", "size"), [("mooncake", None, 512), ("bailian", None, 16), ("kvlab", 64, 64)])
def test_forms_and_block_sizes(form: str, block: int | None, size: int, prompts: list[str], tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "answer": prompts[0], "at_s": 10 + i / 4} for i, prompt in enumerate(prompts[:9])]
    done, trace = imported(tmp_path, *rows, form=form, block_tokens=block)
    recognised = Trace(tmp_path / "out.jsonl")
    assert (recognised.form, recognised.block_tokens) == (form, size) and done.block_tokens == size
    for prompt, request, i in zip(prompts, trace, range(9), strict=False):
        assert request.tokens == len(TOKENIZER.encode(prompt)) and request.at_s == i / 4
        assert (request.kept is None) == (form != "kvlab")
    told = "answers: their blocks are not written; only the form kvlab has a place for them"
    assert (told in done.lines()) == (form != "kvlab")


# --- the fields of a line -----------------------------------------------------------------------
def test_answers_are_kept_as_their_text_encodes(tmp_path: Path) -> None:
    prompt, answer = "def add(a, b):\n    ", "return a + b\n" * 20
    tokens, new = TOKENIZER.encode(prompt), TOKENIZER.encode(answer)
    salt = tmp_path / "salt"
    salt.write_bytes(SALT)
    rows = [
        {"prompt": prompt, "answer": answer},
        {"prompt": prompt, "answer": answer, "output_length": 50},
        {"prompt": prompt, "answer": answer, "output_length": 900},
        {"prompt": prompt, "output_length": 7},
        {"prompt": prompt, "answer": ""},
        {"prompt": prompt},
    ]
    done, trace = imported(tmp_path, *rows, salt_file=salt)
    whole, part, more, length, empty, unknown = trace
    assert (whole.new, part.new, more.new, length.new, empty.new, unknown.new) == (len(new), 50, 900, 7, 0, 0)
    assert whole.kept == more.kept == trace_ids(tokens, 16, SALT, new)[1]
    assert part.kept == trace_ids(tokens, 16, SALT, new[:50])[1] and len(part.kept) < len(whole.kept or ())
    assert length.kept == empty.kept == unknown.kept == trace_ids(tokens, 16, SALT)[1]
    assert done.answers == 5
    assert any(line.startswith("answers: 1 have no length, which is written as 0") for line in done.lines())


@pytest.mark.parametrize(("name", "factor"), [("timestamp", 1000), ("at_s", 1)])
def test_times_count_from_the_first_request(name: str, factor: int, tmp_path: Path) -> None:
    times = [1_700_000_000.5, 1_700_000_000.5, 1_700_000_003, 1_700_009_000.25]
    done, trace = imported(tmp_path, *({"tokens": [1], name: at * factor} for at in times))
    assert [request.at_s for request in trace] == [0, 0, 2.5, 8999.75]
    told = {
        "timestamp": "times: from timestamp (milliseconds), over 8999.75 s",
        "at_s": "times: from at_s (seconds), over",
    }
    assert any(line.startswith(told[name]) for line in done.lines())
    assert not any(line.startswith("warning") for line in done.lines())


def test_seconds_that_are_called_milliseconds_are_noticed(tmp_path: Path) -> None:
    done, _ = imported(tmp_path, *({"tokens": [1], "timestamp": at} for at in (1_700_000_000.5, 1_700_000_300)))
    assert "warning: these times look like seconds since 1970; if so, name the field at_s" in done.lines()


def test_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    salt = tmp_path / "salt"
    salt.write_bytes(SALT)
    tokens = [5, 4_000_000_000, *range(60)]
    _, trace = imported(tmp_path, {"tokens": tokens}, salt_file=salt)
    assert [request.blocks for request in trace] == [trace_ids(tokens, 16, SALT)[0]]


def test_empty_lines_and_a_mark_of_byte_order_are_no_mistakes(tmp_path: Path) -> None:
    file = file_of(tmp_path, "\ufeff" + json.dumps({"tokens": [1]}), "", "   ", {"tokens": [2]})
    assert import_prompts(file, tmp_path / "out").requests == 2


# --- messages -----------------------------------------------------------------------------------
def growing(turns: int) -> list[dict[str, Any]]:
    rows, messages = [], [{"role": "system", "content": "You are brief. " * 20}]
    for i in range(turns):
        messages = [*messages, {"role": "user", "content": f"Question {i}: " + "why? " * 12}]
        rows.append({"messages": messages, "answer": f"Answer {i}: " + "because. " * 15})
        messages = [*messages, {"role": "assistant", "content": rows[-1]["answer"]}]
    return rows


@pytest.mark.parametrize("template", [False, pytest.param(True, marks=pytest.mark.hf)])
def test_a_turn_finds_the_blocks_of_the_turn_before_it_and_of_its_answer(template: bool, tmp_path: Path) -> None:
    folder = template_folder(tmp_path) if template else None
    done, trace = imported(tmp_path, *growing(6), tokenizer=folder)
    assert (done.joined is None) == template
    for before, after in pairwise(trace):
        assert before.kept is not None and len(before.kept) >= before.tokens // 16 + 2
        missed = len(before.kept) - alike(list(before.kept), list(after.blocks))
        assert missed <= 1, "the end of an answer may encode otherwise with what follows"


def test_messages_are_joined_as_documented(tmp_path: Path) -> None:
    salt = tmp_path / "salt"
    salt.write_bytes(SALT)
    done, trace = imported(tmp_path, {"messages": CHAT}, block_tokens=1, salt_file=salt)
    text = "system: You answer.\nuser: What is a KV cache?\nassistant:"
    assert [request.blocks for request in trace] == [trace_ids(TOKENIZER.encode(text), 1, SALT)[0]]
    told = "messages: joined as lines 'role: content', because the shipped tokenizer has no chat template"
    assert told in done.lines()


@pytest.mark.hf
def test_messages_are_rendered_by_the_chat_template_of_the_folder(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    salt, folder = tmp_path / "salt", template_folder(tmp_path)
    salt.write_bytes(SALT)
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    rows = [{"messages": CHAT}, {"messages": CHAT, "tools": tools}]
    done, trace = imported(tmp_path, *rows, tokenizer=folder, block_tokens=1, salt_file=salt)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    for row, request in zip(rows, trace, strict=True):
        ids = theirs.apply_chat_template(
            row["messages"], tools=row.get("tools"), add_generation_prompt=True, return_dict=False
        )
        assert request.blocks == trace_ids(list(ids), 1, SALT)[0]
    assert done.joined is None and not any(line.startswith("messages:") for line in done.lines())


def test_without_transformers_messages_are_joined_and_this_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    done, _ = imported(tmp_path, {"messages": CHAT}, tokenizer=template_folder(tmp_path))
    assert any('is not installed: pip install "kvlab[hf]"' in line for line in done.lines())


@pytest.mark.hf
def test_a_template_that_refuses_is_named_with_its_line(tmp_path: Path) -> None:
    rows = [{"messages": CHAT}, {"messages": [{"role": "odd", "content": ""}]}]
    with pytest.raises(InputError, match="line 2: the chat template refuses the messages: no such role"):
        imported(tmp_path, *rows, tokenizer=template_folder(tmp_path))


@pytest.mark.hf
def test_a_folder_whose_template_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = template_folder(tmp_path)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text('{"chat_template": ')
    with pytest.raises(InputError, match="transformers cannot read its chat template"):
        imported(tmp_path, {"messages": CHAT}, tokenizer=folder)


# --- what is refused ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", "expected a JSON object, got '{'"),
        ("[1]", r"expected a JSON object, got '\[1\]'"),
        ("[" * 100_000, "expected a JSON object"),
        ({}, "expected one of prompt, messages, tokens, got none of them"),
        ({"prompt": None}, "got none of them"),
        ({"prompt": "a", "tokens": [1]}, "expected one of prompt, messages, tokens, got prompt and tokens"),
        ({"prompt": "a", "messages": CHAT, "tokens": [1]}, "got prompt and messages and tokens"),
        ({"prompt": 3}, "expected a text as prompt, got 3"),
        ({"prompt": [1, 2]}, r"expected a text as prompt, got \[1, 2\]; lists of numbers are called tokens"),
        ({"prompt": ["a"]}, "expected a text as prompt"),
        ({"prompt": ""}, "expected a text that is not empty"),
        ('{"prompt": "\\ud800"}', "expected text that can be encoded as UTF-8"),
        ({"tokens": "abc"}, "expected tokens as a list of whole numbers"),
        ({"tokens": []}, "expected tokens as a list of whole numbers"),
        ({"tokens": [1, True]}, "expected tokens as a list of whole numbers"),
        ({"tokens": [1, 2.0]}, "expected tokens as a list of whole numbers"),
        ({"tokens": [-1]}, "expected tokens as integers in 0"),
        ({"tokens": [1 << 32]}, "expected tokens as integers in 0"),
        ({"messages": []}, "expected messages as a list of objects with a role"),
        ({"messages": "hi"}, "expected messages as a list of objects with a role"),
        ({"messages": [{"content": "hi"}]}, "expected messages as a list of objects with a role"),
        ({"messages": [{"role": "user"}]}, "expected messages of a role and a text"),
        ({"messages": [{"role": "user", "content": None}]}, "expected messages of a role and a text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "only a chat template has a place for more"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "only a chat template has a place for more"),
        ({"messages": CHAT, "tools": [{}]}, "and no tools: only a chat template"),
        ({"prompt": "a", "answer": 5}, "expected a text as answer, got 5"),
        ({"prompt": "a", "answer": [1]}, "expected a text as answer"),
        ({"prompt": "a", "output_length": -1}, "expected output_length as a whole number"),
        ({"prompt": "a", "output_length": 1.5}, "expected output_length as a whole number"),
        ({"prompt": "a", "output_length": True}, "expected output_length as a whole number"),
        ({"prompt": "a", "at_s": 1, "timestamp": 1000}, r"expected timestamp \(ms\) or at_s, got both"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(row: Any, told: str, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("as before")
    with pytest.raises(InputError, match=rf"prompts\.jsonl, line 3: .*{told}"):
        imported(tmp_path, {"prompt": "good"}, "", row, {"prompt": "good"})
    assert (tmp_path / "out.jsonl").read_text() == "as before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ({"at_s": 5}, {"at_s": 4.5}, r"comes 0\.5 s before the line before it; sort the lines by time"),
        ({"at_s": 5}, {}, "expected at_s as in the first line, got no time; times must be in all lines or in none"),
        ({}, {"at_s": 5}, "expected no time as in the first line, got at_s"),
        ({"at_s": 5}, {"timestamp": 5000}, "expected at_s as in the first line, got timestamp"),
        ({"at_s": 5}, {"at_s": "6"}, "expected at_s as a number, got '6'"),
        ({"at_s": 5}, {"at_s": True}, "expected at_s as a number, got True"),
        ({"timestamp": 5}, {"timestamp": float("nan")}, "expected timestamp as a number, got nan"),
        ({"timestamp": 5}, {"timestamp": float("inf")}, "expected timestamp as a number, got inf"),
    ],
)
def test_times_that_are_none(first: Any, second: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"line 2: {told}"):
        imported(tmp_path, {"prompt": "a", **first}, {"prompt": "a", **second})


def test_a_line_is_compared_with_the_line_before_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 3: comes 1 s before the line before it"):
        imported(tmp_path, *({"tokens": [1], "at_s": at} for at in (1, 4, 3)))


BAD_FILES: dict[str, tuple[list[str], str]] = {
    "missing": (["none.jsonl"], "none.jsonl: expected a file of prompts, got: No such file"),
    "a folder": (["."], "expected a file of prompts, got: Is a directory"),
    "empty": (["empty.jsonl"], "empty.jsonl: expected a prompt on each line, got an empty file"),
    "compressed": (["good.jsonl.gz"], "line 1: expected text in UTF-8; is this a compressed file?"),
    "out is a folder": (["good.jsonl", "--out", "."], "expected the name of a file in a folder that exists"),
    "out is nowhere": (["good.jsonl", "--out", "no/t.jsonl"], "expected the name of a file in a folder that exists"),
    "out is the file": (["good.jsonl", "--out", "./good.jsonl"], "expected another file than the one that is read"),
    "out leads to it": (["link.part", "--out", "link"], "expected another file than the one that is read"),
    "no salt": (["good.jsonl", "--salt-file", "none"], "none: expected a file with a salt, got: No such file"),
    "a short salt": (["good.jsonl", "--salt-file", "short"], "expected a salt of 16 random bytes or more, got 15"),
    "no folder": (["good.jsonl", "--tokenizer", "nowhere"], "nowhere: expected a folder with a tokenizer.json"),
    "no tokenizer": (["good.jsonl", "--tokenizer", "."], "not a tokenizer (the file is missing)"),
    "large blocks": (["good.jsonl", "--block", "9999999"], "expected a block size of 1 … 1,048,576 tokens"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_line_each(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    good = file_of(tmp_path, {"prompt": "good"}, name="good.jsonl").read_bytes()
    Path("empty.jsonl").write_text("\n \n")
    Path("good.jsonl.gz").write_bytes(gzip.compress(good))
    Path("short").write_bytes(bytes(15))
    os.link("good.jsonl", "link.part")
    arguments, told = BAD_FILES[name]
    out = [] if "--out" in arguments else ["--out", "t.jsonl"]
    assert main(["trace", "import", *arguments, *out]) == FAILURE
    error = capsys.readouterr().err
    assert told in error and error.startswith("kvlab: ") and error.count("\n") == 1
    assert Path("good.jsonl").read_bytes() == good and not Path("t.jsonl").exists()


def test_a_form_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected one of the forms kvlab, mooncake, bailian, got 'csv'"):
        imported(tmp_path, {"prompt": "a"}, form="csv")


# --- the command --------------------------------------------------------------------------------
def test_the_command_says_what_the_file_gives_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = file_of(tmp_path, {"prompt": "a", "at_s": 1, "output_length": 3})
    (tmp_path / "salt").write_bytes(SALT)
    arguments = ["trace", "import", str(file), "--out", str(tmp_path / "t.jsonl")]
    assert main(arguments) == SUCCESS
    first = capsys.readouterr().out.splitlines()
    assert main([*arguments, "--salt-file", str(tmp_path / "salt")]) == SUCCESS
    second = capsys.readouterr().out.splitlines()
    assert len(first) == len(second) == 3, "what was written, its times, and one sentence"
    for line in (first[2], second[2]):
        assert line.startswith("the file tells its reader when each request came, how long its prompt and its answer")
        assert "which prompts begin alike" in line
    assert first[2].endswith("the salt was not kept, so nobody can test whether a text is in it")
    assert second[2].endswith(f"whoever has the salt in {tmp_path / 'salt'} can test for any text whether it is in it")


def test_a_file_is_read_a_line_at_a_time(tmp_path: Path) -> None:
    line = json.dumps({"tokens": [*range(1000)], "at_s": 0}) + "\n"
    file = tmp_path / "large.jsonl"
    file.write_text(line * 2000)
    assert file.stat().st_size > 8e6
    import_prompts(file_of(tmp_path, {"tokens": [1]}), tmp_path / "t.jsonl")  # what is loaded once
    tracemalloc.start()
    assert import_prompts(file, tmp_path / "t.jsonl").requests == 2000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6
