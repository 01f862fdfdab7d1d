"""The settings of the connector, from `kv_connector_extra_config` and, for secrets, from the environment."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvlab.cache.describe import DIRECTORY
from kvlab.core.keys import digest
from kvlab.core.record import OPAQUE, Format
from kvlab.core.seals import AesGcm, Seal, Xxh3, read_master_keys
from kvlab.errors import ConfigError
from kvlab.stores import Store, WriteBehind, open_store
from kvlab.stores.base import check_number, check_ttl

DAY_S = 86400.0
IN_PROCESS = ("memory://", "fakeredis://")


@dataclass(frozen=True)
class Settings:
    """How the connector stores blocks.

    Attributes:
        store: URL of a store that all processes see, see `kvlab.stores.open_store`. vLLM writes its config to its log,
            so a URL with a password belongs in the environment: KVLAB_STORE.
        ttl_seconds: lifetime of a block after its last use; None leaves it to the server.
        compress: lossless compression by zstd, on the engine's thread.
        shadow: the share of hits that are computed and compared with the store (`kvlab.connectors.shadow`).
        deadline_s: after so many seconds, and more for large values, a call of the store has failed.
        queue_bytes: the most bytes that wait to be written; more blocks are dropped.
        salt: KVLAB_SALT in the environment: the secret that separates tenants.
        keys: KVLAB_KEYS in the environment: master keys of the records, "1:<64 hexadecimal digits>,2:…".

    Raises:
        ConfigError: a setting is missing, unknown or invalid.
    """

    store: str = field(repr=False)
    ttl_seconds: float | None = DAY_S
    compress: bool = False
    shadow: float = 0.0
    deadline_s: float = 0.25
    queue_bytes: int = 256 << 20
    salt: bytes = field(default=b"", repr=False)
    keys: Mapping[int, bytes] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.store, str) or self.store.startswith(IN_PROCESS):
            raise ConfigError(
                "expected store as the URL of a store that scheduler and workers share, such as redis://127.0.0.1:6379 "
                "or file:///path/to/folder; an in-process store is seen by one of them only"
            )
        check_ttl(self.ttl_seconds)
        if self.shadow != 0:
            check_number("shadow", self.shadow, 0, 1)
        check_number("queue_bytes", self.queue_bytes, 0, 1 << 40, "bytes", whole=True)
        if not isinstance(self.compress, bool):
            raise ConfigError("expected compress as true (zstd) or false")
        self.open_store().close()  # checks the URL and the deadline; nothing is connected
        _ = self.seal

    @classmethod
    def of(cls, extra: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Settings:
        """Return the settings in `kv_connector_extra_config`, and the secrets in the environment."""
        environment = os.environ if environment is None else environment
        given = dict(extra)
        allowed = {"store", "ttl_seconds", "compress", "shadow", "deadline_s", "queue_bytes"}
        if unknown := sorted(given.keys() - allowed):
            hint = (
                "; the salt and the keys belong in KVLAB_SALT and KVLAB_KEYS" if {"salt", "keys"} & set(unknown) else ""
            )
            raise ConfigError(
                f"expected kv_connector_extra_config with {', '.join(sorted(allowed))}, got {', '.join(unknown)}{hint}"
            )
        store = given.pop("store", None) or environment.get("KVLAB_STORE")
        if not store:
            raise ConfigError(
                'expected the URL of a store, in kv_connector_extra_config={"store": "redis://127.0.0.1:6379"} '
                "or in the environment as KVLAB_STORE"
            )
        keys = environment.get("KVLAB_KEYS")
        return cls(
            store,
            **given,
            salt=os.fsencode(environment.get("KVLAB_SALT", "")),
            keys=read_master_keys(keys) if keys else None,
        )

    @property
    def seal(self) -> Seal:
        """What closes and opens records."""
        return Xxh3() if self.keys is None else AesGcm(self.keys, self.salt)

    @property
    def directory_seal(self) -> Seal:
        """What closes and opens descriptions: the same for all tenants who share the master keys."""
        return Xxh3() if self.keys is None else AesGcm(self.keys, DIRECTORY)

    @property
    def format(self) -> Format:
        """How blocks are written."""
        return Format(OPAQUE, "zstd" if self.compress else "raw", self.seal)

    @property
    def check(self) -> bytes:
        """A digest of what all processes of an engine must agree on: the salt, and how records are sealed."""
        keys = sorted((self.keys or {}).items())
        return digest("kvlab/1/engine-settings", self.salt, *(struct.pack("<I", i) + key for i, key in keys))

    def open_store(self) -> Store:
        """Create a store. No server is called before the first call."""
        return open_store(self.store, ttl_s=self.ttl_seconds, deadline_s=self.deadline_s)

    def open_queue(self, store: Store) -> WriteBehind:
        """Put a queue in front of a store, so that writes happen in the background."""
        return WriteBehind(store, max_bytes=self.queue_bytes)
