"""The connections to one server: a bounded pool in which whoever waits longest goes next.

redis-py's pools let a busy thread overtake a waiting one for ever, and cost a fifth of the time of a
small read.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from redis.connection import parse_url

from kvlab.stores.base import joined, place
from kvlab.stores.deadline import Deadline
from kvlab.stores.fork import reset_in_children
from kvlab.stores.redis.connection import CLASSES, SETTINGS, Command, Reply, TooBig, pack


class NoConnection(Exception):
    """All connections stayed in use for half of what remained: nothing is known about the server."""


class Pool:
    """At most `max_connections` connections to one server, each opened when it is first needed.

    Args:
        url: redis://, rediss:// or unix://, as redis-py reads them.
        read_only: also for reads from a replica of a cluster.

    Attributes:
        host: of the server.
        address: its host and port, as messages name it.
        secrets: what messages must not show.

    Raises:
        ValueError, TypeError: redis-py does not know a setting of the URL.
    """

    def __init__(self, url: str, max_connections: int, read_only: bool = False) -> None:
        self._max = max_connections
        self._class = CLASSES[url.partition("://")[0]]
        self._settings: dict[str, Any] = {**parse_url(url), **SETTINGS, "read_only": read_only}  # type: ignore[no-untyped-call]
        self._settings.pop("connection_class", None)
        self.host = str(self._settings.get("host") or "localhost")
        self.address = f"{self.host}:{self._settings.get('port', 6379)}"
        self.secrets = tuple(str(self._settings[s]) for s in ("password", "ssl_password") if self._settings.get(s))
        self._class(**self._settings)  # connects nowhere; a wrong setting shows here
        self.reset_after_fork()
        reset_in_children(self)

    def take(self, deadline: Deadline) -> Any:
        """An idle connection, a new one, or the one that a thread gives back. `give_back` must follow.

        Raises:
            NoConnection: none came free in half of what remained. The other half is the server's, or it
                would be blamed for the waiting.
        """
        with self._lock:
            if self._idle:
                return self._idle.pop()
            if self._not_made:
                connection = self._class(**self._settings)
                self._not_made -= 1
                return connection
            place = _Place()
            self._queue.append(place)
        waited = False
        try:
            place.served.wait(deadline.remaining / 2)
            waited = True
        finally:  # a signal's handler may raise while this waits
            with self._lock:
                if place.connection is None:
                    self._queue.remove(place)
                elif not waited:
                    self._hand_on(place.connection)
        if place.connection is None:
            raise NoConnection(f"all {self._max} connections stayed in use")
        return place.connection

    def give_back(self, connection: Any) -> None:
        """Keep a connection for the next call, closed if its last exchange left it out of step."""
        if not connection.in_step or self._closed:
            connection.disconnect()
        with self._lock:
            self._hand_on(connection)

    def ask(self, command: Command, deadline: Deadline) -> Any:
        """A reply of any shape, over a connection of its own. For maps of servers, not for values.

        Raises:
            Exception: whatever a broken server makes redis-py raise, and its error replies.
        """
        connection = self._class(**self._settings)
        connection.deadline = deadline
        try:
            connection.connect()
            connection.send_packed_command(pack([command]))
            return connection.read_response()
        finally:
            connection.disconnect()

    def close(self) -> None:
        """Close all connections: those in use when they come back."""
        self._closed = True
        with self._lock:
            for connection in self._idle:
                connection.disconnect()

    def reset_after_fork(self) -> None:
        """See `Forkable`. Connections, and the threads that wait for them, stay the parent's."""
        self._lock = threading.Lock()
        self._idle: list[Any] = []  # the last one used is the first one taken
        self._not_made = self._max
        self._queue: deque[_Place] = deque()
        self._closed = False

    def _hand_on(self, connection: Any) -> None:
        if self._queue:
            place = self._queue.popleft()
            place.connection = connection
            place.served.set()
        else:
            self._idle.append(connection)


class _Place:
    """A thread's place in the queue for a connection."""

    def __init__(self) -> None:
        self.served = threading.Event()
        self.connection: Any = None


class FakePool:
    """The same over fakeredis: a Redis inside this process, without a wire, deadlines or eviction.

    There is one "connection", the pool itself, and every thread may use it. The child of a fork has a
    copy of the server.
    """

    secrets: tuple[str, ...] = ()
    ready = in_step = True

    def __init__(self, client: Any) -> None:
        self._client = client

    def take(self, deadline: Deadline) -> FakePool:
        """See `Pool.take`."""
        return self

    def give_back(self, connection: Any) -> None:
        """See `Pool.give_back`."""

    def exchange(
        self,
        commands: Sequence[Command],
        deadline: Deadline,
        out: Sequence[memoryview] | None = None,
        asking: bool = False,
    ) -> list[Reply]:
        """See `Connection.exchange`. `asking` is for clusters, which this is none of."""
        try:
            pipe = self._client.pipeline(transaction=False)
            for name, *arguments in commands:
                known = b"EXISTS" if name == b"TOUCH" else name  # fakeredis has no TOUCH, and evicts nothing
                pipe.execute_command(known, *map(joined, arguments))
            replies: list[Reply] = pipe.execute(raise_on_error=False)
        except Exception as error:
            return [error] * len(commands)
        for i, view in enumerate(out or ()):
            value = replies[i]
            if isinstance(value, bytes):
                placed = place(value, view)
                replies[i] = TooBig() if placed is None else placed
        return replies

    def close(self) -> None:
        """Let go of the server."""
        self._client.close()
