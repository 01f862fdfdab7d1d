"""Trace files: what is read is what was written, and each kind of bad line is named."""

from __future__ import annotations

import io
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvlab.errors import InputError
from kvlab.lab.traces import Request, Trace, from_blocks, spread, write

TRACE = Path(__file__).parents[3] / "shared" / "traces" / "conversation_trace.jsonl"
needs_trace = pytest.mark.skipif(not TRACE.exists(), reason="the trace (Mooncake's release) is not in the project")
ROW = {"timestamp": 500, "input_length": 1025, "output_length": 7, "hash_ids": [4, 5, 6]}
CHAT = {"chat_id": 9, "parent_chat_id": -1, "type": "text", "turn": 1, "timestamp": 61.114}


def file_of(folder: Path, *rows: Any) -> Path:
    file = folder / "t.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


# --- what is read -------------------------------------------------------------------------------
def test_the_form_of_mooncake(tmp_path: Path) -> None:
    trace = Trace(file_of(tmp_path, ROW, "", {**ROW, "priority": 3}))
    assert (trace.form, trace.block_tokens, trace.ids) == ("mooncake", 512, "prefix")
    assert list(trace) == [Request(0.5, 1025, 7, [4, 5, 6]), Request(0.5, 1025, 7, [4, 5, 6], None, {"priority": 3})]
    assert list(trace) == list(trace), "each iteration begins anew"


def test_the_form_of_qwen_bailian_has_seconds_and_its_ids_are_chained(tmp_path: Path) -> None:
    rows = [{**ROW, **CHAT, "input_length": 33, "hash_ids": ids} for ids in ([7, 8, 9], [5, 8, 9], [7, 8, 2])]
    trace = Trace(file_of(tmp_path, *rows))
    assert (trace.form, trace.block_tokens, trace.ids) == ("bailian", 16, "content")
    assert [request.blocks for request in trace] == [[0, 1, 2], [3, 4, 5], [0, 1, 6]]
    assert {request.at_s for request in trace} == {61.114}
    assert all(request.extra["turn"] == 1 and request.extra["chat_id"] == 9 for request in trace)


def test_ids_of_prefixes_are_the_same_chained_or_not(tmp_path: Path) -> None:
    rows = [{**ROW, "hash_ids": ids} for ids in ([7, 8, 9], [7, 3, 4], [7, 8, 1])]
    chains = [request.blocks for request in Trace(file_of(tmp_path, *rows), ids="content")]
    assert chains == [[0, 1, 2], [0, 3, 4], [0, 1, 5]]


def test_the_own_form_says_its_block_size_and_keeps_the_blocks_of_answers(tmp_path: Path) -> None:
    requests = [Request(0.25, 100, 40, [1, 2], [1, 2, 3]), Request(1.0, 64, 0, [1], None, {"user": "a"})]
    assert write(requests, tmp_path / "own.jsonl", 64) == 2
    trace = Trace(tmp_path / "own.jsonl")
    assert (trace.form, trace.block_tokens, list(trace)) == ("kvlab", 64, requests)
    assert [path.name for path in tmp_path.iterdir()] == ["own.jsonl"], "no partial file is left"


@pytest.mark.parametrize("form", ["mooncake", "bailian", "kvlab"])
def test_what_is_written_is_read(form: str, tmp_path: Path) -> None:
    requests = [Request(i / 8, 512 * i + 1, i, list(range(i + 1)), None, {"chat_id": i}) for i in range(9)]
    write(requests, tmp_path / "t", 512, form)
    got = list(Trace(tmp_path / "t", 512, form, ids="prefix"))
    if form == "bailian":
        requests = [replace(request, extra={**request.extra, "parent_chat_id": -1}) for request in requests]
    assert got == requests


@needs_trace
def test_a_real_trace_is_written_as_it_was() -> None:
    again = io.StringIO()
    assert write(Trace(TRACE), again, 512, "mooncake") == 12_031
    assert again.getvalue() == TRACE.read_text()


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("\ufeff" + json.dumps(ROW), "utf-8")
    assert len(list(Trace(tmp_path / "t"))) == 1


def test_a_trace_is_read_a_line_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "large.jsonl"
    with file.open("w") as lines:
        for _ in range(200):
            lines.write(json.dumps({**ROW, "input_length": 512 * 5000, "hash_ids": list(range(5000))}) + "\n")
    assert file.stat().st_size > 5e6
    tracemalloc.start()
    assert sum(len(request.blocks) for request in Trace(file)) == 1_000_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5e6


