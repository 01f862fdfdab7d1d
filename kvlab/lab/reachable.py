"""A store that must work: what measures one fails at once where it does not, instead of counting misses."""

from __future__ import annotations

from typing import Any

from kvlab.errors import KVLabError
from kvlab.stores import Store, open_store


def open_reachable(url: str, **settings: Any) -> Store:
    """`open_store`, for a store whose health is good now.

    Raises:
        ConfigError: no store has such a URL.
        KVLabError: it does not answer, or cannot be used.
    """
    store = open_store(url, **settings)
    health = store.health()
    if not health.ok:
        store.close()
        raise KVLabError(f"the store cannot be used ({health.detail}); start or mend it, or leave --store out")
    return store
