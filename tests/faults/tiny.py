"""A scripted Redis of a few commands, and proxies that send without waiting."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from kvlab.testbed.proxy import FaultProxy
from tests.faults.kit import wait_for
from tests.harness.scripted import ScriptedServer

MEMORY_INFO = b"\r\nmaxmemory:0\r\n"


class Tiny:
    """Answers as a Redis would; a command named in `bad` gets what stands there instead."""

    def __init__(self, password: bytes | None = None) -> None:
        self.values: dict[bytes, bytes] = {}
        self.bad: dict[bytes, bytes | Callable[[list[bytes]], bytes | None]] = {}
        self.password = password

    def __call__(self, command: list[bytes]) -> bytes | None:
        bad = self.bad.get(command[0])
        if bad is not None:
            return bad if isinstance(bad, bytes) else bad(command)
        return self.good(command)

    def good(self, command: list[bytes]) -> bytes:
        name, *rest = command
        if name == b"AUTH":
            return b"+OK\r\n" if rest[-1] == self.password else b"-WRONGPASS invalid username-password pair\r\n"
        if name == b"INFO":
            return bulk(MEMORY_INFO)
        if name == b"GET":
            return bulk(self.values.get(rest[0]))
        if name == b"SET":
            self.values[rest[0]] = rest[1]
            return b"+OK\r\n"
        there = rest[0] in self.values
        if name == b"DEL":
            self.values.pop(rest[0], None)
        return b":%d\r\n" % there


class Scripted(ScriptedServer):
    """One that does not wait for an acknowledgement between two answers: 40 ms each."""

    def __init__(self, script: Tiny) -> None:
        super().__init__(script)
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it


def bulk(value: bytes | None) -> bytes:
    return b"$-1\r\n" if value is None else b"$%d\r\n%b\r\n" % (len(value), value)


def prompt(proxy: FaultProxy) -> None:
    """Nothing that it sends from here on waits for an acknowledgement of what was sent before: 40 ms each."""
    assert proxy._listener is not None
    proxy._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it


def all_arrived(proxy: FaultProxy, before: int, nbytes: int) -> None:
    """Wait until so many answer bytes lie at the store, or it has closed the connection.

    An answer that nobody asked for shows only once it is there; until then nothing tells it from the next one.
    """
    wait_for(lambda: proxy.open_connections == 0 or proxy.bytes_down - before >= nbytes)
    proxy.after(1 << 60, int)  # runs in the proxy's thread: what it has counted is sent by then
    time.sleep(0.02)
