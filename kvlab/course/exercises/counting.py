"""A Redis inside this process for checks: it counts round trips, and it can refuse to store some keys.

`Content` is what a case of an exercise holds. Each copy of it is a client of a new server, so that an answer
cannot spoil the next case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fakeredis
import redis
from redis.client import Pipeline

FULL = "OOM command not allowed when used memory > 'maxmemory'."
WRITES = ("SET", "MSET", "SETEX", "PSETEX")


class CountingRedis(fakeredis.FakeRedis):
    """A client of a server of its own.

    Args:
        refuses: keys that the server does not store, as if its memory were full.

    Attributes:
        round_trips: how often commands were sent.
    """

    def __init__(self, refuses: frozenset[bytes] = frozenset()) -> None:
        super().__init__(server=fakeredis.FakeServer())
        self.refuses = refuses
        self.round_trips = 0

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send one command."""
        self.round_trips += 1
        if self.refused(args):
            raise redis.exceptions.OutOfMemoryError(FULL)
        return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> CountingPipeline:
        """A pipeline whose execution is counted."""
        return CountingPipeline(self, transaction)

    def refused(self, args: tuple[Any, ...]) -> bool:
        """Whether the server refuses a command."""
        return args[0] in WRITES and not self.refuses.isdisjoint(args)

    def content(self) -> list[str]:
        """One line for each key: its value and its remaining time. Not counted."""
        run: Any = super().execute_command
        lines = []
        for name in sorted(run("KEYS", "*")):
            left = run("PTTL", name)
            lines.append(f"{name.decode()} = {run('GET', name)!r}, " + (_seconds(left) if left >= 0 else "for ever"))
        return lines


class CountingPipeline(Pipeline):
    """A pipeline of a `CountingRedis`."""

    def __init__(self, client: CountingRedis, transaction: bool) -> None:
        pool: Any = client.connection_pool
        super().__init__(pool, client.response_callbacks, transaction, None)
        self._client, self._all_or_nothing = client, transaction

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Send all commands in one round trip. A transaction with a refused command stores nothing."""
        self._client.round_trips += bool(self.command_stack)
        refused = [i for i, (args, _) in enumerate(self.command_stack) if self._client.refused(args)]
        if refused and self._all_or_nothing:
            self.reset()
            raise redis.exceptions.OutOfMemoryError(FULL)
        self.command_stack = [c for i, c in enumerate(self.command_stack) if i not in refused]
        replies: list[Any] = super().execute(raise_on_error)
        for i in refused:
            replies.insert(i, redis.exceptions.OutOfMemoryError(FULL))
        if refused and raise_on_error:
            raise replies[refused[0]]
        return replies


class Content:
    """Keys with their values and remaining seconds. A deep copy is a `CountingRedis` that holds them."""

    def __init__(self, values: Mapping[str, tuple[bytes, int]], refuses: frozenset[bytes] = frozenset()) -> None:
        self.values, self.refuses = values, refuses

    def __repr__(self) -> str:
        held = [f"{name} for {seconds} s" for name, (_, seconds) in self.values.items()] or ["nothing"]
        full = [f"no room for {name.decode()}" for name in sorted(self.refuses)]
        return f"<Redis with {', '.join([*held, *full])}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> CountingRedis:
        client = CountingRedis(self.refuses)
        for name, (value, seconds) in self.values.items():
            client.set(name, value, ex=seconds)
        client.round_trips = 0
        return client


def _seconds(milliseconds: int) -> str:
    return f"for {round(milliseconds / 1000)} s"
