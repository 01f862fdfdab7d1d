"""The seal of a record: xxh3 detects accidental damage, and aes-gcm also detects forged records.

xxh3 is a checksum. It does not detect forged records: anyone who can write to the store can also
compute a checksum. aes-gcm encrypts the payload with a key that the store does not have. A record
that was made or changed without that key is rejected. The header is authenticated too, so a
record that was copied to another cache key, shape or tenant is also rejected.

Encryption keys. The operator provides master keys of 32 random bytes, each with a number, its key
id. The AES-256 key is the HKDF-SHA256 of the master key (RFC 5869, no HKDF salt, 32 bytes), with
info = "kvlab/1/aes-gcm", the key id as u32, the length of the tenant's salt as u32, that salt.
This key differs per tenant and per key id. The tag covers the first 96 bytes of the header, as associated
data, and the payload. A nonce has 96 random bits.

Rotation. Start a new key id before 2**32 records are written under one salt and key id: with
more records, a repeated nonce is too likely (NIST SP 800-38D, section 8.3). First, give every
process the new master key while all processes still write with the old key id. Then let them
write with the new key id. Remove the old master key after the longest TTL.
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
"""A value in pieces. The store keeps their concatenation."""


class BadSeal(Exception):
    """A seal does not match its record. Reasons: key_id, checksum, forged."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Seal(ABC):
    """Creates and verifies the seals of records. Safe to use from several threads.

    Attributes:
        kind: the seal kind in the header.
        key_id: the id of the master key for new records.
    """

    kind: int
    key_id: int

    @abstractmethod
    def close(self, header: bytes, payload: Pieces) -> tuple[bytes, Pieces]:
        """Return the 32-byte seal of header and payload, and the payload as it is stored."""

    @abstractmethod
    def open(self, header: bytes, seal: bytes, payload: memoryview, key_id: int) -> memoryview:
        """Verify the seal and return the payload as it was before `close`.

        Raises:
            BadSeal: "key_id" if this reader lacks the master key, else "checksum" or "forged".
        """


class Xxh3(Seal):
    """A checksum: 8 bytes of XXH3-64, then zeros. It detects accidental damage but not forged records."""

    kind = 1
    key_id = 0

    def close(self, header: bytes, payload: Pieces) -> tuple[bytes, Pieces]:
        """See `Seal.close`."""
        h = xxhash.xxh3_64(header)
        h.update(bytes(SEAL_BYTES))  # the seal field counts as zeros
        for piece in payload:
            h.update(piece)
        return h.intdigest().to_bytes(8, "little") + bytes(24), payload

    def open(self, header: bytes, seal: bytes, payload: memoryview, key_id: int) -> memoryview:
        """See `Seal.open`."""
        if key_id != 0:
            raise BadSeal("key_id")
        if self.close(header, (payload,))[0] != seal:
            raise BadSeal("checksum")
        return payload


