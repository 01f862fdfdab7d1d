"""Leases on the values of a `FileStore`: respected by every process, bounded, and over when their time is."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from kvlab.errors import ConfigError
from kvlab.stores import FileStore
from kvlab.stores.files import folder as folder_module
from kvlab.stores.files.calls import THREADS
from kvlab.stores.files.folder import BLOCK, Folder, Stopped, name_of
from kvlab.stores.files.janitor import NS, Janitor
from tests.harness.helpers import FakeClock
from tests.stores.files.killer import killed_at

ROOM = 100


def opened(path: Path, clock: Any, **settings: Any) -> FileStore:
    return FileStore(path / "store", ROOM * BLOCK, deadline_s=30, clock=clock, **settings)


def keys(numbers: Iterable[int]) -> list[bytes]:
    return [b"%d" % number for number in numbers]


def put(store: FileStore, numbers: Iterable[int]) -> None:
    for key in keys(numbers):
        assert store.put_many([key], [bytes(BLOCK)]) == 1


def there(store: FileStore, numbers: Iterable[int]) -> list[int]:
    return [number for number, key in zip(numbers, keys(numbers), strict=True) if store.probe([key])]


def fill(store: FileStore, clock: FakeClock, first: int, count: int = 5 * ROOM) -> None:
    """Write so much that everything else would leave."""
    for number in range(first, first + count):
        clock.now += 1e-3
        put(store, [number])


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_another_store_evicts_all_but_what_is_held_until_the_lease_ends(
    tmp_path: Path, clock: FakeClock, policy: str
) -> None:
    with opened(tmp_path, clock, policy=policy) as mine, opened(tmp_path, clock, policy=policy) as other:
        put(mine, range(20))
        assert mine.hold_many(keys(range(10)), 60, "me") == (10, True)
        fill(other, clock, 1000)
        assert there(other, range(20)) == [*range(10)]
        clock.now += 58
        fill(mine, clock, 2000)
        assert there(mine, range(20)) == [*range(10)]
        clock.now += 2
        fill(other, clock, 3000)
        assert there(mine, range(20)) == []


def test_a_release_ends_one_lease_and_a_renewal_goes_on(tmp_path: Path, clock: FakeClock) -> None:
    with opened(tmp_path, clock) as store:
        put(store, range(3))
        store.hold_many(keys([0, 1]), 60, "a")
        store.hold_many(keys([1, 2]), 60, "b")
        store.release("a")
        store.release("nobody")
        fill(store, clock, 1000)
        assert there(store, range(3)) == [1, 2]
        clock.now += 50
        assert store.hold_many(keys([1]), 60, "b") == (1, True)
        clock.now += 50
        fill(store, clock, 2000)
        assert there(store, range(3)) == [1]


def test_all_leases_together_hold_a_share_of_the_room_from_the_front(tmp_path: Path, clock: FakeClock) -> None:
    with opened(tmp_path, clock) as store, opened(tmp_path, clock, max_held=0.1) as modest:
        put(store, range(80))
        assert modest.hold_many(keys([99, *range(80)]), 60, "a") == (10, True)
        assert modest.hold_many(keys(range(5, 15)), 60, "b") == (5, True)  # the same count once
        assert store.hold_many(keys(range(70, 9, -1)), 60, "c") == (40, True)
        fill(store, clock, 1000)
        assert there(store, range(80)) == [*range(10), *range(31, 71)]
        for number in range(2000, 2040):  # and the other half takes what it always took
            put(store, [number])


def test_a_lease_outlasts_a_killed_process_but_not_its_end(tmp_path: Path) -> None:
    with opened(tmp_path, time.time) as store:
        put(store, range(20))
        child = os.fork()
        if child == 0:
            ok = opened(tmp_path, time.time).hold_many(keys(range(10)), 3600, "child") == (10, True)
            os.kill(os.getpid(), signal.SIGKILL if ok else signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        put(store, range(1000, 1500))
        assert there(store, range(20)) == [*range(10)]
    with opened(tmp_path, lambda: time.time() + 3600) as later:
        put(later, range(2000, 2500))
        assert there(later, range(20)) == []
    assert os.listdir(tmp_path / "store" / ".held") == []


def test_a_process_killed_at_any_step_holds_nothing_for_longer_than_its_lease(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "store"))
    folder.prepare()
    names = [name_of(key) for key in keys(range(3))]
    for name in names:
        assert folder.write(name, [memoryview(bytes(BLOCK))], ROOM * BLOCK, time.time_ns())

    def hold(holder: str = "child") -> int:
        now_ns = time.time_ns()
        return folder.hold(holder, names, ROOM * BLOCK, now_ns, 3600 * NS, 0, now_ns)

    step = 0
    while killed_at(step, hold):
        held = folder.held(time.time_ns())
        assert held <= set(names)
        assert folder.held(time.time_ns() + 3601 * NS) == set()
        assert hold("me") == 3 and folder.held(time.time_ns()) == set(names)
        folder.release("me")
        with folder.counting() as count:
            assert count.used == 3 * BLOCK
        step += 1
    assert step > 20 and folder.held(time.time_ns()) == set(names)


def test_what_a_lease_takes_after_a_sweep_has_chosen_it_stays(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "store"))
    folder.prepare()
    names = [name_of(key) for key in keys(range(ROOM))]
    for at, name in enumerate(names):
        folder.write(name, [memoryview(bytes(BLOCK))], ROOM * BLOCK, 1000 * NS + at)
    janitor = Janitor(folder, ROOM * BLOCK, None, "lru", 60, lambda: 2000 * NS)
    janitor._look(2000 * NS, lambda: False)
    assert folder.hold("me", names[:5], ROOM * BLOCK, 2000 * NS, NS, 0, 1000 * NS) == 5
    janitor._evict(10 * BLOCK, lambda: False)
    assert [name for name in names if not folder.is_there(name, 0)] == names[5:15]


def test_a_lease_outlives_the_ttl_also_where_another_process_has_a_shorter_one(
    tmp_path: Path, clock: FakeClock
) -> None:
    with opened(tmp_path, clock, ttl_s=100) as store, opened(tmp_path, clock, ttl_s=10) as hasty:
        put(store, range(2))
        store.hold_many(keys([0]), 500, "me")
        clock.now += 450  # for the hasty one it has expired
        hasty._janitor.sweep()
        assert there(store, range(2)) == [0]
        assert store.get_many(keys([0])) == [bytes(BLOCK)]
        clock.now += 51
        hasty._janitor.sweep()
        assert there(store, range(2)) == []


def test_the_number_of_leases_is_bounded(tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "MOST_LEASES", 3)
    with opened(tmp_path, clock) as store:
        put(store, range(1))
        assert [store.hold_many(keys([0]), 60, f"{i}")[0] for i in range(4)] == [1, 1, 1, 0]
        assert store.hold_many(keys([0]), 60, "2")[0] == 1
        clock.now += 60
        assert store.hold_many(keys([0]), 60, "3")[0] == 1
        assert len(os.listdir(tmp_path / "store" / ".held")) == 1


def test_the_name_of_a_holder_is_no_path(tmp_path: Path, clock: FakeClock) -> None:
    with opened(tmp_path, clock) as store:
        put(store, range(1))
        assert store.hold_many(keys([0]), 60, "../../outside\0") == (1, True)
        assert os.listdir(tmp_path) == ["store"]
        store.release("../../outside\0")
        assert os.listdir(tmp_path / "store" / ".held") == []


def test_a_lease_that_nobody_waits_for_any_more_does_not_begin(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "store"))
    folder.prepare()
    name = name_of(b"a")
    assert folder.write(name, [memoryview(bytes(BLOCK))], ROOM * BLOCK, time.time_ns())
    with pytest.raises(Stopped):
        folder.hold("me", [name], ROOM * BLOCK, time.time_ns(), 3600 * NS, 0, time.time_ns(), lambda: True)
    assert folder.held(time.time_ns()) == set()


def test_calls_that_wait_for_a_stopped_process_take_no_threads_from_reads(tmp_path: Path) -> None:
    def waited(there_is: Callable[[], object]) -> None:
        end = time.monotonic() + 30
        while not there_is() and time.monotonic() < end:
            time.sleep(0.1)
        assert there_is()

    with FileStore(tmp_path / "store", ROOM * BLOCK, deadline_s=0.2) as store:
        put(store, range(1))

        def tried() -> bool:
            assert store.hold_many(keys([0]), 60, "me") == (0, True)
            store.release("me")
            assert store.delete_many(keys([1])) == 0
            return store.stats().faults["timeout"] > THREADS

        with Folder(str(tmp_path / "store")).counting():  # a process that is stopped in it
            waited(tried)
            waited(lambda: there(store, [0]) == [0])
        waited(lambda: store.hold_many(keys([0]), 60, "me") == (1, True))


def test_what_is_no_lease_among_them_changes_nothing(tmp_path: Path, clock: FakeClock) -> None:
    with opened(tmp_path, clock) as store:
        put(store, range(3))
        assert store.hold_many(keys([0]), 60, "a") == (1, True)
        leases = tmp_path / "store" / ".held"
        (leases / "folder").mkdir()
        (leases / "link").symlink_to("/dev/zero")
        os.mkfifo(leases / "pipe")
        assert store.hold_many(keys(range(3)), 60, "b") == (3, True)
        assert not store.stats().faults


def test_a_disk_that_does_not_work_holds_nothing_and_counts_why(tmp_path: Path, clock: FakeClock) -> None:
    with opened(tmp_path, clock) as store:
        put(store, range(1))
        (tmp_path / "store").rename(tmp_path / "elsewhere")
        assert store.hold_many(keys([0]), 60, "me")[0] == 0
        store.release("me")
        assert store.stats().faults["gone"] == 2


@pytest.mark.parametrize("lease_s", [0, -1, True, "60", None, 1e12])
def test_what_is_no_lease_is_an_error(tmp_path: Path, lease_s: Any) -> None:
    with opened(tmp_path, time.time) as store, pytest.raises(ConfigError, match="lease_s"):
        store.hold_many([b"a"], lease_s, "me")


@pytest.mark.parametrize("share", [0, -0.1, 1.1, True])
def test_a_share_that_is_none_is_an_error(tmp_path: Path, share: Any) -> None:
    with pytest.raises(ConfigError, match="max_held"):
        opened(tmp_path, time.time, max_held=share)
