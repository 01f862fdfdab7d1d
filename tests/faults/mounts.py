"""File systems that a test may fill, hang and take away: a small tmpfs, and FUSE in the way to a folder."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def _unmount(path: Path) -> None:
    subprocess.run(["umount", "--lazy", path], check=False, capture_output=True)


@contextlib.contextmanager
def small_disk(path: Path, mib: int) -> Iterator[Path]:
    """A file system of so many MiB, in memory."""
    path.mkdir(exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={mib}m", "none", str(path))
    try:
        yield path
    finally:
        _unmount(path)


def make_read_only(path: Path) -> None:
    """Let nobody write to a mounted disk any more."""
    _mount("-o", "remount,ro", str(path))


class SlowDisk:
    """A folder seen through a FUSE process, which can be stopped: then every call to a disk in it hangs."""

    def __init__(self, real: Path, path: Path) -> None:
        real.mkdir()
        path.mkdir()
        self.path = path
        self._process = subprocess.Popen(["bindfs", "-f", real, path], stdout=subprocess.DEVNULL)
        give_up = time.monotonic() + 30
        while not os.path.ismount(path):
            if time.monotonic() > give_up:
                self.close()
                raise AssertionError("bindfs does not mount")
            time.sleep(0.01)

    def hang(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.go_on()
        _unmount(self.path)
        self._process.terminate()
        self._process.wait()
