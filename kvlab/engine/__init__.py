"""Requests through the model: so far one at a time (`generate`)."""

from kvlab.engine.generate import Generation, generate

__all__ = ["Generation", "generate"]
