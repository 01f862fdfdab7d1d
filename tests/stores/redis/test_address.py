"""Which servers a URL names and how they are reached: logins and settings of every scheme, and no connection."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvlab.errors import ConfigError
from kvlab.stores import RedisStore
from kvlab.stores.redis.address import topology_of
from kvlab.stores.redis.cluster import Cluster
from kvlab.stores.redis.node import Node
from kvlab.stores.redis.pool import FakePool, Pool
from kvlab.stores.redis.sentinel import Sentinel
from kvlab.stores.redis.topology import SingleServer, Topology
from tests.harness.scripted import ScriptedServer
from tests.stores.redis.scripted import LONG_S


def read(url: str, read_replicas: bool = False) -> Any:
    return topology_of(url, 4, read_replicas, time.monotonic)


def facts(pool: Pool) -> dict[str, Any]:
    """What a pool was told that differs from one URL to the next."""
    ours = {"protocol", "decode_responses", "retry", "read_only", "driver_info"}
    return {name: value for name, value in pool._settings.items() if name not in ours}


def seeds(url: str) -> list[dict[str, Any]]:
    return [facts(pool) for pool in read(url)._seeds]


def server(url: str, host: str = "10.0.0.9", port: int = 7000) -> dict[str, Any]:
    """A server that was not named in the URL, but learned of later."""
    return facts(read(url)._make_node(host, port).pool)


def at(host: str, port: int, **more: Any) -> dict[str, Any]:
    return {"host": host, "port": port, **more}


# --- schemes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("redis://h", SingleServer),
        ("rediss://h", SingleServer),
        ("unix:///tmp/no.sock", SingleServer),
        ("fakeredis://", SingleServer),
        ("fakeredis://name", SingleServer),
        ("redis-cluster://h", Cluster),
        ("rediss-cluster://h", Cluster),
        ("redis-sentinel://h/name", Sentinel),
        ("rediss-sentinel://h/name", Sentinel),
    ],
)
def test_each_scheme_means_one_kind_of_topology(url: str, kind: type[Topology]) -> None:
    topology = read(url)
    assert type(topology) is kind and topology.multi_node == (kind is not SingleServer)
    if kind is SingleServer:
        (shard,) = topology.shards()
        assert isinstance(shard.master.pool, FakePool if url.startswith("fake") else Pool)
    else:
        assert topology.shards() == []  # before anybody was asked
        assert topology._make_node("h", 1).pool._class.__name__ == ("_TLS" if url.startswith("rediss") else "_TCP")
        assert {pool._class.__name__ for pool in topology._seeds} == {"_TLS" if url.startswith("rediss") else "_TCP"}


# --- hosts and ports ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hosts", "found"),
    [
        ("a", [("a", None)]),
        ("a:7000", [("a", 7000)]),
        ("a:7000,b:7001,c", [("a", 7000), ("b", 7001), ("c", None)]),
        ("10.0.0.1:7000,10.0.0.2", [("10.0.0.1", 7000), ("10.0.0.2", None)]),
        ("[::1]", [("::1", None)]),
        ("[::1]:7000,[fe80::1]:7001", [("::1", 7000), ("fe80::1", 7001)]),
        ("[2001:db8::7],b:1", [("2001:db8::7", None), ("b", 1)]),
        ("my-host.example.com:65535", [("my-host.example.com", 65535)]),
    ],
)
@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("redis-cluster://{}", 6379),
        ("redis-cluster://{}/0", 6379),
        ("redis-cluster://me:secret@{}/", 6379),
        ("redis-sentinel://{}/main", 26379),
        ("redis-sentinel://me:secret@{}/main/2?socket_timeout=9", 26379),
    ],
)
def test_several_hosts_with_and_without_ports(url: str, port: int, hosts: str, found: list[tuple[str, Any]]) -> None:
    assert [(seed["host"], seed["port"]) for seed in seeds(url.format(hosts))] == [(h, p or port) for h, p in found]


@pytest.mark.parametrize("host", ["::1", "2001:db8::7"])
def test_a_server_learned_of_later_may_have_an_ipv6_address(host: str) -> None:
    assert server("redis-cluster://me:secret@h", host, 7000) == at(host, 7000, username="me", password="secret")
    assert read("redis-cluster://h")._make_node(host, 7000).name == f"{host}:7000"


# --- logins -------------------------------------------------------------------------------------


AWKWARD = "p@ss:w/o?r#d&%+=[x] é"


@given(user=st.text(min_size=1, max_size=8), password=st.text(min_size=1, max_size=12))
@example(user="0", password="\ufffd")  # what Python puts in the place of bytes that are no UTF-8
def test_any_login_reaches_every_server_as_it_was_meant(user: str, password: str) -> None:
    login = f"{quote(user, safe='')}:{quote(password, safe='')}"
    expected = {"username": user, "password": password}
    for told in (*seeds(f"redis-cluster://{login}@a:1,b:2"), server(f"redis-cluster://{login}@a:1,b:2")):
        assert {name: told[name] for name in expected} == expected
    told = server(f"redis-sentinel://{login}@a:1/main")
    assert {name: told[name] for name in expected} == expected


def test_a_password_alone_is_the_default_users() -> None:
    assert server("redis-cluster://:secret@a:1") == at("10.0.0.9", 7000, password="secret")


def test_the_stores_login_is_not_for_sentinels() -> None:
    url = f"redis-sentinel://me:{quote(AWKWARD, safe='')}@a:1,b:2/main"
    assert seeds(url) == [at("a", 1), at("b", 2)]
    assert server(url) == at("10.0.0.9", 7000, username="me", password=AWKWARD)


@pytest.mark.parametrize("setting", ["password=secret", "username=me&password=secret", "db=2"])
def test_what_the_settings_say_of_the_servers_is_not_for_sentinels(setting: str) -> None:
    url = f"redis-sentinel://a:1/main?{setting}"
    assert server(url).keys() - {"host", "port"} == {part.partition("=")[0] for part in setting.split("&")}
    assert seeds(url) == [at("a", 1)]


def test_the_sentinels_login_is_theirs_alone() -> None:
    url = f"redis-sentinel://me:secret@a:1,b:2/main?sentinel_username=watch&sentinel_password={quote(AWKWARD, safe='')}"
    assert seeds(url) == [at(h, p, username="watch", password=AWKWARD) for h, p in (("a", 1), ("b", 2))]
    assert server(url) == at("10.0.0.9", 7000, username="me", password="secret")


def test_sentinels_may_have_a_password_without_a_user() -> None:
    assert seeds("redis-sentinel://a:1/main?sentinel_password=secret") == [at("a", 1, password="secret")]


@pytest.mark.parametrize("kind", ["redis-cluster://a:1", "redis-cluster://a:1,b:2", "redis-sentinel://a:1/main"])
def test_a_bare_at_sign_in_a_setting_is_read_right_or_refused(kind: str) -> None:
    name = "password" if "cluster" in kind else "sentinel_password"
    try:
        found = seeds(f"{kind}?{name}=p@ss")
    except ConfigError as refused:
        assert "percent-encoded" in str(refused)
    else:
        assert found[0] == at("a", 1, password="p@ss")


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rediss-cluster://a:1,b:2", "rediss-sentinel://a:1,b:2/main"])
def test_settings_pass_to_every_server(kind: str, tmp_path: Path) -> None:
    ca = tmp_path / "a ca & more.crt"
    ca.write_text("")
    url = f"{kind}?ssl_ca_certs={quote(str(ca))}&ssl_check_hostname=false&health_check_interval=7"
    for told in (*seeds(url), server(url)):
        assert (told["ssl_ca_certs"], told["health_check_interval"]) == (str(ca), 7)
        assert told["ssl_check_hostname"] in (False, "false")


def test_a_sentinels_master_may_have_a_database() -> None:
    assert server("redis-sentinel://a/main/2") == at("10.0.0.9", 7000, db=2)
    assert seeds("redis-sentinel://a/main/2") == [at("a", 26379)]
    assert read("redis-sentinel://a/main/2")._name == b"main"


def test_a_cluster_has_one_database() -> None:
    assert seeds("redis-cluster://a") == seeds("redis-cluster://a/") == [at("a", 6379)]
    assert [seed["host"] for seed in seeds("redis-cluster://a/0")] == ["a"]
    with pytest.raises(ConfigError, match="a cluster has only database 0"):
        read("redis-cluster://a/1")


def test_a_cluster_has_one_database_whatever_the_settings_say() -> None:
    with pytest.raises(ConfigError, match="only database 0"):
        read("redis-cluster://a?db=1")


@pytest.mark.parametrize("read_replicas", [False, True])
def test_readonly_is_said_where_replicas_of_a_cluster_are_read(read_replicas: bool) -> None:
    cluster, sentinel = read("redis-cluster://a", read_replicas), read("redis-sentinel://a/main", read_replicas)
    assert cluster._make_node("h", 1).pool._settings["read_only"] is read_replicas
    assert sentinel._make_node("h", 1).pool._settings["read_only"] is False
    assert [pool._settings["read_only"] for pool in cluster._seeds + sentinel._seeds] == [False, False]


def test_the_bound_on_connections_holds_for_each_server() -> None:
    with ScriptedServer(lambda command: b"$-1\r\n") as scripted:
        node: Node = topology_of("redis-cluster://a", 3, False, time.monotonic)._make_node("127.0.0.1", scripted.port)
        assert node.pool._max == node._max_workers == 3


# --- what cannot work ---------------------------------------------------------------------------


REFUSED = [
    ("redis-cluster://", "host:port,host:port"),
    ("redis-cluster:///0", "host:port,host:port"),
    ("redis-cluster://me:secret@", "host:port,host:port"),
    ("rediss-sentinel:///main", "host:port,host:port"),
    ("redis-sentinel://a:1", "the name of the master in Sentinel"),
    ("redis-sentinel://a:1/", "the name of the master in Sentinel"),
    ("redis-sentinel://a:1//2", "the name of the master in Sentinel"),
    ("redis-sentinel://a:1?sentinel_password=secret", "the name of the master in Sentinel"),
    ("redis-cluster://a:port", ""),
    ("redis-cluster://a:1,b:99999", ""),
    ("redis-cluster://a:1,b:-1", ""),
    ("redis-sentinel://a:port/main", ""),
    ("redis-cluster://[::1", ""),
    ("redis-cluster://::1", ""),
    ("redis-cluster://me:secret@a:port", ""),
    ("redis-cluster://me:sec/ret@a:1", "percent-encoded"),
    ("redis-cluster://me:sec?ret@a:1", "percent-encoded"),
    ("redis-cluster://me:sec#ret@a:1", "percent-encoded"),
    ("redis-cluster://a:1/2", "only database 0"),
    ("redis-cluster://a:1/main", "only database 0"),
    ("redis-cluster://a:1?no_such_setting=1", "no_such_setting"),
    ("redis-sentinel://a:1/main?no_such_setting=1", "no_such_setting"),
    ("redis-sentinel://a:1/main?socket_timeout=soon", "socket_timeout"),
    ("rediss-cluster://a:1?ssl_ca_certs=/no/such/ca.crt", "/no/such/ca.crt"),
    ("rediss-sentinel://a:1/main?ssl_ca_certs=/no/such/ca.crt", "/no/such/ca.crt"),
    ("redis-cluster//a:1", "redis-cluster://"),
    ("redis-clusters://a:1", "redis-cluster://"),
    ("fakeredis-cluster://a:1", "redis-sentinel://"),
    ("redis-sentinel://a:1/main/two", "a number as the database"),
    ("redis-sentinel://a:1/main/2/3", "a number as the database"),
    ("redis-sentinel://me:sec/ret@a:1/main", "percent-encoded"),
    ("redis-sentinel://me:sec#ret@a:1/main", "percent-encoded"),
    ("redis://a/1?db=2", "two different databases"),
    ("redis-sentinel://a/main/1?db=2", "two different databases"),
    ("redis://me:secret@a?password=secret", "only one login is allowed"),
    ("redis-cluster://me:secret@a?username=you", "only one login is allowed"),
    ("redis://a?sentinel_password=secret", "no setting 'sentinel_password'"),
    ("redis-cluster://a?sentinel_password=secret", "no setting 'sentinel_password'"),
    ("redis://a?ssl_check_hostname=false", "no setting 'ssl_check_hostname'"),
    ("redis-cluster://a:1,", "host:port,host:port"),
    ("redis-cluster://,a:1", "host:port,host:port"),
    ("redis-sentinel://a:1,,b:2/main", "host:port,host:port"),
]


@pytest.mark.parametrize(("url", "says"), REFUSED)
def test_a_url_that_cannot_work_is_refused_at_once_and_says_why(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match="store URL") as refused:
        RedisStore(url)
    assert says in str(refused.value)
    for part in ("secret", "sec/ret", "sec?ret", "sec#ret", "ret@"):
        assert part not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://a:1,b:2", "several hosts require"),
        ("redis-cluster://a:1,redis-cluster://b:2", "expected redis-cluster://host:port,host:port"),
        ("redis-cluster://a:1, b:2", "expected redis-cluster://host:port,host:port"),
        ("redis-cluster://a:1x,b:2", r"'redis-cluster://a:\*\*\*,b:2' \(expected a port of 1 … 65535"),
        ("redis-cluster://a:1;b:2", "expected host:port, got"),
        ("redis-cluster://me:pass@a:1,me:pass@b:2", "only one login is allowed"),
        ("redis-sentinel://a:1/main?sentinel_password=se#cret", "must be percent-encoded"),
        ("redis://a:1?password=se#cret", "must be percent-encoded: # becomes %23"),
        (
            "rediss-cluster://a:1?ssl_ca_cert=x",
            r"'rediss-cluster://a:1\?ssl_ca_cert=x' \(there is no setting 'ssl_ca_cert'",
        ),
    ],
)
def test_what_newcomers_write_is_told_in_their_own_words(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RedisStore(url)


@pytest.mark.parametrize("url", ["redis://h", "rediss://h:1/2", "unix:///tmp/x.sock", "fakeredis://", "fakeredis://a"])
def test_one_server_has_no_replicas_to_read(url: str) -> None:
    with pytest.raises(ConfigError, match="read_replicas requires redis-cluster:// or redis-sentinel://"):
        RedisStore(url, read_replicas=True)


# --- databases and paths ------------------------------------------------------------------------
DATABASES = [
    "redis://h/{}",
    "rediss://h:1?db={}",
    "unix:///run/redis.sock?db={}",
    "redis-sentinel://h/main/{}",
    "redis-sentinel://h/main?db={}",
]


@pytest.mark.parametrize("form", DATABASES)
@pytest.mark.parametrize("database", [0, 1, 15, 999_999_999])
def test_a_database_is_a_number(form: str, database: int) -> None:
    url = form.format(database)
    told = server(url) if "sentinel" in url else facts(read(url).shards()[0].master.pool)
    assert told["db"] == database


@pytest.mark.parametrize("form", DATABASES)
@pytest.mark.parametrize(
    "database", ["-1", "+1", "1.0", "1e1", "x", "01", "00", "１", "2/3", "9999999999", "0x1", "True", "1_0", "%20"]
)
def test_a_database_that_is_no_number_is_refused(form: str, database: str) -> None:
    with pytest.raises(ConfigError, match="a number as the database"):
        RedisStore(form.format(database))


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("unix:///run/redis.sock", "/run/redis.sock"),
        ("unix:///x", "/x"),
        ("unix:////x", "//x"),
        ("unix:///run/a%20b%2Cc.sock", "/run/a b,c.sock"),
        ("unix:///run/ü.sock", "/run/ü.sock"),
        ("unix://me:secret@/run/redis.sock?db=2", "/run/redis.sock"),
        ("unix:///" + "a" * 106, "/" + "a" * 106),
    ],
)
def test_a_socket_has_a_path_from_the_root(url: str, path: str) -> None:
    assert facts(read(url).shards()[0].master.pool)["path"] == path


@pytest.mark.parametrize(
    "url",
    [
        "unix://",
        "unix:///",
        "unix://run/redis.sock",
        "unix://localhost/run/redis.sock",
        "unix://:6379/run/redis.sock",
        "unix://./redis.sock",
        "unix://~/redis.sock",
        "unix://@run/redis.sock",
        "unix:///run/",
        "unix:///run/a b",
        "unix:///run/a\0b",
        "unix:///run/a%00b",
        "unix:///run/a,/run/b",
        "unix:///run/a,unix:///run/b",
        "unix:///" + "a" * 107,
        "unix:///" + "%C3%BC" * 54,
    ],
)
def test_a_socket_that_can_be_no_path_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"unix:///path/to\.sock|at most 107 bytes|characters that are not allowed"):
        RedisStore(url)


@pytest.mark.parametrize("name", ["", "a", "A-1_b.c", "0"])
def test_a_fake_server_may_have_a_name(name: str) -> None:
    assert isinstance(read(f"fakeredis://{name}").shards()[0].master.pool, FakePool)


@pytest.mark.parametrize("rest", ["a/", "a/0", "a:1", "me:x@a", "/", "a b", "a,b", "a?db=1", "ü", "[::1]"])
def test_a_fake_server_has_nothing_but_a_name(rest: str) -> None:
    with pytest.raises(ConfigError, match="store URL"):
        RedisStore(f"fakeredis://{rest}")


# --- settings that would not be heard -------------------------------------------------------------
@pytest.mark.parametrize("kind", ["redis://a", "rediss-cluster://a:1", "redis-sentinel://a:1/main"])
@pytest.mark.parametrize(
    "setting",
    [
        *("timeout=20", "max_connections=5", "retry=1", "retry_on_error=x", "read_only=1", "driver_info=x"),
        *("credential_provider=x", "redis_connect_func=x", "event_dispatcher=x", "command_packer=x"),
        *("parser_class=x", "connection_class=x", "host=b", "port=1", "path=/x", "encoding=latin1", "socket_type=9"),
        *("maint_notifications_config=x", "lib_name=x", "no_such=1", "=1", "a b=1"),
        *("db=", "db", "password=", "username", "client_name=", "ssl_ca_certs=", "?"),
        *("db=1&db=1", "password=x&password=x", "socket_timeout=soon", "health_check_interval=1.5"),
    ],
)
def test_a_setting_that_would_not_be_heard_is_refused(kind: str, setting: str) -> None:
    with pytest.raises(ConfigError, match="not a usable store URL"):
        RedisStore(f"{kind}?{setting}")


@pytest.mark.parametrize("name", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_ca_path"])
def test_files_must_be_there(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    right, wrong = ("folder", "file") if name == "ssl_ca_path" else ("file", "folder")
    RedisStore(f"rediss://h?{name}={tmp_path / right}")
    for path in (tmp_path / wrong, tmp_path / "none", "none"):
        with pytest.raises(ConfigError, match=f"there is no file .* for {name}"):
            RedisStore(f"rediss://h?{name}={path}")


def test_nothing_is_connected_until_the_first_call() -> None:
    with ScriptedServer(lambda command: b"+OK\r\n") as scripted:
        for url in (f"redis-cluster://127.0.0.1:{scripted.port}", f"redis-sentinel://127.0.0.1:{scripted.port}/main"):
            store = RedisStore(url, deadline_s=LONG_S)
            assert (store.nodes, scripted._open) == ([], [])
            store.close()
