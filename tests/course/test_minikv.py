"""The cache on one page: it passes the cache contract, and it shares blocks with the package's cache."""

from __future__ import annotations

import random
from collections import Counter

import fakeredis
import pytest
import redis
import torch

from kvlab.cache import DistributedKVCache
from kvlab.core.keys import Namespace
from kvlab.course import capstone, minikv
from kvlab.engine import PagePool, generate
from kvlab.errors import InputError
from kvlab.lab.costs import Costs
from kvlab.lab.intervals import interval
from kvlab.lab.replay import Hits, Setup
from kvlab.lab.simulate import simulate
from kvlab.lab.traces import Request
from kvlab.stores import RedisStore
from kvlab.testbed.server import RedisServer
from tests.harness.helpers import attentive_model, blank, exact_kv, small_spec

SPEC, SALT = small_spec(), b"tenant"
TOKENS = [(31 * i) % 4096 for i in range(150)]


@pytest.mark.slow
@pytest.mark.redis
def test_store_and_cache_keep_both_contracts() -> None:
    said: list[str] = []
    report = capstone.run(minikv.__file__, said.append)
    assert report.ok, "\n".join(said)
    assert report.classes == {"MiniRedis": "store", "MiniCache": "cache"} and not report.skipped
    assert report.kept == {name: report.asked[suite] for name, suite in report.classes.items()}
    assert min(report.cases.values()) > 80
    left_out = {suite: [len(rules) for rules in why.values()] for suite, why in report.left_out.items()}
    assert left_out == {"store": [8, 10, 1, 1], "cache": [6, 3, 5]}  # by reason
    assert said[-1] == "The file keeps both contracts."


@pytest.mark.redis
def test_both_caches_read_each_others_blocks(redis_server: RedisServer) -> None:
    mini = minikv.MiniCache(minikv.MiniRedis(redis.Redis.from_url(redis_server.url, protocol=2)), SPEC, SALT)
    package = DistributedKVCache(
        store=RedisStore(redis_server.url), model=SPEC, salt=SALT, precision="fp32", compress=False
    )
    kv = exact_kv(SPEC, len(TOKENS))
    whole = len(TOKENS) // mini.block_tokens * mini.block_tokens
    for writer, reader, tokens in ((mini, package, TOKENS), (package, mini, TOKENS[::-1])):
        assert writer.save(tokens, kv) == whole // mini.block_tokens
        out = blank(SPEC, whole)
        assert reader.match(tokens) == whole == reader.load(tokens, 0, whole, out)
        assert torch.equal(out, kv[:, :, :, :whole])


def test_keys_are_those_of_the_package() -> None:
    root = minikv.root_key(SPEC.fingerprint, "fp32", SALT, 16)
    assert minikv.block_keys(TOKENS, root, 16) == Namespace(SPEC.fingerprint, "fp32", SALT, 16).keys(TOKENS)


def test_a_lost_server_is_misses_and_drops() -> None:
    server = fakeredis.FakeServer()
    cache = minikv.MiniCache(minikv.MiniRedis(fakeredis.FakeRedis(server=server)), SPEC)
    kv = exact_kv(SPEC, len(TOKENS))
    cache.save(TOKENS, kv)
    server.connected = False
    assert (cache.match(TOKENS), cache.save(TOKENS, kv), cache.health().ok) == (0, 0, False)
    assert cache.load(TOKENS, 0, 64, blank(SPEC, 64)) == 0
    server.connected = True
    assert cache.load(TOKENS, 0, 64, blank(SPEC, 64)) == 64


@pytest.mark.parametrize("ttl_s", [1, 100])
def test_what_is_read_lives_on(ttl_s: float) -> None:
    client = fakeredis.FakeRedis()
    store = minikv.MiniRedis(client, ttl_s)
    assert store.put_many([b"a", b"b"], [b"1", b"2"]) == 2
    client.pexpire(b"kv:a", 5)
    assert store.get_many([b"a", b"none"]) == [b"1", None]
    assert client.pttl(b"kv:a") > 0.9 * ttl_s * 1000


# --- the scheduler of lesson 08 -----------------------------------------------------------------
REQUESTS = {"a": (20, 24), "b": (12, 6), "c": (120, 10), "d": (30, 18), "e": (10, 4), "f": (90, 8)}


