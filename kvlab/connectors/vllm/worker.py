"""The worker's half: moves blocks between the KV cache of the engine and the store.

Threads fetch and verify records. Only the thread of the engine touches the KV cache, between two forward passes:
a block is copied in when it was verified, and copied out when the step that filled it has ended. Writes leave
through a queue (`kvlab.stores.WriteBehind`), so no block of the engine is held.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger

from kvlab.connectors.shadow import Shadow
from kvlab.connectors.vllm.namespace import Layout, block_key
from kvlab.connectors.vllm.protocol import Blocks, Failures, Work
from kvlab.connectors.vllm.stats import Counters
from kvlab.core import record
from kvlab.core.precisions import Array
from kvlab.core.record import BadRecord, Format
from kvlab.stores import Store
from kvlab.stores.faults import Reason
from kvlab.stores.workers import Workers

WINDOW_BYTES = 4 << 20  # of the records that one call fetches; several calls run at the same time
THREADS = 4
FETCHED_BYTES = 256 << 20  # of records that were fetched and not copied yet
COUNT_EVERY_S = 1.0
IDLE_S = 0.005  # that a step without requests waits for blocks; a busy engine would keep the threads from running
logger = init_logger("vllm.kvlab.worker")
_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32}  # torch has few operations for unsigned integers


@dataclass
class Window:
    """Blocks that one call fetches, and what became of them.

    Attributes:
        computed: in shadow mode, the elements to compare with; nothing is loaded.
        elements, reasons: of each block, the verified elements, or the reason why there are none.
        compared, different: the results of shadow mode, in blocks.
        nbytes: of the fetched records.
        seconds: what fetching and verifying took.
        room: the buffer that the elements are in.
    """

    space: bytes
    blocks: Blocks
    computed: Array | None = None
    elements: list[Array | None] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    compared: int = 0
    different: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    room: bytearray = field(default_factory=bytearray)


class WorkerSide:
    """See the text of this module.

    Args:
        store: records are read from it.
        queue: records are written to it.
        fmt: how blocks are written.
        tensors: the KV cache, by layer, [blocks, …]; the order is that of the layout.
        rank: the worker's.
    """

    def __init__(
        self,
        store: Store,
        queue: Store,
        fmt: Format,
        layout: Layout,
        tensors: Sequence[Tensor],
        rank: int,
        shadow: Shadow,
    ) -> None:
        self.store, self.queue, self.shadow = store, queue, shadow
        self.format, self.layout, self.rank = fmt, layout, rank
        self.counters = Counters()
        self._tensors = list(tensors)
        record_bytes = record.max_record_bytes(fmt, layout.shape, record.KIND_ENGINE)
        self._window = max(1, WINDOW_BYTES // record_bytes)
        self._record_bytes = record_bytes
        self._threads = Workers(THREADS, "kvlab-load")
        self._rooms = threading.Semaphore(max(1, FETCHED_BYTES // (self._window * record_bytes)))
        self._free: list[bytearray] = []  # buffers of a window; new memory causes page faults
        self._fetched: SimpleQueue[Window] = SimpleQueue()
        self._pending: Counter[str] = Counter()  # windows by request
        self._bad_ids: set[int] = set()
        self._failures = Failures()
        self._drops: Counter[str] = Counter()
        self._counted_at = 0.0
        self._closed = False

    # --- calls of the engine, in the order of a step ----------------------------------------------------------------
    def start_loads(self, work: Work) -> None:
        """Start to fetch blocks in the background."""
        for blocks in work.loads:
            for part in _windows(blocks, self._window):
                self._pending[blocks.request] += 1
                self._start(Window(work.space, part))

    def save(self, work: Work) -> None:
        """Copy blocks out of the KV cache and queue them to be written, or fetch what they are compared with."""
        if not (work.saves or work.checks):
            return
        begin = time.perf_counter()
        for blocks in work.saves:
            for part in _windows(blocks, self._window):
                keys = self._keys(work.space, part)
                elements = self._copy_out(part.ids)
                values = [record.encode_opaque(e, k, self.format) for e, k in zip(elements, keys, strict=True)]
                queued = self.queue.put_many(keys, values)
                self.counters.add(saved_blocks=queued, saved_bytes=sum(len(p) for v in values for p in v))
        for blocks in work.checks:
            for part in _windows(blocks, self._window):
                self._start(Window(work.space, part, self._copy_out(part.ids)))
        self.counters.add(copy_seconds=time.perf_counter() - begin)

    def finished(self, idle: bool = False) -> set[str]:
        """Copy what was fetched into the KV cache. Return the requests whose blocks have all come, or failed.

        Args:
            idle: wait a moment for the next blocks, because the engine has nothing else to do.
        """
        done: set[str] = set()
        while True:
            try:
                wait = idle and self._pending and not done
                window = self._fetched.get(timeout=IDLE_S) if wait else self._fetched.get_nowait()
            except Empty:
                return done
            name = window.blocks.request
            if window.computed is not None:
                self.counters.add(shadow_blocks=window.compared, shadow_different=window.different)
                for reason in filter(None, window.reasons):
                    self.counters.count("failed_blocks", reason)
            else:
                self._copy_in(window)
                self._pending[name] -= 1
                if not self._pending[name]:
                    del self._pending[name]
                    done.add(name)
            self._free.append(window.room)
            self._rooms.release()

    def take_bad_ids(self) -> set[int]:
        """Return the blocks of the KV cache that were not loaded, since the last call."""
        bad, self._bad_ids = self._bad_ids, set()
        return bad

    def take_failures(self) -> Failures | None:
        """Return the blocks that failed and why, since the last call."""
        failures, self._failures = self._failures, Failures()
        return failures if failures.blocks else None

    def take_counters(self) -> Counters | None:
        """Return what was counted since the last call; writes that were dropped are counted each second."""
        now = time.monotonic()
        if now - self._counted_at >= COUNT_EVERY_S:
            self._counted_at, before, self._drops = now, self._drops, self.queue.stats().drops
            for reason, count in (self._drops - before).items():
                self.counters.count("dropped_blocks", reason, count)
        return self.counters.take()

    def close(self) -> None:
        """Write what is queued, and close the stores."""
        self._closed = True
        self._rooms.release(THREADS)  # no thread waits for a copy that never comes
        self.queue.close()
        self.store.close()

    # --- in the background ------------------------------------------------------------------------------------------
    def _start(self, window: Window) -> None:
        self._threads.submit(lambda: self._fetch(window))

    def _fetch(self, window: Window) -> None:
        self._rooms.acquire()
        if self._closed:
            self._rooms.release()
            return
        begin = time.perf_counter()
        try:
            self._fetch_verified(window)
            if window.computed is not None:
                self._compare(window)
        except Exception:  # a request must not wait for ever because a thread ended
            logger.exception("a load failed")
            window.room = window.room or bytearray(self._window * self._record_bytes)
            window.elements = [None] * len(window.blocks.ids)
            window.reasons = [Reason.ERROR] * len(window.blocks.ids)
        window.seconds = time.perf_counter() - begin
        self._fetched.put(window)

    def _fetch_verified(self, window: Window) -> None:
        keys = self._keys(window.space, window.blocks)
        size = self._record_bytes
        reasons: list[str] = []
        try:
            window.room = self._free.pop()
        except IndexError:
            window.room = bytearray(self._window * size)
        room = memoryview(window.room)
        values = self.store.get_many(keys, [room[i * size : (i + 1) * size] for i in range(len(keys))], reasons)
        elements_of: list[Array | None] = []
        for i, (key, value) in enumerate(zip(keys, values, strict=True)):
            elements = None
            if value is not None:
                window.nbytes += len(value)
                try:
                    elements = record.decode_opaque(value, key, self.format, self.layout.shape)
                except BadRecord as error:
                    reasons[i] = error.reason
                    if error.damaged:  # other bad records may be good to other readers
                        self.store.delete_many([key])
            elements_of.append(elements)
        window.elements, window.reasons = elements_of, reasons

    def _compare(self, window: Window) -> None:
        assert window.computed is not None
        dtype = getattr(torch, self.layout.dtype)
        for stored, computed, name in zip(window.elements, window.computed, window.blocks.hashes, strict=True):
            if stored is None:  # it is missing or damaged, and what was computed is right
                key = block_key(window.space, name, window.blocks.adapter, self.rank)
                self.queue.put_many([key], [record.encode_opaque(computed, key, self.format)])
            else:
                one, other = [
                    torch.from_numpy(a.view(_SIGNED[a.itemsize]).copy()).view(dtype) for a in (stored, computed)
                ]
                agree = self.shadow.compare(one, other, f"block {name.hex()[:16]} of request {window.blocks.request}")
                window.compared += 1
                window.different += not agree

    # --- the KV cache -----------------------------------------------------------------------------------------------
    def _keys(self, space: bytes, blocks: Blocks) -> list[bytes]:
        return [block_key(space, block_hash, blocks.adapter, self.rank) for block_hash in blocks.hashes]

    def _copy_out(self, ids: Sequence[int]) -> Array:
        """Return the elements of blocks, [blocks, layers, elements], as unsigned integers."""
        index = torch.tensor(ids, device=self._tensors[0].device)
        width = self._tensors[0].element_size()
        whole = torch.stack([tensor[index].flatten(1) for tensor in self._tensors], 1).cpu()
        signed = whole.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[width]).numpy()
        return signed.view(f"<u{width}")

    def _copy_in(self, window: Window) -> None:
        """Copy verified blocks into the KV cache, and take note of the others."""
        begin = time.perf_counter()
        good = {i: elements for i, elements in enumerate(window.elements) if elements is not None}
        if good:
            whole = np.stack(list(good.values()))
            source = torch.from_numpy(whole.view(_SIGNED[whole.itemsize])).view(self._tensors[0].dtype)
            index = torch.tensor([window.blocks.ids[i] for i in good], device=self._tensors[0].device)
            source = source.to(self._tensors[0].device)
            for layer, tensor in enumerate(self._tensors):
                tensor[index] = source[:, layer].reshape(-1, *tensor.shape[1:])
        for i, elements in enumerate(window.elements):
            if elements is None:
                reason = window.reasons[i]
                self._bad_ids.add(window.blocks.ids[i])
                self._failures.blocks.setdefault(window.blocks.request, {})[window.blocks.hashes[i]] = reason
                self.counters.count("failed_blocks", reason)
        self.counters.add(
            loaded_blocks=len(good),
            loaded_bytes=window.nbytes,
            load_seconds=window.seconds,
            copy_seconds=time.perf_counter() - begin,
        )


def _windows(blocks: Blocks, size: int) -> list[Blocks]:
    """Divide blocks into parts of at most `size`."""
    return [
        Blocks(blocks.request, blocks.adapter, blocks.hashes[at : at + size], blocks.ids[at : at + size])
        for at in range(0, len(blocks.ids), size)
    ]
