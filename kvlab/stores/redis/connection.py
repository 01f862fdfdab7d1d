"""How bytes reach a Redis: redis-py's connections, made to move large values without copying them.

redis-py connects, authenticates and does TLS. Three of its public hooks are used here:

    command packer     large pieces stay separate, where the default copies them into one string
    connection class   pieces leave by one `sendmsg`; values arrive by `recvmsg_into`, straight
                       in the caller's buffer, where the default makes a fresh object of each
                       (on fresh memory the kernel's page faults cost more than the copying)
    parser class       hiredis, under the deadline of the whole call instead of one for each read

TLS has neither `sendmsg` nor `recvmsg_into`: there pieces go one by one.

A connection on which anything unexpected happened is closed, never used again: a reply that
nobody took would be taken for the next one.
"""

from __future__ import annotations

import math
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, DefaultParser, parse_url
from redis.retry import Retry

from kvlab.stores.base import Value, joined, pieces, place

Command = tuple[bytes | Value, ...]
"""A command's arguments, its name first. A value may be a tuple of pieces."""
Reply = bytes | memoryview | int | None | Exception
"""What came back; an exception is an error reply, or the fault that left this command unanswered."""

GRACE_S: Final = 0.05  # for what has arrived while this process itself stood still
BYTES_PER_S: Final = 50e6  # a wire slower than this loses against computing; it only stretches the deadline
MAX_VALUE_BYTES: Final = 64 << 20
_SEPARATE_BYTES: Final = 16 << 10  # smaller pieces are cheaper to copy than to send apart
_SKIP_BYTES: Final = 16 << 20  # received and thrown away, so that the values behind it still come
_PIECES_A_CALL: Final = 256  # the system's limit is 1024
_LINE_BYTES: Final = 4096  # no line of an honest reply is longer
_CRLF: Final = b"\r\n"
_ANSWERS_WITH: Final[dict[object, bytes]] = {  # all others with a number
    **dict.fromkeys((b"GET", b"INFO"), b"$"),
    **dict.fromkeys((b"SET", b"ASKING", b"READONLY"), b"+"),
}
_ASKING: Final[Command] = (b"ASKING",)
_READONLY: Final[Command] = (b"READONLY",)


class TooBig(Exception):
    """A value that does not fit the buffer it was meant for."""


class NoConnection(Exception):
    """All connections stayed in use for half the deadline: nothing is known about the server."""


