"""Every step of `bench gpu` on the CPU. What only a GPU has (pinned memory, streams) needs one."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvlab.engine import fetch as fetch_module
from kvlab.errors import ConfigError, KVLabError
from kvlab.lab import tables
from kvlab.lab.bench import gpu
from kvlab.lab.bench.gpu import command, limits, moving, plan, report, serving
from kvlab.lab.bench.gpu.report import Report
from kvlab.lab.gpu_model import LLAMA_8B, Shape
from kvlab.lab.timing import Timings
from kvlab.stores import MemoryStore

TINY = Shape("tiny", 2, 4, 2, 16, 64, 128, 97)
OTHER = replace(TINY, name="less tiny", layers=3, head_dim=32, tied=False)
SMALL = replace(
    gpu.PLANS["cpu"],
    shapes=(TINY, OTHER),
    prefill=(16, 48, 64),
    decode=(16,),
    prefixes=(64,),
    planned=(64,),
    copies=(1,),
    load=1,
    stream=1,
    matmul=64,
    cast=(TINY, 1),
    learning=1,
    rounds=1,
)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return gpu.run("cpu", SMALL, budget_s=600.0)  # on a busy machine, nothing may be skipped here


def rows(result: dict[str, Any], table: str, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in result[table]]


MODELS = ("shipped", "tiny", "less tiny")


def test_every_step_runs_on_the_cpu(result: dict[str, Any]) -> None:
    assert (result["failed"], result["skipped"], result["ok"]) == ([], [], True)
    assert result["device"] == "cpu" and "memory" in result["store"]
    json.dumps(result, allow_nan=False)
    assert tables.text(result)
    assert rows(result, "prefill", "shape", "tokens") == [(name, n) for name in MODELS for n in (16, 48, 64)]
    assert rows(result, "decode", "shape", "context", "batch") == [(name, 16, n) for name in MODELS for n in (1, 2)]
    assert rows(result, "h2d", "pinned", "mib") == [(False, 1)]
    assert rows(result, "cast", "record") == [("fp32",), ("fp16",), ("bf16",), ("int8",), ("int4",)]
    ways = [("host", "fp32"), ("store", "fp32"), ("store", "int8")]
    assert rows(result, "load_path", "shape", "tier", "record") == [(name, *way) for name in MODELS for way in ways]
    found = [(name, tier, 64) for name in MODELS for tier in ("device", "host", "store")]
    assert rows(result, "ttft", "shape", "tier", "prefix_tokens") == found
    assert rows(result, "planner", "shape", "prefix_tokens") == [(name, 64) for name in MODELS for _ in range(2)]
    assert [row["attention"] for row in result["attention"]] == ["prefill", "decode", "behind a prefix"]
    assert all(row["math_ms"] > 0 and row["cudnn_ms"] is None for row in result["attention"])
    for table in ("limits", "prefill", "decode", "h2d", "cast", "load_path", "ttft", "planner", "roofline"):
        assert all(value > 0 for row in result[table] for name, value in row.items() if name in ("ms", "gbps"))


def test_what_follows_from_the_tables(result: dict[str, Any]) -> None:
    longest = next(row for row in result["prefill"] if (row["shape"], row["tokens"]) == ("tiny", 64))
    even = result["break_even"][1]
    assert (even["shape"], even["kv_bytes"]) == ("tiny", 2 * 2 * 2 * 16 * 4)
    assert even["gbps"] == pytest.approx(even["kv_bytes"] * 64 / longest["ms"] / 1e6)
    assert len(result["roofline"]) == len(result["prefill"]) + len(result["decode"])
    assert {row["bound"] for row in result["roofline"]} <= {"compute", "memory"}
    assert len(result["crossover"]) == 3 * len(SMALL.wires)
    assert all({"2K", "8K", "16K", "32K", "48K"} < row.keys() for row in result["crossover"])
    assert 0 <= result["planner_within_1.1"] <= 1


def test_the_size_of_a_load_is_that_of_the_parts_that_move(result: dict[str, Any]) -> None:
    sizes = {(row["shape"], row["record"]): row["mib"] for row in result["load_path"]}
    assert sizes["tiny", "fp32"] == pytest.approx(1.0)
    assert 0.25 < 4 * sizes["tiny", "int8"] < 0.3, "a quarter of the numbers, each in a quarter, and scales"


def test_an_attention_that_is_not_that_of_the_cpu_fails_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = limits.attention
    answers = iter(
        [plain, plain, plain, plain, plain, lambda q, k, v, start: plain(q, k[:, :, 1:], v[:, :, 1:], start - 1)]
    )
    monkeypatch.setattr(limits, "attention", lambda *args: next(answers)(*args))
    got = Report("cpu", 1, time.monotonic() + 60, step_s=1)
    got.add("attention", "", lambda: limits.kernels(got, SMALL))
    assert got.failed == ["attention: KVLabError: attention of 15 tokens behind 5 is not that of the CPU"]


def test_an_error_in_what_follows_takes_nothing_from_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_with_model", lambda *_: None)
    monkeypatch.setattr(command, "roofline", lambda *_: 1 / 0)
    result = gpu.run("cpu", SMALL)
    assert result["limits"] and result["cast"] and result["roofline"] == [] and not result["ok"]
    assert result["failed"] == ["roofline: ZeroDivisionError: division by zero"]


def test_rows_are_logged_as_they_come(caplog: pytest.LogCaptureFixture) -> None:
    """A machine that is lent may be taken away, or run out of memory, before the result is printed."""
    caplog.set_level(logging.INFO, report.__name__)
    got = Report("cpu", 1, time.monotonic() + 60, step_s=1)
    got.add("table", "a", lambda: [{"x": 1}])
    assert [record.message.partition(" s ")[2] for record in caplog.records] == ['[{"x": 1}]']


def test_a_step_whose_rounds_disagree_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "time_rounds", lambda *_: Timings({"a": [1.0], "a again": [2.0]}, 2.0))
    monkeypatch.setattr(command, "_with_model", lambda *_: None)
    result = gpu.run("cpu", replace(SMALL, precisions=("fp16",)))
    assert result["noisy_steps"] == ["cast fp16", "h2d 1 MiB, pageable", "limits"] and result["noisy"]
    assert result["aa_ratio"] == 2.0


def test_what_does_not_fit_into_the_time_is_skipped_and_named() -> None:
    result = gpu.run("cpu", SMALL, budget_s=-1.0)
    assert not any(result[table] for table in (*command.TABLES, "roofline", "break_even", "crossover"))
    assert "h2d 1 MiB, pageable: no time left" in result["skipped"] and result["ok"]
    assert [what for what in result["skipped"] if what.startswith("model")] == [
        f"model {name}: no time left" for name in MODELS
    ]
    json.dumps(result, allow_nan=False)


def test_the_time_is_up_within_a_step_and_after_the_last_whole_round() -> None:
    runs: list[float] = []
    short = Report("cpu", 1000, time.monotonic() + 60, step_s=0.02)
    short.add("table", "", lambda: short.time({"work": lambda: (runs.append(0), time.sleep(0.01))}) and [])
    assert 4 <= len(runs) <= 8 and not short.failed


def test_a_shape_that_does_not_fit_is_skipped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "free_bytes", lambda device: 1e9)
    monkeypatch.setattr(command, "_without_model", lambda *_: None)
    monkeypatch.setattr(command, "shipped_model", lambda *_: pytest.fail("not this one"))
    monkeypatch.setattr(command, "_models", lambda plan, device: [(LLAMA_8B.name, LLAMA_8B, pytest.fail)])
    result = gpu.run("cpu", SMALL)
    assert result["skipped"] == ["model Llama-3.1-8B: needs 31.4 GiB, 0.9 are free"] and result["ok"]


@pytest.mark.parametrize(
    ("error", "skipped"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (ConfigError("expected host_bytes that this machine has, got 9: CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (KVLabError("other bits"), False),
    ],
)
def test_a_step_that_fails_is_named_and_the_others_are_measured(error: Exception, skipped: bool) -> None:
    def step() -> list[dict[str, Any]]:
        raise error

    got = Report("cpu", 1, time.monotonic() + 60, step_s=1)
    got.add("table", "a", step)
    got.add("table", "b", lambda: [{"x": 1}])
    assert got.tables == {"table": [{"x": 1}]}
    assert got.skipped == (["table a: out of memory"] if skipped else [])
    assert got.failed == ([] if skipped else [f"table a: {type(error).__name__}: {error}"])


def test_a_block_that_is_not_what_was_stored_fails_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fetch_module.from_parts

    def one_bit_off(parts: Any, precision: str, axis: int, out: torch.Tensor) -> None:
        real(parts, precision, axis, out)
        out.view(torch.int32)[0, 0, 0, 0, 0] ^= 1

    monkeypatch.setattr(fetch_module, "from_parts", one_bit_off)
    got, model = Report("cpu", 1, time.monotonic() + 60, step_s=1), plan.random_model(TINY, SMALL, "cpu")
    with torch.inference_mode():
        got.add("load_path", "x", lambda: moving.load_path(got, SMALL, TINY, model, "store", "fp32"))
    assert "load_path" not in got.tables and "expected the same bits" in got.failed[0]


def test_a_time_is_taken_with_an_idle_device_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    got = Report("cpu", 1, time.monotonic() + 60, step_s=1)
    monkeypatch.setattr(got, "sync", lambda: log.append("sync"))
    got.time({"work": lambda: log.append("work")})
    assert log == ["sync", *["work", "sync"] * 4]


@pytest.mark.parametrize("mib_per_s", [1.0, 4.0])
def test_a_paced_store_delivers_at_its_bandwidth(mib_per_s: float) -> None:
    store = serving.PacedStore(mib_per_s * 2**20)
    store.put_many([b"k" * 32, b"l" * 32], [bytes(2**15)] * 2)
    begin = time.perf_counter()
    assert [len(value or b"") for value in store.get_many([b"k" * 32, b"l" * 32, b"m" * 32])] == [2**15, 2**15, 0]
    assert time.perf_counter() - begin >= 2**16 / 2**20 / mib_per_s
    assert issubclass(serving.PacedStore, MemoryStore)


def test_the_plan_of_a_gpu_has_the_published_shapes_in_bf16() -> None:
    cuda = gpu.PLANS["cuda"]
    assert [shape.name for shape in cuda.shapes] == ["Qwen2.5-0.5B", "Llama-3.2-1B", "Llama-3.1-8B"]
    assert (cuda.precision, cuda.budget_s + cuda.step_s < 480, max(cuda.copies) >= cuda.load >= 64) == (
        "bf16",
        True,
        True,
    )
    for sizes in (cuda.prefixes, cuda.planned, SMALL.prefixes):
        assert not any(n % 64 for n in sizes)
    shipped = plan.shipped_model(cuda, "cpu")
    assert (shipped.config.max_position_embeddings, shipped.dtype) == (cuda.context, torch.bfloat16)
    made: list[Callable[[], Any]] = [make for _, _, make in command._models(cuda, "meta")]
    assert all(isinstance(make, functools.partial) for make in made), "none is made before its turn"


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_a_device_that_is_not_there_is_a_clear_error(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="NVIDIA GPU"):
        gpu.run(device, SMALL)
