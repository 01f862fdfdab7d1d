"""Blocks on their way into the KV of one request.

Blocks of the host tier are copied at once. Blocks of the store come in windows, and three stages work on different
windows at the same time:

    fetch    window 1 | window 2 | window 3 | …         receive records              a thread
    unpack            | window 1 | window 2 | …         check, decompress, promote   another thread
    copy                         | window 1 | …         into the pages               the engine, in `finish`

The engine computes before it copies, if there is something to compute. So nobody else writes its pages, and all
work of torch is done in its thread. A block that arrives after the end goes into host memory only.

On a GPU the copies run in streams of their own (`Lane`). The engine starts those of a window and waits for those of
the window before, so that the GPU always has the next copy. Two lanes take turns: while one window comes over the bus,
the one before it is converted and put into the pages.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Final, Self

import torch
from torch import Tensor

from kvlab.cache.distributed import DistributedKVCache
from kvlab.core.precisions import Array, Unholdable, from_parts
from kvlab.engine.host import HostBlocks
from kvlab.stores.deadline import BYTES_PER_S
from kvlab.stores.faults import Reason
from kvlab.stores.latch import Latch
from kvlab.stores.workers import Job, Workers

READERS: Final = 32  # requests that fetch at the same time; more wait. A store bounds its connections itself
UNPACKERS: Final = 2
AHEAD_BYTES: Final = 64 << 20
MEASURED: Final = 256
LANES: Final = 2
logger = logging.getLogger(__name__)
_WELL = {Reason.ABSENT, Reason.TOO_BIG}  # the store is well; what is missing in one window says nothing of the next


@dataclass(frozen=True)
class Span:
    """When a stage worked on a window. `begin` and `end` are seconds of the clock."""

    stage: str
    window: int
    begin: float
    end: float


Parts = tuple[int, list[Array]]
"""The number of a block in a fetch, and its parts."""


class Buffers:
    """Memory for the records of windows. It is used again and again, because new memory costs page faults."""

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._spare: list[memoryview] = []  # appending and popping are single steps of the interpreter

    def take(self, count: int, size: int) -> list[memoryview]:
        """Return `count` buffers of `size` bytes, cut from one piece of memory."""
        whole = self._spare.pop() if self._spare else memoryview(b"")
        if len(whole) < count * size:
            memory = torch.empty(count * size, dtype=torch.uint8, pin_memory=self._pinned)
            whole = memoryview(memory.numpy())  # type: ignore[arg-type]
        return [whole[i * size : (i + 1) * size] for i in range(count)]

    def put(self, buffers: list[memoryview]) -> None:
        """Give buffers back, from which nothing is read any more."""
        if buffers:
            self._spare.append(memoryview(buffers[0].obj))


class Lane:
    """A stream of a GPU: what is started inside of it runs beside what the GPU computes. A context manager."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def __enter__(self) -> None:
        self._context = torch.cuda.stream(self._stream)
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def follow(self) -> None:
        """Start nothing before all that was started outside has ended: earlier work may use the same pages."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def mark(self) -> Callable[[], object]:
        """Return a function that waits until all that was started here so far has ended."""
        event = self._stream.record_event()
        return lambda: event.synchronize()

    def wait(self) -> None:
        """Wait until nothing runs here."""
        self._stream.synchronize()


class Lanes:
    """Lanes that are used again and again: torch gives each stream memory of its own, and new memory stops the GPU."""

    def __init__(self) -> None:
        self._idle: dict[torch.device, list[list[Lane]]] = {}  # appending and popping are single steps

    def take(self, device: torch.device) -> list[Lane]:
        """Return lanes for one fetch into a device; none for a CPU, where every copy ends at once."""
        if device.type != "cuda":
            return []
        idle = self._idle.setdefault(device, [])
        try:
            return idle.pop()
        except IndexError:
            return [Lane(device) for _ in range(LANES)]

    def put(self, device: torch.device, lanes: list[Lane]) -> None:
        """Give lanes back, in which nothing runs."""
        self._idle.setdefault(device, []).append(lanes)


class Outer:
    """The tiers outside the device, and what all fetches from them share.

    Args:
        promote: whether what comes from the store is kept in host memory.
        window_bytes: of the records of a window.
        clock: returns seconds.

    Attributes:
        measured: the tier, the number of blocks and the seconds of each fetch that has ended.
    """

    def __init__(
        self,
        host: HostBlocks,
        store: DistributedKVCache,
        promote: bool,
        window_bytes: int,
        clock: Callable[[], float],
        pinned: bool,
    ) -> None:
        self.host, self.store, self.promote, self.clock = host, store, promote, clock
        self.window = max(1, window_bytes // store.record_bytes)
        self.ahead = max(2, AHEAD_BYTES // (self.window * store.record_bytes))  # fetched before the first is copied
        self.buffers, self.lanes = Buffers(pinned), Lanes()
        self.readers, self.unpackers = Workers(READERS, "kvlab-fetch"), Workers(UNPACKERS, "kvlab-unpack")
        self.measured: deque[tuple[str, int, float]] = deque(maxlen=MEASURED)  # append and popleft are single steps

    def keep(self, key: bytes, parts: Sequence[Array], dirty: bool = False) -> None:
        """Copy a block into host memory. Dirty blocks that it displaces go to the store, if that lacks them."""
        self.write_back(self.host.put(key, parts, dirty))

    def write_back(self, blocks: Sequence[tuple[bytes, list[Array]]]) -> bool:
        """Write blocks that the store lacks; return whether it took them all."""
        if not blocks:
            return True
        there = self.store.present([key for key, _ in blocks])
        missing = [block for block, stored in zip(blocks, there, strict=True) if not stored]
        return self.store.write([key for key, _ in missing], [parts for _, parts in missing]) == len(missing)


class Fetch:
    """A load of some blocks that has begun.

    Args:
        outer: the tiers that have them.
        keys, where: the blocks, and the tier of each.
        outs: where each block goes, [L, P, H, B, D], any strides.
        alone: nobody will call `finish`; it is only to measure, and for host memory.

    It is a context manager that ends the fetch on exit, also if `finish` was not reached.

    Attributes:
        filled: which blocks are in their place, once the fetch has ended.
        reasons: why a block is not, as far as that is known; "" else.
        trace: what the stages did, when.
        load_s: once `finish` has returned, the seconds that this load took: what the engine computed meanwhile is not
            in them, but if blocks are missing, all that it waited is.
    """

    def __init__(
        self, outer: Outer, keys: Sequence[bytes], where: Sequence[str], outs: Sequence[Tensor], alone: bool = False
    ) -> None:
        self.keys, self.where, self.outs = keys, where, outs
        self.filled = [False] * len(keys)
        self.reasons = [""] * len(keys)
        self.trace: list[Span] = []
        self._outer, self._alone = outer, alone
        self._begin = outer.clock()
        in_store = [i for i, tier in enumerate(where) if tier == "store"]
        self._windows = [in_store[at : at + outer.window] for at in range(0, len(in_store), outer.window)]
        self._unpacked: SimpleQueue[tuple[int, list[Parts], list[memoryview]]] = SimpleQueue()
        self._room = [Latch() for _ in self._windows]  # set when the engine is done with a window
        self._received: list[int] = []  # blocks that were unpacked, by window; appending is a single step
        self._received_s = 0.0  # when the last window was unpacked
        self._copied = 0  # windows
        self.load_s = 0.0
        self._ended = False
        self.limit_s = outer.store.store.deadline_s + len(in_store) * outer.store.record_bytes / BYTES_PER_S
        self._device = outs[0].device if outs else torch.device("cpu")
        self._lanes = outer.lanes.take(self._device)
        self._landing: deque[tuple[int, list[memoryview], Callable[[], object] | None]] = deque()
        self._borrowed: list[bytes] = []
        try:
            for lane in self._lanes:
                lane.follow()
            found = self._borrow([i for i, tier in enumerate(where) if tier == "host"])
            if self._windows:  # now that what comes from the store cannot displace a block that is needed
                self._start()
            self._copy_from_host(found)
        except BaseException:
            self.end()
            raise
        finally:
            outer.host.give_back(self._borrowed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    # --- the engine's thread --------------------------------------------------------------------
    def finish(self, wait_s: float | None = None) -> list[bool]:
        """Copy what has come and what comes, until all is there or `wait_s` after the begin; return which blocks are.

        Whatever `wait_s` says, a load of many windows has the deadline of one call of the store.
        """
        try:
            while not self._ended and self._copied < len(self._windows):
                remaining = self._remaining_s(wait_s)
                try:
                    item = self._unpacked.get(timeout=None if remaining == math.inf else max(0.0, remaining))
                except Empty:
                    return self.filled
                self._take(*item)
            if not self._ended:
                self._land()
                copies = [span for span in self.trace if span.stage == "copy" and span.window >= 0]
                self._measure(sum(span.end - span.begin for span in copies))
        finally:
            self._note_load()
            self.end()
        return self.filled

    def poll(self, wait_s: float | None = None) -> bool:
        """Copy what has come, without waiting; return whether `finish` would not wait either."""
        while not self._ended and self._copied < len(self._windows):
            try:
                self._take(*self._unpacked.get_nowait())
            except Empty:
                return self._remaining_s(wait_s) <= 0
        return True

    def _remaining_s(self, wait_s: float | None) -> float:
        """Seconds until it is too late."""
        limit = min(self.limit_s, math.inf if wait_s is None else wait_s)
        return limit if limit == math.inf else limit - (self._outer.clock() - self._begin)

    def _take(self, window: int, blocks: list[Parts], buffers: list[memoryview]) -> None:
        """Copy a window that was unpacked. On a GPU, that has begun then."""
        arrived = self._copy(window, blocks)
        self._landing.append((window, buffers, arrived))
        self._land(leave=1 if arrived else 0)
        self._copied += 1

    def _land(self, leave: int = 0) -> None:
        """Wait until all windows but the last ones are in their places; from then on their buffers are free."""
        while len(self._landing) > leave:
            window, buffers, arrived = self._landing.popleft()
            if arrived is not None:
                begin = self._outer.clock()
                arrived()
                self.trace.append(Span("copy", window, begin, self._outer.clock()))
            self._outer.buffers.put(buffers)
            self._room[window].set()

    def end(self) -> None:
        """Wait for nothing more from the store. A window that is on its way goes into host memory; later ones are not
        fetched. Copies that have begun end: from now on, others may use the places and the buffers.
        """
        self._ended = True
        try:
            for lane in self._lanes:
                lane.wait()
            self._land()
            lanes, self._lanes = self._lanes, []
            if lanes:
                self._outer.lanes.put(self._device, lanes)
        finally:
            for latch in self._room:
                latch.set()

    def _measure(self, copying_s: float) -> None:
        """Report how long it took until the last window was unpacked, and copying."""
        if blocks := sum(self._received):
            self._outer.measured.append(("store", blocks, self._received_s + copying_s))

    def _note_load(self) -> None:
        waited = self._outer.clock() - self._begin
        copies = sum(s.end - s.begin for s in self.trace if s.stage == "copy" and (s.window >= 0 or not self._windows))
        self.load_s = min(waited, self._received_s + copies) if all(self.filled) else waited

    def _borrow(self, numbers: Sequence[int]) -> list[Parts]:
        """Return the blocks of the host tier that are still there."""
        found = []
        for i in numbers:
            parts = self._outer.host.borrow(self.keys[i])
            self.reasons[i] = Reason.ABSENT if parts is None else ""
            if parts is not None:
                self._borrowed.append(self.keys[i])
                found.append((i, parts))
        return found

    def _copy_from_host(self, found: Sequence[Parts]) -> None:
        """Copy blocks of the host tier into their places."""
        begin = self._outer.clock()
        together = self._outer.window if self._lanes else max(1, len(found))  # lanes take turns
        for at in range(0, len(found), together):
            self._copy(-1, found[at : at + together])
        if found and self._lanes:
            waiting = self._outer.clock()
            for lane in self._lanes:
                lane.wait()
            self.trace.append(Span("copy", -1, waiting, self._outer.clock()))
        if found:
            self._outer.measured.append(("host", len(found), self._outer.clock() - begin))

    def _copy(self, window: int, blocks: Sequence[Parts]) -> Callable[[], object] | None:
        """Copy blocks into their places. On a GPU, begin to, and return what waits until they are there."""
        begin = self._outer.clock()
        lane = self._lanes[0] if self._lanes else None
        self._lanes.reverse()
        with lane or nullcontext():
            for i, parts in blocks:
                try:
                    from_parts(parts, self._outer.store.precision, 1, self.outs[i])
                    self.filled[i] = True
                except Unholdable:
                    self.reasons[i] = Reason.OVERFLOW
        if blocks:
            self.trace.append(Span("copy", window, begin, self._outer.clock()))
        return lane.mark() if lane else None

    # --- the other threads ----------------------------------------------------------------------
    def _start(self) -> None:
        try:
            self._outer.readers.submit(self._read)
        except RuntimeError:  # there is no thread, and this one must not wait for itself
            self._ended = True
            self._skip(0, Reason.ERROR)

    def _read(self) -> None:
        """Fetch window after window, until the engine stops waiting or the store fails."""
        outer, window = self._outer, 0
        try:
            for window, numbers in enumerate(self._windows):
                if window >= outer.ahead and not self._alone:
                    self._room[window - outer.ahead].wait()
                if self._ended or outer.clock() - self._begin > self.limit_s:
                    return self._skip(window, Reason.LATE)
                keys, reasons = [self.keys[i] for i in numbers], list[str]()
                buffers = outer.buffers.take(len(keys), outer.store.record_bytes)
                begin = outer.clock()
                values = outer.store.store.get_many(keys, buffers, reasons)
                self.trace.append(Span("fetch", window, begin, outer.clock()))
                unpack = partial(self._unpack, window, values, reasons, buffers)
                if window + 1 < len(self._windows):
                    _run(outer.unpackers, _Once(unpack))
                else:  # there is nothing more to fetch meanwhile
                    unpack()
                failed = next((reason for reason in reasons if reason and reason not in _WELL), "")
                if failed:
                    return self._skip(window + 1, failed)
        except Exception:  # the thread must go on, and the engine must not wait for ever
            logger.exception("a fetch failed")
            self._skip(window, Reason.ERROR)

    def _unpack(self, window: int, values: Sequence[Any], reasons: Sequence[str], buffers: list[memoryview]) -> None:
        outer, begin = self._outer, self._outer.clock()
        blocks: list[Parts] = []
        try:
            for i, value, reason in zip(self._windows[window], values, reasons, strict=True):
                parts, self.reasons[i] = outer.store.unpack(self.keys[i], value, reason)
                if not parts:
                    continue
                blocks.append((i, parts))
                if outer.promote:
                    outer.keep(self.keys[i], parts)
        except Exception:
            logger.exception("unpacking failed")
            for i in self._windows[window]:
                self.reasons[i] = self.reasons[i] or Reason.ERROR
        self._received.append(len(blocks))
        self._received_s = outer.clock() - self._begin
        self.trace.append(Span("unpack", window, begin, outer.clock()))
        if self._ended or self._alone:  # the planner must learn how slow this store is
            self._measure(0.0)
        self._unpacked.put((window, blocks, buffers))

    def _skip(self, first: int, reason: str) -> None:
        """Give up all windows from one on."""
        for window, numbers in enumerate(self._windows[first:], first):
            for i in numbers:
                self.reasons[i] = reason
            self._unpacked.put((window, [], []))


class _Once:
    """A job that runs at most once: `Workers.submit` may raise and run it later all the same."""

    def __init__(self, job: Job) -> None:
        self._jobs = [job]

    def __call__(self) -> None:
        if self._jobs:
            self._jobs.pop()()


def _run(workers: Workers, job: _Once) -> None:
    """Run a job in a thread; here, if there can be no other thread."""
    try:
        workers.submit(job)
    except RuntimeError:
        job()
