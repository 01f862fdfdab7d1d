"""One job through every store that is installed here: the same values, put, get, the longest prefix, a restart.

python -m kvlab bench stores --json

Each store is measured beside the first one, Redis over TCP, in the same rounds: compare the ratios. The servers run on
this machine, with their default settings unless the name says otherwise, one beside the reference at a time. Adapters
in `kvlab.lab.alternatives`; `make alternatives` installs what pip has. I/O threads of a server are for many clients, so
they are measured with eight of them, by redis-benchmark.
"""

from __future__ import annotations

import csv
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from kvlab.errors import KVLabError
from kvlab.lab.alternatives.base import Adapter
from kvlab.lab.alternatives.contenders import (
    CONTENDERS,
    DEFAULT,
    KEEPS,
    REFERENCE,
    SERVERS,
    Opened,
    missing,
    server_version,
)
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.timing import Timings, time_rounds
from kvlab.stores import Store
from kvlab.testbed.server import HOST, RedisServer

ABOUT: Final = (
    "put_gbps, get_gbps: 16 values in one call, decimal GB a second of values, get into buffers, median of the rounds; "
    "put_vs_redis, get_vs_redis: speed divided by that of Redis over TCP in the same rounds (median of the ratios); "
    "new_keys: each put creates its keys, which are deleted after; probe64_ms: the longest prefix of 64 present keys; "
    "second_put: which value the store's own put leaves under an existing key; after_restart: whether values are there "
    "after the server was killed and started again, or what is no server was closed and opened again; allocator: of "
    "the server's memory; noisy: the reference, measured twice, differed by more than a tenth; error: why it was not "
    "measured; io_threads: redis-benchmark, one key, requests a second, median of the rounds; kept_memory: 64 "
    "new values in one call, and page faults of both servers over the run, in which the default one puts twice as "
    "often; cannot: clauses of "
    "kvlab's contract that an adapter does not keep"
)
FIELDS: Final = (
    *("store", "version", "allocator", "kib", "new_keys", "put_gbps", "get_gbps", "put_vs_redis", "get_vs_redis"),
    *("probe64_ms", "second_put", "after_restart", "noisy", "error"),
)
SIZES: Final = (384 << 10, 1 << 20)
BATCH: Final = 16
PROBED: Final = 64
ROUNDS: Final = 31
MANY: Final = 64
IO_THREADS: Final = (1, 2, 3)
IO_CLIENTS: Final = 8
IO_REQUESTS: Final = 600
IO_ROUNDS: Final = 3
DEADLINE_S: Final = 30.0
READY_S: Final = 30.0


# --- the job ------------------------------------------------------------------------------------
def run(
    names: Sequence[str] = tuple(CONTENDERS),
    sizes: Sequence[int] = SIZES,
    rounds: int = ROUNDS,
    servers: Sequence[str] = tuple(SERVERS),
    allocator: bool = True,
) -> dict[str, Any]:
    """Measure stores, and servers with I/O threads. What is not installed, or fails, gets a row with the reason.

    Raises:
        KVLabError: the reference cannot be measured.
    """
    rows: list[dict[str, Any]] = []
    cannot: dict[str, str] = {}
    for name in names:
        try:
            with ExitStack() as stack:
                reference = CONTENDERS[REFERENCE](stack)
                opened = reference if name == REFERENCE else CONTENDERS[name](stack)
                rows += _rows(name, opened, reference.store, sizes, rounds)
            if isinstance(opened.store, Adapter):
                cannot[name] = "; ".join(opened.store.CANNOT)
        except Exception as error:
            if name == REFERENCE:
                raise KVLabError(f"the reference cannot be measured: {error}") from error
            rows.append({**dict.fromkeys(FIELDS), "store": name, "error": _reason(error)})
    return {
        "about": ABOUT,
        "rows": rows,
        "io_threads": [_io_row(name, threads) for name in servers for threads in IO_THREADS],
        "kept_memory": [_kept_row(size, rounds) for size in sizes] if allocator else [],
        "cannot": cannot,
        "noisy": any(row["noisy"] for row in rows),
        "machine": describe_machine(),
        "versions": versions(),
    }


