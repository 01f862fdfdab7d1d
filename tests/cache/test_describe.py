"""Descriptions of namespaces: what is written is found, whatever else is in the places, and shows no salt."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvlab.cache import describe
from kvlab.cache.describe import DIRECTORY, SLOTS, THERE, WRITTEN, Description, listing, read_all, write
from kvlab.core import record
from kvlab.core.keys import Namespace, field
from kvlab.core.record import KIND_DESCRIPTION, KIND_ENGINE, OPAQUE, Format
from kvlab.core.seals import AesGcm, Seal, Xxh3
from kvlab.stores import MemoryStore, Store
from kvlab.testbed.server import RedisServer
from tests.harness.helpers import FakeClock, flipped

SEAL = Xxh3()
SALT = b"tenant"
ONE = Description("transformers 5.24.0", "a model", "aa" * 32, "fp16", 16, weights="bb" * 32, adapter="cc" * 32)
TWO = replace(ONE, block_tokens=32)
MEMBERS = {
    "format",
    "engine",
    "model",
    "fingerprint",
    "config",
    "weights",
    "tokenizer",
    "adapter",
    "dtype",
    "precision",
    "block_tokens",
    "layout",
    "tenant",
}


def key_of(place: int) -> bytes:
    """From the text of the module, not from its code."""
    parts = (b"kvlab/2/description", place.to_bytes(4, "little"))
    return hashlib.sha256(b"".join(field(part) for part in parts)).digest()


def put(store: Store, place: int, data: bytes, seal: Seal = SEAL, kind: int = KIND_DESCRIPTION) -> None:
    """A correct record with any content."""
    elements = np.frombuffer(data, np.uint8)
    value = record.encode_opaque(elements, key_of(place), Format(OPAQUE, seal=seal), kind)
    store.put_many([key_of(place)], [value])


def places(store: Store) -> list[int]:
    values = store.get_many([key_of(i) for i in range(SLOTS)])
    return [i for i, value in enumerate(values) if value is not None]


def changed(**members: Any) -> bytes:
    return json.dumps({**json.loads(ONE.to_bytes()), **members}).encode()


def test_what_is_written_is_found_under_its_seal_only() -> None:
    store = MemoryStore()
    assert write(store, SEAL, ONE) == write(store, SEAL, TWO) == WRITTEN
    assert set(read_all(store, SEAL)) == {ONE, TWO}
    assert read_all(store, AesGcm({1: bytes(32)}, DIRECTORY)) == []


def test_the_tenant_is_told_apart_but_not_told() -> None:
    ours = ONE.of_tenant(SALT)
    assert ours == ONE.of_tenant(SALT) != ONE.of_tenant(b"tenan") != ONE == ONE.of_tenant(b"")
    nonce = hashlib.sha256(
        b"".join(field(part) for part in (b"kvlab/2/tenant", b"aa" * 32, b"fp16", (16).to_bytes(4, "little"), b""))
    ).digest()
    assert ours.tenant == hashlib.scrypt(SALT, salt=nonce, n=1 << 15, r=8, p=1, maxmem=64 << 20, dklen=32).hex()
    assert replace(ONE, model="x", engine="y").of_tenant(SALT).tenant == ours.tenant
    assert replace(ONE, precision="fp32").of_tenant(SALT).tenant != ours.tenant
    fast = {hashlib.sha256(SALT).hexdigest(), Namespace(b"\xaa" * 32, "fp16", SALT, 16).root.hex()}
    assert not {value for value in vars(ours).values() if isinstance(value, str)} & fast


def test_the_bytes_are_those_of_the_text() -> None:
    store = MemoryStore()
    write(store, SEAL, ONE)
    members = json.loads(ONE.to_bytes())
    assert set(members) == MEMBERS and members["format"] == 2
    assert places(store) == [hashlib.sha256(ONE.to_bytes()).digest()[0] % SLOTS]


def test_writing_again_takes_no_second_place_and_refreshes_the_first() -> None:
    clock = FakeClock()
    store = MemoryStore(ttl_s=10, clock=clock)
    for n in range(5):
        assert write(store, SEAL, ONE) == (THERE if n else WRITTEN)
        clock.now += 8
    assert len(places(store)) == 1
    clock.now += 11
    assert read_all(store, SEAL) == []


def test_encrypted_descriptions() -> None:
    store, seal = MemoryStore(), AesGcm({1: bytes(32)}, DIRECTORY)
    write(store, seal, ONE)
    assert read_all(store, seal) == [ONE]
    assert read_all(store, AesGcm({1: b"x" * 32}, DIRECTORY)) == []
    assert b"a model" not in store.get_many([key_of(places(store)[0])])[0]  # type: ignore[operator]


@pytest.mark.parametrize("length", [10, 128, 129, 100_000])
@pytest.mark.parametrize("letter", ["x", "ß", "\U0001f642", '"', "\x00", "\ud800"])
def test_a_long_name_is_cut_and_fits(letter: str, length: int) -> None:
    store, long = MemoryStore(), replace(ONE, model=letter * length, engine=letter * length)
    assert len(long.to_bytes()) <= describe.MAX_BYTES
    assert write(store, SEAL, long)
    (found,) = read_all(store, SEAL)
    assert found == replace(long, model=letter * min(length, 128), engine=letter * min(length, 128))


def test_the_65th_description_replaces_one() -> None:
    store = MemoryStore()
    many = [replace(ONE, block_tokens=n + 1) for n in range(SLOTS)]
    assert all(write(store, SEAL, description) for description in many)
    assert set(read_all(store, SEAL)) == set(many)
    more = replace(ONE, block_tokens=1000)
    assert write(store, SEAL, more)
    found = set(read_all(store, SEAL))
    assert more in found and len(found) == SLOTS and len(found & set(many)) == SLOTS - 1


def test_a_writer_that_meets_another_one_is_complete_after_its_next_write() -> None:
    """Both find the same place free; the second one takes it from the first."""
    store, ours = MemoryStore(), ONE
    first = hashlib.sha256(ours.to_bytes()).digest()[0] % SLOTS
    rival = next(
        other
        for other in (replace(ONE, block_tokens=n) for n in range(20, 2000))
        if hashlib.sha256(other.to_bytes()).digest()[0] % SLOTS == first
    )
    write(store, SEAL, ours)
    put(store, first, rival.to_bytes())
    assert read_all(store, SEAL) == [rival]
    write(store, SEAL, ours)
    assert set(read_all(store, SEAL)) == {ours, rival}


@pytest.mark.parametrize("at", [0, 7, 60, 100, 128, 200])
def test_a_damaged_description_is_left_out_and_its_place_is_used_again(at: int) -> None:
    store = MemoryStore()
    write(store, SEAL, ONE)
    place = places(store)[0]
    value = store.get_many([key_of(place)])[0]
    assert isinstance(value, bytes)
    store.put_many([key_of(place)], [flipped(value, at)])
    assert read_all(store, SEAL) == []
    assert write(store, SEAL, ONE) and places(store) == [place]
    assert read_all(store, SEAL) == [ONE]


def test_a_record_of_another_version_is_counted_and_kept() -> None:
    store = MemoryStore()
    write(store, SEAL, TWO)
    (place,) = places(store)
    value = store.get_many([key_of(place)])[0]
    newer = value[:4] + b"\x02" + value[5:]  # type: ignore[index, operator]
    first = hashlib.sha256(ONE.to_bytes()).digest()[0] % SLOTS
    store.put_many([key_of(first)], [newer])
    store.delete_many([key_of(place)] if place != first else [])
    assert write(store, SEAL, ONE) == WRITTEN and len(places(store)) == 2
    found = listing(store, SEAL)
    assert (found.found, found.other_formats, found.unreadable) == ((ONE,), 1, 0)


FOREIGN: dict[str, bytes] = {
    "a newer format": changed(format=3),
    "no format": changed(format=None),
    "a text where a number is": changed(block_tokens="16"),
    "a truth where a number is": changed(block_tokens=True),
    "a number where a text is": changed(model=5),
    "no fingerprint": changed(fingerprint=None),
    "a list": b"[]",
    "a number": b"7",
    "not JSON": b"{",
    "not UTF-8": b'{"format": 2, "model": "\xff"}',
    "deep": b"[" * 4000,
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_others_wrote_is_left_out_and_kept(case: str) -> None:
    """A newer version of this package may have written it."""
    store = MemoryStore()
    put(store, hashlib.sha256(ONE.to_bytes()).digest()[0] % SLOTS, FOREIGN[case])
    assert write(store, SEAL, ONE)
    found = listing(store, SEAL)
    assert found.found == (ONE,) and len(places(store)) == 2
    assert (found.other_formats, found.unreadable) == ((1, 0) if case == "a newer format" else (0, 1))


def test_a_member_of_a_later_version_does_not_hide_a_description() -> None:
    store = MemoryStore()
    put(store, 5, changed(colour="blue"))
    assert read_all(store, SEAL) == [ONE]


def test_records_of_other_kinds_and_keys_are_no_descriptions() -> None:
    store = MemoryStore()
    put(store, 3, ONE.to_bytes(), kind=KIND_ENGINE)
    put(store, 4, ONE.to_bytes())
    store.put_many([key_of(5)], [store.get_many([key_of(4)])[0]])  # type: ignore[list-item]
    store.delete_many([key_of(4)])
    assert read_all(store, SEAL) == []


def test_who_has_other_master_keys_keeps_his_place() -> None:
    store, theirs = MemoryStore(), AesGcm({1: b"x" * 32}, DIRECTORY)
    assert write(store, theirs, ONE) == write(store, SEAL, ONE) == WRITTEN
    assert read_all(store, theirs) == read_all(store, SEAL) == [ONE] and len(places(store)) == 2
    assert listing(store, SEAL).unreadable == 1


def test_a_value_that_is_far_too_large_is_not_read() -> None:
    store = MemoryStore()
    store.put_many([key_of(0)], [bytes(10 << 20)])
    put(store, 1, b"x" * (describe.MAX_BYTES + 1))
    write(store, SEAL, ONE)
    assert read_all(store, SEAL) == [ONE]


def test_a_store_that_fails_is_no_error() -> None:
    store = MemoryStore()
    store.close()
    assert not write(store, SEAL, ONE) and read_all(store, SEAL) == []
    assert listing(store, SEAL).fault == "closed"


@pytest.mark.redis
def test_descriptions_in_a_real_redis(redis_server: RedisServer) -> None:
    from kvlab.stores import RedisStore

    with RedisStore(redis_server.url, ttl_s=60) as store:
        assert write(store, SEAL, ONE) and write(store, SEAL, TWO) and write(store, SEAL, ONE)
        assert set(read_all(store, SEAL)) == {ONE, TWO}
        assert redis_server.client().dbsize() == 2
