"""Servers that tests start and end: a real `redis-server` process, and a scripted one that misbehaves.

Nothing here touches a process that it did not start.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

STARTS = 5  # another process may take the free port first
READY_S = 30.0
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Run in the child before it becomes the server: a test run that is killed leaves no server behind."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A loopback port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """`redis-server` on a free loopback port and on a unix socket, with a temporary folder of its own.

    with RedisServer("--maxmemory", "2mb") as server:
        RedisStore(server.url)
        server.stop()   # SIGSTOP: connections open, nothing answers
        server.cont()   # SIGCONT
        server.kill()   # SIGKILL: connections break
        server.start()  # again, empty, on the same port
    """

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="kvlab-redis-"))  # short: socket paths are limited to 107 bytes
        self.socket = self.folder / "redis.sock"
        self.port = free_port()

    @property
    def url(self) -> str:
        """Address over TCP."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def unix_url(self) -> str:
        """Address over the unix socket."""
        return f"unix://{self.socket}"

    def client(self, **options: object) -> redis.Redis:
        """A plain client, for looking at what the store left there."""
        return redis.Redis(host="127.0.0.1", port=self.port, **options)

    def start(self) -> None:
        """Start, and wait until it answers."""
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        command += ["--dir", str(self.folder), "--unixsocket", str(self.socket), *self._arguments]
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
                self.port = free_port()
        raise AssertionError("unreachable")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

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
                raise RuntimeError(f"redis-server ended at once: {(self.folder / 'log').read_text()[-800:]}")
            try:
                with socket.socket(socket.AF_UNIX) as probe:  # no other process can own this path
                    probe.connect(str(self.socket))
                    probe.sendall(b"PING\r\n")
                    if probe.recv(64):  # an answer; "-NOAUTH" is one too
                        return
            except OSError:
                time.sleep(0.02)
        raise RuntimeError(f"redis-server did not answer within {READY_S} s")


class ScriptedServer:
    """A server on loopback that greets as Redis does and then answers every command with the same bytes.

    with ScriptedServer(b"HTTP/1.1 400 Bad Request\r\n") as server:
        RedisStore(server.url)

    Args:
        answer: what it says to any command; b"" says nothing.
        hang_up: close the connection instead of answering.
    """

    def __init__(self, answer: bytes = b"", hang_up: bool = False) -> None:
        self._answer, self._hang_up = answer, hang_up
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.port = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for connection in (self._listener, *self._open):
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed at the end
            while True:
                connection, _ = self._listener.accept()
                self._open.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while data := connection.recv(1 << 16):
                greetings = data.count(b"SETINFO")
                connection.sendall(b"+OK\r\n" * greetings)
                if data.count(b"*") > greetings:
                    connection.sendall(self._answer)
                    if self._hang_up:
                        return
