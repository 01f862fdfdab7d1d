"""The command line: one table, one exit status for each end, and no traceback whatever the surroundings are."""

import inspect
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import pytest

from kvlab import cli
from kvlab.cli import BROKEN_PIPE, COMMANDS, FAILURE, INTERRUPTED, SUCCESS, USAGE, Command, main
from kvlab.course import exercises, own
from kvlab.course.exercises import mykv
from kvlab.errors import KVLabError
from kvlab.lab import demo
from kvlab.testbed.server import RedisServer

ROOT = Path(__file__).parents[1]
BENCHES = {c.name: c for c in COMMANDS if c.name.startswith("bench ")}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Demos of short prefixes, in an environment that names no store."""
    monkeypatch.setattr(own, "PREFIXES", (128,))
    monkeypatch.setattr(demo.run, "__defaults__", (*demo.run.__defaults__[:2], (64, 128)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KVLAB_STORE", raising=False)


def module_of(command: Command) -> str:
    """The module whose `run` a bench calls."""
    return str(inspect.getclosurevars(command.run).nonlocals["module"])


# --- the table ----------------------------------------------------------------------------------
@pytest.mark.parametrize("command", BENCHES.values(), ids=lambda c: c.name)
def test_every_bench_says_what_its_rows_mean_and_takes_the_options_of_the_table(command: Command) -> None:
    module = import_module(module_of(command))
    assert len(module.ABOUT.split()) > 10 and '"about": ABOUT,' in inspect.getsource(module)
    flags = {option.flag.removeprefix("--") for option in command.options}
    assert flags - {"json"} <= set(inspect.signature(module.run).parameters)
    assert "json" in flags


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words, names in (([], ["demo", "doctor", "bench"]), (["bench"], [name.split()[1] for name in BENCHES])):
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--help"])
        assert stopped.value.code == SUCCESS
        told = capsys.readouterr().out
        assert all(f"\n    {name} " in told for name in names)


def test_a_store_is_called_store_everywhere() -> None:
    taking = {command.name for command in COMMANDS if cli.STORE in command.options}
    assert taking == {"demo", "doctor", "explain", "serve", "bench codec", "bench ttft", "bench wire"}
    assert (cli.STORE.flag, cli.STORE.settings["metavar"]) == ("--store", "URL")
    assert cli.STORE.help.startswith("URL of a store, for example redis://localhost:6379")


def test_only_commands_that_need_the_course_import_it() -> None:
    program = (
        "import sys; from kvlab.cli import main; status = main(['bench', 'fuzz', '--n', '1'])\n"
        "assert not [name for name in sys.modules if name.startswith('kvlab.course')]; sys.exit(status)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (SUCCESS, "")


def test_a_bench_prints_json_or_what_its_rows_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "fuzz", "--n", "50", "--json"]) == SUCCESS
    assert json.loads(capsys.readouterr().out)["n"] == 50
    assert main(["bench", "fuzz", "--n", "50"]) == SUCCESS
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("each case decodes a record") and "wrong_tensors: 0" in lines


def test_a_bench_that_finds_something_wrong_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlab.lab.fuzz._decode", lambda target, value: (["wrong_tensors"], "right"))
    assert main(["bench", "fuzz", "--n", "2", "--json"]) == FAILURE


# --- exit statuses ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong",
    [
        *([], ["bench"], ["speed"], ["bench", "speed"], ["demo", "--redis", "redis://localhost"]),
        *(["bench", "fuzz", "--n", number] for number in ("0", "-1", "x", "1.5", "", "١", "9" * 5000)),
        *(["bench", "fuzz", "--seed", "x"], ["bench", "codec", "--windows", "0"], ["demo", "--store"]),
    ],
    ids=lambda wrong: " ".join(wrong)[:40],
)
def test_wrong_usage(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(wrong)
    assert stopped.value.code == USAGE
    assert capsys.readouterr().err.startswith("usage: kvlab")


def test_wrong_usage_of_a_command_shows_the_usage_of_that_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "wire", "--nope", "1"])
    assert stopped.value.code == USAGE
    told = capsys.readouterr().err
    assert told.startswith("usage: kvlab bench wire") and "unrecognized arguments: --nope 1" in told


def test_wrong_usage_shows_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["demo", "redis://me:secret@host"], ["demo", "--redis", "redis://:secret@host/0"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "://***@host" in (told := capsys.readouterr().err) and "secret" not in told


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://127.0.0.1:9", "the store cannot be used (redis://127.0.0.1:9: conn"),
        ("redis://me:secret@127.0.0.1:9", "redis://me:***@127.0.0.1:9: conn"),
        ("http://x", "expected a store URL"),
        ("", "expected a store URL"),
        ("localhost:6379", "(redis://HOST:PORT for a Redis; is redis:// missing before it?), got '***'"),
        ("me:secret@host", "(redis://HOST:PORT for a Redis;"),
        ("redis://localhost:65536", "expected a port of 1"),
        ("redis://localhost:6379\n", "not a usable store URL"),
        ("redis://local\nhost:6379", "not a usable store URL"),
        ("redis://\udcff:6379", "not a usable store URL"),
        ("unix:///no/such.sock", "the store cannot be used"),
    ],
)
def test_a_store_that_is_none(url: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["demo"], ["bench", "wire"], ["bench", "codec"]):
        assert main([*command, "--store", url]) == FAILURE
        error = capsys.readouterr().err
        assert told in error and error.startswith("kvlab: ") and error.count("\n") == 1
        assert "secret" not in error


def test_the_surroundings_may_name_the_store(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVLAB_STORE", "redis://127.0.0.1:9")
    for command in (["demo"], ["bench", "wire"], ["bench", "codec"]):
        assert main(command) == FAILURE
        assert "redis://127.0.0.1:9" in capsys.readouterr().err
    assert main(["demo", "--store", "fakeredis://"]) == SUCCESS


@pytest.mark.redis
def test_the_demo_over_a_real_redis(redis_server: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--store", redis_server.url]) == SUCCESS
    assert "All tests completed!" in capsys.readouterr().out


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvlab.lab.fuzz.run", interrupted)
    assert main(["bench", "fuzz"]) == INTERRUPTED


def test_an_error_of_the_system_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvlab.lab.fuzz.run", lambda **_: Path("no/such\nfile").read_bytes())
    assert main(["bench", "fuzz"]) == FAILURE
    assert capsys.readouterr().err == "kvlab: no/such\\nfile: No such file or directory\n"


@pytest.mark.parametrize(("content", "told"), [(None, "No such file"), (b"\xff\xfe", "UTF-8"), (b"", "empty file")])
def test_a_trace_that_is_none(
    content: bytes | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "trace.jsonl").write_bytes(content)
    assert main(["bench", "policies", "--trace", str(tmp_path / "trace.jsonl")]) == FAILURE
    error = capsys.readouterr().err
    assert told in error and error.startswith("kvlab: ") and error.count("\n") == 1


ROWS = [
    {"timestamp": 1000 * n, "input_length": 1024, "output_length": 2, "hash_ids": ids}
    for n, ids in enumerate([[1, 2], [1, 3], [1, 2], [1, 3]])
]


@pytest.fixture
def trace(tmp_path: Path) -> str:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("", {"device": 5}),
        ("--capacity inf --policy arc", {"device": 5}),
        ("--capacity 1", {}),
        ("--capacity 0", {}),
        ("--ids content", {"device": 5}),
        ("--capacity 2 --policy belady", {"device": 4}),
        ("--tiers 2,9", {"device": 3, "host": 2}),
        ("--tiers 0,9 --mode exclusive", {"host": 5}),
        ("--tiers inf,0,9 --nodes 2", {"device": 4, "store": 1}),
        ("--ttl 0.5", {}),
        ("--nodes 2", {"device": 4}),
        ("--nodes 2 --router cost", {"device": 5}),
        ("--block 512", {"device": 5}),
    ],
)
def test_replay_finds_what_its_options_say(
    options: str, found: dict[str, int], trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", trace, *options.split(), "--json"]) == SUCCESS
    told = json.loads(capsys.readouterr().out)
    assert told["hits_by_source"] == {"device": 0, "host": 0, "store": 0, **found}
    assert {"hit_rate", "hits_by_source", "imbalance", "accesses_per_s"} <= told.keys()


def test_replay_and_simulate_print_text(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["replay", trace], ["replay", trace, "--curve"], ["simulate", trace, "--nodes", "2"]):
        assert main(options) == SUCCESS
    assert "hit_rate: blocks 0.625" in (told := capsys.readouterr().out)
    assert "capacity  hit_rate" in told and "ttft_p95_s" in told and "source: computed" in told


def test_simulate_lets_requests_come_faster_and_spreads_them(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    means = []
    for options in ([], ["--speed", "1000"], ["--speed", "1000", "--bucket", "3"], ["--index", "events"]):
        assert main(["simulate", trace, "--json", *options]) == SUCCESS
        means.append(json.loads(capsys.readouterr().out)["ttft_mean_s"])
    assert means[0] < means[1] and means[0] == means[3]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("replay {} --router magic", "expected one of round_robin, least_loaded, .* as the router, got 'magic'"),
        ("replay {} --policy belady", "expected a capacity for belady"),
        ("replay {} --block 16", "line 1: expected 64 hash_ids .* this fits blocks of 512: use --block"),
        ("replay {} --tiers 1,2 --capacity 5", "expected --capacity or --tiers, got both"),
        ("replay {} --mode exclusive", "expected a host tier"),
        ("replay {} --curve --policy arc", "expected --curve alone"),
        ("replay {} --curve --ttl 5", "expected --curve alone"),
        ("replay {} --nodes 99999999", "expected at most 10,000 nodes"),
        ("replay .", "expected a trace file, got: Is a directory"),
        ("simulate {} --costs dear", "expected one of llama8b_h100 as --costs, got 'dear'"),
        ("simulate {} --index no", "expected one of exact, sent, events, naive as --index, got 'no'"),
        ("simulate {} --policy belady --capacity 5", "it knows the future"),
    ],
)
def test_mistakes_of_replays_are_one_line(
    options: str, told: str, trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options.format(trace).split()) == FAILURE
    error = capsys.readouterr().err
    assert re.search(told, error) and error.startswith("kvlab: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "options", ["--tiers 1", "--tiers 1,inf", "--capacity -1", "--capacity x", "--nodes 0", "--ttl -1"]
)
def test_options_of_replays_that_are_no_numbers(options: str, trace: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["replay", trace, *options.split()])
    assert stopped.value.code == USAGE


def test_a_message_of_several_lines_becomes_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: object) -> None:
        raise KVLabError("one\ntwo \x1b[31m \u2028 ü …")

    monkeypatch.setattr("kvlab.lab.fuzz.run", fails)
    assert main(["bench", "fuzz"]) == FAILURE
    assert capsys.readouterr().err == "kvlab: one\\ntwo \\x1b[31m \\u2028 ü …\n"


# --- a learner's functions ----------------------------------------------------------------------
def learner(tmp_path: Path, source: str) -> str:
    (tmp_path / "mykv.py").write_text(source, "utf-8")
    return str(tmp_path / "mykv.py")


ATTENTION = inspect.getsource(exercises.CAUSAL_ATTENTION.reference)
HIT_RATE = inspect.getsource(exercises.HIT_RATE.reference)
BLOCK_KEYS = inspect.getsource(exercises.BLOCK_KEYS.reference)
IMPORTS = "import torch\nfrom torch import Tensor\n\n\n"


def test_a_learners_functions_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = learner(tmp_path, IMPORTS + ATTENTION + "\n\n# grün ✔\n" + HIT_RATE)
    assert main(["demo", "--impl", file]) == SUCCESS
    printed = capsys.readouterr().out
    assert re.search(r"^yours: +causal_attention \([1-9]\d+ calls\), hit_rate \(1 calls\)$", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("function", "good", "bad"),
    [
        (ATTENTION, "<= start + torch", "<= torch"),  # the mask restarts
        (HIT_RATE, "cached_tokens // block_tokens", "cached_tokens"),
        (BLOCK_KEYS, "parent = hashlib", "parent = b'nonsense' and hashlib.sha256(b'') or hashlib"),
    ],
    ids=["causal_attention", "hit_rate", "block_keys"],
)
def test_a_learners_bug_is_named_and_makes_the_demo_fail(
    function: str, good: str, bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert good in function
    source = "import hashlib\nimport struct\n" + IMPORTS + function.replace(good, bad)
    assert main(["demo", "--impl", learner(tmp_path, source)]) == FAILURE
    printed = capsys.readouterr().out
    name = str(re.match(r"def (\w+)", function)[1])  # type: ignore[index]
    number = next(exercise.number for exercise in exercises.ALL if exercise.name == name)
    assert "\n✘ 0" in printed and "hint: " in printed
    assert (
        f"(the demo runs with ours in place of your {name})" in printed
        and "yours:   none" in printed
        and printed.endswith(f"FAILED: {number} {name}; see the lines at the top\n")
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import does_not_exist", "does not import: ModuleNotFoundError"),
        ("def hit_rate(:", "does not import: SyntaxError"),
        ("raise SystemExit(0)", "does not import: SystemExit"),
        ("def my_own(): ...", "expected functions of the course's exercises"),
        ("causal_attention = 3", "expected functions of the course's exercises"),
        ("", "expected functions of the course's exercises"),
        ("class MiniCache: ...", "expected functions of the course's exercises"),
        ("from kvlab.cache import KVCache\n\n\nclass Mine(KVCache): ...", "the demo fails with"),
    ],
)
def test_an_answer_file_that_does_not_work(
    source: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--impl", learner(tmp_path, source)]) == FAILURE
    error = capsys.readouterr().err
    assert said in error and error.startswith("kvlab: ") and error.count("\n") == 1


@pytest.mark.parametrize("source", ["def causal_attention(q, k, v, start): ...", "def hit_rate(a, b): return 1 // 0"])
def test_an_answer_that_is_not_right_fails_the_demo(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--impl", learner(tmp_path, source)]) == FAILURE
    assert capsys.readouterr().out.splitlines()[1].startswith(("○ 01.2", "✘ 00.2"))


def test_a_cache_class_of_any_name_is_the_one_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = mykv.with_function(mykv.HEADER, "block_keys", BLOCK_KEYS).replace("class MiniCache", "class MyOwn")
    file = learner(tmp_path, text)
    assert main(["demo", "--impl", file]) == SUCCESS
    printed = capsys.readouterr().out
    assert printed.startswith(f"file:    {file}\n") and "cache:   MyOwn over fakeredis://" in printed
    assert re.search(r"^yours: +block_keys \([1-9]\d* calls\)$", printed, re.MULTILINE)


def test_progress_shows_each_exercise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = HIT_RATE + "\n\ndef cacheable_prefix(a, b, block_tokens):\n    return 0\n"
    assert main(["progress", "--impl", learner(tmp_path, source)]) == SUCCESS
    printed = capsys.readouterr().out
    assert re.match(r"00  ✘ 00\.1 cacheable_prefix   ✔ 00\.2 hit_rate.*\n01  ○ 01\.1 ", printed)
    assert "✘ 00.1 cacheable_prefix: cacheable_prefix(a=[1, 2" in printed and "  hint: " in printed
    assert "\n1 of " in printed


def test_functions_alone_are_completed_whatever_the_file_begins_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = '"""Mine."""\n\nfrom __future__ import annotations\n\n' + HIT_RATE
    assert main(["demo", "--impl", learner(tmp_path, source)]) == SUCCESS
    assert "cache:   MiniCache over fakeredis://" in capsys.readouterr().out


def test_answers_that_are_no_python_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mykv.txt").write_text(HIT_RATE)
    for command in ("demo", "progress"):
        assert main([command, "--impl", str(tmp_path / "mykv.txt")]) == FAILURE
        assert "its name ending in .py" in capsys.readouterr().err


def test_progress_of_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["progress", "--impl", str(tmp_path / "nowhere.py")]) == FAILURE
    assert "found none at" in capsys.readouterr().err


def test_progress_before_the_first_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVLAB_WORK", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["progress"]) == SUCCESS
    printed = capsys.readouterr().out
    assert "✔ " not in printed.splitlines()[0] and "\n0 of " in printed


def test_an_answer_file_of_another_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mykv.py").write_bytes("NAME = 'grün'\n".encode("latin-1"))
    assert main(["demo", "--impl", str(tmp_path / "mykv.py")]) == FAILURE
    assert "does not import: SyntaxError" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nowhere.py", ".", "\udcff.py", "a\nb.py", "x" * 300, "answers.txt"])
def test_an_answer_file_that_is_not_there(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "answers.txt").write_text("", "utf-8")
    assert main(["demo", "--impl", f"{tmp_path}/{name}"]) == FAILURE
    error = capsys.readouterr().err
    assert error.startswith("kvlab: ") and error.count("\n") == 1


# --- encodings ----------------------------------------------------------------------------------
ENCODINGS = ("latin-1", "ascii", "cp1252", "utf-8")


def run_in(monkeypatch: pytest.MonkeyPatch, encoding: str, argv: Sequence[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command whose streams have this encoding and are strict."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        status = main(argv)
    for stream in streams:
        stream.flush()
    return (status, *(stream.buffer.getvalue().decode(encoding) for stream in streams))  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_demo_in_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    status, out, err = run_in(monkeypatch, encoding, ["demo"])
    assert (status, err) == (SUCCESS, "") and "All tests completed!" in out
    assert ("prompt:  … " in out) == (encoding in ("cp1252", "utf-8"))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_models_text_of_any_characters(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    monkeypatch.setattr("kvlab.model.Tokenizer.decode", lambda *_: "é 前 \U0001f600 \udcff \ufffd \x1b[0m\n")
    status, out, err = run_in(monkeypatch, encoding, ["demo"])
    assert (status, err) == (SUCCESS, "")
    assert out.count("tokens from the cache)\n") == 2 and "\x1b" not in out


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_doctor_in_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    monkeypatch.setenv("KVLAB_STORE", "unix:///\udcff前…/redis.sock")
    status, out, err = run_in(monkeypatch, encoding, ["doctor"])
    assert (status, err) == (FAILURE, "") and out.endswith("problems: 1\n")


@pytest.mark.parametrize("command", BENCHES.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_a_bench_says_in_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str, command: Command) -> None:
    module = import_module(module_of(command))
    result = {"about": module.ABOUT, "rows": [{"name": "ü …", "x": 0.5}], "machine": "Prozessör ™ 前"}
    monkeypatch.setattr(module, "run", lambda **_: result)
    for form in ([], ["--json"]):
        status, out, err = run_in(monkeypatch, encoding, [*command.name.split(), *form])
        assert (status, err) == (SUCCESS, "") and out.endswith("\n")
        if form:
            assert json.loads(out) == result


@pytest.mark.redis
def test_serve_prints_where_the_kv_of_each_workers_prompts_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--workers", "2", "--requests", "6", "--rate", "50", "--json"]) == SUCCESS
    result = json.loads(capsys.readouterr().out)
    assert sum(row["requests"] for row in result["workers"]) == 6 and result["store"].startswith(
        "shared: a redis-server"
    )
    sources = [row[source] for row in result["workers"] for source in ("computed", "device", "host", "store")]
    assert sum(sources) == 6 * (1024 + 40)
    for store, reason in (("redis://127.0.0.1:1x", "port"), ("redis://127.0.0.1:9", "the store cannot be used")):
        assert main(["serve", "--store", store]) == FAILURE
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--workers", "0"], ["--rate", "0"], ["--router", "best"], ["--requests", "x"]])
def test_serve_refuses_what_it_cannot_do(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *wrong])
    assert stopped.value.code == USAGE


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_errors_in_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    for argv in (
        ["demo", "--impl", "grün…前\udcff.py"],
        ["demo", "--store", "redis://localhost:65536"],
        ["demo", "--store", "unix:///\udcff前.sock"],
    ):
        status, _, err = run_in(monkeypatch, encoding, argv)
        assert status == FAILURE and err.startswith("kvlab: ") and err.count("\n") == 1


# --- real surroundings --------------------------------------------------------------------------
C_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(command: str, surroundings: Mapping[str, str], *arguments: str | bytes) -> subprocess.CompletedProcess[bytes]:
    """Run a shell command in which `kvlab` is the command line; "$1" and so on are the arguments."""
    program = f'set -o pipefail; kvlab() {{ "{sys.executable}" -m kvlab "$@"; }}; {command}'
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        ["bash", "-c", program, "bash", *arguments], cwd=ROOT, env={**own, **surroundings}, capture_output=True
    )


@pytest.mark.parametrize(
    "surroundings",
    [C_LOCALE, {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii:strict"}, {"PYTHONIOENCODING": "utf-16"}],
    ids=["C", "latin-1", "ascii", "utf-16"],
)
def test_the_surroundings_choose_the_encoding(surroundings: dict[str, str]) -> None:
    run = shell('kvlab demo --impl "$1"', surroundings, b"gr\xfcn\xe2\x80\xa6.py")
    assert run.returncode == FAILURE and run.stdout == b""
    encoding = surroundings.get("PYTHONIOENCODING", "ascii").partition(":")[0]
    assert "found none at gr" in run.stderr.decode(encoding) and "Traceback" not in run.stderr.decode(encoding)


def test_the_doctor_of_the_readme() -> None:
    run = shell("kvlab doctor", {"PYTHONIOENCODING": "latin-1", "KVLAB_STORE": "redis://localhost:65536"})
    assert (run.returncode, run.stderr) == (FAILURE, b"")
    assert rb"(expected a port of 1 \u2026 65535)" in run.stdout


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("kvlab bench fuzz --n 1 | true", BROKEN_PIPE),
        ("kvlab doctor | true", BROKEN_PIPE),
        ("kvlab bench --help | true", BROKEN_PIPE),
        ("kvlab bench fuzz --n 1 >&-", SUCCESS),
        ("kvlab bench fuzz --n 1 --json >&-", SUCCESS),
        ("kvlab demo --impl nowhere.py 2>&-", FAILURE),
        ("kvlab demo --impl nowhere.py >&- 2>&-", FAILURE),
    ],
)
def test_nobody_reads(command: str, status: int) -> None:
    run = shell(command, {})
    assert (run.returncode, run.stderr, run.stdout) == (status, b"", b"")


def test_a_reader_who_has_seen_enough() -> None:
    run = shell("kvlab demo | head -n 1", {})
    assert run.returncode == BROKEN_PIPE
    assert run.stdout.startswith(b"machine: ") and run.stdout.count(b"\n") == 1
    assert run.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_is_full() -> None:
    run = shell("kvlab bench fuzz --n 1 >/dev/full", {})
    assert run.returncode == FAILURE
    assert run.stderr == b"kvlab: No space left on device\n"


def test_the_entry_point_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvlab import __main__, cli

    monkeypatch.setattr(cli, "main", lambda argv: len(argv))
    assert __main__.main(["one", "two"]) == 2


def test_a_python_without_the_packages_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvlab import __main__, cli

    def missing(name: str) -> Callable[..., int]:
        def run(argv: object) -> int:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return run

    monkeypatch.setattr(cli, "main", missing("torch.nn"))
    with pytest.raises(SystemExit, match=r"no package torch.nn: run `make setup`"):
        __main__.main(["demo"])
    monkeypatch.setattr(cli, "main", missing("kvlab.nosuch"))
    with pytest.raises(ModuleNotFoundError):  # a fault of ours
        __main__.main(["demo"])
