"""How URLs are read and shown: one rule for all schemes, and no secret in any message."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kvlab.errors import ConfigError
from kvlab.stores import RedisStore
from kvlab.stores.url import shown, url_of

LOGINS = ["me:secret@", ":secret@", "me:se:secret@", "me:a@secret@"]


SETTINGS = [
    "",
    "?password=secret",
    "?db=0&password=secret",
    "?sentinel_password=secret",
    "?sentinel_password=secret&a=b",
]


@pytest.mark.parametrize("login", LOGINS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("scheme", ["redis", "redis-cluster", "rediss-sentinel", "http"])
def test_a_url_is_shown_without_secrets_and_with_its_hosts(scheme: str, login: str, settings: str) -> None:
    told = shown(f"{scheme}://{login}host:1,other:2/main{settings}")
    assert "secret" not in told and "host:1,other:2/main" in told and told.startswith(f"{scheme}://")
    assert told.count("***") == 1 + settings.count("secret") + ("a=b" in settings)


def test_the_password_of_a_private_key_is_not_shown() -> None:
    assert "secret" not in shown("rediss://host:1?ssl_keyfile=key&ssl_password=secret")


@pytest.mark.parametrize("setting", ["password", "sentinel_password"])
@pytest.mark.parametrize("url", ["redis://host:1", "redis-cluster://a:1,b:2", "redis-sentinel://me:x@a:1/main"])
def test_of_a_password_with_an_at_sign_nothing_is_shown(url: str, setting: str) -> None:
    assert "secret" not in shown(f"{url}?{setting}=p@secret")


@pytest.mark.parametrize("url", ["redis://host:1", "redis-cluster://a:1,b:2", "redis-sentinel://a:1/main?db=1"])
def test_a_url_without_secrets_is_shown_as_it_is(url: str) -> None:
    assert shown(url) == url


@pytest.mark.parametrize(
    "url",
    [
        "me:secret@a:1",  # the scheme is forgotten
        "redis-sentinel://me:secret@a:1/main?sentinel_passwd=secret",
        "redis-cluster://a:1?Password=secret",
        "redis-cluster://me:secret@a:1x,b:2",
        "redis-cluster://me:secret@a:1,me:secret@b:2",
    ],
)
def test_a_refusal_tells_no_password_however_it_was_written(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RedisStore(url)
    assert "secret" not in str(refused.value) and "***" in str(refused.value)


# --- hosts and ports, one rule for all schemes --------------------------------------------------
SCHEMES = ["redis://{}", "rediss://{}/0", "redis-cluster://{}", "rediss-cluster://a:1,{}", "redis-sentinel://{},b/main"]
HOSTS = [
    *("localhost", "h", "my-host.example.com", "host.", "_host", "my_host", "xn--hst-sna", "a1", "1a", "h.1a"),
    *("10.0.0.7", "0.0.0.0", "[::1]", "[::]", "[2001:db8::7]", "[::ffff:1.2.3.4]", "a" * 63, "a." * 126 + "a"),
]
NO_HOSTS = [
    *(
        "::1",
        "2001:db8::7",
        "[::1",
        "::1]",
        "[[::1]]",
        "[]",
        "[::g]",
        "[1.2.3.4]",
        "[fe80::1%eth0]",
        "[fe80::1%25eth0]",
    ),
    *(
        "-host",
        "host-",
        ".host",
        "a..b",
        "host..",
        ".",
        "hôst",
        "ho'st",
        "host%41",
        "a;b",
        "a|b",
        "*",
        "$HOST",
        "{host}",
    ),
    *("256.1.1.1", "1.2.3", "127.1", "0", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "1.2.3.4."),
    *("a" * 64, "a." * 126 + "aa", "h\\x", "a b", " h", "h ", "h\t", "h\n", "h\0", "h\ud800", "h:1:2", "a://b"),
]
PORTS = ["1", "6379", "65535"]
NO_PORTS = [
    *("", "0", "00", "65536", "99999999999999999999", "-1", "+1", "6379.0", "1e3", "0x10", "06379", "006379"),
    *("６３７９", "٣", "²", "port", " 1", "1 ", "1_0", "6379x", "$PORT"),
]


@pytest.mark.parametrize("form", SCHEMES)
@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host[:20])
def test_what_can_be_a_host_is_one_in_every_scheme(form: str, host: str) -> None:
    url = form.format(host)
    assert host.strip("[]") in {name.strip("[]") for name in hosts_of(url)}
    assert host[:40] in shown(url)


@pytest.mark.parametrize("form", SCHEMES)
@pytest.mark.parametrize("host", NO_HOSTS, ids=repr)
def test_what_can_be_no_host_is_refused_in_every_scheme(form: str, host: str) -> None:
    with pytest.raises(ConfigError, match="not a usable store URL"):
        RedisStore(form.format(host))


@pytest.mark.parametrize("form", SCHEMES)
@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("host", ["h", "10.0.0.7", "[::1]"])
def test_a_port_of_every_host_is_read_and_shown_as_it_stands(form: str, host: str, port: str) -> None:
    url = form.format(f"{host}:{port}")
    assert hosts_of(url, ports=True)[host.strip("[]")] == int(port) and f"{host}:{port}" in shown(url)


@pytest.mark.parametrize("form", SCHEMES)
@pytest.mark.parametrize("port", NO_PORTS, ids=repr)
@pytest.mark.parametrize("host", ["h", "[::1]"])
def test_a_port_that_is_none_is_refused_and_the_bounds_are_told(form: str, host: str, port: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a port of 1 … 65535|expected redis|host:port"):
        RedisStore(form.format(f"{host}:{port}"))


@pytest.mark.parametrize("form", SCHEMES)
@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host[:20])
def test_a_host_without_a_port_has_that_of_its_scheme(form: str, host: str) -> None:
    ports = hosts_of(form.format(host), ports=True)
    assert ports[host.strip("[]")] == (26379 if "sentinel" in form else 6379)


def hosts_of(url: str, ports: bool = False) -> dict[str, int]:
    """The hosts that a store would ask first, and their ports."""
    topology = RedisStore(url)._topology
    pools = topology._seeds if hasattr(topology, "_seeds") else [topology.shards()[0].master.pool]
    return {pool.host: pool._settings.get("port", 6379) for pool in pools}


@pytest.mark.parametrize("host", ["localhost", "10.0.0.7", "::1", "[::1]", "2001:db8::7", "my_host", "host."])
def test_a_host_and_a_port_make_a_url_that_is_read_as_them(host: str) -> None:
    assert hosts_of(url_of(host, 7000)) == {host.strip("[]"): 7000}


@pytest.mark.parametrize(
    "host",
    [
        *("", " ", "\t", " h", "h ", "h\n", "h:6380", "[::1]:6380", "::1]", "[::1", "[h]", "me@h", "me:secret@h"),
        *("redis://h", "unix:///x", "h/0", "h?db=1", "h#", "a,b", "*", "127.1", "0", "fe80::1%eth0", "h\0", "hôst"),
        *("name.redis.cache.windows.net:6380,password=secret=,ssl=True", "password=secret", "a" * 64),
    ],
)
def test_a_host_that_is_none_is_refused_with_the_form_to_write(host: str) -> None:
    with pytest.raises(ConfigError, match=r'"localhost", "10\.0\.0\.7" or "::1".*redis_port=.*store=') as refused:
        url_of(host, 6379)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("host", [None, b"localhost", 7, True, ["h"], object()], ids=lambda host: type(host).__name__)
def test_a_host_is_text(host: Any) -> None:
    with pytest.raises(ConfigError, match=f"redis_host, got {type(host).__name__}"):
        url_of(host, 6379)


@pytest.mark.parametrize(
    "port", [0, -1, 65536, 10**30, 7000.0, "6379", True, None, b"1", math.nan], ids=lambda p: repr(p)[:9]
)
def test_a_port_is_a_whole_number(port: Any) -> None:
    with pytest.raises(ConfigError, match="a redis_port of 1 … 65535, got"):
        url_of("h", port)


# --- logins and schemes -------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text", ["", "redis", "redis:", "redis:/h", "redis//h", "//h", "h:6379", "Redis://h", " redis://h"]
)
def test_what_begins_with_no_scheme_is_refused_with_those_that_there_are(text: str) -> None:
    with pytest.raises(ConfigError, match=r"begins with memory://, file://, redis://.*rediss-sentinel://") as refused:
        RedisStore(text)
    assert text == "" or text not in str(refused.value).partition("got")[2]


@pytest.mark.parametrize(
    "login", ["a@b", "a b:c", "a/b:c", "a?b:c", "a#b:c", "a:%zz", "a:%", "%FF:x", ":%ED%A0%80", "\ud800"]
)
def test_a_login_that_is_not_percent_encoded_is_refused(login: str) -> None:
    with pytest.raises(ConfigError, match="not a usable store URL") as refused:
        RedisStore(f"redis://{login}@host")
    assert login not in str(refused.value)