def _rows(name: str, opened: Opened, reference: Store, sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    measured = [
        {"kib": size >> 10, "new_keys": new_keys, **_measure(opened.store, reference, size, new_keys, rounds)}
        for size in sizes
        for new_keys in (True, False)
    ]
    about = {"store": name, "version": opened.version, "allocator": opened.allocator}
    found = {"second_put": _second_put(opened), "after_restart": _after_restart(opened)}
    return [{**dict.fromkeys(FIELDS), **about, **row, **found} for row in measured]


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _measure(
    store: Store, reference: Store, size: int, new_keys: bool, rounds: int, batch: int = BATCH
) -> dict[str, Any]:
    """Time puts and gets of both in the same rounds."""
    values = [os.urandom(size) for _ in range(batch)]
    out = [memoryview(bytearray(size)) for _ in range(batch)]
    fixed = [os.urandom(32) for _ in range(batch)]

    def put(which: Store) -> float:
        keys = [os.urandom(32) for _ in range(batch)] if new_keys else fixed
        begin = time.perf_counter()
        stored = which.put_many(keys, values)
        took = time.perf_counter() - begin
        if stored != batch:
            raise KVLabError(f"only {stored} of {batch} values were stored: {dict(which.stats().drops)}")
        if new_keys:
            which.delete_many(keys)
        return took

    def get(which: Store) -> float:
        begin = time.perf_counter()
        got = which.get_many(fixed, out)
        took = time.perf_counter() - begin
        if not all(one is not None and bytes(one) == value for one, value in zip(got, values, strict=True)):
            raise KVLabError(f"a value did not come back: {dict(which.stats().misses)}")
        return took

    def probe(which: Store) -> float:
        begin = time.perf_counter()
        found = which.probe(many)
        took = time.perf_counter() - begin
        if found != PROBED:
            raise KVLabError(f"only {found} of {PROBED} keys were found")
        return took

    for one in {id(store): store, id(reference): reference}.values():
        one.put_many(fixed, values)
    both = {"reference": reference, "store": store}
    puts = _times(put, both, rounds)
    gets = _times(get, both, rounds)
    many = [os.urandom(32) for _ in range(PROBED)]
    for i in range(0, PROBED, batch):
        store.put_many(many[i : i + batch], values)
    probe(store)
    probes = [probe(store) for _ in range(rounds)]
    store.delete_many([*many, *fixed])
    reference.delete_many(fixed)
    gigabytes = batch * size / 1e9
    return {
        "put_gbps": gigabytes / statistics.median(puts.seconds["store"]),
        "get_gbps": gigabytes / statistics.median(gets.seconds["store"]),
        "put_vs_redis": puts.ratio("reference", "store"),
        "get_vs_redis": gets.ratio("reference", "store"),
        "probe64_ms": 1000 * statistics.median(probes),
        "noisy": puts.noisy or gets.noisy,
    }


def _times(work: Callable[[Store], float], stores: dict[str, Store], rounds: int) -> Timings:
    contenders = {name: lambda store=store: work(store) for name, store in stores.items()}
    return time_rounds(contenders, rounds, seconds_of=float)


def _second_put(opened: Opened) -> str:
    """Put two values under one key, and return which is there."""
    put = opened.plain_put or (lambda key, value: opened.store.put_many([key], [value]))
    key = os.urandom(32)
    put(key, b"the first value")
    put(key, b"the second value")
    (value,) = opened.store.get_many([key])
    return {b"the first value": "the first", b"the second value": "the second"}.get(bytes(value or b""), "none")


def _after_restart(opened: Opened) -> str | None:
    """Restart the store, wait until it takes another value, and return whether the one before is still there.

    Raises:
        KVLabError: it takes no more values.
    """
    if opened.restart is None:
        return None
    key, other = os.urandom(32), os.urandom(32)
    opened.store.put_many([key], [b"value"])
    store = opened.restart() or opened.store
    give_up = time.monotonic() + READY_S
    while not store.put_many([other], [b"value"]):
        if time.monotonic() > give_up:
            raise KVLabError(f"restarted {READY_S:.0f} s ago, and takes no values: {dict(store.stats().drops)}")
        time.sleep(0.05)
    return "kept" if store.get_many([key]) == [b"value"] else "lost"


# --- freed memory -------------------------------------------------------------------------------
def _kept_row(size: int, rounds: int) -> dict[str, Any]:
    """Measure a server whose C library keeps freed memory beside one with its defaults, in the same rounds."""
    row: dict[str, Any] = {"server": None, "allocator": None, "kib": size >> 10, "values": MANY}
    row |= dict.fromkeys(("put_vs_default", "get_vs_default", "faults_default", "faults_kept", "noisy", "error"))
    try:
        with ExitStack() as stack:
            default, kept = CONTENDERS[DEFAULT](stack), CONTENDERS[KEEPS](stack)
            row |= {"server": default.version, "allocator": default.allocator}
            _measure(kept.store, default.store, size, True, 2, MANY)  # both have grown to their size
            before = _page_faults(default), _page_faults(kept)
            measured = _measure(kept.store, default.store, size, True, rounds, MANY)
            row["faults_default"] = _page_faults(default) - before[0]
            row["faults_kept"] = _page_faults(kept) - before[1]
        row |= {"put_vs_default": measured["put_vs_redis"], "get_vs_default": measured["get_vs_redis"]}
        row["noisy"] = measured["noisy"]
    except Exception as error:
        row["error"] = _reason(error)
    return row


def _page_faults(opened: Opened) -> int:
    """How often the kernel had to give the server a page (proc(5), minflt)."""
    return int(Path(f"/proc/{opened.pid}/stat").read_text("ascii").rpartition(")")[2].split()[7])


# --- I/O threads --------------------------------------------------------------------------------
def _io_row(name: str, threads: int) -> dict[str, Any]:
    """Measure one server with so many I/O threads."""
    row: dict[str, Any] = {"server": name, "version": None, "threads": threads, "clients": IO_CLIENTS}
    row |= {"kib": SIZES[0] >> 10, "set_per_s": None, "get_per_s": None, "error": None}
    try:
        program = shutil.which("redis-benchmark") or missing("apt-get install redis-tools")
        with RedisServer("--io-threads", str(threads), program=SERVERS[name]()) as server:
            rounds = [_requests_per_s(program, server.port) for _ in range(IO_ROUNDS)]
            row["version"] = server_version(server.client().info("server"))
        for command, field in (("SET", "set_per_s"), ("GET", "get_per_s")):
            row[field] = statistics.median(found[command] for found in rounds)
    except Exception as error:
        row["error"] = _reason(error)
    return row


def _requests_per_s(program: str, port: int) -> dict[str, float]:
    """Run redis-benchmark; return requests a second by command."""
    command = [program, "-h", HOST, "-p", str(port), "-c", str(IO_CLIENTS), "-n", str(IO_REQUESTS)]
    command += ["-d", str(SIZES[0]), "-t", "set,get", "--csv"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=4 * DEADLINE_S)
    lines = csv.reader(done.stdout.splitlines())
    return {line[0]: float(line[1]) for line in lines if line and line[0] in ("SET", "GET")}
