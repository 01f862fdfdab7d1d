"""The KV cache: its contract (`base`) and the cache over a shared store (`distributed`, `text`).

Why blocks are missing: `explain` and `elsewhere`, from keys, from what this process remembers (`recent`) and from the
descriptions of namespaces in the store (`describe`).
"""

from kvlab.cache.base import CacheStats, KVCache
from kvlab.cache.distributed import DistributedKVCache

__all__ = ["CacheStats", "DistributedKVCache", "KVCache"]
