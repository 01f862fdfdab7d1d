"""The server command, the curl lines and the client of the README, as they are written there but for the ports."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from kvlab.testbed.server import RedisServer, free_port

pytest.importorskip("vllm", reason="needs vLLM: make test-engines")

pytestmark = [pytest.mark.engines, pytest.mark.redis]

ROOT = Path(__file__).parents[2]


def block(start: str) -> str:
    """The code block of the README that contains `start`."""
    (found,) = [
        b for b in re.findall(r"```(?:sh|python3)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL) if start in b
    ]
    return found


def run(command: list[str]) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120).stdout


@contextmanager
def server(command: str, port: int, log: Path) -> Iterator[None]:
    """The server of a shell command, until it answers; ended as by Ctrl-C."""
    with log.open("wb") as output:
        process = subprocess.Popen(["sh", "-c", f"exec {command}"], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(60)


def listening() -> set[str]:
    """The addresses on which the processes of this test listen, the server's included."""
    processes = psutil.Process().children(recursive=True)
    connections = [c for process in processes for c in process.net_connections(kind="inet")]
    found = {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    assert found, "the server listens somewhere"
    return found


def test_server_curl_and_client(redis_server: RedisServer, tmp_path: Path) -> None:
    port = free_port()
    places = {
        "127.0.0.1:8000": f"127.0.0.1:{port}",
        "--port 8000": f"--port {port}",
        "redis://127.0.0.1:6379": redis_server.url,
    }

    def here(text: str) -> str:
        for old, new in places.items():
            text = text.replace(old, new)
        return re.sub(r"^python ", f"{sys.executable} ", text)

    command, curl, client = here(block("api_server")), here(block("curl -s")), here(block("from openai"))
    texts = []
    for outcome in ("absent", "hit"):
        log = tmp_path / f"{outcome}.log"
        with server(command, port, log):
            texts.append(run([sys.executable, "-c", client]))
            time.sleep(0.2)
            said = run(["sh", "-c", curl])
            assert listening() <= {"127.0.0.1", "::1"}, "other machines can connect"
        assert '"text":' in said and f'outcome="{outcome}"}} 1.0' in said, said
        assert 'outcome="short"} 1.0' in said, "the prompt of curl is shorter than a block"
    assert texts[0] == texts[1] and texts[0].strip()
