"""Faults 41 to 47: a cache over files whose writers are killed, and whose disk is full, gone, closed or hanging."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvlab.cache import DistributedKVCache
from kvlab.stores import FileStore
from kvlab.stores.files.calls import THREADS
from kvlab.stores.files.folder import name_of
from tests.faults import soak_files
from tests.faults.book import Book
from tests.faults.kit import (
    BLOCKS,
    KEYS,
    KV,
    LONG_S,
    LOST,
    MIB,
    OTHER_KV,
    OTHER_TOKENS,
    TOKENS,
    cache_over,
    check_bad_value,
    check_repaired,
    load_all,
    load_others,
    under_fault,
    wait_for,
)
from tests.faults.mounts import SlowDisk, make_read_only, small_disk

DEADLINE_S = 0.2


@pytest.fixture
def files(tmp_path: Path) -> Iterator[DistributedKVCache]:
    """A cache over files that has saved all blocks."""
    with cache_over(FileStore(tmp_path / "store", deadline_s=LONG_S)) as made:
        assert made.save(TOKENS, KV) == BLOCKS
        yield made


def store_of(cache: DistributedKVCache) -> FileStore:
    assert isinstance(cache.store, FileStore)
    return cache.store


def file_of(cache: DistributedKVCache, key: bytes) -> Path:
    return Path(store_of(cache).path, name_of(key))


# --- killed writers -----------------------------------------------------------------------------
def write_for_ever(path: str) -> None:
    with FileStore(path) as store:
        for number in range(1 << 30):
            store.put_many([b"key"], [bytes([number % 251]) * MIB])


@pytest.mark.fault(number=41)
def test_writers_that_are_killed(tmp_path: Path, book: Book) -> None:
    path = str(tmp_path / "store")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.test_files"])
    reads = wrong = 0
    with (
        FileStore(path, deadline_s=LONG_S) as store,
        book("killed writers of a file", injected="SIGKILL of 10", expected="old or new value; left-overs go") as row,
    ):
        assert store.put_many([b"key"], [bytes(MIB)]) == 1
        for _ in range(10):
            writer = context.Process(target=write_for_ever, args=(path,), daemon=True)
            writer.start()
            first = store.get_many([b"key"])[0]
            wait_for(lambda first=first: store.get_many([b"key"])[0] != first)
            end = time.monotonic() + 0.1
            while time.monotonic() < end:
                (value,) = store.get_many([b"key"])
                reads += 1
                wrong += value is None or len(value) != MIB or bytes(value) != bytes(value[:1]) * MIB
            assert writer.pid is not None
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        left = len([*Path(path, ".tmp").iterdir()])
        store._janitor.sweep(full_since_ns=store._now())
        assert wrong == 0 and [*Path(path, ".tmp").iterdir()] == []
        with store._folder.counting() as count:
            assert count.used == sum(entry.size for entry in store._folder.entries())
        row.seen = {"reads": reads, "wrong": wrong, "files left over": left, "after a sweep": 0}


# --- disks --------------------------------------------------------------------------------------
@pytest.mark.fault(number=42)
@pytest.mark.mounts
def test_a_full_disk(tmp_path: Path, book: Book) -> None:
    with (
        small_disk(tmp_path / "disk", mib=8) as disk,
        cache_over(FileStore(disk / "store", deadline_s=LONG_S)) as cache,
        book("full disk", injected="tmpfs of 8 MiB, others take 5", expected="oldest tenth leaves; else oom") as row,
    ):
        (disk / "others").write_bytes(bytes(5 * MIB))
        keys = [b"%d" % number for number in range(20)]
        with under_fault(row):
            stored = [cache.store.put_many([key], [os.urandom(MIB // 2)]) for key in keys]
        assert stored == [1] * 20  # each made room for itself
        assert cache.store.get_many(keys)[-1] is not None
        with under_fault(row):
            assert cache.store.put_many([b"large"], [bytes(6 * MIB)]) == 0
        assert cache.store.stats().drops == Counter(oom=1)
        assert list(Path(store_of(cache).path, ".tmp").iterdir()) == []
        row.seen = {"stored": sum(stored), "drops": dict(cache.store.stats().drops)}
        assert cache.save(TOKENS, KV) == BLOCKS and load_all(cache) == BLOCKS
        assert cache.health().ok


@pytest.mark.fault(number=43)
@pytest.mark.mounts
def test_a_disk_that_cannot_be_written(tmp_path: Path, book: Book) -> None:
    with (
        small_disk(tmp_path / "disk", mib=8) as disk,
        cache_over(FileStore(disk / "store", deadline_s=LONG_S)) as cache,
        book("read-only disk", injected="remount,ro", expected="readonly; reads hit") as row,
    ):
        assert cache.save(TOKENS, KV) == BLOCKS
        make_read_only(disk)
        with under_fault(row):
            assert load_all(cache) == BLOCKS
            assert cache.save(OTHER_TOKENS, OTHER_KV) == 0
            assert load_others(cache) == 0
        assert cache.store.stats().drops == Counter(readonly=BLOCKS)
        assert not cache.health().ok and "readonly" in cache.health().detail
        row.seen = dict(cache.store.stats().drops)


@pytest.mark.fault(number=43)
def test_permissions_that_were_taken_away(files: DistributedKVCache, book: Book) -> None:
    """As another user: root may do everything."""
    with book("permissions taken away", injected="chmod 0 of the folder", expected="auth") as row:
        folder = Path(store_of(files).path)
        folder.chmod(0o000)
        try:
            if os.geteuid() == 0:
                child = os.fork()
                if child == 0:
                    os.setegid(65534)
                    os.seteuid(65534)
                    seen = _without_permission(files)
                    os._exit(0 if seen == (Counter(auth=1), Counter(auth=1)) else 1)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            else:
                assert _without_permission(files) == (Counter(auth=1), Counter(auth=1))
        finally:
            folder.chmod(0o700)
        row.seen = {"misses": {"auth": 1}, "drops": {"auth": 1}}
        assert load_all(files) == BLOCKS


def _without_permission(cache: DistributedKVCache) -> tuple[Counter[str], Counter[str]]:
    before = cache.store.stats()
    cache.store.get_many(KEYS[:1])
    cache.store.put_many(KEYS[:1], [b"one"])
    after = cache.store.stats()
    return after.misses - before.misses, after.drops - before.drops


@pytest.mark.fault(number=44)
@pytest.mark.mounts
def test_a_disk_that_is_unmounted(tmp_path: Path, book: Book) -> None:
    with book("unmounted disk", injected="umount", expected="gone; nothing written below the mount point") as row:
        with small_disk(tmp_path / "disk", mib=8) as disk:
            cache = cache_over(FileStore(disk / "store", deadline_s=LONG_S))
            assert cache.save(TOKENS, KV) == BLOCKS
        with under_fault(row):
            assert load_all(cache) == 0
            assert cache.save(TOKENS, KV) == 0
        assert cache.store.stats().misses == Counter(gone=BLOCKS)
        assert cache.store.stats().drops == Counter(gone=BLOCKS)
        assert list((tmp_path / "disk").iterdir()) == [] and "gone" in cache.health().detail
        row.seen = {"misses": dict(cache.store.stats().misses), "drops": dict(cache.store.stats().drops)}
        cache.close()


@pytest.mark.fault(number=44)
def test_a_folder_that_is_deleted(files: DistributedKVCache, book: Book) -> None:
    with book("folder of a store deleted", injected="rm -r", expected="gone, until it is opened again") as row:
        shutil.rmtree(store_of(files).path)
        with under_fault(row):
            assert load_all(files) == 0 and files.save(TOKENS, KV) == 0
        row.seen = dict(files.store.stats().misses)
        assert row.seen == {"gone": BLOCKS}
        with cache_over(FileStore(store_of(files).path, deadline_s=LONG_S)) as again:
            check_repaired(again)
        assert load_all(files) == BLOCKS


@pytest.mark.fault(number=45)
@pytest.mark.mounts
def test_a_disk_that_hangs(tmp_path: Path, book: Book) -> None:
    disk = SlowDisk(tmp_path / "real", tmp_path / "mounted")
    try:
        with (
            cache_over(FileStore(disk.path / "store", deadline_s=LONG_S)) as cache,
            book("hung disk", injected="SIGSTOP of a FUSE process", expected="timeout, then breaker; then all") as row,
        ):
            store = store_of(cache)
            assert cache.save(TOKENS, KV) == BLOCKS
            before = threading.active_count()
            store.deadline_s = DEADLINE_S
            disk.hang()
            with under_fault(row):
                for _ in range(10):
                    assert load_all(cache) == 0 and cache.save(OTHER_TOKENS, OTHER_KV) == 0
            misses, drops = store.stats().misses, store.stats().drops
            assert set(misses) | set(drops) <= {"timeout", "pool", "breaker"}
            assert misses["breaker"] + drops["breaker"] > misses["timeout"] + drops["timeout"]
            assert threading.active_count() <= before + THREADS
            row.seen = {"misses": dict(misses), "drops": dict(drops), "threads": threading.active_count() - before}
            disk.go_on()
            store.deadline_s = LONG_S
            wait_for(lambda: load_all(cache) == BLOCKS)
            crew = store._calls._threads._crew
            wait_for(lambda: crew.idle == crew.count)
            assert load_others(cache) == 0  # nothing that was dropped came later
            check_repaired(cache)
    finally:
        disk.close()


# --- what is in the files -----------------------------------------------------------------------
@pytest.mark.fault(number=46)
@pytest.mark.parametrize(
    ("name", "keep", "reason"), [("cut", 1000, "length"), ("emptied", 0, "length"), ("changed", None, "checksum")]
)
def test_a_damaged_file_is_repaired_by_the_next_save(
    files: DistributedKVCache, book: Book, name: str, keep: int | None, reason: str
) -> None:
    path = file_of(files, KEYS[LOST])

    def damage() -> None:
        if keep is not None:
            os.truncate(path, keep)
        else:
            data = bytearray(path.read_bytes())
            data[-3] ^= 1
            path.write_bytes(data)

    with book(f"{name} file", injected="another program", expected=f"{reason}, and repaired") as row:
        check_bad_value(row, files, damage, reason)


@pytest.mark.fault(number=47)
def test_eight_processes_share_a_folder(book: Book) -> None:
    """Short; `python tests/faults/soak_files.py` runs it for a minute."""
    with book("processes on files", injected="8 x get, put, delete; 16 MiB", expected="0 wrong, bound kept") as row:
        figures = soak_files.run(5, processes=8)
        assert figures["wrong"] == 0 and figures["raised"] == {} and figures["gets"] > 100
        assert figures["most_mib"] <= figures["bound_mib"] and figures["evicted"] > 0
        assert figures["moments_with_more_than_was_counted"] == 0 and figures["left_over_after_a_sweep"] == 0
        assert set(figures["drops"]) <= {"oom"} and set(figures["misses"]) <= {"absent"}
        row.seen = {name: figures[name] for name in ("gets", "wrong", "most_mib", "bound_mib", "evicted")}
