"""What a cache does when its Redis is down, slow, strange, or holds what nobody should trust: without the book.

Always: no exception, no wrong tensor, every block a hit or a miss with a reason, and a save repairs.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlab.cache import DistributedKVCache
from kvlab.core import record
from kvlab.core.keys import Namespace, text_key
from kvlab.core.record import Format
from kvlab.engine import generate
from kvlab.stores import RedisStore, Store
from kvlab.testbed.server import RedisServer, free_port
from tests.faults.kit import (
    BLOCKS,
    KEYS,
    KV,
    LOST,
    OTHER_KV,
    OTHER_TOKENS,
    RECORD,
    SPEC,
    TIMEOUT_S,
    TOKENS,
    B,
    Bomb,
    cache_over,
    check_is_no_help,
    check_works_again,
    heal_breakers,
    load_all,
    wait_for,
    within,
)
from tests.harness.helpers import attentive_model, exact_kv, flipped, joined, tampered
from tests.harness.scripted import ScriptedServer


@pytest.fixture(params=["fakeredis", pytest.param("redis", marks=pytest.mark.redis)])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """A Redis that works; what it holds is the problem."""
    url = "fakeredis://" if request.param == "fakeredis" else request.getfixturevalue("redis_server").url
    with RedisStore(url, deadline_s=30) as made:
        yield made


def saved_by_torch(value: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


FOREIGN = joined(record.encode(KV[:, :, :, :B], KEYS[0], Format()))
BLOCK = KV[:, :, :, :B].clone()
BAD_VALUES = {
    "empty": (b"", "length"),
    "text": (b"not a record " * 20, "magic"),
    "torch zip": (saved_by_torch(BLOCK), "magic"),
    "torch legacy": (saved_by_torch(BLOCK, _use_new_zipfile_serialization=False), "magic"),
    "header alone": (RECORD[:128], "length"),
    "foreign key": (FOREIGN, "key"),
    "foreign key moved here by an accident": (RECORD[:64] + FOREIGN[64:96] + RECORD[96:], "checksum"),
    "newer version": (tampered(RECORD, 4, b"\x02"), "version"),
    "other kind": (tampered(RECORD, 5, b"\x02"), "kind"),
    "unknown codec": (tampered(RECORD, 6, b"\x09"), "codec"),
    "said to be gzip": (tampered(RECORD, 6, b"\x01"), "codec"),
    "other precision": (tampered(RECORD, 7, b"\x02"), "precision"),
    "other shape": (tampered(RECORD, 16, struct.pack("<5I", 2, 2, 2, 4, 16)), "dims"),
    "other seal": (tampered(RECORD, 9, b"\x02"), "key_id"),
    "larger than any record": (RECORD + bytes(1 << 20), "too_big"),
    "payload twice": (RECORD + RECORD[128:], "length"),
    "one byte more": (RECORD + b"\0", "length"),
    "last byte flipped": (flipped(RECORD, len(RECORD) - 1), "checksum"),
    "payload of zeros": (RECORD[:128] + bytes(len(RECORD) - 128), "checksum"),
}


def check_is_a_miss(cache: DistributedKVCache, value: bytes, reason: str) -> None:
    """Plant a value under one block's key: a miss with this reason, a shorter prefix, and a save that repairs."""
    cache.save(TOKENS, KV)
    cache.store.put_many([KEYS[LOST]], [value])
    before = cache.stats()
    assert load_all(cache) == LOST
    assert cache.stats().misses - before.misses == Counter({reason: 1, "gap": BLOCKS - LOST - 1})
    assert cache.stats().hits - before.hits == LOST
    assert cache.save(TOKENS, KV, start=LOST * B) == BLOCKS - LOST
    assert load_all(cache) == BLOCKS


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_value_that_is_no_record_of_this_block_is_a_miss(store: Store, name: str) -> None:
    check_is_a_miss(cache_over(store), *BAD_VALUES[name])


