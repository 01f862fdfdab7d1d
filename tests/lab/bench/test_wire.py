"""`bench wire` reports what it says, and says what it cannot measure."""

from __future__ import annotations

import itertools
import json

import pytest

from kvlab.errors import KVLabError
from kvlab.lab.bench import wire as bench_wire
from kvlab.stores.redis.store import COMMANDS
from kvlab.testbed.server import RedisServer

WIRE_ROW = {"value_kib", "transport", "new_keys", "put_ratio", "get_ratio", "put_vs_redis_py", "get_vs_redis_py"}
WIRE_ROW |= {f"{who}_{way}_gbps" for who in ("store", "raw") for way in ("put", "get")}


@pytest.mark.redis
def test_bench_wire_reports_every_size_and_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_wire, "SIZES", (64 << 10, 1 << 20))
    result = bench_wire.run(scale=0.01)
    kinds = [(row["transport"], row["value_kib"], row["new_keys"]) for row in result["rows"]]
    assert kinds == list(itertools.product(("tcp", "unix"), (64, 1024), (False, True)))
    for row in result["rows"]:
        assert set(row) >= WIRE_ROW and min(row[name] for name in WIRE_ROW - {"transport", "new_keys"}) > 0
    assert result["round_trips"] == {"probe": 1, "load_64_mib": 4, "load_64_records_of_192_kib": 1}
    assert result["batch"]["records"] == 64 and result["lookup"]["keys"] == 1024
    json.dumps(result)


@pytest.mark.redis
def test_bench_wire_measures_a_given_server_and_leaves_nothing_there(
    monkeypatch: pytest.MonkeyPatch, tls_server: RedisServer
) -> None:
    monkeypatch.setattr(bench_wire, "SIZES", (1 << 20,))
    for url, transport in ((tls_server.tls_url, "tls"), (tls_server.unix_url, "unix")):
        rows = bench_wire.run(url, scale=0.01)["rows"]
        assert [row["transport"] for row in rows] == [transport] * 2
    assert tls_server.client().dbsize() == 0


@pytest.mark.redis
def test_bench_wire_says_when_a_server_takes_nothing(redis_server: RedisServer) -> None:
    client = redis_server.client()
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(KVLabError, match=r"cannot be used|did not accept a value"):
            bench_wire.run(redis_server.url, scale=0.01)
    finally:
        client.config_set("maxmemory", 0)


@pytest.mark.redis
def test_bench_wire_says_when_a_server_evicts_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_wire, "SIZES", (1 << 20,))
    with (
        RedisServer("--maxmemory", "24mb", "--maxmemory-policy", "allkeys-random") as server,
        pytest.raises(KVLabError, match=r"is gone|did not"),
    ):
        bench_wire.run(server.url, scale=0.5)


@pytest.mark.redis
def test_bench_wire_needs_no_right_that_the_store_does_not_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_wire, "SIZES", (1 << 20,))
    with RedisServer() as server:
        rights = [f"+{name.lower()}" for name in COMMANDS]
        server.client().execute_command("ACL", "SETUSER", "kvlab", "reset", "on", ">pw", "~kv:*", *rights)
        result = bench_wire.run(server.url.replace("://", "://kvlab:pw@"), scale=0.01)
        assert result["batch"]["redis_py_mget_ratio_to_single"] is None and result["wire"]["get_gbps"] > 0
        assert server.client().dbsize() == 0


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1", "fakeredis://", "http://127.0.0.1"])
def test_bench_wire_says_what_it_cannot_measure(url: str) -> None:
    with pytest.raises(KVLabError, match=r"cannot be used|to measure, got|a store URL that begins"):
        bench_wire.run(url)
