"""kvlab: a distributed KV cache for LLM serving, small enough to read.

    >>> import torch
    >>> from kvlab import DistributedKVCache
    >>> cache = DistributedKVCache()                        # an in-process Redis; no server needed
    >>> k = v = torch.ones(1, 2, 16, 64)                    # [N, H, T, D]
    >>> cache.cache_kv("def main():", 0, k, v)
    True
    >>> keys, values = cache.get_cached_kv("def main():", layer=0)
    >>> torch.equal(keys, k)
    True

The parts, each importing only what stands before it: errors, model, core, stores, cache,
engine, connectors, lab, course.
"""

from importlib.metadata import PackageNotFoundError, version

from kvlab.cache import CacheStats, DistributedKVCache, KVCache
from kvlab.engine import Generation, generate
from kvlab.errors import ConfigError, InputError, KVLabError, ModelError
from kvlab.model import Llama, Tokenizer, load

try:
    __version__ = version("kvlab")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "CacheStats",
    "ConfigError",
    "DistributedKVCache",
    "Generation",
    "InputError",
    "KVCache",
    "KVLabError",
    "Llama",
    "ModelError",
    "Tokenizer",
    "generate",
    "load",
]