@pytest.mark.parametrize("compress", [False, True])
def test_a_record_cut_short_anywhere_is_a_miss(store: Store, compress: bool) -> None:
    cache = cache_over(store, compress)
    cache.save(TOKENS, KV)
    (whole,) = store.get_many([KEYS[LOST]])
    lengths = [*range(0, 160), *range(160, len(whole), 97), len(whole) - 1]
    for count, length in enumerate(lengths, 1):
        store.put_many([KEYS[LOST]], [whole[:length]])
        assert load_all(cache) == LOST
        assert cache.stats().misses["length"] == count
    assert cache.save(TOKENS, KV, start=LOST * B) == BLOCKS - LOST
    assert load_all(cache) == BLOCKS


def reason_of_flip(at: int) -> str:
    """What a flipped byte of the header is reported as: what the reader does not know before what is damaged."""
    if at < 4:
        return "magic"
    if at == 4:
        return "version"
    if at == 9 or 12 <= at < 16:
        return "key_id"
    return "length" if 48 <= at < 56 else "checksum"


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_a_flipped_byte_anywhere_in_the_header_is_a_miss(store: Store, mask: int) -> None:
    cache = cache_over(store)
    cache.save(TOKENS, KV)
    expected: Counter[str] = Counter()
    for at in range(128):
        store.put_many([KEYS[LOST]], [flipped(RECORD, at, mask)])
        expected[reason_of_flip(at)] += 1
        assert load_all(cache) == LOST
        assert cache.stats().misses - Counter(gap=10**9) == expected
    assert cache.save(TOKENS, KV, start=LOST * B) == BLOCKS - LOST
    assert load_all(cache) == BLOCKS


@pytest.mark.parametrize("padding", [0, 4000])
def test_a_pickle_is_never_executed(store: Store, tmp_path: Path, padding: int) -> None:
    sentinel = tmp_path / "executed"
    bomb = pickle.dumps([Bomb(sentinel), b"x" * padding])
    pickle.loads(bomb)
    assert sentinel.exists(), "the bomb must be armed, or this test proves nothing"
    sentinel.unlink()
    check_is_a_miss(cache_over(store), bomb, "magic" if len(bomb) >= 128 else "length")
    check_is_a_miss(cache_over(store), saved_by_torch(Bomb(sentinel)), "magic")
    check_text_is_a_miss(store, bomb, "magic" if len(bomb) >= 128 else "length")
    assert not sentinel.exists()


TEXT = "a prompt"
TEXT_KEY = text_key(TEXT, 3, "fp32")
K, V = exact_kv(SPEC, 8)[:, 0], exact_kv(SPEC, 8)[:, 1]
TEXT_RECORD = joined(record.encode(torch.stack((K, V)), TEXT_KEY, Format(), record.KIND_TEXT))
BAD_TEXT_VALUES = {
    "empty": (b"", "length"),
    "text": (b"not a record " * 20, "magic"),
    "block record": (RECORD, "kind"),
    "block record forged to fit": (tampered(RECORD, 64, TEXT_KEY), "kind"),
    "another text": (tampered(TEXT_RECORD, 64, bytes(32)), "key"),
    "cut short": (TEXT_RECORD[:-1], "length"),
    "flipped": (flipped(TEXT_RECORD, 300), "checksum"),
    "three planes": (
        joined(record.encode(torch.stack((K, V, V)), TEXT_KEY, Format(), record.KIND_TEXT)),
        "dims",
    ),
    "larger than anything": (tampered(TEXT_RECORD, 16, struct.pack("<8I", *[2**32 - 1] * 8)), "dims"),
    "no dims": (tampered(TEXT_RECORD, 10, b"\0"), "dims"),
    "nine dims": (tampered(TEXT_RECORD, 10, b"\x09"), "dims"),
    "unknown dtype": (tampered(TEXT_RECORD, 8, b"\x07"), "dims"),
}
OVERSIZED = {
    "two tebibytes": struct.pack("<8I", 2, 2**19, 2**19, 1, 0, 0, 0, 0),
    "eight full dims": struct.pack("<8I", *[2**32 - 1] * 8),
    "nothing times too much": struct.pack("<8I", 2, 0, *[2**32 - 1] * 3, 0, 0, 0),
}


