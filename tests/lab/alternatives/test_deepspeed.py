"""DeepSpeed itself, in a process of its own: `make alternatives` runs this."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.lab.test_deepspeed import BEGINNING, TOKENS

pytestmark = pytest.mark.alternatives
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """A small measurement. Its stdout is JSON and nothing else, although DeepSpeed prints there."""
    command = [sys.executable, "-m", "kvlab.lab.deepspeed_engine", "--json", "--lengths", f"{TOKENS}", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_deepspeed_has_all_that_it_needs() -> None:
    needed = [Requirement(line) for line in requires("deepspeed") or [] if "extra" not in line]
    assert needed and all(need.specifier.contains(version(need.name)) for need in needed)


@pytest.mark.slow
def test_the_engine_and_the_connector_under_it_give_the_tokens_of_transformers(measured: dict[str, Any]) -> None:
    (row,) = measured["rows"]
    assert row["same_tokens"] is True and row["cached_tokens"] == BEGINNING
    assert measured["same_fingerprint"] is True


@pytest.mark.slow
def test_deepspeed_offloads_weights_and_no_kv(measured: dict[str, Any]) -> None:
    tried = {row["name"]: row for row in measured["tried"]}
    for name in ("FastGen, paged KV with offload", "FastGen, offload", "FastGen, restore"):
        assert tried[name]["said"].startswith("NotImplementedError: Offloading"), tried[name]
        assert tried[name]["where"].startswith("deepspeed/inference/v2/ragged/kv_cache.py:")
    zero = tried["ZeRO stage 3"]
    assert zero["worked"] and zero["said"].startswith("same tokens: True"), zero
    assert "in the module between calls: 0;" in zero["said"]


@pytest.mark.slow
def test_what_the_connector_cannot_stand_under_is_refused(measured: dict[str, Any]) -> None:
    tried = {row["name"]: row for row in measured["tried"]}
    for name in ("connector around the engine", "connector around ZeRO stage 3"):
        assert tried[name]["said"].startswith("ConfigError: expected a "), tried[name]
        assert tried[name]["where"].startswith("kvlab/connectors/hf_models.py:")


@pytest.mark.slow
def test_every_source_is_a_line_of_deepspeed(measured: dict[str, Any]) -> None:
    assert measured["sources"]
    for what, place in measured["sources"].items():
        assert re.fullmatch(r"deepspeed/[\w/]+\.py:\d+", place), what
