"""Opens a store for a measurement. A store that does not work raises an error instead of counting misses."""

from __future__ import annotations

from typing import Any

from kvlab.errors import KVLabError
from kvlab.stores import Store, open_store


def open_reachable(url: str, **settings: Any) -> Store:
    """Open a store with `open_store` and check its health.

    Raises:
        ConfigError: the URL is not a store URL.
        KVLabError: the store does not answer or cannot be used.
    """
    store = open_store(url, **settings)
    health = store.health()
    if not health.ok:
        store.close()
        raise KVLabError(
            f"the store cannot be used ({health.detail}); start or repair it, or use another one (--store, KVLAB_STORE)"
        )
    return store
