"""`open_store`: the one place where a URL becomes a store."""

from __future__ import annotations

from typing import Any

from kvlab.errors import ConfigError
from kvlab.stores.base import Store
from kvlab.stores.memory import MemoryStore
from kvlab.stores.redis.store import RedisStore


def open_store(url: str, **settings: Any) -> Store:
    """The store that `url` names, with the settings of its class.

    memory:// is a `MemoryStore`; every other scheme is one of `RedisStore`, which says what each means.

    >>> open_store("memory://", ttl_s=60)
    MemoryStore(0 values)
    >>> open_store("fakeredis://")
    RedisStore('fakeredis://')

    Raises:
        ConfigError: no store has such a URL, or a setting that the store does not have.
    """
    kind: type[MemoryStore | RedisStore] = MemoryStore if url == "memory://" else RedisStore
    if kind is RedisStore:
        settings = {"url": url, **settings}
    try:
        return kind(**settings)
    except TypeError as error:  # a setting that the class does not take
        raise ConfigError(f"{kind.__name__}: {str(error).partition('() ')[2] or error}") from None
