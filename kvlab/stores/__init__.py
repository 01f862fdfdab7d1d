"""Stores for KV blocks: the contract (`base`), in memory (`memory`), in files (`files`), and in Redis (`redis`).

docs/02_architecture_deep_dive.md, "The store", says what each module is for and what each reason means.
"""

from kvlab.stores.base import Health, Store, StoreStats, Value
from kvlab.stores.files.store import FileStore
from kvlab.stores.memory import MemoryStore
from kvlab.stores.open import open_store
from kvlab.stores.redis.store import RedisStore
from kvlab.stores.write_behind import WriteBehind

__all__ = [
    "FileStore",
    "Health",
    "MemoryStore",
    "RedisStore",
    "Store",
    "StoreStats",
    "Value",
    "WriteBehind",
    "open_store",
]
