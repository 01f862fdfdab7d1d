"""A master with replicas in sync and three sentinels: real processes on loopback.

with RedisSentinel() as group:
    group.master.kill()
    group.wait_until_ok()  # now group.master is another server
"""

from __future__ import annotations

import contextlib
import time
from types import TracebackType
from typing import Any, Self

import redis

from kvlab.errors import KVLabError
from kvlab.testbed.server import HOST, RedisServer

NAME = "kvlab"  # of the group, in the sentinels' configuration
SENTINELS = 3
READY_S = 60.0
POLL_S = 0.05
DOWN = redis.ConnectionError, redis.TimeoutError


class RedisSentinel:
    """One master, `replicas` replicas and three sentinels, two of which must agree that the master is down.

    Args:
        arguments: further command-line options of master and replicas.
        down_after_ms: a sentinel considers a master down after this time without an answer.

    Attributes:
        nodes: master and replicas, the initial master first. Killed servers stay in this list.
        sentinels: the three sentinels.
    """

    def __init__(self, *arguments: str, replicas: int = 2, down_after_ms: int = 1000) -> None:
        self._replicas, self._down_after_ms, self._arguments = replicas, down_after_ms, arguments
        self._stack = contextlib.ExitStack()
        self.nodes: list[RedisServer] = []
        self.sentinels: list[RedisServer] = []

    @property
    def url(self) -> str:
        """URL of the group, which lists every sentinel."""
        return f"redis-sentinel://{','.join(f'{HOST}:{sentinel.port}' for sentinel in self.sentinels)}/{NAME}"

    @property
    def master(self) -> RedisServer:
        """The master according to the first sentinel that is up.

        Raises:
            KVLabError: no sentinel is up.
        """
        for sentinel in self.sentinels:
            with contextlib.suppress(*DOWN):
                port = _named_master(sentinel)
                return next(node for node in self.nodes if node.port == port)
        raise KVLabError("no sentinel is up")

    def wait_until_ok(self) -> None:
        """Wait until the sentinels and every node that is up agree on the master, and replicas are in sync.

        Raises:
            KVLabError: the group does not reach this state within a minute.
        """
        give_up = time.monotonic() + READY_S
        while not self._is_ok():
            if time.monotonic() > give_up:
                raise KVLabError(f"the group is not ready after {READY_S:.0f} s")
            time.sleep(POLL_S)

    def __enter__(self) -> Self:
        with self._stack as stack:  # stops the started servers if a later one does not start
            first = stack.enter_context(RedisServer(*self._arguments))
            self.nodes.append(first)
            following = ("--replicaof", f"{HOST} {first.port}", "--repl-diskless-sync-delay", "0")
            for _ in range(self._replicas):
                self.nodes.append(stack.enter_context(RedisServer(*following, *self._arguments)))
            for _ in range(SENTINELS):
                self.sentinels.append(stack.enter_context(RedisServer("--sentinel", config=self._config(first))))
            self.wait_until_ok()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _config(self, master: RedisServer) -> str:
        """A sentinel's configuration file."""
        return (
            f"sentinel monitor {NAME} {HOST} {master.port} 2\n"
            f"sentinel down-after-milliseconds {NAME} {self._down_after_ms}\n"
            f"sentinel failover-timeout {NAME} 10000\n"
        )

    def _is_ok(self) -> bool:
        """Whether all sentinels know each other, the replicas and one master, and the nodes that are up follow it."""
        try:
            masters = {_named_master(sentinel) for sentinel in self.sentinels}
            others = [len(_ask(sentinel, "SENTINELS")) for sentinel in self.sentinels]
            replicas = [len(_ask(sentinel, "REPLICAS")) for sentinel in self.sentinels]
        except DOWN:
            return False
        up = [role for role in map(_role, self.nodes) if role]
        return (
            len(masters) == 1
            and others == [SENTINELS - 1] * SENTINELS
            and replicas == [self._replicas] * SENTINELS
            and sum(role["role"] == "master" for role in up) == 1
            and all(role.get("master_link_status", "up") == "up" for role in up)
            and all(role.get("master_port", min(masters)) == min(masters) for role in up)
        )


def _ask(sentinel: RedisServer, question: str) -> list[Any]:
    """The unparsed reply to a SENTINEL command."""
    client: Any = sentinel.client(socket_timeout=1, retry=None)
    client.response_callbacks.clear()
    return list(client.execute_command("SENTINEL", question, NAME))


def _named_master(sentinel: RedisServer) -> int:
    """The port of the master according to a sentinel."""
    return int(_ask(sentinel, "GET-MASTER-ADDR-BY-NAME")[1])


def _role(node: RedisServer) -> dict[str, Any] | None:
    """A node's replication state; None if the node is down."""
    try:
        return dict(node.client(socket_timeout=1, retry=None).info("replication"))
    except DOWN:
        return None
