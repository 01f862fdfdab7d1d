"""A master with replicas that three sentinels watch: real processes on loopback, in sync before a test begins.

with RedisSentinel() as group:
    group.master.kill()
    group.wait_until_ok()  # group.master is another one now
"""

from __future__ import annotations

import contextlib
import time
from types import TracebackType
from typing import Self

import redis

from tests.servers import RedisServer

READY_S = 60.0
NAME = "kvlab"


class RedisSentinel:
    """One master, `replicas` replicas and three sentinels, two of which must agree that the master is down.

    Args:
        down_after_ms: after so long without an answer a sentinel takes the master for dead.
        arguments: further options of master and replicas.
    """

    def __init__(self, replicas: int = 2, down_after_ms: int = 1000, *arguments: str) -> None:
        self._replicas, self._down_after_ms, self._arguments = replicas, down_after_ms, arguments
        self._stack = contextlib.ExitStack()
        self.nodes: list[RedisServer] = []
        self.sentinels: list[RedisServer] = []

    @property
    def url(self) -> str:
        """Address of whatever the sentinels say is the master."""
        return f"redis-sentinel://{','.join(f'127.0.0.1:{sentinel.port}' for sentinel in self.sentinels)}/{NAME}"

    @property
    def master(self) -> RedisServer:
        """The master, as the first sentinel that is up says."""
        for sentinel in self.sentinels:
            with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                _, port = self._ask(sentinel, "GET-MASTER-ADDR-BY-NAME")
                return next(node for node in self.nodes if node.port == int(port))
        raise AssertionError("no sentinel is up")

    def wait_until_ok(self) -> None:
        """Wait until the master and every node that is up agree, and replicas are in sync."""
        give_up = time.monotonic() + READY_S
        while not self._is_ok():
            assert time.monotonic() < give_up, "the group does not come up"
            time.sleep(0.05)

    def __enter__(self) -> Self:
        first = self._stack.enter_context(RedisServer(*self._arguments))
        self.nodes.append(first)
        following = ("--replicaof", f"127.0.0.1 {first.port}", "--repl-diskless-sync-delay", "0")
        for _ in range(self._replicas):
            self.nodes.append(self._stack.enter_context(RedisServer(*following, *self._arguments)))
        watched = f"sentinel monitor {NAME} 127.0.0.1 {first.port} 2\n"
        watched += f"sentinel down-after-milliseconds {NAME} {self._down_after_ms}\n"
        watched += f"sentinel failover-timeout {NAME} 10000\n"
        for _ in range(3):
            self.sentinels.append(self._stack.enter_context(RedisServer("--sentinel", config=watched)))
        self.wait_until_ok()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _is_ok(self) -> bool:
        """Every sentinel names one master, knows the others, and the master's replicas follow it."""
        try:
            masters = {int(self._ask(sentinel, "GET-MASTER-ADDR-BY-NAME")[1]) for sentinel in self.sentinels}
            others = [len(self._ask(sentinel, "SENTINELS")) for sentinel in self.sentinels]
            replicas = [len(self._ask(sentinel, "REPLICAS")) for sentinel in self.sentinels]
            roles = [self._role(node) for node in self.nodes]
        except (redis.ConnectionError, redis.TimeoutError):
            return False
        up = [role for role in roles if role]
        return (
            len(masters) == 1
            and others == [2] * 3
            and replicas == [self._replicas] * 3
            and sum(role["role"] == "master" for role in up) == 1
            and all(role.get("master_link_status", "up") == "up" for role in up)
            and all(role.get("master_port", min(masters)) == min(masters) for role in up)
        )

    def _ask(self, sentinel: RedisServer, question: str) -> list[bytes]:
        client = sentinel.client(socket_timeout=1, retry=None)
        client.response_callbacks.clear()  # as it comes from the wire
        return list(client.execute_command("SENTINEL", question, NAME))

    def _role(self, node: RedisServer) -> dict[str, object] | None:
        """What a node says of itself; None if it is down."""
        try:
            return dict(node.client(socket_timeout=1, retry=None).info("replication"))
        except (redis.ConnectionError, redis.TimeoutError):
            return None
