"""Servers that answer as a test tells them: a whole cluster is one object whose map and faults the test changes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

from redis.crc import key_slot

from kvlab.stores import RedisStore
from kvlab.stores.deadline import Deadline
from kvlab.stores.redis.connection import Reply
from kvlab.stores.redis.discovery import REFRESHER, Discovered
from kvlab.stores.redis.node import Batch
from kvlab.stores.redis.store import KEY_PREFIX
from tests.harness.scripted import ScriptedServer

LONG_S = 30.0  # no machine is so busy
SHORT_S = 0.4  # for calls that are to run out of time
HANG_S = 10 * SHORT_S  # what took so long has hung
SILENT = b""
CLOSED = None
Said = Any  # bytes, None, or ... for what is usual
THIRDS = [(0, 5460), (5461, 10922), (10923, 16383)]
HOST = b"127.0.0.1"


def resp(value: Any) -> bytes:
    """A reply as a server sends it; text is an error."""
    if value is None:
        return b"$-1\r\n"
    if isinstance(value, str):
        return b"-%s\r\n" % value.encode()
    if isinstance(value, int):
        return b":%d\r\n" % value
    if isinstance(value, bytes):
        return b"$%d\r\n%b\r\n" % (len(value), value)
    return b"*%d\r\n" % len(value) + b"".join(map(resp, value))


class Prompt(ScriptedServer):
    """Sends each reply at once. Else the second of two waits for the client's system to confirm the first."""

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super()._serve(connection)


class Many:
    """Scripted servers with one memory: what one is given all have, so only who was asked makes a difference.

    Attributes:
        twist: called as twist(server, command) before a server answers: bytes are said instead, None closes the
            connection, ... leaves it to `usual`.
        usual: what all answer when nothing goes wrong.
    """

    mode = b"standalone"

    def __init__(self, count: int) -> None:
        self.servers = [Prompt(partial(self._answer, at)) for at in range(count)]
        self.data: dict[bytes, bytes] = {}
        self.twist: Callable[[int, list[bytes]], Said] = lambda at, command: ...
        self.maxmemory = [0] * count

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for server in self.servers:
                stack.enter_context(server)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def asked(self, at: int, *names: bytes) -> list[list[bytes]]:
        """The commands that a server has heard, only those with these names if any are given."""
        return [command for command in list(self.servers[at].commands) if not names or command[0] in names]

    def forget(self) -> None:
        """Forget what was asked."""
        for server in self.servers:
            server.commands.clear()

    def port(self, at: int) -> int:
        return self.servers[at].port

    def address(self, at: int) -> str:
        return f"127.0.0.1:{self.port(at)}"

    def _answer(self, at: int, command: list[bytes]) -> bytes | None:
        said = self.twist(at, command)
        return self.usual(at, command) if said is ... else said

    def usual(self, at: int, command: list[bytes]) -> bytes:
        name, *rest = command
        if name == b"GET":
            return resp(self.data.get(rest[0]))
        if name == b"SET":
            self.data[rest[0]] = rest[1]
        elif name in (b"EXISTS", b"PEXPIRE", b"TOUCH"):
            return resp(int(rest[0] in self.data))
        elif name == b"DEL":
            return resp(int(self.data.pop(rest[0], None) is not None))
        elif name == b"INFO":
            said = b"maxmemory:%d" % self.maxmemory[at] if rest == [b"memory"] else b"redis_mode:" + self.mode
            return resp(b"# Said\r\n%b\r\n" % said)
        return b"+OK\r\n"


class SlotMap(Many):
    """A cluster: `lines` are what CLUSTER SLOTS answers, (first, last, server, replica, …)."""

    mode = b"cluster"

    def __init__(self, count: int = 3, lines: list[tuple[int, ...]] | None = None) -> None:
        super().__init__(count)
        self.lines = lines or [(*THIRDS[at], at) for at in range(3)]
        self.said: Said = ...  # instead of the map

    @property
    def url(self) -> str:
        return self.url_of(*range(len(self.servers)))

    def url_of(self, *seeds: int) -> str:
        return "redis-cluster://" + ",".join(map(self.address, seeds))

    def questions(self) -> int:
        """How often the map was asked for."""
        return sum(len(self.asked(at, b"CLUSTER")) for at in range(len(self.servers)))

    def usual(self, at: int, command: list[bytes]) -> bytes | None:
        if command[0] == b"CLUSTER":
            return self.map() if self.said is ... else self.said
        return super().usual(at, command)

    def map(self) -> bytes:
        """The map as a server tells it."""
        told = [[f, t, *([b"127.0.0.1", self.port(at), b"id", []] for at in who)] for f, t, *who in self.lines]
        return resp(told)


