"""`open_store` creates a store from its URL."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from kvlab.errors import ConfigError
from kvlab.stores.base import Store
from kvlab.stores.files.store import FileStore
from kvlab.stores.memory import MemoryStore
from kvlab.stores.redis.store import RedisStore
from kvlab.stores.url import FORMS, read, unusable


def open_store(url: str, **settings: Any) -> Store:
    """Create the store that `url` names, with the settings of its class.

    memory:// creates a `MemoryStore`, file:///path a `FileStore`. The settings max_bytes, policy and sync of the latter
    may be in the URL: file:///path?max_bytes=1000000000. Every other scheme creates a `RedisStore`.

    >>> open_store("memory://", ttl_s=60)
    MemoryStore(0 values)
    >>> open_store("fakeredis://")
    RedisStore('fakeredis://')

    Raises:
        ConfigError: the URL or a setting is invalid, or the class has no such setting.
    """
    kind: Callable[..., Store] = RedisStore
    if url == "memory://":
        kind = MemoryStore
    elif isinstance(url, str) and url.startswith("file:"):
        kind, settings = FileStore, {**_of_files(url), **settings}
    else:
        settings = {"url": url, **settings}
    try:
        return kind(**settings)
    except TypeError as error:  # an unknown setting
        raise ConfigError(f"{kind.__name__}: {str(error).partition('() ')[2] or error}") from None


def _of_files(url: str) -> dict[str, Any]:
    """Return the settings of a `FileStore` that are in its URL."""
    parsed = read(url)
    if parsed.login:
        raise unusable(url, "the path of a folder has no login; write @ as %40")
    if parsed.authority not in ("", "localhost") or not parsed.path.startswith("/"):
        raise unusable(url, f"expected {FORMS['file']}, with three slashes and the whole path")
    settings: dict[str, Any] = {"path": unquote(parsed.path), **parsed.settings}
    if "max_bytes" in settings:
        if not re.fullmatch("[1-9][0-9]{0,18}", settings["max_bytes"]):
            raise unusable(url, "expected max_bytes as a number of bytes")
        settings["max_bytes"] = int(settings["max_bytes"])
    return settings
