"""Real programs that a notebook starts for one cell and stops again."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator

from kvlab.errors import KVLabError


@contextlib.contextmanager
def with_redis() -> Iterator[str]:
    """A `redis-server` of this process on a free loopback port; yields its URL, ends it afterwards.

    It persists nothing and listens on 127.0.0.1 alone.

    Raises:
        KVLabError: redis-server is not installed or does not come up within five seconds.
    """
    program = shutil.which("redis-server")
    if program is None:
        raise KVLabError("redis-server is not installed; on Debian or Ubuntu: sudo apt-get install redis-server")
    with tempfile.TemporaryDirectory(prefix="kvlab-redis-") as folder:
        port = _free_port()
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", folder]
        server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_for(port, server)
            yield f"redis://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise KVLabError(f"redis-server did not come up on port {port}")
