"""`FileStore`: its settings, its buffers, and what is its own beside the contract."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvlab.errors import ConfigError
from kvlab.stores import FileStore
from kvlab.stores.files import store as module
from kvlab.stores.files.folder import BLOCK, name_of
from tests.faults.kit import wait_for

LONG_S = 30.0
SHORT_S = 0.3  # long enough for a thread to start on a busy machine
MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    with FileStore(tmp_path / "store", deadline_s=LONG_S) as made:
        yield made
        made.stats().check()


def wait_until_idle(store: FileStore) -> None:
    """Wait until the threads that were abandoned have ended what they did."""
    crew = store._calls._threads._crew
    wait_for(lambda: crew.idle == crew.count)


def file_of(store: FileStore, key: bytes) -> Path:
    return Path(store.path, name_of(key))


# --- settings -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"path": "relative"}, "absolute path"),
        ({"path": ""}, "absolute path"),
        ({"path": "/a\0b"}, "absolute path"),
        ({"path": b"/bytes"}, "path of a folder, got bytes"),
        ({"path": None}, "path of a folder, got NoneType"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"max_bytes": BLOCK - 1}, "max_bytes"),
        ({"max_bytes": 1e9}, "max_bytes"),
        ({"ttl_s": 0}, "TTL"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"policy": "random"}, "fifo, lru"),
        ({"policy": ["lru"]}, "policy"),
        ({"sync": True}, "none, data, full"),
        ({"clock": 7}, "clock"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FileStore(**{"path": tmp_path, **settings})


def test_a_folder_that_cannot_be_a_stores_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(ConfigError):
            FileStore(path)


def test_values_outlive_the_store(tmp_path: Path) -> None:
    with FileStore(tmp_path / "store") as store:
        store.put_many([b"a"], [b"one"])
    assert store.get_many([b"a"]) == [None] and store.stats().misses == Counter(closed=1)
    assert FileStore(tmp_path / "store").get_many([b"a"]) == [b"one"]


def test_two_stores_share_a_folder(store: FileStore) -> None:
    with FileStore(store.path, deadline_s=LONG_S) as other:
        other.put_many([b"a"], [b"one"])
        assert store.get_many([b"a"]) == [b"one"]
        store.delete_many([b"a"])
        assert other.probe([b"a"]) == 0


@pytest.mark.parametrize("sync", ["none", "data", "full"])
def test_what_is_synced_before_a_put_returns(tmp_path: Path, sync: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FileStore(tmp_path / "store").close()  # makes the folder, and syncs its count
    calls = Counter[str]()
    for name in ("fdatasync", "fsync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda fd, name=name, real=real: (calls.update([name]), real(fd)))
    with FileStore(tmp_path / "store", sync=sync, deadline_s=LONG_S) as store:
        store.put_many([b"a", b"b"], [b"one", b"two"])
    assert calls == {"none": {}, "data": {"fdatasync": 2}, "full": {"fdatasync": 2, "fsync": 2}}[sync]


# --- room ---------------------------------------------------------------------------------------
def test_the_bound_holds_and_the_oldest_leave(tmp_path: Path) -> None:
    with FileStore(tmp_path / "store", max_bytes=20 * BLOCK, deadline_s=LONG_S) as store:
        for number in range(100):
            assert store.put_many([b"%d" % number], [bytes(BLOCK)]) == 1
            with store._folder.counting() as count:
                assert sum(entry.size for entry in store._folder.entries()) <= count.used <= 20 * BLOCK
        assert store.probe([b"99", b"98", b"97"]) == 3 and store.probe([b"0"]) == 0


def test_a_value_larger_than_the_room_is_too_big(tmp_path: Path) -> None:
    with FileStore(tmp_path / "store", max_bytes=50 * BLOCK, deadline_s=LONG_S) as store:
        values = [b"1", bytes(50 * BLOCK + 1), b"3"]
        assert store.put_many([b"a", b"b", b"c"], values) == 2
        assert store.stats().drops == Counter(too_big=1)
        assert store.get_many([b"a", b"b", b"c"]) == [b"1", None, b"3"]
        assert store.put_many([b"d"], [bytes(50 * BLOCK)]) == 1  # everything else leaves


# --- buffers ------------------------------------------------------------------------------------
@pytest.mark.parametrize("cached", [True, False], ids=["in the page cache", "not there"])
@pytest.mark.parametrize("size", [0, 1, 4095, 4097, 3 * MIB + 5])
def test_a_buffer_is_filled_from_the_page_cache_or_by_a_thread(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, cached: bool, size: int
) -> None:
    value = os.urandom(size)
    store.put_many([b"a"], [value])
    monkeypatch.setattr(module, "READ_AT_ONCE", MIB)
    if not cached:
        monkeypatch.setattr(module, "_NO_WAIT", None)
    buffer = memoryview(bytearray(size + 10))
    (got,) = store.get_many([b"a"], [buffer])
    assert got is not None and bytes(got) == value and bytes(buffer[size:]) == bytes(10)


def test_the_part_that_the_page_cache_lacks_is_read_by_a_thread(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = os.urandom(3 * MIB)
    store.put_many([b"a"], [value])
    answers: Iterator[int] = iter([MIB, -errno.EAGAIN, MIB // 2, -errno.EAGAIN])  # the last: half of a MiB is left

    def some(fd: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        count = next(answers)
        if count < 0:
            raise OSError(-count, "not now")
        data = os.pread(fd, count, at)
        buffers[0][:count] = data
        return count

    monkeypatch.setattr(os, "preadv", some)
    monkeypatch.setattr(module, "READ_AT_ONCE", MIB)
    (got,) = store.get_many([b"a"], [memoryview(bytearray(3 * MIB))])
    assert got is not None and bytes(got) == value
    assert next(answers, None) is None


def test_a_buffer_is_never_written_after_its_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk hangs in the middle of a read, and goes on when the caller has its buffer back."""
    disk, real = threading.Event(), os.pread
    with FileStore(tmp_path / "store", deadline_s=LONG_S) as store:
        assert store.put_many([b"a"], [b"x" * 5000]) == 1
        store.deadline_s = SHORT_S

        def hang(*args: Any) -> bytes:
            disk.wait(LONG_S)
            return real(*args)

        monkeypatch.setattr(module, "_NO_WAIT", None)
        monkeypatch.setattr(os, "pread", hang)
        buffer = memoryview(bytearray(5000))
        assert store.get_many([b"a"], [buffer]) == [None]
        assert store.stats().misses == Counter(timeout=1)
        disk.set()
        monkeypatch.setattr(os, "pread", real)
        wait_until_idle(store)
        assert store.get_many([b"a"]) == [b"x" * 5000]
        assert bytes(buffer) == bytes(5000)


