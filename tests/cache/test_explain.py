"""Why a block is missing: each cause made on purpose, and nothing blamed where nothing is wrong."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from redis.exceptions import OutOfMemoryError

from kvlab.cache import DistributedKVCache, describe, recent
from kvlab.cache.explain import CAUSES, Explanation
from kvlab.core import record
from kvlab.core.keys import KVSpec, Origin, digest
from kvlab.core.record import KIND_DESCRIPTION, OPAQUE, Format
from kvlab.core.seals import Xxh3
from kvlab.engine import TieredCache
from kvlab.errors import InputError
from kvlab.stores import MemoryStore, RedisStore, Store, WriteBehind, open_store
from kvlab.testbed.server import RedisServer
from tests.faults.kit import wait_for
from tests.harness.helpers import FakeClock, blank, exact_kv, flipped

B = 16
TOKENS = list(range(100, 100 + 4 * B + 5))
PARTS = {"config": b"c", "weights": b"w", "tokenizer": b"t", "adapter": b""}


def spec_of(dtype: torch.dtype = torch.float32, **parts: bytes) -> KVSpec:
    """A small model; its fingerprint follows from its parts."""
    parts = {name: part and digest("part", part) for name, part in {**PARTS, **parts}.items()}
    fingerprint = digest("test", *parts.values(), str(dtype).encode())
    return KVSpec(2, 2, 4, dtype, fingerprint, Origin("a model", "tests", **parts))


def made(store: Store | str, spec: KVSpec | None = None, **options: Any) -> DistributedKVCache:
    defaults = {"model": spec or spec_of(), "precision": "fp32", "compress": False, "block_tokens": B}
    return DistributedKVCache(store=store, **{**defaults, **options})


def save(cache: Any, tokens: list[int] = TOKENS, start: int = 0) -> int:
    return int(cache.save(tokens, exact_kv(spec_of(), len(tokens)), start))


def causes(found: Explanation) -> list[str]:
    return [block.cause for block in found.blocks]


@pytest.mark.redis
def test_a_server_that_came_back_empty_is_described_again_by_who_saved_before() -> None:
    with RedisServer() as server:
        old = made(RedisStore(server.url, ttl_s=3600))
        save(old)
        server.kill()
        assert save(old, TOKENS[1:]) == 0  # the next save notices
        server.start()
        other = made(RedisStore(server.url, ttl_s=3600), precision="fp16")

        def told() -> bool:
            return save(old) == len(TOKENS) // B and old.load(TOKENS, 0, B, blank(spec_of(), B)) == B

        wait_for(lambda: told() and other.explain(TOKENS).cause == "precision", 10)  # its breaker closes


def test_a_cache_that_describes_nothing_does_not_begin_after_a_refusal() -> None:
    without = made(MemoryStore(), describe=False)
    without.store.close()
    assert save(without) == 0 and without._describe_at == math.inf


@pytest.mark.parametrize(("ttl_s", "every_s"), [(100, 25), (86_400, 600), (None, 600)])
def test_a_description_is_written_again_each_ten_minutes_or_sooner(ttl_s: float | None, every_s: float) -> None:
    assert made("memory://", ttl_seconds=ttl_s).describe_every_s == every_s


@pytest.mark.parametrize("error", [AttributeError, ValueError, MemoryError])
def test_a_salt_whose_digest_cannot_be_computed_costs_the_description_alone(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_scrypt(*args: object, **options: object) -> bytes:
        raise error

    monkeypatch.setattr(describe.hashlib, "scrypt", no_scrypt)
    store = MemoryStore()
    cache = made(store, salt="a tenant")
    assert save(cache) == 4 and save(cache, [*range(200)]) > 0 and cache.match(TOKENS) == 4 * B
    assert "no description is left in the store" in caplog.text and len(caplog.records) == 1
    assert describe.listing(store, Xxh3()).found == ()


# --- nothing is wrong ---------------------------------------------------------------------------
@pytest.mark.parametrize("other", [False, True])
def test_a_healthy_system_blames_nothing(other: bool) -> None:
    store = MemoryStore()
    writer = made(store)
    assert save(writer) == 4
    found = (made(store) if other else writer).explain(TOKENS)
    assert (found.cause, found.hit_blocks, found.checked_blocks, found.notes) == ("", 4, 4, ())
    assert [(b.index, b.where, b.cause) for b in found.blocks] == [(i, "store", "") for i in range(4)]
    assert found.sentence == "all 4 blocks of the prompt are in the cache"
    assert found.differs == () and found.diverged_at is None


def test_other_tenants_models_and_precisions_on_a_healthy_store_are_not_blamed() -> None:
    store = MemoryStore()
    for spec, options in ((spec_of(), {"salt": "b"}), (spec_of(weights=b"x"), {}), (spec_of(), {"precision": "fp16"})):
        assert save(made(store, spec, **options)) == 4
    writer = made(store)
    save(writer)
    assert writer.explain(TOKENS).cause == made(store).explain(TOKENS).cause == ""


def test_an_answer_is_json_and_every_cause_is_in_the_list() -> None:
    told = json.loads(json.dumps(made(MemoryStore()).explain(TOKENS).as_json()))
    assert told["blocks"][1] == {"index": 1, "where": "", "cause": "never_stored"} and told["cause"] in CAUSES
    assert len(CAUSES) == len(set(CAUSES)) == 13


# --- each cause ---------------------------------------------------------------------------------
def test_below_block() -> None:
    for tokens in ([], TOKENS[: B - 1]):
        found = made(MemoryStore()).explain(tokens)
        assert (found.cause, causes(found), found.hit_blocks) == ("below_block", ["below_block"], 0)
        assert f"{len(tokens)} tokens" in found.sentence and "full blocks of 16" in found.sentence


def test_never_stored() -> None:
    store = MemoryStore()
    save(made(store))
    found = made(store).explain([7] * 40)
    assert (found.cause, causes(found), found.notes) == ("never_stored", ["never_stored"] * 2, ())


NAMESPACES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "precision": ({}, {"precision": "fp16"}),
    "adapter": ({"adapter": b"lora"}, {}),
    "weights": ({"weights": b"other"}, {}),
    "tokenizer": ({"tokenizer": b"other"}, {}),
    "dtype": ({"dtype": torch.bfloat16}, {}),
    "block_size": ({}, {"block_tokens": 32}),
}


@pytest.mark.parametrize("salt", ["", "secret"])
@pytest.mark.parametrize("cause", NAMESPACES)
def test_a_namespace_that_differs_in_one_thing(cause: str, salt: str) -> None:
    """The other one has the prompt, whatever else is in the store."""
    store, (parts, options) = MemoryStore(), NAMESPACES[cause]
    for other in (made(store, spec_of(weights=b"far"), salt="far"), made(store, salt="x"), made(store, salt=salt)):
        save(other, [9] * 64)
    save(made(store, spec_of(**parts), salt=salt, **options))
    reader = made(store, salt=salt)
    found = reader.explain(TOKENS)
    assert (found.cause, found.differs) == (cause, (cause,)) and set(causes(found)) == {cause}
    another = "other" if cause == "weights" else "another"
    assert f"64 tokens of the prompt are stored by tests (a model) with {another} {cause}" in found.sentence
    save(reader)
    assert reader.explain(TOKENS).cause == "", "now it is here too"


def test_several_differences_are_all_told_and_the_prompt_that_goes_further_counts() -> None:
    store = MemoryStore()
    save(made(store, spec_of(weights=b"v", config=b"v"), precision="fp16"))
    save(made(store), TOKENS[:32])
    found = made(store).explain(TOKENS)
    assert (found.cause, found.differs, found.hit_blocks) == ("weights", ("weights", "precision"), 2)
    assert causes(found) == ["", "", "weights", "weights"]
    assert "other weights and another precision (fp16, here fp32)" in found.sentence


def test_salt() -> None:
    store = MemoryStore()
    for salt in ("one", "two"):
        save(made(store, salt=salt))
    reader = made(store, salt="three")
    for _ in range(2):
        found = reader.explain(TOKENS)
        assert (found.cause, found.differs, found.diverged_at) == ("salt", ("salt",), None)
        assert "2 other salts" in found.sentence
        save(reader, [5] * 64)  # only this process has saved under its salt
    later = made(store, salt="three").explain(TOKENS)
    assert later.cause == "never_stored" and "2 other salts" in later.notes[0]


def test_another_tokenizer_gives_other_tokens() -> None:
    store = MemoryStore()
    save(made(store, spec_of(tokenizer=b"other")), [3] * 64)
    assert made(store).explain(TOKENS).cause == "tokenizer"
    assert made(store, salt="x").explain(TOKENS).cause == "never_stored", "of another tenant"


def test_diverged_from_what_this_process_saved() -> None:
    store = MemoryStore()
    writer = made(store)
    save(writer)
    changed = [*TOKENS[:40], 1, *TOKENS[41:]]
    found = writer.explain(changed)
    assert (found.cause, found.diverged_at, found.hit_blocks) == ("diverged", 40, 2)
    assert causes(found) == ["", "", "diverged", "diverged"] and "token 40, in block 2" in found.sentence
    assert (found.here, found.there) == ("", "")
    assert made(store).explain(changed).cause == "never_stored", "another process has not seen the request"
    assert writer.explain([*TOKENS[:7], 1, *TOKENS[8:]]).cause == "never_stored", "too short a beginning"


def test_diverged_from_what_the_caller_gives() -> None:
    store = MemoryStore()
    save(made(store))
    reader, changed = made(store), [1, *TOKENS[1:]]
    found = reader.explain(changed, TOKENS, lambda tokens: " ".join(map(str, tokens)))
    assert (found.cause, found.diverged_at, causes(found)) == ("diverged", 0, ["diverged"] * 4)
    assert found.here.startswith("1 101") and found.there.startswith("100 101")
    for against, note in (([2, *TOKENS[1:]], "is not stored either"), (changed, "the same tokens as far")):
        told = reader.explain(changed, against)
        assert told.cause == "never_stored" and note in told.notes[-1]
    assert "not why block 2" in reader.explain(TOKENS[:32] + [8] * 40, [8, *TOKENS]).notes[-1]


def test_gone_as_this_process_saw_or_as_later_blocks_show() -> None:
    clock = FakeClock()
    store = MemoryStore(ttl_s=10, clock=clock)
    writer = made(store)
    save(writer)
    store.delete_many([writer.namespace.keys(TOKENS)[1]])
    for cache in (writer, made(store)):
        found = cache.explain(TOKENS)
        assert (found.cause, causes(found), found.hit_blocks) == ("gone", ["", "gone", "", ""], 1)
        assert [block.where for block in found.blocks] == ["store", "", "store", "store"]
        assert "2 later blocks are stored and cannot be used without block 1" in found.notes
    clock.now += 100
    assert causes(writer.explain(TOKENS)) == ["gone"] * 4
    assert causes(made(store).explain(TOKENS)) == ["never_stored"] * 4, "nothing is left that could tell"


def test_gone_as_a_reader_saw() -> None:
    store = MemoryStore()
    save(made(store))
    reader = made(store)
    assert reader.load(TOKENS, 0, 64, torch.empty(2, 2, 2, 64, 4)) == 64
    store.delete_many(reader.namespace.keys(TOKENS))
    assert causes(reader.explain(TOKENS)) == ["gone"] * 4


@pytest.mark.redis
@pytest.mark.parametrize("how", ["evicted", "expired"])
def test_gone_from_a_real_server(how: str) -> None:
    with RedisServer() as server, open_store(server.url, ttl_s=0.2 if how == "expired" else 60) as store:
        writer = made(store)
        assert save(writer) == 4
        client = server.client()
        if how == "evicted":
            client.config_set("maxmemory-policy", "allkeys-lru")
            client.config_set("maxmemory", "1")
            with pytest.raises(OutOfMemoryError):
                client.set("more", "x")  # it evicts all, and that is not enough
        wait_for(lambda: client.dbsize() == 0)
        assert client.info("stats")[f"{how}_keys"] >= 4
        client.config_set("maxmemory", "0")
        found = writer.explain(TOKENS)
        assert (found.cause, causes(found)) == ("gone", ["gone"] * 4)


def test_refused_because_a_number_is_out_of_range() -> None:
    cache = made(MemoryStore(), precision="fp16")
    kv = exact_kv(spec_of(), 64)
    kv[..., 40, :] = 1e6
    assert cache.save(TOKENS[:64], kv) == 2
    found = cache.explain(TOKENS)
    assert (found.cause, causes(found)) == ("refused", ["", "", "refused", "refused"]) and "overflow" in found.sentence


def test_refused_because_the_store_took_nothing() -> None:
    class Full(MemoryStore):
        def put_many(self, keys: Any, values: Any) -> int:
            self._stats.offered += len(keys)
            self._stats.drops["oom"] += len(keys)
            return 0

    cache = made(Full())
    assert save(cache) == 0
    found = cache.explain(TOKENS)
    assert causes(found) == ["refused"] * 4 and "store (oom 4)" in found.sentence


def test_refused_by_the_store_behind_a_queue() -> None:
    inner = MemoryStore()
    store = WriteBehind(inner)
    cache = made(store)
    inner.close()
    save(cache)
    assert store.flush(10)
    inner._closed = False  # it is back, without the blocks
    found = cache.explain(TOKENS)
    assert causes(found) == ["refused"] * 4 and "closed" in found.sentence


def test_refused_by_a_selective_rule_and_found_in_host_memory() -> None:
    tiers = TieredCache(made(MemoryStore()), host_bytes=0, write="selective")
    save(tiers)
    found = tiers.explain(TOKENS)
    assert causes(found) == ["refused"] * 4 and "selective" in found.sentence
    back = TieredCache(made(MemoryStore()), write="back")
    save(back)
    told = back.explain(TOKENS)
    assert [b.where for b in told.blocks] == ["host"] * 4 and (told.cause, told.checked_blocks) == ("", 0)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "checksum": lambda value: flipped(value, 300),
    "version": lambda value: value[:4] + b"\x02" + value[5:],
    "key_id": lambda value: value[:9] + b"\x02" + value[10:],
    "magic": lambda value: b"x" * len(value),
    "too_big": lambda value: value + bytes(1 << 20),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_failed_because_a_record_is_not_valid(reason: str) -> None:
    store = MemoryStore()
    cache = made(store)
    save(cache)
    key = cache.namespace.keys(TOKENS)[2]
    store.put_many([key], [DAMAGE[reason](store.get_many([key])[0])])  # type: ignore[arg-type]
    found = made(store).explain(TOKENS)
    assert (found.cause, causes(found), found.hit_blocks) == ("failed", ["", "", "failed", ""], 2)
    assert reason in found.sentence and found.blocks[2].where == "store"
    assert store.get_many([key])[0] is not None, "a diagnosis deletes nothing"


@pytest.mark.redis
def test_failed_because_the_server_was_killed() -> None:
    with RedisServer() as server, open_store(server.url) as store:
        cache = made(store)
        save(cache)
        server.kill()
        found = cache.explain(TOKENS)
        assert (found.cause, causes(found)) == ("failed", ["failed"] * 4) and "conn" in found.sentence


@pytest.mark.redis
def test_failed_because_a_right_is_missing(redis_server: RedisServer) -> None:
    client = redis_server.client()
    client.execute_command("ACL", "SETUSER", "blind", "reset", "on", ">p", "~other:*", "+@all")
    try:
        with open_store(redis_server.url.replace("redis://", "redis://blind:p@")) as store:
            assert "auth" in (found := made(store).explain(TOKENS)).sentence and found.cause == "failed"
    finally:
        client.execute_command("ACL", "DELUSER", "blind")


# --- what it costs ------------------------------------------------------------------------------
@pytest.mark.redis
def test_round_trips(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    trips: list[str] = []
    for name in ("get_many", "touch_many", "put_many", "probe", "delete_many"):
        call = getattr(RedisStore, name)
        monkeypatch.setattr(RedisStore, name, lambda *a, _n=name, _c=call, **k: (trips.append(_n), _c(*a, **k))[1])
    with open_store(redis_server.url) as store:
        save(made(store, precision="fp16"))
        writer = made(store)
        save(writer, [*TOKENS[:40], *[4] * 30])
        client = redis_server.client()
        for tokens, most in ((TOKENS[:32], 2), (TOKENS, 6), ([6] * 64, 6)):
            client.config_resetstat()
            size, trips[:] = client.dbsize(), []
            found = writer.explain(tokens, TOKENS)
            assert len(trips) <= most and set(trips) <= {"get_many", "touch_many"}, (found, trips)
            commands = Counter({n: s["calls"] for n, s in client.info("commandstats").items()})
            assert commands["cmdstat_get"] <= len(tokens) // B + 1 + describe.SLOTS
            assert not {"cmdstat_scan", "cmdstat_keys", "cmdstat_set", "cmdstat_del"} & commands.keys()
            assert client.dbsize() == size


@pytest.mark.redis
def test_a_huge_store_of_strangers_is_not_scanned(redis_server: RedisServer) -> None:
    client = redis_server.client()
    client.mset({b"kv:" + struct.pack("<Q", i) * 4: b"x" * 64 for i in range(20_000)})
    with open_store(redis_server.url) as store:
        client.config_resetstat()
        found = made(store).explain(TOKENS)
        assert found.cause == "never_stored" and "no description" in found.notes[0]
        calls = sum(s["calls"] for s in client.info("commandstats").values())
        assert calls < 100


# --- stores that cannot say much ----------------------------------------------------------------
def put_description(store: Store, place: int, data: bytes) -> None:
    key = digest("kvlab/2/description", struct.pack("<I", place))
    value = record.encode_opaque(np.frombuffer(data, np.uint8), key, Format(OPAQUE, seal=Xxh3()), KIND_DESCRIPTION)
    store.put_many([key], [value])


def test_descriptions_of_another_version_and_other_things_in_their_places() -> None:
    store = MemoryStore()
    put_description(store, 1, b'{"format": 3, "colour": "blue"}')
    put_description(store, 2, b"[]")
    store.put_many([digest("kvlab/2/description", struct.pack("<I", 3))], [b"x" * 10_000])
    found = made(store).explain(TOKENS)
    assert found.cause == "never_stored" and "no description" in found.notes[0]
    assert found.notes[1].startswith("1 descriptions are of another version")
    assert found.notes[2].startswith("2 places for descriptions hold something else")


@pytest.mark.parametrize("members", [{"fingerprint": "no hex"}, {"block_tokens": 0}, {"block_tokens": 2**40}])
def test_a_description_that_cannot_be_true_is_no_error(members: dict[str, Any]) -> None:
    store = MemoryStore()
    cache = made(store)
    own = cache.view().description
    assert own is not None
    put_description(store, 1, replace(own, precision="int4", **members).to_bytes())
    assert cache.explain(TOKENS).cause == "never_stored"


def test_a_store_full_of_strangers() -> None:
    store = MemoryStore()
    for n in range(80):
        save(made(store, spec_of(weights=bytes([n]), tokenizer=bytes([n])), precision="fp16"))
    assert made(store).explain([5] * 64).cause == "never_stored"


def test_blocks_of_an_engine_and_forged_descriptions_prove_nothing() -> None:
    store = MemoryStore()
    own = made(store).view().description
    assert own is not None
    describe.write(store, Xxh3(), replace(own, layout="ab", precision="fp16"))
    describe.write(store, Xxh3(), replace(own, precision="int8"))
    assert made(store).explain(TOKENS).cause == "never_stored"


def test_a_fingerprint_of_unknown_origin_is_neither_described_nor_compared() -> None:
    store = MemoryStore()
    unknown = replace(spec_of(), origin=None)
    save(made(store, unknown))
    assert describe.read_all(store, Xxh3()) == []
    assert "does not know" in made(store, unknown).explain([1] * 64).notes[-1]


# --- what is left in a store, and what is not ---------------------------------------------------
def test_a_cache_describes_itself_once_and_only_if_it_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    made(store).explain(TOKENS)
    save(made(store, describe=False))
    assert describe.read_all(store, Xxh3()) == []
    cache = made(store, salt="s")
    for n in range(3):
        save(cache, [n] * 64)
    (found,) = describe.read_all(store, Xxh3())
    assert (found.precision, found.dtype, found.block_tokens, found.model) == ("fp32", "float32", B, "a model")
    assert found.tenant and "s" not in (found.tenant, found.model) and len(store._entries) == 4 + 12 + 1


def test_no_tokens_and_no_roots_are_in_a_description() -> None:
    store = MemoryStore()
    cache = made(store, salt="tenant")
    save(cache)
    (found,) = describe.read_all(store, Xxh3())
    text = found.to_bytes().decode()
    for secret in (cache.namespace.root, *cache.namespace.keys(TOKENS), b"tenant"):
        assert secret.hex() not in text
    assert "tenant" not in text.replace('"tenant":', "")


def test_tenants_who_share_master_keys_find_each_other_and_the_store_reads_nothing() -> None:
    store, keys = MemoryStore(), {1: b"k" * 32}
    save(made(store, salt="one", encryption_keys=keys))
    assert made(store, salt="two", encryption_keys=keys).explain(TOKENS).cause == "salt"
    found = made(store, salt="two").explain(TOKENS)
    assert found.cause == "never_stored" and "sealed otherwise" in found.notes[-1]
    assert not any(b"a model" in value for value, _ in store._entries.values())


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "MAX_KEYS", 10)
    memory = recent.Recent()
    memory.blocks([bytes([n]) for n in range(30)])
    assert [memory.fate(bytes([n])) for n in (19, 20, 29)] == [None, "", ""]
    for n in range(40):
        memory.saved([n] * 5)
    memory.saved([39] * recent.MAX_TOKENS + [1])
    assert [len(r) for r in memory.requests()] == [recent.MAX_TOKENS, *[5] * (recent.MAX_REQUESTS - 1)]


@pytest.mark.parametrize("tokens", [[1.5] * 20, [-1] * 20, [2**32] * 20, ["a"] * 20])
def test_tokens_that_are_none(tokens: Any) -> None:
    cache = made(MemoryStore())
    for arguments in ((tokens,), (TOKENS, tokens)):
        with pytest.raises(InputError, match="expected tokens"):
            cache.explain(*arguments)


# --- the edges of the rules ---------------------------------------------------------------------
def test_a_block_that_goes_between_the_look_and_the_read_is_missing_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    cache = made(store)
    save(cache)
    stale = store.touch_many(cache.namespace.keys(TOKENS))
    store.delete_many(cache.namespace.keys(TOKENS)[1:2])
    monkeypatch.setattr(store, "touch_many", lambda keys: stale[: len(keys)])
    found = cache.explain(TOKENS)
    assert (found.cause, found.hit_blocks, found.checked_blocks) == ("gone", 1, 1)
    assert [block.where for block in found.blocks] == ["store", "", "store", "store"]


def test_only_the_first_records_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    cache = made(store)
    save(cache)
    for count in (2, 0):
        monkeypatch.setattr("kvlab.cache.explain.CHECK_BYTES", count * cache.record_bytes)
        before = store.stats().requested
        found = cache.explain(TOKENS)
        assert (found.hit_blocks, found.checked_blocks) == (4, max(1, count))
        assert store.stats().requested - before == max(1, count)


def test_a_namespace_that_has_no_more_of_the_prompt_is_not_blamed() -> None:
    store = MemoryStore()
    save(made(store, precision="fp16"), TOKENS[:32])
    save(made(store), TOKENS[:32])
    assert causes(made(store).explain(TOKENS)) == ["", "", "never_stored", "never_stored"]


def test_blocks_in_the_layout_of_an_engine_are_not_blamed_even_if_a_description_claims_their_keys() -> None:
    store = MemoryStore()
    other = made(store, precision="fp16", describe=False)
    save(other)
    own = other.view().description
    assert own is not None
    describe.write(store, Xxh3(), replace(own, layout="ab"))
    assert made(store).explain(TOKENS).cause == "never_stored"


def test_a_fingerprint_that_differs_in_what_no_member_names_is_another_model() -> None:
    store = MemoryStore()
    save(made(store, replace(spec_of(), fingerprint=b"f" * 32)))
    found = made(store).explain(TOKENS)
    assert (found.cause, found.differs) == ("weights", ("weights",))


def test_a_salt_under_which_the_beginning_is_stored_is_not_blamed() -> None:
    store = MemoryStore()
    save(made(store, salt="other"))
    writer = made(store, salt="mine")
    save(writer, TOKENS[:32])
    assert causes(writer.explain(TOKENS)) == ["", "", "never_stored", "never_stored"]


def test_the_whole_prompt_is_looked_for_in_few_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked = MemoryStore(), []
    for n in range(9):
        save(made(store, spec_of(weights=bytes([n]))), TOKENS[:B])
    save(made(store, precision="fp16"))
    touch = store.touch_many
    monkeypatch.setattr(store, "touch_many", lambda keys: (asked.append(len(keys)), touch(keys))[1])
    assert made(store).explain(TOKENS).cause in ("precision", "weights")
    assert asked == [4, 10, 16]
