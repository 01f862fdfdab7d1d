"""The Ray Serve application: N replicas over one store, kvlab's router before them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvlab.cache import DistributedKVCache
from kvlab.engine.router import ROUTERS
from kvlab.engine.worker import WorkerSettings
from kvlab.errors import ConfigError, KVLabError
from kvlab.serve.replica import Replica

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

ROUTER: Final = "kvlab.serve.router.KVLabRouter"
STARTS: Final = 2  # of a replica that cannot be made, until Ray Serve gives up


def application(
    settings: WorkerSettings | None = None,
    *,
    replicas: int = 2,
    cpus: float = 1.0,
    gpus: float = 0.0,
    max_waiting: int = 64,
    max_queued: int = 64,
    router: str = "cost",
    router_class: str = ROUTER,
    report_s: float = 1.0,
    health_s: float = 1.0,
) -> Application:
    """Return what `ray.serve.run` deploys.

    Args:
        settings: of each replica. A password in the URL of the store reaches the replicas through Ray, which keeps it
            in the memory of its processes, but in no file and no command line.
        cpus, gpus: that Ray reserves for each replica.
        max_waiting: requests that a replica takes beyond those of its batch.
        max_queued: requests that wait in each process that sends some, while all replicas are full. Of more, each is
            refused with `Busy`. Ray counts them approximately.
        router: a name in `kvlab.engine.router.ROUTERS`.
        router_class: the import path of another `RequestRouter`, whose `initialize_state` takes `router`.
        report_s: seconds between two reports of a replica on its blocks.
        health_s: seconds between two checks of a replica. It is replaced after three that fail, or when it is dead.

    Raises:
        ConfigError: a setting is invalid.
        KVLabError: Ray is not installed.
    """
    settings = settings or WorkerSettings()
    for name, size in {"replicas": replicas, "max_waiting": max_waiting, "max_queued": max_queued}.items():
        if type(size) is not int or size < 1:
            raise ConfigError(f"expected {name} as a whole number of at least 1, got {size!r}")
    if router not in ROUTERS:
        raise ConfigError(f"expected one of the routers {', '.join(ROUTERS)}, got {router!r}")
    _check(settings)
    try:
        from ray import serve
        from ray.serve.config import RequestRouterConfig
    except ImportError:
        raise KVLabError("Ray Serve is not installed: pip install 'kvlab[ray]'") from None
    deployment = serve.deployment(
        Replica,
        name="kvlab",
        num_replicas=replicas,
        max_ongoing_requests=settings.max_batch + max_waiting,
        max_queued_requests=max_queued,
        max_constructor_retry_count=STARTS,
        health_check_period_s=health_s,
        graceful_shutdown_timeout_s=5.0,
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=router_class,
            request_router_kwargs={"router": router},
            request_routing_stats_period_s=report_s,
        ),
    )
    return deployment.bind(settings.to_message(), max_waiting)


def _check(settings: WorkerSettings) -> None:
    """Find mistakes here, where the message reaches the caller, and not in a replica."""
    DistributedKVCache(
        store=settings.store or "memory://",
        precision=settings.precision,
        compress=settings.compress,
        salt=settings.salt,
        encryption_keys=settings.encryption_keys,
    ).close()


def deploy(app: Application, name: str = "kvlab") -> DeploymentHandle:
    """Start the replicas, wait until all of them are ready, and return a handle for `Stream`.

    Args:
        name: of the application. Ray Serve keeps the router of a name, so another router needs another name.

    Raises:
        KVLabError: the replicas cannot be made.
    """
    from ray import serve

    try:
        return serve.run(app, name=name, route_prefix=None)
    except RuntimeError as error:
        said = "".join(d.message for d in serve.status().applications[name].deployments.values())  # has a traceback
        serve.delete(name, _blocking=False)
        reason = next((line for line in reversed(said.splitlines()) if line.strip().startswith("kvlab.")), said)
        raise KVLabError(f"the replicas could not be started: {reason.strip() or error}") from error
