"""Scripted servers, and a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvlab.stores.redis.discovery import SLOTS
from kvlab.testbed.certs import make_certs
from kvlab.testbed.server import RedisServer
from tests.harness.helpers import FakeClock
from tests.stores.redis.scripted import A2, B2, A, B, C, SlotMap, Watched, name


@pytest.fixture
def cluster() -> Iterator[SlotMap]:
    with SlotMap() as made:
        for key in (A, B, C, A2, B2):
            made.data[name(key)] = b"value of " + key
        yield made


@pytest.fixture
def replicated() -> Iterator[SlotMap]:
    """Two masters (0, 1) and two replicas (2, 3)."""
    with SlotMap(4, [(0, 5460, 0, 2), (5461, SLOTS - 1, 1, 3)]) as made:
        for key in (A, B, C):
            made.data[name(key)] = b"value of " + key
        yield made


@pytest.fixture
def watched() -> Iterator[Watched]:
    with Watched() as made:
        for key in (A, B, C):
            made.data[name(key)] = b"value of " + key
        yield made


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def own_tls(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of its own: these tests change its users."""
    pytest.importorskip("cryptography", reason="certificates need it: pip install 'kvlab[secure]'")
    with RedisServer(tls=make_certs(tmp_path)) as server:
        yield server
