"""Metrics for Prometheus, read from the counters of caches, stores, schedulers and worker groups when it scrapes.

    server = start_metrics(scheduler, 9400)      an HTTP server of its own, on loopback
    registry.register(Metrics(scheduler))        or beside the metrics of your service

Nothing is counted here, so nothing is counted twice and a request pays nothing. The names are those of the connector
for vLLM without its prefix: kvlab_hit_tokens_total here is vllm:kvlab_hit_tokens_total there. Counters end in _total;
times are in seconds, sizes in bytes. A label is the name of a reason, a tier, a server or a state, never a key, a salt
or a text. Every reason is there from the first scrape on, with 0: Prometheus does not see a counter rise that begins
with its first event.

Each process has its own port, because Prometheus tells processes apart by `instance` and takes a restart for what it
is by the counters that begin at 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import TracebackType
from typing import Any, Final, Self

from kvlab.cache.base import KVCache
from kvlab.engine.requests import Histogram
from kvlab.engine.scheduler import Scheduler
from kvlab.engine.tiers import TieredCache
from kvlab.engine.workers import WorkerGroup
from kvlab.errors import ConfigError
from kvlab.stores.base import Store, check_number
from kvlab.stores.faults import Reason

try:
    from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ConfigError("metrics need prometheus_client: pip install 'kvlab[metrics]'") from error

LOOPBACK: Final = "127.0.0.1"
Source = Store | KVCache | Scheduler | WorkerGroup
Sample = tuple[str, tuple[str, ...], float | Histogram]
"""The name of a metric, the values of its labels, and its value."""


@dataclass(frozen=True)
class Described:
    """A metric: its type, the unit of its values, its labels, and what it says."""

    name: str
    kind: str
    unit: str
    labels: tuple[str, ...]
    says: str


def _counter(name: str, unit: str, says: str, *labels: str) -> Described:
    return Described(f"kvlab_{name}_total", "counter", unit, labels, says)


def _gauge(name: str, unit: str, says: str, *labels: str) -> Described:
    return Described(f"kvlab_{name}", "gauge", unit, labels, says)


METRICS: Final = (
    # Of a scheduler: tokens and requests.
    _counter("lookup_tokens", "tokens", "Prompt tokens of all requests; by these the token hit rate is divided."),
    _counter("hit_tokens", "tokens", "Prompt tokens whose KV was not computed, by where it came from.", "source"),
    _counter("recomputed_tokens", "tokens", "Tokens whose KV was needed again after a preemption; never a hit."),
    _counter("preemptions", "requests", "Requests that had to give their pages back."),
    _counter("ended_requests", "requests", "Requests that have ended, by why.", "reason"),
    Described(
        "kvlab_time_to_first_token_seconds",
        "histogram",
        "seconds",
        ("hit",),
        "From the arrival of a request to its first token, by whether some of its KV came from a tier.",
    ),
    _counter("steps", "steps", "Passes of the model."),
    _counter("saves", "saves", "Saves of new blocks that were begun, at most two for each run of a request."),
    _counter("unsaved_prompts", "saves", "Of these, those that were not made: too many were waiting, or an error."),
    _gauge("unfinished_requests", "requests", "Requests that have not ended."),
    _gauge("pages", "pages", "Pages of the device pool: free, idle (cached, in no request), used.", "state"),
    # Of a cache: blocks.
    _counter("requested_blocks", "blocks", "Blocks that were asked for: loaded and failed ones."),
    _counter("loaded_blocks", "blocks", "Blocks that were loaded and verified, by tier.", "source"),
    _counter("failed_blocks", "blocks", "Blocks that could not be loaded, by reason; they were computed.", "reason"),
    _counter("saved_blocks", "blocks", "Blocks that the store accepted."),
    _counter("kept_blocks", "blocks", "Blocks that were to be saved and were stored already."),
    _counter("dropped_blocks", "blocks", "Blocks that were not written, by reason.", "reason"),
    _counter("loaded_bytes", "bytes", "Bytes of the records that were loaded."),
    _counter("saved_bytes", "bytes", "Bytes of the records that were offered to the store."),
    _counter("loads", "loads", "Loads of at least one block."),
    _counter("load_seconds", "seconds", "Time that loads took."),
    _counter("prefill_avoided_seconds", "seconds", "Estimated prefill time of the tokens that were loaded instead."),
    _gauge("host_blocks", "blocks", "Blocks in host memory."),
    _gauge("host_held_blocks", "blocks", "Of these, blocks that pins hold."),
    _counter("pinned_blocks", "blocks", "Blocks that pins kept, by how: held, or refreshed (evictable).", "how"),
    # Of a store: values and round trips.
    _counter("store_requested", "values", "Values that were asked for: hits and misses."),
    _counter("store_hits", "values", "Values that the store returned."),
    _counter("store_misses", "values", "Values that it did not return, by reason.", "reason"),
    _counter("store_offered", "values", "Values that were to be written: stored and dropped ones."),
    _counter("store_stored", "values", "Values that the store accepted."),
    _counter("store_drops", "values", "Values that were not written, by reason.", "reason"),
    _counter("store_faults", "round trips", "Failed round trips by reason; timeout: over the deadline.", "reason"),
    _counter("store_read_bytes", "bytes", "Bytes of the values that the store returned."),
    _counter("store_written_bytes", "bytes", "Bytes of the values that it accepted."),
    _counter("store_redirects", "values", "Values that a node of a cluster had handed over to another."),
    _gauge("breaker_open", "0 or 1", "Whether a server gets no calls (or writes) after faults.", "server", "refuses"),
    # Of a worker group, in the process that started the workers.
    _gauge("workers", "processes", "Workers that are ready, and that are starting.", "state"),
    _counter("worker_deaths", "processes", "Workers that have ended by themselves, or were killed."),
    _gauge("group_unfinished_requests", "requests", "Requests that have not ended, of all workers."),
)
"""All metrics, in the order of the page that they give."""
NAMES: Final = frozenset(metric.name for metric in METRICS)
ENDS: Final = ("eos", "length", "cancelled")


# --- what each source has counted ---------------------------------------------------------------
def _samples(source: Source) -> Iterator[Sample]:
    if isinstance(source, Store):
        yield from _of_store(source)
    elif isinstance(source, KVCache):
        yield from _of_cache(source)
    elif isinstance(source, Scheduler):
        yield from _of_scheduler(source)
    else:
        yield from _of_group(source)


def _plain(**values: float) -> Iterator[Sample]:
    for name, value in values.items():
        yield f"kvlab_{name}", (), value


def _by(name: str, labels: Iterable[str], counts: Mapping[str, int]) -> Iterator[Sample]:
    """A sample for each label, 0 where nothing was counted."""
    for label in dict.fromkeys([*labels, *counts]):
        yield f"kvlab_{name}", (str(label),), counts.get(label, 0)


def _of_store(store: Store) -> Iterator[Sample]:
    stats = store.stats()
    yield from _plain(
        store_requested_total=stats.requested,
        store_hits_total=stats.hits,
        store_offered_total=stats.offered,
        store_stored_total=stats.stored,
        store_read_bytes_total=stats.bytes_out,
        store_written_bytes_total=stats.bytes_in,
        store_redirects_total=stats.redirects,
    )
    yield from _by("store_misses_total", Reason, stats.misses)
    yield from _by("store_drops_total", Reason, stats.drops)
    yield from _by("store_faults_total", Reason, stats.faults)
    for labels, state in store.breakers().items():
        yield "kvlab_breaker_open", labels, float(state != "closed")


def _of_cache(cache: KVCache) -> Iterator[Sample]:
    stats = cache.stats()
    yield from _plain(
        requested_blocks_total=stats.requested,
        saved_blocks_total=stats.stored,
        kept_blocks_total=stats.kept,
        loaded_bytes_total=stats.bytes_read,
        saved_bytes_total=stats.bytes_written,
        loads_total=stats.loads,
        load_seconds_total=stats.load_s,
    )
    tiers = isinstance(cache, TieredCache)
    yield from _by("loaded_blocks_total", ["host", "store"] if tiers else ["store"], stats.sources)
    yield from _by("failed_blocks_total", Reason, stats.misses)
    yield from _by("dropped_blocks_total", Reason, stats.drops)
    yield from _by("pinned_blocks_total", ("held", "refreshed"), stats.pinned)
    if isinstance(cache, TieredCache):
        host = cache.host
        yield from _plain(
            prefill_avoided_seconds_total=stats.avoided_s, host_blocks=len(host), host_held_blocks=host.held
        )
    store = cache.store.store if isinstance(cache, TieredCache) else getattr(cache, "store", None)
    if isinstance(store, Store):
        yield from _of_store(store)


def _of_scheduler(scheduler: Scheduler) -> Iterator[Sample]:
    totals, counts, pool = scheduler.totals, scheduler.counts, scheduler.pool
    sources = dict(totals.sources)
    computed = sources.pop("computed", 0)
    yield from _plain(
        lookup_tokens_total=computed + sum(sources.values()),
        recomputed_tokens_total=totals.recomputed,
        preemptions_total=counts["preemptions"],
        steps_total=counts["steps"],
        saves_total=counts["saves"],
        unsaved_prompts_total=counts["saves dropped"] + counts["saves failed"],
        unfinished_requests=len(scheduler),
    )
    yield from _by("hit_tokens_total", ["device", "host", "store"] if scheduler.cache else ["device"], sources)
    yield from _by("ended_requests_total", ENDS, dict(totals.ended))
    for hit, histogram in totals.ttft.items():
        yield "kvlab_time_to_first_token_seconds", (str(hit).lower(),), histogram
    free, idle = pool.free.total, pool.index.idle
    yield from _by("pages", (), {"free": free, "idle": idle, "used": len(pool.refs) - free - idle})
    if scheduler.cache is not None:
        yield from _of_cache(scheduler.cache)


def _of_group(group: WorkerGroup) -> Iterator[Sample]:
    counts = group.counts()
    yield from _plain(worker_deaths_total=counts["deaths"], group_unfinished_requests=counts["requests"])
    yield from _by("workers", (), {state: counts[state] for state in ("ready", "starting")})


# --- for Prometheus -----------------------------------------------------------------------------
class Metrics(Collector):
    """What a source has counted, each time it is asked.

    Args:
        source: a scheduler (with its cache and its store), a cache (with its store), a store, or a worker group.

    Raises:
        ConfigError: it is none of these.
    """

    def __init__(self, source: Source) -> None:
        if not isinstance(source, Source):
            raise ConfigError(f"expected a store, a cache, a scheduler or a worker group, got {type(source).__name__}")
        self._source = source

    def describe(self) -> Iterator[Metric]:
        """Return the names, for a registry that refuses a second metric of a name."""
        return map(_family, METRICS)

    def collect(self) -> Iterator[Metric]:
        """Read all counters now."""
        found: dict[str, list[tuple[tuple[str, ...], float | Histogram]]] = {}
        for name, labels, value in _samples(self._source):
            found.setdefault(name, []).append((labels, value))
        for metric in METRICS:
            if metric.name in found:
                family = _family(metric)
                for labels, value in found[metric.name]:
                    family.add_metric(labels, **_value(value))
                yield family


def _family(metric: Described) -> Any:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    return kinds[metric.kind](metric.name, metric.says, labels=metric.labels)


def _value(value: float | Histogram) -> dict[str, Any]:
    if not isinstance(value, Histogram):
        return {"value": value}
    bounds = [*map(str, value.bounds), "+Inf"]
    return {"buckets": [*zip(bounds, accumulate(value.counts), strict=True)], "sum_value": value.sum}


class MetricsServer:
    """An HTTP server that answers scrapes, from `start_metrics`. A context manager that ends it on exit.

    Attributes:
        address, port: where it listens.
    """

    def __init__(self, source: Source, port: int, address: str) -> None:
        registry = CollectorRegistry()
        registry.register(Metrics(source))
        ProcessCollector(registry=registry)
        try:
            self._server, self._thread = start_http_server(port, address, registry)
        except OSError as error:
            why = error.strerror or str(error)
            raise ConfigError(f"expected a free port for metrics, got {port} on {address}: {why}") from error
        self.address, self.port = address, int(self._server.server_port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening. May be called twice."""
        with contextlib.suppress(OSError):
            self._server.shutdown()
            self._server.server_close()
        self._thread.join()


def start_metrics(source: Source, port: int, address: str = LOOPBACK) -> MetricsServer:
    """Answer scrapes of http://ADDRESS:PORT/metrics, in threads of their own, until the server is closed.

    Who reaches the port reads the counters and the names of the store's servers. They have no content of requests, but
    there is no login: listen to more than loopback only where the network is the boundary.

    Args:
        source: see `Metrics`.
        port: 0 takes a free one.

    Raises:
        ConfigError: the port is taken or is none, or the address is not this machine's.
    """
    check_number("a port for metrics", port, -1, 65535, whole=True)
    return MetricsServer(source, port, address)
