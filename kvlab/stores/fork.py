"""The child of a fork: the one place where locks, threads and connections of the parent are replaced.

A child inherits memory, but no threads: a lock that another thread held stays locked for ever, and a
socket is shared with the parent. Whatever has locks, threads or sockets registers itself here, and
makes them anew in the child before anything else runs there. Each object resets only what it owns.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    """What has locks, threads or sockets that the child of a fork must not share."""

    def reset_after_fork(self) -> None:
        """Make new locks, and forget threads and sockets. Takes no lock: another thread may have held it."""


_forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()


def reset_in_children(thing: Forkable) -> None:
    """Have `thing.reset_after_fork` called in every process that is forked from this one."""
    _forkables.add(thing)


def _reset_all() -> None:
    for thing in list(_forkables):
        thing.reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
