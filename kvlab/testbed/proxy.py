"""A TCP proxy in front of a server, which injects network faults.

    with RedisServer() as server, FaultProxy(server.port) as proxy:
        store = RedisStore(proxy.url)
        proxy.latency_s = 0.1
        proxy.truncate(1000, reset=True)

Lasting faults are attributes, which can change at any time. One-time faults are methods; their position is
a byte or a reply, counted from the call. `fired` counts one-time faults, so that a test can check that its
fault occurred. The proxy runs in one thread until the `with` block ends. Times are lower bounds: a busy
machine adds to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

from kvlab.testbed.link import AT_ONCE, TICK_S, Cut, Lane, Link, arrived, end

READ_BYTES = 256 * 1024
ROOM_BYTES, LATE_ROOM_BYTES = 256 * 1024, 64 * 1024 * 1024  # buffer limits per direction, without and with latency
STEP_S = 0.01  # a limited bandwidth is applied to portions of this duration
END_S = 5.0  # timeout of a call into the proxy's thread


class FaultProxy:
    """Listens on a free loopback port and forwards all bytes to `upstream`, a port of `host`.

    Attributes, which also apply to open connections:
        latency_s: delay of the answers. Their distances in time do not change.
        jitter_s: maximum of an additional random delay, drawn for each read from `seed`.
        bandwidth: limit for the answers in bytes per second. None: no limit.
        upload_bandwidth: the same for the commands.
        slices: (n, t): at most n bytes of the answers per t seconds.
        hold: if True, answers wait until this is False.
        blackhole: if True, connections are accepted, but no bytes pass. The bytes pass later, as TCP resends them.
        reset: if True, new connections are accepted and reset.
        refuse: if True, new connections are refused; the proxy keeps its port.
        accepted: number of accepted connections, including reset ones.
        bytes_up, bytes_down: number of bytes sent to the server and to clients.
        fired: how often each one-time fault occurred.
    """

    def __init__(self, upstream: int, seed: int = 0, host: str = "127.0.0.1") -> None:
        self.upstream, self.host = upstream, host
        self._set_no_faults()
        self.fired: Counter[str] = Counter()
        self.reset_counts()
        self.port = 0
        self._random = random.Random(seed)
        self._passed = 0  # total of answer bytes; `_marks` use the same count
        self._marks: list[tuple[int, str, Callable[[Link], object]]] = []
        self._flip_mask = 0  # bits to flip in the next byte
        self._replies = 0  # total of replies that have begun; `_plans` uses the same count
        self._plans: dict[int, str] = {}
        self._links: list[Link] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)

    # --- for tests ------------------------------------------------------------------------------
    @property
    def url(self) -> str:
        """The proxy's address, for a Redis without TLS."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def open_connections(self) -> int:
        """Number of client connections that neither side has closed."""
        return len(self._links)

    @property
    def refuse(self) -> bool:
        """Whether new connections are refused."""
        return self._accepting is None

    @refuse.setter
    def refuse(self, on: bool) -> None:
        """Refuse new connections, or accept them again."""
        if on != self.refuse:
            self._call(self._shut() if on else self._listen())

    def truncate(self, n: int, reset: bool = False, call: Callable[[], object] = int) -> None:
        """After n more answer bytes, call a function (for example `server.kill`) and close the connection.

        The connection is closed by RST if `reset`, otherwise by FIN. The n bytes arrive, and no bytes after
        them. With n = 0 the connection is closed when the next answer would begin.
        """
        self._mark(n, "truncate", lambda link: setattr(link, "cut", Cut(reset, call)))

    def flip(self, n: int, bit: int = 0) -> None:
        """Flip one bit of answer byte n; byte 0 is the next byte."""
        self._mark(n, "flip", lambda link: setattr(self, "_flip_mask", 1 << bit))

    def after(self, n: int, call: Callable[[], object]) -> None:
        """Call a function after n more answer bytes. The function runs in the proxy's thread."""
        self._mark(n, "after", lambda link: call())

    def double(self, k: int = 0) -> None:
        """Send reply k twice; reply 0 is the next reply that begins."""
        self._call(self._plan(k, "double"))

    def swap(self, k: int = 0) -> None:
        """Send reply k, counted as in `double`, after the next reply on the same connection."""
        self._call(self._plan(k, "swap"))

    def drop(self, reset: bool = True) -> None:
        """Close every open connection now, by RST if `reset`."""
        self._call(self._drop(reset))

    def heal(self) -> None:
        """Remove every present and planned fault."""
        self._set_no_faults()
        self._call(self._forget())
        self.refuse = False

    def round_trips(self) -> int:
        """How often clients sent for the first time or for the first time after an answer.

        The number is exact if a client sends all commands before it receives an answer. In a long pipeline,
        early replies arrive while later commands are being sent. Each change of direction counts here, but
        not in `exchanges`.
        """
        return self._round_trips

    def exchanges(self) -> int:
        """How often clients sent while no reply was outstanding: the round trips that they waited for (RESP only)."""
        return self._exchanges

    def reset_counts(self) -> None:
        """Set all counters to zero: connections, bytes, round trips, faults. Open connections stay open."""
        self.accepted = self.bytes_up = self.bytes_down = 0
        self._round_trips = self._exchanges = 0
        self.fired = Counter()

    # --- start and stop -------------------------------------------------------------------------
    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._errors and error is None:
            raise RuntimeError("the proxy itself failed") from self._errors[0]

    def _set_no_faults(self) -> None:
        self.latency_s = self.jitter_s = 0.0
        self.bandwidth: float | None = None
        self.upload_bandwidth: float | None = None
        self.slices: tuple[int, float] | None = None
        self.hold = self.blackhole = self.reset = False

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in the proxy's thread, so that no bytes pass at the same time."""
        if threading.current_thread() is self._thread:  # a callback must not wait for its own thread
            self._start(work)
        else:
            asyncio.run_coroutine_threadsafe(work, self._loop).result(END_S)

    async def _listen(self) -> None:
        self._listener = self._listener or _bound(self.port)
        self._listener.listen(512)
        self.port = self._listener.getsockname()[1]
        self._accepting = self._start(self._accept(self._listener))

    async def _shut(self) -> None:
        assert self._accepting is not None and self._listener is not None
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._accepting = None
        self._listener.close()
        self._listener = _bound(self.port)  # bound, not listening: refuses connections, keeps the port

    async def _close(self) -> None:
        if not self.refuse:
            await self._shut()
        assert self._listener is not None
        self._listener.close()
        await asyncio.sleep(0)  # a task that is cancelled before its start would not close its connection
        await self._drop(reset=True)
        for task in (waiting := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.sleep(STEP_S)  # closed transports release their sockets a little later

    async def _drop(self, reset: bool) -> None:
        for link in list(self._links):
            end(link.client, reset)
            end(link.server, reset=True)

    async def _forget(self) -> None:
        self._marks.clear()
        self._plans.clear()
        self._flip_mask = 0

    def _mark(self, n: int, name: str, act: Callable[[Link], object]) -> None:
        async def add() -> None:
            self._marks.append((self._passed + n, name, act))

        self._call(add())

    async def _plan(self, k: int, what: str) -> None:
        self._plans[self._replies + k] = what

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(self._collecting_errors(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _collecting_errors(self, work: Coroutine[Any, Any, None]) -> None:
        """Ignore broken connections, which are expected; keep other errors for `__exit__`."""
        try:
            with contextlib.suppress(OSError):
                await work
        except Exception as error:
            self._errors.append(error)

    # --- one connection -------------------------------------------------------------------------
    async def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = await self._loop.sock_accept(listener)
            self.accepted += 1
            if self.reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
                connection.close()
            else:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # two sends stay two segments
                self._start(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection, limit=READ_BYTES)
        link = Link(writer)
        self._links.append(link)
        try:
            await self._while_blackhole()
            answers, link.server = await asyncio.open_connection(self.host, self.upstream, limit=READ_BYTES)
            await self._both_ways(link, reader, answers)
        finally:
            self._links.remove(link)
            end(link.client, reset=False)
            end(link.server, reset=False)

    async def _both_ways(self, link: Link, reader: asyncio.StreamReader, answers: asyncio.StreamReader) -> None:
        up, down = Lane(), Lane()
        work = (
            self._read(reader, up, lambda: 0.0),
            self._read(answers, down, lambda: self.latency_s + self._random.uniform(0, self.jitter_s)),
        )
        readers = [self._start(each) for each in work]
        try:
            passing = [self._start(self._pass_commands(link, up)), self._start(self._pass_answers(link, down))]
            await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*readers, *passing):
                task.cancel()
        await asyncio.wait((*readers, *passing))
        if link.cut is not None:
            await self._cut_off(link, link.cut, reader)

    async def _read(self, reader: asyncio.StreamReader, lane: Lane, delay: Callable[[], float]) -> None:
        try:
            while data := await reader.read(READ_BYTES):
                lane.put(self._loop.time() + delay(), data)
                while lane.bytes > (LATE_ROOM_BYTES if self.latency_s or self.jitter_s else ROOM_BYTES):
                    lane.less.clear()
                    await lane.less.wait()
        finally:
            lane.put(self._loop.time() + delay(), b"")  # the end has the same delay as the data

    async def _pass_commands(self, link: Link, lane: Lane) -> None:
        assert link.server is not None
        while data := await lane.take():
            await self._while_blackhole()
            self._round_trips += not link.client_spoke_last
            self._exchanges += link.owed == 0
            link.client_spoke_last = True
            link.owed += sum(ends for _, ends in link.commands.split(data))
            view = memoryview(data)
            while view:
                piece = view[: _per_step(self.upload_bandwidth)]
                await self._pace(lane, len(piece), self.upload_bandwidth)
                self.bytes_up += len(piece)
                link.server.write(piece)
                await link.server.drain()
                view = view[len(piece) :]

    async def _pass_answers(self, link: Link, lane: Lane) -> None:
        while data := await lane.take():
            view = memoryview(self._rearranged(link, data))
            while view:
                size = min(len(view), self._portion())
                await self._pace(lane, size, self.bandwidth, self.slices)
                await self._while_held()
                view = view[self._pass_some(link, view[:size]) :]
                if link.cut is not None:
                    return
                await link.client.drain()

    def _portion(self) -> int:
        portion = self.slices[0] if self.slices else READ_BYTES
        return min(portion, _per_step(self.bandwidth))

    def _pass_some(self, link: Link, view: memoryview) -> int:
        """Send the bytes before the next byte with a fault. Returns the number of bytes."""
        self._fire(link)
        if link.cut is not None:
            return 0
        size = min([len(view), *(at - self._passed for at, _, _ in self._marks)])
        if self._flip_mask:
            view = memoryview(bytes([view[0] ^ self._flip_mask]))
            size, self._flip_mask = 1, 0
        self._count(link, size)  # before the write: a test that receives a byte may read the counters
        link.client.write(view[:size])
        self._fire(link)
        return size

    def _count(self, link: Link, size: int) -> None:
        link.client_spoke_last = False
        link.sent += size
        while link.ends and link.ends[0] <= link.sent:
            link.owed -= 1
            link.ends.popleft()
        self._passed += size
        self.bytes_down += size

    def _fire(self, link: Link) -> None:
        """Run the actions that are due at this byte."""
        due = [mark for mark in self._marks if mark[0] <= self._passed]
        self._marks = [mark for mark in self._marks if mark[0] > self._passed]
        for _, name, act in due:
            self.fired[name] += 1
            act(link)

    async def _cut_off(self, link: Link, cut: Cut, reader: asyncio.StreamReader) -> None:
        """Close a connection whose answer was cut, after the sent bytes have arrived."""
        await arrived(link.client)
        cut.call()
        end(link.server, reset=True)
        if cut.reset:
            return end(link.client, reset=True)
        link.client.write_eof()  # close() with unread commands would send RST
        while await reader.read(READ_BYTES):
            pass

    def _rearranged(self, link: Link, data: bytes) -> bytes:
        """The answers to send, with replies doubled and swapped as planned."""
        out, begins = [], link.replies.between
        for piece, ends in link.replies.split(data):
            if begins:
                link.plan = self._plans.pop(self._replies, "")
                self._replies += 1
            out.append(self._as_planned(link, piece, ends) if link.plan or link.parked else piece)
            link.taken += len(out[-1])
            if ends:
                link.ends.append(link.taken)
            begins = ends
        return b"".join(out)

    def _as_planned(self, link: Link, piece: bytes, ends: bool) -> bytes:
        """Keep a reply until it is complete, then return the bytes to send instead."""
        link.kept += piece
        if not ends:
            return b""
        reply, link.kept = link.kept, b""
        if link.plan == "swap" and not link.parked:
            link.parked = reply
            return b""
        self.fired["swap" if link.parked else "double"] += 1
        out = reply + (link.parked or reply)
        link.plan, link.parked = "", b""
        return out

    # --- waiting --------------------------------------------------------------------------------
    async def _while_blackhole(self) -> None:
        while self.blackhole:
            await asyncio.sleep(TICK_S)

    async def _while_held(self) -> None:
        while self.hold or self.blackhole:
            await asyncio.sleep(TICK_S)

    async def _pace(
        self, lane: Lane, size: int, bandwidth: float | None, slices: tuple[int, float] | None = None
    ) -> None:
        """Wait until `size` bytes may pass the lane."""
        if (wait := lane.free_at - self._loop.time()) > 0:
            await asyncio.sleep(wait)
        now = self._loop.time()
        cost = size / bandwidth if bandwidth else 0.0
        if slices:
            lane.free_at = now + max(slices[1], cost)
        else:
            lane.free_at = max(lane.free_at, now - STEP_S) + cost  # compensates for a late wake-up


def _per_step(bandwidth: float | None) -> int:
    return max(1, int(bandwidth * STEP_S)) if bandwidth else READ_BYTES


def _bound(port: int) -> socket.socket:
    """A socket bound to a loopback port (0: a free one) that does not listen yet."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setblocking(False)
    made.bind(("127.0.0.1", port))
    return made
