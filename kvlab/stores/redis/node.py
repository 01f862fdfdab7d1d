"""One server: its connections, two breakers, and the largest value that it accepts.

A node executes the sub-batch of its server and returns replies and faults. A node counts nothing and knows
no other server: `store` joins the results, and `topology` knows which node has a key. A server that
hangs, is full or requires another password affects only its own keys.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import redis

from kvlab.stores.base import MAX_VALUE_BYTES, Value
from kvlab.stores.breaker import Breaker
from kvlab.stores.deadline import Deadline
from kvlab.stores.faults import Reason
from kvlab.stores.fork import reset_in_children
from kvlab.stores.latch import Latch
from kvlab.stores.redis.connection import Buffers, Command, Reply
from kvlab.stores.redis.pool import FakePool, Pool
from kvlab.stores.redis.reasons import OF_ONE_KEY, Refused, reason_of, server_works, takes_writes
from kvlab.stores.workers import Workers

WINDOW_BYTES: Final = 16 << 20  # replies to a larger window exceed the processor's cache: measured, docs/02
WINDOW_KEYS: Final = 1024
MAXMEMORY_DIVISOR: Final = 16  # the largest value is maxmemory divided by this
_LIMIT_AGE_S: Final = 60.0  # how long maxmemory is remembered


@dataclass(slots=True)
class Batch:
    """The work of one store call, for every server that has some of its keys.

    Attributes:
        call: the method of `Node` that executes a sub-batch.
        names: the keys as sent to servers, with their prefix.
        commands: for "send": small commands.
        out: for "get": one buffer per name.
        values, sizes: for "put": the values, and the size of each in bytes.
        ttl_ms: the TTL of each stored value ("put") or hit ("get"). None: it is not set.
        always: for `health`: send the commands even if the breaker is open. The breaker records the outcome.
    """

    call: Literal["get", "put", "send"]
    names: Sequence[bytes]
    commands: Sequence[Command] = ()
    out: Buffers | None = None
    values: Sequence[Value] = ()
    sizes: Sequence[int] = ()
    ttl_ms: int | None = None
    always: bool = False


@dataclass(slots=True)
class Answer:
    """The result of one sub-batch.

    Attributes:
        replies: one per index of the sub-batch, in the same order.
        faults: the reasons of each failed round trip.
    """

    replies: list[Reply]
    faults: list[set[Reason]] = field(default_factory=list)


class Job:
    """A sub-batch that runs in a thread of its node, so that waiting for one server does not delay another.

    A job is created before it is started: a signal handler may raise at any moment, and the creator must
    then abandon every job that is running.
    """

    def __init__(
        self, node: Node, batch: Batch, indices: Sequence[int], deadline: Deadline, asking: bool = False
    ) -> None:
        self.deadline = deadline
        self._node, self._batch, self._indices, self._asking = node, batch, indices, asking
        self._begun = threading.Lock()  # acquired once: by `run`, or by `abandon` to prevent the run
        self._done = Latch()
        self._outcome: Answer | BaseException = Answer([Refused(Reason.TIMEOUT)] * len(indices))

    def run(self) -> None:
        """Execute the sub-batch, unless the job has started already or was abandoned."""
        if not self._begun.acquire(blocking=False):
            return
        try:
            work = getattr(self._node, self._batch.call)
            self._outcome = work(self._batch, self._indices, self.deadline, self._asking)
        except BaseException as error:
            self._outcome = error
        self._done.set()

    def result(self) -> Answer:
        """Wait for the answer and return it, or raise the exception of the run."""
        self._done.wait()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def abandon(self) -> None:
        """Discard the answer. After this call, nothing writes into the caller's buffers."""
        self.deadline.abandon()
        if not self._begun.acquire(blocking=False):
            self._done.wait()
        self._done.set()


