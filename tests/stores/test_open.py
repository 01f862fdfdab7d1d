"""`open_store`: the one place where a URL becomes a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvlab.errors import ConfigError
from kvlab.stores import FileStore, MemoryStore, RedisStore, Store, open_store


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("memory://", MemoryStore),
        ("fakeredis://", RedisStore),
        ("fakeredis://shared", RedisStore),
        ("redis://localhost", RedisStore),
        ("rediss://localhost:6380/2", RedisStore),
        ("unix:///tmp/redis.sock", RedisStore),
        ("redis-cluster://a,b:7001", RedisStore),
        ("redis-sentinel://a,b/main", RedisStore),
    ],
)
def test_each_url_is_one_kind_of_store(url: str, kind: type[Store]) -> None:
    with open_store(url, ttl_s=60) as store:
        assert type(store) is kind


def test_settings_are_those_of_the_store() -> None:
    now = [0.0]
    memory = open_store("memory://", ttl_s=60, clock=lambda: now[0])
    memory.put_many([b"a"], [b"1"])
    now[0] = 60.0
    assert memory.probe([b"a"]) == 0
    store = open_store("redis://localhost", ttl_s=60, deadline_s=3, max_connections=2)
    assert isinstance(store, RedisStore)
    assert (store._ttl_ms, store.deadline_s, store.nodes[0].pool._max) == (60_000, 3, 2)


@pytest.mark.parametrize(
    ("url", "settings", "says"),
    [
        ("memory://", {"deadline_s": 1}, "MemoryStore: .*'deadline_s'"),
        ("memory://", {"read_replicas": True}, "MemoryStore: .*'read_replicas'"),
        ("fakeredis://", {"colour": 1}, "RedisStore: .*'colour'"),
        ("redis://localhost", {"ttl": 5}, "RedisStore: .*'ttl'"),
    ],
)
def test_a_setting_that_the_store_does_not_have_is_refused(url: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        open_store(url, **settings)


@pytest.mark.parametrize("url", ["", "memory", "memory:", "memory:/", "mem://", "http://a", "a:6379"])
def test_other_urls_are_refused_with_the_schemes_that_there_are(url: str) -> None:
    with pytest.raises(ConfigError, match="redis-cluster://"):
        open_store(url)


@pytest.mark.parametrize("url", ["memory://x", "memory://localhost:6379", "memory:///", "memory://?a=1"])
def test_a_memory_has_no_parts(url: str) -> None:
    with pytest.raises(ConfigError, match="not a usable store URL"):
        open_store(url)


@pytest.mark.parametrize("url", [None, 7, b"redis://localhost", ["memory://"], MemoryStore()], ids=repr)
def test_a_url_is_text(url: Any) -> None:
    with pytest.raises(ConfigError, match=f"URL as text, got {type(url).__name__}"):
        open_store(url)


def test_a_folder_and_its_settings_are_in_the_url(tmp_path: Path) -> None:
    with open_store(f"file://{tmp_path}/a%20folder?max_bytes=8192&policy=fifo&sync=full", ttl_s=60) as store:
        assert isinstance(store, FileStore)
        assert (store.path, store.max_bytes) == (f"{tmp_path}/a folder", 8192)
        assert store.put_many([b"a", b"b", b"c"], [b"1"] * 3) == 3
        assert store.get_many([b"a", b"c"]) == [None, b"1"]  # the first in leaves first
    with open_store(f"file://localhost{tmp_path}/a%20folder") as again:
        assert again.get_many([b"c"]) == [b"1"]


def test_an_argument_goes_before_the_url(tmp_path: Path) -> None:
    with open_store(f"file://{tmp_path}/store?max_bytes=8192", max_bytes=4096) as store:
        assert isinstance(store, FileStore) and store.max_bytes == 4096


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file://tmp/store", "three slashes"),
        ("file:store", "begins with memory://, file://"),
        ("file://", "three slashes"),
        ("file://host/store", "three slashes"),
        ("file://me:secret@/store", "no login"),
        ("file:///store?max_bytes=1M", "number of bytes"),
        ("file:///store?max_bytes=0", "number of bytes"),
        ("file:///store?max_bytes=", "has no value"),
        ("file:///store?policy=oldest", "expected policy as one of"),
        ("file:///store?sync=yes", "expected sync as one of none, data, full"),
        ("file:///store?ttl=1", "ttl"),
        ("file:///a%00b", "absolute path"),
    ],
)
def test_a_wrong_url_of_a_folder_is_refused(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        open_store(url)
    assert "secret" not in str(refused.value)
