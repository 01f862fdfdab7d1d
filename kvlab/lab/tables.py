"""A benchmark's result as text: the sentence that explains it, its rows as tables, the rest as lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def text(result: Mapping[str, Any]) -> str:
    """What `about` says comes first; lists of rows become tables under their name, everything else `name: value`."""
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
