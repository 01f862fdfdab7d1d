"""One worker process: a model, a page pool, tiers, and a scheduler, behind two pipes.

    python -m kvlab.engine.worker        started by `kvlab.engine.workers`, not by hand

Its first line of input has the settings, every further one a command; every line of output is an event. A line is a
JSON object, so nothing is unpickled, and both ends of both pipes belong to the two processes alone. The worker ends
when its input ends, so it never outlives the process that started it.

    submit, cancel, snapshot, stats    ->    ready, failed, outputs, refused, blocks, snapshot, stats, alive
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, Final

import torch

from kvlab.cache import DistributedKVCache
from kvlab.cache.base import CacheStats
from kvlab.engine.pages import PagePool, PoolExhausted
from kvlab.engine.requests import Busy, Output
from kvlab.engine.scheduler import IDLE_S, Scheduler
from kvlab.engine.tiers import TieredCache
from kvlab.errors import ConfigError, InputError, KVLabError
from kvlab.model import load_model

TICK_S: Final = 0.25
"""How often an idle worker says that it is alive, and the most between two events about its blocks."""
EVENTS_S: Final = 0.02
SHARE: Final = 50
"""Looking which blocks are there takes at most one part in so many of the time; it takes longer with more blocks."""
KEY_BYTES: Final = 8
"""What a router gets of a block's key. Two blocks with the same 8 bytes cost a detour, never a wrong answer."""
Message = dict[str, Any]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker serves, and with which tiers.

    Attributes:
        model: a folder with a Llama; None for the model that ships with the package.
        store: the URL of a server that all workers share (see `kvlab.stores.open_store`); memory:// and fakeredis://
            are one for each worker. Without a store, a worker has its pages and no other tier.
        precision, compress: see `DistributedKVCache`. With less than the model's own precision, an answer depends
            on what was cached, so one that goes on elsewhere after a fault may be another.
        salt, encryption_keys: the tenant's secrets.
        pages: of the page pool, 16 tokens each.
        host_bytes: host memory for blocks, in front of the store.
        tiers: further settings of `TieredCache`.
        prefix_caching: whether pages of earlier requests are used again. A store needs it.
        max_batch, max_step_tokens: see `Scheduler`.
        threads: of PyTorch, in each worker.
    """

    model: str | None = None
    store: str | None = field(default=None, repr=False)  # it may have a password
    precision: str = "fp32"
    compress: bool = False
    salt: str = field(default="", repr=False)
    encryption_keys: Mapping[int, bytes] | None = field(default=None, repr=False)
    pages: int = 1024
    host_bytes: int = 64 << 20
    tiers: Mapping[str, Any] = field(default_factory=dict)
    prefix_caching: bool = True
    max_batch: int = 16
    max_step_tokens: int = 256
    threads: int = 1

    def to_message(self) -> Message:
        """The settings as JSON has them."""
        keys = {str(i): key.hex() for i, key in (self.encryption_keys or {}).items()}
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**values, "tiers": dict(self.tiers), "encryption_keys": keys or None}

    @classmethod
    def from_message(cls, values: Message) -> WorkerSettings:
        """The settings that `to_message` gave."""
        keys = {int(i): bytes.fromhex(key) for i, key in (values["encryption_keys"] or {}).items()}
        return cls(**{**values, "encryption_keys": keys or None})


def build(settings: WorkerSettings, max_waiting: int) -> Scheduler:
    """A scheduler with all that it needs.

    Raises:
        KVLabError: a setting cannot be used.
    """
    if settings.store and not settings.prefix_caching:
        raise ConfigError("expected prefix_caching with a store, got False: what comes from a store is found by prefix")
    torch.set_num_threads(settings.threads)
    model = load_model(settings.model) if settings.model else load_model()
    cache = DistributedKVCache(
        store=settings.store or "memory://",  # without a store, only the namespace is used
        model=model,
        precision=settings.precision,
        compress=settings.compress,
        salt=settings.salt,
        encryption_keys=settings.encryption_keys,
    )
    return Scheduler(
        model,
        PagePool(model, settings.pages, cache.namespace, prefix_caching=settings.prefix_caching),
        TieredCache(cache, settings.host_bytes, **settings.tiers) if settings.store else None,
        max_batch=settings.max_batch,
        max_step_tokens=settings.max_step_tokens,
        max_waiting=max_waiting,
    )


class Worker:
    """Carries out commands between the steps of a scheduler."""

    def __init__(self, scheduler: Scheduler, inbox: BinaryIO, outbox: BinaryIO) -> None:
        assert scheduler.pool.namespace is not None
        self._scheduler, self._cache, self._names = scheduler, scheduler.cache, scheduler.pool.namespace
        self._outbox = outbox
        self._commands: SimpleQueue[Message | None] = SimpleQueue()
        self._known: set[bytes] = set()  # the blocks of the last event
        self._seq = 0
        self._told_at = self._look_at = 0.0
        threading.Thread(target=self._read, args=(inbox,), name="kvlab-inbox", daemon=True).start()

    def run(self) -> None:
        """Work until the input ends."""
        self._tell(
            "ready",
            fingerprint=self._names.fingerprint.hex(),
            block_tokens=self._names.block_tokens,
            eos=list(self._scheduler.model.config.eos_token_ids),
        )
        while self._obey():
            outputs = self._scheduler.step()
            if outputs:
                self._tell("outputs", outputs=[_to_message(output) for output in outputs])
            self._tell_of_blocks()
            if time.monotonic() - self._told_at > TICK_S:
                self._tell("alive", load=self._scheduler.load)
        self._scheduler.close()
        if self._cache is not None:
            self._cache.close()

    def _read(self, inbox: BinaryIO) -> None:
        try:
            for line in inbox:
                self._commands.put(json.loads(line))
        except ValueError:  # half a line, from a process that was killed
            pass
        self._commands.put(None)

    def _obey(self) -> bool:
        """Carry out the commands that have come; wait a little for one if there is nothing to compute."""
        wait_s = 0.0
        if self._scheduler.is_waiting:
            wait_s = IDLE_S if len(self._scheduler) else TICK_S
        while True:
            try:
                command = self._commands.get(timeout=wait_s) if wait_s else self._commands.get_nowait()
            except Empty:
                return True
            if command is None:
                return False
            getattr(self, "_do_" + command.pop("do"))(**command)
            wait_s = 0.0

    def _do_submit(self, id: str, **request: Any) -> None:
        try:
            self._scheduler.submit(id, **request)
        except (Busy, ConfigError, InputError, PoolExhausted) as error:
            self._tell("refused", id=id, error=type(error).__name__, message=str(error))

    def _do_cancel(self, id: str) -> None:
        self._scheduler.cancel(id)

    def _do_snapshot(self) -> None:
        self._known = self._near()
        self._tell("snapshot", seq=self._seq, keys=[key.hex() for key in self._known])

    def _do_stats(self, number: int) -> None:
        pool = self._scheduler.pool
        self._tell(
            "stats",
            number=number,
            stats={
                "cache": vars(self._cache.stats() if self._cache is not None else CacheStats()),
                "scheduler": dict(self._scheduler.counts),
                "pool": {"blocks": dict(pool.counts), "pages": len(pool.refs), "free": pool.free.total}
                | {"tables": len(pool.tables), "idle": pool.index.idle},
                "requests": len(self._scheduler),
            },
        )

    def _tell_of_blocks(self) -> None:
        """What came to the device or to host memory, and what left both, since the last event."""
        now = time.monotonic()
        if now < self._look_at:
            return
        near = self._near()
        self._look_at = time.monotonic() + max(EVENTS_S, SHARE * (time.monotonic() - now))
        if near != self._known:
            self._seq += 1
            added, removed = near - self._known, self._known - near
            self._known = near
            self._tell("blocks", seq=self._seq, added=[k.hex() for k in added], removed=[k.hex() for k in removed])

    def _near(self) -> set[bytes]:
        in_host = self._cache.host.keys() if self._cache is not None else ()
        return {key[:KEY_BYTES] for key in (*self._scheduler.pool.index.blocks, *in_host)}

    def _tell(self, event: str, **content: Any) -> None:
        self._outbox.write(json.dumps({"is": event, **content}).encode() + b"\n")
        self._outbox.flush()
        self._told_at = time.monotonic()


def _to_message(output: Output) -> Message:
    return {**vars(output), "record": None if output.record is None else vars(output.record)}


def _start_metrics(scheduler: Scheduler, port: int, address: str, required: bool) -> None:
    """Answer scrapes. A worker that was started in place of another one serves even if it cannot."""
    try:
        from kvlab.engine.metrics import start_metrics

        start_metrics(scheduler, port, address)
    except ConfigError as error:
        if required:
            raise
        logger.error("this worker has no metrics: %s", error)


def main() -> None:
    """Be a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started it
    inbox = os.fdopen(os.dup(0), "rb")
    outbox = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no event
    sys.stdin.close()
    first = json.loads(inbox.readline())
    try:
        scheduler = build(WorkerSettings.from_message(first["settings"]), first["max_waiting"])
        if "metrics" in first:
            _start_metrics(scheduler, **first["metrics"])
    except Exception as error:
        message = str(error) if isinstance(error, KVLabError) else f"{type(error).__name__}: {error}"
        outbox.write(json.dumps({"is": "failed", "message": message}).encode() + b"\n")
        outbox.flush()
        raise SystemExit(1) from None
    try:
        Worker(scheduler, inbox, outbox).run()
    except BrokenPipeError:  # nobody is there any more
        os._exit(0)


if __name__ == "__main__":
    main()
