"""The engine. `generate` runs one request."""

from kvlab.engine.generate import Generation, generate

__all__ = ["Generation", "generate"]