class AesGcm(Seal):
    """Authenticated encryption: a nonce of 12 bytes, a tag of 16 bytes, zeros. Needs the extra `kvlab[secure]`.

    Args:
        keys: master keys of 32 bytes by key id. A key id is 1 or more.
        salt: the tenant's salt. The encryption keys depend on it.
        key_id: the id of the master key for new records; by default the highest one.

    Raises:
        ConfigError: there is no master key, a master key has another length, a key id is invalid,
            or the package cryptography is missing.
    """

    kind = 2

    def __init__(self, keys: Mapping[int, bytes], salt: bytes = b"", key_id: int | None = None) -> None:
        _check_keys(keys)
        self.key_id = max(keys) if key_id is None else key_id
        if type(self.key_id) is not int or self.key_id not in keys:
            got = "another number" if type(key_id) is int else type(key_id).__name__
            raise ConfigError(f"expected the key id for new records to be one of {sorted(keys)}, got {got}")
        try:
            self._keys = {i: _derive(key, salt, i) for i, key in keys.items()}
        except ImportError:
            raise ConfigError('aes-gcm needs the cryptography package: pip install "kvlab[secure]"') from None

    def __repr__(self) -> str:
        return f"AesGcm(key ids {sorted(self._keys)})"  # without the encryption keys

    def close(self, header: bytes, payload: Pieces) -> tuple[bytes, Pieces]:
        """See `Seal.close`."""
        nonce = os.urandom(_NONCE_BYTES)
        encryptor = self._cipher(self.key_id, nonce, None).encryptor()
        encryptor.authenticate_additional_data(header)
        hidden = tuple(encryptor.update(piece) for piece in payload)
        encryptor.finalize()
        return _padded(nonce, encryptor.tag), hidden

    def open(self, header: bytes, seal: bytes, payload: memoryview, key_id: int) -> memoryview:
        """See `Seal.open`."""
        from cryptography.exceptions import InvalidTag

        if key_id not in self._keys:
            raise BadSeal("key_id")
        nonce, tag = seal[:_NONCE_BYTES], seal[_NONCE_BYTES : _NONCE_BYTES + _TAG_BYTES]
        decryptor = self._cipher(key_id, nonce, tag).decryptor()
        decryptor.authenticate_additional_data(header)
        plain = decryptor.update(payload)
        try:
            decryptor.finalize()
        except InvalidTag:
            raise BadSeal("forged") from None
        if seal != _padded(nonce, tag):
            raise BadSeal("forged")
        return memoryview(plain)

    def _cipher(self, key_id: int, nonce: bytes, tag: bytes | None) -> Any:
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import AES
        from cryptography.hazmat.primitives.ciphers.modes import GCM

        return Cipher(AES(self._keys[key_id]), GCM(nonce, tag))


def read_master_keys(text: str) -> dict[int, bytes]:
    """Parse master keys as "1:<hex>,2:<hex>", by key id. No message contains a part of a key.

    Raises:
        ConfigError: the text has another form.
    """
    keys: dict[int, bytes] = {}
    for part in text.split(","):
        number, _, key = part.strip().partition(":")
        try:
            keys[int(number)] = bytes.fromhex(key)
        except ValueError:
            raise ConfigError(
                "expected KVLAB_KEYS as id:key,id:key with keys of 64 hexadecimal digits; "
                "python -c 'import os; print(os.urandom(32).hex())' makes one"
            ) from None
    return keys


def _check_keys(keys: Mapping[int, bytes]) -> None:
    """Reject invalid master keys. No message may contain a part of a master key."""
    if not isinstance(keys, Mapping) or not keys:
        raise ConfigError(f"expected master keys as {{key id: {MASTER_KEY_BYTES} bytes}}, got {_described(keys)}")
    for i, key in keys.items():
        if not isinstance(i, int) or isinstance(i, bool) or not 0 < i < 2**32:
            raise ConfigError(
                f"expected master keys with key ids in 1 … 2**32 - 1, got {i if type(i) is int else _described(i)}"
            )
        if not isinstance(key, bytes) or len(key) != MASTER_KEY_BYTES:
            raise ConfigError(
                f"expected master keys of {MASTER_KEY_BYTES} random bytes, got {_described(key)} for id {i}; "
                f"os.urandom({MASTER_KEY_BYTES}) creates one, bytes.fromhex decodes one"
            )


def _described(x: object) -> str:
    return f"{type(x).__name__} of {len(x)}" if isinstance(x, Sized) else type(x).__name__


def _derive(master: bytes, salt: bytes, key_id: int) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    # The salt is in info, after its length. HKDF pads its own salt, so b"" and zero bytes would give the same key.
    info = b"kvlab/1/aes-gcm" + struct.pack("<II", key_id, len(salt)) + salt
    return HKDF(SHA256(), 32, None, info).derive(master)


def _padded(*parts: bytes) -> bytes:
    return b"".join(parts).ljust(SEAL_BYTES, b"\0")
