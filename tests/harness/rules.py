"""`--rules FILE`: what became of each rule of the contracts on a learner's classes, for `kvlab.course.capstone`.

A rule is a test function of `tests/contracts/`; its name is the sentence that the learner reads. The file gets one
JSON object per line, as things happen, so that it says where a run stopped that was killed:

    {"classes": {"MiniRedis": "store"}, "rules": {"store": 47}, "left_out": {"store": {REASON: [RULE, …]}}}
    {"begin": "MiniRedis", "rule": "probe is the longest present prefix"}
    {"class": "MiniRedis", "rule": …, "state": "passed", "case": "", "said": "", "near": ""}
    {"stopped": "no end after 20 s", "near": "MiniRedis.probe, line 12"}
    {"ended": true}
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest

from kvlab.cache import KVCache
from kvlab.stores import Store
from tests.harness.learner import learner_classes

CONTRACTS = Path(__file__).parents[1] / "contracts"
RULE_S = float(os.environ.get("KVLAB_RULE_S", "20"))
"""Seconds after which a rule is taken to have no end: the longest takes a fortieth of it."""
LONGEST, SIDE = 200, 90
"""Characters of what a line says, and of each side of an equation in it."""
KINDS = {
    **dict.fromkeys(("store_kind", "served_store_kind", "ttl_store_kind"), "store"),
    **dict.fromkeys(("cache_kind", "set_cache_kind"), "cache"),
}

NO_TTL = "your store has no parameters `client` and `ttl_s`, so a test cannot let time pass in it"
ALWAYS_TTL = "your store always has a TTL"
OWN_CLOCK = "it waits for Redis' own clock, and Redis is not what you built"
SETTINGS = "URLs, passwords, windows and limits are settings of kvlab's stores; yours gets its client from outside"
PRECISIONS = "your cache has one precision, FP32, and no compression"
CONSTRUCTOR = "settings of DistributedKVCache; the constructor of your cache is your own"
NO_SERVER = "your store has no parameter `client`, so no server can be taken from it"
RETENTION = "lives of single values and pins are settings of kvlab's stores and tiers"
NO_SALT = "your cache has no parameters `salt` and `block_tokens`"
LEFT_OUT = {
    "test_store_ttl.py": NO_TTL,
    "test_store_settings.py": SETTINGS,
    "test_cache_retention.py": RETENTION,
    "test_store_retention.py": RETENTION,
    "test_without_ttl_entries_stay": ALWAYS_TTL,
    "test_the_server_itself_ends_entries": OWN_CLOCK,
    "test_a_server_that_is_gone_gives_misses_and_drops_and_no_exception": NO_SERVER,
    "test_another_salt_or_block_size_shares_nothing": NO_SALT,
    "test_another_precision_shares_nothing": PRECISIONS,
    "test_compression_is_no_part_of_identity": PRECISIONS,
    "test_values_are_rounded_as_torch_rounds": PRECISIONS,
    "test_values_beyond_fp16_drop_their_block_and_those_after_it": PRECISIONS,
    "test_infinities_of_the_model_itself_are_kept": PRECISIONS,
    "test_both_names_of_a_precision_are_one": PRECISIONS,
    "test_settings_that_cannot_work_are_refused_at_once": CONSTRUCTOR,
    "test_token_calls_without_a_model_say_what_is_missing": CONSTRUCTOR,
    "test_the_default_block_is_the_largest_record_within_a_mebibyte": CONSTRUCTOR,
}
"""Why a rule, or all rules of a file, are not asked of a learner's classes."""


def sentence(name: str) -> str:
    """A test's name as a sentence."""
    return name.removeprefix("test_").replace("_", " ")


