"""The contract suites on a learner's file: wrong classes are told which rule they break, and nothing hangs."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from kvlab.cli import FAILURE, main
from kvlab.course import capstone, minikv
from kvlab.course.capstone import Report
from kvlab.course.exercises import mykv
from kvlab.errors import InputError

pytestmark = [pytest.mark.redis]
SOURCE = inspect.getsource(minikv)

# The class that is wrong: its base, the right code, the wrong code, and a part of what the learner reads.
WRONG = {
    "RaisesWhenTheServerIsGone": (
        "MiniRedis",
        "except redis.RedisError as error:\n            with",
        "except redis.DataError as error:\n            with",
        "a server that is gone gives misses and drops and no exception (over redis-tcp): raised ConnectionError",
        "look at read_values, line",
    ),
    "CountsInsteadOfPrefix": (
        "MiniRedis",
        "[*self.replies(\"EXISTS\", keys), 0].index(0)",
        "sum(self.replies(\"EXISTS\", keys))",
        "probe is the longest present prefix (over fakeredis, present='013', longest=2): got 3, expected 2",
        "look at CountsInsteadOfPrefix.probe; ",
    ),
    "GoesOnBehindAGap": (
        "MiniCache",
        "                break\n            self.counters.bytes_read",
        "                good += 1\n                continue\n            self.counters.bytes_read",
        "a block lost between match and load shortens the load (over memory): got 192, expected 64",
        "look at GoesOnBehindAGap.load (uses block_keys, open_record); 2 cases in all",
    ),
    "IgnoresTheSalt": (
        "MiniCache",
        "root_key(model.fingerprint, \"fp32\", salt,",
        "root_key(model.fingerprint, \"fp32\", b\"\",",
        "another salt or block size shares nothing (over memory, changes={'salt': b'tenant two'}): got 128, expected 0",
        "look at IgnoresTheSalt.match (uses block_keys)",
    ),
    "IgnoresTheModel": (
        "MiniCache",
        "root_key(model.fingerprint,",
        "root_key(bytes(32),",
        "another model shares nothing (over memory): got 128, expected 0",
        "look at IgnoresTheModel.match (uses block_keys)",
    ),
    "TrustsEveryRecord": (
        "MiniCache",
        "open_record(value, key)\n",
        "\"ok\"\n",
        "a damaged block is a miss and never wrong kv (over memory, damage=",
        "look at TrustsEveryRecord.load",
    ),
}  # fmt: skip


def wrong_class(name: str) -> str:
    """A class of the course with one mistake."""
    base, right, wrong, *_ = WRONG[name]
    source = inspect.getsource(getattr(minikv, base))
    assert source.count(right) == 1
    return source.replace(right, wrong).replace(f"class {base}", f"class {name}")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What the suites say of the course's classes and all wrong ones, in one file."""
    file = tmp_path_factory.mktemp("work") / "mykv.py"
    file.write_text("\n\n".join([SOURCE, *map(wrong_class, WRONG)]), "utf-8")
    return capstone.run(file, lambda line: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_class_is_told_the_rule_and_the_place(report: Report, name: str) -> None:
    *_, rule, place = WRONG[name]
    lines = [str(broken) for broken in report.broken if broken.owner == name]
    assert any(line.startswith(f"✘ {name}: {rule}") and place in line for line in lines), "\n".join(lines)
    assert max(map(len, lines)) < 500 and "\n" not in "".join(lines)


@pytest.mark.slow
def test_right_classes_beside_wrong_ones_keep_all_rules(report: Report) -> None:
    assert {broken.owner for broken in report.broken} == set(WRONG)
    assert report.kept["MiniRedis"] == report.asked["store"] and report.kept["MiniCache"] == report.asked["cache"]
    assert not report.ok and list(report.lines())[-1] == "FAILED: see the lines with ✘"
    assert f"✘ and {len(report.broken) - capstone.SHOWN} more rules" in "\n".join(report.lines())


def test_it_says_how_much_of_a_file_is_the_learners() -> None:
    other = mykv.with_function(mykv.HEADER, "hit_rate", "def hit_rate(a, b):\n    return a / b\n")
    assert mykv.own_parts(other) == mykv.own_parts(SOURCE) == []  # hit_rate is no part of the cache
    own = mykv.with_function(other, "block_keys", "def block_keys(tokens, root, block_tokens):\n    return []\n")
    own = own.replace("class MiniRedis(Store):", "class MiniRedis(Store):\n    mine = True\n")
    assert mykv.own_parts(own) == ["block_keys", "MiniRedis"]
    report = Report(Path("mykv.py"), ["block_keys"], 35, {"MiniRedis": "store", "MyCache": "cache"})
    report.asked = {"store": 1, "cache": 1}
    assert list(report.lines())[1] == "yours:  block_keys, MyCache; parts that are the course's: 35"


ENDLESS = '        return sum(self.replies("DEL", keys))'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            SOURCE.replace(ENDLESS, "        while True: pass"),
            "✘ MiniRedis: empty batches do nothing: no end after 5 s in MiniRedis.delete_many, line ",
        ),
        (f"{SOURCE}\nimport os\nMiniCache.match = lambda *_: os._exit(0)\n", "the process ended; the rules after it"),
        ("while True: pass", "✘ no end after 5 s in <module>, line 1"),
        ("", "✘ expected a kvlab.stores.Store and a kvlab.cache.KVCache in the file, as MiniRedis and MiniCache"),
    ],
    ids=["hangs", "exits", "hangs at import", "empty"],
)
def test_a_file_that_never_ends_or_has_nothing_gets_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str
) -> None:
    monkeypatch.setenv("KVLAB_RULE_S", "5")
    file = tmp_path / "mykv.py"
    file.write_text(source, "utf-8")
    lines: list[str] = []
    assert not capstone.run(file, lines.append).ok
    assert [line for line in lines if said in line], "\n".join(lines)
    assert lines[-1] == "FAILED: see the lines with ✘"


