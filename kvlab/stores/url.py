"""How a store's URL is read and how it is shown: one rule for all schemes, and no secret in any message.

    scheme://user:password@host:port,host:port/path?setting=value

Each part is written in full and is of the kind that stands there; what could be read in two ways is
refused. What a scheme means is the store's affair.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, unquote

from kvlab.errors import ConfigError
from kvlab.stores.base import told

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
_PLACE: Final = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::([^:]*))?")  # a host, and a port if there is one
_LABEL: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME: Final = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*\.?")
_NUMBER_LAST: Final = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9A-Fa-f]*)\.?")  # what systems take for an IPv4 address
_ESCAPED: Final = re.compile(r"(?:[^%\s/?#@]|%[0-9A-Fa-f]{2})*")
_BEFORE: Final = ("host", "port", "path", "connection_class")  # settings that belong before the question mark
_SETTING: Final = re.compile(
    r"db|username|password|sentinel_(username|password)|client_name|protocol|decode_responses|retry_on_timeout"
    r"|health_check_interval|socket_(timeout|connect_timeout|keepalive)|ssl_[a-z_]+"
)
_FILES: Final = dict.fromkeys(("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"), Path.is_file) | {
    "ssl_ca_path": Path.is_dir
}
_HARMLESS: Final = re.compile(r"db|protocol|decode_responses|client_name|max_connections|(ssl|socket|health|retry)_\w+")
_PLAIN: Final = re.compile(r"[\w./~:-]{0,120}")  # no key in PEM, and none of any length


@dataclass(frozen=True)
class StoreURL:
    """The parts of a URL.

    Attributes:
        login: user:password, percent-encoded as it stands.
        authority: what stands between login and path: hosts and ports, or a name.
        path: from its first slash on.
        settings: what stands behind the question mark, decoded.
    """

    text: str = field(repr=False)
    scheme: str
    login: str = field(repr=False)
    authority: str
    path: str
    settings: dict[str, str] = field(repr=False)

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
        match = _PLACE.fullmatch(place)
        host, port = match.groups() if match else ("", None)
        if not (is_name(host) or (host.startswith("[") and is_address(host[1:-1], 6))):
            hint = "; an IPv6 address stands in brackets: [::1]:6379" if place.count(":") > 1 else ""
            raise unusable(self.text, f"expected host:port, got {_shown_host(place)!r}{hint}")
        if port is not None and not (re.fullmatch("[1-9][0-9]{0,4}", port) and int(port) < 65536):
            raise unusable(self.text, "expected a port of 1 … 65535")
        return f"{host}:{default if port is None else port}"


def read(text: str) -> StoreURL:
    """The parts of a URL.

    Raises:
        ConfigError: it is no text, has an unknown scheme, or parts that cannot stand there.
    """
    if not isinstance(text, str):
        raise ConfigError(f"expected a store URL as text, got {type(text).__name__}")
    if "://" not in text or text.partition("://")[0] not in FORMS:
        raise ConfigError(_unknown_scheme(text))
    if not text.isprintable():
        raise unusable(text, "it has characters that no URL has")
    match = _URL.fullmatch(text)
    if "#" in text or match is None:
        raise unusable(text, "special characters in users, passwords and settings must be percent-encoded: a # is %23")
    scheme, login, authority, path, query = match.groups(default="")
    if not _ESCAPED.fullmatch(login) or "\ufffd" in unquote(login):
        raise unusable(
            text, "special characters in users and passwords must be percent-encoded, and a login stands once"
        )
    settings = _settings(text, scheme, query)
    user, _, password = login.partition(":")
    if (user and "username" in settings) or (password and "password" in settings):
        raise unusable(text, "a login stands once: before the host, or in the settings")
    return StoreURL(text, scheme, login, authority, path, settings)


def _settings(text: str, scheme: str, query: str) -> dict[str, str]:
    pairs = parse_qsl(query, keep_blank_values=True)
    settings = dict(pairs)
    if len(settings) < len(pairs):
        raise unusable(text, "a setting stands twice")
    for name, value in pairs:
        if name in _BEFORE:
            raise unusable(text, f"{name} is no setting: {FORMS[scheme]}")
        if not value:
            raise unusable(text, "a setting has no value")
        if not _SETTING.fullmatch(name):
            raise unusable(text, f"there is no setting {name!r}")
        if name in _FILES and not _FILES[name](Path(value)):
            raise unusable(text, f"there is no file {_shown_value(name, value)!r} for {name}")
    return settings


def url_of(host: str, port: int) -> str:
    """The redis:// URL of a host: a name, or an address of either kind.

    Raises:
        ConfigError: there can be no such host or port.
    """
    if not isinstance(host, str):
        raise ConfigError(f"expected a host name in redis_host, got {type(host).__name__}")
    if type(port) is not int or not 0 < port < 65536:
        raise ConfigError(f"expected a redis_port of 1 … 65535, got {told(port)}")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if is_address(bare, 6):
        return f"redis://[{bare}]:{port}"
    if not is_name(host):
        raise ConfigError(
            'expected a host name or an address in redis_host, such as "localhost", "10.0.0.7" or "::1"; '
            "a port is redis_port=, and a URL is store="
        )
    return f"redis://{host}:{port}"


def is_name(text: str) -> bool:
    """Whether this is a host name, or an IPv4 address in full: 127.1 and 0x7f000001 could be read in two ways."""
    return bool(_NAME.fullmatch(text)) and (not _NUMBER_LAST.fullmatch(text) or is_address(text, 4))


def is_address(text: str, version: int) -> bool:
    """Whether this is an IP address of that version, without a zone."""
    try:
        return ipaddress.ip_address(text).version == version and "%" not in text
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
    user = re.match(r"\w*(?=.*:.)", login)  # without a password behind it, it may be one
    told = f"{user[0] if user else ''}:***@" if ":" in login else f"{'***' if login else ''}{at}"
    hosts, slash, path = place.partition("/")
    told += ",".join(map(_shown_host, hosts.split(",")))
    told += slash + (path if re.fullmatch(r"[\w./-]*", path) else "***")
    return f"{scheme}://{told}{asked}{'&'.join(map(_shown_setting, query.split('&')))}"


def _shown_host(host: str) -> str:
    match = _PLACE.fullmatch(host)
    if match is None or not (re.fullmatch(r"[A-Za-z0-9._-]*", match[1]) or is_address(match[1][1:-1], 6)):
        return host if is_address(host, 6) else "***"
    port = match[2]
    return match[1] if port is None else f"{match[1]}:{port if re.fullmatch('[0-9]{0,5}', port) else '***'}"


def _shown_setting(setting: str) -> str:
    key, equals, value = setting.partition("=")
    if not re.fullmatch(r"\w*", key) or not (value or _SETTING.fullmatch(key)):
        return "***" if setting else ""
    return f"{key}{equals}{_shown_value(key, value)}"


def _shown_value(key: str, value: str) -> str:
    harmless = _HARMLESS.fullmatch(key) and "pass" not in key.lower() and _PLAIN.fullmatch(value)
    return value if harmless or not value else "***"


def _unknown_scheme(text: str) -> str:
    if re.search(r"password\s*=", text, re.IGNORECASE):  # what clouds hand out for other clients
        return (
            "expected a store URL, got a connection string of another client; "
            "write rediss://:PASSWORD@HOST:PORT, with the password percent-encoded"
        )
    known = ", ".join(f"{scheme}://" for scheme in FORMS)
    return f"expected a store URL that begins with {known}, got {shown(text)!r}"
