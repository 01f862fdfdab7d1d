"""What Prometheus is shown is what was counted: nothing twice, nothing of a request's content, zeros from the start."""

from __future__ import annotations

import ast
import errno
import os
import socket
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Counter as PrometheusCounter
from prometheus_client.parser import text_string_to_metric_families

import kvlab
from kvlab.cache import DistributedKVCache
from kvlab.engine import WorkerGroup, WorkerSettings
from kvlab.engine.metrics import METRICS, Metrics, Source, start_metrics
from kvlab.engine.requests import Histogram
from kvlab.errors import ConfigError
from kvlab.stores import FileStore, MemoryStore, RedisStore, WriteBehind
from kvlab.stores.faults import Reason
from tests.engine.serving import serving, submit
from tests.engine.test_tiers import B, tiered, words
from tests.harness.helpers import blank, exact_kv, small_spec

SPEC = small_spec()


def page(source: Source) -> str:
    registry = CollectorRegistry()
    registry.register(Metrics(source))
    return generate_latest(registry).decode()


def values(text: str) -> dict[tuple[str, ...], float]:
    """The samples by name and values of their labels, which the page has in the order of their names."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def served(cache: Any, *prompts: list[int], new: int = 3) -> Any:
    scheduler = serving(80, cache)
    for i, prompt in enumerate(prompts):
        scheduler.submit(str(i), prompt, new, stop_at_eos=False)
        list(scheduler.run())
        if scheduler._saver is not None:
            assert all(save.done.wait(30) for save in scheduler._saver._saves)
    return scheduler


def test_hits_by_source_add_up_with_what_was_computed() -> None:
    store, prompt = MemoryStore(), words(5 * B + 3)
    served(tiered(store), prompt).close()
    cache = tiered(store)
    scheduler = served(cache, prompt, prompt)
    found, length = values(page(scheduler)), len(prompt)
    assert found["kvlab_lookup_tokens_total",] == 2 * length
    assert [found["kvlab_hit_tokens_total", tier] for tier in ("device", "host", "store")] == [5 * B, 0, 5 * B]
    assert found["kvlab_loaded_blocks_total", "store"] == 5 == found["kvlab_requested_blocks_total",]
    assert found["kvlab_store_hits_total",] == store.stats().hits
    assert found["kvlab_ended_requests_total", "length"] == 2
    assert found["kvlab_time_to_first_token_seconds_count", "true"] == 2
    assert found["kvlab_time_to_first_token_seconds_count", "false"] == 0
    cache.stats().check()


def test_loads_and_the_prefill_that_they_avoid() -> None:
    store, prompt = MemoryStore(), words(8 * B + 1)
    served(tiered(store), prompt).close()
    cache = tiered(store)
    for _ in range(8):
        cache.planner.computed(0, 8 * B, 0.8)  # a model that needs so long for them
    found = values(page(served(cache, prompt)))
    assert found["kvlab_prefill_avoided_seconds_total",] == pytest.approx(0.8, rel=0.05)
    assert found["kvlab_loads_total",] == 1
    assert 0 < found["kvlab_load_seconds_total",] == cache.stats().load_s


def test_only_blocks_that_came_avoid_anything() -> None:
    cache = tiered()
    cache.planner.computed(0, 8 * B, 0.8)
    assert cache._avoided_s([]) == 0.0
    parts = cache._avoided_s([0, 1]) + cache._avoided_s([5])
    assert cache._avoided_s([0, 1, 5]) == pytest.approx(parts) and parts > 0
    assert tiered()._avoided_s([0, 1]) == 0.0  # nothing was computed yet: unknown is not avoided


def test_a_hit_rate_that_saves_nothing_shows() -> None:
    class Slow(MemoryStore):
        """Each read takes a second of the cache's clock."""

        def get_many(self, *arguments: Any, **named: Any) -> Any:
            now[0] += 1.0
            return super().get_many(*arguments, **named)

    now, store, prompt = [0.0], Slow(), words(6 * B + 1)
    served(tiered(store), prompt).close()
    cache = tiered(store, clock=lambda: now[0])
    cache.planner.computed(0, 6 * B, 0.1)
    found = values(page(served(cache, prompt)))
    assert found["kvlab_hit_tokens_total", "store"] == 6 * B
    assert found["kvlab_load_seconds_total",] >= 1 > 0.2 > found["kvlab_prefill_avoided_seconds_total",] > 0


