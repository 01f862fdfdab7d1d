"""One server, and all that concerns it: its connections, two breakers, the largest value, its health.

A node does a server's whole share of a batch and gives back replies and faults. It counts nothing, and
knows of no other server: what a batch comes to is put together by `store`, and `topology` knows which
node has a key. A server that hangs, is full or wants another password harms its own keys alone.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import redis

from kvlab.stores.base import MAX_VALUE_BYTES, Value
from kvlab.stores.breaker import Breaker
from kvlab.stores.deadline import Deadline
from kvlab.stores.faults import Reason
from kvlab.stores.fork import reset_in_children
from kvlab.stores.redis.connection import Command, Reply
from kvlab.stores.redis.pool import FakePool, Pool
from kvlab.stores.redis.reasons import OF_ONE_KEY, Refused, reason_of, takes_writes, works

WINDOW_BYTES: Final = 16 << 20  # more replies at once fall out of the server's cache: measured, docs/02
WINDOW_KEYS: Final = 1024
SHARE_OF_MEMORY: Final = 16  # no value may take more than this part of the server's maxmemory
_LIMIT_AGE_S: Final = 60.0  # how long the server's maxmemory is remembered


@dataclass(slots=True)
class Batch:
    """What one call of the store asks for, of whichever servers have the keys.

    Attributes:
        call: the method of `Node` that does a server's share.
        names: keys as the servers see them.
        commands: for "ask": small ones.
        out: for "get": one buffer a name.
        values, sizes: for "put": what is stored, and how many bytes each value has.
        ttl_ms: for "put", how long values live; for "get", how long hits live from now on. None: for ever.
        always: also while the breaker is open, which learns how it went: for `health`.
    """

    call: Literal["get", "put", "ask"]
    names: Sequence[bytes]
    commands: Sequence[Command] = ()
    out: Sequence[memoryview] | None = None
    values: Sequence[Value] = ()
    sizes: Sequence[int] = ()
    ttl_ms: int | None = None
    always: bool = False


@dataclass(slots=True)
class Answer:
    """One server's share of a batch, done.

    Attributes:
        replies: one for each index that was asked for, in that order.
        faults: of each round trip that had some, their reasons.
    """

    replies: list[Reply]
    faults: list[set[Reason]] = field(default_factory=list)


class Job:
    """A server's share of a batch in a thread of the server's, so that waiting for it delays no other server.

    Whoever makes it knows of it before it begins: a signal's handler may raise at any moment, and what has begun
    must then be abandoned.
    """

    def __init__(
        self, node: Node, batch: Batch, indices: Sequence[int], deadline: Deadline, asking: bool = False
    ) -> None:
        self.deadline = deadline
        self._node, self._batch, self._indices, self._asking = node, batch, indices, asking
        self._begun = threading.Lock()  # taken once, by whoever does the work or sees to it that nobody will
        self._done = threading.Event()
        self._outcome: Answer | BaseException = Answer([Refused(Reason.TIMEOUT)] * len(indices))

    def run(self) -> None:
        """Do the work, unless it has begun elsewhere or was abandoned."""
        if not self._begun.acquire(blocking=False):
            return
        try:
            work = getattr(self._node, self._batch.call)
            self._outcome = work(self._batch, self._indices, self.deadline, self._asking)
        except BaseException as error:
            self._outcome = error
        self._done.set()

    def result(self) -> Answer:
        """Wait for the answer. Raises what the work raised."""
        self._done.wait()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def abandon(self) -> None:
        """Nobody wants the answer: after this call nothing writes into the caller's buffers."""
        self.deadline.abandon()
        if not self._begun.acquire(blocking=False):
            self._done.wait()
        self._done.set()


