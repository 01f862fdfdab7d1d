"""Lanes skip or fail according to `KVLAB_REQUIRE`, every test has one lane, and a table shows the results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.harness import lanes
from tests.harness.run_pytest import run_pytest

LANE_TESTS = """
import pytest

@pytest.mark.redis
def test_needs_redis():
    raise AssertionError("ran without redis-server")

@pytest.mark.cluster
def test_needs_a_cluster():
    raise AssertionError("ran without redis-server")

@pytest.mark.hf
def test_gives_up_half_way():
    pytest.skip("reasons")

@pytest.mark.hf
@pytest.mark.xfail(strict=True)
def test_is_known_to_fail():
    assert False

def test_needs_nothing():
    pass
"""


def run(folder: Path, *options: str, **environment: str) -> str:
    """Run `LANE_TESTS` without redis-server, in a folder named like a marker. This name must not decide the lane."""
    file = folder / "valkey" / "test_of_lanes.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(LANE_TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  redis\n  cluster\n  valkey\n  browser\n  hf\n")
    plain = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": "", "KVLAB_REQUIRE": ""}  # loading nbval takes seconds
    settings = ("-c", str(folder / "pytest.ini"), "-p", "tests.conftest", "-rsfEpx")
    return run_pytest(*settings, str(file), *options, **{**plain, **environment}).stdout


def test_a_missing_program_skips_its_lane_and_fails_a_required_one(tmp_path: Path) -> None:
    said = run(tmp_path, KVLAB_REQUIRE="cluster, hf")
    assert re.search(r"SKIPPED.*needs a redis-server program: apt-get install redis-server", said), said
    assert re.search(r"ERROR .*test_needs_a_cluster", said), said
    assert "KVLAB_REQUIRE names cluster" in said
    assert re.search(r"FAILED .*test_gives_up_half_way", said), said
    assert re.search(r"1 failed, 1 passed, 1 skipped, 1 xfailed, 1 error", said), said
    assert re.search(r"^lane +passed +failed +skipped +minutes$", said, re.MULTILINE), said
    assert re.search(r"^units +1 +0 +0 +\d+\.\d$", said, re.MULTILINE), said
    assert re.search(r"^redis +0 +0 +1 .*\n +1 x needs a redis-server program: apt-get", said, re.MULTILINE), said
    assert re.search(r"^cluster +0 +1 +0 ", said, re.MULTILINE), said
    assert re.search(r"^hf +1 +1 +0 ", said, re.MULTILINE), said


def test_a_lane_that_does_not_exist_cannot_be_required() -> None:
    assert lanes.required(" redis,hf,") == {"redis", "hf"}
    with pytest.raises(pytest.UsageError, match=f"expected {', '.join(lanes.NEEDS)}, got redsi"):
        lanes.required("redis,redsi")


def test_the_results_of_the_chosen_lanes_are_written(tmp_path: Path) -> None:
    tally = tmp_path / "tally.json"
    said = run(tmp_path, "--lane", "hf", "--lane", "units", "--tally", str(tally))
    assert "1 passed, 1 skipped, 2 deselected, 1 xfailed" in said, said
    counted = json.loads(tally.read_text("utf-8"))
    assert counted.keys() == {"units", "hf"} and counted["hf"]["skipped"] == {"reasons": 1}
    lane = lanes.Lane(passed=1, seconds=60.0)
    lane.add(counted["hf"])
    assert (lane.passed, lane.failed, lane.skipped.total()) == (2, 0, 1) and lane.seconds > 60
    assert lanes.table({"hf": lane}).splitlines()[1:] == [
        "hf                  2       0        1      1.0",
        "            1 x reasons",
    ]


@pytest.mark.parametrize(
    ("nodeid", "markers", "lane"),
    [
        ("tests/core/test_keys.py::test_a[x]", (), "units"),
        ("tests/core/test_keys.py::test_a", ("slow", "redis"), "redis"),
        ("kvlab/core/policies.py::kvlab.core.policies.LRU", (), "doctests"),
        ("notebooks/03_prefix_hashing.ipynb::Cell 3@notebooks/03_prefix_hashing.ipynb", (), "notebooks"),
        ("tests/notebooks/test_build.py::test_a", ("slow",), "notebooks"),
        ("tests/contracts/test_store.py::test_a[redis-cluster]", ("cluster", "redis"), "contracts"),
        ("tests/faults/test_wire.py::test_a", ("redis", "fault"), "faults"),
        ("tests/faults/test_sentinel.py::test_a", ("cluster", "fault"), "cluster"),
        ("tests/testbed/test_server.py::test_a", ("valkey",), "valkey"),
        ("tests/browser/test_lab.py::test_a", ("browser", "slow"), "browser"),
    ],
)
def test_every_test_has_one_lane(nodeid: str, markers: tuple[str, ...], lane: str) -> None:
    assert lanes.lane_of(nodeid, markers) == lane and lane in lanes.LANES
