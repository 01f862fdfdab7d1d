"""A benchmark's result as text: its explanation, its rows as tables, and every other value as a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def text(result: Mapping[str, Any]) -> str:
    """Format a result: `about` first, a line for each of its terms; rows as tables; others as `name: value`."""
    lines = str(result["about"]).replace("; ", ";\n  ").splitlines() if "about" in result else []
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
    if isinstance(value, list):
        return f"[{', '.join(map(_cell, value))}]"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.3g}"  # 1043, not 1.04e+03


def usd(value: float) -> str:
    """Format dollars.

    >>> usd(-1234.5), usd(0.4)
    ('-$1,234', '$0')
    """
    whole = f"{abs(value):,.0f}"
    return f"-${whole}" if value < 0 and whole != "0" else f"${whole}"


def number(value: float) -> str:
    """Format a number with three digits.

    >>> number(0.12345), number(12345.6), number(1234567)
    ('0.123', '12,300', '1,230,000')
    """
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:g}"
