"""How a store's URL is read and how it is shown: one rule for all schemes, and no secret in any message.

    scheme://user:password@host:port,host:port/path?setting=value

Each part is written in full and is of the kind that stands there; what could be read in two ways is
refused. What a scheme means is the store's affair.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl

from kvlab.errors import ConfigError

FORMS: Final = {
    "memory": "memory://",
    "redis": "redis://host:port/database",
    "rediss": "rediss://host:port/database",
    "unix": "unix:///path/to.sock",
    "fakeredis": "fakeredis:// or fakeredis://NAME",
    "redis-cluster": "redis-cluster://host:port,host:port",
    "rediss-cluster": "rediss-cluster://host:port,host:port",
    "redis-sentinel": "redis-sentinel://host:port,host:port/NAME",
    "rediss-sentinel": "rediss-sentinel://host:port,host:port/NAME",
}
"""Every scheme, and the form to write."""

_URL: Final = re.compile(r"([a-z-]+)://(?:(.*)@)?([^/?@]*)([^?@]*)(?:\?(.*))?", re.DOTALL)
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_.])?)(?::([0-9]*))?")
_ESCAPED: Final = re.compile(r"(?:[^%\s/?#@]|%[0-9A-Fa-f]{2})*")
_BEFORE: Final = ("host", "port", "path", "connection_class")  # settings that belong before the question mark
_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_HARMLESS: Final = re.compile(r"db|protocol|decode_responses|client_name|max_connections|(ssl|socket|health|retry)_\w+")


@dataclass(frozen=True)
class StoreURL:
    """The parts of a URL.

    Attributes:
        login: user:password, percent-encoded as it stands.
        authority: what stands between login and path: hosts and ports, or a name.
        path: from its first slash on.
        settings: what stands behind the question mark, decoded.
    """

    text: str
    scheme: str
    login: str
    authority: str
    path: str
    settings: dict[str, str]

    def hosts(self, default_port: int) -> tuple[str, ...]:
        """host:port each, with the port that was left out.

        Raises:
            ConfigError: one is missing, or is no host and port.
        """
        places = self.authority.split(",")
        if not all(places) or re.search(r"\s", self.authority) or self.text.partition("?")[0].count("://") > 1:
            raise unusable(self.text, f"expected {FORMS[self.scheme]}")
        return tuple(self._with_port(place, default_port) for place in places)

    def _with_port(self, place: str, default: int) -> str:
        match = _HOST.fullmatch(place)
        if match is None or (match[1].startswith("[") and not is_ipv6(match[1][1:-1])):
            hint = "; an IPv6 address stands in brackets: [::1]:6379" if place.count(":") > 1 else ""
            raise unusable(self.text, f"expected host:port, got {_shown_host(place)!r}{hint}")
        if match[2] is not None and not (match[2] and len(match[2]) <= 5 and 0 < int(match[2]) < 65536):
            raise unusable(self.text, "expected a port of 1 … 65535")
        return f"{match[1]}:{default if match[2] is None else int(match[2])}"


def read(text: str) -> StoreURL:
    """The parts of a URL.

    Raises:
        ConfigError: it is no text, has an unknown scheme, or parts that cannot stand there.
    """
    if not isinstance(text, str):
        raise ConfigError(f"expected a store URL as text, got {type(text).__name__}")
    if "://" not in text or text.partition("://")[0] not in FORMS:
        raise ConfigError(_unknown_scheme(text))
    match = _URL.fullmatch(text)
    if "#" in text or match is None:
        raise unusable(text, "special characters in users, passwords and settings must be percent-encoded: a # is %23")
    scheme, login, authority, path, query = match.groups(default="")
    if not _ESCAPED.fullmatch(login):
        raise unusable(
            text, "special characters in users and passwords must be percent-encoded, and a login stands once"
        )
    pairs = parse_qsl(query, keep_blank_values=True)
    settings = dict(pairs)
    if len(settings) < len(pairs):
        raise unusable(text, "a setting stands twice")
    for name in settings.keys() & set(_BEFORE):
        raise unusable(text, f"{name} is no setting: {FORMS[scheme]}")
    for name in _FILES:
        if name in settings and not Path(settings[name]).exists():
            raise unusable(text, f"there is no file {settings[name]!r} for {name}")
    return StoreURL(text, scheme, login, authority, path, settings)


def url_of(host: str, port: int) -> str:
    """The redis:// URL of a host: a name, or an address of either kind.

    Raises:
        ConfigError: there can be no such host or port.
    """
    if not isinstance(host, str):
        raise ConfigError(f"expected a host name in redis_host, got {type(host).__name__}")
    if type(port) is not int or not 0 < port < 65536:
        got = port if type(port) is int else type(port).__name__
        raise ConfigError(f"expected a redis_port of 1 … 65535, got {got}")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if is_ipv6(bare):
        return f"redis://[{bare}]:{port}"
    match = _HOST.fullmatch(host)
    if match is None or match[2] is not None or host.startswith("["):
        raise ConfigError(
            'expected a host name or an address in redis_host, such as "localhost", "10.0.0.7" or "::1"; '
            "a port is redis_port=, and a URL is store="
        )
    return f"redis://{host}:{port}"


def is_ipv6(text: str) -> bool:
    """Whether this is an IPv6 address, without a zone."""
    try:
        return ipaddress.ip_address(text).version == 6 and "%" not in text
    except ValueError:
        return False


def unusable(text: str, why: str) -> ConfigError:
    """The error for a URL that cannot work."""
    return ConfigError(f"not a usable store URL: {shown(text)!r} ({why})")


def shown(text: str) -> str:
    """A URL as it may be shown and logged: what is not known to be harmless is ***."""
    scheme, colon, rest = text.partition("://")
    before, asked, query = rest.partition("?")
    if not colon or not re.fullmatch(r"[a-z-]+", scheme):
        return "***"
    if "#" in rest or "@" in query:  # where the login ends is not certain
        return f"{scheme}://***"
    login, at, place = before.rpartition("@")
    user = re.match(r"\w*", login)
    told = f"{user[0] if user else ''}:***@" if ":" in login else f"{'***' if login else ''}{at}"
    hosts, slash, path = place.partition("/")
    told += ",".join(map(_shown_host, hosts.split(",")))
    told += slash + (path if re.fullmatch(r"[\w./-]*", path) else "***")
    return f"{scheme}://{told}{asked}{'&'.join(map(_shown_setting, query.split('&')))}"


def _shown_host(host: str) -> str:
    name, colon, port = host.rpartition(":") if re.match(r"[\w\[]", host) and ":" in host else (host, "", "")
    if not re.fullmatch(r"[\w.\[\]:-]*", name):
        return "***"
    return f"{name}{colon}{port if re.fullmatch('[0-9]{0,5}', port) else '***'}"


def _shown_setting(setting: str) -> str:
    key, equals, value = setting.partition("=")
    if not re.fullmatch(r"\w*", key):
        return "***"
    harmless = _HARMLESS.fullmatch(key) and "pass" not in key.lower()
    return f"{key}{equals}{value if harmless or not value else '***'}"


def _unknown_scheme(text: str) -> str:
    if re.search(r"password\s*=", text, re.IGNORECASE):  # what clouds hand out for other clients
        return (
            "expected a store URL, got a connection string of another client; "
            "write rediss://:PASSWORD@HOST:PORT, with the password percent-encoded"
        )
    known = ", ".join(f"{scheme}://" for scheme in FORMS)
    return f"expected a store URL that begins with {known}, got {shown(text)!r}"