class Node:
    """One server.

    Args:
        name: host:port, a path, or what else tells it from others.
        max_workers: how many calls may wait for it at the same moment, when they wait for others too.

    Attributes:
        breaker: opens when the server does not answer.
        write_breaker: opens when it answers, but takes no writes.
    """

    def __init__(
        self, name: str, pool: Pool | FakePool, max_workers: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.pool = pool
        self.breaker = Breaker(clock=clock)
        self.write_breaker = Breaker(clock=clock)
        self._clock = clock
        self._max_workers = max_workers
        self._value_bytes = 1 << 20  # what values were like lately: how many fit a window
        self._limit = MAX_VALUE_BYTES  # of a value, until `_limit_expires_at`; fakeredis has no other
        self._limit_expires_at = math.inf if isinstance(pool, FakePool) else -math.inf
        self.reset_after_fork()
        reset_in_children(self)

    def __repr__(self) -> str:
        return f"Node({self.name}, {self.breaker.state})"

    def reset_after_fork(self) -> None:
        """See `Forkable`."""
        self._lock = threading.Lock()
        self._workers: ThreadPoolExecutor | None = None

    # --- a share of a batch ---------------------------------------------------------------------
    # `indices`, ascending, are those of the names that this server has. `asking`: their slots are on the
    # way to it (ASK).
    def start(self, job: Job) -> None:
        """Do a job in a thread of this server's; in the caller's own where none can be had."""
        try:
            with self._lock:
                if self._workers is None:
                    self._workers = ThreadPoolExecutor(self._max_workers, f"kvlab {self.name}")
            self._workers.submit(job.run)
        except RuntimeError:  # no thread to be had, or the interpreter is ending
            job.run()

    def get(self, batch: Batch, indices: Sequence[int], deadline: Deadline, asking: bool = False) -> Answer:
        """Values, window by window; hits live as long again, in the same round trip."""
        names, out = batch.names, batch.out
        if len(indices) < len(names):
            names, out = [names[i] for i in indices], None if out is None else [out[i] for i in indices]
        sizes = (self._value_bytes if out is None else out[i].nbytes for i in range(len(names)))
        answer, fault = Answer([]), None
        for window in _windows(sizes, math.inf):
            start, stop = window[0], window[-1] + 1
            if fault is not None:  # nor would the server answer now
                answer.replies += [Refused(fault)] * len(window)
                continue
            commands: list[Command] = [(b"GET", name) for name in names[start:stop]]
            if batch.ttl_ms is not None:
                commands += [(b"PEXPIRE", name, b"%d" % batch.ttl_ms) for name in names[start:stop]]
            replies = self.round_trip(commands, deadline, answer, out[start:stop] if out else None, asking)
            values = replies[: len(window)]
            refused = next((r for r in replies[len(window) :] if isinstance(r, Exception) and says_no(r)), None)
            if refused is not None:  # chains would die of age, unnoticed: such a server or user needs ttl_s=None
                values = [Refused(reason_of(refused))] * len(window)
            answer.replies += values
            fault = _fault_of(values)
            if out is None:
                self._value_bytes = max([len(v) for v in values if isinstance(v, bytes)], default=self._value_bytes)
        return answer

    def put(self, batch: Batch, indices: Sequence[int], deadline: Deadline, asking: bool = False) -> Answer:
        """Store values, window by window. One too large for the server is refused before a byte of it is sent."""
        answer = Answer([Refused(Reason.TOO_BIG)] * len(indices))  # of those that no window takes
        limit = self.value_limit(deadline, answer)
        if not isinstance(limit, int):
            answer.replies = [limit] * len(indices)
            return answer
        expiry = () if batch.ttl_ms is None else (b"PX", b"%d" % batch.ttl_ms)
        for window in _windows([batch.sizes[i] for i in indices], limit):
            chosen = [indices[at] for at in window]
            deadline.extend(sum([batch.sizes[i] for i in chosen]))
            commands: list[Command] = [(b"SET", batch.names[i], batch.values[i], *expiry) for i in chosen]
            for at, reply in zip(window, self._set(commands, deadline, answer, asking), strict=True):
                answer.replies[at] = reply
        return answer

    def ask(self, batch: Batch, indices: Sequence[int], deadline: Deadline, asking: bool = False) -> Answer:
        """Small commands, in one round trip."""
        answer, commands = Answer([]), [batch.commands[i] for i in indices]
        answer.replies = self.round_trip(commands, deadline, answer, None, asking, batch.always)
        return answer

    def value_limit(self, deadline: Deadline, answer: Answer) -> int | Exception:
        """The most bytes that a value may have here, asked for once a minute; else why the server cannot say.

        A server may keep its memory to itself (no `maxmemory` in INFO, no INFO at all): then every value up
        to `MAX_VALUE_BYTES` is tried.
        """
        if self._clock() < self._limit_expires_at:
            return self._limit
        (reply,) = self.round_trip([(b"INFO", b"memory")], deadline, answer)
        if isinstance(reply, Exception) and not says_no(reply):
            return reply
        answer.faults.clear()  # it was asked, and it said no: that is no fault
        found = re.search(rb"^maxmemory:(\d{1,18})\b", reply, re.MULTILINE) if isinstance(reply, bytes) else None
        share = int(found[1]) // SHARE_OF_MEMORY if found else 0
        self._limit = min(MAX_VALUE_BYTES, share or MAX_VALUE_BYTES)
        self._limit_expires_at = self._clock() + _LIMIT_AGE_S
        return self._limit

    def close(self) -> None:
        """Let go of the connections."""
        self.pool.close()

    # --- one round trip -------------------------------------------------------------------------
    def _set(self, commands: Sequence[Command], deadline: Deadline, answer: Answer, asking: bool) -> list[Reply]:
        if not self.write_breaker.allow():
            return [Refused(Reason.BREAKER)] * len(commands)
        verdict: bool | None = None
        try:
            replies = self.round_trip(commands, deadline, answer, None, asking)
            verdict = takes_writes(replies)
        finally:
            self.write_breaker.record(verdict)
        return replies

    def round_trip(
        self,
        commands: Sequence[Command],
        deadline: Deadline,
        answer: Answer,
        out: Sequence[memoryview] | None = None,
        asking: bool = False,
        always: bool = False,
    ) -> list[Reply]:
        """One round trip, if the breaker lets it through; the breaker learns how it went. Faults go to `answer`."""
        if not (always or self.breaker.allow()):
            answer.faults.append({Reason.BREAKER})
            return [Refused(Reason.BREAKER)] * len(commands)
        verdict: bool | None = None
        connection: Any = None
        try:
            connection = self.pool.take(deadline)
            replies: list[Reply] = connection.exchange(commands, deadline, out, asking)
            faults = [reply for reply in replies if isinstance(reply, Exception)]
            if not faults:
                verdict = True
            elif not deadline.abandoned:
                verdict = works(faults) if connection.ready else False
                answer.faults.append({reason_of(fault) for fault in faults})
        except Exception as error:  # no connection came free, or could be made
            verdict = works([error])
            answer.faults.append({reason_of(error)})
            replies = [error] * len(commands)
        finally:
            if connection is not None:
                self.pool.give_back(connection)
            self.breaker.record(verdict)
        return replies


def says_no(reply: Exception) -> bool:
    """Whether the server answered, and its answer is that it does not do this command for this user."""
    return isinstance(reply, redis.exceptions.NoPermissionError) or reason_of(reply) == Reason.RESPONSE


def _fault_of(replies: Sequence[Reply]) -> Reason | None:
    """What keeps a server from answering further commands, if anything does."""
    for reply in replies:
        if isinstance(reply, Exception) and (reason := reason_of(reply)) not in OF_ONE_KEY:
            return reason
    return None


def _windows(sizes: Iterable[int], limit: float) -> Iterator[list[int]]:
    """Positions of the values that fit `limit`, at most `WINDOW_BYTES` and `WINDOW_KEYS` together."""
    window: list[int] = []
    total = 0
    for at, size in enumerate(sizes):
        if size > limit:
            continue
        if window and (len(window) == WINDOW_KEYS or total + size > WINDOW_BYTES):
            yield window
            window, total = [], 0
        window.append(at)
        total += size
    if window:
        yield window
