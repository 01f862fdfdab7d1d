"""`bench files` compares what it says, and looks at what came back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvlab.errors import KVLabError
from kvlab.lab.bench import files as bench
from kvlab.stores import FileStore

KIB = 1 << 10


def test_each_size_has_a_row_for_each_source_and_each_sync(tmp_path: Path) -> None:
    result = bench.run((4 * KIB, 8 * KIB), rounds=2, folder=str(tmp_path))
    assert [(row["kib"], row["from"]) for row in result["gets"]] == [
        (4, "memory"), (4, "disk"), (8, "memory"), (8, "disk"),
    ]  # fmt: skip
    assert [(row["kib"], row["sync"]) for row in result["puts"]] == [
        (kib, sync) for kib in (4, 8) for sync in ("none", "data", "full")
    ]
    for row in (*result["gets"], *result["puts"]):
        assert row["gbps"] > 0 and row["gbps_by_hand"] > 0 and row["vs_by_hand"] > 0
    assert {"about", "noisy", "machine", "versions"} < set(result)
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_found_or_wrong_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = FileStore._fill

    def fill(store: FileStore, fd: int, size: int, buffer: memoryview, deadline: Any) -> Any:
        got = read(store, fd, size, buffer, deadline)
        buffer[0] ^= 1
        return got

    monkeypatch.setattr(FileStore, "_fill", fill)
    with pytest.raises(KVLabError, match="wrong"):
        bench.run((4 * KIB,), rounds=1, folder=str(tmp_path))
    monkeypatch.setattr(FileStore, "get_many", lambda store, keys, out: [None] * len(keys))
    with pytest.raises(KVLabError, match="not found"):
        bench.run((4 * KIB,), rounds=1, folder=str(tmp_path))
    monkeypatch.setattr(FileStore, "put_many", lambda store, keys, values: 0)
    with pytest.raises(KVLabError, match="not stored"):
        bench.run((4 * KIB,), rounds=1, folder=str(tmp_path))
