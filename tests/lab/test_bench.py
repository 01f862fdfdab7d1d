"""The benchmarks' results have the promised shape, and the fuzzer notices a decoder that is broken on purpose."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

from kvlab.core import record
from kvlab.core.keys import KEY_BYTES, field
from kvlab.core.record import HEADER_BYTES
from kvlab.errors import KVLabError
from kvlab.lab import fuzz as bench_fuzz
from kvlab.lab.bench import codec as bench_codec
from kvlab.lab.bench import failover as bench_failover
from kvlab.lab.bench import hash as bench_hash
from kvlab.lab.bench import shards as bench_shards
from kvlab.lab.bench import wire as bench_wire
from kvlab.stores.redis.store import COMMANDS
from kvlab.testbed.server import RedisServer


def test_bench_hash_reports_every_block_size() -> None:
    result = bench_hash.run(tokens=1024, rounds=1)
    assert [row["block_tokens"] for row in result["rows"]] == [16, 64, 256]
    for row in result["rows"]:
        assert {"ns_per_token", "us_per_block", "sha256_floor_ns_per_token", "ratio_to_floor"} < set(row)
        assert row["us_per_block"] == pytest.approx(row["ns_per_token"] * row["block_tokens"] / 1000)
    assert [row["prefix_tokens"] for row in result["by_prefix"]] == list(bench_hash.PREFIXES)
    assert {"machine", "versions", "noisy", "aa_ratio"} < set(result)


def test_the_floor_hashes_messages_of_the_right_length() -> None:
    chain = len(field(b"kvlab/1/block") + field(bytes(KEY_BYTES)) + field(b""))
    assert chain == bench_hash.MESSAGE_BYTES


@pytest.mark.slow
def test_bench_codec_reports_every_codec() -> None:
    result = bench_codec.run(windows=2, blocks=4, rounds=1)
    rows = {row["codec"]: row for row in result["rows"]}
    assert len(rows) == 5 * 3 + 2
    want = {"codec", "x_fp32", "encode_gbps", "decode_gbps", "fp16_cast_gbps", "memcpy_gbps"}
    assert all(set(row) == want | {"kl", "kl_se", "ppl_delta_pct", "top1"} for row in rows.values())
    assert rows["fp32"]["kl"] == 0 and rows["fp32"]["top1"] == 1
    assert 0 < rows["bf16"]["kl"] < rows["int8"]["kl"] < rows["int4"]["kl"]
    assert 0.999 < rows["fp32"]["x_fp32"] < 1 and 1.999 < 2 * rows["fp32"]["x_fp32"] <= rows["fp16"]["x_fp32"] * 1.001
    for precision in ("fp32", "fp16", "bf16", "int8", "int4"):
        assert rows[f"{precision}+zstd"]["x_fp32"] > rows[precision]["x_fp32"]
        assert rows[f"{precision}+zstd"]["kl"] == rows[precision]["kl"]
    assert result["reference"]["kl"] > rows["int8"]["kl"]
    json.dumps(result)


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
        with pytest.raises(KVLabError, match=r"cannot be used|did not take a value"):
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


@pytest.mark.cluster
def test_bench_shards_asks_each_node_once_and_a_hung_one_alone_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_shards, "SIZES", (16 << 10,))
    monkeypatch.setattr(bench_shards, "HUNG_DEADLINE_S", 1.0)  # a busy machine must not turn a hit into a miss
    result = bench_shards.run(scale=0.01)
    (row,) = result["rows"]
    assert row["value_kib"] == 16 and row["get_vs_one"] > 0
    keys = result["round_trips"].pop("keys")
    assert sum(keys) == bench_shards.RECORDS and min(keys) > 0
    assert result["round_trips"] == {call: [1, 1, 1] for call in ("load", "save", "probe")}
    hung = result["hung"]
    lost = hung["keys_of_the_hung_node"]
    assert hung["hits"] == [bench_shards.RECORDS - lost] * bench_shards.HUNG_CALLS
    assert hung["misses"] == {"timeout": 3 * lost, "breaker": (bench_shards.HUNG_CALLS - 3) * lost}
    assert hung["open_breakers"] == ["hung"]


@pytest.mark.cluster
@pytest.mark.slow
def test_bench_failover_finds_the_keys_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_failover, "NODE_TIMEOUTS_MS", (1000,))
    result = bench_failover.run(rounds=1)
    assert len(result["killed"]["1000"]) == len(result["frozen"]["2000"]) == 1
    assert result["killed"]["1000"][0] > 0 and result["others"]["hit"] > 0


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
