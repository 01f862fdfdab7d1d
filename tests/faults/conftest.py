"""The book of faults: each fault test writes one row, and `KVLAB_RECORD=1` keeps them in docs/results/faults.json.

def test_a_hung_server(book, own_server):
    with book(4, "hung server", injected="SIGSTOP", expected="timeout, then breaker") as row:
        ...
        row.seen, row.added_ms = dict(store.stats().misses), 251.0

A row is written only when its test passed: what is in the file was seen.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from kvlab.lab.machine import describe_machine, versions

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "faults.json"
ROWS = pytest.StashKey[list["Row"]]()


@dataclass
class Row:
    """One fault: its number in the plan, what was done, what should and what did come of it.

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


@pytest.fixture
def book(request: pytest.FixtureRequest) -> Book:
    """Opens a row; it is kept when the block ends without an error."""

    @contextlib.contextmanager
    def open_row(row: int, fault: str, *, injected: str, expected: str) -> Iterator[Row]:
        made = Row(row, fault, injected, expected)
        yield made
        assert made.seen is not None, "a fault test must say what it saw"
        made.ok = True
        request.config.stash.setdefault(ROWS, []).append(made)

    return open_row


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Put this run's rows in the place of older ones of the same fault."""
    new = session.config.stash.get(ROWS, [])
    if not (new and os.environ.get("KVLAB_RECORD")):
        return
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
