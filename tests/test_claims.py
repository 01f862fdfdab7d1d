"""The ledger of claims: complete, up to date, and without a number that no result backs.

The second half tests the generator: its references on small files, and what it says when something is changed.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.harness.builder import ROOT, load_script

claims = load_script("build_claims")
TABLE = tomllib.loads((ROOT / "docs" / "claims.toml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
LEDGER = claims.load(ROOT / "docs" / "claims.toml")

REQUIRED = {
    "time to first token": "latency-cold latency-warm latency-factor",
    "throughput": "throughput-none throughput-local throughput-redis throughput-full throughput-factor",
    "tail": "p95-none p95-local p95-redis p95-full",
    "cost": "cost-none cost-local cost-redis cost-full cost-saved",
    "hit rates": "hits-none hits-local hits-redis hits-full hits-agentic hits-chat hits-structured hits-unique",
    "use cases": "reuse-hundreds use-structured no-help",
    "memory": "memory-float32 memory-float16 memory-gzip compression-83 gzip deserialization keys-and-values-per-layer",
    "look-up": "hash-time hash-o1 hash-sha256 similarity",
    "cache": "three-layers ttl-day automatic-expiration calls settings statistics health",
    "quick start": "quick-start-rate quick-start-lines",
    "products": "redis paged-attention vllm pytorch dragonfly nvidia-infinity nvidia-infinity-address deepspeed",
    "ray": "ray-serve plasma",
    "companies": "openai anthropic groq together deepseek",
    "money": "roi-saved roi-break-even",
    "course": "four-strategies cells words four-documents day-1 day-2 day-3 week-2 phases",
}
WORKLOADS = ("agentic", "chat", "structured", "unique")


# --- the ledger ---------------------------------------------------------------------------------
def test_the_page_is_as_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert claims.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("theme", REQUIRED)
def test_every_claim_has_its_row(theme: str) -> None:
    assert set(REQUIRED[theme].split()) <= {claim.id for claim in LEDGER.claims}


def test_no_row_is_required_by_nobody() -> None:
    assert {claim.id for claim in LEDGER.claims} == {name for names in REQUIRED.values() for name in names.split()}


def leaves(table: Any) -> Iterator[Any]:
    for value in table.values():
        yield from leaves(value) if isinstance(value, Mapping) else [value]


@pytest.mark.parametrize("number", sorted(set(leaves(TABLE["source"]))))
def test_a_number_of_the_source_document_is_said_in_a_row(number: float) -> None:
    words = {1: "a month", 4: "four", 100000: "100K"}
    says = " ".join(claim.says for claim in LEDGER.claims)
    forms = {f"{number:g}", f"{number:,}", words.get(int(number), f"{number:g}")}
    assert any(re.search(rf"(?<![\d.,]){re.escape(form)}(?![\d.]\d|\d)", says) for form in forms)


def test_the_six_questions_of_the_course_have_the_same_numbers() -> None:
    code = (ROOT / "kvlab" / "course" / "claims.py").read_text(encoding="utf-8")
    asked = {name: float(number) for name, number in re.findall(r'Claim\("(\w+)", "[^"]*", ([\d.]+),', code)}
    source, rates = TABLE["source"], TABLE["source"]["by_workload"]
    assert asked["latency"] == source["speedup"]
    assert asked["throughput"] == round(source["tok_per_s"]["full"] / source["tok_per_s"]["none"])
    assert rates["chat_least"] <= asked["hit_rate"] <= rates["chat_most"]
    assert asked["compression"] == source["compression_percent"]
    assert asked["hashing"] == source["hash_us"]
    assert asked["cost"] == source["cost_percent"]


def rows_of_the_page() -> list[list[str]]:
    """The cells of each row of the page's tables of claims."""
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in PAGE.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in cells if len(row) == 6 and row[0].strip() != "the source says"]


@pytest.mark.parametrize(("column", "words"), [(3, claims.VERDICTS), (4, claims.HOLDS)], ids=["verdict", "holds"])
def test_the_counts_are_those_of_the_rows(column: int, words: tuple[str, ...]) -> None:
    seen = Counter(row[column].partition(" (")[0] for row in rows_of_the_page())
    told = dict(re.findall(r"^\| ([^|]+) \| (\d+) \|$", PAGE, re.MULTILINE))
    assert {word: int(told.get(word, 0)) for word in words} == {word: seen[word] for word in words}
    assert int(told["all"]) == len(LEDGER.claims) == seen.total()