class Node:
    """One server.

    Args:
        name: host:port, a path, or another text that identifies the server.
        max_workers: how many jobs may run at the same time.

    Attributes:
        breaker: opens if the server does not answer.
        write_breaker: opens if the server answers, but refuses writes.
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
        self._value_bytes = 1 << 20  # the size of recent values: how many fit a window
        self._limit = MAX_VALUE_BYTES  # the largest value, until `_limit_expires_at`; constant for fakeredis
        self._limit_expires_at = math.inf if isinstance(pool, FakePool) else -math.inf
        self.reset_after_fork()
        reset_in_children(self)

    def __repr__(self) -> str:
        return f"Node({self.name}, {self.breaker.state})"

    def reset_after_fork(self) -> None:
        """See `Forkable`."""
        self._lock = threading.Lock()
        self._workers: Workers | None = None

    # --- sub-batches ----------------------------------------------------------------------------
    # `indices`: the positions of this server's names in the batch, ascending. `asking`: their slots are being
    # migrated to this server (ASK).
    def start(self, job: Job) -> None:
        """Run a job in a thread of this node, or in the caller's thread if none can be started."""
        try:
            with self._lock:
                if self._workers is None:
                    self._workers = Workers(self._max_workers, f"kvlab {self.name}")
            self._workers.submit(job.run)
        except RuntimeError:  # no thread can be started
            job.run()

    def get(self, batch: Batch, indices: Sequence[int], deadline: Deadline, asking: bool = False) -> Answer:
        """Fetch values, window by window. The TTL of a hit is restarted in the same round trip, unless it is longer."""
        names, out = batch.names, batch.out
        if len(indices) < len(names):
            names, out = [names[i] for i in indices], None if out is None else [out[i] for i in indices]
        sizes = (self._value_bytes if out is None else out[i].nbytes for i in range(len(names)))
        answer, fault = Answer([]), None
        for window in _windows(sizes, math.inf):
            start, stop = window[0], window[-1] + 1
            if fault is not None:  # the server would not answer these commands either
                answer.replies += [Refused(fault)] * len(window)
                continue
            commands: list[Command] = [(b"GET", name) for name in names[start:stop]]
            if batch.ttl_ms is not None:
                commands += [(b"PEXPIRE", name, b"%d" % batch.ttl_ms, b"GT") for name in names[start:stop]]
            replies = self.round_trip(commands, deadline, answer, out[start:stop] if out else None, asking)
            values = replies[: len(window)]
            refused = next((r for r in replies[len(window) :] if isinstance(r, Exception) and is_refusal(r)), None)
            if refused is not None:  # otherwise used blocks would expire; such a server or user needs ttl_s=None
                values = [Refused(reason_of(refused))] * len(window)
            answer.replies += values
            fault = _fault_of(values)
            if out is None:
                self._value_bytes = max([len(v) for v in values if isinstance(v, bytes)], default=self._value_bytes)
        return answer

    def put(self, batch: Batch, indices: Sequence[int], deadline: Deadline, asking: bool = False) -> Answer:
        """Store values, window by window. A value above the limit of the server is refused and not sent."""
        answer = Answer([Refused(Reason.TOO_BIG)] * len(indices))  # for the values that are in no window
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

    def send(self, batch: Batch, indices: Sequence[int], deadline: Deadline, asking: bool = False) -> Answer:
        """Send small commands in one round trip."""
        answer, commands = Answer([]), [batch.commands[i] for i in indices]
        answer.replies = self.round_trip(commands, deadline, answer, None, asking, batch.always)
        return answer

    def value_limit(self, deadline: Deadline, answer: Answer) -> int | Exception:
        """Return the largest size of a value, requested once per minute, or the fault of the request.

        If the server does not report `maxmemory` (INFO is refused or lacks it), the limit is `MAX_VALUE_BYTES`.
        """
        if self._clock() < self._limit_expires_at:
            return self._limit
        (reply,) = self.round_trip([(b"INFO", b"memory")], deadline, answer)
        if isinstance(reply, Exception) and not is_refusal(reply):
            return reply
        answer.faults.clear()  # a refusal is not a fault
        found = re.search(rb"^maxmemory:(\d{1,18})\b", reply, re.MULTILINE) if isinstance(reply, bytes) else None
        limit = int(found[1]) // MAXMEMORY_DIVISOR if found else 0
        self._limit = min(MAX_VALUE_BYTES, limit or MAX_VALUE_BYTES)
        self._limit_expires_at = self._clock() + _LIMIT_AGE_S
        return self._limit

    def close(self) -> None:
        """Close the connections."""
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
        out: Buffers | None = None,
        asking: bool = False,
        always: bool = False,
    ) -> list[Reply]:
        """Make one round trip if the breaker allows it, and record the outcome. Faults are added to `answer`."""
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
                verdict = server_works(faults) if connection.ready else False
                answer.faults.append({reason_of(fault) for fault in faults})
        except Exception as error:  # no connection became free, or none could be created
            verdict = server_works([error])
            answer.faults.append({reason_of(error)})
            replies = [error] * len(commands)
        finally:
            if connection is not None:
                self.pool.give_back(connection)
            self.breaker.record(verdict)
        return replies


def is_refusal(reply: Exception) -> bool:
    """Return whether the server refused the command: a missing permission, or a "response" error."""
    return isinstance(reply, redis.exceptions.NoPermissionError) or reason_of(reply) == Reason.RESPONSE


def _fault_of(replies: Sequence[Reply]) -> Reason | None:
    """Return the first reason that also affects further commands to the server, or None."""
    reasons = (reason_of(reply) for reply in replies if isinstance(reply, Exception))
    return next((reason for reason in reasons if reason not in OF_ONE_KEY), None)


def _windows(sizes: Iterable[int], limit: float) -> Iterator[list[int]]:
    """Yield positions of values up to `limit`, in windows of at most `WINDOW_BYTES` and `WINDOW_KEYS`."""
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
