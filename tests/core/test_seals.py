"""Seals: what a key keeps out, what a checksum does not, and the keys derived a second time from RFC 5869."""

from __future__ import annotations

import hashlib
import hmac
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlab.core import record
from kvlab.core.codecs import CODECS
from kvlab.core.precisions import PRECISIONS
from kvlab.core.record import KIND_TEXT, Format
from kvlab.core.seals import AesGcm, BadSeal, Xxh3
from kvlab.errors import ConfigError
from tests.core.make_golden import GOLDEN, GOLDEN_KEY, golden_tensor
from tests.harness.helpers import KEY, encoded, flipped, reason_of, resealed, same_bits, tampered

MASTER = {i: bytes([i]) * 32 for i in (1, 2, 3)}
SHAPE = tuple(golden_tensor().shape)
SEALED = Format("fp32", "raw", AesGcm({1: MASTER[1]}, b"tenant"))
OPEN = Format("fp32", "raw")
RECORD = encoded(golden_tensor(), SEALED)


def sealed(*ids: int, salt: bytes = b"tenant", precision: str = "fp32", codec: str = "raw") -> Format:
    return Format(precision, codec, AesGcm({i: MASTER[i] for i in ids}, salt))


def decoded(value: bytes, fmt: Format) -> torch.Tensor:
    return record.decode(value, KEY, fmt, SHAPE)


def replaced(value: bytes, offset: int, new: bytes) -> bytes:
    """Changed by somebody without the key."""
    return value[:offset] + new + value[offset + len(new) :]


# --- the way there and back -----------------------------------------------------------------------
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sealed_record_holds_what_an_open_one_holds(precision: str, codec: str) -> None:
    fmt, plain = sealed(1, precision=precision, codec=codec), Format(precision, codec)
    assert same_bits(decoded(encoded(golden_tensor(), fmt), fmt), decoded(encoded(golden_tensor(), plain), plain))


def test_several_threads_may_use_one_format() -> None:
    fmt = sealed(1, codec="zstd")

    def there_and_back(i: int) -> bool:
        tensor = golden_tensor() + i
        return same_bits(decoded(encoded(tensor, fmt), fmt), tensor)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(there_and_back, range(400)))


@given(st.binary(max_size=90), st.lists(st.binary(max_size=40), max_size=4), st.binary(max_size=40))
def test_any_bytes_come_back_from_under_the_seal(head: bytes, pieces: list[bytes], salt: bytes) -> None:
    for seal in (Xxh3(), AesGcm(MASTER, salt)):
        field, hidden = seal.close(head, tuple(pieces))
        assert len(field) == 32 and [len(h) for h in hidden] == [len(p) for p in pieces]
        assert bytes(seal.open(head, field, memoryview(b"".join(hidden)), seal.key_id)) == b"".join(pieces)


def test_the_payload_of_a_sealed_record_does_not_show_the_tensor() -> None:
    plain = encoded(golden_tensor(), OPEN)[128:]
    hidden = RECORD[128:]
    assert len(hidden) == len(plain)
    assert not any(plain[i : i + 4] in hidden for i in range(0, len(plain), 4))
    zeros = encoded(torch.zeros(1, 2, 1, 64, 64), SEALED)[128:]
    assert np.bincount(np.frombuffer(zeros, np.uint8), minlength=256).max() < 256  # expected 128, deviation 11


def test_equal_input_gives_other_bytes_each_time() -> None:
    a, b = encoded(golden_tensor(), SEALED), encoded(golden_tensor(), SEALED)
    assert a[:96] == b[:96]
    assert a[96:108] != b[96:108] and a[108:124] != b[108:124] and a[128:] != b[128:]
    assert a[124:128] == b[124:128] == bytes(4)
    assert same_bits(decoded(a, SEALED), decoded(b, SEALED))


def test_no_nonce_repeats() -> None:
    nonces = {encoded(torch.zeros(1), SEALED)[96:108] for _ in range(1000)}
    nonces |= {encoded(torch.zeros(1), sealed(1))[96:108] for _ in range(100)}
    assert len(nonces) == 1100


# --- what a reader with a key refuses ---------------------------------------------------------------
def test_a_value_moved_to_another_key_is_a_miss() -> None:
    other = bytes(32)
    assert reason_of(RECORD, SEALED, SHAPE, key=other) == "key"
    assert reason_of(replaced(RECORD, 64, other), SEALED, SHAPE, key=other) == "forged"