def test_a_file_is_replaced_only_when_all_is_written(tmp_path: Path) -> None:
    def failing() -> Any:
        yield Request(0.0, 1, 1, [1])
        raise RuntimeError

    file = file_of(tmp_path, ROW)
    with pytest.raises(RuntimeError):
        write(failing(), file, 512)
    assert len(list(Trace(file))) == 1 and [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


# --- what is refused ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", "expected a JSON object, got '{'"),
        ("[1]", r"expected a JSON object, got '\[1\]'"),
        ("[" * 100_000, "expected a JSON object"),
        ({"timestamp": 0}, "missing: input_length, output_length, hash_ids"),
        ({**ROW, "timestamp": None}, "expected timestamp as a number below 1e15, got None"),
        ({**ROW, "timestamp": True}, "expected timestamp as a number below 1e15, got True"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1, "hash_ids": [1]}', "expected timestamp .* got nan"),
        (
            '{"timestamp": 1e999, "input_length": 1, "output_length": 1, "hash_ids": [1]}',
            "expected timestamp .* got inf",
        ),
        ({**ROW, "input_length": 0, "hash_ids": []}, "expected input_length as a whole number from 1, got 0"),
        ({**ROW, "input_length": 10**30}, "expected input_length as a whole number from 1, got 1000"),
        ({**ROW, "input_length": -5}, "expected input_length as a whole number from 1, got -5"),
        ({**ROW, "output_length": 1.5}, "expected output_length as a whole number from 0, got 1.5"),
        ({**ROW, "hash_ids": 4}, "expected hash_ids to be a list of whole numbers or of texts"),
        ({**ROW, "hash_ids": [1, 2, [3]]}, "expected hash_ids to be a list"),
        ({**ROW, "hash_ids": [1, 2, 3.5]}, "expected hash_ids to be a list"),
        ({**ROW, "hash_ids": [1, 2, True]}, "expected hash_ids to be a list"),
        ({**ROW, "kept_ids": 3}, "expected hash_ids to be a list"),
        ({**ROW, "kept_ids": [1, 2, 3, 4]}, "expected at most one of kept_ids for each block of 1025 \\+ 7 tokens"),
        (
            {**ROW, "hash_ids": [1, 2]},
            "expected 3 hash_ids for 1025 tokens in blocks of 512, got 2; this fits blocks of 1024: use --block",
        ),
        ({**ROW, "hash_ids": list(range(65))}, "got 65; this fits blocks of 16: use --block"),
        ({**ROW, "hash_ids": list(range(60))}, "expected 3 hash_ids for 1025 tokens in blocks of 512, got 60$"),
        ({**ROW, "block_size": 64}, "expected a block size of 512, got 64"),
        ({**ROW, "block_size": 64, "kept_ids": [1] * 99}, "expected a block size of 512, got 64"),
        ({**ROW, "timestamp": 499}, r"comes at 0\.499 s, after a line at 0\.5 s; sort the lines by time"),
        ({**ROW, "hash_ids": [4, 6, 5]}, "block 1 has the id 6, which followed another block before"),
        ({**ROW, "hash_ids": [4, 5, 4]}, "block 2 has the id 4, which followed another block before"),
        ({**ROW, "hash_ids": [9, 5, 6]}, "block 1 has the id 5, which .* stand for whole prefixes; .*: --ids content"),
    ],
)
def test_a_bad_line_is_named_by_its_number(row: Any, told: str, tmp_path: Path) -> None:
    file = file_of(tmp_path, ROW, row, ROW)
    with pytest.raises(InputError, match=rf"t\.jsonl, line 2: .*{told}"):
        list(Trace(file))


def test_a_bad_first_line_is_told_before_anything_is_done(tmp_path: Path) -> None:
    for row in ("{", {**ROW, "hash_ids": [1]}):
        with pytest.raises(InputError, match=r"t\.jsonl, line 1: "):
            Trace(file_of(tmp_path, row))


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_requests_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(InputError, match="expected a request on each line, got an empty file"):
        Trace(tmp_path / "t")


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a trace file, got: Is a directory"):
        Trace(tmp_path)
    with pytest.raises(InputError, match="expected a trace file, got: No such file"):
        Trace(tmp_path / "none")
    (tmp_path / "t.gz").write_bytes(b"\x1f\x8b\x08\xff")
    with pytest.raises(InputError, match="is this a compressed file"):
        Trace(tmp_path / "t.gz")


@pytest.mark.parametrize("size", [0, -1, True, 2.5])
def test_a_block_size_is_a_whole_number(size: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(: expected a block size of 1 or more|line 1: expected a block size)"):
        Trace(file_of(tmp_path, {**ROW, "block_size": size}), size or None)


@pytest.mark.parametrize("options", [{"form": "csv"}, {"ids": "hash"}])
def test_unknown_forms_are_refused(options: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a form of"):
        Trace(file_of(tmp_path, ROW), **options)
    with pytest.raises(InputError, match="expected one of the forms kvlab, mooncake, bailian, got 'csv'"):
        write([], io.StringIO(), 16, "csv")


def test_forms_that_would_lose_blocks_of_answers_are_refused() -> None:
    with pytest.raises(InputError, match="it would lose them"):
        write([Request(0.0, 1, 1, [1], [1, 2])], io.StringIO(), 16, "mooncake")


# --- made and moved -----------------------------------------------------------------------------
def test_requests_of_block_ids() -> None:
    assert from_blocks([[1, 2], [1]], 16) == [Request(0.0, 32, 1, [1, 2]), Request(1.0, 16, 1, [1])]


def test_requests_of_one_time_are_spread_in_their_order() -> None:
    requests = [Request(at, 1, 1, [n]) for n, at in enumerate([0.0, 0.0, 0.0, 3.0, 6.0, 6.0])]
    assert [r.at_s for r in spread(requests, 3.0)] == [0.0, 1.0, 2.0, 3.0, 6.0, 7.5]
    assert [r.at_s for r in spread(requests, 0.0, speed=2.0)] == [0.0, 0.0, 0.0, 1.5, 3.0, 3.0]
    assert [r.blocks for r in spread(requests, 3.0)] == [r.blocks for r in requests]


def test_spread_requests_never_pass_those_of_the_next_time() -> None:
    requests = [Request(at, 1, 1, [n]) for n, at in enumerate([0.0, 0.0, 1.0, 1.0, 9.0, 9.0])]
    times = [r.at_s for r in spread(requests, 3.0)]
    assert times == [0.0, 0.5, 1.0, 2.5, 9.0, 10.5] == sorted(times)
    assert not list(spread([], 3.0))
