"""The engine. `generate` runs one request, a `Scheduler` many of them, a `WorkerGroup` many in several processes."""

from kvlab.engine.generate import Generation, generate
from kvlab.engine.pages import PagePool
from kvlab.engine.scheduler import Scheduler
from kvlab.engine.tiers import TieredCache
from kvlab.engine.worker import WorkerSettings
from kvlab.engine.workers import WorkerGroup

__all__ = ["Generation", "PagePool", "Scheduler", "TieredCache", "WorkerGroup", "WorkerSettings", "generate"]