@pytest.mark.parametrize(
    ("salt", "other"),
    [
        (b"tenant", b""),
        (b"tenant", b"tenant2"),
        (b"tenant", b"tenan"),
        (b"", b"\1"),
        (b"tenant", b"tenant\0"),
        (b"", bytes(1)),
        (bytes(65), hashlib.sha256(bytes(65)).digest()),
    ],
)
def test_a_value_of_another_tenant_is_a_miss(salt: bytes, other: bytes) -> None:
    value = encoded(golden_tensor(), sealed(1, salt=salt))
    assert reason_of(value, sealed(1, salt=other), SHAPE) == "forged"


def test_a_value_of_another_master_key_is_a_miss() -> None:
    seal = AesGcm({1: MASTER[1][:-1] + b"\0"}, b"tenant")
    assert reason_of(RECORD, Format("fp32", "raw", seal), SHAPE) == "forged"


def test_a_value_of_another_key_id_is_a_miss() -> None:
    assert reason_of(RECORD, sealed(2), SHAPE) == "key_id"
    two = sealed(1, 2)
    assert reason_of(replaced(RECORD, 12, struct.pack("<I", 2)), two, SHAPE) == "forged"
    assert reason_of(replaced(RECORD, 12, struct.pack("<I", 3)), two, SHAPE) == "key_id"
    assert reason_of(replaced(RECORD, 12, struct.pack("<I", 0)), two, SHAPE) == "key_id"


def test_one_master_key_under_two_ids_makes_two_keys() -> None:
    both = Format("fp32", "raw", AesGcm({1: MASTER[1], 2: MASTER[1]}, b"tenant"))
    assert reason_of(replaced(RECORD, 12, struct.pack("<I", 2)), both, SHAPE) == "forged"


def test_what_was_asked_for_is_not_what_was_sealed() -> None:
    assert reason_of(RECORD, SEALED, (2, 2, 1, 3, 4)) == "dims"
    assert reason_of(RECORD, SEALED, SHAPE, kind=KIND_TEXT) == "kind"
    assert reason_of(RECORD, sealed(1, precision="bf16"), SHAPE) == "precision"


HEADER_CHANGES = {
    "version": (4, b"\2", "version"),
    "kind": (5, bytes([KIND_TEXT]), "forged"),
    "codec": (6, b"\2", "forged"),
    "precision": (7, b"\2", "forged"),
    "dtype": (8, b"\2", "forged"),
    "seal": (9, b"\1", "key_id"),
    "number of dims": (10, b"\4", "forged"),
    "first zero": (11, b"\1", "forged"),
    "dims": (16, struct.pack("<5I", 2, 2, 1, 3, 4), "forged"),
    "length": (48, struct.pack("<Q", 191), "length"),
    "second zero": (56, b"\1", "forged"),
    "key": (64, bytes(32), "forged"),
    "nonce": (96, bytes(12), "forged"),
    "tag": (108, bytes(16), "forged"),
    "zeros of the seal": (124, b"\1", "forged"),
    "payload": (128, bytes(192), "forged"),
}


@pytest.mark.parametrize("name", HEADER_CHANGES)
def test_a_record_changed_to_fit_what_is_asked_for_is_a_miss(name: str) -> None:
    offset, new, reason = HEADER_CHANGES[name]
    assert reason_of(replaced(RECORD, offset, new), SEALED, SHAPE) == reason


def test_a_record_changed_to_fit_another_question_is_forged() -> None:
    assert reason_of(replaced(RECORD, 5, bytes([KIND_TEXT])), SEALED, SHAPE, kind=KIND_TEXT) == "forged"
    assert reason_of(replaced(RECORD, 16, struct.pack("<5I", 2, 2, 1, 3, 4)), SEALED, (2, 2, 1, 3, 4)) == "forged"
    assert reason_of(replaced(RECORD, 7, b"\4"), sealed(1, precision="int8"), SHAPE) == "forged"


def test_the_payloads_of_two_records_do_not_mix() -> None:
    other = encoded(golden_tensor() + 1, SEALED)
    assert reason_of(RECORD[:128] + other[128:], SEALED, SHAPE) == "forged"
    assert reason_of(RECORD[:108] + other[108:], SEALED, SHAPE) == "forged"


def test_a_cut_record_is_a_miss_even_with_its_length_made_to_fit() -> None:
    for size in (0, 1, 16, 191):
        cut = replaced(RECORD, 48, struct.pack("<Q", size))[: 128 + size]
        assert reason_of(cut, SEALED, SHAPE) == "forged"


