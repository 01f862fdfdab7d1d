"""The fuzzer lets nothing through, and notices a decoder that does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvlab.core import record
from kvlab.core.record import HEADER_BYTES
from kvlab.lab import fuzz as bench_fuzz


def test_bench_fuzz_lets_nothing_through() -> None:
    result = bench_fuzz.run(4000, seed=1)
    assert (result["wrong_tensors"], result["uncaught"], result["over_allocated"]) == (0, 0, 0), result["examples"]
    assert set(result["by_case"]) == set(bench_fuzz.CASES)
    assert sum(result["by_reason"].values()) == sum(result["by_case"].values()) == 4000
    asked_for = {"magic", "version", "kind", "length", "dims", "precision", "codec", "key", "checksum", "forged"}
    assert asked_for <= set(result["by_reason"])


def _ignores_the_key(value: bytes, key: bytes, *rest: Any, **options: Any) -> torch.Tensor:
    own = value[64:96] if len(value) >= HEADER_BYTES else key
    return DECODE(value, own, *rest, **options)


def _raises(value: bytes, *rest: Any, **options: Any) -> torch.Tensor:
    if len(value) < HEADER_BYTES:
        raise ValueError("too short")
    return DECODE(value, *rest, **options)


def _allocates(value: bytes, *rest: Any, **options: Any) -> torch.Tensor:
    room = bytearray(1 << 20)
    assert room
    return DECODE(value, *rest, **options)


DECODE = record.decode


@pytest.mark.parametrize(
    ("broken", "count"),
    [(_ignores_the_key, "wrong_tensors"), (_raises, "uncaught"), (_allocates, "over_allocated")],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bench_fuzz_notices_a_broken_decoder(monkeypatch: pytest.MonkeyPatch, broken: Any, count: str) -> None:
    monkeypatch.setattr(record, "decode", broken)
    targets = bench_fuzz._targets()
    monkeypatch.setattr(bench_fuzz, "_targets", lambda: targets)
    result = bench_fuzz.run(300, seed=2)
    assert result[count] > 0
    assert result["examples"]
