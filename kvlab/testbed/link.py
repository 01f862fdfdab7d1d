"""One connection through the fault proxy: what is on its way, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvlab.testbed.resp import Splitter

AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets
TICK_S = 0.001
ARRIVAL_S = 5.0  # for bytes to arrive before a reset


@dataclass(frozen=True)
class Cut:
    """How a connection is ended in the middle of an answer, and what is called then."""

    reset: bool
    call: Callable[[], object]


@dataclass
class Link:
    """One client's connection, and the proxy's own to the server."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    commands: Splitter = field(default_factory=Splitter)
    replies: Splitter = field(default_factory=Splitter)
    client_spoke_last: bool = False
    owed: int = 0  # commands without their reply
    taken: int = 0  # answer bytes that are to be sent, ever
    sent: int = 0  # of these
    ends: deque[int] = field(default_factory=deque)  # where replies end, on the scale of `sent`
    plan: str = ""  # what is done to the reply that is coming in
    kept: bytes = b""  # of that reply
    parked: bytes = b""  # a reply that goes out after the next one
    cut: Cut | None = None  # nothing passes after this


class Lane:
    """The bytes on their way in one direction of a link, in order, each with the time when it is due."""

    def __init__(self) -> None:
        self.items: deque[tuple[float, bytes]] = deque()
        self.bytes = 0
        self.free_at = 0.0  # when bandwidth and slicing allow the next byte
        self.more, self.less = asyncio.Event(), asyncio.Event()

    def put(self, due: float, data: bytes) -> None:
        """Add what came in; b"" is the end."""
        self.items.append((due, data))
        self.bytes += len(data)
        self.more.set()

    async def take(self) -> bytes:
        """The next bytes, once they are due."""
        while not self.items:
            self.more.clear()
            await self.more.wait()
        due, data = self.items.popleft()
        await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
        self.bytes -= len(data)
        self.less.set()
        return data


def end(writer: asyncio.StreamWriter | None, reset: bool) -> None:
    """Close a connection, or reset it."""
    if writer is None:
        return
    if not reset:
        return writer.close()
    with contextlib.suppress(OSError):  # closed already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
    writer.transport.abort()


async def arrived(writer: asyncio.StreamWriter) -> None:
    """Wait until everything written lies at the other end: a reset would throw away what is under way."""
    loop = asyncio.get_running_loop()
    end = loop.time() + ARRIVAL_S
    while loop.time() < end and (writer.transport.get_write_buffer_size() or _unacknowledged(writer)):
        await asyncio.sleep(TICK_S)


def _unacknowledged(writer: asyncio.StreamWriter) -> int:
    """Bytes in the kernel that the other end has not got."""
    import fcntl  # not on Windows, where everything else here works
    import termios

    number = writer.get_extra_info("socket").fileno()
    if number < 0:
        return 0
    (count,) = struct.unpack("i", fcntl.ioctl(number, termios.TIOCOUTQ, b"\0" * 4))
    return int(count)
