"""The exercises of notebook 04b, security of records: a reader with two holes, and the order of a key rotation."""

from __future__ import annotations

import struct

import torch

from kvlab.core.record import Format, encode
from kvlab.course.exercises.engine import Exercise, Wrong
from kvlab.course.minikv import open_record


def accepts_too_much(value: bytes, key: bytes, secret: bytes) -> bool:
    """Whether `value` is the record of `key`, sealed with the secret."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    if value[9] == 1:  # a checksum: written before we had a secret
        return open_record(value, key) == "ok"
    nonce, tag, hidden = value[96:108], value[108:124], value[128:]
    try:
        AESGCM(secret).decrypt(nonce, hidden + tag, value[:96])
    except InvalidTag:
        return False
    return True


def accepts(value: bytes, key: bytes, secret: bytes) -> bool:
    """Whether `value` is the record of `key`, sealed with the secret."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce, tag, hidden = value[96:108], value[108:124], value[128:]
    try:
        AESGCM(secret).decrypt(nonce, hidden + tag, value[:96])
    except InvalidTag:
        return False
    return value[64:96] == key


def _checksums_still_accepted(value: bytes, key: bytes, secret: bytes) -> bool:
    return open_record(value, key) == "ok" if value[9] == 1 else accepts(value, key, secret)


def _key_never_compared(value: bytes, key: bytes, secret: bytes) -> bool:
    return accepts(value, value[64:96], secret)


def _everything_refused(value: bytes, key: bytes, secret: bytes) -> bool:
    return False


def _tag_never_checked(value: bytes, key: bytes, secret: bytes) -> bool:
    return value[9] == 2 and value[64:96] == key


_KEY, _SECRET = bytes(range(32)), bytes(range(32, 64))


def _records() -> list[tuple[bytes, bytes, bytes]]:
    """A sealed record, and five values that are none of this key; each with key and secret.

    The seal was made once, with the nonce 0 … 11, so that this module does not need the package cryptography.
    """
    block = torch.tensor([0.5, -1.0, 2.0, 0.25]).reshape(1, 2, 1, 1, 2)
    ids = (1, 1, 0, 1, 1, 2, 5, 0)
    header = struct.pack("<4s8BI8IQQ32s", b"KVL1", *ids, 1, *block.shape, 0, 0, 0, 16, 0, _KEY)
    tag, hidden = (
        bytes.fromhex(text) for text in ("0fd0b203f0f9ce4a4a689d45f9589d51", "5c525d984a356b53bcf9c9862673de02")
    )
    good = header + bytes(range(12)) + tag + bytes(4) + hidden
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    renamed = good[:64] + bytes(32) + good[96:]
    checksum = b"".join(encode(block, _KEY, Format()))
    values = ((good, _KEY), (flipped, _KEY), (checksum, _KEY), (good, bytes(32)), (renamed, bytes(32)))
    return [*((value, key, _SECRET) for value, key in values), (good, _KEY, bytes(32))]


ACCEPTS = Exercise(
    name="accepts",
    number="04b.1",
    difficulty=3,
    reference=accepts,
    given=accepts_too_much,
    cases=_records(),
    wrong=(
        Wrong(_checksums_still_accepted, "anybody can compute a checksum: a reader with a secret accepts none"),
        Wrong(_key_never_compared, "an intact record of another block opens too: compare bytes 64 to 95 with the key"),
        Wrong(_everything_refused, "this refuses the good record too: such a cache never has a hit"),
        Wrong(_tag_never_checked, "the header alone proves nothing: whoever has no secret must fail at the tag"),
    ),
    hint="the good record opens; no checksum is accepted; a record lies only under its own key",
    after="The package's reader does the same: with a secret it accepts no checksum, and it compares the key.",
)


def first_loss(steps: list[list[tuple[int, set[int]]]]) -> int:
    """The first step in which a process meets a record that it cannot open; -1 if there is none."""
    written = set()
    for i, processes in enumerate(steps):
        written |= {writes for writes, has in processes}
        for _, has in processes:
            if not written <= has:
                return i
    return -1


def _own_records_only(steps: list[list[tuple[int, set[int]]]]) -> int:
    losses = [i for i, step in enumerate(steps) if any(writes not in has for writes, has in step)]
    return losses[0] if losses else -1


def _old_records_forgotten(steps: list[list[tuple[int, set[int]]]]) -> int:
    for i, step in enumerate(steps):
        if any(not {writes for writes, _ in step} <= has for _, has in step):
            return i
    return -1


def _new_records_forgotten(steps: list[list[tuple[int, set[int]]]]) -> int:
    written: set[int] = set()
    for i, step in enumerate(steps):
        if any(not written <= has for _, has in step):
            return i
        written |= {writes for writes, _ in step}
    return -1


def _counted_from_one(steps: list[list[tuple[int, set[int]]]]) -> int:
    return first_loss(steps) + 1


_OLD, _BOTH, _NEW = (1, {1}), (1, {1, 2}), (2, {1, 2})

FIRST_LOSS = Exercise(
    name="first_loss",
    number="04b.2",
    difficulty=3,
    reference=first_loss,
    cases=(
        ([[_OLD, _OLD], [_BOTH, _OLD], [_BOTH, _BOTH], [_NEW, _BOTH], [_NEW, _NEW]],),
        ([[_OLD, _OLD], [_NEW, _OLD], [_NEW, _NEW]],),
        ([[_OLD, _OLD], [_BOTH, _BOTH], [_NEW, _NEW], [(2, {2}), (2, {2})]],),
        ([[_OLD], [(2, {2})]],),
    ),
    wrong=(
        Wrong(_own_records_only, "a process also reads what the others write"),
        Wrong(_old_records_forgotten, "records of earlier steps are still stored: collect what was ever written"),
        Wrong(_new_records_forgotten, "a step's own records count too: others read them at once"),
        Wrong(_counted_from_one, "count the steps from 0; -1 says that nothing is lost"),
    ),
    hint="keep a set of all key ids ever written; every process must have all of them",
    after="Production waits with the last step until the longest TTL is over: then no old record is left.",
)
