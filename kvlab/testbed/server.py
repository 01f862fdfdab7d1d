"""A `redis-server` of our own for as long as something is measured: on loopback, keeping nothing."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator

from kvlab.errors import KVLabError

READY_S = 10.0


class LocalRedis(str):
    """A running server's URL over TCP.

    Attributes:
        unix_url: the same over its Unix socket.
    """

    unix_url: str
    _process: subprocess.Popen[bytes]

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1."""
        return int(self.rpartition(":")[2])

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._process.kill()
        self._process.wait()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The server hangs: its port still accepts, and nothing comes back. It goes on afterwards."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def with_redis(*options: str) -> Iterator[LocalRedis]:
    """Start a `redis-server` on a free loopback port and a Unix socket; yield its URL; end it afterwards.

    Args:
        options: more of its options, say "--maxmemory", "64mb".

    Raises:
        KVLabError: redis-server is not installed or does not come up within ten seconds.
    """
    program = shutil.which("redis-server")
    if program is None:
        raise KVLabError("redis-server is not installed; on Debian or Ubuntu: sudo apt-get install redis-server")
    with tempfile.TemporaryDirectory(prefix="kvlab-redis-") as folder:
        port, path = free_port(), f"{folder}/redis.sock"
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--unixsocket", path]
        command += ["--save", "", "--appendonly", "no", "--dir", folder, *options]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_for(path, process)
            server = LocalRedis(f"redis://127.0.0.1:{port}")
            server.unix_url, server._process = f"unix://{path}", process
            yield server
        finally:
            process.kill()  # nothing to save; also ends one that was stopped
            process.wait()


def free_port() -> int:
    """A loopback port on which nothing listens now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait_for(path: str, process: subprocess.Popen[bytes]) -> None:
    """Wait for its socket: no other process can have taken that, as one could the port."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with socket.socket(socket.AF_UNIX) as s:
                s.connect(path)
                return
        except OSError:
            time.sleep(0.02)
    raise KVLabError("redis-server did not come up")
