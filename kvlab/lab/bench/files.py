"""`FileStore` beside a program that reads and writes the same files by hand, and what each setting of `sync` costs.

python -m kvlab bench files --json
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from kvlab.errors import KVLabError
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.timing import Timings, time_rounds
from kvlab.stores import FileStore
from kvlab.stores.files.folder import SYNCS, name_of

ABOUT: Final = (
    "gets: 16 values in one call, into buffers that exist; by hand: the same files opened and read into the same "
    "buffers, one after the other; from: what holds the files, memory (the page cache) or the disk; puts: 16 values "
    "under keys that exist; by hand: written to another name and renamed, without a bound, a lock or a sync; gbps: "
    "decimal GB of values a second, medians; vs_by_hand: time of the store divided by that of the program"
)
SIZES: Final = (64 << 10, 384 << 10, 1 << 20, 4 << 20)
BATCH: Final = 16
DEADLINE_S: Final = 60.0


def run(sizes: tuple[int, ...] = SIZES, rounds: int = 15, folder: str | None = None) -> dict[str, Any]:
    """Time gets and puts of 16 values of each size (bytes) in a new folder below `folder`.

    Raises:
        KVLabError: a value was not stored, or came back wrong.
    """
    gets: list[dict[str, Any]] = []
    puts: list[dict[str, Any]] = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="kvlab-bench-", dir=folder) as where:
            batch = _Batch(where, size)
            gets += [batch.gets(source, rounds) for source in ("memory", "disk")]
            puts += batch.puts(rounds)
    return {
        "about": ABOUT,
        "gets": gets,
        "puts": puts,
        "noisy": any(row["noisy"] for row in [*gets, *puts]),
        "machine": describe_machine(),
        "versions": versions(),
    }


class _Batch:
    """16 values, in a store for each setting of `sync`."""

    def __init__(self, where: str, size: int) -> None:
        self._where, self._size = where, size
        self._keys = [b"%d" % number for number in range(BATCH)]
        self._values = [os.urandom(size) for _ in self._keys]
        self._out = [memoryview(bytearray(size)) for _ in self._keys]

    def gets(self, source: str, rounds: int) -> dict[str, Any]:
        with self._open("none") as store:
            self._put(store)
            paths = [f"{store.path}/{name_of(key)}" for key in self._keys]

            def by_hand() -> None:
                for path, buffer in zip(paths, self._out, strict=True):
                    with open(path, "rb", buffering=0) as file:
                        at = 0
                        while count := file.readinto(buffer[at:]):
                            at += count

            def get() -> None:
                if store.get_many(self._keys, self._out).count(None):
                    raise KVLabError(f"a value was not found: {dict(store.stats().misses)}")

            contenders = {"by hand": by_hand, "store": get}
            timings = _time_cold(contenders, paths, rounds) if source == "disk" else time_rounds(contenders, rounds)
            for buffer in self._out:
                buffer[:] = bytes(self._size)
            get()
            if any(bytes(buffer) != value for buffer, value in zip(self._out, self._values, strict=True)):
                raise KVLabError("a value came back wrong")
        return {"from": source, **self._row(timings, "store")}

    def puts(self, rounds: int) -> list[dict[str, Any]]:
        paths = [f"{self._where}/by-hand-{number}" for number in range(BATCH)]

        def by_hand() -> None:
            for path, value in zip(paths, self._values, strict=True):
                with open(f"{path}.tmp", "wb", buffering=0) as file:
                    file.write(value)
                os.replace(f"{path}.tmp", path)

        stores = {sync: self._open(sync) for sync in SYNCS}
        contenders: dict[str, Callable[[], object]] = {"by hand": by_hand}
        contenders |= {sync: partial(self._put, store) for sync, store in stores.items()}
        timings = time_rounds(contenders, rounds)
        for store in stores.values():
            store.close()
        return [{"sync": sync, **self._row(timings, sync)} for sync in SYNCS]

    def _open(self, sync: str) -> FileStore:
        return FileStore(f"{self._where}/{sync}", 8 * BATCH * self._size, sync=sync, deadline_s=DEADLINE_S)

    def _put(self, store: FileStore) -> None:
        if store.put_many(self._keys, self._values) != BATCH:
            raise KVLabError(f"a value was not stored: {dict(store.stats().drops)}")

    def _row(self, timings: Timings, name: str) -> dict[str, Any]:
        gigabytes = BATCH * self._size / 1e9
        return {
            "kib": self._size >> 10,
            "gbps": 1000 * gigabytes / timings.median_ms(name),
            "gbps_by_hand": 1000 * gigabytes / timings.median_ms("by hand"),
            "vs_by_hand": timings.ratio(name, "by hand"),
            "noisy": timings.noisy,
        }


def _time_cold(contenders: Mapping[str, Callable[[], object]], paths: list[str], rounds: int) -> Timings:
    """Time contenders that find nothing of the files in memory."""

    def cold(work: Callable[[], object]) -> float:
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)  # what is not on the disk yet is not dropped
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    return time_rounds({name: partial(cold, work) for name, work in contenders.items()}, rounds, float)
