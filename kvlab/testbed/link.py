"""One connection through the fault proxy: its bytes in transit, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvlab.testbed.resp import Splitter

AT_ONCE = struct.pack("ii", 1, 0)  # a value of SO_LINGER with which close() sends RST
TICK_S = 0.001
ARRIVAL_S = 5.0  # the longest wait for bytes to arrive before a reset


@dataclass(frozen=True)
class Cut:
    """How a connection is closed in the middle of an answer (`reset`: by RST), and a function that is called before."""

    reset: bool
    call: Callable[[], object]


@dataclass
class Link:
    """One client's connection, and the proxy's connection to the server for this client."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    commands: Splitter = field(default_factory=Splitter)
    replies: Splitter = field(default_factory=Splitter)
    client_spoke_last: bool = False
    owed: int = 0  # commands without a complete reply
    taken: int = 0  # total of answer bytes to be sent
    sent: int = 0  # total of answer bytes sent
    ends: deque[int] = field(default_factory=deque)  # values of `sent` at which replies end
    plan: str = ""  # the fault of the reply that is being received: "double", "swap" or none
    kept: bytes = b""  # the received part of this reply
    parked: bytes = b""  # a reply that is sent after the next one
    cut: Cut | None = None  # if set, no further bytes pass


class Lane:
    """The bytes in transit in one direction of a link, in pieces, each with the time at which it is due."""

    def __init__(self) -> None:
        self.items: deque[tuple[float, bytes]] = deque()
        self.bytes = 0
        self.free_at = 0.0  # when bandwidth and slicing allow the next byte
        self.more, self.less = asyncio.Event(), asyncio.Event()

    def put(self, due: float, data: bytes) -> None:
        """Add received bytes; b"" marks the end."""
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
    """Wait until the other end has received all written bytes: a reset would discard bytes in transit."""
    loop = asyncio.get_running_loop()
    end = loop.time() + ARRIVAL_S
    while loop.time() < end and (writer.transport.get_write_buffer_size() or _unacknowledged(writer)):
        await asyncio.sleep(TICK_S)


def _unacknowledged(writer: asyncio.StreamWriter) -> int:
    """Bytes in the kernel that the other end has not acknowledged."""
    import fcntl  # imported here, because Windows has neither module
    import termios

    number = writer.get_extra_info("socket").fileno()
    if number < 0:
        return 0
    (count,) = struct.unpack("i", fcntl.ioctl(number, termios.TIOCOUTQ, b"\0" * 4))
    return int(count)
