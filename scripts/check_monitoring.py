"""Check that rules and dashboards ask for metrics that exist: one line for each that does not.

    python scripts/check_monitoring.py [FILE …]        default: those of docs/monitoring

Prometheus takes any name: an alert on a metric that nobody exports never fires, and nobody is told.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from kvlab.engine.metrics import METRICS

FOLDER: Final = Path(__file__).parents[1] / "docs" / "monitoring"
FILES: Final = (FOLDER / "alerts.yml", FOLDER / "dashboard.json")
OTHERS: Final = {  # of Prometheus, and of redis_exporter
    "up",
    "ALERTS",
    "redis_db_keys",
    "redis_evicted_keys_total",
    "redis_memory_used_bytes",
    "redis_memory_max_bytes",
}
WORDS: Final = {"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring", "group_left", "group_right"}


def known() -> set[str]:
    """Every name that an expression may have, without those that a rule file records."""
    plain = {metric.name for metric in METRICS if metric.kind != "histogram"}
    parts = {f"{m.name}_{part}" for m in METRICS if m.kind == "histogram" for part in ("bucket", "sum", "count")}
    return plain | parts | OTHERS


def names_in(expression: str) -> set[str]:
    """The metrics that an expression of PromQL names.

    >>> sorted(names_in('sum by (job) (rate(a_total{x="b"}[5m])) / on (job) c:d > 1e3 unless e offset 1d'))
    ['a_total', 'c:d', 'e']
    """
    text = re.sub(r'"(?:\\.|[^"\\])*"', " ", expression)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", text)
    text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", text)
    found = re.findall(r"(?<![\w:.$])([a-zA-Z_:][\w:]*)(?!\s*\()(?![\w:])", text)
    return {name for name in found if name not in WORDS and name.lower() not in ("inf", "nan")}


def _rules(content: Any) -> Iterator[tuple[str, str]]:
    for group in content["groups"]:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]


def _panels(content: Any) -> Iterator[tuple[str, str]]:
    for panel in content["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in content["templating"]["list"]:
        yield f"variable {variable['name']}", re.sub(r"^label_values\((.*),\s*\w+\)$", r"\1", variable["query"])


def problems(file: Path) -> list[str]:
    """A line for each unknown metric, and one for a file that cannot be read."""
    recorded = {rule["record"] for rule in _all_rules(FILES[0]) if "record" in rule}
    try:
        content = (
            yaml.safe_load(file.read_text("utf-8")) if file.suffix != ".json" else json.loads(file.read_text("utf-8"))
        )
        asked = list(_panels(content) if "panels" in content else _rules(content))
        recorded |= {rule["record"] for rule in _all_rules(file) if "record" in rule}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        return [f"{file.name}: neither rules nor a dashboard: {' '.join(str(error).split())}"]
    names = known() | recorded
    return [
        f"{file.name}: {where}: unknown metric {name}{_meant(name, names)}"
        for where, expression in asked
        for name in sorted(names_in(expression) - names)
    ]


def _all_rules(file: Path) -> list[dict[str, Any]]:
    content = yaml.safe_load(file.read_text("utf-8"))
    return [rule for group in content.get("groups", ()) for rule in group["rules"]]


def _meant(name: str, names: set[str]) -> str:
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {close[0]}?" if close else ""


def main(arguments: Sequence[str]) -> int:
    """Print what is wrong, or that nothing is."""
    files = [Path(file) for file in arguments or FILES]
    lines = [line for file in files for line in problems(file)]
    for line in lines:
        print(line, file=sys.stderr)
    if not lines:
        print(f"{', '.join(file.name for file in files)}: every metric exists")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
