"""RESP by hand: words, and a plain socket that says and takes them."""

from __future__ import annotations

import socket

WORDS = [b"$3\r\none\r\n", b"+two\r\n", b"*2\r\n:3\r\n*1\r\n$5\r\nth\r\nr\r\n", b"$-1\r\n"]
LONG = b"$300000\r\n" + bytes(300_000) + b"\r\n"
GET = b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n"


def reply(command: list[bytes]) -> bytes | None:
    """`GET n` gives one of the words, `LONG` a long value, `ALL` every word, `END` ends the connection."""
    name, *arguments = command
    if name == b"GET":
        return WORDS[int(arguments[0])] if arguments[0].isdigit() else b"$-1\r\n"
    return {b"LONG": LONG, b"ALL": b"".join(WORDS), b"SET": b"+OK\r\n"}.get(name)


def command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def ask(connection: socket.socket, *words: bytes) -> bytes:
    """Send a command, take as many bytes as its answer has."""
    connection.sendall(command(*words))
    return take(connection, len(reply(list(words)) or b""))


def take(connection: socket.socket, n: int) -> bytes:
    """n bytes, or what comes before the end."""
    got = b""
    while len(got) < n and (data := connection.recv(n - len(got))):
        got += data
    return got


def take_all(connection: socket.socket) -> tuple[bytes, str]:
    """What comes until the end, and which end that is."""
    got = b""
    try:
        while data := connection.recv(1 << 16):
            got += data
    except ConnectionResetError:
        return got, "reset"
    except TimeoutError:
        return got, "open"
    return got, "end"
