"""The claims of the source document, as a reader sees them."""

from kvlab.course.claims import CLAIMS, table, verdicts


def test_the_table_has_each_claim_with_its_number() -> None:
    head, rule, *rows = table().data.splitlines()
    assert head.count("|") == rule.count("|") == 4
    assert [row.strip("| ") for row in rows] == [f"{c.question} | {c.source:g} {c.unit} | {c.lesson}" for c in CLAIMS]
    assert "sooner does the first token come when the prefix is cached? | 11 times | 00 |" in rows[0]


def test_verdicts_have_the_guess_the_claim_and_what_came_out() -> None:
    _, _, *rows = verdicts({"cost": 41.26, "throughput": 3.4}, {"cost": 50}).data.splitlines()
    assert [row.split(" | ")[1:] for row in rows] == [
        ["no guess", "15", "3.4 times |"],
        ["50", "95", "41.3 percent saved |"],
    ]
