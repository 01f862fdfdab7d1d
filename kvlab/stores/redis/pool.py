"""The connections to one server, in a bounded pool. The thread that has waited longest gets the next.

In redis-py's pools a busy thread can overtake a waiting one for ever, and the pool takes a fifth of
the time of a small read.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from redis.connection import parse_url

from kvlab.stores.base import deliver, joined
from kvlab.stores.deadline import Deadline
from kvlab.stores.fork import reset_in_children
from kvlab.stores.latch import Latch
from kvlab.stores.redis.connection import CLASSES, SETTINGS, Buffers, Command, Reply, TooBig, pack


class NoConnection(Exception):
    """No connection, or no lease to request the map, became free in time. This says nothing about the server."""


class Pool:
    """At most `max_connections` connections to one server. Each is opened when it is first needed.

    Args:
        url: redis://, rediss:// or unix://, in the form that redis-py parses.
        read_only: the connections can also read from a cluster replica.

    Attributes:
        host, address: the host of the server, and its host and port for messages.
        secrets: texts that messages must not contain.

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
        self._class(**self._settings)  # opens no connection, but raises if a setting is invalid
        self.reset_after_fork()
        reset_in_children(self)

    def take(self, deadline: Deadline) -> Any:
        """Return an idle connection, a new one, or one that another thread gives back. `give_back` must follow.

        Raises:
            NoConnection: no connection became free in half of the remaining time. The other half is for the
                server; otherwise the wait would count as its fault.
        """
        with self._lock:
            if self._idle:
                return self._idle.pop()
            if self._not_made:
                connection = self._class(**self._settings)
                self._not_made -= 1
                return connection
            waiter = _Waiter()
            self._queue.append(waiter)
        waited = False
        try:
            waiter.wait(deadline.remaining / 2)
            waited = True
        finally:  # a signal handler may raise during the wait
            with self._lock:
                if waiter.connection is None:
                    self._queue.remove(waiter)
                elif not waited:
                    self._hand_on(waiter.connection)
        if waiter.connection is None:
            raise NoConnection(f"all {self._max} connections stayed in use")
        return waiter.connection

    def give_back(self, connection: Any) -> None:
        """Keep a connection for the next call. A connection that is not reusable is closed first."""
        if not connection.reusable or self._closed:
            connection.disconnect()
        with self._lock:
            self._hand_on(connection)

    def request(self, command: Command, deadline: Deadline) -> Any:
        """Return the reply to a command, of any type, over a new connection; raise any error. For maps only."""
        connection = self._class(**self._settings)
        connection.deadline = deadline
        try:
            connection.connect()
            connection.send_packed_command(pack([command]))
            return connection.read_response()
        finally:
            connection.disconnect()

    def close(self) -> None:
        """Close all connections; a connection in use is closed when it is given back."""
        self._closed = True
        with self._lock:
            for connection in self._idle:
                connection.disconnect()

    def reset_after_fork(self) -> None:
        """See `Forkable`. The connections and the waiting threads remain with the parent."""
        self._lock = threading.Lock()
        self._idle: list[Any] = []  # the connection used last is taken first
        self._not_made = self._max
        self._queue: deque[_Waiter] = deque()
        self._closed = False

    def _hand_on(self, connection: Any) -> None:
        if self._queue:
            waiter = self._queue.popleft()
            waiter.connection = connection
            waiter.set()
        else:
            self._idle.append(connection)


class _Waiter(Latch):
    """A thread in the queue for a connection."""

    connection: Any = None


class FakePool:
    """The interface of `Pool` over fakeredis, a Redis inside this process without network, deadlines or eviction.

    Its one "connection" is the pool itself, which all threads share. The child of a fork has a copy of the server.
    """

    secrets: tuple[str, ...] = ()
    ready = reusable = True

    def __init__(self, client: Any) -> None:
        self._client = client

    def take(self, deadline: Deadline) -> FakePool:
        """See `Pool.take`."""
        return self

    def give_back(self, connection: Any) -> None:
        """See `Pool.give_back`."""

    def exchange(
        self, commands: Sequence[Command], deadline: Deadline, out: Buffers | None = None, asking: bool = False
    ) -> list[Reply]:
        """See `Connection.exchange`. `asking` has no effect: fakeredis is not a cluster."""
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
                delivered = deliver(value, view)
                replies[i] = TooBig() if delivered is None else delivered
        return replies

    def close(self) -> None:
        """Close the client."""
        self._client.close()
