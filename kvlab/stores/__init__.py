"""Where blocks outlive a process: the contract (`base`), in memory (`memory`), in one Redis or many (`redis`)."""

from kvlab.stores.base import Health, Store, StoreStats, Value
from kvlab.stores.behind import WriteBehind
from kvlab.stores.memory import MemoryStore
from kvlab.stores.redis import RedisStore

__all__ = ["Health", "MemoryStore", "RedisStore", "Store", "StoreStats", "Value", "WriteBehind"]
