"""A server on loopback that misbehaves by script: only tests need one that does."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import BinaryIO, Self

Script = Callable[[list[bytes]], bytes | None]


class ScriptedServer:
    """A server on loopback that greets as Redis does and then answers as it is told.

    with ScriptedServer(b"HTTP/1.1 400 Bad Request\r\n") as server:
        RedisStore(server.url)
    with ScriptedServer(lambda command: b"$-1\r\n" if command[0] == b"GET" else b"+OK\r\n") as server:
        ...

    Args:
        answer: what it says to whatever comes in; b"" says nothing. Or a function, called with every command
            (its name and arguments) but the greeting CLIENT SETINFO; it returns what is sent, or None to
            close the connection. Each connection has a thread, so calls overlap if connections do.
        hang_up: close the connection instead of going on after the first answer.

    Attributes:
        commands: what the function was called with, in order.
    """

    def __init__(self, answer: bytes | Script = b"", hang_up: bool = False) -> None:
        self._answer, self._hang_up = answer, hang_up
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.commands: list[list[bytes]] = []
        self.port = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for connection in (self._listener, *self._open):
            with contextlib.suppress(OSError):  # wakes a thread that reads from it
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed at the end
            while True:
                connection, _ = self._listener.accept()
                self._open.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if isinstance(self._answer, bytes):
                self._say_the_same(connection, self._answer)
            else:
                self._follow(connection, self._answer)

    def _say_the_same(self, connection: socket.socket, answer: bytes) -> None:
        while data := connection.recv(1 << 16):
            greetings = data.count(b"SETINFO")
            connection.sendall(b"+OK\r\n" * greetings)
            if data.count(b"*") > greetings:
                connection.sendall(answer)
                if self._hang_up:
                    return

    def _follow(self, connection: socket.socket, script: Script) -> None:
        with connection.makefile("rb") as stream:
            while command := read_command(stream):
                if [word.upper() for word in command[:2]] == [b"CLIENT", b"SETINFO"]:
                    connection.sendall(b"+OK\r\n")
                    continue
                self.commands.append(command)
                said = script(command)
                if said is None:
                    return
                connection.sendall(said)
                if self._hang_up:
                    return


def read_command(stream: BinaryIO) -> list[bytes]:
    """One command as clients send it: an array of bulk strings, or a line of words. Empty at the end of the stream.

    Raises:
        ValueError: it is neither.
    """
    line = stream.readline()
    if not line.endswith(b"\n"):
        return []
    if not line.startswith(b"*"):
        return line.split()
    command = []
    for _ in range(int(line[1:])):
        kind, length = stream.read(1), stream.readline()
        if not length:
            return []
        if kind != b"$":
            raise ValueError(f"expected a bulk string, got {kind + length!r}")
        word = stream.read(int(length) + 2)
        if len(word) < int(length) + 2:
            return []
        command.append(word[:-2])
    return command
