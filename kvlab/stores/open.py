"""`open_store` creates a store from its URL."""

from __future__ import annotations

from typing import Any

from kvlab.errors import ConfigError
from kvlab.stores.base import Store
from kvlab.stores.memory import MemoryStore
from kvlab.stores.redis.store import RedisStore


def open_store(url: str, **settings: Any) -> Store:
    """Create the store that `url` names, with the settings of its class.

    memory:// creates a `MemoryStore`. Every other scheme creates a `RedisStore`, whose docstring lists the schemes.

    >>> open_store("memory://", ttl_s=60)
    MemoryStore(0 values)
    >>> open_store("fakeredis://")
    RedisStore('fakeredis://')

    Raises:
        ConfigError: the URL or a setting is invalid, or the class has no such setting.
    """
    kind: type[MemoryStore | RedisStore] = MemoryStore if url == "memory://" else RedisStore
    if kind is RedisStore:
        settings = {"url": url, **settings}
    try:
        return kind(**settings)
    except TypeError as error:  # an unknown setting
        raise ConfigError(f"{kind.__name__}: {str(error).partition('() ')[2] or error}") from None