def test_a_reader_with_a_key_takes_no_checksum_and_one_without_takes_no_cipher() -> None:
    plain = encoded(golden_tensor(), OPEN)
    assert reason_of(plain, SEALED, SHAPE) == "key_id"
    assert reason_of(RECORD, OPEN, SHAPE) == "key_id"
    assert reason_of(tampered(RECORD, 9, b"\1"), OPEN, SHAPE) == "key_id"  # for the key id that it still names
    assert reason_of(tampered(plain, 9, b"\2"), SEALED, SHAPE) == "key_id"
    assert reason_of(tampered(plain, 9, b"\2\5\0\1"), SEALED, SHAPE) == "forged"


# --- rotation ---------------------------------------------------------------------------------------
def test_keys_rotate_without_a_miss() -> None:
    old, during, after = sealed(1), sealed(2, 1), sealed(2)
    written = encoded(golden_tensor(), old)
    assert same_bits(decoded(written, during), golden_tensor())
    new = encoded(golden_tensor(), during)
    assert (written[12:16], new[12:16]) == (struct.pack("<I", 1), struct.pack("<I", 2))
    assert same_bits(decoded(new, after), golden_tensor())
    assert reason_of(new, old, SHAPE) == "key_id"
    assert reason_of(written, after, SHAPE) == "key_id"


def test_the_highest_id_writes_in_whatever_order_they_come() -> None:
    for ids in ((1, 2, 3), (3, 2, 1), (2, 3, 1)):
        assert encoded(golden_tensor(), sealed(*ids))[12:16] == struct.pack("<I", 3)
    largest = AesGcm({2**32 - 1: MASTER[1], 1: MASTER[2]})
    assert encoded(golden_tensor(), Format("fp32", "raw", largest))[12:16] == b"\xff" * 4


