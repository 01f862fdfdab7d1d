"""The disk of notebook 11b shows a reader every step; the store that keeps first values keeps them."""

from pathlib import Path

import pytest

from kvlab.course.toystores import Disk, KeepsFirst, RealDisk


def test_a_reader_sees_half_of_a_write_and_a_whole_rename() -> None:
    disk = Disk("file", {"file": b"old!"})
    disk.write("file", b"1234")
    assert disk.seen == [b"old!", b"12", b"1234"]
    disk.write("other", b"new!")
    assert disk.seen == [b"old!", b"12", b"1234"]
    disk.rename("other", "file")
    assert disk.seen == [b"old!", b"12", b"1234", b"new!"]
    assert disk.files == {"file": b"new!"}


def test_a_deleted_file_is_seen_as_none() -> None:
    disk = Disk("file")
    assert disk.seen == [None] and not disk.exists("file")
    disk.write("file", b"ab")
    disk.delete("file")
    disk.delete("file")
    assert disk.seen == [None, b"a", b"ab", None]
    with pytest.raises(FileNotFoundError):
        disk.rename("file", "other")


@pytest.mark.parametrize(("own_name", "came"), [("file.one", b"new!"), ("file.new", b"half of another va")])
def test_another_writer_tears_a_file_that_has_the_same_name_for_both(own_name: str, came: bytes) -> None:
    disk = Disk("file", {}, "one", "two")
    disk.write(own_name, b"new!")
    disk.rename(own_name, "file")
    assert disk.files["file"] == came


def test_a_real_disk_does_the_same(tmp_path: Path) -> None:
    disk = RealDisk(tmp_path)
    disk.write("a", b"new")
    disk.write("b", b"old")
    disk.rename("a", "b")
    assert disk.read("b") == b"new" and not disk.exists("a")
    disk.delete("b")
    disk.delete("b")
    assert not list(tmp_path.iterdir())


def test_the_first_value_is_kept_until_it_is_removed() -> None:
    store = KeepsFirst()
    assert store.put("a", b"one") and store.put("a", b"two")
    assert store.get("a") == b"one" and store.get("b") is None
    assert store.remove("a") and store.remove("b") and store.removed == 1
    assert store.put("a", b"two") and store.get("a") == b"two"


def test_a_leased_value_is_not_removed() -> None:
    store = KeepsFirst({"a": b"one"}, leased=("a",))
    assert not store.remove("a")
    assert store.get("a") == b"one" and store.removed == 0
