"""Blocks on their way into the KV of one request.

Blocks of the host tier are copied at once. Blocks of the store come in windows, and three stages work on different
windows at the same time, in threads of their own, while the engine computes:

    fetch    records of window 2 | records of window 3 | …
    unpack                       | check, decompress 2 | …
    copy                         | window 2 into host memory and pages | …

The engine collects what is there with `finish`, once, and computes the rest. A block that arrives later goes into
host memory only: the engine may be computing those pages by then.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Final

import torch
from torch import Tensor

from kvlab.cache.distributed import DistributedKVCache
from kvlab.core.precisions import Array, Unholdable, from_parts
from kvlab.engine.host import HostBlocks
from kvlab.stores.deadline import BYTES_PER_S
from kvlab.stores.faults import Reason
from kvlab.stores.latch import Latch
from kvlab.stores.workers import Job, Workers

READERS: Final = 4  # requests that fetch at the same time; more wait
UNPACKERS: Final = 2
logger = logging.getLogger(__name__)
_WELL = {Reason.ABSENT, Reason.TOO_BIG}  # the store is well; what is missing in one window says nothing of the next


@dataclass(frozen=True)
class Span:
    """When a stage worked on a window. `begin` and `end` are seconds of the clock."""

    stage: str
    window: int
    begin: float
    end: float


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
        self._spare.append(memoryview(buffers[0].obj))


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
        self.buffers = Buffers(pinned)
        self.readers, self.unpackers = Workers(READERS, "kvlab-fetch"), Workers(UNPACKERS, "kvlab-unpack")
        self.measured: SimpleQueue[tuple[str, int, float]] = SimpleQueue()

    def keep(self, key: bytes, parts: Sequence[Array], dirty: bool = False) -> None:
        """Copy a block into host memory. Dirty blocks that it displaces go to the store, if that lacks them."""
        self.write_back(self.host.put(key, parts, dirty))

    def write_back(self, blocks: Sequence[tuple[bytes, list[Array]]]) -> None:
        """Write blocks that the store lacks."""
        if blocks:
            there = self.store.present([key for key, _ in blocks])
            missing = [block for block, stored in zip(blocks, there, strict=True) if not stored]
            self.store.write([key for key, _ in missing], [parts for _, parts in missing])


class Fetch:
    """A load of some blocks that has begun.

    Args:
        outer: the tiers that have them.
        keys, where: the blocks, and the tier of each.
        outs: where each block goes, [L, P, H, B, D], any strides.

    Attributes:
        filled: which blocks are in their place.
        reasons: why a block is not, as far as that is known; "" else.
        trace: what the stages did, when.
    """

    def __init__(self, outer: Outer, keys: Sequence[bytes], where: Sequence[str], outs: Sequence[Tensor]) -> None:
        self.keys, self.where, self.outs = keys, where, outs
        self.filled = [False] * len(keys)
        self.reasons = [""] * len(keys)
        self.trace: list[Span] = []
        self._outer = outer
        self._lock = threading.Lock()
        self._ended = False
        self._done = Latch()
        self._borrowed: list[bytes] = []
        self._copies = _Copies(outs[0].device if outs else torch.device("cpu"))
        self._begin = outer.clock()
        in_store = [i for i, tier in enumerate(where) if tier == "store"]
        self._windows = [in_store[at : at + outer.window] for at in range(0, len(in_store), outer.window)]
        self._unpacked = [Latch() for _ in self._windows]
        self._under_way = len(self._windows)
        self._delivered = 0
        self.limit_s = outer.store.store.deadline_s + len(in_store) * outer.store.record_bytes / BYTES_PER_S
        if self._windows:
            _run(outer.readers, self._read)
        self._copy_from_host([i for i, tier in enumerate(where) if tier == "host"])

    def finish(self, wait_s: float | None = None) -> list[bool]:
        """Wait until all blocks are there, at most until `wait_s` after the begin; return which are.

        Whatever `wait_s` says, a load of many windows has the deadline of one call of the store.
        """
        remaining = min(self.limit_s, math.inf if wait_s is None else wait_s) - (self._outer.clock() - self._begin)
        if self._windows:
            self._done.wait(None if remaining == math.inf else max(0.0, remaining))
        with self._lock:
            self._ended = True
            filled = list(self.filled)
        self._copies.wait()
        self._outer.host.give_back(self._borrowed)
        self._borrowed = []
        return filled

    def _copy_from_host(self, numbers: Sequence[int]) -> None:
        begin = self._outer.clock()
        for i in numbers:
            parts = self._outer.host.borrow(self.keys[i])
            if parts is None:
                self.reasons[i] = Reason.ABSENT
                continue
            self._borrowed.append(self.keys[i])
            self._place(i, parts)
        if numbers:
            self._copies.wait()
            end = self._outer.clock()
            self.trace.append(Span("copy", -1, begin, end))
            self._outer.measured.put(("host", len(numbers), end - begin))

    def _place(self, i: int, parts: list[Array]) -> None:
        """Copy a block into its place, unless the engine computes there by now."""
        with self._lock:
            if self._ended:
                return
            try:
                with self._copies:
                    from_parts(parts, self._outer.store.precision, 1, self.outs[i])
                self.filled[i] = True
            except Unholdable:
                self.reasons[i] = Reason.OVERFLOW

    # --- the threads ----------------------------------------------------------------------------
    def _read(self) -> None:
        """Fetch window after window, at most one more than is unpacked."""
        outer, window = self._outer, 0
        try:
            for window, numbers in enumerate(self._windows):
                if window > 1:
                    self._unpacked[window - 2].wait()
                if (self._ended and self.outs) or outer.clock() - self._begin > self.limit_s:
                    return self._skip(window, Reason.LATE)
                keys, reasons = [self.keys[i] for i in numbers], list[str]()
                buffers = outer.buffers.take(len(keys), outer.store.record_bytes)
                begin = outer.clock()
                values = outer.store.store.get_many(keys, buffers, reasons)
                self.trace.append(Span("fetch", window, begin, outer.clock()))
                _run(outer.unpackers, partial(self._unpack, window, values, reasons, buffers))
                failed = next((reason for reason in reasons if reason and reason not in _WELL), "")
                if failed:
                    return self._skip(window + 1, failed)
        except Exception:  # a thread must go on, and the engine must not wait for ever
            logger.exception("a fetch failed")
            self._skip(window, Reason.ERROR)

    def _unpack(self, window: int, values: Sequence[Any], reasons: Sequence[str], buffers: list[memoryview]) -> None:
        outer, begin = self._outer, self._outer.clock()
        try:
            for i, value, reason in zip(self._windows[window], values, reasons, strict=True):
                parts, self.reasons[i] = outer.store.unpack(self.keys[i], value, reason)
                if not parts:
                    continue
                self._place(i, parts)
                self._delivered += 1
                if outer.promote:
                    outer.keep(self.keys[i], parts)
            self._copies.wait()
        except Exception:
            logger.exception("unpacking failed")
        outer.buffers.put(buffers)
        self.trace.append(Span("unpack", window, begin, outer.clock()))
        self._end(window)

    def _skip(self, window: int, reason: str) -> None:
        for later, numbers in enumerate(self._windows[window:], window):
            for i in numbers:
                self.reasons[i] = self.reasons[i] or reason
            self._end(later)

    def _end(self, window: int) -> None:
        """Note that nothing more comes from a window."""
        self._unpacked[window].set()
        with self._lock:
            self._under_way -= 1
            if self._under_way:
                return
        if self._delivered:
            self._outer.measured.put(("store", self._delivered, self._outer.clock() - self._begin))
        self._done.set()


class _Copies:
    """Copies into the memory of a device. On a GPU they are in a stream of their own, beside its computing."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # earlier work may use the same pages
        self._entered: Any = None

    def __enter__(self) -> None:
        if self._stream is not None:
            self._entered = torch.cuda.stream(self._stream)
            self._entered.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._entered is not None:
            self._entered.__exit__(*error)
            self._entered = None

    def wait(self) -> None:
        """Wait until all copies are done."""
        if self._stream is not None:
            self._stream.synchronize()


def _run(workers: Workers, job: Job) -> None:
    """Run a job in a thread; here, if there can be no other thread."""
    try:
        workers.submit(job)
    except RuntimeError:
        job()
