"""Every step of `bench gpu` on the CPU. What only a GPU has (pinned memory, a second stream) needs one."""

from __future__ import annotations

import json

import pytest
import torch

from kvlab.errors import ConfigError
from kvlab.lab.bench import gpu

SMALL = gpu.Plan(
    (("tiny", 64, 2, 4, 2, 16, 128), ("less tiny", 64, 3, 4, 2, 32, 128)), (64, 192), (1,), torch.float32, 1
)


def test_every_step_runs_on_the_cpu() -> None:
    result = gpu.run("cpu", SMALL)
    assert [(row["shape"], row["tokens"]) for row in result["prefill"]] == [
        ("tiny", 64),
        ("tiny", 192),
        ("less tiny", 64),
        ("less tiny", 192),
    ]
    assert [(row["tier"], row["prefix_tokens"]) for row in result["ttft"]] == [
        ("device", 176),
        ("host", 176),
        ("store", 176),
    ] * 2
    assert result["h2d"][0].keys() == {"pinned", "mib", "gbps"}
    assert all({"mib", "gbps", "ratio"} < row.keys() for row in result["load_path"])
    assert result["load_path"][0]["mib"] == pytest.approx(2 * 2 * 2 * 16 * 4 * 192 / 2**20)
    first = result["prefill"][1]
    assert result["break_even"][0]["gbps"] == pytest.approx(2 * 2 * 2 * 16 * 4 * 192 / first["ms"] / 1e6)
    assert result["skipped"] == [] and result["device"] == "cpu" and "memory" in result["store"]
    json.dumps(result)


def test_what_does_not_fit_into_the_time_is_skipped_and_named() -> None:
    result = gpu.run("cpu", SMALL, budget_s=-1.0)
    assert not any(result[table] for table in ("prefill", "h2d", "load_path", "ttft", "break_even"))
    assert "h2d 1 MiB" in result["skipped"] and "ttft tiny, host, 192" in result["skipped"]


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_a_device_that_is_not_there_is_a_clear_error(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="NVIDIA GPU"):
        gpu.run(device, SMALL)