def test_a_value_that_hung_while_it_was_written_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller has been told that it was dropped, and may have changed its bytes."""
    disk, real = threading.Event(), os.writev
    with FileStore(tmp_path / "store", deadline_s=LONG_S) as store:
        store.put_many([b"a"], [b"old"])
        store.deadline_s = SHORT_S

        def hang(*args: Any) -> int:
            disk.wait(LONG_S)
            return real(*args)

        monkeypatch.setattr(os, "writev", hang)
        value = bytearray(b"new")
        assert store.put_many([b"a", b"b"], [memoryview(value), b"next"]) == 0
        assert store.stats().drops == Counter(timeout=2)
        value[:] = b"XXX"
        disk.set()
        monkeypatch.setattr(os, "writev", real)
        wait_until_idle(store)
        store.deadline_s = LONG_S
        assert store.get_many([b"a", b"b"]) == [b"old", None]
        assert store.put_many([b"a"], [b"new"]) == 1 and store.get_many([b"a"]) == [b"new"]


def test_what_was_written_before_the_deadline_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, real = threading.Event(), os.writev
    with FileStore(tmp_path / "store", deadline_s=LONG_S) as store:
        store.deadline_s = SHORT_S

        def hang(fd: int, parts: list[memoryview]) -> int:
            if parts[0] == b"second":
                disk.wait(LONG_S)
            return real(fd, parts)

        monkeypatch.setattr(os, "writev", hang)
        assert store.put_many([b"a", b"b", b"c"], [b"first", b"second", b"third"]) == 1
        assert store.stats().drops == Counter(timeout=2)
        disk.set()
        store.deadline_s = LONG_S
        assert store.get_many([b"a", b"b"])[0] == b"first"


def test_a_file_that_is_cut_while_it_is_read_is_a_miss(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put_many([b"a"], [bytes(MIB)])
    monkeypatch.setattr(os, "preadv", lambda *args: 0)
    assert store.get_many([b"a"], [memoryview(bytearray(MIB))]) == [None]
    assert store.stats().misses == Counter(io=1)


def test_a_file_that_somebody_made_enormous_is_not_read(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store._janitor, "wake", lambda used: None)  # else it leaves as too large for the folder
    store.put_many([b"a"], [b"one"])
    os.truncate(file_of(store, b"a"), 1 << 40)
    assert store.get_many([b"a"]) == store.get_many([b"a"], [memoryview(bytearray(8))]) == [None]
    assert store.stats().misses == Counter(too_big=2)


def test_more_keys_than_files_may_be_open(store: FileStore) -> None:
    keys = [b"%d" % i for i in range(3000)]
    assert store.put_many(keys, keys) == 3000
    assert store.get_many(keys) == keys
    buffers = [memoryview(bytearray(8)) for _ in keys]
    assert [bytes(value or b"") for value in store.get_many(keys, buffers)] == keys


def test_files_are_closed(store: FileStore) -> None:
    def open_files() -> int:
        return len([fd for fd in os.listdir("/proc/self/fd") if _leads_to(fd, store.path)])

    store.put_many([b"a", b"b"], [b"one", b"two"])
    for _ in range(50):
        store.get_many([b"a", b"b", b"c"], [memoryview(bytearray(3))] * 3)
        store.get_many([b"a", b"b", b"c"])
        store.get_many([b"a"], [memoryview(bytearray(1))])
    store.health()  # the calls before it have been made
    assert open_files() <= 8


def _leads_to(fd: str, path: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith(path)
    except OSError:
        return False


# --- the rest -----------------------------------------------------------------------------------
def test_health_says_how_full_it_is(tmp_path: Path) -> None:
    with FileStore(tmp_path / "store", max_bytes=1 << 30, deadline_s=LONG_S) as store:
        health = store.health()
        assert health.ok and "of 1.00 GiB" in health.detail
    assert not store.health().ok and "closed" in store.health().detail


def test_the_child_of_a_fork_has_its_own_threads(store: FileStore) -> None:
    store.put_many([b"a"], [b"one"])
    child = os.fork()
    if child == 0:
        works = store.get_many([b"a"]) == [b"one"] and store.put_many([b"b"], [b"two"]) == 1
        os._exit(0 if works else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.get_many([b"a", b"b"]) == [b"one", b"two"]


def test_many_threads_get_what_belongs_to_their_keys(store: FileStore) -> None:
    wrong = []

    def work(seed: int) -> None:
        for round_ in range(60):
            keys = [b"%d" % ((seed + round_ + i) % 40) for i in range(8)]
            store.put_many(keys[:2], [key * 2000 for key in keys[:2]])
            got = store.get_many(keys, [memoryview(bytearray(10_000)) for _ in keys])
            wrong.extend(k for k, v in zip(keys, got, strict=True) if v is not None and bytes(v) != k * 2000)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="needs /dev/shm")
def test_what_is_in_memory_is_read_by_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system in memory cannot say what it has without waiting; a thread would copy everything once more."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, FileStore(f"{folder}/store") as store:
        store.put_many([b"a"], [b"value"])
        monkeypatch.setattr(module, "_read_part", None)
        out = memoryview(bytearray(5))
        assert store.get_many([b"a"], [out]) == [out] and bytes(out) == b"value"
