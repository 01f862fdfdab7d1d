"""A private Ray: one machine, loopback only, with a token, quiet, all its files in one folder, gone afterwards.

Ray reads its settings from the environment when it is imported, so they are set before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Final

from kvlab.errors import KVLabError

NEEDED: Final = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or the ports are open on all interfaces, whatever address one gives
    "RAY_AUTH_MODE": "token",  # a port of each replica is open on all interfaces nevertheless, and unpickles
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
QUIET: Final = {
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
TOKEN: Final = "RAY_AUTH_TOKEN"  # without it Ray writes one into the home, for all to read
SHUTDOWN_S: Final = 1.0


def prepare() -> None:
    """Set what Ray reads when it is imported. `private_ray` calls it; call it yourself if you import Ray before.

    Raises:
        KVLabError: Ray is not installed, or was imported with other settings.
    """
    if find_spec("ray") is None:
        raise KVLabError("Ray Serve is not installed: pip install 'kvlab[ray]', or make test-ray in the project")
    if "ray" in sys.modules:
        wrong = [name for name, value in NEEDED.items() if os.environ.get(name) != value]
        if wrong or not os.environ.get(TOKEN):
            raise KVLabError(
                f"Ray was imported before, without {', '.join(wrong) or TOKEN}, which it reads only once; start a new "
                "process (in a notebook: restart the kernel) and call kvlab.serve.private.prepare() before `import ray`"
            )
        return
    os.environ.update(NEEDED)
    for name, value in {**QUIET, TOKEN: secrets.token_hex(32)}.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def private_ray(cpus: int = 2, store_bytes: int = 128 << 20, folder: str | None = None) -> Iterator[None]:
    """Start Ray and Ray Serve, and end them and all their processes afterwards. It takes about 10 seconds.

    Args:
        cpus: CPUs that replicas can ask for.
        store_bytes: of Ray's own object store, in shared memory. Tokens are too small for it.
        folder: where the folder with Ray's sockets and logs is made. A path of a socket has at most 107 characters.

    Raises:
        KVLabError: see `prepare`; or this process is connected to a Ray.
    """
    prepare()
    import ray
    from ray import serve

    if ray.is_initialized():
        raise KVLabError("expected a process that is connected to no Ray; call ray.shutdown() before")
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # the import has set it to INFO
    with (
        _quiet_worker(),
        tempfile.TemporaryDirectory(prefix="kvlab-ray-", dir=folder, ignore_cleanup_errors=True) as own,
    ):
        try:
            _start(cpus, store_bytes, own)
            yield
        finally:
            if ray.is_initialized():
                serve.shutdown()
            ray.shutdown()


def _start(cpus: int, store_bytes: int, folder: str) -> None:
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    ray.init(
        address="local",  # never join a cluster that RAY_ADDRESS or an earlier `ray start` names
        num_cpus=cpus,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=store_bytes,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=folder,
    )
    serve.start(proxy_location="Disabled", logging_config=LoggingConfig(log_level="ERROR", enable_access_log=False))


@contextlib.contextmanager
def _quiet_worker() -> Iterator[None]:
    """Keep "(raylet) Task … failed" from stderr, which no setting does."""
    from ray._private import worker

    printing = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = printing
