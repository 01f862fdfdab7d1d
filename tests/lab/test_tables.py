"""A result as text."""

from kvlab.lab import tables


def test_tables_line_up() -> None:
    text = tables.text({"rows": [{"name": "a", "x": 1.23456}, {"name": "long", "x": 2}], "noisy": False, "w": {"a": 1}})
    assert text.splitlines() == ["rows:", "  name     x", "     a  1.23", "  long     2", "noisy: False", "w: a 1"]


def test_what_the_rows_mean_comes_first() -> None:
    assert tables.text({"n": 1, "about": "n: a number"}).splitlines() == ["n: a number", "n: 1"]
    assert tables.text({"about": "a: one; b: two", "a": 1043.4, "b": 0.12345}).splitlines() == [
        "a: one;",
        "  b: two",
        "a: 1043",
        "b: 0.123",
    ]