def check_text_is_a_miss(store: Store, value: bytes, reason: str | None) -> None:
    """The same for the calls with a text."""
    cache = cache_over(store)
    unbound = DistributedKVCache(precision="fp32", compress=False, store=store)
    assert unbound.cache_kv(TEXT, 3, K, V)
    store.put_many([TEXT_KEY], [value])
    assert unbound.get_cached_kv(TEXT, 3) is None
    assert unbound.stats().misses.total() == 1
    assert reason is None or unbound.stats().misses == Counter({reason: 1})
    assert unbound.cache_kv(TEXT, 3, K, V)
    got = unbound.get_cached_kv(TEXT, 3)
    assert got is not None and torch.equal(got[0], K) and torch.equal(got[1], V)
    unbound.stats().check()
    assert cache.get_cached_kv(TEXT, 3) is None  # another identity


@pytest.mark.parametrize("name", BAD_TEXT_VALUES)
def test_a_value_that_is_no_record_of_this_text_is_a_miss(store: Store, name: str) -> None:
    check_text_is_a_miss(store, *BAD_TEXT_VALUES[name])


@pytest.mark.parametrize("dims", OVERSIZED)
@pytest.mark.parametrize("codec", [0, 1])
def test_a_forged_size_of_a_text_record_is_a_miss(store: Store, dims: str, codec: int) -> None:
    ndim = 8 if dims == "eight full dims" else 5 if dims == "nothing times too much" else 4
    forged = tampered(tampered(TEXT_RECORD, 10, bytes([ndim])), 16, OVERSIZED[dims])
    check_text_is_a_miss(store, tampered(forged, 6, bytes([codec])), None)


@pytest.mark.redis
@pytest.mark.parametrize("kind", ["list", "hash", "set", "stream"])
def test_a_redis_value_of_another_type_is_a_miss(redis_server: RedisServer, kind: str) -> None:
    client = redis_server.client()
    cache = cache_over(RedisStore(redis_server.url, ttl_s=100, deadline_s=30))
    cache.save(TOKENS, KV)
    name = b"kv:" + KEYS[LOST]
    client.delete(name)
    {
        "list": lambda: client.rpush(name, RECORD),
        "hash": lambda: client.hset(name, "field", RECORD),
        "set": lambda: client.sadd(name, RECORD),
        "stream": lambda: client.xadd(name, {"field": RECORD}),
    }[kind]()
    assert load_all(cache) == LOST
    assert cache.stats().misses == Counter(response=1, gap=BLOCKS - LOST - 1)
    assert cache.save(TOKENS, KV, start=LOST * B) == BLOCKS - LOST
    assert load_all(cache) == BLOCKS
    cache.close()


def test_generation_repairs_what_it_finds_broken(store: Store) -> None:
    model = attentive_model(context=512)
    prompt = [(i * 17) % 97 for i in range(100)]
    cache = DistributedKVCache(precision="fp32", compress=False, store=store, model=model, block_tokens=B)
    plain = generate(model, prompt, 8).tokens
    assert generate(model, prompt, 8, cache).tokens == plain
    key = Namespace(cache.spec.fingerprint, "fp32", b"", B).keys(prompt)[2]
    (good,) = store.get_many([key])
    for bad in (flipped(good, 500), good[:-1], tampered(good, 4, b"\x02"), b""):
        store.put_many([key], [bad])
        short = generate(model, prompt, 8, cache)
        assert (short.tokens, short.cached_tokens) == (plain, 2 * B)
        full = generate(model, prompt, 8, cache)
        assert (full.tokens, full.cached_tokens) == (plain, 6 * B)
    cache.stats().check()


def test_a_redis_that_is_not_there_is_only_misses() -> None:
    port = free_port()
    cache = DistributedKVCache("127.0.0.1", port, "fp32", False, model=SPEC, block_tokens=B)
    check_is_no_help(cache, "conn")
    assert f"127.0.0.1:{port}" in cache.health().detail
    assert not cache.cache_kv(TEXT, 0, K, V)
    assert cache.get_cached_kv(TEXT, 0) is None
    cache.close()


def test_a_host_that_does_not_exist_is_only_misses() -> None:
    check_is_no_help(cache_over(RedisStore("redis://kvlab.invalid:6379")), "conn")


def test_a_socket_that_does_not_exist_is_only_misses(tmp_path: Path) -> None:
    check_is_no_help(cache_over(RedisStore(f"unix://{tmp_path}/none.sock")), "conn")


