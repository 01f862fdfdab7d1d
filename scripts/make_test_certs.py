"""Make a certificate authority and a server certificate, for trying Redis with TLS on your own machine.

    python scripts/make_test_certs.py FOLDER                      # for localhost, 127.0.0.1 and ::1
    python scripts/make_test_certs.py FOLDER --host cache.lan     # and for this name or address

The script writes test-ca.crt, test-ca.key, test-redis.crt and test-redis.key to FOLDER and replaces existing
files of these names. It prints the options for redis-server and the URL for kvlab. The limits of these
certificates are documented in kvlab/testbed/certs.py.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from kvlab.testbed.certs import HOSTS, make_certs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="TLS certificates for testing a Redis, valid for 30 days.")
    parser.add_argument("folder", type=Path, help="folder for the files")
    parser.add_argument("--host", action="append", default=[], metavar="NAME", help="one more name or address")
    parser.add_argument("--port", type=int, default=6380, help="TLS port in the output (default %(default)s)")
    given = parser.parse_args(arguments)
    certs = make_certs(given.folder, [*HOSTS, *given.host])
    print(shlex.join(["redis-server", "--port", "0", *certs.options(given.port)]))
    print(certs.url(given.port, given.host[0] if given.host else HOSTS[0]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
