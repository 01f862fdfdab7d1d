"""Certificates hold for their hosts, are trusted by who knows the authority, and end soon."""

from __future__ import annotations

import socket
import ssl
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
from cryptography import x509

from kvlab.testbed.certs import make_certs
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import RedisServer

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_test_certs.py"


@pytest.mark.redis
def test_a_certificate_holds_for_its_hosts_and_no_other(tls_server: RedisServer) -> None:
    strict = ssl.create_default_context(cafile=str(tls_server.tls.ca))
    strict.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python 3.13 does of itself
    for host, holds in {"localhost": True, "127.0.0.1": True, "::1": True, "example.org": False}.items():
        with socket.create_connection(("127.0.0.1", tls_server.tls_port), 5) as plain:
            if holds:
                strict.wrap_socket(plain, server_hostname=host).close()
            else:
                with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
                    strict.wrap_socket(plain, server_hostname=host)


@pytest.mark.redis
def test_tls_works_also_through_the_proxy_and_only_with_our_authority(tls_server: RedisServer) -> None:
    with FaultProxy(tls_server.tls_port) as proxy:
        for url in (tls_server.tls_url, tls_server.tls.url(proxy.port)):
            with redis.Redis.from_url(url) as client:
                assert client.ping()
        stranger = redis.Redis.from_url(f"rediss://127.0.0.1:{proxy.port}", retry=None)
        with stranger, pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            stranger.ping()


def test_certificates_are_for_tests(tmp_path: Path) -> None:
    (tmp_path / "test-redis.key").write_text("older, and open to all")
    certs = make_certs(tmp_path)
    assert {stat.S_IMODE(key.stat().st_mode) for key in (certs.key, certs.ca_key)} == {0o600}
    for path in (certs.ca, certs.cert):
        end = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
        assert timedelta(days=29) < end - datetime.now(UTC) <= timedelta(days=30)


def test_the_script_says_how_to_use_what_it_made(tmp_path: Path) -> None:
    call = [sys.executable, str(SCRIPT), str(tmp_path / "new"), "--host", "cache.lan", "--host", "10.0.0.7"]
    said = subprocess.run(call, capture_output=True, text=True, check=True).stdout.splitlines()
    ca = tmp_path / "new" / "test-ca.crt"
    assert said[0].startswith("redis-server --port 0 --tls-port 6380 ") and f"--tls-ca-cert-file {ca}" in said[0]
    assert said[1] == f"rediss://cache.lan:6380?ssl_ca_certs={ca}"
    made = x509.load_pem_x509_certificate((tmp_path / "new" / "test-redis.crt").read_bytes())
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["localhost", "127.0.0.1", "::1", "cache.lan", "10.0.0.7"]
