"""What one Ray Serve replica runs: a scheduler over the store that all replicas share.

The class does not depend on Ray. Ray Serve finds the methods `check_health`, `record_routing_stats` and
`record_replica_metadata` by their names, and calls `__del__` when it stops a replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from typing import Any, Final

from kvlab.engine.requests import Record
from kvlab.engine.worker import KEY_BYTES, WorkerSettings, build
from kvlab.engine.workers import WorkerError
from kvlab.serve.thread import Part, SchedulerThread

MOST_KEYS: Final = 4096
"""Of the blocks that a replica reports: all routers get them about once a second."""


class Replica:
    """One scheduler, and the tiers behind it.

    Args:
        settings: see `WorkerSettings.to_message`.
        max_waiting: see `Scheduler`.
    """

    def __init__(self, settings: dict[str, Any], max_waiting: int) -> None:
        self.scheduler = build(WorkerSettings.from_message(settings), max_waiting)
        self.thread = SchedulerThread(self.scheduler)
        self._reports = 0

    async def generate(
        self, tokens: Sequence[int], max_new_tokens: int = 32, stop_at_eos: bool = True
    ) -> AsyncIterator[dict[str, Any]]:
        """Answer a prompt. Closing the generator takes the request out.

        Yields:
            {"tokens": …}: those that are new; the last one also has "record", the `Record` as plain values, with the
            process that made it as "pid".

        Raises:
            Busy, InputError, PoolExhausted: see `Scheduler.submit`.
            WorkerError: this replica has failed; another one may not.
        """
        loop, parts, id = asyncio.get_running_loop(), asyncio.Queue[Part](), uuid.uuid4().hex

        def sink(part: Part) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so the request is about to be cancelled
                loop.call_soon_threadsafe(parts.put_nowait, part)

        try:
            await asyncio.wrap_future(self.thread.submit(id, tokens, max_new_tokens, stop_at_eos, sink))
            record: Record | None = None
            while record is None:
                new: list[int] = []
                for part in await _all_of(parts):
                    if part.error is not None:
                        raise part.error
                    new += part.tokens
                    record = part.record
                yield {"tokens": new} if record is None else {"tokens": new, "record": _plain(record)}
        finally:
            self.thread.cancel(id)

    async def status(self) -> dict[str, Any]:
        """Plain numbers of this replica: its process, the requests that are in it, its pages and counters."""
        return await asyncio.wrap_future(self.thread.call(self._status))

    def _status(self) -> dict[str, Any]:
        pool = self.scheduler.pool
        return {
            "pid": os.getpid(),
            "requests": len(self.scheduler),
            "pages": len(pool.refs),
            "available_pages": pool.free.total + pool.index.idle,
            "counts": dict(self.scheduler.counts),
        }

    # --- called by Ray Serve --------------------------------------------------------------------
    async def check_health(self) -> None:
        """Raise once the scheduler has failed. Ray Serve then replaces the replica."""
        if self.thread.failure:
            raise WorkerError(self.thread.failure)

    async def record_replica_metadata(self) -> dict[str, Any]:
        """What a router needs to compute the keys of blocks, but no secret of the tenant."""
        names = self.scheduler.pool.namespace
        assert names is not None
        return {"root": names.root.hex(), "block_tokens": names.block_tokens}

    async def record_routing_stats(self) -> dict[str, Any]:
        """The shortened keys of the blocks on the device or in host memory, and the number of the report.

        Once the scheduler has failed: {"failed": True}. Ray Serve takes some seconds to replace the replica.
        """
        if self.thread.failure:
            return {"failed": True}
        self._reports += 1
        keys = await asyncio.wrap_future(self.thread.call(self._keys))
        return {"seq": self._reports, "keys": keys}

    def _keys(self) -> list[str]:
        in_host = self.scheduler.cache.host.keys() if self.scheduler.cache is not None else ()
        near = dict.fromkeys([*self.scheduler.pool.index.blocks, *in_host])
        return [key[:KEY_BYTES].hex() for key in [*near][-MOST_KEYS:]]

    def __del__(self) -> None:
        if hasattr(self, "thread"):
            self.thread.close()
            if self.scheduler.cache is not None:
                self.scheduler.cache.close()


async def _all_of(parts: asyncio.Queue[Part]) -> list[Part]:
    """Wait for a part; return it with those behind it: a message costs as much as many tokens."""
    got = [await parts.get()]
    while not parts.empty():
        got.append(parts.get_nowait())
    return got


def _plain(record: Record) -> dict[str, Any]:
    values = {**asdict(record), "sources": dict(record.sources), "pid": os.getpid()}
    return {name: value for name, value in values.items() if name not in ("id", "tokens", "token_at")}
