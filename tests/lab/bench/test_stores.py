"""`bench stores`: one row for each store, value size and kind of keys, and the reason for what is missing."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest

from kvlab.errors import KVLabError
from kvlab.lab.bench import stores
from kvlab.lab.bench.stores import REFERENCE, Missing, Opened

pytestmark = pytest.mark.redis
FIELDS = {
    *("store", "version", "allocator", "cannot", "kib", "new_keys", "put_gbps", "get_gbps"),
    *("put_vs_redis", "get_vs_redis", "probe64_ms", "second_put", "after_restart", "error"),
}


def test_rows_of_stores_that_are_here() -> None:
    result = stores.run([REFERENCE, "files", "files in /dev/shm"], sizes=(4096,), rounds=2)
    rows = result["rows"]
    assert [(row["store"], row["new_keys"]) for row in rows] == [
        (name, new) for name in (REFERENCE, "files", "files in /dev/shm") for new in (True, False)
    ]
    assert all(row.keys() == FIELDS and row["error"] is None and row["kib"] == 4 for row in rows)
    assert all(row[name] > 0 for row in rows for name in ("put_gbps", "get_gbps", "put_vs_redis", "probe64_ms"))
    assert {row["store"]: row["after_restart"] for row in rows} == {
        REFERENCE: "lost",
        "files": "kept",
        "files in /dev/shm": "kept",
    }
    assert {row["second_put"] for row in rows} == {"the second"}
    assert rows[0]["version"].startswith("redis ") and rows[0]["allocator"]
    json.dumps(result)


def test_a_store_that_is_missing_or_fails_has_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(stack: ExitStack) -> Opened:
        raise Missing("not installed: apt-get install it")

    def failing(stack: ExitStack) -> Opened:
        opened = stores.CONTENDERS["files"](stack)
        opened.store.close()
        return opened

    monkeypatch.setitem(stores.CONTENDERS, "memcached", missing)
    monkeypatch.setitem(stores.CONTENDERS, "LMDB", failing)
    rows = stores.run(["memcached", "LMDB", "files"], sizes=(4096,), rounds=1)["rows"]
    assert rows[0] == {"store": "memcached", "error": "not installed: apt-get install it"}
    assert rows[1]["store"] == "LMDB" and "only 0 of 16" in rows[1]["error"]
    assert [row["store"] for row in rows[2:]] == ["files", "files"]


def test_without_the_reference_there_is_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(stack: ExitStack) -> Opened:
        raise Missing("not installed: apt-get install redis-server")

    monkeypatch.setitem(stores.CONTENDERS, REFERENCE, missing)
    with pytest.raises(KVLabError, match="redis-server"):
        stores.run([REFERENCE], sizes=(4096,), rounds=1)
