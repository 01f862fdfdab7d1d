"""Parse store URLs, and show them without secrets. The same rules hold for all schemes.

    scheme://user:password@host:port,host:port/path?setting=value

Every part must be complete and of the kind that belongs there. A URL with two possible readings is
refused. The store, not this module, interprets the scheme.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, unquote

from kvlab.errors import ConfigError
from kvlab.stores.base import described

FORMS: Final = {
    "memory": "memory://",
    "file": "file:///path/to/folder",
    "redis": "redis://host:port/database",
    "rediss": "rediss://host:port/database",
    "unix": "unix:///path/to.sock",
    "fakeredis": "fakeredis:// or fakeredis://NAME",
    "redis-cluster": "redis-cluster://host:port,host:port",
    "rediss-cluster": "rediss-cluster://host:port,host:port",
    "redis-sentinel": "redis-sentinel://host:port,host:port/NAME",
    "rediss-sentinel": "rediss-sentinel://host:port,host:port/NAME",
}
"""The URL form of each scheme."""

_URL: Final = re.compile(r"([a-z-]+)://(?:(.*)@)?([^/?@]*)([^?@]*)(?:\?(.*))?", re.DOTALL)
_HOST_PORT: Final = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::([^:]*))?")  # a host, with an optional port
_LABEL: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME: Final = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*\.?")
_NUMBER_LAST: Final = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9A-Fa-f]*)\.?")  # some systems read this as IPv4
_ESCAPED: Final = re.compile(r"(?:[^%\s/?#@]|%[0-9A-Fa-f]{2})*")
_BEFORE: Final = ("host", "port", "path", "connection_class")  # these settings belong before the question mark
_SETTING: Final = re.compile(
    r"db|username|password|sentinel_(username|password)|client_name|protocol|decode_responses|retry_on_timeout"
    r"|health_check_interval|socket_(timeout|connect_timeout|keepalive)|ssl_[a-z_]+"
)
_SETTING_OF_FILES: Final = re.compile(r"max_bytes|policy|sync")
_FILES: Final = dict.fromkeys(("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"), Path.is_file) | {
    "ssl_ca_path": Path.is_dir
}
_HARMLESS: Final = re.compile(
    r"db|protocol|decode_responses|client_name|max_connections|max_bytes|policy|sync|(ssl|socket|health|retry)_\w+"
)
_PLAIN: Final = re.compile(r"[\w./~:-]{0,120}")  # excludes keys in PEM form, and long keys


@dataclass(frozen=True)
class StoreURL:
    """The parts of a URL.

    Attributes:
        login: user:password, still percent-encoded.
        authority: the text between login and path: hosts and ports, or a name.
        path: the path, with its first slash.
        settings: the decoded settings after the question mark.
    """

    text: str = field(repr=False)
    scheme: str
    login: str = field(repr=False)
    authority: str
    path: str
    settings: dict[str, str] = field(repr=False)

    def hosts(self, default_port: int) -> tuple[str, ...]:
        """Return each host as host:port. A missing port becomes `default_port`.

        Raises:
            ConfigError: a host is missing, or a host or port is invalid.
        """
        entries = self.authority.split(",")
        if not all(entries) or re.search(r"\s", self.authority) or self.text.partition("?")[0].count("://") > 1:
            raise unusable(self.text, f"expected {FORMS[self.scheme]}")
        return tuple(self._with_port(entry, default_port) for entry in entries)

    def _with_port(self, entry: str, default: int) -> str:
        match = _HOST_PORT.fullmatch(entry)
        host, port = match.groups() if match else ("", None)
        if not (is_name(host) or (host.startswith("[") and is_address(host[1:-1], 6))):
            hint = "; write an IPv6 address in brackets: [::1]:6379" if entry.count(":") > 1 else ""
            raise unusable(self.text, f"expected host:port, got {_shown_host(entry)!r}{hint}")
        if port is not None and not (re.fullmatch("[1-9][0-9]{0,4}", port) and int(port) < 65536):
            raise unusable(self.text, "expected a port of 1 … 65535")
        return f"{host}:{default if port is None else port}"


def read(text: str) -> StoreURL:
    """Parse a URL.

    Raises:
        ConfigError: the URL is not text, its scheme is unknown, or a part is invalid.
    """
    if not isinstance(text, str):
        raise ConfigError(f"expected a store URL as text, got {type(text).__name__}")
    if "://" not in text or text.partition("://")[0] not in FORMS:
        raise ConfigError(_unknown_scheme(text))
    if not text.isprintable():
        raise unusable(text, "it contains characters that are not allowed in a URL")
    match = _URL.fullmatch(text)
    if "#" in text or match is None:
        raise unusable(text, "special characters in the login and settings must be percent-encoded: # becomes %23")
    scheme, login, authority, path, query = match.groups(default="")
    if not _ESCAPED.fullmatch(login) or not _is_utf_8(login):
        raise unusable(text, "special characters in the login must be percent-encoded, and only one login is allowed")
    settings = _settings(text, scheme, query)
    user, _, password = login.partition(":")
    if (user and "username" in settings) or (password and "password" in settings):
        raise unusable(text, "only one login is allowed: before the host or in the settings")
    return StoreURL(text, scheme, login, authority, path, settings)


def _is_utf_8(escaped: str) -> bool:
    try:
        unquote(escaped, errors="strict")
    except UnicodeDecodeError:
        return False
    return True


def _settings(text: str, scheme: str, query: str) -> dict[str, str]:
    pairs = parse_qsl(query, keep_blank_values=True)
    settings = dict(pairs)
    if len(settings) < len(pairs):
        raise unusable(text, "a setting is given twice")
    for name, value in pairs:
        if name in _BEFORE:
            raise unusable(text, f"{name} is not a setting; write {FORMS[scheme]}")
        if not value:
            raise unusable(text, "a setting has no value")
        if not (_SETTING_OF_FILES if scheme == "file" else _SETTING).fullmatch(name):
            raise unusable(text, f"there is no setting {name!r}")
        if name in _FILES and not _FILES[name](Path(value)):
            raise unusable(text, f"there is no file {_shown_value(name, value)!r} for {name}")
    return settings


def url_of(host: str, port: int) -> str:
    """Return the redis:// URL of a host name or an IP address.

    Raises:
        ConfigError: the host or the port is invalid.
    """
    if not isinstance(host, str):
        raise ConfigError(f"expected a host name in redis_host, got {type(host).__name__}")
    if type(port) is not int or not 0 < port < 65536:
        raise ConfigError(f"expected a redis_port of 1 … 65535, got {described(port)}")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if is_address(bare, 6):
        return f"redis://[{bare}]:{port}"
    if not is_name(host):
        raise ConfigError(
            'expected a host name or an address in redis_host, such as "localhost", "10.0.0.7" or "::1"; '
            "use redis_port= for a port and store= for a URL"
        )
    return f"redis://{host}:{port}"


def is_name(text: str) -> bool:
    """Return whether this is a host name or a full IPv4 address. Ambiguous forms (127.1, 0x7f000001) are refused."""
    return bool(_NAME.fullmatch(text)) and (not _NUMBER_LAST.fullmatch(text) or is_address(text, 4))


def is_address(text: str, version: int) -> bool:
    """Return whether this is an IP address of `version`, without a zone."""
    try:
        return ipaddress.ip_address(text).version == version and "%" not in text
    except ValueError:
        return False


def unusable(text: str, reason: str) -> ConfigError:
    """Return the error for an invalid URL."""
    return ConfigError(f"not a usable store URL: {shown(text)!r} ({reason})")


def shown(text: str) -> str:
    """Return a URL for messages and logs. Each part that is not known to be harmless becomes ***."""
    scheme, colon, rest = text.partition("://")
    before, mark, query = rest.partition("?")
    if not colon or not re.fullmatch(r"[a-z-]+", scheme):
        return "***"
    if "#" in rest or "@" in query:  # the end of the login is uncertain
        return f"{scheme}://***"
    login, at, address = before.rpartition("@")
    user = re.match(r"\w*(?=.*:.)", login)  # without a password after it, the user may be a password itself
    result = f"{user[0] if user else ''}:***@" if ":" in login else f"{'***' if login else ''}{at}"
    hosts, slash, path = address.partition("/")
    result += ",".join(map(_shown_host, hosts.split(",")))
    result += slash + (path if re.fullmatch(r"[\w./-]*", path) else "***")
    return f"{scheme}://{result}{mark}{'&'.join(map(_shown_setting, query.split('&')))}"


def _shown_host(host: str) -> str:
    match = _HOST_PORT.fullmatch(host)
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
    if re.search(r"password\s*=", text, re.IGNORECASE):  # cloud consoles show such strings for other clients
        return (
            "expected a store URL, got a connection string of another client; "
            "write rediss://:PASSWORD@HOST:PORT, with the password percent-encoded"
        )
    known = ", ".join(f"{scheme}://" for scheme in FORMS)
    hint = "" if "://" in text else " (redis://HOST:PORT for a Redis; is redis:// missing before it?)"
    return f"expected a store URL that begins with {known}{hint}, got {shown(text)!r}"