@pytest.mark.slow
def test_the_command_says_why_a_file_does_not_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mykv.py"
    file.write_text("import nonsense_\n", "utf-8")
    assert main(["contracts", "--impl", str(file)]) == FAILURE
    said = f"✘ {file} does not import: ModuleNotFoundError: No module named 'nonsense_'"
    assert capsys.readouterr().out.splitlines() == [f"file:   {file}", said, "FAILED: see the lines with ✘"]


@pytest.mark.slow
def test_a_run_is_over_at_its_deadline(tmp_path: Path) -> None:
    file = tmp_path / "mykv.py"
    file.write_text("import time\ntime.sleep(600)\n", "utf-8")
    said: list[str] = []
    assert capstone.run(file, said.append, deadline_s=0.5).problem == "no end after 0.5 s: does the import of it end?"


def test_without_the_tests_of_the_course_the_error_says_what_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an environment that has the wheel only."""
    monkeypatch.setattr(capstone, "CONTRACTS", tmp_path / "tests")
    with pytest.raises(InputError, match=r"expected the tests of the course at .*: use a checkout"):
        capstone.run(minikv.__file__)
    with pytest.raises(InputError, match="found none at"):
        capstone.run(tmp_path / "nowhere.py")


def test_a_run_that_asks_nothing_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def collects_and_ends(file: Path, rules: Path, deadline_s: float) -> tuple[str, bool]:
        classes = {"classes": {"MiniRedis": "store", "MiniCache": "cache"}, "rules": {"store": 40, "cache": 28}}
        rules.write_text(json.dumps(classes | {"left_out": {}}) + '\n{"ended": true}\n', "utf-8")
        return "1 error in 1.2 s\n", True

    monkeypatch.setattr(capstone, "_run_pytest", collects_and_ends)
    report = capstone.run(minikv.__file__, lambda line: None)
    assert not report.ok
    assert report.problem == "no rule was asked of MiniRedis, MiniCache: 1 error in 1.2 s"
