"""kvlab: a distributed KV cache for LLM serving, small enough to read.

    >>> import torch
    >>> from kvlab import DistributedKVCache
    >>> cache = DistributedKVCache()                        # an in-process Redis; no server is needed
    >>> k = v = torch.ones(1, 2, 16, 64)                    # [N, H, T, D]
    >>> cache.cache_kv("def main():", 0, k, v)
    True
    >>> keys, values = cache.get_cached_kv("def main():", layer=0)
    >>> torch.equal(keys, k)
    True

The packages are errors, core, model, testbed, stores, cache, engine, serve, connectors, lab and course. Each imports
only packages that precede it in this list. A public name is imported when it is first used, so
`kvlab.stores` works without torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvlab.cache import CacheStats, DistributedKVCache, KVCache
    from kvlab.core.keys import KVSpec
    from kvlab.engine import Generation, PagePool, TieredCache, generate
    from kvlab.errors import ConfigError, InputError, KVLabError, ModelError
    from kvlab.model import Llama, Tokenizer, load_model
    from kvlab.model.fingerprint import fingerprint, spec_of
    from kvlab.stores import MemoryStore, RedisStore, Store, WriteBehind, open_store

try:
    __version__ = version("kvlab")
except PackageNotFoundError:  # the source tree is not installed as a package
    __version__ = "0+unknown"

_NAMES = {
    "kvlab.cache": ("CacheStats", "DistributedKVCache", "KVCache"),
    "kvlab.core.keys": ("KVSpec",),
    "kvlab.engine": ("Generation", "PagePool", "TieredCache", "generate"),
    "kvlab.errors": ("ConfigError", "InputError", "KVLabError", "ModelError"),
    "kvlab.model": ("Llama", "Tokenizer", "load_model"),
    "kvlab.model.fingerprint": ("fingerprint", "spec_of"),
    "kvlab.stores": ("MemoryStore", "RedisStore", "Store", "WriteBehind", "open_store"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "CacheStats",
    "ConfigError",
    "DistributedKVCache",
    "Generation",
    "InputError",
    "KVCache",
    "KVLabError",
    "KVSpec",
    "Llama",
    "MemoryStore",
    "ModelError",
    "PagePool",
    "RedisStore",
    "Store",
    "TieredCache",
    "Tokenizer",
    "WriteBehind",
    "fingerprint",
    "generate",
    "load_model",
    "open_store",
    "spec_of",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kvlab' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
