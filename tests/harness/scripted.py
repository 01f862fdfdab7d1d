"""A server on loopback with scripted answers, also wrong ones, for tests only."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import BinaryIO, Self

Script = Callable[[list[bytes]], bytes | None]


class ScriptedServer:
    """A server on loopback that accepts the greeting of a client as Redis does and then sends scripted answers.

    with ScriptedServer(b"HTTP/1.1 400 Bad Request\r\n") as server:
        RedisStore(server.url)
    with ScriptedServer(lambda command: b"$-1\r\n" if command[0] == b"GET" else b"+OK\r\n") as server:
        ...

    Args:
        answer: the bytes to send for all commands; b"" sends nothing. Or a function that is called with every
            command (name and arguments) except the greeting CLIENT SETINFO. The function returns the bytes to
            send, or None to close the connection. Each connection has its own thread, so calls can overlap.
        hang_up: close the connection after the first answer.

    Attributes:
        commands: the commands that the function received, in order.
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
            with contextlib.suppress(OSError):  # shutdown wakes a thread that reads from the connection
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
                self._send_constant(connection, self._answer)
            else:
                self._run_script(connection, self._answer)

    def _send_constant(self, connection: socket.socket, answer: bytes) -> None:
        while data := connection.recv(1 << 16):
            greetings = data.count(b"SETINFO")
            connection.sendall(b"+OK\r\n" * greetings)
            if data.count(b"*") > greetings:
                connection.sendall(answer)
                if self._hang_up:
                    return

    def _run_script(self, connection: socket.socket, script: Script) -> None:
        with connection.makefile("rb") as stream:
            while command := read_command(stream):
                if [word.upper() for word in command[:2]] == [b"CLIENT", b"SETINFO"]:
                    connection.sendall(b"+OK\r\n")
                    continue
                self.commands.append(command)
                answer = script(command)
                if answer is None:
                    return
                connection.sendall(answer)
                if self._hang_up:
                    return


def read_command(stream: BinaryIO) -> list[bytes]:
    """Read one command: an array of bulk strings, or a line of words. Returns [] at the end of the stream.

    Raises:
        ValueError: the input is neither.
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
