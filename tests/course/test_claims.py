"""The claims of the source document, as a reader sees them."""

from kvlab.course.claims import CLAIMS, table


def test_the_table_has_each_claim_with_its_number() -> None:
    head, rule, *rows = table().data.splitlines()
    assert head.count("|") == rule.count("|") == 4
    assert [row.strip("| ") for row in rows] == [f"{c.question} | {c.source:g} {c.unit} | {c.lesson}" for c in CLAIMS]
    assert "sooner does the first token come when the prefix is cached? | 11 times | 00 |" in rows[0]
