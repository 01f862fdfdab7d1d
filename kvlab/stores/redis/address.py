"""What a store's URL means: which servers it names, and how they are reached."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, parse_qs, parse_qsl, quote, urlencode, urlsplit

import redis

from kvlab.errors import ConfigError
from kvlab.stores.redis.cluster import Cluster
from kvlab.stores.redis.connection import FakeLink, Link
from kvlab.stores.redis.node import Node
from kvlab.stores.redis.sentinel import Sentinel
from kvlab.stores.redis.topology import Alone, Topology

ALONE: Final = ("redis", "rediss", "unix", "fakeredis")
MANY: Final = ("redis-cluster", "rediss-cluster", "redis-sentinel", "rediss-sentinel")
_PARTS_OF_MANY: Final = re.compile(r"(rediss?)-(cluster|sentinel)://(?:(.*)@)?([^@/?]*)/?([^?]*)(?:\?(.*))?", re.DOTALL)
_HOST: Final = re.compile(r"(\[[^\[\]]+\]|[^\[\]:]+)(:[0-9]+)?")
_PORT: Final = {"cluster": 6379, "sentinel": 26379}

_fake_servers: dict[str, Any] = {}


def topology_of(url: str, max_connections: int, read_replicas: bool, clock: Callable[[], float]) -> Topology:
    """The servers that `url` names. Connects to none of them.

    Raises:
        ConfigError: no store can be reached by it.
    """
    if not isinstance(url, str):
        raise ConfigError(f"expected a store URL as text, got {type(url).__name__}")
    scheme, _, rest = url.partition("://")
    if scheme not in ALONE + MANY:
        known = ", ".join(f"{known}://" for known in ALONE + MANY)
        raise ConfigError(f"expected a store URL that begins with {known}, got {without_password(url)!r}")
    if "," in rest.partition("?")[0].rpartition("@")[2] and scheme in ("redis", "rediss"):
        raise _unusable(url, "several hosts are a cluster or sentinels: redis-cluster://…, redis-sentinel://…/NAME")
    if scheme in ALONE:
        return Alone(Node(without_password(url), _link(url, max_connections), max_connections, clock))
    match = _PARTS_OF_MANY.fullmatch(url)
    if match is None:
        raise _unusable(url, f"expected {scheme}://host:port,host:port")
    base, kind, login, hosts, path, query = match.groups(default="")
    name, database = ("", path) if kind == "cluster" else path.partition("/")[::2]
    if set(login) & set("/?#@") or "#" in query:
        raise _unusable(
            url, "special characters in users and passwords must be percent-encoded, and a login stands once"
        )
    if not all(hosts.split(",")) or "://" in rest.partition("?")[0] or re.search(r"\s", hosts):
        raise _unusable(url, f"expected {scheme}://host:port,host:port")
    wrong = next((host for host in hosts.split(",") if host and not _HOST.fullmatch(host)), None)
    if wrong:
        raise _unusable(url, f"expected host:port, got {wrong!r}")
    if kind == "sentinel" and not name:
        raise _unusable(url, f"expected what the sentinels call the master: {scheme}://host:port,host:port/NAME")
    settings = dict(parse_qsl(query, keep_blank_values=True))
    if kind == "cluster" and {database, settings.get("db", "")} - {"", "0"}:
        raise _unusable(url, "a cluster has database 0 only")
    watcher = [quote(settings.pop(f"sentinel_{key}", ""), safe="") for key in ("username", "password")]

    def node(host: str, port: int) -> Node:
        at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        read_only = read_replicas and kind == "cluster"
        server = _link(_joined(base, login, at, database, settings), max_connections, read_only, url)
        return Node(f"{host}:{port}", server, max_connections, clock)

    asker, asking = login, settings
    if kind == "sentinel":  # sentinels have users and passwords of their own, and no databases
        asker = ":".join(watcher) if any(watcher) else ""
        asking = {key: value for key, value in settings.items() if key not in ("username", "password", "db")}
    seeds = [_joined(base, asker, _with_port(host, _PORT[kind]), "", asking) for host in hosts.split(",")]
    links = [_link(seed, max_connections=1, given=url) for seed in seeds]
    node("localhost", 1)  # connects nowhere; what is wrong with login or database shows here
    if kind == "cluster":
        return Cluster(links, node, read_replicas, clock)
    return Sentinel(name, links, node, read_replicas, clock)


def without_password(url: str) -> str:
    """The URL as it may be shown and logged: whatever stands between user name and last @ may be secret."""
    url = re.sub(r"([?&][^=&]*pass[^=&]*=)[^&]*", r"\1***", url, flags=re.IGNORECASE)  # misspelt ones too
    before = "(?<=://)" if "://" in url else "^"
    return re.sub(rf"{before}([^:@/]*):.*@", r"\1:***@", url)


def _joined(base: str, login: str, at: str, database: str, settings: dict[str, str]) -> str:
    """The URL of one of several servers."""
    query = f"?{urlencode(settings)}" if settings else ""
    return f"{base}://{login}{'@' if login else ''}{at}{'/' if database else ''}{database}{query}"


def _with_port(host: str, port: int) -> str:
    return host if ":" in host.rpartition("]")[2] else f"{host}:{port}"


def _link(url: str, max_connections: int, read_only: bool = False, given: str = "") -> Link | FakeLink:
    """Connections to one server; `given` is what the user wrote, if that was another URL."""
    parts = _checked(url)
    if parts.scheme == "fakeredis":
        import fakeredis  # here: with a real server nobody needs it

        server = (
            _fake_servers.setdefault(parts.netloc, fakeredis.FakeServer()) if parts.netloc else fakeredis.FakeServer()
        )
        return FakeLink(fakeredis.FakeRedis(server=server))
    try:
        return Link(url, max_connections, read_only)
    except (ValueError, TypeError, redis.RedisError) as error:
        setting = re.search(r"unexpected keyword argument ('\w+')", str(error))
        raise _unusable(given or url, f"there is no setting {setting[1]}" if setting else str(error)) from error


def _checked(url: str) -> SplitResult:
    """The parts of a single server's URL."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # parsed only when asked for
    except ValueError as error:
        # The parser's own words may show a part of the password that it took for the port.
        why = "special characters in user and password must be percent-encoded" if "@" in url else str(error)
        raise _unusable(url, why) from None
    if parts.fragment:
        raise _unusable(url, "a # must be percent-encoded: %23")
    for setting, files in parse_qs(parts.query).items():
        if setting in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile") and not Path(files[0]).exists():
            raise _unusable(url, f"there is no file {files[0]!r} for {setting}")
    database = parts.path.strip("/")
    if parts.scheme in ("redis", "rediss") and database and not database.isdigit():
        raise _unusable(url, "expected a database number after the host")
    return parts


def _unusable(url: str, why: str) -> ConfigError:
    return ConfigError(f"not a usable store URL: {without_password(url)!r} ({why})")