# --- a second implementation of the keys --------------------------------------------------------------
def hkdf2(master: bytes, salt: bytes, info: bytes, length: int = 32) -> bytes:
    """RFC 5869 with SHA-256: extract, then expand."""
    pseudorandom = hmac.digest(salt or bytes(32), master, "sha256")
    block, out = b"", b""
    for i in range(1, -(-length // 32) + 1):
        block = hmac.digest(pseudorandom, block + info + bytes([i]), "sha256")
        out += block
    return out[:length]


def test_the_second_derivation_gives_the_first_test_case_of_the_rfc() -> None:
    salt, info = bytes(range(13)), bytes(range(0xF0, 0xFA))
    assert hkdf2(b"\x0b" * 22, salt, info, 42).hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


def derived2(master: bytes, salt: bytes, key_id: int) -> bytes:
    return hkdf2(master, b"", b"kvlab/1/aes-gcm" + struct.pack("<II", key_id, len(salt)) + salt)


def opened2(value: bytes, master: bytes, salt: bytes) -> bytes:
    """The payload by another way through the library, with the key derived from the text of `kvlab.core.seals`."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    key = derived2(master, salt, int.from_bytes(value[12:16], "little"))
    return AESGCM(key).decrypt(value[96:108], value[128:] + value[108:124], value[:96])


@pytest.mark.parametrize("salt", [b"", b"tenant", "Mieter ü".encode(), bytes(100)], ids=repr)
def test_a_second_implementation_opens_the_records(salt: bytes) -> None:
    for key_id in (1, 2**32 - 1):
        value = encoded(golden_tensor(), Format("fp32", "raw", AesGcm({key_id: MASTER[3]}, salt)))
        assert opened2(value, MASTER[3], salt) == encoded(golden_tensor(), OPEN)[128:]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_second_implementation_opens_the_golden_records(precision: str) -> None:
    for codec in CODECS:
        value = (GOLDEN / f"{precision}-{codec}-aes.bin").read_bytes()
        plain = (GOLDEN / f"{precision}-{codec}.bin").read_bytes()[128:]
        assert opened2(value, bytes(range(32, 64)), b"tenant") == plain
        assert value[64:96] == GOLDEN_KEY


def test_a_record_of_the_second_implementation_is_accepted() -> None:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    payload, nonce = encoded(golden_tensor(), OPEN)[128:], bytes(range(12))
    key = derived2(MASTER[1], b"tenant", 1)
    hidden = AESGCM(key).encrypt(nonce, payload, RECORD[:96])
    value = RECORD[:96] + nonce + hidden[-16:] + bytes(4) + hidden[:-16]
    assert same_bits(decoded(value, SEALED), golden_tensor())


# --- configuration ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {0: MASTER[1]},
        {-1: MASTER[1]},
        {2**32: MASTER[1]},
        {1.0: MASTER[1]},
        {"1": MASTER[1]},
        {b"1": MASTER[1]},
        {None: MASTER[1]},
        {1: MASTER[1], "2": MASTER[2]},
        {1: MASTER[1], 0: MASTER[2]},
        {1: b""},
        {1: bytes(31)},
        {1: bytes(33)},
        {1: bytes(16)},
        {1: "k" * 32},
        {1: None},
        {1: MASTER[1], 2: bytes(31)},
    ],
    ids=lambda keys: repr({i: type(k).__name__ + str(len(k or b"")) for i, k in keys.items()}),
)
def test_keys_that_do_not_work_are_refused_without_being_shown(keys: dict[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="expected master keys") as refused:
        AesGcm(keys)
    for key in keys.values():
        assert not key or repr(key)[2:10] not in str(refused.value)


@pytest.mark.parametrize("how", ["list", "swapped", "hex as id", "hex alone", "bytes alone"])
def test_a_mistaken_call_does_not_print_the_key(how: str) -> None:
    """Before, the message listed what it took for key ids: the key."""
    master = bytes(range(65, 97))
    keys: Any = {
        "list": [master],
        "swapped": {master: 1},
        "hex as id": {master.hex(): 1},
        "hex alone": master.hex(),
        "bytes alone": master,
    }[how]
    with pytest.raises(ConfigError, match="expected master keys") as refused:
        AesGcm(keys)
    said = str(refused.value)
    assert master.hex()[:8] not in said and repr(master)[2:10] not in said and "65, 66" not in said


def test_new_records_take_the_key_id_that_was_named() -> None:
    keys = {1: MASTER[1], 2: MASTER[2]}
    old, new = AesGcm(keys, key_id=1), AesGcm(keys)
    for seal, key_id in ((old, 1), (new, 2)):
        value = encoded(golden_tensor(), Format("fp32", "raw", seal))
        assert value[12:16] == struct.pack("<I", key_id)
        for reader in (old, new):
            assert same_bits(decoded(value, Format("fp32", "raw", reader)), golden_tensor())
    with pytest.raises(ConfigError, match="key id for new records"):
        AesGcm(keys, key_id=3)


def test_nothing_that_is_printed_shows_a_key() -> None:
    master = bytes(range(65, 97))
    seal = AesGcm({7: master, 9: master[::-1]}, b"the salt")
    derived = [derived2(m, b"the salt", i) for i, m in ((7, master), (9, master[::-1]))]
    for text in (repr(seal), str(seal), f"{seal}", repr(Format("fp32", "raw", seal)), str([seal])):
        assert "7, 9" in text
        for secret in (master, master[::-1], *derived, b"the salt"):
            assert secret.hex()[:8] not in text and repr(secret)[2:10] not in text


# --- the checksum -------------------------------------------------------------------------------------
def test_a_forger_only_needs_a_new_checksum_where_there_is_no_key() -> None:
    """Not a wish: why an untrusted store needs encryption keys."""
    forged = tampered(encoded(golden_tensor(), OPEN), 128, struct.pack("<f", 1000.0))
    got = decoded(forged, OPEN)
    assert got.view(-1)[0] == 1000.0
    assert torch.equal(got.view(-1)[1:], golden_tensor().view(-1)[1:])


def test_a_forger_can_move_a_record_to_another_key_where_there_is_no_key() -> None:
    forged = tampered(encoded(golden_tensor(), OPEN), 64, bytes(32))
    assert same_bits(record.decode(forged, bytes(32), OPEN, SHAPE), golden_tensor())


@given(st.binary(min_size=1, max_size=60), st.integers(0, 2**16), st.integers(1, 255))
def test_the_checksum_covers_head_and_payload_and_its_own_zeros(data: bytes, at: int, mask: int) -> None:
    seal, head = Xxh3(), bytes(96)
    field, _ = seal.close(head, (data,))
    assert field[8:] == bytes(24)
    at %= 96 + 32 + len(data)
    changed = flipped(head + field + data, at, mask)
    with pytest.raises(BadSeal) as refused:
        seal.open(changed[:96], changed[96:128], memoryview(changed[128:]), 0)
    assert refused.value.reason == "checksum"


def test_how_a_payload_is_cut_into_pieces_does_not_matter_to_a_checksum() -> None:
    data = bytes(range(100))
    assert Xxh3().close(b"head", (data,))[0] == Xxh3().close(b"head", (data[:7], b"", memoryview(data)[7:]))[0]


def test_a_checksum_has_no_key_ids() -> None:
    assert reason_of(tampered(encoded(golden_tensor(), OPEN), 12, b"\1"), OPEN, SHAPE) == "key_id"
    assert resealed(encoded(golden_tensor(), OPEN)) == encoded(golden_tensor(), OPEN)
