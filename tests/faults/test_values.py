"""Faults 8 to 14: values that are no good, put into the server by somebody else.

The many forms of damaged records are in `test_basics.py` and `tests/cache/`.
"""

from __future__ import annotations

import pickle
import random
from collections import Counter
from pathlib import Path

import pytest
import redis
import torch

from kvlab.cache import DistributedKVCache
from kvlab.core.keys import Namespace
from kvlab.core.record import Format
from kvlab.stores import RedisStore
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import RedisServer
from tests.faults.book import Book
from tests.faults.kit import (
    BLOCKS,
    KEYS,
    KV,
    LONG_S,
    LOST,
    NAMES,
    OTHER_KV,
    OTHER_TOKENS,
    RECORD,
    SPEC,
    TOKENS,
    B,
    Bomb,
    cache_over,
    check_bad_value,
    check_repaired,
    check_sums,
    heal_breakers,
    load_all,
    load_others,
    under_fault,
    within,
)
from tests.harness.helpers import blank, encoded, flipped, small_spec, tampered


@pytest.mark.fault(number=8)
@pytest.mark.redis
def test_a_value_cut_short(cache: DistributedKVCache, client: redis.Redis, book: Book) -> None:
    with book("truncated value", injected="SET of 0 … 129 bytes and len - 1, SETRANGE", expected="length") as row:
        for length in (*range(130), len(RECORD) - 1):
            check_bad_value(row, cache, lambda n=length: client.set(NAMES[LOST], RECORD[:n]), "length")

        def written_half() -> None:  # zeros up to there: what a writer in pieces leaves behind
            client.delete(NAMES[LOST])
            client.setrange(NAMES[LOST], 1000, RECORD[1000:])

        check_bad_value(row, cache, written_half, "magic")


@pytest.mark.fault(number=9)
@pytest.mark.redis
def test_a_bit_flipped_in_the_server(cache: DistributedKVCache, client: redis.Redis, book: Book) -> None:
    chance = random.Random(9)
    places = [*range(128), *(chance.randrange(128, len(RECORD)) for _ in range(200))]
    injected = "each header byte and 200 random payload bits, by SET"
    with book("flipped bit, stored", injected=injected, expected="checksum or what the header says") as row:
        seen: Counter[str] = Counter()
        for at in places:
            client.set(NAMES[LOST], flipped(RECORD, at, 1 << chance.randrange(8)))
            before = cache.stats().misses
            with under_fault(row):
                assert load_all(cache) == LOST
            (reason,) = (cache.stats().misses - before).keys() - {"gap"}
            assert reason == "checksum" if at >= 128 else reason in {"checksum", "magic", "version", "key_id", "length"}
            seen[reason] += 1
            assert client.exists(NAMES[LOST]) == (reason != "checksum"), "damaged is removed, foreign stays"
            assert cache.save(TOKENS, KV) == BLOCKS
        assert load_all(cache) == BLOCKS
        row.seen = dict(seen)


@pytest.mark.fault(number=9)
@pytest.mark.redis
def test_a_bit_flipped_on_the_wire(redis_server: RedisServer, book: Book) -> None:
    chance, deadline_s = random.Random(10), 5.0
    reply = len(b"$%d\r\n" % len(RECORD)) + len(RECORD) + 2
    framing = [n + reply * i for i in (0, LOST) for n in (*range(7), reply - 2, reply - 1)]
    places = [*framing, *(chance.randrange(BLOCKS * reply) for _ in range(100))]
    injected = f"{len(places)} bits of replies, by proxy"
    expected = "protocol, timeout or a bad record; never a wrong tensor"
    with (
        FaultProxy(redis_server.port) as proxy,
        cache_over(RedisStore(proxy.url, deadline_s=deadline_s)) as cache,
        book("flipped bit, on the wire", injected=injected, expected=expected) as row,
    ):
        for count, at in enumerate(places, 1):
            heal_breakers(cache)
            assert cache.save(TOKENS, KV) == BLOCKS
            assert load_all(cache) == BLOCKS
            proxy.flip(at, chance.randrange(8))
            with under_fault(row):
                within(10 * deadline_s, lambda: load_all(cache))
            assert proxy.fired["flip"] == count and cache.stats().misses.total() > 0
        seen = dict(cache.stats().misses - Counter(gap=10**9))
        assert sum(seen.values()) == len(places), "every flipped bit is noticed"
        assert {"checksum", "protocol"} <= seen.keys()
        row.seen = seen
        heal_breakers(cache)
        check_repaired(cache)


