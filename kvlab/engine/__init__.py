"""The engine. `generate` runs one request, over a `PagePool` and a `TieredCache` if it gets them."""

from kvlab.engine.generate import Generation, generate
from kvlab.engine.pages import PagePool
from kvlab.engine.tiers import TieredCache

__all__ = ["Generation", "PagePool", "TieredCache", "generate"]
