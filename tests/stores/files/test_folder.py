"""The folder of a `FileStore`: what is on the disk, whatever kills its writers, and that the count is never too low."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from kvlab.errors import ConfigError
from kvlab.stores.files import folder as folder_module
from kvlab.stores.files.folder import BLOCK, Folder, Gone, Stopped, blocks, name_of
from tests.stores.files.killer import killed_at

ROOM = 1 << 30
NAME, OTHER = name_of(b"a"), name_of(b"b")
OLD, NEW = b"old" * 5000, b"new" * 9000


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(str(tmp_path / "store"))
    made.prepare()
    return made


def write(folder: Folder, name: str, value: bytes, most: int = ROOM) -> int | None:
    parts = [memoryview(value[:1000]), memoryview(value[1000:])]
    return folder.write(name, parts, most, time.time_ns(), lambda: False)


def read(folder: Folder, name: str) -> bytes | None:
    found = folder.open(name)
    if found is None:
        return None
    with open(found[0], "rb") as file:
        return file.read()


def used(folder: Folder) -> int:
    with folder.counting() as count:
        return count.used


def on_disk(folder: Folder) -> int:
    """What all files take that are or may become values."""
    return sum(entry.size for entry in folder.entries()) + sum(
        blocks(file.stat().st_size) for file in Path(folder.path, ".tmp").iterdir()
    )


# --- values -------------------------------------------------------------------------------------
def test_a_value_is_what_was_written_last(folder: Folder) -> None:
    assert read(folder, NAME) is None
    write(folder, NAME, OLD)
    assert read(folder, NAME) == OLD
    write(folder, NAME, NEW)
    assert read(folder, NAME) == NEW and read(folder, OTHER) is None
    assert folder.delete([NAME, OTHER]) != [None, None]
    assert read(folder, NAME) is None


def test_the_count_is_what_the_files_take(folder: Folder) -> None:
    for name, value in ((NAME, OLD), (OTHER, b""), (NAME, NEW), (OTHER, NEW), (NAME, b"1")):
        write(folder, name, value)
        assert used(folder) == on_disk(folder)
    folder.delete([NAME, NAME, OTHER])
    assert used(folder) == on_disk(folder) == 0


@pytest.mark.parametrize(("size", "takes"), [(0, BLOCK), (1, BLOCK), (BLOCK, BLOCK), (BLOCK + 1, 2 * BLOCK)])
def test_a_file_takes_whole_blocks(folder: Folder, size: int, takes: int) -> None:
    assert write(folder, NAME, bytes(size)) == takes == used(folder)


def test_nothing_is_written_beyond_the_room(folder: Folder) -> None:
    assert write(folder, NAME, OLD, most=blocks(len(OLD))) == blocks(len(OLD))
    assert write(folder, OTHER, b"1", most=blocks(len(OLD))) is None
    assert read(folder, OTHER) is None and used(folder) == on_disk(folder) == blocks(len(OLD))


def test_a_write_that_nobody_waits_for_leaves_the_older_value(folder: Folder) -> None:
    write(folder, NAME, OLD)
    with pytest.raises(Stopped):
        folder.write(NAME, [memoryview(NEW)], ROOM, 1, lambda: True)
    assert read(folder, NAME) == OLD
    assert used(folder) == on_disk(folder) == blocks(len(OLD))


def test_a_value_that_was_used_again_is_not_deleted(folder: Folder) -> None:
    folder.write(NAME, [memoryview(OLD)], ROOM, 1000, lambda: False)
    folder.write(OTHER, [memoryview(OLD)], ROOM, 1000, lambda: False)
    assert folder.touch(NAME, 0, 2000)
    assert folder.delete([NAME, OTHER], [1000, 1000]) == [None, 1000]
    assert read(folder, NAME) == OLD


def test_touch_and_presence_go_by_the_last_use(folder: Folder) -> None:
    folder.write(NAME, [memoryview(OLD)], ROOM, 1000, lambda: False)
    assert folder.is_there(NAME, 999) and not folder.is_there(NAME, 1000) and not folder.is_there(OTHER, 0)
    assert not folder.touch(NAME, 1000, 3000) and not folder.touch(OTHER, 0, 3000)
    assert folder.touch(NAME, 999, 3000) and folder.is_there(NAME, 2999)


# --- what is not the store's --------------------------------------------------------------------
def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="other files"):
        Folder(str(tmp_path)).prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("file", "file/below"):
        with pytest.raises(ConfigError, match="got a file"):
            Folder(str(tmp_path / path)).prepare()


def test_a_folder_that_vanished_is_not_made_again(folder: Folder) -> None:
    write(folder, NAME, OLD)
    os.rename(folder.path, f"{folder.path}.away")
    os.mkdir(folder.path)  # as after an unmount
    for call in (lambda: write(folder, NAME, NEW), folder.check, lambda: folder.delete([NAME])):
        with pytest.raises(Gone):
            call()
    assert os.listdir(folder.path) == []
    os.rmdir(folder.path)
    os.rename(f"{folder.path}.away", folder.path)
    assert read(folder, NAME) == OLD and write(folder, NAME, NEW)


def test_a_folder_that_somebody_emptied_works(folder: Folder) -> None:
    write(folder, NAME, OLD)
    for path in (Path(folder.path, NAME), Path(folder.path, NAME).parent, Path(folder.path, ".tmp")):
        path.unlink() if path.is_file() else path.rmdir()
    write(folder, NAME, NEW)
    assert read(folder, NAME) == NEW


@pytest.mark.parametrize("content", [b"", b"kvlabfs1", b"x" * 32, b"x" * 4096])
def test_a_count_of_something_else_is_no_folder_of_a_store(folder: Folder, content: bytes) -> None:
    Path(folder.path, ".kvlab").write_bytes(content)
    with pytest.raises(Gone):
        write(folder, NAME, OLD)


def test_a_link_or_a_pipe_in_the_place_of_a_value_is_not_read(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    write(folder, NAME, OLD)
    path = Path(folder.path, NAME)
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic"):
        folder.open(NAME)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="expected a file"):
        folder.open(NAME)
    write(folder, NAME, NEW)  # a write replaces either
    assert read(folder, NAME) == NEW


def test_others_cannot_read_the_files(folder: Folder) -> None:
    write(folder, NAME, OLD)
    for path in (Path(folder.path), Path(folder.path, NAME).parent, Path(folder.path, NAME)):
        assert path.stat().st_mode & 0o077 == 0


# --- processes that are killed ------------------------------------------------------------------
@pytest.mark.parametrize("sync", ["none", "full"])
@pytest.mark.parametrize("older", [OLD, None])
def test_a_writer_may_be_killed_at_every_step(tmp_path: Path, sync: str, older: bytes | None) -> None:
    folder = Folder(str(tmp_path / "store"), sync)
    folder.prepare()
    found = set()
    step = 0
    while True:
        folder.delete([NAME])
        if older is None:
            shutil.rmtree(Path(folder.path, NAME).parent, ignore_errors=True)  # the write makes it
        else:
            write(folder, NAME, older)
        if not killed_at(step, lambda: write(folder, NAME, NEW)):
            break
        step += 1
        value = read(folder, NAME)
        assert value in (older, NEW)
        found.add(value)
        assert used(folder) >= sum(entry.size for entry in folder.entries())
        with folder.sweeping():
            reaped, writing = folder.reap()
        assert reaped <= 1 and writing == 0
        assert list(Path(folder.path, ".tmp").iterdir()) == []
        assert write(folder, NAME, NEW) and read(folder, NAME) == NEW  # no lock is left behind
    assert found == {older, NEW} and step > 30
    assert read(folder, NAME) == NEW


def test_a_deleter_may_be_killed_at_every_step(folder: Folder) -> None:
    step = 0
    while True:
        write(folder, NAME, OLD)
        write(folder, OTHER, OLD)
        if not killed_at(step, lambda: folder.delete([NAME])):
            break
        step += 1
        assert read(folder, NAME) in (OLD, None) and read(folder, OTHER) == OLD
        assert used(folder) >= on_disk(folder)
    assert step > 5 and read(folder, NAME) is None


def test_a_file_that_is_being_written_is_not_reaped(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look() -> None:
        with folder.sweeping():
            seen.append(folder.reap())

    write_all = folder_module._write_all

    def write_and_look(fd: int, parts: list[memoryview]) -> None:
        write_all(fd, parts)
        look()

    monkeypatch.setattr(folder_module, "_write_all", write_and_look)
    write(folder, NAME, NEW)
    assert seen == [(0, blocks(len(NEW)))]
    assert read(folder, NAME) == NEW


# --- locks --------------------------------------------------------------------------------------
def test_who_waits_for_a_lock_may_give_up(folder: Folder) -> None:
    """As when the process that has it was stopped."""
    asked = []

    def stopped() -> bool:
        asked.append(1)
        return len(asked) > 3

    write(folder, NAME, OLD)
    with folder.counting(), pytest.raises(Stopped):
        folder.write(NAME, [memoryview(NEW)], ROOM, 1, stopped)
    with folder.sweeping(), pytest.raises(Stopped), folder.sweeping(stopped):
        pass
    assert read(folder, NAME) == OLD and used(folder) == on_disk(folder)


def test_a_child_does_not_keep_the_locks_of_its_parent(folder: Folder) -> None:
    go_on, told = os.pipe()
    with folder.counting(), folder.sweeping():
        child = os.fork()
        if child == 0:
            os.read(go_on, 1)
            os._exit(0)
    assert write(folder, NAME, OLD)  # the child lives, and has closed what it inherited
    with folder.sweeping():
        pass
    os.write(told, b"1")
    os.waitpid(child, 0)
    os.close(go_on)
    os.close(told)


@pytest.mark.parametrize("call", ["writev", "utime", "replace", "ftruncate"])
def test_an_error_of_the_disk_leaves_the_older_value_and_the_count(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write(folder, NAME, OLD)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, "no")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="no"):
            write(folder, NAME, NEW)
    assert read(folder, NAME) == OLD and used(folder) == on_disk(folder) == blocks(len(OLD))
    assert write(folder, NAME, NEW) and read(folder, NAME) == NEW


def test_a_name_that_could_not_be_synced_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path / "store"), "full")
    folder.prepare()

    def fail(path: str) -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(folder_module, "_sync_folder", fail)
    with pytest.raises(OSError, match="no"):
        write(folder, NAME, NEW)
    assert read(folder, NAME) is None and used(folder) == 0