class Deadline:
    """When a call must be over, connecting and waiting included.

    Args:
        seconds: for the call; what it moves may add to them, see `extend`.
    """

    __slots__ = ("_grace", "_until")

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._grace = 0.0

    def extend(self, nbytes: int) -> None:
        """Allow the time for so many bytes more."""
        self._until += nbytes / BYTES_PER_S

    def copy(self) -> Deadline:
        """Another one that ends at the same moment, for what one of several servers is asked."""
        return self.until(self._until)

    def half(self) -> Deadline:
        """Another one, half as far away."""
        now = time.monotonic()
        return self.until(now + (self._until - now) / 2)

    def wait_for(self, others: Iterable[Deadline]) -> None:
        """End no earlier than any of these."""
        self._until = max([self._until, *(other._until for other in others)])

    def abandon(self) -> None:
        """End now: nobody waits for the call any more."""
        self._until = -math.inf

    @property
    def abandoned(self) -> bool:
        """Whether it ended so: then nobody is to blame for what did not come."""
        return self._until == -math.inf

    @classmethod
    def until(cls, moment: float) -> Deadline:
        """The one that ends at this moment of the monotonic clock."""
        made = cls(0)
        made._until = moment
        return made

    @property
    def rest(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._until - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether nothing is left."""
        return time.monotonic() >= self._until

    def left(self) -> float:
        """Seconds left, more than 0.

        Raises:
            TimeoutError: none are.
        """
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline of the call has passed")
        return left

    def patience(self) -> float:
        """Seconds to wait for what is on its way, more than 0.

        Who finds, without having waited, that none are left gets `GRACE_S`, once: this process stood
        still (a full garbage collection takes 0.5 s with four million objects), and the server has
        answered long ago. Without it such a pause is a fault of every call at once, and opens breakers.

        Raises:
            TimeoutError: none are left.
        """
        left = self._until - time.monotonic()
        if left <= 0 and not self.abandoned:
            self._grace = self._grace or GRACE_S - left
            left += self._grace
        if left <= 0:
            raise TimeoutError("the deadline of the call has passed")
        return left


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

    def on_connect(self, connection: _Connection) -> None:
        super().on_connect(connection)
        self._connection = connection

    def read_from_socket(self, *args: Any, **options: Any) -> Any:
        if self._sock is not None:
            self._sock.settimeout(self._connection.deadline.patience())
        return super().read_from_socket(*args, **options)


class _Connection(AbstractConnection):
    """What is added to each of redis-py's connection classes.

    Attributes:
        deadline: of the call that uses the connection now.

    Args:
        read_only: tell a replica of a cluster that old values will do; it would send its readers away.
    """

    deadline: Deadline
    _sock: Any  # a socket while connected, else None

    def __init__(self, read_only: bool = False, **settings: Any) -> None:
        self._read_only = read_only
        self._line = bytearray(_LINE_BYTES)  # received and not yet taken: _line[_start:_end]
        self._start = self._end = 0
        packer: Any = _Packer()
        super().__init__(command_packer=packer, parser_class=_Parser, **settings)

    def connect(self) -> None:
        if not self.is_connected:
            self._start = self._end = 0
            self.socket_connect_timeout = self.socket_timeout = self.deadline.left()
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
            if self.is_connected and self._left_over():
                raise redis.ConnectionError("unexpected bytes")
        except (redis.ConnectionError, OSError):
            self.disconnect()  # type: ignore[no-untyped-call]
        if not self.is_connected:
            self.connect()
            if self._left_over():  # a full server says so before it is asked
                line = self._read_line()
                raise (
                    self._error(line) if line[:1] == b"-" else redis.InvalidResponse(f"nobody asked for {line[:40]!r}")
                )

    def _left_over(self) -> bool:
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
                self._sock.settimeout(self.deadline.patience())
                self._sock.sendall(piece)
            return
        at, offset = 0, 0
        while at < len(command):
            views = [memoryview(command[at])[offset:], *command[at + 1 : at + _PIECES_A_CALL]]
            self._sock.settimeout(self.deadline.patience())
            offset += self._sock.sendmsg(views)
            while at < len(command) and offset >= len(command[at]):
                offset -= len(command[at])
                at += 1

    def read_reply(self, command: Command, out: memoryview | None) -> Reply:
        """The reply to a command of this store: an error, or what this command answers with.

        Args:
            out: where a value goes; without it, it becomes a `bytes` of its own.

        Raises:
            redis.InvalidResponse: this is no such reply.
        """
        line = self._read_line()
        kind, rest = line[:1], line[1:]
        if kind == b"-":
            return self._error(line)
        if kind != _ANSWERS_WITH.get(command[0], b":"):
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

    def all_taken(self) -> bool:
        """Whether every byte that arrived belonged to a reply that was read."""
        return self._start == self._end

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
        while have < len(view):  # nothing is left in the line buffer now
            self._sock.settimeout(self.deadline.patience())
            if scatter:  # the buffer of lines takes what follows the value
                got = self._sock.recvmsg_into([view[have:], self._line])[0]
            else:
                got = self._sock.recv_into(view[have:])
            self._start, self._end = 0, max(0, got - (len(view) - have))
            have += _some(got)
        if self._read_line():
            raise redis.InvalidResponse("a value is longer than was announced")

    def _skip(self, length: int) -> None:
        """Receive a value that nobody has room for."""
        scratch = memoryview(bytearray(min(length, 1 << 16)))
        while length > len(scratch):
            have = min(len(scratch), self._end - self._start)
            self._start += have
            if not have:
                self._sock.settimeout(self.deadline.patience())
                have = _some(self._sock.recv_into(scratch))
            length -= have
        self._fill(scratch[:length])

    def _read_line(self) -> bytes:
        while (end := self._line.find(_CRLF, self._start, self._end)) < 0:
            self._line[: self._end - self._start] = self._line[self._start : self._end]
            self._start, self._end = 0, self._end - self._start
            if self._end == _LINE_BYTES:
                raise redis.InvalidResponse("a line of a reply does not end")
            self._sock.settimeout(self.deadline.patience())
            self._end += _some(self._sock.recv_into(memoryview(self._line)[self._end :]))
        line = bytes(self._line[self._start : end])
        self._start = end + len(_CRLF)
        return line


class _TCP(_Connection, redis.Connection): ...


class _TLS(_Connection, redis.SSLConnection): ...


class _Unix(_Connection, redis.UnixDomainSocketConnection): ...


_CLASSES: Final[dict[str, Any]] = {"redis": _TCP, "rediss": _TLS, "unix": _Unix}


def _number(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 19:
        raise redis.InvalidResponse(f"expected a number in a reply, got {digits[:40]!r}")
    return int(digits)


def _some(got: int) -> int:
    if got == 0:
        raise ConnectionResetError("closed by the server")
    return got


class Link:
    """Connections to one server, at most `max_connections` of them, opened when needed.

    redis-py's pools let a busy thread overtake a waiting one for ever, and cost a fifth of the
    time of a small read. Here who waits longest goes next.

    Args:
        url: redis://, rediss:// or unix://, as redis-py has them.
        read_only: also for reads from a replica of a cluster.

    Attributes:
        host: of the server.
        at: its host and port, as messages name it.

    Raises:
        ValueError, TypeError: a URL with settings that redis-py does not know.
    """

    def __init__(self, url: str, max_connections: int, read_only: bool = False) -> None:
        self._max = max_connections
        self._class = _CLASSES[urlsplit(url).scheme]
        settings = parse_url(url)  # type: ignore[no-untyped-call]
        settings.pop("connection_class", None)
        self._settings: dict[str, Any] = {
            **settings,
            "protocol": 2,  # what `read_reply` speaks
            "decode_responses": False,
            "retry": Retry(NoBackoff(), 0),  # the fallback is to compute, which must not wait
            "read_only": read_only,
            "driver_info": None,  # saves two round trips a connection, and a right of the ACL user
        }
        self.host = str(settings.get("host") or "localhost")
        self.at = f"{self.host}:{settings.get('port', 6379)}"
        self._class(**self._settings)  # connects nowhere; a wrong setting shows here
        self.renew()

    def renew(self) -> None:
        """Forget all connections and who waits for them: they are the parent's (after a fork)."""
        self._lock = threading.Lock()
        self._idle: list[Any] = []  # the last one used is the first one taken
        self._not_made = self._max
        self._waiting: deque[_Turn] = deque()
        self._closed = False

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

        Never raises: when the connection breaks, the commands that were not answered have the
        fault as their reply.
        """
        replies: list[Reply] = []
        connection, clean = None, False
        try:
            connection = self._take(deadline)
            connection.deadline = deadline
            connection.make_ready()
            connection.send_packed_command(pack(_asked(commands) if asking else commands))
            buffers = len(out) if out else 0
            for i, command in enumerate(commands):
                said = connection.read_reply(_ASKING, None) if asking else None
                reply = connection.read_reply(command, out[i] if out and i < buffers else None)
                refused = isinstance(said, Exception) and isinstance(reply, Exception)
                replies.append(said if refused else reply)
            clean = connection.all_taken()
        except Exception as error:  # a broken server makes libraries raise anything
            replies += [error] * (len(commands) - len(replies))
        finally:  # also when a signal's handler raises in the middle
            if connection is not None:
                if not clean or self._closed:
                    connection.disconnect()
                self._give_back(connection)
        return replies

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

    def _take(self, deadline: Deadline) -> Any:
        """An idle connection, a new one, or the one that whoever waits longest is handed.

        Raises:
            NoConnection: none came free in half of what is left of the deadline. The other half is
                the server's, or it would be blamed for the waiting.
        """
        with self._lock:
            if self._idle:
                return self._idle.pop()
            if self._not_made:
                connection = self._class(**self._settings)
                self._not_made -= 1
                return connection
            turn = _Turn()
            self._waiting.append(turn)
        waited = False
        try:
            turn.came.wait(deadline.left() / 2)
            waited = True
        finally:  # a signal's handler may raise while this waits
            with self._lock:
                if turn.connection is None:
                    self._waiting.remove(turn)
                elif not waited:
                    self._hand_on(turn.connection)
        if turn.connection is None:
            raise NoConnection(f"all {self._max} connections stayed in use")
        return turn.connection

    def _give_back(self, connection: Any) -> None:
        with self._lock:
            self._hand_on(connection)

    def _hand_on(self, connection: Any) -> None:
        if self._waiting:
            turn = self._waiting.popleft()
            turn.connection = connection
            turn.came.set()
        else:
            self._idle.append(connection)


def _asked(commands: Sequence[Command]) -> Iterator[Command]:
    for command in commands:
        yield _ASKING
        yield command


class _Turn:
    """A place in the queue for a connection."""

    def __init__(self) -> None:
        self.came = threading.Event()
        self.connection: Any = None


class FakeLink:
    """The same over fakeredis: a Redis inside this process, without a wire, without deadlines."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def renew(self) -> None:
        """Nothing to do: the child of a fork has a copy of the server."""

    def exchange(
        self,
        commands: Sequence[Command],
        deadline: Deadline,
        out: Sequence[memoryview] | None = None,
        asking: bool = False,
    ) -> list[Reply]:
        """See `Link.exchange`. `asking` is for clusters, which this is none of."""
        try:
            pipe = self._client.pipeline(transaction=False)
            for command in commands:
                pipe.execute_command(*map(joined, command))
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