@pytest.mark.redis
def test_generation_with_a_redis_that_is_killed_goes_on(own_server: RedisServer) -> None:
    model = attentive_model(context=512)
    prompt = [(i * 13) % 97 for i in range(120)]
    plain = generate(model, prompt, 8).tokens
    cache = DistributedKVCache(
        "127.0.0.1", own_server.port, precision="fp32", compress=False, model=model, block_tokens=B
    )
    for cached in (0, 7 * B):
        run = generate(model, prompt, 8, cache)
        assert (run.tokens, run.cached_tokens) == (plain, cached)
    own_server.kill()
    run = generate(model, prompt, 8, cache)
    assert (run.tokens, run.cached_tokens, run.saved_blocks) == (plain, 0, 0)
    own_server.start()
    heal_breakers(cache)
    for cached in (0, 7 * B):
        run = generate(model, prompt, 8, cache)
        assert (run.tokens, run.cached_tokens) == (plain, cached)
    cache.close()


@pytest.mark.redis
def test_a_redis_killed_half_way_is_only_misses_until_it_is_back(own_server: RedisServer) -> None:
    cache = cache_over(RedisStore(own_server.url))
    check_works_again(cache)
    own_server.kill()
    check_is_no_help(cache, "conn")
    own_server.start()
    check_works_again(cache)
    cache.close()


@pytest.mark.redis
def test_a_redis_that_restarted_unnoticed_costs_nothing_but_its_contents(own_server: RedisServer) -> None:
    cache = cache_over(RedisStore(own_server.url, deadline_s=30))
    check_works_again(cache)
    own_server.kill()
    own_server.start()
    check_works_again(cache)
    assert cache.store.stats().misses == cache.store.stats().drops == Counter()
    cache.close()


@pytest.mark.redis
def test_a_frozen_redis_is_bounded_misses_until_it_wakes(own_server: RedisServer) -> None:
    cache = cache_over(RedisStore(own_server.url, deadline_s=TIMEOUT_S))
    check_works_again(cache)
    own_server.stop()
    calls = 5
    within(10 * TIMEOUT_S * calls, lambda: check_is_no_help(cache, "timeout"))
    own_server.cont()
    wait_for(lambda: cache.health().ok)
    check_works_again(cache)
    cache.close()


@pytest.mark.redis
def test_answers_that_come_too_late_are_never_taken_for_others(own_server: RedisServer) -> None:
    """A frozen server answers old questions when it wakes; the connection must not be used again."""
    store = RedisStore(own_server.url, deadline_s=TIMEOUT_S, max_connections=1)
    keys = [b"%d" % i for i in range(20)]
    store.put_many(keys, [b"value of " + key for key in keys])
    own_server.stop()
    assert store.get_many(keys[:5]) == [None] * 5
    own_server.cont()
    wait_for(lambda: store.health().ok)
    for key in keys:
        assert store.get_many([key]) in ([b"value of " + key], [None])
    assert store.get_many(keys) == [b"value of " + key for key in keys]
    store.close()


@pytest.mark.redis
@pytest.mark.parametrize("login", ["", ":wrong@", "nobody:wrong@"])
def test_a_wrong_password_is_one_line_in_health(login: str) -> None:
    with RedisServer("--requirepass", "right") as server:
        address = f"127.0.0.1:{server.port}"
        cache = cache_over(RedisStore(f"redis://{login}{address}"))
        check_is_no_help(cache, "auth")
        assert "wrong" not in cache.health().detail.replace("WRONGPASS", "")
        cache.close()
        right = cache_over(RedisStore(f"redis://:right@{address}", deadline_s=30))
        check_works_again(right)
        assert ":right@" not in right.health().detail
        right.close()


@pytest.mark.redis
def test_a_user_who_may_only_read_reads(own_server: RedisServer) -> None:
    writer = cache_over(RedisStore(own_server.url, deadline_s=30))
    writer.save(TOKENS, KV)
    rights = ["reset", "on", ">pw", "~kv:*", "resetchannels", "+get", "+exists"]
    own_server.client().execute_command("ACL", "SETUSER", "reader", *rights)
    url = f"redis://reader:pw@127.0.0.1:{own_server.port}"
    reader = cache_over(RedisStore(url, deadline_s=30))
    assert load_all(reader) == BLOCKS
    assert reader.save(TOKENS, KV) == reader.stats().kept == BLOCKS
    assert reader.save(OTHER_TOKENS, OTHER_KV) == 0
    assert reader.store.stats().drops == Counter(auth=BLOCKS)
    assert reader.store.delete_many(KEYS) == 0
    for cache in (reader, writer):
        cache.close()


