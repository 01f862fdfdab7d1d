"""A TCP proxy in front of a server, which does to a connection what networks do to it.

    with RedisServer() as server, FaultProxy(server.port) as proxy:
        store = RedisStore(proxy.url)
        proxy.latency_s = 0.1
        proxy.truncate(1000, reset=True)

States are attributes, set and cleared at any time. What happens once, at a byte or a reply counted from
now on, is a method; `fired` counts these, so that a test can see that its fault took place. Everything
runs in one thread, which ends with the `with` block. Times are lower bounds: a busy machine adds to them.
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
ROOM_BYTES, LATE_ROOM_BYTES = 256 * 1024, 64 * 1024 * 1024  # on their way through the proxy, per direction
STEP_S = 0.01  # a limited bandwidth is passed on in portions of this long
END_S = 5.0  # for a call into the proxy's thread


class FaultProxy:
    """Listens on a free loopback port and passes everything on to `upstream`, a port of `host`.

    Attributes, all of which hold for open connections too:
        latency_s: each answer comes so much later. What follows closely comes as closely.
        jitter_s: and up to this much more, drawn anew for each read, from `seed`.
        bandwidth: of the answers, bytes per second. None: no limit.
        upload_bandwidth: of the commands.
        slices: (n, t): at most n bytes of the answers every t seconds.
        hold: answers wait until this is False again.
        blackhole: connections are accepted, nothing passes either way. Afterwards it all does, as TCP sends again.
        reset: new connections are accepted and reset.
        refuse: new connections are refused; the port stays ours.
        accepted: connections, those reset included.
        bytes_up, bytes_down: passed on to the server, to the client.
        fired: how often each one-time fault took place.
    """

    def __init__(self, upstream: int, seed: int = 0, host: str = "127.0.0.1") -> None:
        self.upstream, self.host = upstream, host
        self._set_no_faults()
        self.fired: Counter[str] = Counter()
        self.reset_counts()
        self.port = 0
        self._random = random.Random(seed)
        self._passed = 0  # answer bytes ever: the scale of `_marks`
        self._marks: list[tuple[int, str, Callable[[Link], object]]] = []
        self._flip_mask = 0  # for the next byte
        self._replies = 0  # begun: the scale of `_plans`
        self._plans: dict[int, str] = {}
        self._links: list[Link] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._wrong: list[BaseException] = []
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)

    # --- what a test does -----------------------------------------------------------------------
    @property
    def url(self) -> str:
        """The proxy's address, for a Redis without TLS."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def open_connections(self) -> int:
        """Connections of clients that neither side has ended."""
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
        """After n more answer bytes, call (say, `server.kill`) and end that connection, by FIN or RST.

        The n bytes arrive and nothing after them. With n = 0 that is when the next answer would have begun.
        """
        self._mark(n, "truncate", lambda link: setattr(link, "cut", Cut(reset, call)))

    def flip(self, n: int, bit: int = 0) -> None:
        """Flip one bit of answer byte n, counted from 0 and from now."""
        self._mark(n, "flip", lambda link: setattr(self, "_flip_mask", 1 << bit))

    def after(self, n: int, call: Callable[[], object]) -> None:
        """Call when n more answer bytes have passed; then go on. `call` runs in the proxy's thread."""
        self._mark(n, "after", lambda link: call())

    def double(self, k: int = 0) -> None:
        """Send reply k twice, counted from 0 and from the next reply that begins."""
        self._call(self._plan(k, "double"))

    def swap(self, k: int = 0) -> None:
        """Send reply k after the reply that follows it on its connection."""
        self._call(self._plan(k, "swap"))

    def drop(self, reset: bool = True) -> None:
        """End every open connection now."""
        self._call(self._drop(reset))

    def heal(self) -> None:
        """No fault any more, present or to come."""
        self._set_no_faults()
        self._call(self._forget())
        self.refuse = False

    def round_trips(self) -> int:
        """How often a client sent after it was sent something, or for the first time.

        Exact where a client sends everything before it gets anything. In a long pipeline early replies come
        while later commands are still going out, and each change of direction counts; `exchanges` counts none.
        """
        return self._round_trips

    def exchanges(self) -> int:
        """How often a client sent when no reply was owed to it: round trips that were waited for (RESP only)."""
        return self._exchanges

    def reset_counts(self) -> None:
        """Count from zero: connections, bytes, round trips, faults fired. What is open stays open."""
        self.accepted = self.bytes_up = self.bytes_down = 0
        self._round_trips = self._exchanges = 0
        self.fired = Counter()

    # --- beginning and end ----------------------------------------------------------------------
    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._wrong and error is None:
            raise RuntimeError("the proxy itself failed") from self._wrong[0]

    def _set_no_faults(self) -> None:
        self.latency_s = self.jitter_s = 0.0
        self.bandwidth: float | None = None
        self.upload_bandwidth: float | None = None
        self.slices: tuple[int, float] | None = None
        self.hold = self.blackhole = self.reset = False

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in the proxy's thread, so that nothing passes meanwhile."""
        if threading.current_thread() is self._thread:  # from a callback, which must not wait for itself
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
        self._listener = _bound(self.port)  # bound and not listening: refused, and nobody else's

    async def _close(self) -> None:
        if not self.refuse:
            await self._shut()
        assert self._listener is not None
        self._listener.close()
        await asyncio.sleep(0)  # a task that is cancelled before it began would not close its connection
        await self._drop(reset=True)
        for task in (waiting := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.sleep(STEP_S)  # closed transports let go of their sockets a little later

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
        task = self._loop.create_task(self._quietly(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _quietly(self, work: Coroutine[Any, Any, None]) -> None:
        """A broken connection is what this is for; anything else is told when the proxy ends."""
        try:
            with contextlib.suppress(OSError):
                await work
        except Exception as error:
            self._wrong.append(error)

    # --- one connection -------------------------------------------------------------------------
    async def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = await self._loop.sock_accept(listener)
            self.accepted += 1
            if self.reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
                connection.close()
            else:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is sent in two goes out in two
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
            lane.put(self._loop.time() + delay(), b"")  # the end comes after what came before it

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
        """Pass on what comes before the next byte at which something happens. Returns how many bytes."""
        self._fire(link)
        if link.cut is not None:
            return 0
        size = min([len(view), *(at - self._passed for at, _, _ in self._marks)])
        if self._flip_mask:
            view = memoryview(bytes([view[0] ^ self._flip_mask]))
            size, self._flip_mask = 1, 0
        self._count(link, size)  # first: whoever has got a byte may look at the counters
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
        """Do what is due at this byte."""
        due = [mark for mark in self._marks if mark[0] <= self._passed]
        self._marks = [mark for mark in self._marks if mark[0] > self._passed]
        for _, name, act in due:
            self.fired[name] += 1
            act(link)

    async def _cut_off(self, link: Link, cut: Cut, reader: asyncio.StreamReader) -> None:
        """End a connection whose answer was cut: what was passed on arrives first."""
        await arrived(link.client)
        cut.call()
        end(link.server, reset=True)
        if cut.reset:
            return end(link.client, reset=True)
        link.client.write_eof()  # closing while commands lie unread would be a reset
        while await reader.read(READ_BYTES):
            pass

    def _rearranged(self, link: Link, data: bytes) -> bytes:
        """Answers as they go out: replies doubled and swapped as planned."""
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
        """Keep a reply until it is whole, then give what goes out in its place."""
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
        """Wait until the lane may carry so many bytes."""
        if (wait := lane.free_at - self._loop.time()) > 0:
            await asyncio.sleep(wait)
        now = self._loop.time()
        cost = size / bandwidth if bandwidth else 0.0
        if slices:
            lane.free_at = now + max(slices[1], cost)
        else:
            lane.free_at = max(lane.free_at, now - STEP_S) + cost  # what a late wake-up lost is made up for


def _per_step(bandwidth: float | None) -> int:
    return max(1, int(bandwidth * STEP_S)) if bandwidth else READ_BYTES


def _bound(port: int) -> socket.socket:
    """A socket bound to a loopback port (0: a free one) that does not listen yet."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setblocking(False)
    made.bind(("127.0.0.1", port))
    return made
