"""The book of faults: each fault test writes one row, and `KVLAB_RECORD=1` keeps them in docs/results/faults.json.

@pytest.mark.fault(number=4)
def test_a_hung_server(book, own_server):
    with book("hung server", injected="SIGSTOP", expected="timeout, then breaker") as row:
        ...
        row.seen, row.added_ms = dict(store.stats().misses), 251.0

A row is written only when its test passed: what is in the file was seen. The file is also the list of the
numbers: each row says what its number injects.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvlab.lab.machine import describe_machine, versions

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "faults.json"


@dataclass
class Row:
    """One fault: its number, what was done, what should and what did come of it.

    `added_ms` is the time that all calls under the fault took together.
    """

    row: int
    fault: str
    injected: str
    expected: str
    seen: Any = None
    ok: bool = False
    added_ms: float | None = None


Book = Callable[..., contextlib.AbstractContextManager[Row]]


def open_book(numbers: Sequence[int], kept: list[Row]) -> Book:
    """What a test with these numbers writes its rows with.

    A test that has several numbers says for each row which one it is: `number=`.
    """

    @contextlib.contextmanager
    def open_row(fault: str, *, injected: str, expected: str, number: int | None = None) -> Iterator[Row]:
        (number,) = numbers if number is None else [number]
        assert number in numbers, f"the test's marker says {numbers}, its row {number}"
        made = Row(number, fault, injected, expected)
        yield made
        assert made.seen is not None, "a fault test must say what it saw"
        made.ok = True
        kept.append(made)

    return open_row


def record(new: Sequence[Row]) -> None:
    """Put rows in the place of older ones of the same fault."""
    old = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = {(r["row"], r["fault"]): r for r in old} | {(r.row, r.fault): _rounded(r) for r in new}
    content = {"rows": [rows[k] for k in sorted(rows)], "machine": describe_machine(), "versions": versions()}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def _rounded(row: Row) -> dict[str, Any]:
    plain: dict[str, Any] = _plain(asdict(row))
    return plain | {"added_ms": None if row.added_ms is None else round(row.added_ms, 1)}


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, dict):
        return {", ".join(map(str, k)) if isinstance(k, tuple) else str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | None) else str(value)
