"""The claims of the source document, as a reader sees them."""

from kvlab.course.claims import CLAIMS, table, verdict, verdicts


def test_the_table_has_each_claim_with_its_number() -> None:
    head, rule, *rows = table().data.splitlines()
    assert head.count("|") == rule.count("|") == 4
    assert [row.strip("| ") for row in rows] == [f"{c.question} | {c.source:g} {c.unit} | {c.lesson}" for c in CLAIMS]
    assert "sooner does the first token come when the prefix is cached? | 11 times | 00 |" in rows[0]


def test_verdicts_have_the_guess_the_claim_what_came_out_and_whether_it_holds() -> None:
    _, _, *rows = verdicts({"cost": 41.26, "throughput": 3.4}, {"cost": 50}).data.splitlines()
    assert [row.split(" | ")[1:] for row in rows] == [
        ["no guess", "15", "3.4 times", "does not hold: 4.4 times too much |"],
        ["50", "95", "41.3 percent saved", "does not hold: 11.7 times too much |"],
    ]


def test_a_claim_holds_if_as_much_came_out_or_as_little_where_less_is_better() -> None:
    by_name = {claim.name: claim for claim in CLAIMS}
    assert verdict(by_name["throughput"], 15) == verdict(by_name["cost"], 99) == "holds"
    assert verdict(by_name["hashing"], 5) == "holds"
    assert verdict(by_name["hashing"], 25) == "does not hold: 2.5 times too little"
    assert verdict(by_name["cost"], 90) == "does not hold: 2.0 times too much"