def test_what_is_needed_again_after_a_preemption_is_no_hit() -> None:
    scheduler = serving(8)
    submit(scheduler, [30, 31], 50)
    records = [output.record for output in scheduler.run() if output.record]
    again = sum(record.recomputed for record in records)
    found = values(page(scheduler))
    assert scheduler.counts["preemptions"] == found["kvlab_preemptions_total",] > 0
    assert again == found["kvlab_recomputed_tokens_total",] > 0
    assert found["kvlab_lookup_tokens_total",] == 30 + 31
    assert found["kvlab_hit_tokens_total", "device"] == sum(r.sources["device"] for r in records) == 0


def test_with_tiers_a_second_prefill_counts_no_block_and_no_token_twice() -> None:
    cache = tiered(blocks=0)
    scheduler = serving(8, cache)
    submit(scheduler, [30, 31], 50)
    list(scheduler.run())
    found = values(page(scheduler))
    assert found["kvlab_preemptions_total",] and found["kvlab_recomputed_tokens_total",]
    assert found["kvlab_lookup_tokens_total",] == 61
    assert sum(found["kvlab_hit_tokens_total", tier] for tier in ("device", "host", "store")) == 0
    assert found["kvlab_loads_total",] == found["kvlab_requested_blocks_total",] == 0


def test_every_reason_is_there_before_its_first_event() -> None:
    found = values(page(served(tiered(), words(20))))
    for name in ("store_misses", "store_drops", "store_faults", "failed_blocks", "dropped_blocks"):
        assert {key[1] for key in found if key[0] == f"kvlab_{name}_total"} == {str(reason) for reason in Reason}


def test_faults_come_by_reason_and_the_breaker_shows() -> None:
    with RedisStore("redis://127.0.0.1:9", deadline_s=0.2) as store:
        for _ in range(5):
            store.get_many([b"k" * 32])
        found = values(page(WriteBehind(store)))
    assert found["kvlab_store_faults_total", "conn"] == 3 == found["kvlab_store_misses_total", "conn"]
    assert found["kvlab_store_misses_total", "breaker"] == 2
    assert found["kvlab_breaker_open", "calls", "127.0.0.1:9"] == 1
    assert found["kvlab_breaker_open", "writes", "127.0.0.1:9"] == 0


def test_a_store_in_files_has_one_breaker_and_one_in_memory_none(tmp_path: Any) -> None:
    with FileStore(tmp_path / "blocks") as store:
        assert values(page(store))["kvlab_breaker_open", "calls", "disk"] == 0
    assert "kvlab_breaker_open" not in page(MemoryStore())


def test_a_cache_without_a_planner_claims_no_time_saved() -> None:
    tokens = words(4 * B)
    kv = exact_kv(SPEC, len(tokens))
    with DistributedKVCache(store=MemoryStore(), model=SPEC, precision="fp32", block_tokens=B) as cache:
        cache.save(tokens, kv)
        assert cache.load(tokens, 0, len(tokens), blank(SPEC, 4 * B)) == len(tokens)
        text = page(cache)
    found = values(text)
    assert found["kvlab_loaded_blocks_total", "store"] == 4 and found["kvlab_loads_total",] == 1
    assert found["kvlab_load_seconds_total",] > 0 and "avoided" not in text


def test_nothing_of_a_request_and_no_secret_is_on_the_page() -> None:
    store = RedisStore("redis://somebody:secret@127.0.0.1:9", deadline_s=0.2)
    with DistributedKVCache(store=store, model=SPEC, precision="fp32", block_tokens=B, salt="tenant-a") as cache:
        cache.match(words(4 * B))
        text = page(cache)
        keys = [key.hex() for key in cache.namespace.keys(words(4 * B))]
    assert not [word for word in ("secret", "somebody", "tenant-a", *keys) if word in text]