def test_what_was_not_found_was_searched_and_what_is_cited_has_a_link() -> None:
    for claim in LEDGER.claims:
        assert bool(claim.searched) == (claim.verdict == "no evidence found"), claim.id
        assert claim.verdict != "cited" or "](https://" in claim.cited, claim.id


def test_strategies_are_chosen_by_name() -> None:
    """One more strategy in the result must not move the others."""
    assert not re.search(r"strategies:\w+\[-?\d", (ROOT / "docs" / "claims.toml").read_text(encoding="utf-8"))


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)]+)\)", PAGE))))
def test_a_link_within_the_repository_leads_somewhere(link: str) -> None:
    path, _, anchor = link.partition("#")
    target = (ROOT / "docs" / path).resolve()
    assert target.exists()
    headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
    assert not anchor or anchor in map(slug, headings)


def test_links_to_notebooks_are_those_of_the_repository() -> None:
    for path in re.findall(r"https://github.com/kvlab/kvlab/blob/main/([^)]+)", PAGE):
        assert (ROOT / path).is_file()


# --- with other results -------------------------------------------------------------------------
def strategies(full: float = 300.0) -> dict[str, Any]:
    """Results of the four strategies, as the benchmark writes them."""
    rates = {"no cache": 100.0, "local pages": 200.0, "redis": 250.0, "full": full}
    rows = [
        {
            "strategy": strategy,
            "workload": workload,
            "tok_per_s": rate,
            "ttft_p50_ms": 10.0,
            "ttft_p95_ms": 20.0,
            "latency_p50_ms": 1e5 / rate,
            "latency_p95_ms": 2e5 / rate,
            "hit_rate": {"tokens": 0.0 if strategy == "no cache" else 0.9, "blocks": 0.8},
            "usd_per_mtok": 1000 / rate,
        }
        for workload in WORKLOADS
        for strategy, rate in rates.items()
    ]
    return {"rows": rows, "computed": rows, "machine": "a machine", "noisy": False}


def cost(saved: float = 9000.0, months: float | None = 0.5) -> dict[str, Any]:
    row = {"prompt": 1000, "saved_usd_per_month": saved, "saving_usd": [saved] * 3}
    row |= {"break_even_months": months, "store_load": 0.5}
    requests = (100_000, 1_000_000, 10_000_000)
    rows = [{"workload": workload, "requests_per_month": n, **row} for workload in WORKLOADS for n in requests]
    return {"rows": rows, "larger_model": rows, "machine": "none"}