@pytest.mark.redis
def test_a_full_redis_drops_saves_and_goes_on_answering(own_server: RedisServer) -> None:
    cache = cache_over(RedisStore(own_server.url, deadline_s=30))
    cache.save(TOKENS, KV)
    own_server.client().config_set("maxmemory", 1)
    assert cache.save(OTHER_TOKENS, OTHER_KV) == 0
    assert cache.store.stats().drops == Counter(oom=BLOCKS)
    assert cache.stats().drops == Counter(store=BLOCKS)
    assert load_all(cache) == BLOCKS
    cache.close()


@pytest.mark.redis
def test_what_redis_evicted_is_a_miss(own_server: RedisServer) -> None:
    cache = cache_over(RedisStore(own_server.url, deadline_s=30))
    cache.save(TOKENS, KV)
    client = own_server.client()
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.config_set("maxmemory", client.info("memory")["used_memory"] + (1 << 20))
    filler = [b"filler %d" % i for i in range(64)]
    assert cache.store.put_many(filler, [bytes(64 << 10)] * 64) == 64
    assert client.info("stats")["evicted_keys"] > 0
    assert load_all(cache) < BLOCKS
    assert set(cache.store.stats().misses) == {"absent"}
    cache.close()


@pytest.mark.redis
def test_a_read_only_replica_reads(own_server: RedisServer) -> None:
    cache = cache_over(RedisStore(own_server.url, ttl_s=100, deadline_s=30))
    cache.save(TOKENS, KV)
    own_server.client().replicaof("127.0.0.1", free_port())
    assert load_all(cache) == BLOCKS
    assert cache.save(TOKENS, KV) == 0
    assert cache.store.stats().drops == Counter(readonly=BLOCKS)
    own_server.client().replicaof("NO", "ONE")
    check_works_again(cache)
    cache.close()


NONSENSE = {
    "HTTP": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "protocol"),
    "zeros": (bytes(64) + b"\r\n", "protocol"),
    "an integer": (b":5\r\n" * BLOCKS, "protocol"),
    "a status": (b"+FINE\r\n" * BLOCKS, "protocol"),
    "too few values": (b"*1\r\n$1\r\nx\r\n" * BLOCKS, "protocol"),
    "values of other types": (b"*4\r\n:1\r\n:2\r\n*0\r\n+x\r\n" * BLOCKS, None),
    "an error": (b"-ERR no\r\n" * BLOCKS, "response"),
    "an unknown error": (b"-STRANGE things\r\n" * BLOCKS, "response"),
    "loading": (b"-LOADING Redis is loading the dataset in memory\r\n" * BLOCKS, "loading"),
    "nothing": (b"", "timeout"),
    "half an answer": (b"$100\r\nabc", "timeout"),
    "a promise of a petabyte": (b"$1125899906842624\r\nabc", None),
    "arrays without end": (b"*1\r\n" * 100_000, None),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_server_that_talks_nonsense_is_only_misses(name: str) -> None:
    answer, reason = NONSENSE[name]
    with ScriptedServer(answer) as server:
        cache = cache_over(RedisStore(server.url, deadline_s=TIMEOUT_S))
        within(10 * TIMEOUT_S * 3, lambda: check_gives_nothing(cache, reason))
        cache.close()


def check_gives_nothing(cache: DistributedKVCache, reason: str | None) -> None:
    assert load_all(cache) == 0
    assert cache.save(TOKENS, KV) == 0
    assert cache.match(TOKENS) == 0
    if reason:
        assert cache.store.stats().misses == Counter({reason: BLOCKS})


def test_a_server_that_hangs_up_is_only_misses() -> None:
    with ScriptedServer(hang_up=True) as server:
        cache = cache_over(RedisStore(server.url, deadline_s=TIMEOUT_S))
        check_is_no_help(cache, "conn")
        cache.close()
