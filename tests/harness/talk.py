"""RESP commands and replies for tests, and functions that exchange them over a plain socket."""

from __future__ import annotations

import socket

WORDS = [b"$3\r\none\r\n", b"+two\r\n", b"*2\r\n:3\r\n*1\r\n$5\r\nth\r\nr\r\n", b"$-1\r\n"]
LONG = b"$300000\r\n" + bytes(300_000) + b"\r\n"
GET = b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n"


def reply(command: list[bytes]) -> bytes | None:
    """Answer a command: `GET n` with reply n of `WORDS`, `ALL` with all of them, `LONG` with a long value.

    `SET` is answered with OK. `END` closes the connection.
    """
    name, *arguments = command
    if name == b"GET":
        return WORDS[int(arguments[0])] if arguments[0].isdigit() else b"$-1\r\n"
    return {b"LONG": LONG, b"ALL": b"".join(WORDS), b"SET": b"+OK\r\n"}.get(name)


def command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def ask(connection: socket.socket, *words: bytes) -> bytes:
    """Send a command and receive as many bytes as its answer has."""
    connection.sendall(command(*words))
    return take(connection, len(reply(list(words)) or b""))


def take(connection: socket.socket, n: int) -> bytes:
    """Receive n bytes, or all bytes before the end."""
    got = b""
    while len(got) < n and (data := connection.recv(n - len(got))):
        got += data
    return got


def take_all(connection: socket.socket) -> tuple[bytes, str]:
    """Receive all bytes until the end. Returns them and the kind of end: "end", "reset" or "open" (timeout)."""
    got = b""
    try:
        while data := connection.recv(1 << 16):
            got += data
    except ConnectionResetError:
        return got, "reset"
    except TimeoutError:
        return got, "open"
    return got, "end"
