"""Parts of the tests of `kvlab.serve` that replicas and Ray Serve import by name."""

from __future__ import annotations

import os
from typing import Any

from kvlab.serve.replica import Replica

NEW = 150
SECRETS = ("store-password-c0ffee", "tenant-salt-c0ffee")


def prompts(count: int, tokens: int = 300) -> list[list[int]]:
    """Prompts that have no block in common."""
    return [[7 + (31 * i + j) % 700 for j in range(tokens)] for i in range(count)]


class FragileReplica(Replica):
    """Its scheduler can be told to fail."""

    async def break_scheduler(self) -> int:
        """Let the next step raise, if there are requests; return the process, or 0."""
        if not (await self.status())["requests"]:
            return 0
        self.thread.call(lambda: setattr(self.scheduler, "step", _fail))
        return os.getpid()


def _fail() -> Any:
    raise RuntimeError("out of memory, says the test")