def left_out(asked: set[str], suites: set[str], items: list[pytest.Item]) -> dict[str, dict[str, list[str]]]:
    """By suite and reason, the rules of these suites that are not asked.

    Raises:
        KeyError: nobody has said why a rule is left out.
    """
    found: dict[str, dict[str, list[str]]] = {suite: defaultdict(list) for suite in suites}
    names = {_name(item): item for item in items if item.path.parent == CONTRACTS}
    for name, item in names.items():
        suite = "cache" if item.path.name.startswith("test_cache") else "store"
        if name not in asked and suite in suites:
            reason = LEFT_OUT[name if name in LEFT_OUT else item.path.name]
            found[suite][reason].append(sentence(name))
    return found


class Rules:
    """A plugin that keeps only the tests of a learner's classes, and writes what became of each."""

    def __init__(self, file: str, source: str) -> None:
        self._out = Path(file).open("a", encoding="utf-8")  # noqa: SIM115, closed by the end of the process
        self._source = str(Path(source))  # as the code of the file's functions has it
        self.classes: dict[str, type] = {}

    def _write(self, **line: Any) -> None:
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        suites = {n: "store" if issubclass(c, Store) else "cache" for n, c in self.classes.items() if _is_asked(c)}
        kept = [item for item in items if _owner(item) and LEFT_OUT.get(item.path.name) != RETENTION]
        rules: dict[str, set[str]] = defaultdict(set)
        for item in kept:
            rules[suites[_owner(item)]].add(_name(item))
        rest = left_out(set().union(*rules.values()), set(suites.values()), items)
        self._write(classes=suites, rules={suite: len(names) for suite, names in rules.items()}, left_out=rest)
        items[:] = kept

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._write(begin=_owner(item), rule=sentence(_name(item)))
        with self.limited():
            return (yield)

    @contextmanager
    def limited(self) -> Iterator[None]:
        """End the process if the block takes too long."""
        watch = threading.Timer(RULE_S, self._stop)
        watch.daemon = True
        watch.start()
        try:
            yield
        finally:
            watch.cancel()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
        report = yield
        if report.failed or report.skipped or report.when == "call":
            said, near = ("", "") if not report.failed or call.excinfo is None else self._explained(item, call.excinfo)
            why = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else said
            names = {"class": _owner(item), "rule": sentence(_name(item)), "state": report.outcome}
            self._write(**names, case=_case(item), said=why, near=near)
        return report

    def pytest_sessionfinish(self) -> None:
        self._write(ended=True)

    def _explained(self, item: pytest.Item, error: pytest.ExceptionInfo[BaseException]) -> tuple[str, str]:
        """What came instead of what was expected, and the learner's code next to it."""
        cls = self.classes[_owner(item)]
        own = [entry for entry in error.traceback if entry.frame.raw.f_code.co_filename == self._source]
        if own:
            code, line = own[-1].frame.raw.f_code, own[-1].lineno + 1
            said = f"raised {error.typename}: {error.value}" if str(error.value) else f"raised {error.typename}"
            return _short(said), _with_parts(f"{code.co_qualname}, line {line}", cls, code)
        tests = [entry for entry in error.traceback if Path(entry.path).parent == CONTRACTS]
        calls = [name for entry in reversed(tests) for name in _called(entry, cls, str(error.value))]
        near = _with_parts(f"{cls.__name__}.{calls[0]}", cls, getattr(cls, calls[0]).__code__) if calls else ""
        return _told(error, str((tests or error.traceback)[-1].statement).strip()), near

    def _stop(self) -> None:
        """End the process, because a rule has no end; say where it is."""
        places = [_inside(frame, self._source) for frame in sys._current_frames().values()]
        near = next(filter(None, places), "")
        self._write(stopped=f"no end after {RULE_S:g} s", near=near)
        os._exit(1)


def _is_asked(c: type) -> bool:
    return issubclass(c, Store | KVCache)


