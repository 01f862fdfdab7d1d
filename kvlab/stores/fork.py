"""Reset locks, threads and connections in the child of a fork.

A child inherits the memory of its parent, but not its threads. A lock that another thread held stays
locked for ever, and a socket is shared with the parent. Every object with locks, threads or sockets
therefore registers here. In the child, each object replaces its own before `os.fork` returns.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    """An object whose locks, threads or sockets must not be used in the child of a fork."""

    def reset_after_fork(self) -> None:
        """Create new locks, and drop threads and sockets. Must not acquire a lock: another thread may have held it."""


_forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()


def reset_in_children(thing: Forkable) -> None:
    """Call `thing.reset_after_fork` in every process that is forked from this one."""
    _forkables.add(thing)


def _reset_all() -> None:
    for thing in list(_forkables):
        thing.reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
