"""A certificate authority and a server certificate, for trying Redis with TLS on your own machine.

For tests only. The keys are stored unencrypted (mode 0600), and the certificates cannot be revoked. They
therefore expire after 30 days. In production, use certificates from your organisation's authority.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

from kvlab.errors import KVLabError

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ModuleNotFoundError as error:
    raise KVLabError('certificates need the cryptography package: pip install "kvlab[secure]"') from error

HOSTS = ("localhost", "127.0.0.1", "::1")
VALID = timedelta(days=30)
SKEW = timedelta(minutes=5)  # clocks of machines that share a folder differ


@dataclass(frozen=True)
class Certs:
    """Paths of the certificates and keys."""

    folder: Path

    @property
    def ca(self) -> Path:
        """The authority's certificate, which clients trust."""
        return self.folder / "test-ca.crt"

    @property
    def ca_key(self) -> Path:
        """The authority's key. No server needs it."""
        return self.folder / "test-ca.key"

    @property
    def cert(self) -> Path:
        """The server's certificate."""
        return self.folder / "test-redis.crt"

    @property
    def key(self) -> Path:
        """The server's key."""
        return self.folder / "test-redis.key"

    def options(self, port: int) -> list[str]:
        """Arguments of redis-server for TLS on this port. Clients need no certificate."""
        files = {"--tls-cert-file": self.cert, "--tls-key-file": self.key, "--tls-ca-cert-file": self.ca}
        named = [text for option, path in files.items() for text in (option, str(path))]
        return ["--tls-port", str(port), *named, "--tls-auth-clients", "no"]

    def url(self, port: int, host: str = "127.0.0.1") -> str:
        """The URL with which a client verifies the server's certificate."""
        shown = f"[{host}]" if ":" in host else host
        return f"rediss://{shown}:{port}?ssl_ca_certs={quote(str(self.ca))}"


def make_certs(folder: Path, hosts: Sequence[str] = HOSTS) -> Certs:
    """Make both certificates and keys in `folder`, which is created if it does not exist.

    Args:
        hosts: names and addresses of the server.
    """
    certs = Certs(folder.resolve())
    certs.folder.mkdir(parents=True, exist_ok=True)
    ca_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = _name("kvlab test authority")
    ca = _authority(issuer, ca_key)
    server = _server(issuer, ca_key, server_key, hosts)
    _write(certs.ca, ca.public_bytes(serialization.Encoding.PEM), 0o644)
    _write(certs.cert, server.public_bytes(serialization.Encoding.PEM), 0o644)
    _write(certs.ca_key, _pem(ca_key), 0o600)
    _write(certs.key, _pem(server_key), 0o600)
    return certs


def _authority(name: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    builder = _builder(name, name, key, key).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return builder.add_extension(_usage(signs_certificates=True), critical=True).sign(key, hashes.SHA256())


def _server(
    issuer: x509.Name, ca_key: ec.EllipticCurvePrivateKey, key: ec.EllipticCurvePrivateKey, hosts: Sequence[str]
) -> x509.Certificate:
    builder = _builder(_name("kvlab test redis"), issuer, key, ca_key)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]  # cluster nodes connect to each other
    builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    return builder.sign(ca_key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, ca_key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    """The common part of both certificates. Strict verifiers (Python 3.13's default) require both key identifiers."""
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - SKEW).not_valid_after(now + VALID)
    subject_key = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    authority_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    return builder.add_extension(subject_key, critical=False).add_extension(authority_key, critical=False)


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a file that has its final mode from its creation."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
