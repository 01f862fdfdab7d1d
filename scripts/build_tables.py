"""Write the tables of docs/03 from the committed results, between its marks; with --check only say what is stale.

    python scripts/build_tables.py [--check]

A table stands between <!-- table:NAME --> and <!-- end -->. All else in the page is written by hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = "docs/03_redis_vs_alternatives.md"
NONE: Final = "–"


def _result(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text("utf-8"))
    return data


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _speed(row: dict[str, Any] | None, name: str) -> str:
    """Speed by that of Redis in the same rounds; ~ where the machine was noisy."""
    if row is None or row.get("error"):
        return NONE
    return f"{'~' if row['noisy'] else ''}{row[name]:.2f}"


def stores() -> str:
    """One row for each store: what it is, and its speed by that of Redis."""
    found = _result("bench_stores")["rows"]
    rows = []
    for name in dict.fromkeys(row["store"] for row in found):
        own = [row for row in found if row["store"] == name]
        if own[0]["error"]:
            rows.append([name, *[NONE] * 8, own[0]["error"]])
            continue
        by = {(row["kib"], row["new_keys"]): row for row in own}
        cells = [_speed(by.get((kib, True)), f"{what}_vs_redis") for kib in (384, 1024) for what in ("put", "get")]
        largest = by[1024, True]
        cells += [f"{largest['put_gbps']:.1f} / {largest['get_gbps']:.1f}", f"{largest['probe64_ms']:.2f}"]
        rows.append([name, own[0]["version"], own[0]["allocator"] or NONE, *cells, own[0]["after_restart"]])
    head = ["store", "version", "allocator", "put 384 KiB", "get", "put 1 MiB", "get", "GB/s put / get", "64 names, ms"]
    return _table([*head, "restart"], rows)


def io_threads() -> str:
    """Requests a second by threads."""
    return _table(
        ["server", "I/O threads", "SET a second", "GET a second"],
        [
            [row["version"], f"{row['threads']}", *[f"{row[what]:,.0f}" for what in ("set_per_s", "get_per_s")]]
            for row in _result("bench_stores")["io_threads"]
            if not row["error"]
        ],
    )


def second_put() -> str:
    """What a second put leaves."""
    rows = [row for row in _result("bench_stores")["rows"] if not row["error"]]
    kept = {row["store"]: row["second_put"] for row in rows}
    values = dict.fromkeys(kept.values())
    return _table(
        ["after two puts under one key a get gives", "stores"],
        [[value, "; ".join(name for name, left in kept.items() if left == value)] for value in values],
    )


def cannot() -> str:
    """The clauses of the contract that an adapter does not keep."""
    adapters: dict[str, list[str]] = {}
    for name, clauses in _result("bench_stores")["cannot"].items():
        adapters.setdefault(clauses, []).append(name)
    return _table(["adapter", "cannot"], (["; ".join(names), clauses] for clauses, names in adapters.items()))


def kept_memory() -> str:
    """A server whose C library keeps freed memory beside one whose C library gives it back."""
    head = ["server", "KiB", "page faults, default", "page faults, memory kept", "put, speed by default", "get"]
    return _table(
        head,
        (
            [
                row["server"],
                *[f"{row[name]:,}" for name in ("kib", "faults_default", "faults_kept")],
                *[_speed(row, f"{what}_vs_default") for what in ("put", "get")],
            ]
            for row in _result("bench_stores")["kept_memory"]
            if not row["error"]
        ),
    )


def files() -> str:
    """The store in files beside a program that reads and writes the same files by hand."""
    result = _result("bench_files")
    named = [(f"get, from {row['from']}", row) for row in result["gets"]]
    named += [(f"put, sync={row['sync']}", row) for row in result["puts"]]
    return _table(
        ["16 values", "KiB each", "GB/s", "by hand", "store time / by-hand time"],
        (
            [name, f"{row['kib']:,}", f"{row['gbps']:.2f}", f"{row['gbps_by_hand']:.2f}", _speed(row, "vs_by_hand")]
            for name, row in named
        ),
    )


def damaged() -> str:
    """What a damaged file does in three stores."""
    return _table(
        ["store", "damage", "the next read", "the next save says", "the read after it"],
        (
            [row[name].replace("|", "/") for name in ("store", "damage", "read", "saved_again", "read_again")]
            for row in _result("peer_files")["rows"]
        ),
    )


def deepspeed() -> str:
    """Milliseconds to the first token."""
    columns = ("plain", "deepspeed", "deepspeed_again", "empty", "memory", "redis")
    return _table(
        ["prompt (from the cache)", "transformers", "DeepSpeed", "again", "connector, empty", "memory", "Redis"],
        (
            [f"{row['prompt_tokens']:,} ({row['cached_tokens']:,})", *[f"{row[f'{name}_ms']:.0f}" for name in columns]]
            for row in _result("deepspeed")["rows"]
        ),
    )


def deepspeed_tried() -> str:
    """What else DeepSpeed has, and what it said."""
    return _table(
        ["tried", "came out", "where"],
        (
            [one["what"], one["said"].replace("|", "/"), f"`{one['where']}`" if one["where"] else NONE]
            for one in _result("deepspeed")["tried"]
        ),
    )


def machine() -> str:
    """Where the numbers come from."""
    names = ("bench_stores", "bench_files", "peer_files", "deepspeed")
    return _table(
        ["result", "machine", "noisy"],
        ([f"[{name}](results/{name}.json)", (one := _result(name))["machine"], _noisy(one)] for name in names),
    )


def _noisy(result: dict[str, Any]) -> str:
    rows = [row for part in ("rows", "gets", "puts") for row in result.get(part, []) if "noisy" in row]
    if rows:
        return f"{sum(bool(row['noisy']) for row in rows)} of {len(rows)} rows"
    return {True: "yes", False: "no", None: NONE}[result.get("noisy")]


TABLES: Final[tuple[Callable[[], str], ...]] = (
    stores, kept_memory, io_threads, second_put, cannot, files, damaged, deepspeed, deepspeed_tried, machine
)  # fmt: skip


def refill(page: str) -> str:
    """Return the page with new tables.

    Raises:
        ValueError: the page has a table that nobody makes, or lacks one.
    """
    made = {table.__name__: table for table in TABLES}
    asked = re.findall(r"<!-- table:(\w+) -->", page)
    if sorted(asked) != sorted(made):
        raise ValueError(f"expected one mark for each of {', '.join(made)}, got {', '.join(asked)}")
    return re.sub(
        r"(<!-- table:(\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{made[found[2]]()}\n{found[3]}",
        page,
        flags=re.DOTALL,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or check it."""
    path = ROOT / PAGE
    page = path.read_text("utf-8")
    new = refill(page)
    if "--check" in (sys.argv[1:] if argv is None else argv):
        if new != page:
            print(f"{PAGE} is stale: python scripts/build_tables.py", file=sys.stderr)
        return int(new != page)
    path.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
