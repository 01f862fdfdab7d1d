"""How URLs are read and shown: one rule for all schemes, and no secret in any message."""

from __future__ import annotations

import pytest

from kvlab.errors import ConfigError
from kvlab.stores import RedisStore
from kvlab.stores.url import shown

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
