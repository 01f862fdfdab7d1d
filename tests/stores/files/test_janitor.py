"""What leaves the folder of a `FileStore`: by policy, by TTL, and what killed writers left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvlab.core.policies import POLICIES
from kvlab.stores.files.folder import BLOCK, Folder, name_of
from kvlab.stores.files.janitor import NS, Janitor
from tests.faults.kit import wait_for
from tests.stores.files.killer import killed_at

ROOM = 100 * BLOCK


class Clock:
    """Nanoseconds, one more with each look."""

    def __init__(self) -> None:
        self.now = 1000 * NS

    def __call__(self) -> int:
        self.now += 1
        return self.now


class Yard:
    """A folder, its janitor, and values of one block each."""

    def __init__(self, path: Path, ttl_ns: int | None = None, policy: str = "lru", every_s: float = 60.0) -> None:
        self.clock = Clock()
        self.folder = Folder(str(path))
        self.folder.prepare()
        self.janitor = Janitor(self.folder, ROOM, ttl_ns, policy, every_s, self.clock)

    def put(self, *numbers: int, blocks: int = 1) -> None:
        for number in numbers:
            value = memoryview(bytes(blocks * BLOCK))
            assert self.folder.write(name_of(b"%d" % number), [value], ROOM, self.clock(), lambda: False)

    def use(self, *numbers: int) -> None:
        for number in numbers:
            assert self.folder.touch(name_of(b"%d" % number), 0, self.clock())

    def there(self, most: int = 200) -> list[int]:
        return [number for number in range(most) if self.folder.is_there(name_of(b"%d" % number), 0)]

    @property
    def used(self) -> int:
        with self.folder.counting() as count:
            return count.used


@pytest.fixture
def yard(tmp_path: Path) -> Yard:
    return Yard(tmp_path / "store")


def test_there_is_nothing_to_do_while_there_is_room(yard: Yard) -> None:
    yard.put(*range(95))
    yard.janitor.sweep()  # the first one is due by the clock
    yard.janitor.sweep()
    assert yard.there() == [*range(95)] and yard.janitor.evicted == 0


def test_the_least_recently_used_leave_down_to_nine_tenths(yard: Yard) -> None:
    yard.put(*range(96))
    yard.use(0, 1, 2)
    yard.janitor.sweep()
    assert yard.there() == [0, 1, 2, *range(9, 96)]
    assert yard.used == 90 * BLOCK and yard.janitor.evicted == 6


def test_uses_between_two_sweeps_are_seen(yard: Yard) -> None:
    yard.put(*range(96))
    yard.janitor.sweep()
    yard.use(6, 7)
    yard.put(*range(96, 102))
    yard.janitor.sweep()
    assert yard.there() == [6, 7, *range(14, 102)]


def test_room_for_a_large_value_is_made(yard: Yard) -> None:
    yard.put(*range(90))
    yard.janitor.sweep(need=40 * BLOCK)
    assert yard.used == 50 * BLOCK and yard.there() == [*range(40, 90)]
    yard.put(100, blocks=40)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_keeps_the_bound_and_its_books(tmp_path: Path, policy: str) -> None:
    yard = Yard(tmp_path / "store", policy=policy)
    for number in range(300):
        if yard.janitor.is_due(yard.used):
            yard.janitor.sweep()
        yard.put(number)
        if number % 3:
            yard.use(number)
    left = yard.there(300)
    assert yard.used == len(left) * BLOCK <= ROOM
    assert yard.janitor.evicted == 300 - len(left)


def test_a_value_that_is_used_while_others_are_evicted_stays(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    yard.put(*range(96))
    real = yard.janitor._evict

    def evict(wanted: int, stopped: Callable[[], bool]) -> None:
        yard.use(0)
        real(wanted, stopped)

    monkeypatch.setattr(yard.janitor, "_evict", evict)
    yard.janitor.sweep()
    assert 0 in yard.there() and 1 not in yard.there() and yard.used == 90 * BLOCK


def test_expired_values_leave_and_others_stay(tmp_path: Path) -> None:
    yard = Yard(tmp_path / "store", ttl_ns=100 * NS, every_s=25.0)
    yard.put(0, 1, 2)
    yard.clock.now += 60 * NS
    yard.use(1)
    yard.clock.now += 60 * NS
    yard.janitor.sweep()
    assert yard.there() == [1] and yard.used == BLOCK and yard.janitor.expired == 2


def test_of_several_processes_one_sweeps(tmp_path: Path) -> None:
    yard = Yard(tmp_path / "store", ttl_ns=10 * NS, every_s=60.0)
    other = Janitor(yard.folder, ROOM, 10 * NS, "lru", 60.0, yard.clock)
    yard.put(0)
    other.sweep()  # the first of each process reads the folder
    yard.janitor.sweep()
    yard.clock.now += 30 * NS
    other.sweep()  # not yet
    assert yard.there() == [0]
    yard.clock.now += 30 * NS
    other.sweep()
    assert yard.there() == []


def test_values_of_other_processes_are_evicted_too(yard: Yard) -> None:
    yard.janitor.sweep()
    yard.put(*range(96))  # the janitor has not seen one of them being written
    yard.janitor.sweep()
    assert yard.there() == [*range(6, 96)]


def test_what_another_process_deleted_is_forgotten(yard: Yard) -> None:
    yard.put(*range(96))
    yard.janitor.sweep()
    yard.folder.delete([name_of(b"%d" % number) for number in range(6, 50)])
    yard.put(*range(100, 145))
    yard.janitor.sweep(need=10 * BLOCK)
    assert yard.used == 80 * BLOCK and yard.there() == [*range(61, 96), *range(100, 145)]


def test_a_count_that_is_too_high_is_counted_again(yard: Yard) -> None:
    yard.put(*range(50))
    with yard.folder.counting() as count:
        count.add(50 * BLOCK)  # as after a writer that was killed
    yard.janitor.sweep()
    assert yard.used == 50 * BLOCK and yard.there() == [*range(50)]


def test_a_count_that_is_too_low_is_counted_again_by_the_next_process(yard: Yard) -> None:
    yard.put(*range(50))
    with yard.folder.counting() as count:
        count.subtract(40 * BLOCK)  # as after a power failure
    Janitor(yard.folder, ROOM, None, "lru", 60.0, yard.clock).sweep()
    assert yard.used == 50 * BLOCK


def test_a_clock_that_was_set_back_does_not_end_the_sweeps(tmp_path: Path) -> None:
    yard = Yard(tmp_path / "store", ttl_ns=10 * NS, every_s=5.0)
    yard.janitor.sweep()
    yard.clock.now -= 500 * NS
    yard.put(0)
    yard.clock.now += 20 * NS
    yard.janitor.sweep()
    assert yard.there() == []


def test_what_is_written_during_a_sweep_is_counted(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    yard.put(*range(10))
    real = yard.janitor._look

    def look(now: int, stopped: Callable[[], bool]) -> int:
        used = real(now, stopped)
        yard.put(50, 51)
        return used

    monkeypatch.setattr(yard.janitor, "_look", look)
    yard.janitor.sweep()
    assert yard.used == 12 * BLOCK


def test_a_full_disk_frees_a_tenth(yard: Yard) -> None:
    yard.put(*range(50))
    yard.janitor.sweep(full_since_ns=yard.clock())
    assert yard.there() == [*range(5, 50)]


def test_writers_that_find_the_disk_full_together_free_a_tenth_once(yard: Yard) -> None:
    yard.put(*range(50))
    began = yard.clock()
    for _ in range(4):
        yard.janitor.sweep(full_since_ns=began)
    assert yard.there() == [*range(5, 50)]


def test_a_value_that_would_never_fit_the_disk_evicts_nothing(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yard.folder, "free", lambda: 10 * BLOCK)
    yard.put(*range(50))
    yard.janitor.sweep(61 * BLOCK, full_since_ns=yard.clock())
    assert len(yard.there()) == 50
    yard.janitor.sweep(60 * BLOCK, full_since_ns=yard.clock())
    assert len(yard.there()) < 50


def test_a_sweeper_may_be_killed_at_every_step(tmp_path: Path) -> None:
    yard = Yard(tmp_path / "store")
    step = 0
    while True:
        yard.folder.delete([name_of(b"%d" % number) for number in range(100)])
        yard.put(*range(100))
        left_over = Path(yard.folder.path, ".tmp", "left-over")
        left_over.write_bytes(b"by a killed writer")
        sweeper = Janitor(yard.folder, ROOM, None, "lru", 60.0, yard.clock)
        if not killed_at(step, lambda sweeper=sweeper: sweeper.sweep()):
            break
        step += 1
        present = yard.there()
        assert present == list(range(100 - len(present), 100))  # the oldest leave, whole
        assert yard.used >= len(present) * BLOCK
        Janitor(yard.folder, ROOM, None, "lru", 60.0, yard.clock).sweep()  # no lock is left behind
        assert not left_over.exists() and yard.used == len(yard.there()) * BLOCK <= 95 * BLOCK
    assert step > 100 and yard.there() == list(range(10, 100))


def test_files_of_killed_writers_are_deleted(yard: Yard) -> None:
    left = Path(yard.folder.path, ".tmp", "0123456789abcdef")
    left.write_bytes(b"half a value")
    yard.janitor.sweep()
    assert not left.exists() and yard.janitor.reaped == 1


def test_the_background_sweeps_when_little_is_free(yard: Yard) -> None:
    yard.janitor.sweep()
    yard.put(*range(96))
    yard.janitor.wake(yard.used)
    wait_for(lambda: yard.used <= 90 * BLOCK)
    yard.janitor.close(30)
    assert not yard.janitor._thread.is_alive()


def test_the_background_ends_with_its_janitor(tmp_path: Path) -> None:
    yard = Yard(tmp_path / "store", every_s=0.01)
    yard.janitor.wake(0)
    thread = yard.janitor._thread
    del yard
    thread.join(30)
    assert not thread.is_alive()


def test_a_background_that_finds_no_folder_goes_on(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    yard.janitor.every_s = 0.01
    os.rename(yard.folder.path, f"{yard.folder.path}.away")
    tried = []
    sweeping = yard.folder.sweeping
    monkeypatch.setattr(yard.folder, "sweeping", lambda *args: (tried.append(1), sweeping(*args))[1])
    yard.janitor.wake(0)
    wait_for(lambda: len(tried) > 2)
    os.rename(f"{yard.folder.path}.away", yard.folder.path)
    left = Path(yard.folder.path, ".tmp", "0123456789abcdef")
    left.write_bytes(b"half a value")
    wait_for(lambda: not left.exists())
    yard.janitor.close(30)
