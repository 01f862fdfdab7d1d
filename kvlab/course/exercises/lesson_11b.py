"""The exercises of notebook 11b, alternatives: a ratio of speeds, a file that is replaced, a put that repairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvlab.course.exercises.engine import Exercise, Wrong
from kvlab.course.toystores import Disk, KeepsFirst


# --- 11b.1: a ratio of speeds -------------------------------------------------------------------
def ratio_of_speeds(reference: list[float], again: list[float], store: list[float]) -> float | None:
    """The speed of `store` divided by that of `reference`; None if the machine was too noisy."""
    if abs(np.median(again) / np.median(reference) - 1) > 0.1:
        return None
    ratios = [r / s for r, s in zip(reference, store, strict=True)]
    return float(np.median(ratios))


def _ratio_of_medians(reference: list[float], again: list[float], store: list[float]) -> float | None:
    if ratio_of_speeds(reference, again, store) is None:
        return None
    return float(np.median(reference) / np.median(store))


def _upside_down(reference: list[float], again: list[float], store: list[float]) -> float | None:
    ratio = ratio_of_speeds(reference, again, store)
    return None if ratio is None else 1 / ratio


def _mean_of_ratios(reference: list[float], again: list[float], store: list[float]) -> float | None:
    if ratio_of_speeds(reference, again, store) is None:
        return None
    return float(np.mean([r / s for r, s in zip(reference, store, strict=True)]))


def _never_checked(reference: list[float], again: list[float], store: list[float]) -> float | None:
    return ratio_of_speeds(reference, reference, store)


def _checked_one_way(reference: list[float], again: list[float], store: list[float]) -> float | None:
    if np.median(again) / np.median(reference) > 1.1:
        return None
    return _never_checked(reference, again, store)


RATIO_OF_SPEEDS = Exercise(
    name="ratio_of_speeds",
    number="11b.1",
    difficulty=3,
    reference=ratio_of_speeds,
    cases=(
        ([2.0, 2.0, 2.0], [2.0, 2.0, 2.0], [1.0, 1.0, 1.0]),
        ([1.0, 1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 2.0, 2.0], [0.5, 0.5, 1.0, 1.0, 1.0]),
        ([1.0, 1.0, 1.0, 1.0, 9.0], [1.0, 1.05, 1.0, 1.0, 1.0], [4.0, 4.0, 4.0, 4.0, 4.0]),
        ([1.0, 1.0, 1.0], [1.3, 1.3, 1.3], [0.5, 0.5, 0.5]),
        ([1.0, 1.0, 1.0], [0.8, 0.8, 0.8], [0.5, 0.5, 0.5]),
    ),
    wrong=(
        Wrong(_ratio_of_medians, "divide within each round first: both stores of a round had the same machine"),
        Wrong(_upside_down, "half the seconds are twice the speed: the seconds of the reference go on top"),
        Wrong(_mean_of_ratios, "one slow round moves a mean; take the median of the ratios"),
        Wrong(_never_checked, "where the same work differed from itself by more than a tenth, return None"),
        Wrong(_checked_one_way, "the second measurement of the same work may also be the faster one: use abs(… - 1)"),
    ),
    hint="first compare the medians of `again` and `reference`; then the median of reference ÷ store, round by round",
    after="This is what the ratios of `kvlab bench stores` are; there the check is the column `noisy`.",
)


# --- 11b.2: a file that is replaced -------------------------------------------------------------
def put_file(disk: Disk, file: str, value: bytes, writer: str) -> None:
    """Store a value such that every reader gets a whole one: the old or the new."""
    disk.write(f"{file}.{writer}", value)
    disk.rename(f"{file}.{writer}", file)


def _in_place(disk: Disk, file: str, value: bytes, writer: str) -> None:
    disk.write(file, value)


def _skips_what_exists(disk: Disk, file: str, value: bytes, writer: str) -> None:
    if not disk.exists(file):
        put_file(disk, file, value, writer)


def _one_name_for_all(disk: Disk, file: str, value: bytes, writer: str) -> None:
    disk.write(f"{file}.new", value)
    disk.rename(f"{file}.new", file)


def _deletes_first(disk: Disk, file: str, value: bytes, writer: str) -> None:
    disk.write(f"{file}.{writer}", value)
    disk.delete(file)
    disk.rename(f"{file}.{writer}", file)


def _what_happened(result: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """What a reader saw, and which files of this writer are there in the end."""
    disk, file, _, writer = args
    mine = sorted(name for name in disk.files if name == file or writer in name or name.endswith(".new"))
    return {"a reader saw": disk.seen, "files at the end": mine}


def _disk_cases() -> tuple[tuple[Any, ...], ...]:
    file, value = "3f9c", b"the new value"
    cases: list[tuple[Any, ...]] = []
    for files in ({}, {file: b"the old value"}, {file: b"dam#ged"}):
        cases.append((Disk(file, files), file, value, "writer1"))
    cases.append((Disk(file, {}, "writer1", "writer2"), file, value, "writer1"))
    return tuple(cases)


PUT_FILE = Exercise(
    name="put_file",
    number="11b.2",
    difficulty=3,
    reference=put_file,
    cases=_disk_cases(),
    wrong=(
        Wrong(_in_place, "a reader came in the middle and got half a value: write another file, then rename it"),
        Wrong(_skips_what_exists, "what is there may be damaged: a put replaces it"),
        Wrong(_one_name_for_all, "another writer wrote into your temporary file: put `writer` into its name"),
        Wrong(_deletes_first, "between delete and rename a reader found no file: a rename alone replaces"),
    ),
    hint="two calls are enough: write the whole value under a name of your own, then give it the right name",
    observe=_what_happened,
    after="kvlab's FileStore does the same, and a lock tells it which temporary files have lost their writer.",
)


# --- 11b.3: a put that repairs ------------------------------------------------------------------
def put_for_sure(library: KeepsFirst, key: str, value: bytes) -> bool:
    """Store a value in a library whose put keeps what is there; return whether it is there now."""
    if library.get(key) != value:
        library.remove(key)
        library.put(key, value)
    return library.get(key) == value


def _believes_the_put(library: KeepsFirst, key: str, value: bytes) -> bool:
    return library.put(key, value)


def _removes_at_the_end(library: KeepsFirst, key: str, value: bytes) -> bool:
    library.put(key, value)
    if library.get(key) != value:
        library.remove(key)
    return library.get(key) == value


def _always_removes(library: KeepsFirst, key: str, value: bytes) -> bool:
    library.remove(key)
    library.put(key, value)
    return library.get(key) == value


def _believes_the_second_put(library: KeepsFirst, key: str, value: bytes) -> bool:
    if library.get(key) != value:
        library.remove(key)
        return library.put(key, value)
    return True


def _in_the_library(result: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    library = args[0]
    return {"returned": result, "values": library.values, "values removed": library.removed}


_VALUE, _DAMAGED = b"keys and values", b"keys and v#lues"

PUT_FOR_SURE = Exercise(
    name="put_for_sure",
    number="11b.3",
    difficulty=3,
    reference=put_for_sure,
    cases=(
        (KeepsFirst(), "a", _VALUE),
        (KeepsFirst({"a": _DAMAGED, "b": b"other"}), "a", _VALUE),
        (KeepsFirst({"a": _VALUE}), "a", _VALUE),
        (KeepsFirst({"a": _DAMAGED}, leased=("a",)), "a", _VALUE),
    ),
    wrong=(
        Wrong(_believes_the_put, "put says True also when a damaged value is there: compare what get returns"),
        Wrong(_removes_at_the_end, "after the remove there is no value: put once more"),
        Wrong(_always_removes, "a whole value was removed: whoever asks at that moment has a miss for nothing"),
        Wrong(_believes_the_second_put, "a remove may be refused while somebody reads: look once more at the end"),
    ),
    hint="compare what get returns with the value; if it differs, remove and put; then compare again",
    observe=_in_the_library,
    after="It reads a value for each put. A store that replaces needs one call, and readers never meet a gap.",
)
