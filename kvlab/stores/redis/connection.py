"""One connection to a Redis: redis-py's, made to move large values without copying them.

redis-py connects, authenticates and does TLS. Three of its public hooks are used here:

    command packer     large pieces stay separate, where the default copies them into one string
    connection class   pieces leave by one `sendmsg`; values arrive by `recvmsg_into`, straight in the
                       caller's buffer, where the default makes a fresh object of each (on fresh
                       memory the kernel's page faults cost more than the copying)
    parser class       hiredis, under the deadline of the whole call instead of one for each read

TLS has neither `sendmsg` nor `recvmsg_into`: there pieces go one by one.

A connection on which anything unexpected happened is closed, never used again: a reply that nobody
took would be taken for the next one.
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
"""A command's arguments, its name first. A value may be a tuple of pieces."""
Reply = bytes | memoryview | int | None | Exception
"""What came back. An exception is an error reply, or the fault that left this command without a reply."""

_SEPARATE_BYTES: Final = 16 << 10  # smaller pieces are cheaper to copy than to send apart
_SKIP_BYTES: Final = 16 << 20  # received and thrown away, so that the values behind it still come
_PIECES_A_CALL: Final = 256  # the system's limit is 1024
_LINE_BYTES: Final = 4096  # no line of an honest reply is longer
_CRLF: Final = b"\r\n"
_REPLIES_WITH: Final[dict[object, bytes]] = {  # all others with a number
    **dict.fromkeys((b"GET", b"INFO"), b"$"),
    **dict.fromkeys((b"SET", b"ASKING", b"READONLY"), b"+"),
}
_ASKING: Final[Command] = (b"ASKING",)
_READONLY: Final[Command] = (b"READONLY",)


class TooBig(Exception):
    """A value that does not fit the buffer it was meant for."""


def pack(commands: Iterable[Command]) -> list[bytes | memoryview]:
    r"""Commands in the Redis protocol, as few pieces as possible; large ones are the caller's own memory.

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
    """redis-py's hook for what it sends by itself, such as AUTH."""

    def pack(self, *arguments: Any) -> list[bytes | memoryview]:
        name, *rest = (a if isinstance(a, bytes) else str(a).encode() for a in arguments)
        return pack([(*name.split(), *rest)])


class _Parser(DefaultParser):  # type: ignore[valid-type, misc]  # redis-py chooses it at run time
    """hiredis, for the replies to what redis-py sends by itself."""

    def on_connect(self, connection: Connection) -> None:
        super().on_connect(connection)
        self._connection = connection

    def read_from_socket(self, *args: Any, **options: Any) -> Any:
        if self._sock is not None:
            self._sock.settimeout(self._connection.deadline.remaining_to_receive())
        return super().read_from_socket(*args, **options)