@pytest.mark.parametrize("budget", [8, 48, 512])
@pytest.mark.parametrize("pages", [9, 30, 100])
def test_the_scheduler_gives_the_tokens_of_generate_within_budget_and_pages(pages: int, budget: int) -> None:
    model = attentive_model()
    scheduler = minikv.MiniScheduler(model, PagePool(model, pages), budget)
    prompts = {name: [(7 * n + i * i) % 97 for i in range(n)] for name, (n, _) in REQUESTS.items()}
    for name, (_, new) in REQUESTS.items():
        scheduler.submit(name, prompts[name], new)
    steps = scheduler.run()
    for name, (_, new) in REQUESTS.items():
        expected = generate(model, prompts[name], new, stop_at_eos=False).tokens
        assert scheduler.answers[name] == prompts[name] + expected
    assert max(sum(step.values()) for step in steps) <= budget
    assert scheduler.pool.free.total == pages and not scheduler.pool.tables
    if pages == 100 and budget == 512:
        assert max(map(len, steps)) == len(REQUESTS), "all of them in one batch"


def test_a_request_that_can_never_run_is_an_error_and_no_endless_loop() -> None:
    model = attentive_model()
    scheduler = minikv.MiniScheduler(model, PagePool(model, 3))
    scheduler.submit("long", [1] * 60, 10)
    with pytest.raises(InputError, match="finds room"):
        scheduler.run()


# --- the report of lesson 10 --------------------------------------------------------------------
def test_latencies_from_when_due_are_those_of_the_simulator() -> None:
    """With prefills only, a node of the simulator is a server with one slot."""
    rng = random.Random(1)
    requests = [
        Request(at, rng.randint(1, 500), 1, range(n, n + 1))
        for n, at in enumerate(sorted(rng.choices(range(99), k=60)))
    ]
    costs = Costs(kv_bytes=1, prefill_token_s=0.01, chunk=10**6)
    simulated = simulate(requests, 512, Setup(device=0), costs).ttft_s
    service = [costs.prefill(request.tokens, 0) for request in requests]
    assert minikv.open_loop([request.at_s for request in requests], service, 1) == pytest.approx(simulated)


def test_more_slots_never_make_a_request_later() -> None:
    rng = random.Random(2)
    due = sorted(rng.uniform(0, 100) for _ in range(200))
    service = [rng.expovariate(1) for _ in due]
    before = minikv.open_loop(due, service, 1)
    for slots in range(2, 6):
        after = minikv.open_loop(due, service, slots)
        assert all(took - 1e-9 <= a <= b + 1e-9 for took, a, b in zip(service, after, before, strict=True))
        before = after


@pytest.mark.parametrize("block_tokens", [1, 16, 64, 512])
def test_the_four_hit_rates_are_those_of_a_replay(block_tokens: int) -> None:
    rng, hits, pairs = random.Random(block_tokens), Hits(block_tokens), []
    for _ in range(50):
        tokens = rng.randint(1, 2000)
        blocks = -(-tokens // block_tokens)
        pairs.append((tokens, rng.randint(0, blocks)))
        hits.add(Request(0.0, tokens, 1, range(blocks)), (pairs[-1][1],))
    assert minikv.hit_rates(pairs, block_tokens) == pytest.approx(hits.rates())


def test_a_percentile_is_a_value_that_so_many_do_not_exceed() -> None:
    rng = random.Random(3)
    values = [rng.randint(1, 30) for _ in range(97)]
    for percent in (1, 25, 50, 95, 99, 100):
        found = minikv.percentile(Counter(values), percent)
        below = [sum(value <= x for value in values) / len(values) for x in (found, found - 1)]
        assert found in values and below[0] >= percent / 100 > below[1]


def test_the_interval_is_about_that_of_the_package_and_a_report_uses_all_parts() -> None:
    rng = random.Random(4)
    groups = [f"{i // 5}" for i in range(100)]
    slow = [rng.uniform(20, 30) * (1 + int(group) % 3) for group in groups]
    fast = [value / rng.uniform(2, 3) for value in slow]
    due = [1000.0 * i for i in range(100)]  # nobody waits
    a, b = (minikv.MiniReport(due, service, groups) for service in (slow, fast))
    theirs = interval(lambda x, y: x.mean() / y.mean(), slow, fast, groups=groups)
    assert b.times_faster_than(a) == pytest.approx(theirs, rel=0.03)
    assert a.at(95) == minikv.percentile(Counter(map(round, slow)), 95)
