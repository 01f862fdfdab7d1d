"""`bench stores`: one row for each store, value size and kind of keys, and the reason for what is missing."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack

import pytest

from kvlab.errors import KVLabError
from kvlab.lab import tables
from kvlab.lab.alternatives.contenders import CONTENDERS, REFERENCE, Missing, Opened
from kvlab.lab.bench import stores
from kvlab.lab.bench.stores import FIELDS

pytestmark = pytest.mark.redis
FILES, SHM = "files, no sync", "files in /dev/shm"


def test_rows_of_stores_that_are_here() -> None:
    result = stores.run([REFERENCE, FILES, SHM], sizes=(4096,), rounds=2, servers=(), allocator=False)
    rows = result["rows"]
    assert [(row["store"], row["new_keys"]) for row in rows] == [
        (name, new) for name in (REFERENCE, FILES, SHM) for new in (True, False)
    ]
    assert all([*row] == [*FIELDS] and row["error"] is None and row["kib"] == 4 for row in rows)
    assert all(row[name] > 0 for row in rows for name in ("put_gbps", "get_gbps", "put_vs_redis", "probe64_ms"))
    assert {row["store"]: row["after_restart"] for row in rows} == {
        REFERENCE: "lost",
        FILES: "kept",
        SHM: "kept",
    }
    assert {row["second_put"] for row in rows} == {"the second"}
    assert rows[0]["version"].startswith("redis ") and rows[0]["allocator"]
    assert result["noisy"] == any(row["noisy"] for row in rows)
    json.dumps(result)


def test_a_store_that_is_missing_or_fails_has_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(stack: ExitStack) -> Opened:
        raise Missing("not installed: apt-get install it")

    def failing(stack: ExitStack) -> Opened:
        opened = CONTENDERS[FILES](stack)
        opened.store.close()
        return opened

    monkeypatch.setitem(CONTENDERS, "one that is missing", missing)
    monkeypatch.setitem(CONTENDERS, "one that fails", failing)
    result = stores.run(
        ["one that is missing", "one that fails", FILES], sizes=(4096,), rounds=1, servers=(), allocator=False
    )
    first, second, *others = result["rows"]
    assert (first["store"], first["error"]) == ("one that is missing", "not installed: apt-get install it")
    assert (second["store"], second["error"][:12]) == ("one that fails", "only 0 of 16")
    assert [row["store"] for row in others] == [FILES, FILES]
    assert "one that fails" in tables.text(result)  # a table has the same columns in each row


def test_requests_a_second_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "IO_REQUESTS", 16)
    rows = stores.run([REFERENCE], sizes=(4096,), rounds=1, servers=["Redis"], allocator=False)["io_threads"]
    assert [(row["server"], row["threads"], row["clients"]) for row in rows] == [("Redis", n, 8) for n in (1, 2, 3)]
    if shutil.which("redis-benchmark"):
        assert all(row["set_per_s"] > 0 and row["get_per_s"] > 0 and row["error"] is None for row in rows)
    else:
        assert all("redis-tools" in row["error"] for row in rows)


@pytest.mark.valkey
def test_kept_memory_is_measured_beside_the_default() -> None:
    (row,) = stores.run([REFERENCE], sizes=(4096,), rounds=2, servers=())["kept_memory"]
    assert row["server"].startswith("valkey") and (row["kib"], row["values"], row["error"]) == (4, 64, None)
    assert row["put_vs_default"] > 0 and row["get_vs_default"] > 0
    assert row["faults_default"] >= 0 and row["faults_kept"] >= 0


def test_without_the_reference_there_is_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(stack: ExitStack) -> Opened:
        raise Missing("not installed: apt-get install redis-server")

    monkeypatch.setitem(CONTENDERS, REFERENCE, missing)
    with pytest.raises(KVLabError, match="redis-server"):
        stores.run([REFERENCE], sizes=(4096,), rounds=1)