class Connection(AbstractConnection):
    """What is added to each of redis-py's connection classes.

    Args:
        read_only: tell a replica of a cluster that old values will do; it would send its readers away.

    Attributes:
        deadline: of the call that uses the connection now.
        ready: the last exchange found, or made, a connection that works.
        in_step: the last exchange took every byte that came; only then may the next one follow.
    """

    deadline: Deadline
    _sock: Any  # a socket while connected, else None

    def __init__(self, read_only: bool = False, **settings: Any) -> None:
        self._read_only = read_only
        self.ready = self.in_step = False
        self._line = bytearray(_LINE_BYTES)  # received and not yet taken: _line[_start:_end]
        self._start = self._end = 0
        packer: Any = _Packer()
        super().__init__(command_packer=packer, parser_class=_Parser, **settings)

    def exchange(
        self,
        commands: Sequence[Command],
        deadline: Deadline,
        out: Sequence[memoryview] | None = None,
        asking: bool = False,
    ) -> list[Reply]:
        """Send all commands, then take one reply each: one round trip.

        Args:
            out: buffers for the values of the first commands.
            asking: say ASKING before each: its slot is on the way to this server.

        Never raises an `Exception`: when the connection breaks, the commands without a reply have the
        fault as their reply.
        """
        replies: list[Reply] = []
        self.ready = self.in_step = False
        self.deadline = deadline
        try:
            self.make_ready()
            self.ready = True
            self.send_packed_command(pack(_asked(commands) if asking else commands))
            buffers = len(out) if out else 0
            for i, command in enumerate(commands):
                said = self.read_reply(_ASKING, None) if asking else None
                reply = self.read_reply(command, out[i] if out and i < buffers else None)
                refused = isinstance(said, Exception) and isinstance(reply, Exception)
                replies.append(said if refused else reply)
            self.in_step = self._start == self._end
        except Exception as error:  # a broken server makes libraries raise anything
            replies += [error] * (len(commands) - len(replies))
        return replies

    def connect(self) -> None:
        """Connect and log in, before the deadline."""
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
        """Connect, or connect again where the server has hung up or has sent what nobody asked for."""
        try:
            if self.is_connected and self._has_unread_bytes():
                raise redis.ConnectionError("unexpected bytes")
        except (redis.ConnectionError, OSError):
            self.disconnect()  # type: ignore[no-untyped-call]
        if not self.is_connected:
            self.connect()
            if self._has_unread_bytes():  # a full server says so before it is asked
                line = self._read_line()
                raise (
                    self._error(line) if line[:1] == b"-" else redis.InvalidResponse(f"nobody asked for {line[:40]!r}")
                )

    def _has_unread_bytes(self) -> bool:
        """Whether bytes have come that no command asked for.

        Receiving tells more than polling: TLS 1.3 sends session tickets, which are no data of ours.
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
        """Send all pieces before the deadline."""
        if not self.is_connected:
            self.connect()
        if isinstance(self._sock, ssl.SSLSocket):
            for piece in command:
                self._sock.settimeout(self.deadline.remaining_to_receive())
                self._sock.sendall(piece)
            return
        at, offset = 0, 0
        while at < len(command):
            views = [memoryview(command[at])[offset:], *command[at + 1 : at + _PIECES_A_CALL]]
            self._sock.settimeout(self.deadline.remaining_to_receive())
            offset += self._sock.sendmsg(views)
            while at < len(command) and offset >= len(command[at]):
                offset -= len(command[at])
                at += 1

    def read_reply(self, command: Command, out: memoryview | None) -> Reply:
        """The reply to a command of this store: an error, or what this command replies with.

        Args:
            out: where a value goes; without it, it becomes a `bytes` of its own.

        Raises:
            redis.InvalidResponse: this is no such reply.
        """
        line = self._read_line()
        kind, rest = line[:1], line[1:]
        if kind == b"-":
            return self._error(line)
        if kind != _REPLIES_WITH.get(command[0], b":"):
            raise redis.InvalidResponse(f"expected another kind of reply, got {line[:40]!r}")
        if kind == b"+":
            return rest
        if kind == b":":
            return _number(rest)
        return None if rest == b"-1" else self._read_value(_number(rest), out)

    def _error(self, line: bytes) -> Exception:
        try:
            error: Exception = self._parser.parse_error(line[1:].decode("utf-8", "replace"))
        except ValueError:  # a MOVED that names no server
            raise redis.InvalidResponse(f"expected an error reply, got {line[:40]!r}") from None
        return error

    def _read_value(self, length: int, out: memoryview | None) -> Reply:
        fits = length <= (MAX_VALUE_BYTES if out is None else out.nbytes)
        if not fits and length > _SKIP_BYTES:
            raise TooBig(f"a value of {length} bytes")  # the connection goes with it: cheaper than to receive it
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
        """Receive into `view`, then the line end."""
        have = min(len(view), self._end - self._start)
        view[:have] = self._line[self._start : self._start + have]
        self._start += have
        scatter = not isinstance(self._sock, ssl.SSLSocket)
        while have < len(view):  # the line buffer is empty now
            self._sock.settimeout(self.deadline.remaining_to_receive())
            if scatter:  # what follows the value goes to the line buffer
                got = self._sock.recvmsg_into([view[have:], self._line])[0]
            else:
                got = self._sock.recv_into(view[have:])
            self._start, self._end = 0, max(0, got - (len(view) - have))
            have += _some(got)
        if self._read_line():
            raise redis.InvalidResponse("a value is longer than was announced")

    def _skip(self, length: int) -> None:
        """Receive a value that has no room anywhere."""
        scratch = memoryview(bytearray(min(length, 1 << 16)))
        while length > len(scratch):
            have = min(len(scratch), self._end - self._start)
            self._start += have
            if not have:
                self._sock.settimeout(self.deadline.remaining_to_receive())
                have = _some(self._sock.recv_into(scratch))
            length -= have
        self._fill(scratch[:length])

    def _read_line(self) -> bytes:
        while (end := self._line.find(_CRLF, self._start, self._end)) < 0:
            self._line[: self._end - self._start] = self._line[self._start : self._end]
            self._start, self._end = 0, self._end - self._start
            if self._end == _LINE_BYTES:
                raise redis.InvalidResponse("a line of a reply does not end")
            self._sock.settimeout(self.deadline.remaining_to_receive())
            self._end += _some(self._sock.recv_into(memoryview(self._line)[self._end :]))
        line = bytes(self._line[self._start : end])
        self._start = end + len(_CRLF)
        return line


class _TCP(Connection, redis.Connection): ...


class _TLS(Connection, redis.SSLConnection): ...


class _Unix(Connection, redis.UnixDomainSocketConnection): ...


CLASSES: Final[dict[str, Any]] = {"redis": _TCP, "rediss": _TLS, "unix": _Unix}
"""The connection class of each URL scheme."""
SETTINGS: Final[dict[str, Any]] = {  # so that it speaks as this module expects, whatever the URL says
    "protocol": 2,  # what `read_reply` speaks
    "decode_responses": False,
    "retry": Retry(NoBackoff(), 0),  # the fallback is to compute, which must not wait
    "driver_info": None,  # saves two round trips a connection, and a right of the ACL user
}


def _asked(commands: Sequence[Command]) -> Iterator[Command]:
    for command in commands:
        yield _ASKING
        yield command


def _number(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 19:
        raise redis.InvalidResponse(f"expected a number in a reply, got {digits[:40]!r}")
    return int(digits)


def _some(got: int) -> int:
    if got == 0:
        raise ConnectionResetError("closed by the server")
    return got
