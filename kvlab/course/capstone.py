"""The contract suites of the package, run on a learner's file: `python -m kvlab contracts --impl work/mykv.py`.

These are the tests that every store and cache of kvlab passes, `tests/contracts/` of the checkout, not a copy.
They run in a process of their own with a deadline, so that code which never ends cannot hang a notebook.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvlab.course import minikv
from kvlab.course.exercises import mykv
from kvlab.errors import InputError

ROOT = Path(minikv.__file__).parents[2]
CONTRACTS = ROOT / "tests" / "contracts"
DEADLINE_S = 300.0
SHOWN = 8
"""Broken rules that are printed; one mistake breaks many."""
SUITES = {"store": "kvlab.stores.Store", "cache": "kvlab.cache.KVCache"}


@dataclass(frozen=True)
class Broken:
    """A rule that a class does not keep, and the first case in which it does not.

    Attributes:
        said: what came, and what was expected.
        near: the learner's code next to it, and the functions that it uses.
        others: the other cases that fail.
    """

    owner: str
    rule: str
    case: str
    said: str
    near: str
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        case = f" ({self.case})" if self.case else ""
        near = f"; look at {self.near}" if self.near else ""
        more = f"; {len(self.others) + 1} cases in all" if self.others else ""
        return f"✘ {self.owner}: {self.rule}{case}: {self.said}{near}{more}"


@dataclass
class Report:
    """What became of each rule.

    Attributes:
        file: the learner's file.
        yours: the functions and classes of the course that the file has in other words.
        ours: how many it has from the course.
        classes: the suite that each class was asked, "store" or "cache".
        kept: how many rules each class keeps.
        cases: how many cases each class passed.
        asked: how many rules each suite has for such a class.
        broken: the rules that are not kept.
        skipped: reasons for cases that could not run here, and how many cases.
        left_out: by suite and reason, the rules that are not asked.
        problem: why nothing could be asked, or why the run ended early; "" if neither.
    """

    file: Path
    yours: list[str] = field(default_factory=list)
    ours: int = 0
    classes: dict[str, str] = field(default_factory=dict)
    kept: Counter[str] = field(default_factory=Counter)
    cases: Counter[str] = field(default_factory=Counter)
    asked: dict[str, int] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether there are a store and a cache, and all of them keep every rule that was asked."""
        return not self.problem and not self.broken and not self.missing()

    def failed(self, owner: str) -> int:
        """How many rules a class does not keep."""
        return sum(rule.owner == owner for rule in self.broken)

    def missing(self) -> list[str]:
        """The suites that nothing in the file can be asked."""
        return [suite for suite in SUITES if suite not in self.classes.values()]

    def lines(self) -> Iterator[str]:
        """The report as lines to print."""
        yield f"file:   {self.file}"
        if self.classes:
            yours = [*self.yours, *(name for name in self.classes if name not in mykv.CLASSES)]
            yield f"yours:  {', '.join(yours) or 'nothing yet'}; parts that are the course's: {self.ours}"
        for suite in SUITES:
            for name in (name for name, own in self.classes.items() if own == suite):
                counts = f"{self.kept[name]} of {self.asked[suite]} rules kept, {self.cases[name]} cases passed"
                yield f"{suite + ':':7} {name}: {counts}"
            if suite in self.missing() and not self.problem:
                yield f"{suite + ':':7} ✘ no class in the file is a {SUITES[suite]}, so this suite has nothing to ask"
        yield from map(str, self.broken[:SHOWN])
        if len(self.broken) > SHOWN:
            yield f"✘ and {len(self.broken) - SHOWN} more rules; mend the first, one mistake breaks many"
        if self.problem:
            yield f"✘ {self.problem}"
        yield from (f"skipped: {count} cases ({why})" for why, count in self.skipped.items())
        for suite, reasons in self.left_out.items():
            for why, rules in reasons.items():
                names = rules[0] if len(rules) == 1 else f"{len(rules)} rules"
                yield f"not asked, {suite}: {names}, because {why}"
        yield "The file keeps both contracts." if self.ok else "FAILED: see the lines with ✘"

    def as_json(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        plain = {name: value for name, value in vars(self).items() if name not in ("file", "broken")}
        return {"ok": self.ok, "file": str(self.file), **plain, "broken": [vars(rule) for rule in self.broken]}


def run(path: str | Path | None = None, say: Callable[[str], None] = print, deadline_s: float = DEADLINE_S) -> Report:
    """Ask the classes of a learner's file every rule of the store contract and of the cache contract.

    Args:
        path: the learner's file; by default their `mykv.py`, and the course's answers if there is none.
        say: gets each line of the report.
        deadline_s: the most seconds for all of it. A single rule has 20.

    Raises:
        InputError: there is no such file, or no checkout of the course with its tests.
    """
    file = _file(path)
    if not CONTRACTS.is_dir() or find_spec("pytest") is None:
        raise InputError(f"expected the tests of the course at {CONTRACTS}, and pytest: use a checkout, and make lab")
    with tempfile.TemporaryDirectory(prefix="kvlab-") as folder:
        rules = Path(folder) / "rules.jsonl"
        output, in_time = _run_pytest(file, rules, deadline_s)
        text = rules.read_text("utf-8") if rules.exists() else ""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    ended = "the process ended" if in_time else f"no end after {deadline_s:g} s"
    report = _read(file, lines, ended)
    if not report.problem and not report.classes:
        report.problem = _why_nothing(output, bool(lines)) if in_time else f"{ended}: does the import of it end?"
    if not report.problem and (
        idle := [name for name in report.classes if not report.kept[name] + report.failed(name)]
    ):
        report.problem = f"no rule was asked of {', '.join(idle)}: {_last_line(output)}"
    for line in report.lines():
        say(line)
    return report


def _file(path: str | Path | None) -> Path:
    """The file to ask, as an absolute path: pytest runs in another folder."""
    try:
        return mykv.find(path or "mykv.py").resolve()
    except InputError:
        if path is not None:
            raise
        return Path(minikv.__file__)


def _run_pytest(file: Path, rules: Path, deadline_s: float) -> tuple[str, bool]:
    """Run the suites in a process group of their own. Returns what they printed, and whether they ended in time."""
    command = [sys.executable, "-m", "pytest", str(CONTRACTS), "-q", "--tb=no", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=--strict-markers", "-o", "verbosity_assertions=2"]
    command += ["--impl", str(file), "--rules", str(rules)]
    skip = ("PYTEST_", "KVLAB_REQUIRE")  # of a run that this one is part of
    environment = {name: value for name, value in os.environ.items() if not name.startswith(skip)}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # none is needed, and to import them takes seconds
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=deadline_s)[0], True
    except subprocess.TimeoutExpired:
        return "", False
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill what is left of a process group: the suites, and servers that they started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _read(file: Path, lines: list[dict[str, Any]], ended: str) -> Report:
    """The report of what the suites wrote, see `tests/harness/rules.py`; `ended`: how a run stops before its end."""
    report = Report(file)
    with contextlib.suppress(OSError, ValueError, SyntaxError):  # whatever is wrong with it, the suites say so
        report.yours = mykv.own_parts(file.read_text("utf-8"))
    report.ours = len(mykv.PARTS) + len(mykv.CLASSES) - len(report.yours)
    kept: dict[tuple[str, str], bool] = {}
    now = ""
    for line in lines:
        if "classes" in line:
            report.classes, report.asked, report.left_out = line["classes"], line["rules"], line["left_out"]
        elif "begin" in line:
            now = f"{line['begin']}: {line['rule']}: "
        elif "stopped" in line:
            ended = f"{line['stopped']} in {line['near']}" if line["near"] else line["stopped"]
        elif "state" in line:
            _count(report, kept, line)
    if lines and not any("ended" in line for line in lines):
        report.problem = f"{now}{ended}{'; the rules after it were not asked' if now else ''}"
    report.kept = Counter(owner for (owner, _), right in kept.items() if right)
    return report


def _count(report: Report, kept: dict[tuple[str, str], bool], line: dict[str, Any]) -> None:
    """Count one case. A rule is kept if all of its cases pass, but for those that cannot run here."""
    rule, state = (line["class"], line["rule"]), line["state"]
    if state != "skipped":
        kept[rule] = kept.get(rule, True) and state == "passed"
    if state == "passed":
        report.cases[rule[0]] += 1
    elif state == "skipped":
        report.skipped[line["said"].removeprefix("Skipped: ")] += 1
    else:
        _add(report.broken, Broken(*rule, line["case"], line["said"], line["near"]))


def _add(broken: list[Broken], new: Broken) -> None:
    """Add a broken rule, or one more case of it. A case that fails twice, also at its end, is one."""
    for i, rule in enumerate(broken):
        if (rule.owner, rule.rule) == (new.owner, new.rule):
            more = new.case not in (rule.case, *rule.others)
            broken[i] = replace(rule, others=(*rule.others, new.case)) if more else rule
            return
    broken.append(new)


def _why_nothing(output: str, begun: bool) -> str:
    """Why no class of the file was asked anything."""
    if begun:
        return f"expected a {' and a '.join(SUITES.values())} in the file, as MiniRedis and MiniCache of the course are"
    said = next((line for line in output.splitlines() if "--impl: " in line), _last_line(output))
    return said.removeprefix("ERROR: ").removeprefix("--impl: ")


def _last_line(output: str) -> str:
    """The last line that pytest printed."""
    return ([line for line in output.splitlines() if line.strip()] or ["pytest said nothing"])[-1]
