"""What guards a record: xxh3 against accidents, aes-gcm against people.

xxh3 notices damaged bytes. It stops nobody: whoever can write to the store can also compute
a checksum. aes-gcm needs a key that the store does not have. It hides the payload, and a
record that was made or changed without the key does not open. The header is authenticated
with it, so a record that was moved to another key, shape or tenant does not open either.

Keys. The operator gives master keys, 32 random bytes each, numbered by a key id. What
encrypts (AES-256) is HKDF-SHA256 of the master key (RFC 5869, no HKDF salt, 32 bytes), with
info = "kvlab/1/aes-gcm", the key id as u32, the length of the tenant's salt as u32, that salt:
other tenant or other id, other key. The tag covers the header's first 96 bytes as associated
data and the payload. Nonces are random, 96 bits.

The rotation rule: start a new key id before 2**32 records were written under one salt and
key id, because then a repeated nonce becomes too likely (NIST SP 800-38D, section 8.3). To
rotate, give every process the new key first, still writing with the old id; then let them
write with the new one; remove the old one after the longest TTL.
"""

from __future__ import annotations

import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sized
from typing import Any, Final

import xxhash

from kvlab.errors import ConfigError

SEAL_BYTES: Final = 32
MASTER_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16

Pieces = tuple[bytes | memoryview, ...]
"""A value in parts whose concatenation is what the store keeps."""


class Broken(Exception):
    """A seal that does not open, and why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Seal(ABC):
    """How records are closed and opened. Safe to use from several threads.

    Attributes:
        kind: the number in the header.
        key_id: which key new records are written with.
    """

    kind: int
    key_id: int

    @abstractmethod
    def close(self, head: bytes, payload: Pieces) -> tuple[bytes, Pieces]:
        """The 32-byte seal of header and payload, and the payload as it is stored."""

    @abstractmethod
    def open(self, head: bytes, seal: bytes, payload: memoryview, key_id: int) -> memoryview:
        """The payload as it was before `close`.

        Raises:
            Broken: "key_id", this reader has no such key; else what is wrong with the record.
        """


class Xxh3(Seal):
    """A checksum: 8 bytes of XXH3-64, then zeros. Finds accidents, accepts forgeries."""

    kind = 1
    key_id = 0

    def close(self, head: bytes, payload: Pieces) -> tuple[bytes, Pieces]:
        """See `Seal.close`."""
        h = xxhash.xxh3_64(head)
        h.update(bytes(SEAL_BYTES))  # the seal field itself counts as zeros
        for piece in payload:
            h.update(piece)
        return h.intdigest().to_bytes(8, "little") + bytes(24), payload

    def open(self, head: bytes, seal: bytes, payload: memoryview, key_id: int) -> memoryview:
        """See `Seal.open`."""
        if key_id != 0:
            raise Broken("key_id")
        if self.close(head, (payload,))[0] != seal:
            raise Broken("checksum")
        return payload


class AesGcm(Seal):
    """Authenticated encryption: nonce of 12 bytes, tag of 16, zeros. Needs the extra `kvlab[secure]`.

    Args:
        keys: master keys of 32 bytes by key id, 1 or above.
        salt: the tenant's; other salt, other keys.
        key_id: which of them new records are written with; by default the highest.

    Raises:
        ConfigError: no key, a key of another length, an impossible id, or the library is missing.
    """

    kind = 2

    def __init__(self, keys: Mapping[int, bytes], salt: bytes = b"", key_id: int | None = None) -> None:
        _check_keys(keys)
        self.key_id = max(keys) if key_id is None else key_id
        if type(self.key_id) is not int or self.key_id not in keys:
            got = "another number" if type(key_id) is int else type(key_id).__name__
            raise ConfigError(f"expected a key id to write with out of {sorted(keys)}, got {got}")
        try:
            self._keys = {i: _derive(key, salt, i) for i, key in keys.items()}
        except ImportError:
            raise ConfigError('aes-gcm needs the cryptography package: pip install "kvlab[secure]"') from None

    def __repr__(self) -> str:
        return f"AesGcm(key ids {sorted(self._keys)})"  # never the keys

    def close(self, head: bytes, payload: Pieces) -> tuple[bytes, Pieces]:
        """See `Seal.close`."""
        nonce = os.urandom(_NONCE_BYTES)
        encryptor = self._cipher(self.key_id, nonce, None).encryptor()
        encryptor.authenticate_additional_data(head)
        hidden = tuple(encryptor.update(piece) for piece in payload)
        encryptor.finalize()
        return _field(nonce, encryptor.tag), hidden

    def open(self, head: bytes, seal: bytes, payload: memoryview, key_id: int) -> memoryview:
        """See `Seal.open`."""
        from cryptography.exceptions import InvalidTag

        if key_id not in self._keys:
            raise Broken("key_id")
        nonce, tag = seal[:_NONCE_BYTES], seal[_NONCE_BYTES : _NONCE_BYTES + _TAG_BYTES]
        decryptor = self._cipher(key_id, nonce, tag).decryptor()
        decryptor.authenticate_additional_data(head)
        plain = decryptor.update(payload)
        try:
            decryptor.finalize()
        except InvalidTag:
            raise Broken("forged") from None
        if seal != _field(nonce, tag):
            raise Broken("forged")
        return memoryview(plain)

    def _cipher(self, key_id: int, nonce: bytes, tag: bytes | None) -> Any:
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import AES
        from cryptography.hazmat.primitives.ciphers.modes import GCM

        return Cipher(AES(self._keys[key_id]), GCM(nonce, tag))


def _check_keys(keys: Mapping[int, bytes]) -> None:
    """Refuse what is no set of master keys. No message may hold any part of one."""
    if not isinstance(keys, Mapping) or not keys:
        raise ConfigError(f"expected master keys as {{key id: {MASTER_KEY_BYTES} bytes}}, got {_kind(keys)}")
    for i, key in keys.items():
        if not isinstance(i, int) or isinstance(i, bool) or not 0 < i < 2**32:
            raise ConfigError(
                f"expected master keys by key ids of 1 … 2**32 - 1, got the id {i if type(i) is int else _kind(i)}"
            )
        if not isinstance(key, bytes) or len(key) != MASTER_KEY_BYTES:
            raise ConfigError(
                f"expected master keys of {MASTER_KEY_BYTES} random bytes, got {_kind(key)} for id {i}; "
                f"os.urandom({MASTER_KEY_BYTES}) makes one, bytes.fromhex reads one"
            )


def _kind(x: object) -> str:
    return f"{type(x).__name__} of {len(x)}" if isinstance(x, Sized) else type(x).__name__


def _derive(master: bytes, salt: bytes, key_id: int) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    # In info and after its length: HKDF's own salt is padded, so that b"" and zero bytes would give one key.
    info = b"kvlab/1/aes-gcm" + struct.pack("<II", key_id, len(salt)) + salt
    return HKDF(SHA256(), 32, None, info).derive(master)


def _field(*parts: bytes) -> bytes:
    return b"".join(parts).ljust(SEAL_BYTES, b"\0")
