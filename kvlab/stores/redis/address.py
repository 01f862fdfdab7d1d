"""Which servers a store's URL names, and how they are reached."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import quote, unquote, urlencode

import redis

from kvlab.stores.redis.cluster import Cluster
from kvlab.stores.redis.node import Node
from kvlab.stores.redis.pool import FakePool, Pool
from kvlab.stores.redis.sentinel import Sentinel
from kvlab.stores.redis.topology import SingleServer, Topology
from kvlab.stores.url import FORMS, StoreURL, read, shown, unusable

_PATH_BYTES: Final = 107
_fake_servers: dict[str, Any] = {}


def topology_of(url: str, max_connections: int, read_replicas: bool, clock: Callable[[], float]) -> Topology:
    """The servers that `url` names. Connects to none of them.

    Raises:
        ConfigError: no store can be reached by it, or it has no replicas to read.
    """
    told = read(url)
    base, _, kind = told.scheme.partition("-")
    if kind:
        return _several(told, base, kind, max_connections, read_replicas, clock)
    if read_replicas:
        raise unusable(url, "read_replicas is for redis-cluster:// and redis-sentinel://")
    if base == "fakeredis":
        return SingleServer(Node(shown(url), _fake_pool(told), max_connections, clock))
    if base == "memory":
        raise unusable(url, "a MemoryStore, which open_store makes")
    if base == "unix":
        if told.authority or not re.fullmatch(r"/[^\s,]*[^\s,/]", told.path) or "\0" in unquote(told.path):
            raise unusable(url, f"expected {FORMS[base]}")
        if len(unquote(told.path).encode()) > _PATH_BYTES:
            raise unusable(url, f"expected a path of at most {_PATH_BYTES} bytes, which is all that sockets can have")
        _database(told, "")
    else:
        if "," in told.authority:
            raise unusable(url, "several hosts are a cluster or sentinels: redis-cluster://…, redis-sentinel://…/NAME")
        told.hosts(6379)
        _database(told, told.path.removeprefix("/"))
    return SingleServer(Node(shown(url), _pool(url, url, max_connections), max_connections, clock))


def _several(
    told: StoreURL, base: str, kind: str, max_connections: int, read_replicas: bool, clock: Callable[[], float]
) -> Topology:
    """Servers that tell which servers there are."""
    url, form, settings = told.text, FORMS[told.scheme], dict(told.settings)
    hosts = told.hosts(6379 if kind == "cluster" else 26379)
    name, database, watcher = "", told.path.removeprefix("/"), ["", ""]
    if kind == "sentinel":  # sentinels have users and passwords of their own, and no databases
        name, _, database = database.partition("/")
        watcher = [quote(settings.pop(f"sentinel_{key}", ""), safe="") for key in ("username", "password")]
        if not re.fullmatch(r"[\w.-]+", name):
            raise unusable(url, f"expected what the sentinels call the master: {form}")
    elif {database, settings.get("db", "")} - {"", "0"}:
        raise unusable(url, "a cluster has database 0 only")
    _database(told, database)

    def node(host: str, port: int) -> Node:
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        pool = _pool(
            url,
            _joined(base, told.login, place, database, settings),
            max_connections,
            read_replicas and kind == "cluster",
        )
        return Node(f"{host}:{port}", pool, max_connections, clock)

    login, asking = told.login, settings
    if kind == "sentinel":
        login = ":".join(watcher) if any(watcher) else ""
        asking = {key: value for key, value in settings.items() if key not in ("username", "password", "db")}
    seeds = [_pool(url, _joined(base, login, host, "", asking), max_connections=1) for host in hosts]
    node("localhost", 1)  # connects nowhere; what is wrong with login or settings shows here
    if kind == "cluster":
        return Cluster(seeds, node, read_replicas, clock)
    return Sentinel(name, seeds, node, read_replicas, clock)


def _database(told: StoreURL, database: str) -> None:
    """Check what stands in the place of a database number."""
    named = {database, told.settings.get("db", "")} - {""}
    if not all(re.fullmatch(r"0|[1-9][0-9]{0,8}", number) for number in named):
        raise unusable(told.text, "expected a database number last")
    if len(named) > 1:
        raise unusable(told.text, "it names two databases")


def _joined(base: str, login: str, place: str, database: str, settings: dict[str, str]) -> str:
    """The URL of one of several servers, as redis-py reads it."""
    query = f"?{urlencode(settings)}" if settings else ""
    return f"{base}://{login}{'@' if login else ''}{place}{'/' if database else ''}{database}{query}"


def _fake_pool(told: StoreURL) -> FakePool:
    import fakeredis  # here: with a real server nobody needs it

    name = told.authority
    if told.path or told.login or told.settings or not re.fullmatch(r"[A-Za-z0-9._-]*", name):
        raise unusable(told.text, f"expected {FORMS['fakeredis']}")
    server = _fake_servers.setdefault(name, fakeredis.FakeServer()) if name else fakeredis.FakeServer()
    return FakePool(fakeredis.FakeRedis(server=server))


def _pool(given: str, url: str, max_connections: int, read_only: bool = False) -> Pool:
    """Connections to the server at `url`; `given` is what the user wrote."""
    try:
        return Pool(url, max_connections, read_only)
    except (ValueError, TypeError, redis.RedisError) as error:  # its words may repeat a secret
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown:
            raise unusable(given, f"there is no setting {unknown[1]!r}") from None
        wrong = re.search(r"Invalid value for '(\w+)'", str(error))
        which = f"the setting {wrong[1]!r}" if wrong else "a setting"
        raise unusable(given, f"{which} has a value that it cannot have") from None
