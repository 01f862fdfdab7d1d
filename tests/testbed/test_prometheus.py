"""A real Prometheus scrapes two real workers, and takes the restart of one for a restart."""

from __future__ import annotations

import os
import signal

import pytest

from kvlab.engine import WorkerGroup, WorkerSettings
from kvlab.errors import KVLabError
from kvlab.testbed.prometheus import Prometheus
from kvlab.testbed.server import RedisServer, free_port
from tests.faults.kit import wait_for

LENGTH, BLOCKS = 200, 3  # of 64 tokens


@pytest.mark.redis
@pytest.mark.prometheus
@pytest.mark.slow
def test_prometheus_scrapes_two_workers_and_their_parent(redis_server: RedisServer) -> None:
    first = free_port(3)
    targets = [f"127.0.0.1:{first + i}" for i in range(3)]
    settings = WorkerSettings(store=redis_server.url, pages=64, host_bytes=0)
    with (
        WorkerGroup(2, settings, router="round_robin", metrics_port=first) as group,
        Prometheus({"kvlab": targets}) as prometheus,
    ):

        def value(expression: str) -> dict[str, float]:
            return {labels["instance"]: number for labels, number in prometheus.query(expression)}

        prompt = list(range(10, 10 + LENGTH))
        for _ in range(4):
            group.submit(prompt, 2, stop_at_eos=False).result(60)
            # saved, with a description of the namespace, before the other worker looks
            wait_for(lambda: redis_server.client().dbsize() == BLOCKS + 1, 30)
        wait_for(lambda: value("up") == dict.fromkeys(targets, 1.0), 30)
        wait_for(lambda: value("kvlab_lookup_tokens_total") == dict.fromkeys(targets[1:], 2.0 * LENGTH), 30)
        by_source = prometheus.query("sum by (source) (kvlab_hit_tokens_total)")
        hits = {labels["source"]: number for labels, number in by_source}
        records = [stats["cache"] for stats in group.stats().values()]
        assert hits["store"] == 64 * sum(r["sources"].get("store", 0) for r in records) == 192  # the second worker's
        assert hits["device"] == 2 * 192 and hits["host"] == 0

        os.kill(min(group.pids.values()), signal.SIGKILL)
        wait_for(lambda: value("kvlab_worker_deaths_total") == {targets[0]: 1.0}, 60)
        wait_for(lambda: len(group.pids) == 2, 60)
        wait_for(lambda: sorted(value("kvlab_lookup_tokens_total").values()) == [0.0, 2.0 * LENGTH], 60)
        wait_for(lambda: value('kvlab_workers{state="ready"}') == {targets[0]: 2.0}, 30)
        assert not [t for t in value("up") if t not in targets]


@pytest.mark.prometheus
def test_rules_that_cannot_be_read_end_it_at_once_and_no_folder_stays() -> None:
    broken = Prometheus({}, "groups: [{name: a, rules: [{alert: B, expr: 'sum('}]}]\n")
    with pytest.raises(KVLabError, match=r"prometheus exited at once: .*parse error"), broken:
        pass
    assert not broken.folder.exists()


@pytest.mark.prometheus
def test_a_wrong_expression_is_said() -> None:
    with Prometheus({}) as prometheus:
        assert prometheus.query("vector(2)") == [({}, 2.0)] and prometheus.firing() == set()
        with pytest.raises(KVLabError, match="parse error"):
            prometheus.query("sum(")
    assert not prometheus.folder.exists()


def test_it_says_how_to_install_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(KVLabError, match="apt-get install prometheus"), Prometheus({}):
        pass
