"""A connection of redis-py that transfers large values without copying them.

redis-py connects, authenticates and does TLS. This module uses three of its public hooks:

    command packer     keeps large pieces separate; the default copies them into one string
    connection class   sends pieces with `sendmsg`, and receives values with `recvmsg_into` directly into
                       the caller's buffer; the default creates an object per value, and page faults on
                       new memory cost more than the copy
    parser class       hiredis, limited by the deadline of the call instead of a timeout per read

TLS has neither `sendmsg` nor `recvmsg_into`, so pieces are sent one by one. After anything unexpected, a
connection is closed: a reply that was not read would be taken for the reply to the next command.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, DefaultParser
from redis.retry import Retry

from kvlab.stores.base import MAX_VALUE_BYTES, Value, pieces
from kvlab.stores.deadline import Deadline

Command = tuple[bytes | Value, ...]
"""The name and the arguments of a command. A value may be a tuple of pieces."""
Buffers = Sequence[memoryview]
"""One writable buffer per value."""
Reply = bytes | memoryview | int | None | Exception
"""The reply to a command. An exception is an error reply, or the fault that prevented a reply."""

_SEPARATE_BYTES: Final = 16 << 10  # smaller pieces are copied together, which is faster than sending them separately
_SKIP_BYTES: Final = 16 << 20  # a larger value that does not fit is not received: the connection is closed
_PIECES_PER_CALL: Final = 256  # per `sendmsg`; the system allows 1024
_LINE_BYTES: Final = 4096  # longer than any line of a valid reply
_CRLF: Final = b"\r\n"
_REPLY_TYPE: Final[dict[object, bytes]] = {  # all other commands return a number
    **dict.fromkeys((b"GET", b"INFO"), b"$"),
    **dict.fromkeys((b"SET", b"ASKING", b"READONLY"), b"+"),
}
_ASKING: Final[Command] = (b"ASKING",)
_READONLY: Final[Command] = (b"READONLY",)


class TooBig(Exception):
    """A value that does not fit its buffer, or exceeds `MAX_VALUE_BYTES`."""


def pack(commands: Iterable[Command]) -> list[bytes | memoryview]:
    r"""Encode commands in the Redis protocol, in few pieces. Large pieces are the caller's memory, not copies.

    >>> pack([(b"GET", b"kv:a")])
    [b'*2\r\n$3\r\nGET\r\n$4\r\nkv:a\r\n']
    """
    packed: list[bytes | memoryview] = []
    small: list[bytes | memoryview] = []
    for command in commands:
        small.append(b"*%d\r\n" % len(command))
        for argument in command:
            if type(argument) is bytes and len(argument) < _SEPARATE_BYTES:
                small.append(b"$%d\r\n%b\r\n" % (len(argument), argument))
                continue
            parts = [memoryview(part).cast("B") for part in pieces(argument)]
            small.append(b"$%d\r\n" % sum(map(len, parts)))
            for part in parts:
                if len(part) < _SEPARATE_BYTES:
                    small.append(part)
                else:
                    packed += (b"".join(small), part)
                    small.clear()
            small.append(_CRLF)
    if small:
        packed.append(b"".join(small))
    return packed


class _Packer:
    """The hook of redis-py for commands that it sends by itself, such as AUTH."""

    def pack(self, *arguments: Any) -> list[bytes | memoryview]:
        name, *rest = (a if isinstance(a, bytes) else str(a).encode() for a in arguments)
        return pack([(*name.split(), *rest)])


class _Parser(DefaultParser):  # type: ignore[valid-type, misc]  # redis-py selects it at run time
    """hiredis, for replies to commands that redis-py sends by itself."""

    def on_connect(self, connection: Connection) -> None:
        super().on_connect(connection)
        self._connection = connection

    def read_from_socket(self, *args: Any, **options: Any) -> Any:
        if self._sock is not None:
            self._sock.settimeout(self._connection.deadline.remaining_to_receive())
        return super().read_from_socket(*args, **options)


class Connection(AbstractConnection):
    """The base of three connection classes, each combined with one of redis-py's.

    Args:
        read_only: send READONLY after connecting; without it, a cluster replica redirects reads to its master.

    Attributes:
        deadline: the deadline of the current call.
        ready: whether the last exchange was connected and logged in.
        reusable: whether the last exchange read every received byte. Otherwise the connection must be closed.
    """

    deadline: Deadline
    _sock: Any  # a socket while connected, else None

    def __init__(self, read_only: bool = False, **settings: Any) -> None:
        self._read_only = read_only
        self.ready = self.reusable = False
        self._line = bytearray(_LINE_BYTES)  # _line[_start:_end] is received, but not yet parsed
        self._start = self._end = 0
        packer: Any = _Packer()
        super().__init__(command_packer=packer, parser_class=_Parser, **settings)

    def exchange(
        self, commands: Sequence[Command], deadline: Deadline, out: Buffers | None = None, asking: bool = False
    ) -> list[Reply]:
        """Send all commands, then read one reply per command: one round trip.

        Args:
            out: buffers for the values of the first commands.
            asking: send ASKING before each command, because the slots are being migrated to this server.

        Never raises an `Exception`: if the connection breaks, each command without a reply gets the fault.
        """
        replies: list[Reply] = []
        self.ready = self.reusable = False
        self.deadline = deadline
        try:
            self.make_ready()
            self.ready = True
            self.send_packed_command(pack(_with_asking(commands) if asking else commands))
            buffers = len(out) if out else 0
            for i, command in enumerate(commands):
                asking_reply = self.read_reply(_ASKING, None) if asking else None
                reply = self.read_reply(command, out[i] if out and i < buffers else None)
                refused = isinstance(asking_reply, Exception) and isinstance(reply, Exception)
                replies.append(asking_reply if refused else reply)
            self.reusable = self._start == self._end
        except Exception as error:  # a broken server can cause any exception in a library
            replies += [error] * (len(commands) - len(replies))
        return replies

    def connect(self) -> None:
        """Connect and log in within the deadline."""
        if not self.is_connected:
            self._start = self._end = 0
            self.socket_connect_timeout = self.socket_timeout = self.deadline.remaining_to_connect()
            super().connect()  # type: ignore[no-untyped-call]
            if self._read_only:
                self.send_packed_command(pack([_READONLY]))
                reply = self.read_reply(_READONLY, None)
                if isinstance(reply, Exception):
                    self.disconnect()  # type: ignore[no-untyped-call]
                    raise reply

    def make_ready(self) -> None:
        """Connect, or reconnect if the server has closed the connection or sent bytes that no command requested."""
        try:
            if self.is_connected and self._receive_unrequested():
                raise redis.ConnectionError("unexpected bytes")
        except (redis.ConnectionError, OSError):
            self.disconnect()  # type: ignore[no-untyped-call]
        if not self.is_connected:
            self.connect()
            if self._receive_unrequested():  # a server with too many clients sends an error before any command
                line = self._read_line()
                if line[:1] == b"-":
                    raise self._error(line)
                raise redis.InvalidResponse(f"unrequested bytes: {line[:40]!r}")

    def _receive_unrequested(self) -> bool:
        """Receive bytes that no command requested, and return whether there were any.

        A poll is not enough: TLS 1.3 sends session tickets, which contain no data for the client.
        """
        self._sock.settimeout(0)
        try:
            self._start, self._end = 0, self._sock.recv_into(self._line)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        if not self._end:
            raise redis.ConnectionError("closed by the server")
        return True

    def send_packed_command(self, command: Sequence[bytes | memoryview], check_health: bool = True) -> None:
        """Send all pieces within the deadline."""
        if not self.is_connected:
            self.connect()
        if isinstance(self._sock, ssl.SSLSocket):
            for piece in command:
                self._sock.settimeout(self.deadline.remaining_to_receive())
                self._sock.sendall(piece)
            return
        at, offset = 0, 0
        while at < len(command):
            views = [memoryview(command[at])[offset:], *command[at + 1 : at + _PIECES_PER_CALL]]
            self._sock.settimeout(self.deadline.remaining_to_receive())
            offset += self._sock.sendmsg(views)
            while at < len(command) and offset >= len(command[at]):
                offset -= len(command[at])
                at += 1

    def read_reply(self, command: Command, out: memoryview | None) -> Reply:
        """Read the reply to a command of this store: an error, or a reply of the type that the command has.

        Args:
            out: the buffer for a value. Without it, a value is a new `bytes`.

        Raises:
            redis.InvalidResponse: the reply has another type or an invalid form.
        """
        line = self._read_line()
        kind, rest = line[:1], line[1:]
        if kind == b"-":
            return self._error(line)
        if kind != _REPLY_TYPE.get(command[0], b":"):
            raise redis.InvalidResponse(f"expected another type of reply, got {line[:40]!r}")
        if kind == b"+":
            return rest
        if kind == b":":
            return _number(rest)
        return None if rest == b"-1" else self._read_value(_number(rest), out)

    def _error(self, line: bytes) -> Exception:
        try:
            error: Exception = self._parser.parse_error(line[1:].decode("utf-8", "replace"))
        except ValueError:  # a MOVED without an address
            raise redis.InvalidResponse(f"expected an error reply, got {line[:40]!r}") from None
        return error

    def _read_value(self, length: int, out: memoryview | None) -> Reply:
        fits = length <= (MAX_VALUE_BYTES if out is None else out.nbytes)
        if not fits and length > _SKIP_BYTES:
            raise TooBig(f"a value of {length} bytes")  # closes the connection: faster than receiving
        self.deadline.extend(length)
        if out is None:
            own = bytearray(length)
            self._fill(memoryview(own))
            return bytes(own)
        room = out.cast("B")
        if not fits:
            self._skip(length)
            return TooBig()
        self._fill(room[:length])
        return room[:length]

    def _fill(self, view: memoryview) -> None:
        """Receive a value into `view`, then the end of its line."""
        have = min(len(view), self._end - self._start)
        view[:have] = self._line[self._start : self._start + have]
        self._start += have
        scatter = not isinstance(self._sock, ssl.SSLSocket)
        while have < len(view):  # the line buffer is empty now
            self._sock.settimeout(self.deadline.remaining_to_receive())
            if scatter:  # bytes after the value go to the line buffer
                got = self._sock.recvmsg_into([view[have:], self._line])[0]
            else:
                got = self._sock.recv_into(view[have:])
            self._start, self._end = 0, max(0, got - (len(view) - have))
            have += _received(got)
        if self._read_line():
            raise redis.InvalidResponse("a value is longer than its announced length")

    def _skip(self, length: int) -> None:
        """Receive and discard a value that does not fit its buffer."""
        scratch = memoryview(bytearray(min(length, 1 << 16)))
        while length > len(scratch):
            have = min(len(scratch), self._end - self._start)
            self._start += have
            if not have:
                self._sock.settimeout(self.deadline.remaining_to_receive())
                have = _received(self._sock.recv_into(scratch))
            length -= have
        self._fill(scratch[:length])

    def _read_line(self) -> bytes:
        while (end := self._line.find(_CRLF, self._start, self._end)) < 0:
            self._line[: self._end - self._start] = self._line[self._start : self._end]
            self._start, self._end = 0, self._end - self._start
            if self._end == _LINE_BYTES:
                raise redis.InvalidResponse("a line of a reply is too long")
            self._sock.settimeout(self.deadline.remaining_to_receive())
            self._end += _received(self._sock.recv_into(memoryview(self._line)[self._end :]))
        line = bytes(self._line[self._start : end])
        self._start = end + len(_CRLF)
        return line


class _TCP(Connection, redis.Connection): ...


class _TLS(Connection, redis.SSLConnection): ...


class _Unix(Connection, redis.UnixDomainSocketConnection): ...


CLASSES: Final[dict[str, Any]] = {"redis": _TCP, "rediss": _TLS, "unix": _Unix}
"""The connection class of each URL scheme."""
SETTINGS: Final[dict[str, Any]] = {  # these replace settings of the URL
    "protocol": 2,  # the protocol version that `read_reply` parses
    "decode_responses": False,
    "retry": Retry(NoBackoff(), 0),  # no retries: the fallback is to recompute, which must not wait
    "driver_info": None,  # saves two round trips per connection, and a permission of the ACL user
}


def _with_asking(commands: Sequence[Command]) -> Iterator[Command]:
    for command in commands:
        yield _ASKING
        yield command


def _number(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 19:
        raise redis.InvalidResponse(f"expected a number in a reply, got {digits[:40]!r}")
    return int(digits)


def _received(got: int) -> int:
    if got == 0:
        raise ConnectionResetError("closed by the server")
    return got
