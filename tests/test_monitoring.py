"""The rules, the dashboard and the drill of docs/monitoring agree with each other and with the metrics."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvlab.engine.metrics import METRICS
from kvlab.stores.faults import Reason
from scripts import alert_drill, check_monitoring

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "monitoring"
PAGE = ROOT / "docs" / "04_production_deployment.md"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
TESTS = ("alerts_test.yml", "alerts_day_test.yml")
DAILY = TESTS[1:]
NEEDS_A_DAY = ("KVLabHitRateFell", "KVLabStoreTooSmall")
ROWS = json.loads(alert_drill.RESULTS.read_text("utf-8"))["rows"]


def promtool(*arguments: str, cwd: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True)


# --- rules --------------------------------------------------------------------------------------
@pytest.mark.prometheus
@pytest.mark.slow
def test_promtool_finds_every_rule_as_it_is_meant() -> None:
    for run in (promtool("check", "config", "prometheus.yml"), promtool("test", "rules", *TESTS)):
        assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.prometheus
@pytest.mark.slow
@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_the_tests_of_the_rules_notice_when_one_never_fires(alert: str, tmp_path: Path) -> None:
    assert not passes(tmp_path, alert, "vector(0) > 1", DAILY if alert in NEEDS_A_DAY else TESTS[:1])


@pytest.mark.prometheus
def test_the_tests_of_the_rules_notice_when_one_always_fires(tmp_path: Path) -> None:
    assert not passes(tmp_path, "KVLabWorkerDied", "vector(1)", DAILY)


def passes(folder: Path, alert: str, expression: str, tests: Sequence[str]) -> bool:
    """Whether tests pass with another expression of an alert."""
    content = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    for group in content["groups"]:
        for rule in group["rules"]:
            rule["expr"] = expression if rule.get("alert") == alert else rule["expr"]
    (folder / "alerts.yml").write_text(yaml.safe_dump(content))
    for name in tests:
        shutil.copy(FOLDER / name, folder)
    return promtool("test", "rules", *tests, cwd=folder).returncode == 0


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_it_means_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"].keys() == {"summary", "action", "runbook"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_reasons_in_rules_are_reasons() -> None:
    for rule in RULES:
        for matcher in re.findall(r'reason!?=~?"([^"]*)"', rule["expr"]):
            assert set(matcher.split("|")) <= {str(reason) for reason in Reason}, rule


# --- names --------------------------------------------------------------------------------------
def test_rules_and_dashboard_ask_for_metrics_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_monitoring.main([]) == 0, capsys.readouterr().err


def test_an_unknown_metric_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules, board = tmp_path / "rules.yml", tmp_path / "board.json"
    text = (FOLDER / "alerts.yml").read_text()
    rules.write_text(text.replace('kvlab_store_faults_total{reason="auth"}', "kvlab_store_fault_total"))
    board.write_text((FOLDER / "dashboard.json").read_text().replace("redis_db_keys", "x").replace("pages{", "page{"))
    assert check_monitoring.main([str(rules), str(board)]) == 1
    lines = capsys.readouterr().err.splitlines()
    meant = "unknown metric kvlab_store_fault_total; did you mean kvlab_store_faults_total?"
    assert lines[:2] == [f"rules.yml: KVLabStoreUnavailable: {meant}", f"rules.yml: KVLabLoginRefused: {meant}"]
    assert lines[2:] == ["board.json: Pages of the device: unknown metric kvlab_page; did you mean kvlab_pages?"]


@pytest.mark.parametrize("content", ["", "[1]", "groups: 3", "groups:\n- rules:\n  - alert: A\n", "a: [", "plain"])
def test_what_is_neither_rules_nor_a_dashboard_is_one_line(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yml").write_text(content)
    assert check_monitoring.main([str(tmp_path / "x.yml"), str(tmp_path / "none.yml")]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("x.yml: neither rules nor a dashboard: ")
    assert second.startswith("none.yml: neither rules nor a dashboard: ")


def test_the_dashboard_shows_time_saved_beside_the_hit_rate() -> None:
    panels = [p for p in json.loads((FOLDER / "dashboard.json").read_text())["panels"] if p["type"] != "row"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert [panel["title"] for panel in panels[:2]] == ["Token hit rate", "Time saved beside time spent"]
    asked = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    assert {"kvlab_prefill_avoided_seconds_total", "kvlab_load_seconds_total"} <= check_monitoring.names_in(asked)
    for one, other in itertools.pairwise(panels):
        a, b = one["gridPos"], other["gridPos"]
        assert a["y"] + a["h"] <= b["y"] or a["x"] + a["w"] <= b["x"], f"{one['title']} lies on {other['title']}"


# --- the page and the drill ---------------------------------------------------------------------
def rows_of(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading of the page."""
    text = PAGE.read_text("utf-8").split(f"\n{heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert lines
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()[2:]]


def test_the_page_lists_every_metric() -> None:
    told = [(name.strip("`"), kind, unit, labels) for name, kind, unit, labels, _ in rows_of("### Metrics")]
    assert told == [(m.name, m.kind, m.unit, ", ".join(f"`{label}`" for label in m.labels)) for m in METRICS], (
        "docs/04, Metrics"
    )


def test_the_page_lists_every_alert() -> None:
    told = [(name.strip("`"), severity) for name, severity, *_ in rows_of("### Alerts")]
    assert told == [(rule["alert"], rule["labels"]["severity"]) for rule in ALERTS]


def test_each_alert_fired_by_its_fault_and_on_nothing_else_in_the_drill() -> None:
    assert [(row["fault"], row["expected"]) for row in ROWS] == [(f.name, f.alert) for f in alert_drill.FAULTS]
    assert all(row["fired"] == ([row["expected"]] if row["expected"] else []) and row["ok"] for row in ROWS)
    assert {row["expected"] for row in ROWS} - {""} == {rule["alert"] for rule in ALERTS}


def test_the_page_has_the_table_of_the_drill() -> None:
    told = [row[:4] for row in rows_of("### The drill")]
    fired = [", ".join(f"`{name}`" for name in row["fired"]) or "none" for row in ROWS]
    assert told == [
        [row["fault"], row["injected"], names, str(row["after_s"] or "–")]
        for row, names in zip(ROWS, fired, strict=True)
    ]


def test_a_drill_needs_a_shorter_time_for_each() -> None:
    short = alert_drill.shorter((FOLDER / "alerts.yml").read_text())
    assert "offset 1d" not in short and short.count("expr:") == len(RULES)
    with pytest.raises(Exception, match=r"shorter time for \[3h\]"):
        alert_drill.shorter("rate(x[3h])")


def test_an_unknown_fault_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert alert_drill.main(["flood"]) == 1
    assert capsys.readouterr().err.endswith("got flood\n")
