"""Routers for the tests that cannot be imported without Ray."""

from __future__ import annotations

from kvlab.serve.router import KVLabRouter


class RaisingRouter(KVLabRouter):
    """Its choice raises, and so does everything that it notes."""

    def rank(self, replicas, request):
        raise ZeroDivisionError("a mistake in a router")

    def _keys(self, replica, request):
        raise ZeroDivisionError("another one")
