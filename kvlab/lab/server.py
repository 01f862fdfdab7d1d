"""A `redis-server` of our own for as long as something is measured: on loopback, keeping nothing."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

from kvlab.errors import KVLabError

READY_S = 10.0


@dataclass(frozen=True)
class LocalRedis:
    """Where it listens, and its process, which may be stopped and continued."""

    port: int
    socket_path: str
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """Address over TCP."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def unix_url(self) -> str:
        """Address over the unix socket."""
        return f"unix://{self.socket_path}"


@contextlib.contextmanager
def local_redis(*options: str) -> Iterator[LocalRedis]:
    """Start a `redis-server` on a free loopback port and a unix socket; end it afterwards.

    Args:
        options: more of its options, say "--maxmemory", "64mb".

    Raises:
        KVLabError: redis-server is not installed or does not come up within ten seconds.
    """
    program = shutil.which("redis-server")
    if program is None:
        raise KVLabError("redis-server is not installed; on Debian or Ubuntu: sudo apt-get install redis-server")
    with tempfile.TemporaryDirectory(prefix="kvlab-redis-") as folder:
        port, path = _free_port(), f"{folder}/redis.sock"
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--unixsocket", path]
        command += ["--save", "", "--appendonly", "no", "--dir", folder, *options]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_for(path, process)
            yield LocalRedis(port, path, process)
        finally:
            process.kill()  # nothing to save; also ends one that was stopped
            process.wait()


def _free_port() -> int:
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
