"""The demo and the command line: what is printed is true, and the exit status says if it is not."""

import json
from pathlib import Path

import pytest

from kvlab.cli import main
from kvlab.lab import demo
from kvlab.lab.timing import time_rounds
from kvlab.testbed.server import RedisServer


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two short prefixes are enough to see that it works."""
    monkeypatch.setattr(demo.run, "__defaults__", (*demo.run.__defaults__[:3], (64, 128)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KVLAB_REDIS_URL", raising=False)


LINES = ("All tests completed!", "Cached KV tensors: True", "Retrieved from cache: True", "Cache hit rate: 100%")


def test_the_briefs_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert all(line in printed for line in LINES)


def test_json_is_one_object_with_the_agreed_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    agreed = {"tokens_equal", "hit_rate_full_blocks", "rows", "precision", "threads", "machine", "versions", "noisy"}
    assert agreed <= result.keys()
    assert result["tokens_equal"] is True and result["hit_rate_full_blocks"] == 1.0
    assert [row["prefix_tokens"] for row in result["rows"]] == [64, 128]
    assert {"prefix_tokens", "cold_ms", "warm_ms", "speedup", "bytes"} <= result["rows"][0].keys()
    assert result["rows"][1]["bytes"] == 2 * (128 + 64 * 6144)


@pytest.mark.redis
def test_over_a_real_redis(redis_server: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--redis", f"redis://127.0.0.1:{redis_server.port}"]) == 0
    assert "All tests completed!" in capsys.readouterr().out


def test_an_unreachable_redis_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--redis", "redis://127.0.0.1:9"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("kvlab: the store does not answer (redis://127.0.0.1:9: conn") and error.count("\n") == 1


def test_the_surroundings_may_name_the_store(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVLAB_REDIS_URL", "redis://127.0.0.1:9")
    assert main(["demo"]) == 1
    assert "redis://127.0.0.1:9" in capsys.readouterr().err


def test_an_unknown_scheme_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--redis", "http://x"]) == 1
    assert "expected a store URL" in capsys.readouterr().err


def learner(tmp_path: Path, source: str) -> str:
    (tmp_path / "mykv.py").write_text("import torch\nfrom kvlab.course.exercises.sets import *\n" + source)
    return str(tmp_path / "mykv.py")


def test_a_learners_functions_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = learner(tmp_path, "from kvlab.course.exercises.sets import causal_attention, hit_rate\n")
    assert main(["demo", "--impl", file]) == 0
    assert "yours:   causal_attention, hit_rate" in capsys.readouterr().out


def test_a_learners_bug_makes_the_demo_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bug = "def causal_attention(q, k, v, start):\n    from kvlab.course.exercises.sets import causal_attention as f\n"
    file = learner(tmp_path, bug + "    return f(q, k, v, 0)\n")  # the mask restarts: cold and warm differ
    assert main(["demo", "--impl", file]) == 1
    printed = capsys.readouterr().out
    assert "Same tokens cold and warm: False" in printed
    assert "All tests completed!" not in printed


def test_a_missing_answer_file_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--impl", "nowhere.py"]) == 1
    assert "found none at nowhere.py" in capsys.readouterr().err


def test_contenders_take_turns_and_the_first_one_races_itself() -> None:
    order: list[str] = []
    times = time_rounds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2)
    turns = [order[i : i + 3] for i in range(0, 9, 3)]  # one uncounted, two counted, each in an order of its own
    assert [sorted(turn) for turn in turns] == [["a", "a", "b"]] * 3
    assert {name: len(s) for name, s in times.seconds.items()} == {"a": 2, "b": 2, "a again": 2}
