"""Descriptions of namespaces in the store: which models, precisions, block sizes and tenants wrote blocks.

A key says nothing about what it was computed from, so a miss cannot say that the same prompt is stored under another
weights digest, precision or salt. Each cache and connector therefore leaves one description of its namespace, a
record of kind 4 whose payload is a JSON object in UTF-8. Format 2 has the members

    format        2
    engine        name and version of what computes the KV, for example "transformers 5.24.0"
    model         the model's name, for readers
    fingerprint   hexadecimal; the next five are what it was made of
    config, weights, tokenizer, adapter      digests in hexadecimal, "" for none or for not known
    dtype         the compute dtype
    precision     that of the stored numbers
    block_tokens  B
    layout        the digest of the engine's memory layout in hexadecimal, "" for blocks of kvlab's own
    tenant        a slow digest of the salt, see below, "" for no salt

and is at most MAX_BYTES long. There are SLOTS places in a store, the same for everybody:

    key of place i = SHA256( field("kvlab/2/description") field(i as u32) )

A writer takes the first place, from (first byte of SHA256(description)) mod SLOTS on, that has its description,
nothing, or something unusable, and else the first of these places. Two writers that meet lose one description until
the next write. So a listing reads SLOTS keys, however large the store is, and scans nothing.

**What is given away.** Who may read the store, and knows this text, learns which models are served, how, and under
how many salts. Not: tokens, the root of a namespace, or a salt. The root is left out because a guess of a salt could
be checked against it with one SHA-256.

    tenant = scrypt( salt, nonce, n 2**15, r 8, p 1 )
    nonce  = SHA256( field("kvlab/2/tenant") field(fingerprint) field(precision) field(B as u32) field(layout) )

Whoever can tell that a salt is not his can also try guesses. scrypt makes each try cost about a tenth of a second and
32 MiB, some 100,000 times what a try costs against the key of a block whose first tokens are known, such as those of
a system prompt. Against a tenant whose first tokens nobody knows, keys allow no try and `tenant` allows these slow
ones: make salts of at least 16 random bytes, which no number of tries finds. The nonce is no secret and the same for
one model in every store; it keeps the digests of one salt for two models apart.

Format 1 had places whose keys were SHA-256 of the salt, and the root inside; both allowed cheap guesses. It is not
read any more. With encryption keys, descriptions are sealed under the salt DIRECTORY: all tenants who share the
master keys can read them, the store cannot.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from kvlab.core import record
from kvlab.core.keys import KVSpec, Namespace, digest
from kvlab.core.record import KIND_DESCRIPTION, OPAQUE, BadRecord, Format
from kvlab.core.seals import Seal
from kvlab.stores import Store
from kvlab.stores.faults import Reason

FORMAT: Final = 2
SLOTS: Final = 64
MAX_BYTES: Final = 4096
MOST_S: Final = 600.0
"""Between two writes of a description: a store may be emptied, or evict it."""
MAX_NAME: Final = 128  # characters, each of which takes at most 12 bytes in JSON
DIRECTORY: Final = b"kvlab/2/descriptions"
THERE, WRITTEN, NOT_WRITTEN = "there", "written", ""
_SCRYPT: Final = {"n": 1 << 15, "r": 8, "p": 1, "maxmem": 64 << 20, "dklen": 32}
_OF_OTHERS: Final = ("key_id", "forged", "version")  # who has other keys, or a newer kvlab, can read these


@dataclass(frozen=True)
class Description:
    """What a namespace was made of. See the text of this module for the members."""

    engine: str
    model: str
    fingerprint: str
    precision: str
    block_tokens: int
    config: str = ""
    weights: str = ""
    tokenizer: str = ""
    adapter: str = ""
    dtype: str = ""
    layout: str = ""
    tenant: str = ""

    def to_bytes(self) -> bytes:
        """Return the JSON. Names are cut after MAX_NAME characters."""
        members = {"format": FORMAT, **asdict(self)}
        for name in ("model", "engine"):
            members[name] = members[name][:MAX_NAME]
        return json.dumps(members, sort_keys=True, separators=(",", ":")).encode()

    def of_tenant(self, salt: bytes) -> Description:
        """Return this description with the slow digest of a salt. Takes about 0.1 s, and no time without a salt."""
        if not salt:
            return replace(self, tenant="")
        texts = (self.fingerprint.encode(), self.precision.encode(), struct.pack("<I", self.block_tokens))
        nonce = digest("kvlab/2/tenant", *texts, self.layout.encode())
        return replace(self, tenant=hashlib.scrypt(salt, salt=nonce, **_SCRYPT).hex())


@dataclass(frozen=True)
class Listing:
    """What a store says of its namespaces.

    Attributes:
        found: the descriptions that this version can read, sorted, each once.
        other_formats: how many have another format than FORMAT, or are records of another version.
        unreadable: how many places hold something else: damaged, or sealed with other keys.
        fault: why the places could not be read, a `Reason`, or "".
    """

    found: tuple[Description, ...]
    other_formats: int = 0
    unreadable: int = 0
    fault: str = ""


def description_of(spec: KVSpec, namespace: Namespace) -> Description | None:
    """Return the description of a namespace, without its tenant; None if the spec does not know its origin."""
    origin = spec.origin
    if origin is None:
        return None
    return Description(
        engine=origin.engine,
        model=origin.model,
        fingerprint=spec.fingerprint.hex(),
        precision=namespace.precision,
        block_tokens=namespace.block_tokens,
        config=origin.config.hex(),
        weights=origin.weights.hex(),
        tokenizer=origin.tokenizer.hex(),
        adapter=origin.adapter.hex(),
        dtype=str(spec.dtype).removeprefix("torch."),
    )


def write(store: Store, seal: Seal, description: Description) -> str:
    """Leave a description in the store, or refresh the TTL of the one that is there. Takes two round trips.

    Returns:
        THERE, WRITTEN or, if the store did not take it, NOT_WRITTEN, which is false.
    """
    data = description.to_bytes()
    first = hashlib.sha256(data).digest()[0] % SLOTS
    keys = _keys()
    keys = keys[first:] + keys[:first]
    taken = _read(store, seal, keys[: store.probe(keys)])[0]
    if any(content == data for content, _ in taken):
        return THERE
    free = (i for i, (content, reason) in enumerate(taken) if content is None and reason not in _OF_OTHERS)
    place = next(free, len(taken)) % SLOTS
    value = record.encode_opaque(
        np.frombuffer(data, np.uint8), keys[place], Format(OPAQUE, seal=seal), KIND_DESCRIPTION
    )
    return WRITTEN if store.put_many([keys[place]], [value]) == 1 else NOT_WRITTEN


def listing(store: Store, seal: Seal) -> Listing:
    """Read all descriptions of a store in one round trip."""
    contents, fault = _read(store, seal, _keys())
    parsed = [_parsed(data) for data in sorted({data for data, _ in contents if data is not None})]
    good = tuple(one for one in parsed if isinstance(one, Description))
    others = sum(isinstance(one, int) for one in parsed) + sum(reason == "version" for _, reason in contents)
    bad = sum(one is None for one in parsed) + sum(reason not in ("", "version") for _, reason in contents)
    return Listing(good, others, bad, fault)


def read_all(store: Store, seal: Seal) -> list[Description]:
    """Return all descriptions, sorted. Damaged ones, and those of another format, are left out."""
    return list(listing(store, seal).found)


def _keys() -> list[bytes]:
    return [digest("kvlab/2/description", struct.pack("<I", i)) for i in range(SLOTS)]


def _read(store: Store, seal: Seal, keys: Sequence[bytes]) -> tuple[list[tuple[bytes | None, str]], str]:
    """Return content and problem of each place, (None, "") for an empty one, and the first fault of the store."""
    size = record.HEADER_BYTES + MAX_BYTES
    room = memoryview(bytearray(size * len(keys)))
    reasons: list[str] = []
    values = store.get_many(keys, [room[i * size : (i + 1) * size] for i in range(len(keys))], reasons)
    answers = zip(values, keys, reasons, strict=True)
    places = [_payload(value, key, seal) if value is not None else (None, _unread(why)) for value, key, why in answers]
    return places, next((why for why in reasons if why not in ("", Reason.ABSENT, Reason.TOO_BIG)), "")


def _unread(reason: str) -> str:
    return reason if reason == Reason.TOO_BIG else ""  # something is there, but no description


def _payload(value: bytes | memoryview, key: bytes, seal: Seal) -> tuple[bytes | None, str]:
    try:
        elements = record.decode_opaque(value, key, Format(OPAQUE, seal=seal), None, KIND_DESCRIPTION, 4 * MAX_BYTES)
    except BadRecord as error:
        return None, error.reason
    return elements.tobytes(), ""


def _parsed(data: bytes) -> Description | int | None:
    """Return a description, the number of another format, or None for anything else."""
    try:
        members = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(members, Mapping) or type(version := members.get("format")) is not int:
        return None
    if version != FORMAT:
        return version
    return _checked({name: members.get(name) for name in Description.__dataclass_fields__})


def _checked(members: dict[str, Any]) -> Description | None:
    number = members.pop("block_tokens")
    if type(number) is not int or not all(isinstance(value, str) for value in members.values()):
        return None
    return Description(block_tokens=number, **members)


def every_s(ttl_s: float | None) -> float:
    """Return the seconds between two writes of a description.

    Args:
        ttl_s: of the store; None if there is none, or it is not known.

    >>> every_s(60), every_s(86_400), every_s(None)
    (15.0, 600.0, 600.0)
    """
    return MOST_S if ttl_s is None else min(MOST_S, ttl_s / 4)


class Describer:
    """Keeps a description in the store, in a thread of its own: it writes now, and again each `every_s`."""

    def __init__(
        self, store: Store, seal: Seal, salt: bytes, description: Description, ttl_s: float | None = None
    ) -> None:
        self.store = store
        self._seal, self._description = seal, description
        self._every_s = every_s(ttl_s)
        self._ended = threading.Event()
        threading.Thread(target=self._keep, args=(salt,), name="kvlab-describe", daemon=True).start()

    def close(self) -> None:
        """End the thread and close the store."""
        self._ended.set()
        self.store.close()

    def _keep(self, salt: bytes) -> None:
        description = self._description.of_tenant(salt)
        write(self.store, self._seal, description)
        while not self._ended.wait(self._every_s):
            write(self.store, self._seal, description)
