"""Descriptions of namespaces in the store: which models, block sizes and layouts wrote records under a salt.

A key says nothing about what it was computed from, so a miss cannot say that the same prompt is stored under
another fingerprint or block size. Each connector therefore leaves a description of its namespace. Whoever knows the
salt can list the descriptions; without the salt, their keys cannot be computed.

A description is a JSON object in UTF-8, the payload of a record of kind 4. Format 1 has the members

    format        1
    engine        name and version of what computes the KV, for example "transformers 5.24.0"
    model         the model's name, for readers
    fingerprint   hexadecimal
    namespace     hexadecimal: what the keys of the blocks are derived from
    precision     that of the stored numbers
    block_tokens  B
    adapter       hexadecimal digest of an adapter, or ""
    layout        the digest of the engine's memory layout in hexadecimal, or ""

and is at most MAX_BYTES long. There are SLOTS places for descriptions under a salt:

    key of place i = SHA256( field("kvlab/1/description") field(salt) field(i as u32) )

A writer takes the first place, from (first byte of SHA256(description)) mod SLOTS on, that has its description or
nothing usable, and else the first of these places. Two writers that meet lose one description until the next write.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from kvlab.core import record
from kvlab.core.keys import digest
from kvlab.core.record import KIND_DESCRIPTION, OPAQUE, BadRecord, Format
from kvlab.core.seals import Seal
from kvlab.stores import Store

FORMAT: Final = 1
SLOTS: Final = 64
MAX_BYTES: Final = 4096
LONGEST_WAIT_S: Final = 3600.0
MAX_NAME: Final = 128  # characters, each of which takes at most 12 bytes in JSON


@dataclass(frozen=True)
class Description:
    """What a namespace was made of. See the text of this module for the members."""

    engine: str
    model: str
    fingerprint: str
    namespace: str
    precision: str
    block_tokens: int
    adapter: str = ""
    layout: str = ""

    def to_bytes(self) -> bytes:
        """Return the JSON. Names are cut after MAX_NAME characters."""
        members = {"format": FORMAT, **asdict(self)}
        for name in ("model", "engine"):
            members[name] = members[name][:MAX_NAME]
        return json.dumps(members, sort_keys=True, separators=(",", ":")).encode()


def write(store: Store, seal: Seal, salt: bytes, description: Description) -> bool:
    """Leave a description in the store, or refresh the TTL of the one that is there. Return whether it is there."""
    data, keys = description.to_bytes(), _keys(salt)
    found = _read(store, seal, keys)
    first = hashlib.sha256(data).digest()[0] % SLOTS
    order = [(first + i) % SLOTS for i in range(SLOTS)]
    if any(found[i] == data for i in order):
        return True
    place = next((i for i in order if found[i] is None), first)
    elements = np.frombuffer(data, np.uint8)
    value = record.encode_opaque(elements, keys[place], Format(OPAQUE, seal=seal), KIND_DESCRIPTION)
    return store.put_many([keys[place]], [value]) == 1


def read_all(store: Store, seal: Seal, salt: bytes) -> list[Description]:
    """Return all descriptions under a salt, sorted. Damaged ones, and those of a newer format, are left out."""
    found = {data for data in _read(store, seal, _keys(salt)) if data is not None}
    parsed = [_parsed(data) for data in sorted(found)]
    return [description for description in parsed if description is not None]


def _keys(salt: bytes) -> list[bytes]:
    return [digest("kvlab/1/description", salt, struct.pack("<I", i)) for i in range(SLOTS)]


def _read(store: Store, seal: Seal, keys: Sequence[bytes]) -> list[bytes | None]:
    size = record.HEADER_BYTES + MAX_BYTES
    room = memoryview(bytearray(size * len(keys)))
    values = store.get_many(keys, [room[i * size : (i + 1) * size] for i in range(len(keys))])
    return [_payload(value, key, seal) for value, key in zip(values, keys, strict=True)]


def _payload(value: bytes | memoryview | None, key: bytes, seal: Seal) -> bytes | None:
    if value is None:
        return None
    try:
        elements = record.decode_opaque(value, key, Format(OPAQUE, seal=seal), None, KIND_DESCRIPTION, 4 * MAX_BYTES)
    except BadRecord:
        return None
    return elements.tobytes()


def _parsed(data: bytes) -> Description | None:
    try:
        members = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(members, Mapping) or members.get("format") != FORMAT:
        return None
    return _checked({name: members.get(name) for name in Description.__dataclass_fields__})


def _checked(members: dict[str, Any]) -> Description | None:
    number = members.pop("block_tokens")
    if type(number) is not int or not all(isinstance(value, str) for value in members.values()):
        return None
    return Description(block_tokens=number, **members)


class Describer:
    """Keeps a description in the store, in a thread of its own: it writes now, and again each quarter of the TTL."""

    def __init__(
        self, store: Store, seal: Seal, salt: bytes, description: Description, ttl_s: float | None = None
    ) -> None:
        self.store = store
        self._write = partial(write, store, seal, salt, description)
        self._every_s = min(LONGEST_WAIT_S, (ttl_s or math.inf) / 4)
        self._ended = threading.Event()
        threading.Thread(target=self._keep, name="kvlab-describe", daemon=True).start()

    def close(self) -> None:
        """End the thread and close the store."""
        self._ended.set()
        self.store.close()

    def _keep(self) -> None:
        self._write()
        while not self._ended.wait(self._every_s):
            self._write()
