"""The one place where a URL becomes a store."""

from __future__ import annotations

from typing import Any

from kvlab.stores.base import Store
from kvlab.stores.redis.store import RedisStore


def open_store(url: str, **settings: Any) -> Store:
    """The store that `url` names.

    Raises:
        ConfigError: no store has such a URL, or a setting does not fit it.
    """
    return RedisStore(url, **settings)