def test_names_follow_the_rules_and_each_sample_is_described() -> None:
    for metric in METRICS:
        assert metric.name.startswith("kvlab_") and metric.says.endswith(".")
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric
        assert (metric.unit == "seconds") == ("_seconds" in metric.name), metric
        assert (metric.unit == "bytes") == ("_bytes" in metric.name), metric
    described = {metric.name: metric.labels for metric in METRICS}
    assert len(described) == len(METRICS)
    for family in Metrics(served(tiered(), words(20))).collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        assert family.samples and {tuple(s.labels)[: len(described[name])] for s in family.samples} == {described[name]}


def test_the_connector_for_vllm_uses_the_same_words() -> None:
    """Its module needs vLLM, so its table is read as text."""
    tree = ast.parse((Path(kvlab.__file__).parent / "connectors" / "vllm" / "stats.py").read_text("utf-8"))
    (table,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "COUNTERS"]
    theirs = {f"kvlab_{name}_total" for name in ast.literal_eval(table)}
    ours = {metric.name for metric in METRICS}
    both = "lookup_tokens hit_tokens loaded_blocks loaded_bytes load_seconds failed_blocks saved_blocks saved_bytes"
    assert theirs & ours == {f"kvlab_{name}_total" for name in (*both.split(), "dropped_blocks")}


def test_a_registry_of_a_service_takes_them_once() -> None:
    registry = CollectorRegistry(auto_describe=True)
    PrometheusCounter("requests", "of the service", registry=registry)
    registry.register(Metrics(MemoryStore()))
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(Metrics(MemoryStore()))
    assert b"kvlab_store_hits_total 0.0" in generate_latest(registry)


def test_a_histogram_counts_up_to_and_with_its_bounds() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert (histogram.counts, histogram.sum) == ([2, 1, 1], 12.0)


# --- the server ---------------------------------------------------------------------------------
def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


def test_a_server_answers_on_loopback_until_it_is_closed() -> None:
    store = MemoryStore()
    with start_metrics(store, 0) as server:
        store.get_many([b"k" * 32])
        text = scrape(server.port)
        assert server.address == "127.0.0.1" and "process_resident_memory_bytes" in text
        assert values(text)["kvlab_store_misses_total", "absent"] == 1
    server.close()
    with pytest.raises(OSError):
        scrape(server.port)


def test_a_port_that_is_taken_is_said_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            start_metrics(MemoryStore(), port)
    assert (
        str(caught.value)
        == f"expected a free port for metrics, got {port} on 127.0.0.1: {os.strerror(errno.EADDRINUSE)}"
    )


@pytest.mark.parametrize("port", [-1, 65536, "9400", 1.5, True])
def test_what_is_no_port(port: Any) -> None:
    with pytest.raises(ConfigError, match="a port for metrics as a whole number"):
        start_metrics(MemoryStore(), port)


def test_what_has_no_metrics_and_what_is_no_address_of_this_machine() -> None:
    with pytest.raises(ConfigError, match="expected a store, a cache, a scheduler or a worker group, got dict"):
        start_metrics({}, 0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"got 0 on 203\.0\.113\.1"):
        start_metrics(MemoryStore(), 0, "203.0.113.1")


def test_a_group_refuses_ports_that_do_not_suffice_or_are_taken(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="metrics_port as a whole number above 0 and at most 65533"):
        WorkerGroup(2, metrics_port=65534)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"got {port} on 127"):
            WorkerGroup(2, WorkerSettings(pages=64), metrics_port=port)


def test_the_counts_of_a_scheduler_are_those_of_its_records() -> None:
    scheduler = serving(80)
    prompts = [words(length, seed=length) for length in (10, 25, 25)]
    for i, prompt in enumerate(prompts):
        scheduler.submit(str(i), prompt, 5, stop_at_eos=False)
    scheduler.cancel("0")
    records = [output.record for output in scheduler.run() if output.record]
    assert scheduler.totals.sources == sum((record.sources for record in records), Counter())
    assert scheduler.totals.ended == Counter(length=2, cancelled=1)