class Watched(Many):
    """Servers 0, 1 and 2, of which `master` is one, and three sentinels, 3, 4 and 5.

    Attributes:
        master: what each sentinel takes for the master.
        flags: what they say of each server, if it is a replica.
    """

    def __init__(self) -> None:
        super().__init__(6)
        self.master = [0, 0, 0]
        self.flags = ["slave", "slave", "slave"]

    @property
    def url(self) -> str:
        return self.url_of(3, 4, 5)

    def url_of(self, *sentinels: int) -> str:
        return "redis-sentinel://" + ",".join(map(self.address, sentinels)) + "/main"

    def usual(self, at: int, command: list[bytes]) -> bytes | None:
        if at < 3:
            return super().usual(at, command)
        if command[0] == b"SENTINEL":
            master = self.master[at - 3]
            if command[1] == b"GET-MASTER-ADDR-BY-NAME":
                known = command[2] == b"main"
                return resp([b"127.0.0.1", b"%d" % self.port(master)]) if known else b"*-1\r\n"
            others = [i for i in range(3) if i != master]
            return resp(
                [
                    [b"name", b"x", b"ip", HOST, b"port", b"%d" % self.port(i), b"flags", self.flags[i].encode()]
                    for i in others
                ]
            )
        if command[0] == b"INFO":
            return resp(b"# Server\r\nredis_mode:sentinel\r\n")
        return b"+OK\r\n" if command[0] == b"AUTH" else resp("ERR unknown command")

    def questions(self) -> list[int]:
        return [sum(c[1] == b"GET-MASTER-ADDR-BY-NAME" for c in self.asked(at, b"SENTINEL")) for at in (3, 4, 5)]


def line(*parts: Any) -> bytes:
    return resp([[*parts]])


def says(kind: str, key: bytes, to: str, *by: int) -> Callable[[int, list[bytes]], Said]:
    """Those servers send whoever asks for a key elsewhere, unless told that it was ASKED for."""

    def twist(at: int, command: list[bytes]) -> Said:
        here = at in by and len(command) > 1 and command[1] == name(key)
        return resp(f"{kind} {slot(key)} {to}") if here else ...

    return twist


def key_of(at: int, number: int = 0) -> bytes:
    """A key whose slot is in the server's third."""
    first, last = THIRDS[at]
    found = (b"%d" % i for i in range(10_000) if first <= key_slot(b"kv:%d" % i) <= last)
    return next(key for i, key in enumerate(found) if i == number)


A, B, C = key_of(0), key_of(1), key_of(2)
A2, B2 = key_of(0, 1), key_of(1, 1)


def slot(key: bytes) -> int:
    return key_slot(KEY_PREFIX + key)


def name(key: bytes) -> bytes:
    return KEY_PREFIX + key


class Orderly(RedisStore):
    """Its calls let the thread that asks for a newer map finish first, so that it is certain who is asked for keys."""

    def _answer(self, batch: Batch, deadline: Deadline, reading: bool = False) -> list[Reply]:
        if batch.names and not self._closed and isinstance(self._topology, Discovered) and self._topology._known:
            self._topology._refresh_if_due(deadline)
            wait_for_askers()
        return super()._answer(batch, deadline, reading)


def wait_for_askers() -> None:
    """Wait until no thread asks for a map any more."""
    for thread in threading.enumerate():
        if thread.name == REFRESHER:
            thread.join(LONG_S)
            assert not thread.is_alive()


@contextmanager
def opened(url: str, kind: type[RedisStore] = Orderly, **settings: Any) -> Iterator[RedisStore]:
    """A store; in the end its sums must be right."""
    with kind(url, **{"deadline_s": LONG_S, **settings}) as store:
        yield store
        store.stats().check()


def values(*keys: bytes) -> list[bytes]:
    return [b"value of " + key for key in keys]


def bounded(call: Callable[[], Any]) -> Any:
    """What a call gives that must not hang."""
    start = time.monotonic()
    result = call()
    assert time.monotonic() - start < HANG_S
    return result


def in_threads(count: int, call: Callable[[], Any]) -> list[Any]:
    """What so many threads get that call at the same moment."""
    go, got = threading.Barrier(count), list[Any]()

    def run() -> None:
        go.wait()
        got.append(call())

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got
