"""A benchmark's result as text: its explanation, its rows as tables, and every other value as a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def text(result: Mapping[str, Any]) -> str:
    """Format a result: `about` first, each list of rows as a table under its name, other values as `name: value`."""
    lines = [str(result["about"])] if "about" in result else []
    for name, value in result.items():
        if name == "about":
            continue
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [f"{name}:", *_table(value)]
        elif isinstance(value, Mapping):
            lines.append(f"{name}: " + ", ".join(f"{k} {_cell(v)}" for k, v in value.items()))
        else:
            lines.append(f"{name}: {_cell(value)}")
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [list(rows[0]), *[[_cell(v) for v in row.values()] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  " + "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
