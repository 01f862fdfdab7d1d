"""From a store URL to its servers and their connection pools."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import quote, unquote, urlencode

import redis

from kvlab.stores.redis.cluster import Cluster
from kvlab.stores.redis.connection import CLASSES
from kvlab.stores.redis.node import Node
from kvlab.stores.redis.pool import FakePool, Pool
from kvlab.stores.redis.sentinel import Sentinel
from kvlab.stores.redis.topology import SingleServer, Topology
from kvlab.stores.url import FORMS, StoreURL, read, shown, unusable

_PATH_BYTES: Final = 107
_fake_servers: dict[str, Any] = {}


def topology_of(url: str, max_connections: int, read_replicas: bool, clock: Callable[[], float]) -> Topology:
    """Return the servers that `url` names. Opens no connection.

    Raises:
        ConfigError: the URL is invalid, or `read_replicas` is set and the URL has no replicas.
    """
    parsed = read(url)
    base, _, kind = parsed.scheme.partition("-")
    if kind:
        return _several(parsed, base, kind, max_connections, read_replicas, clock)
    if read_replicas:
        raise unusable(url, "read_replicas requires redis-cluster:// or redis-sentinel://")
    if base == "fakeredis":
        return SingleServer(Node(shown(url), _fake_pool(parsed), max_connections, clock))
    if base not in CLASSES:
        raise unusable(url, "a RedisStore cannot use it; open_store creates its store")
    if base == "unix":
        if parsed.authority or not re.fullmatch(r"/[^\s,]*[^\s,/]", parsed.path) or "\0" in unquote(parsed.path):
            raise unusable(url, f"expected {FORMS[base]}")
        if len(unquote(parsed.path).encode()) > _PATH_BYTES:
            raise unusable(url, f"expected a path of at most {_PATH_BYTES} bytes, the limit of Unix sockets")
        _database(parsed, "")
    else:
        if "," in parsed.authority:
            raise unusable(url, "several hosts require redis-cluster://… or redis-sentinel://…/NAME")
        parsed.hosts(6379)
        _database(parsed, parsed.path.removeprefix("/"))
    return SingleServer(Node(shown(url), _pool(url, url, max_connections), max_connections, clock))


def _several(
    parsed: StoreURL, base: str, kind: str, max_connections: int, read_replicas: bool, clock: Callable[[], float]
) -> Topology:
    """Return the topology of a cluster or of sentinels."""
    url, form, settings = parsed.text, FORMS[parsed.scheme], dict(parsed.settings)
    hosts = parsed.hosts(6379 if kind == "cluster" else 26379)
    name, database, sentinel_login = "", parsed.path.removeprefix("/"), ["", ""]
    if kind == "sentinel":  # sentinels have their own logins, and no databases
        name, _, database = database.partition("/")
        sentinel_login = [quote(settings.pop(f"sentinel_{key}", ""), safe="") for key in ("username", "password")]
        if not re.fullmatch(r"[\w.-]+", name):
            raise unusable(url, f"expected the name of the master in Sentinel: {form}")
    elif {database, settings.get("db", "")} - {"", "0"}:
        raise unusable(url, "a cluster has only database 0")
    _database(parsed, database)

    def node(host: str, port: int) -> Node:
        host_port = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        server_url = _joined(base, parsed.login, host_port, database, settings)
        pool = _pool(url, server_url, max_connections, read_replicas and kind == "cluster")
        return Node(f"{host}:{port}", pool, max_connections, clock)

    seed_login, seed_settings = parsed.login, settings
    if kind == "sentinel":
        seed_login = ":".join(sentinel_login) if any(sentinel_login) else ""
        seed_settings = {key: value for key, value in settings.items() if key not in ("username", "password", "db")}
    seeds = [_pool(url, _joined(base, seed_login, host, "", seed_settings), max_connections=1) for host in hosts]
    node("localhost", 1)  # opens no connection, but raises if the login or a setting is invalid
    if kind == "cluster":
        return Cluster(seeds, node, read_replicas, clock)
    return Sentinel(name, seeds, node, read_replicas, clock)


def _database(parsed: StoreURL, database: str) -> None:
    """Check that the database is a number and that the URL names only one."""
    named = {database, parsed.settings.get("db", "")} - {""}
    if not all(re.fullmatch(r"0|[1-9][0-9]{0,8}", number) for number in named):
        raise unusable(parsed.text, "expected a number as the database")
    if len(named) > 1:
        raise unusable(parsed.text, "it names two different databases")


def _joined(base: str, login: str, host_port: str, database: str, settings: dict[str, str]) -> str:
    """Return the URL of one of several servers, in the form that redis-py parses."""
    query = f"?{urlencode(settings)}" if settings else ""
    return f"{base}://{login}{'@' if login else ''}{host_port}{'/' if database else ''}{database}{query}"


def _fake_pool(parsed: StoreURL) -> FakePool:
    import fakeredis  # imported here, because only fakeredis:// needs it

    name = parsed.authority
    if parsed.path or parsed.login or parsed.settings or not re.fullmatch(r"[A-Za-z0-9._-]*", name):
        raise unusable(parsed.text, f"expected {FORMS['fakeredis']}")
    server = _fake_servers.setdefault(name, fakeredis.FakeServer()) if name else fakeredis.FakeServer()
    return FakePool(fakeredis.FakeRedis(server=server))


def _pool(given: str, url: str, max_connections: int, read_only: bool = False) -> Pool:
    """Create the pool for the server at `url`. `given` is the URL that the user wrote."""
    try:
        return Pool(url, max_connections, read_only)
    except (ValueError, TypeError, redis.RedisError) as error:  # its message may contain a secret
        if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
            raise unusable(given, f"there is no setting {unknown[1]!r}") from None
        wrong = re.search(r"Invalid value for '(\w+)'", str(error))
        setting = f"the setting {wrong[1]!r}" if wrong else "a setting"
        raise unusable(given, f"{setting} has an invalid value") from None
