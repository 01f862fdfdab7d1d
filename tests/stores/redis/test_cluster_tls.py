"""A cluster that speaks TLS on every port, its own included, and knows no user but those of the documentation."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from kvlab.stores import RedisStore
from kvlab.stores.redis.discovery import SLOTS
from kvlab.stores.redis.store import CLUSTER_COMMANDS, COMMANDS
from kvlab.testbed.certs import make_certs
from kvlab.testbed.server import RedisServer, free_port

READY_S = 60.0
LONG_S = 30.0
RIGHTS = " ".join(f"+{name.lower()}" for name in (*COMMANDS, *CLUSTER_COMMANDS))
SETTINGS = f"""
cluster-enabled yes
tls-cluster yes
tls-replication yes
user default off
user admin on >admin ~* &* +@all
user kvlab on >secret ~kv:* resetchannels -@all {RIGHTS}
"""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[RedisServer]]:
    """Three masters that have found each other and share the slots."""
    pytest.importorskip("cryptography", reason="certificates need it: pip install 'kvlab[secure]'")
    certs = make_certs(tmp_path)
    with contextlib.ExitStack() as stack:
        options = [("--cluster-port", str(free_port())) for _ in range(3)]
        made = [stack.enter_context(RedisServer(*bus, tls=certs, config=SETTINGS)) for bus in options]
        for i, node in enumerate(made):
            admin(node, "CLUSTER", "MEET", "127.0.0.1", made[0].tls_port, int(options[0][1]))
            admin(node, "CLUSTER", "ADDSLOTSRANGE", SLOTS * i // 3, SLOTS * (i + 1) // 3 - 1)
        give_up = time.monotonic() + READY_S
        while not all(b"cluster_state:ok" in admin(node, "CLUSTER", "INFO") for node in made):
            assert time.monotonic() < give_up, "the nodes do not find each other"
            time.sleep(0.05)
        yield made


def admin(node: RedisServer, *command: object) -> Any:
    client = redis.Redis.from_url(node.tls_url.replace("rediss://", "rediss://admin:admin@"), protocol=2)
    client.response_callbacks.clear()
    return client.execute_command(*command)


@pytest.mark.cluster
def test_a_cluster_over_tls_needs_no_more_than_the_rights_listed(nodes: list[RedisServer]) -> None:
    first, _, ca = nodes[0].tls_url.partition("?")
    url = f"{first.replace('rediss://', 'rediss-cluster://kvlab:secret@')},127.0.0.1:1?{ca}"
    keys = [os.urandom(32) for _ in range(100)]
    values = [key * 5000 for key in keys]
    with RedisStore(url, ttl_s=100, deadline_s=LONG_S) as store:
        assert store.health().ok, store.health()
        assert store.put_many(keys, values) == store.probe(keys) == 100
        assert store.get_many(keys) == values
        assert len(store.nodes) == 3 and all(store.touch_many(keys)) and store.delete_many(keys) == 100
        assert not store.stats().misses and not store.stats().drops and not store.stats().faults
    with RedisStore(url.replace("secret", "wrong"), deadline_s=LONG_S) as store:
        why: list[str] = []
        assert store.get_many(keys[:1], reasons=why) == [None] and why == ["auth"]
        assert "auth: " in store.health().detail and "wrong" not in store.health().detail
