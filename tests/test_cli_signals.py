"""A command that is ended leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvlab.cli import FAILURE, TERMINATED, main
from tests.faults.kit import wait_for


@pytest.mark.redis
@pytest.mark.skipif(os.name == "nt", reason="needs SIGTERM")
def test_sigterm_ends_the_servers_of_a_command_and_removes_their_folders(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvlab", "serve", "--workers", "1", "--requests", "1000", "--rate", "1"]
    process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: any(tmp_path.glob("kvlab-redis-*/redis.sock")))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == TERMINATED
    finally:
        process.kill()
        process.wait()
    assert not [*tmp_path.glob("kvlab-redis-*")]


def test_a_command_leaves_the_handlers_of_its_caller_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["replay", "no such file"]) == FAILURE
    assert signal.getsignal(signal.SIGTERM) == before
