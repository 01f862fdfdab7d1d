"""The KV cache: its contract (`base`) and the cache over a shared store (`distributed`, `text`)."""

from kvlab.cache.base import CacheStats, KVCache
from kvlab.cache.distributed import DistributedKVCache

__all__ = ["CacheStats", "DistributedKVCache", "KVCache"]
