"""One server as a store sees it: its connections, two breakers, and the largest value that it takes.

A store has one node for each server it talks to, so that a server that hangs, is full or wants
another password harms its own keys alone. Which node has a key is known to `topology`.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import redis
from redis.exceptions import AskError, ClusterDownError, TryAgainError

from kvlab.stores.base import ABSENT
from kvlab.stores.breaker import Breaker
from kvlab.stores.redis.connection import (
    MAX_VALUE_BYTES,
    Command,
    Deadline,
    FakeLink,
    Link,
    NoConnection,
    Reply,
    TooBig,
)

SHARE_OF_MEMORY: Final = 16  # no value may take more than this part of the server's maxmemory
_LIMIT_AGE_S: Final = 60.0  # how long the server's maxmemory is remembered


class Refused(Exception):
    """A command that was not sent; the text is the reason."""


# First match wins: in redis-py an authentication error is a ConnectionError too, MASTERDOWN a CLUSTERDOWN.
_REASONS: Final[tuple[tuple[type[BaseException], str], ...]] = (
    (TooBig, "too_big"),
    (NoConnection, "pool"),
    (redis.AuthenticationError, "auth"),
    (redis.exceptions.NoPermissionError, "auth"),
    (redis.TimeoutError, "timeout"),
    (TimeoutError, "timeout"),
    (redis.BusyLoadingError, "loading"),
    (redis.exceptions.MasterDownError, "loading"),
    (ClusterDownError, "down"),
    (AskError, "moved"),  # MOVED too
    (TryAgainError, "moved"),
    (redis.ReadOnlyError, "readonly"),
    (redis.exceptions.OutOfMemoryError, "oom"),
    (redis.exceptions.InvalidResponse, "protocol"),
    (redis.ConnectionError, "conn"),
    (OSError, "conn"),
)
_BY_WORD: Final = {"BUSY": "busy", "MISCONF": "misconf"}  # error replies that redis-py has no class for
_LINK_FAULTS: Final = {"timeout", "conn", "protocol", "loading", "busy", "error"}
NO_FAULT: Final = frozenset({ABSENT, "too_big", "response", "moved"})
"""Reasons that are no failure of a round trip."""
OF_ONE_KEY: Final = NO_FAULT | {"down"}
"""Reasons that say nothing about the other keys of the same server."""


def reason_of(reply: Reply) -> str:
    """Why a reply is not the one hoped for: the counter that it belongs to."""
    if isinstance(reply, Refused):
        return str(reply)
    if not isinstance(reply, BaseException):
        return "protocol"
    known = next((reason for kind, reason in _REASONS if isinstance(reply, kind)), None)
    if known is None and isinstance(reply, redis.ResponseError):
        known = _BY_WORD.get(str(reply).partition(" ")[0], "response")
    return known or "error"


def verdict_of(faults: Sequence[Exception]) -> bool | None:
    """Whether the link worked; None when that was not found out."""
    reasons = {reason_of(fault) for fault in faults}
    if "pool" in reasons:
        return None
    return not (reasons & _LINK_FAULTS or any(isinstance(fault, redis.AuthenticationError) for fault in faults))


class Node:
    """One server.

    Args:
        name: host:port, a path, or what else tells it from others.
        workers: how many calls may wait for it at the same moment, when they wait for others too.

    Attributes:
        breaker: opens when the server does not answer.
        write_breaker: opens when it answers, but takes no writes.
    """

    def __init__(
        self, name: str, link: Link | FakeLink, workers: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.link = link
        self.breaker = Breaker(clock=clock)
        self.write_breaker = Breaker(clock=clock)
        self._clock = clock
        self._max_workers = workers
        self._limit = MAX_VALUE_BYTES  # of a value, as long as `_limit_until`; fakeredis has no other
        self._limit_until = math.inf if isinstance(link, FakeLink) else -math.inf
        self.renew()

    def __repr__(self) -> str:
        return f"Node({self.name}, {self.breaker.state})"

    def renew(self) -> None:
        """Forget what the child of a fork must not share: connections, threads, held locks."""
        self._lock = threading.Lock()
        self._workers: ThreadPoolExecutor | None = None
        self.breaker.renew()
        self.write_breaker.renew()
        self.link.renew()

    def exchange(
        self,
        commands: Sequence[Command],
        deadline: Deadline,
        out: Sequence[memoryview] | None = None,
        asking: bool = False,
    ) -> list[Reply]:
        """One round trip, if the breaker lets it through; the breaker learns how it went. See `Link.exchange`."""
        if not self.breaker.allow():
            return [Refused("breaker")] * len(commands)
        verdict: bool | None = None
        try:
            replies = self.link.exchange(commands, deadline, out, asking)
            faults = [reply for reply in replies if isinstance(reply, Exception)]
            verdict = True if not faults else None if deadline.abandoned else verdict_of(faults)
        finally:
            self.breaker.record(verdict)
        return replies

    def value_limit(self, deadline: Deadline) -> int | Exception:
        """The most bytes that a value may have here, asked for once a minute; else why that is not known."""
        if self._clock() < self._limit_until:
            return self._limit
        (reply,) = self.exchange([(b"INFO", b"memory")], deadline)
        found = re.search(rb"^maxmemory:(\d+)", reply, re.MULTILINE) if isinstance(reply, bytes) else None
        if found is None:
            return reply if isinstance(reply, Exception) else Refused("protocol")
        share = int(found[1]) // SHARE_OF_MEMORY
        self._limit = min(MAX_VALUE_BYTES, share or MAX_VALUE_BYTES)
        self._limit_until = self._clock() + _LIMIT_AGE_S
        return self._limit

    def start(self, work: Callable[[], list[Reply]]) -> Future[list[Reply]]:
        """Do work for this server in a thread of its own, so that waiting for it delays no other server's keys."""
        with self._lock:
            if self._workers is None:
                self._workers = ThreadPoolExecutor(self._max_workers, f"kvlab {self.name}")
        done: Future[list[Reply]] = Future()
        todo = [work]

        def once() -> None:
            try:
                job = todo.pop()
            except IndexError:
                return
            try:
                done.set_result(job())
            except BaseException as error:
                done.set_exception(error)

        try:
            self._workers.submit(once)
        except RuntimeError:  # no thread to be had, or the interpreter is ending; what was queued may still be taken
            once()
        return done

    def close(self) -> None:
        """Let go of the connections."""
        self.link.close()