def notebook(cells: Mapping[str, str]) -> str:
    """A notebook that shows a text in each cell."""
    made = [
        {"id": name, "cell_type": "code", "source": [], "outputs": [{"text": [text]}]} for name, text in cells.items()
    ]
    return json.dumps({"cells": made})


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    """This repository with other results of two benches."""
    for folder in ("docs/results", "notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    for path in (*ROOT.glob("docs/*.*"), *ROOT.glob("docs/results/*.json"), *ROOT.glob("notebooks/*.ipynb")):
        (tmp_path / path.relative_to(ROOT)).symlink_to(path)
    for folder in ("kvlab", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for name, data in {"strategies": strategies(), "cost": cost()}.items():
        replace(tmp_path / "docs" / "results" / f"{name}.json", json.dumps(data))
    replace(tmp_path / "docs" / "claims.md", PAGE)
    return tmp_path


def replace(path: Path, text: str) -> None:
    """Write a file of the copy; the one that it may be a link to is not touched."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def row_of(root: Path, name: str) -> Any:
    ledger = claims.load(root / "docs" / "claims.toml", root)
    return claims.fill(next(claim for claim in ledger.claims if claim.id == name), ledger.files)


def test_every_reference_leads_somewhere(complete: Path) -> None:
    assert claims.main([], complete) == 0
    assert claims.main(["--check"], complete) == 0
    assert "3.0 (agentic), 3.0 (chat), 3.0 (structured), 3.0 (unique)" in row_of(complete, "throughput-factor").came_out


def test_whether_a_claim_holds_follows_from_the_results(complete: Path) -> None:
    results = complete / "docs" / "results"
    assert row_of(complete, "throughput-factor").holds == "no"
    replace(results / "strategies.json", json.dumps(strategies(full=1600.0)))
    assert row_of(complete, "throughput-factor").holds == "yes"
    some = strategies()
    some["rows"][3]["tok_per_s"] = 1600.0
    replace(results / "strategies.json", json.dumps(some))
    assert row_of(complete, "throughput-factor").holds == "depends"


def test_what_was_measured_and_what_was_computed_are_judged_apart(complete: Path) -> None:
    path = complete / "docs" / "results" / "strategies.json"
    apart = {**strategies(), "computed": strategies(full=1600.0)["computed"]}
    replace(path, json.dumps(apart))
    assert row_of(complete, "throughput-factor").holds == "depends (measured no, computed yes)"
    assert claims.main([], complete) == 0
    page = (complete / "docs" / "claims.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| ([^|]+) \| (\d+) \|$", page, re.MULTILINE))
    assert sum(int(told.get(word, 0)) for word in claims.HOLDS) == len(LEDGER.claims)


def test_a_loss_and_a_break_even_that_never_comes_do_not_hold(complete: Path) -> None:
    assert [row_of(complete, name).holds for name in ("roi-saved", "roi-break-even")] == ["yes", "yes"]
    replace(complete / "docs" / "results" / "cost.json", json.dumps(cost(-3.0, None)))
    assert [row_of(complete, name).holds for name in ("roi-saved", "roi-break-even")] == ["no", "no"]
    assert "none (agentic)" in row_of(complete, "roi-break-even").came_out


def test_a_changed_result_changes_the_page(complete: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert claims.main([], complete) == 0
    path = complete / "docs" / "results" / "bench_codec.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    (row,) = (row for row in data["rows"] if row["codec"] == "fp16+gzip")
    row["x_fp32"] = 6.0
    replace(path, json.dumps(data))
    assert claims.main(["--check"], complete) == 1
    assert "would change" in capsys.readouterr().err
    assert row_of(complete, "compression-83").holds == "yes"
    assert row_of(complete, "memory-gzip").came_out.startswith("6.00 times smaller")


def test_a_changed_output_of_a_notebook_changes_the_page(complete: Path) -> None:
    path = complete / "notebooks" / "04_kv_serialization.ipynb"
    replace(path, path.read_text(encoding="utf-8").replace("random numbers 54%", "random numbers 53%"))
    assert "random numbers 53 %" in row_of(complete, "compression-83").came_out


# --- references ---------------------------------------------------------------------------------
@pytest.fixture
def small(tmp_path: Path) -> Any:
    """Files with two results, one notebook and one text."""
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    rows = [
        {"kind": "a", "of": "x", "ms": 1.5, "n": 1200, "ok": True, "deep": {"one word": 7}},
        {"kind": "a", "of": "y", "ms": 2.5, "n": 2, "ok": False, "deep": {"one word": 8}},
        {"kind": "b", "of": "x", "ms": 3.0, "n": 3, "ok": None, "deep": {"one word": 9}},
        {"kind": "b", "of": "y", "ms": 10.0, "n": 4, "ok": None, "deep": {"one word": 10}},
    ]
    (tmp_path / "docs" / "results" / "bench.json").write_text(json.dumps({"rows": rows, "version": "2.1+cpu"}))
    shown = {"plot": "Figure: real KV ≈55%, random 54%.\nagain: real KV ≈55%", "told": "took 1,024.5 ms\nor 3 ms"}
    (tmp_path / "notebooks" / "01_one.ipynb").write_text(notebook(shown))
    (tmp_path / "docs" / "text.md").write_text("| chat | .00 (first) | .91 | .98 |\n| code | 1 | 2 | 3 |\n")
    return claims.Files(tmp_path, {"says": {"fast": 15}}, ("docs/text.md", "docs/none.md"))


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("bench:rows[0].ms:.1f", "1.5"),
        ("bench:rows[-1].ms:.0f", "10"),
        ("bench:rows[0].n", "1,200"),
        ("bench:rows[0].ok", "yes"),
        ("bench:rows[2].ok", "none"),
        ("bench:version", "2.1+cpu"),
        ("bench:rows[kind=a,of=y].ms:.2f", "2.50"),
        ("bench:rows[n=3].ms:.0f", "3"),
        ("bench:rows[kind=b,of=x].deep.one word", "9"),
        ("bench:rows[*].ms | most:.1f", "10.0"),
        ("bench:rows[*,kind=a].ms | least:.1f", "1.5"),
        ("bench:rows | count", "4"),
        ("bench:rows[*,of=y].ms | count", "2"),
        ("bench:rows[*,kind=a].ms | by of:.1f", "1.5 (x), 2.5 (y)"),
        ("bench:rows[*,kind=b].ms | over bench:rows[kind=a,of=same].ms | by of:.0f", "2 (x), 4 (y)"),
        ("bench:rows[*,kind=b].ms | under 30 | by n:.0f", "10 (3), 3 (4)"),
        ("bench:rows[0].n | floor 500", "1,000"),
        ("bench:rows[0].n | over 1000:.1f", "1.2"),
        ("bench:rows[1].ms | saved:.0f", "60"),
        ("bench:rows[1].ms | percent:.0f", "250"),
        ("bench:rows[1].ms | times 2 | plus bench:rows[1].n:.0f", "7"),
        ("source:says.fast", "15"),
        ("count:documents", "1"),
        ("count:code_cells", "2"),
        ('01_one#plot "real KV ≈…%"', "55"),
        ('01_one#told "took … ms" | over 1000:.1f', "1.0"),
        ('docs/text.md "| chat | ~ | … | ~ |" | percent:.0f', "91"),
        ('docs/text.md "| code | … |"', "1"),
    ],
)
def test_references(small: Any, reference: str, text: str) -> None:
    assert claims.show(reference, small) == text


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("nothing:rows[0].ms:.1f", "there is no docs/results/nothing.json; there are bench"),
        ("bench:rows[0].s:.1f", "there is no 's'; there is kind, of, ms"),
        ("bench:rows[7].ms:.1f", r"there is no \[7\] in a list of 4"),
        ("bench:rows[kind=c].ms:.1f", r"\[kind=c\] fits 0 rows; there are \{'kind': \['a', 'b'\]\}"),
        ("bench:rows[kind=a].ms:.1f", r"\[kind=a\] fits 2 rows"),
        ("bench:rows[colour=a].ms:.1f", "there is no 'colour'"),
        ("bench:version[0]", "needs a list, got a str"),
        ("bench:version.major", "there is no 'major'; there is a str"),
        ("bench:rows[0.ms", r"cannot read the path 'rows\[0.ms'"),
        ("bench:rows[0].ms", "1.5 needs a format"),
        ("bench:rows[*].ms:.1f", "4 values: add"),
        ("bench:rows[0].ms | half:.1f", "unknown function 'half'; there are percent, saved"),
        ("bench:rows[0].ms | over bench:rows[*].ms:.1f", r"over needs one number, got 4 .* \[field=same\] chooses one"),
        ("bench:rows[0].kind:.1f", "expected a number, got 'a'"),
        ("bench", "expected FILE:PATH"),
        ('01_one#none "…"', "has no cell 'none'; it has plot, told"),
        ('01_two#plot "…"', "there is no notebooks/01_two.ipynb; there are 01_one"),
        ('01_one#plot "integers …%"', "fits nothing in: Figure: real KV"),
        ('01_one#told "… ms"', "fits 2 different numbers"),
        ('01_one#told "took ms"', "expected one …"),
        ('docs/none.md "…"', "there is no file docs/none.md"),
    ],
)
def test_a_reference_that_leads_nowhere_says_what_is_there(small: Any, reference: str, says: str) -> None:
    with pytest.raises(claims.ClaimError, match=says):
        claims.show(reference, small)


# --- rows ---------------------------------------------------------------------------------------
def claim(**changes: Any) -> Any:
    given = {"id": "one", "theme": "t", "says": "15x", "came_out": "{bench:rows[0].ms:.1f} times", "holds": "yes"}
    return claims.Claim(**{**given, "verdict": "measured", **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"verdict": "true"}, "expected a verdict of measured, computed"),
        ({"holds": "mostly"}, "expected holds of yes, no"),
        ({"verdict": "no evidence found"}, "not where it was searched"),
        ({"verdict": "cited", "cited": "somebody"}, "has no link"),
        ({"came_out": "much faster"}, "refers to no result"),
        ({"came_out": "{bench:rows[0].ms:.1f} of 12.5 ms"}, "has 12.5 typed in"),
    ],
)
def test_what_a_row_lacks_is_said(changes: dict[str, Any], says: str) -> None:
    assert list(claims.complaints(claim())) == []
    assert any(says in complaint for complaint in claims.complaints(claim(**changes)))


def test_names_and_conditions_may_have_digits() -> None:
    came_out = "{bench:rows[0].ms:.1f} of Llama-3.1-8B on an H100, `16 tokens`, SHA-256, blocks of 64"
    assert list(claims.complaints(claim(came_out=came_out, inputs=["64"]))) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"came_out": "{bench:rows[0].s:.1f}"}, r"one: \{bench:rows\[0\].s:.1f\}: there is no 's'"),
        ({"cells": ["01_one#none"]}, "one: notebooks/01_one.ipynb has no cell 'none'"),
        ({"tests": ["docs/text.md::test_it"]}, "one: docs/text.md has no test test_it"),
        ({"holds": {"values": ["bench:rows[0].ms"], "about": "15"}}, "one: expected values, and at_least"),
        ({"holds": {"at_least": "source:says.fast"}}, "one: expected values, and at_least"),
        ({"holds": {}}, "one: expected values, and at_least"),
        ({"holds": {"measured": {"values": ["bench:rows[0].ms"]}}}, "one: expected values, and at_least"),
    ],
)
def test_a_row_that_cannot_be_filled_names_its_claim(small: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(claims.ClaimError, match=says):
        claims.fill(claim(**changes), small)


@pytest.mark.parametrize(
    ("bound", "holds"),
    [
        ({"at_least": "source:says.fast"}, "no"),
        ({"at_most": "source:says.fast"}, "yes"),
        ({"at_least": "bench:rows[1].ms"}, "depends"),
        ({"between": ["bench:rows[1].ms", "source:says.fast"]}, "depends"),
        ({"between": ["bench:rows[0].ms", "source:says.fast"]}, "yes"),
    ],
)
def test_checks(small: Any, bound: dict[str, Any], holds: str) -> None:
    check = {"values": ["bench:rows[*].ms"], **bound}
    assert claims.judged(check, small) == claims.judged({"here": check, "there": check}, small) == holds


def test_checks_that_end_differently_are_both_told(small: Any) -> None:
    slow = {"values": ["bench:rows[-1].ms"], "at_least": "source:says.fast"}
    assert claims.judged({"here": slow, "there": {**slow, "at_least": "bench:rows[0].ms"}}, small) == (
        "depends (here no, there yes)"
    )


def test_a_row_becomes_one_line_of_the_table(small: Any) -> None:
    row = claims.fill(claim(came_out="a | b\n{bench:rows[0].n}", cells=["01_one#plot"]), small)
    *_, line = claims._table("t", [row]).splitlines()
    assert line == (
        r"| 15x | a \| b 1,200 | [bench](results/bench.json) | measured | yes | "
        "[01](https://github.com/kvlab/kvlab/blob/main/notebooks/01_one.ipynb) `plot` |"
    )


def test_two_rows_with_one_id_are_refused(small: Any, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "claims.toml").read_text(encoding="utf-8")
    path = tmp_path / "claims.toml"
    path.write_text(text.replace('id = "cells"', 'id = "words"'), encoding="utf-8")
    with pytest.raises(claims.ClaimError, match="words: this id is used twice"):
        claims.load(path)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(claims.ClaimError, match=r"one: unknown fields \['colour'\], missing fields \['came_out'"):
        claims._claim({"id": "one", "colour": "red"})


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(claims.ClaimError, match="needs a line"):
        claims.refill("# Claims", "text")