@pytest.mark.fault(number=10)
@pytest.mark.redis
def test_records_of_another_identity(cache: DistributedKVCache, client: redis.Redis, book: Book) -> None:
    key, block = KEYS[LOST], KV[:, :, :, LOST * B : (LOST + 1) * B]
    other_model = Namespace(small_spec(1).fingerprint, "fp32", b"", B).keys(TOKENS)[LOST]
    half_block = Namespace(SPEC.fingerprint, "fp32", b"", B // 2).keys(TOKENS)[LOST]
    foreign = {
        "other model": (encoded(block, Format(), other_model), "key"),
        "other block size, own key": (encoded(block[:, :, :, : B // 2], Format(), half_block), "key"),
        "other block size": (encoded(block[:, :, :, : B // 2], Format(), key), "dims"),
        "other layout": (encoded(block.transpose(3, 4).contiguous(), Format(), key), "dims"),
        "one rank of two": (encoded(block[:, :, :1], Format(), key), "dims"),
        "more layers": (encoded(torch.cat((block, block)), Format(), key), "dims"),
        "other precision": (encoded(block, Format("bf16"), key), "precision"),
        "int8": (encoded(block, Format("int8"), key), "precision"),
    }
    with book("record of another identity", injected=", ".join(foreign), expected="key, dims, precision") as row:
        for value, reason in foreign.values():
            check_bad_value(row, cache, lambda value=value: client.set(NAMES[LOST], value), reason)
        others = [
            DistributedKVCache(store=cache.store, **{"precision": "fp32", "model": SPEC, "block_tokens": B, **change})
            for change in ({"model": small_spec(1)}, {"precision": "bf16"}, {"block_tokens": B // 2})
        ]
        for other in others:  # nobody else is led to these blocks in the first place
            assert other.match(TOKENS) == 0
            assert other.load(TOKENS, 0, len(TOKENS), blank(SPEC, len(TOKENS))) == 0
            assert other.stats().misses["absent"] == 1
            check_sums(other)


@pytest.mark.fault(number=11)
@pytest.mark.redis
def test_another_version_of_the_format(cache: DistributedKVCache, client: redis.Redis, book: Book) -> None:
    with book("stale format version", injected="version 0 and 2, checksum right", expected="version") as row:
        for version in (0, 2, 255):
            other = tampered(RECORD, 4, bytes([version]))
            client.set(NAMES[LOST], other)
            assert load_all(cache) == LOST
            assert client.get(NAMES[LOST]) == other, "readers of that version may still use it"
            check_bad_value(row, cache, lambda value=other: client.set(NAMES[LOST], value), "version")
            assert client.get(NAMES[LOST]) == RECORD


@pytest.mark.fault(number=12)
@pytest.mark.redis
def test_a_value_under_another_key(cache: DistributedKVCache, client: redis.Redis, book: Book) -> None:
    with book("swapped values", injected="COPY and RENAME of another block, other tokens", expected="key") as row:
        for other in (0, 2, 3):
            check_bad_value(row, cache, lambda o=other: client.copy(NAMES[o], NAMES[LOST], replace=True), "key")
        check_bad_value(row, cache, lambda: client.rename(NAMES[3], NAMES[LOST]), "key")
        cache.save(OTHER_TOKENS, OTHER_KV)
        theirs = b"kv:" + Namespace(SPEC.fingerprint, "fp32", b"", B).keys(OTHER_TOKENS)[LOST]
        check_bad_value(row, cache, lambda: client.copy(theirs, NAMES[LOST], replace=True), "key")
        assert load_others(cache) == BLOCKS


@pytest.mark.fault(number=13)
@pytest.mark.redis
def test_a_forged_value_with_a_valid_checksum(redis_server: RedisServer, book: Book) -> None:
    pytest.importorskip("cryptography", reason="AES-GCM needs it: pip install 'kvlab[secure]'")
    client, masters = redis_server.client(), {1: bytes(range(32))}
    guarded = DistributedKVCache(
        precision="fp32",
        compress=False,
        store=RedisStore(redis_server.url, deadline_s=LONG_S),
        model=SPEC,
        block_tokens=B,
        encryption_keys=masters,
    )
    lie = torch.full_like(KV[:, :, :, :B], 7.0)
    forged = encoded(lie, Format(), KEYS[LOST])
    injected = "a stranger's record with a right checksum; changed bytes of an encrypted one"
    with (
        guarded,
        book("forged value", injected=injected, expected="AES: key_id, forged; xxh3: accepted") as row,
    ):
        guarded.save(TOKENS, KV)
        honest = client.get(NAMES[LOST])
        check_bad_value(row, guarded, lambda: client.set(NAMES[LOST], forged), "key_id")
        check_bad_value(row, guarded, lambda: client.set(NAMES[LOST], flipped(honest, 500)), "forged")
        check_bad_value(row, guarded, lambda: client.set(NAMES[LOST], honest[:128] + forged[128:]), "forged")
        check_bad_value(row, guarded, lambda: client.set(NAMES[LOST], tampered(honest, 9, b"\1")), "key_id")
        with cache_over(RedisStore(redis_server.url, deadline_s=LONG_S)) as open_to_all:
            client.flushdb()
            open_to_all.save(TOKENS, KV)
            client.set(NAMES[LOST], forged)
            out = blank(SPEC, B * BLOCKS)
            assert open_to_all.load(TOKENS, 0, B * BLOCKS, out) == B * BLOCKS  # documented: a checksum stops nobody
            assert torch.equal(out[:, :, :, LOST * B : (LOST + 1) * B], lie)
            check_sums(open_to_all)
        row.seen = {**row.seen, "accepted without encryption_keys": 1}


@pytest.mark.fault(number=14)
@pytest.mark.redis
def test_a_pickle_under_a_key(cache: DistributedKVCache, client: redis.Redis, tmp_path: Path, book: Book) -> None:
    sentinel = tmp_path / "executed"
    with book("pickle bomb", injected="SET of pickles of protocol 0 … 5", expected="magic, nothing is run") as row:
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            bomb = pickle.dumps([Bomb(sentinel), "x" * 200], protocol)
            pickle.loads(bomb)
            assert sentinel.exists(), "the bomb must be armed, or this test proves nothing"
            sentinel.unlink()
            check_bad_value(row, cache, lambda value=bomb: client.set(NAMES[LOST], value), "magic")
            assert not sentinel.exists()
