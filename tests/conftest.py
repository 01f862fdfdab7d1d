"""Options, hooks and shared fixtures. Lanes, phases and a learner's classes have their own modules in harness/."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from kvlab.core.keys import KVSpec
from kvlab.model import Llama, Tokenizer, held_out_tokens, load_model
from kvlab.model.fingerprint import spec_of
from kvlab.testbed.certs import make_certs
from kvlab.testbed.cluster import RedisCluster
from kvlab.testbed.sentinel import RedisSentinel
from kvlab.testbed.server import RedisServer, valkey_program
from tests.harness import lanes, phases, rules
from tests.harness.helpers import build_model
from tests.harness.learner import LEARNER

hypothesis.settings.register_profile(
    "kvlab", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("kvlab")


REQUIRED = pytest.StashKey[set[str]]()
TALLY = pytest.StashKey[dict[str, lanes.Lane]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--impl", metavar="FILE", help="also run the contract suites on a learner's mykv.py")
    parser.addoption("--rules", metavar="FILE", help="with --impl: only that, and write what became of each rule")
    parser.addoption("--phase", choices=[phases.TOGETHER, phases.SERVERS], help="run one phase of a full run")
    parser.addoption("--lane", action="append", choices=lanes.LANES, help="run only this lane (repeatable)")
    parser.addoption("--all-tiers", action="store_true", help="run the oracle on every combination of tiers and faults")
    parser.addoption("--tally", metavar="FILE", help="write the results of each lane as JSON")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # more threads do not help small models, and slow them down on a busy machine
    config.stash[REQUIRED] = lanes.required(os.environ.get("KVLAB_REQUIRE", ""))
    config.stash[LEARNER] = rules.load(config)
    config.stash[TALLY] = {}


def pytest_report_header(config: pytest.Config) -> list[str]:
    learner = [f"--impl: {', '.join(c.__name__ for c in config.stash[LEARNER])}"] if config.getoption("impl") else []
    return [f"KVLAB_REQUIRE: {', '.join(sorted(config.stash[REQUIRED])) or 'nothing'}", *learner]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if wanted := config.getoption("lane"):
        split: dict[bool, list[pytest.Item]] = {True: [], False: []}
        for item in items:
            split[lanes.lane_of(item.nodeid, _markers(item)) in wanted].append(item)
        config.hook.pytest_deselected(items=split[False])
        items[:] = split[True]
    phases.choose(config, items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    lanes.skip_what_cannot_run(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    if call.when == "setup":
        item.user_properties.append(("lane", lanes.lane_of(item.nodeid, _markers(item))))
    report = yield
    lanes.fail_what_was_required(item, report, item.config.stash[REQUIRED])
    return report


def _markers(item: pytest.Item) -> set[str]:
    return {mark.name for mark in item.iter_markers()}


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Count reports in the main process, which receives all reports, not in the workers of pytest-xdist."""
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Counting(session.config.stash[TALLY]), "kvlab-lanes")


class Counting:
    """Counts reports by lane."""

    def __init__(self, tally: dict[str, lanes.Lane]) -> None:
        self._tally = tally

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        own = dict(report.user_properties).get("lane")  # doctests and cells are outside tests/ and have none
        self._tally.setdefault(own or lanes.lane_of(report.nodeid, ()), lanes.Lane()).count(report)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        ordered = {name: self._tally[name] for name in lanes.LANES if name in self._tally}
        if file := config.getoption("tally"):
            Path(file).write_text(json.dumps({name: lane.as_dict() for name, lane in ordered.items()}), "utf-8")
        elif len(ordered) > 1:
            terminalreporter.section("lanes")
            terminalreporter.write_line(lanes.table(ordered))


# --- fixtures -----------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def model() -> Llama:
    """The model that ships with the package, in FP32."""
    return load_model()


@pytest.fixture(scope="session")
def spec(model: Llama, tmp_path_factory: pytest.TempPathFactory) -> KVSpec:
    """The shipped model's spec. Its digest is not written to the user's cache directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return spec_of(model)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The shipped tokenizer."""
    return Tokenizer()


@pytest.fixture(scope="session")
def sample(tokenizer: Tokenizer) -> list[int]:
    """The held-out text as tokens."""
    return held_out_tokens(tokenizer)


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Llama]:
    """A function that makes small models: `random_model(heads=4, kv_heads=2, head_dim=16, tied=True, layers=2, …)`."""
    return build_model


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisServer]:
    """One server for all tests that do not stop or kill it; use `redis_server`."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_server(shared_redis: RedisServer) -> RedisServer:
    """A running, empty server. A test that stops or kills one starts its own."""
    shared_redis.client().flushall()
    return shared_redis


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[RedisServer]:
    """One Valkey server for all tests that do not stop or kill it; use `valkey_server`."""
    program = valkey_program()
    assert program is not None, "the test needs the marker `valkey`"
    with RedisServer(program=program) as server:
        yield server


@pytest.fixture
def valkey_server(shared_valkey: RedisServer) -> RedisServer:
    """A running, empty Valkey server."""
    shared_valkey.client().flushall()
    return shared_valkey


@pytest.fixture(scope="session")
def shared_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server with TLS for all tests that do not stop or kill it; use `tls_server`."""
    with RedisServer(tls=make_certs(tmp_path_factory.mktemp("certs"))) as server:
        yield server


@pytest.fixture
def tls_server(shared_tls: RedisServer) -> RedisServer:
    """A running, empty server with TLS on `tls_url`."""
    shared_tls.client().flushall()
    return shared_tls


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[RedisCluster]:
    """One cluster for all tests that do not stop or kill nodes; use `redis_cluster`."""
    with RedisCluster() as cluster:
        yield cluster


@pytest.fixture
def redis_cluster(shared_cluster: RedisCluster) -> RedisCluster:
    """Three running, empty masters, each with a replica. A test that stops or kills one starts its own cluster."""
    _empty(shared_cluster.nodes)
    return shared_cluster


@pytest.fixture(scope="session")
def shared_sentinel() -> Iterator[RedisSentinel]:
    """One master with sentinels for all tests that do not stop or kill servers; use `redis_sentinel`."""
    with RedisSentinel() as group:
        yield group


@pytest.fixture
def redis_sentinel(shared_sentinel: RedisSentinel) -> RedisSentinel:
    """A running, empty master with two replicas and three sentinels."""
    _empty(shared_sentinel.nodes)
    return shared_sentinel


def _empty(nodes: list[RedisServer]) -> None:
    """Delete all keys of every master; the replicas follow."""
    for node in nodes:
        client = node.client()
        if client.info("replication")["role"] == "master":
            client.flushall()