def _owner(item: pytest.Item) -> str:
    """The learner's class that a test is for; "" if it is for one of kvlab's."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    ids = [params[kind].name for kind in KINDS if kind in params]
    return ids[0].split("-")[1] if ids and ids[0].startswith("impl-") else ""


def _name(item: pytest.Item) -> str:
    return str(getattr(item, "originalname", item.name))


def _case(item: pytest.Item) -> str:
    """What a test was run over, and with what."""
    params = item.callspec.params  # type: ignore[attr-defined]
    over = next(params[kind].name for kind in KINDS if kind in params).split("-", 2)[2:]
    given = [f"{name}={value!r}" for name, value in params.items() if name not in KINDS]
    return ", ".join([*(f"over {name}" for name in over), *given])


def _called(entry: Any, cls: type, message: str) -> list[str]:
    """The methods of a class that a test had called last, the nearest first; those that a helper calls too."""
    lines = str(entry.frame.code.source()).splitlines()
    upto = entry.lineno - entry.frame.code.firstlineno + (3 if message.startswith("DID NOT RAISE") else 1)
    found: list[str] = []
    for of, name in reversed(re.findall(r"(\w+\.)?(\w+)\(", "\n".join(lines[: max(upto, 1)]))):
        helper = None if of else entry.frame.raw.f_globals.get(name)
        inside = helper.__code__.co_names if isinstance(helper, FunctionType) else ()
        found += [n for n in (name, *reversed(inside)) if isinstance(getattr(cls, n, None), FunctionType)]
    return sorted(found, key=lambda n: n in ("stats", "close", "health"))  # they show faults of other calls


def _told(error: pytest.ExceptionInfo[BaseException], statement: str) -> str:
    """The first line of an assertion as "got …, expected …"; for one that says nothing, the statement itself."""
    first = str(error.value).partition("\n")[0]
    if equal := re.fullmatch(r"assert (.+?) == (.+)", first):
        return f"got {_short(equal[1], SIDE)}, expected {_short(equal[2], SIDE)}"
    if raised := re.match(r"DID NOT RAISE <class '(?:\w+\.)*(\w+)'>", first):
        return f"expected {raised[1]}, nothing was raised"
    if isinstance(error.value, AssertionError) and not re.match(r"assert (?!False|not )", first):
        return _short(f"does not hold: {statement.removeprefix('assert ')}")
    return _short(first)


def _with_parts(place: str, cls: type, code: CodeType) -> str:
    """A place, and the functions of the learner's file that the code there uses."""
    parts = [name for name in _parts(cls, code, set()) if name not in place]
    return f"{place} (uses {', '.join(parts)})" if parts else place


def _parts(cls: type, code: CodeType, seen: set[CodeType]) -> list[str]:
    """The functions of the file of a class that this code calls, also through methods of the class."""
    if code in seen:
        return []
    seen.add(code)
    found: dict[str, None] = {}
    around = next(f.__globals__ for f in vars(cls).values() if isinstance(f, FunctionType))
    for name in code.co_names:
        outer, method = around.get(name), getattr(cls, name, None)
        if isinstance(outer, FunctionType) and outer.__code__.co_filename == code.co_filename:
            found[name] = None
        elif isinstance(method, FunctionType) and method.__code__.co_filename == code.co_filename:
            found |= dict.fromkeys(_parts(cls, method.__code__, seen))
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found |= dict.fromkeys(_parts(cls, inner, seen))
    return list(found)


def _inside(frame: FrameType | None, source: str) -> str:
    """Where in this file a thread is; "" if it is not in there."""
    while frame is not None and frame.f_code.co_filename != source:
        frame = frame.f_back
    return f"{frame.f_code.co_qualname}, line {frame.f_lineno}" if frame else ""


def _short(text: str, longest: int = LONGEST) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def load(config: pytest.Config) -> list[type]:
    """The classes of the learner's file, if one is named; with `--rules`, the plugin begins here."""
    source, file = config.getoption("impl"), config.getoption("rules")
    if file is None:
        return learner_classes(source)
    plugin = Rules(file, source or "")
    with plugin.limited():
        classes = learner_classes(source)
    plugin.classes = {c.__name__: c for c in classes}
    config.pluginmanager.register(plugin, "kvlab-rules")
    return classes
