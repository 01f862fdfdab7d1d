"""What a store does when one of several servers fails: nodes of a Redis Cluster, masters and sentinels.

Most tests run a load meanwhile: threads that read and write the same keys all the time, over all shards. In every
test: what comes back is what was stored under that key or a miss, nothing is raised, every call is counted under a
reason, no call hangs, other shards go on, and once the fault is over everything works again.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import pytest
import redis
from redis.crc import key_slot

from kvlab.cache import DistributedKVCache
from kvlab.engine import generate
from kvlab.stores import RedisStore
from kvlab.stores.redis.node import Node
from kvlab.stores.redis.topology import Shard
from kvlab.testbed.cluster import RedisCluster, node_options
from kvlab.testbed.sentinel import NAME, RedisSentinel
from kvlab.testbed.server import RedisServer
from tests.faults.conftest import Book
from tests.faults.test_basic_faults import wait_for
from tests.faults.test_value_faults import monitored
from tests.faults.test_wire_faults import (
    HANG,
    PATIENT_S,
    Alarm,
    Interrupt,
    alarm,
    ask,
    calls_of,
    fill,
    forks,
    in_child,
    read_while_standing_still,
)
from tests.faults.test_wire_faults import value_of as uncached_value_of
from tests.harness.helpers import build_model

pytestmark = pytest.mark.cluster

D = 0.5  # deadline of the calls under load: two busy cores must not make a healthy server look hung
RECOVERS_S = 30.0
SIZE = 2000
KEYS = [b"key %d" % i for i in range(300)]
RIGHTS = ("get", "set", "del", "exists", "pexpire", "info", "cluster|slots", "asking", "readonly")
value_of = functools.cache(lambda key: uncached_value_of(key, SIZE))


# --- clusters that may be harmed -------------------------------------------------------------------
@pytest.fixture(scope="module")
def harmed() -> Iterator[RedisCluster]:
    """Three masters with a replica each, whose faults stop no other shard; use `cluster`."""
    with RedisCluster() as made:
        yield made


@pytest.fixture
def cluster(harmed: RedisCluster) -> Iterator[RedisCluster]:
    """An empty cluster in its right mind. A test may stop and kill what it likes, and leave it so."""
    heal(harmed)
    for port in masters(harmed):
        client_at(port).flushall()  # which also lets replicas be known: one that has copied nothing is not told of
    wait_for(lambda: agree(harmed), 60)
    yield harmed


def heal(cluster: RedisCluster) -> None:
    """Every node runs, has the settings that it was started with, and follows or is followed."""
    awake(cluster.nodes)
    for node in cluster.nodes:
        client = client_at(node.port)
        client.config_set("maxmemory", 0)
        client.config_set("masteruser", "")
        client.config_set("masterauth", "")
        client.config_set("cluster-require-full-coverage", "no")
        client.config_set("cluster-replica-no-failover", "no")
        client.config_set("cluster-allow-reads-when-down", "no")
        client.execute_command("ACL", "DELUSER", "kvlab")
    wait_for(lambda: one_mind(cluster), 60)
    cluster.wait_until_ok()


def awake(nodes: Iterable[RedisServer]) -> None:
    for node in nodes:
        node.cont()
        if not node.running:
            node.start()


def one_mind(cluster: RedisCluster) -> bool:
    """Every node names the same masters."""
    return len({tuple(line[:3] for line in slots_seen_by(node.port)) for node in cluster.nodes}) == 1


def agree(cluster: RedisCluster) -> bool:
    """Every node has the same map, in which each of three masters has a replica."""
    maps = [slots_seen_by(node.port) for node in cluster.nodes]
    return all(m == maps[0] for m in maps) and {len(m) for m in servers_of(maps[0]).values()} == {1}


def slots_seen_by(port: int) -> list[tuple[int, ...]]:
    """First and last slot, port of the master, ports of its replicas."""
    told = client_at(port).execute_command("CLUSTER", "SLOTS")
    return sorted((first, last, master[1], *sorted(r[1] for r in rest)) for first, last, master, *rest in told)


def servers_of(slots: Sequence[tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    """The replicas of each master."""
    return {line[2]: tuple(line[3:]) for line in slots}


def masters(cluster: RedisCluster) -> dict[int, tuple[int, ...]]:
    """The replicas of each master, by ports, as the first node says that answers."""
    for node in cluster.nodes:
        with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
            return servers_of(slots_seen_by(node.port))
    raise AssertionError("no node answers")


def client_at(port: int) -> Any:
    """A plain client; answers are as they come from the wire."""
    client = redis.Redis(host="127.0.0.1", port=port, protocol=2, socket_timeout=2, retry=None)
    for name in ("CLUSTER SLOTS", "CLUSTER", "SENTINEL"):
        client.response_callbacks.pop(name, None)
    return client


def node_at(nodes: Iterable[RedisServer], port: int) -> RedisServer:
    return next(node for node in nodes if node.port == port)


def name_of(key: bytes) -> bytes:
    """A key as servers know it."""
    return b"kv:" + key


def owners(cluster: RedisCluster, keys: Iterable[bytes]) -> dict[bytes, int]:
    """The port of each key's master."""
    slots = slots_seen_by(next(iter(masters(cluster))))
    at = {key: key_slot(name_of(key)) for key in keys}
    return {key: next(line[2] for line in slots if line[0] <= slot <= line[1]) for key, slot in at.items()}


def replicated(ports: Iterable[int]) -> None:
    """Wait until replicas have what these masters have now."""
    for port in ports:
        client = client_at(port)
        offset = client.info("replication")["master_repl_offset"]

        def followed(client: Any = client, offset: int = offset) -> bool:
            facts = client.info("replication")
            lines = [facts[f"slave{i}"] for i in range(facts["connected_slaves"])]
            return bool(lines) and all(line["offset"] >= offset for line in lines)

        wait_for(followed)


def prepared(cluster: RedisCluster, store: RedisStore, keys: Sequence[bytes] = KEYS) -> dict[bytes, int]:
    """Store every key, on replicas too; the port of each key's master."""
    put_all(store, keys)
    replicated(masters(cluster))
    return owners(cluster, keys)


def put_all(store: RedisStore, keys: Sequence[bytes]) -> None:
    with patient(store):
        fill(store, list(keys), SIZE)


@contextlib.contextmanager
def patient(store: RedisStore) -> Iterator[None]:
    """Calls that a busy machine must not turn into timeouts."""
    deadline_s = store._deadline_s
    store._deadline_s = PATIENT_S
    try:
        yield
    finally:
        store._deadline_s = deadline_s


def check_all_there(store: RedisStore, keys: Sequence[bytes] = KEYS) -> None:
    """Soon every key is read and written again, and stays so."""
    with patient(store):
        wait_for(lambda: all(ask(store, list(keys), SIZE)), RECOVERS_S)
        wait_for(lambda: store.put_many(keys, [value_of(key) for key in keys]) == len(keys), RECOVERS_S)
        for _ in range(3):
            assert all(ask(store, list(keys), SIZE))
            fill(store, list(keys), SIZE)
        assert store.probe(keys) == len(keys) and all(store.touch_many(keys))
        assert store.health().ok, store.health()
    store.stats().check()


def port_of(node: Node) -> int:
    return int(node.name.rpartition(":")[2])


def nodes_by_port(store: RedisStore) -> dict[int, Node]:
    return {port_of(node): node for node in store.nodes}


def server_of(store: RedisStore, key: bytes) -> int:
    """Where the store would write a key."""
    from kvlab.stores.redis.connection import Deadline

    parts, why = store._topology.split([name_of(key)], Deadline(PATIENT_S))
    assert not why
    return port_of(parts[0].node)


# --- the load --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Call:
    """One call: how many keys of each shard it had, and why it had not the others."""

    kind: str
    begin: float
    end: float
    good: Counter[int]
    bad: Counter[tuple[int, str]]


class Load:
    """Threads that read, write, probe and touch the same keys until the block ends, and check every value.

    with Load(store, owner) as load:
        ...                 # do harm
    load.check()            # nothing wrong, nothing raised, nothing hung, every key counted

    Args:
        owner: the shard of each key, by any number.
        writes: whether keys are put too.

    Attributes:
        calls: what was done.
        opened: how often a breaker was seen open, by the node's port; those for writes have "writes" in front.
    """

    def __init__(self, store: RedisStore, owner: Mapping[bytes, int], writes: bool = True, threads: int = 3) -> None:
        self.store, self.owner = store, owner
        self.shards = sorted(set(owner.values()))
        self._kinds = ("get", "get", "get out", "probe", "touch", *(("put", "put") if writes else ()))
        self.calls: list[Call] = []
        self.wrong: list[bytes] = []
        self.raised: list[str] = []
        self.opened: Counter[int | str] = Counter()
        self._before = store.stats()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(threads)]
        self._threads.append(threading.Thread(target=self._watch, daemon=True))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        try:
            self.wait_until_served()
        except BaseException:
            self._stop.set()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * HANG * D)
        if error is None:
            assert not any(thread.is_alive() for thread in self._threads), "a call hangs"

    def check(self) -> None:
        """What must hold whatever happened meanwhile."""
        assert not self.wrong and not self.raised, (self.wrong[:3], self.raised[:3])
        assert max(call.end - call.begin for call in self.calls) < HANG * D
        now = self.store.stats()
        now.check()
        reads = [call for call in self.calls if call.kind.startswith("get")]
        puts = [call for call in self.calls if call.kind == "put"]
        missed = sum((Counter({why: n}) for call in reads for (_, why), n in call.bad.items()), Counter())
        assert now.misses - self._before.misses == missed
        assert now.hits - self._before.hits == sum(call.good.total() for call in reads)
        assert now.stored - self._before.stored == sum(call.good.total() for call in puts)
        assert (now.drops - self._before.drops).total() == sum(call.bad.total() for call in puts)

    def first(self, kind: str, shard: int, since: float) -> float | None:
        """Seconds from a moment to the end of the first such call that began after it and served the shard."""
        ends = [c.end for c in list(self.calls) if c.kind.startswith(kind) and c.begin >= since and c.good[shard]]
        return min(ends) - since if ends else None

    def wait_until_served(self, shards: Iterable[int] | None = None, seconds: float = RECOVERS_S) -> float:
        """Wait until keys of all these shards have been read and written from now on; how long that took, at most."""
        since, kinds = time.monotonic(), {kind.partition(" ")[0] for kind in self._kinds} & {"get", "put"}
        wanted = [(kind, shard) for kind in kinds for shard in (self.shards if shards is None else shards)]
        wait_for(lambda: self.raised or all(self.first(*each, since) is not None for each in wanted), seconds)
        assert not self.raised, self.raised[:3]
        return max((self.first(*each, since) or 0.0 for each in wanted), default=0.0)

    def good(self, kind: str, shards: Iterable[int], since: float = 0.0, until: float = float("inf")) -> int:
        """Keys of these shards that were served by calls that ran then."""
        calls = [c for c in list(self.calls) if c.kind.startswith(kind) and c.end >= since and c.begin <= until]
        return sum(call.good[shard] for call in calls for shard in shards)

    def bad(self, kind: str, shards: Iterable[int], since: float = 0.0, until: float = float("inf")) -> dict[str, int]:
        """Keys of these shards that were not, by reason."""
        calls = [c for c in list(self.calls) if c.kind.startswith(kind) and c.end >= since and c.begin <= until]
        wanted = set(shards)
        return dict(
            sum((Counter({why: n}) for c in calls for (at, why), n in c.bad.items() if at in wanted), Counter())
        )

    def slow(self, since: float, until: float) -> dict[str, float]:
        """Calls that took more than half a deadline, and the time they took."""
        took = [c.end - c.begin for c in list(self.calls) if c.end >= since and c.begin <= until]
        long = [t for t in took if t > D / 2]
        return {"calls": len(took), "slow calls": len(long), "their seconds": round(sum(long), 2)}

    def check_undisturbed(self, shards: Iterable[int], since: float = 0.0, until: float = float("inf")) -> int:
        """These shards missed nothing; how many keys they served.

        A timeout is what a busy machine may cause by itself; one key in a thousand is let pass.
        """
        shards, served = list(shards), 0
        for kind in ("get", "put", "probe", "touch"):
            good, bad = self.good(kind, shards, since, until), self.bad(kind, shards, since, until)
            unknown = {"get": {"timeout"}, "put": {"dropped"}}.get(kind, {"absent"})
            assert set(bad) <= unknown and sum(bad.values()) <= good / 1000, (kind, good, bad)
            served += good
        assert served
        return served

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            for node in self.store.nodes:
                self.opened[port_of(node)] += node.breaker.state != "closed"
                self.opened[f"writes {port_of(node)}"] += node.write_breaker.state != "closed"

    def _work(self, seed: int) -> None:
        chance, keys = random.Random(seed), list(self.owner)
        of_shard = {shard: [key for key in keys if self.owner[key] == shard] for shard in self.shards}
        while not self._stop.wait(0.004):
            kind = chance.choice(self._kinds)
            # What a put did not store it does not say, so one has keys of one shard only.
            among = of_shard[chance.choice(self.shards)] if kind == "put" else keys
            batch = chance.sample(among, chance.randint(1, min(60, len(among))))
            begin = time.monotonic()
            try:
                good, bad = self._do(kind, batch)
            except BaseException as error:
                self.raised.append(f"{kind}: {error!r}")
                continue
            self.calls.append(Call(kind, begin, time.monotonic(), good, bad))

    def _do(self, kind: str, batch: list[bytes]) -> tuple[Counter[int], Counter[tuple[int, str]]]:
        why: list[str] = []
        if kind.startswith("get"):
            out = [memoryview(bytearray(SIZE + 8)) for _ in batch] if kind == "get out" else None
            got = self.store.get_many(batch, out, why)
            assert len(got) == len(why) == len(batch)
            for key, value, reason in zip(batch, got, why, strict=True):
                if (value is None) != bool(reason) or (value is not None and value != value_of(key)):
                    self.wrong.append(key)
        elif kind == "put":
            stored = self.store.put_many(batch, [value_of(key) for key in batch])
            why = [""] * stored + ["dropped"] * (len(batch) - stored)
        elif kind == "probe":
            there = self.store.probe(batch)
            batch = batch[: there + 1]
            why = [""] * there + ["absent"] * (len(batch) - there)
        else:
            why = ["" if there else "absent" for there in self.store.touch_many(batch)]
        good = Counter(self.owner[key] for key, reason in zip(batch, why, strict=True) if not reason)
        bad = Counter((self.owner[key], reason) for key, reason in zip(batch, why, strict=True) if reason)
        return good, bad


def recovery(load: Load, shard: int, since: float) -> dict[str, float]:
    """Wait until a shard's keys are read and written again; seconds since the fault."""
    kinds = {"first hit after s": "get", "first put after s": "put"}
    wait_for(lambda: all(load.first(kind, shard, since) is not None for kind in kinds.values()), RECOVERS_S)
    return {name: round(load.first(kind, shard, since) or 0.0, 2) for name, kind in kinds.items()}


# --- 22, 31: a master dies or hangs ----------------------------------------------------------------
@pytest.mark.parametrize("coverage", ["no", "yes"])
@pytest.mark.slow
def test_a_master_is_killed_and_its_replica_takes_over(book: Book, cluster: RedisCluster, coverage: str) -> None:
    full = coverage == "yes"  # Redis' default
    with (
        book(
            22,
            f"cluster, kill -9 of a master{', all slots must be covered' if full else ''}",
            injected=f"kill -9 under load; node-timeout 2 s, cluster-require-full-coverage {coverage}",
            expected="its keys miss until its replica takes over; other shards "
            + ("say CLUSTERDOWN from when it counts as failed" if full else "miss nothing"),
        ) as row,
        RedisStore(cluster.url, deadline_s=D) as store,
    ):
        owner = prepared(cluster, store)
        victim = cluster.master_of(name_of(KEYS[0]))
        others = set(owner.values()) - {victim.port}
        for node in cluster.nodes:
            client_at(node.port).config_set("cluster-require-full-coverage", coverage)
        with Load(store, owner) as load:
            at = time.monotonic()
            victim.kill()
            recovered = recovery(load, victim.port, at)
            load.wait_until_served()
            up = time.monotonic()
            victim.start()
            heal(cluster)
            assert client_at(victim.port).info("replication")["role"] == "slave"
            well = time.monotonic()
            load.wait_until_served()
            time.sleep(0.5)
        load.check()
        load.check_undisturbed(load.shards, well)
        missed = load.bad("get", [victim.port], at)
        assert missed and set(missed) <= {"conn", "breaker", "timeout", "down"} and store.stats().faults["conn"] >= 3
        assert {port for port, times in load.opened.items() if times} == {victim.port}, "its breaker alone"
        row.seen = {**recovered, "misses": missed, "redirects": store.stats().redirects}
        if full:
            served, theirs = load.good("get", others, at, up), load.bad("get", others, at, up)
            assert served and set(theirs) <= {"down", "timeout"}
            row.seen |= {"reads of other shards": {"hits": served, **theirs}}
        else:
            row.seen |= {"other shards served": load.check_undisturbed(others, at)}
        check_all_there(store)
        assert server_of(store, KEYS[0]) != victim.port


@pytest.mark.slow
def test_a_master_hangs_and_comes_back_when_another_has_its_keys(book: Book, cluster: RedisCluster) -> None:
    with (
        book(
            22,
            "cluster, SIGSTOP of a master",
            injected="SIGSTOP under load, SIGCONT after the failover; node-timeout 2 s",
            expected="a deadline a call until its breaker opens; then as with kill -9",
        ) as row,
        book(
            31,
            "split brain, cluster",
            injected="a store with the map of before the failover asks the old master as soon as it wakes",
            expected="MOVED or the identical value; ends on the new master",
        ) as split,
        RedisStore(cluster.url, deadline_s=D) as store,
        RedisStore(cluster.url, deadline_s=D) as stale,
    ):
        owner = prepared(cluster, store)
        assert all(ask(stale, KEYS, SIZE))
        victim = cluster.master_of(name_of(KEYS[0]))
        its = [key for key in KEYS if owner[key] == victim.port]
        others = set(owner.values()) - {victim.port}
        with Load(store, owner) as load:
            at = time.monotonic()
            victim.stop()
            for _ in range(3):  # one that starts now, and may ask the one that hangs first
                seeds = ",".join(f"127.0.0.1:{port}" for port in (victim.port, *others))
                with RedisStore(f"redis-cluster://{seeds}", deadline_s=2 * D) as new:
                    late = dict(zip(KEYS, ask(new, KEYS, SIZE), strict=True))
                    assert all(there for key, there in late.items() if owner[key] != victim.port), new.stats()
            recovered = recovery(load, victim.port, at)
            failed_over = time.monotonic()
            taker = cluster_master(cluster, its[0], besides=victim.port)
            assert taker != victim.port and server_of(stale, its[0]) == victim.port
            victim.cont()
            rounds = 0
            while server_of(stale, its[0]) != taker or rounds < 20:
                ask(stale, its, SIZE)
                stale.put_many(its, [value_of(key) for key in its])
                rounds += 1
                assert time.monotonic() < failed_over + RECOVERS_S
            heal(cluster)
            assert client_at(victim.port).info("replication")["role"] == "slave"
            well = time.monotonic()
            load.wait_until_served()
        load.check()
        served = load.check_undisturbed(others, at)
        load.check_undisturbed(load.shards, well)
        missed = load.bad("get", [victim.port], at)
        assert missed and set(missed) <= {"timeout", "breaker", "conn", "down"} and store.stats().faults["timeout"] >= 3
        assert {port for port, times in load.opened.items() if times} == {victim.port}, "its breaker alone"
        row.seen = {**recovered, "misses": missed, "other shards served": served, **load.slow(at, failed_over)}
        stats = stale.stats()
        stats.check()
        assert stats.redirects or stats.misses, "the old map was never used"
        assert set(stats.misses) <= {"timeout", "conn", "breaker", "down", "moved"}
        split.seen = {"hits": stats.hits, "misses": dict(stats.misses), "redirects": stats.redirects, "wrong": 0}
        for each in (store, stale):
            check_all_there(each)
            assert server_of(each, its[0]) == taker


def cluster_master(cluster: RedisCluster, key: bytes, besides: int) -> int:
    """The port of a key's master, as another node says."""
    asked = next(node for node in cluster.nodes if node.port != besides and node.port in masters(cluster))
    slot = key_slot(name_of(key))
    return next(line[2] for line in slots_seen_by(asked.port) if line[0] <= slot <= line[1])


# --- 23: nobody takes over -------------------------------------------------------------------------
@pytest.mark.slow
def test_three_masters_without_replicas(book: Book) -> None:
    with (
        book(
            23,
            "no replica",
            injected="3 masters, kill -9 of one; cluster-require-full-coverage yes, then no",
            expected="yes: all keys miss, down and conn; no: two thirds hit",
        ) as row,
        RedisCluster("--cluster-require-full-coverage", "yes", replicas=0) as cluster,
        RedisStore(cluster.url, deadline_s=D) as store,
    ):
        put_all(store, KEYS)
        owner = owners(cluster, KEYS)
        victim = cluster.nodes[0]
        left = [client_at(node.port) for node in cluster.nodes[1:]]
        states = lambda: {client.execute_command("CLUSTER INFO")["cluster_state"] for client in left}  # noqa: E731
        hits = [owner[key] != victim.port for key in KEYS]
        with Load(store, owner) as load:
            victim.kill()
            wait_for(lambda: states() == {"fail"})
            time.sleep(0.3)
            down = time.monotonic()
            time.sleep(1.0)
            up = time.monotonic()
            assert not store.health().ok
            for client in left:
                client.config_set("cluster-require-full-coverage", "no")
            wait_for(lambda: states() == {"ok"})
            load.wait_until_served(set(load.shards) - {victim.port})
            partly = time.monotonic()
            time.sleep(1.0)
            end = time.monotonic()
        load.check()
        alive = set(load.shards) - {victim.port}
        assert load.good("get", load.shards, down, up) == 0
        with_coverage = load.bad("get", load.shards, down, up)
        assert {"down"} <= set(with_coverage) <= {"down", "conn", "breaker"}
        assert set(load.bad("get", alive, down, up)) == {"down"}
        assert store.stats().faults["conn"] >= 3
        load.check_undisturbed(alive, partly, end)
        assert {port for port, times in load.opened.items() if times} == {victim.port}, "who says CLUSTERDOWN works"
        with patient(store):
            assert ask(store, KEYS, SIZE) == hits
        row.seen = {"yes": {"hits": 0, **with_coverage}, "no": {"hits": f"{sum(hits)} of {len(hits)}"}}
        sick = store.health()
        assert not sick.ok and str(victim.port) in sick.detail
        victim.start()
        cluster.wait_until_ok()
        with patient(store):
            wait_for(lambda: store.put_many(KEYS, [value_of(key) for key in KEYS]) == len(KEYS))
        check_all_there(store)


# --- 24: slots move --------------------------------------------------------------------------------
EMPTY_STAYS_MASTER = ("--cluster-allow-replica-migration", "no")  # who gave its last slot away does not follow then
TAGS = [b"{slot %d}" % i for i in range(200)]


def set_slot(slot: int, ports: Iterable[int], *what: str) -> None:
    for port in ports:
        client_at(port).execute_command("CLUSTER SETSLOT", slot, *what)


def id_of(port: int) -> str:
    return str(client_at(port).execute_command("CLUSTER MYID").decode())


def begin_to_move(slot: int, source: int, target: int) -> None:
    set_slot(slot, [target], "IMPORTING", id_of(source))
    set_slot(slot, [source], "MIGRATING", id_of(target))


def move_keys(slot: int, source: int, target: int, count: int, pause_s: float = 0.02) -> int:
    """Move so many keys, one after the other; how many there were."""
    client, moved = client_at(source), 0
    while moved < count and (names := client.execute_command("CLUSTER GETKEYSINSLOT", slot, 1)):
        client.execute_command("MIGRATE", "127.0.0.1", target, "", 0, 5000, "KEYS", names[0])
        moved += 1
        time.sleep(pause_s)
    return moved


def end_to_move(slot: int, source: int, target: int, others: Iterable[int]) -> None:
    """The new owner must be the first to know."""
    set_slot(slot, [target, source, *others], "NODE", id_of(target))


@pytest.mark.slow
def test_slots_move_under_load(book: Book, cluster: RedisCluster) -> None:
    each = 8
    with (
        book(
            24,
            "slot migration",
            injected=f"6 slots with {each} keys each move under load, key by key",
            expected="ASK, then MOVED, then no redirects; no key that exists misses",
        ) as row,
        RedisStore(cluster.url, deadline_s=D) as store,
    ):
        source, target, third = masters(cluster)
        at = owners(cluster, TAGS)
        tags = [tag for tag in TAGS if at[tag] == source][:6]
        slots = [key_slot(name_of(tag)) for tag in tags]
        keys = [*KEYS[:150], *(tag + b"%d" % i for tag in tags for i in range(each))]
        owner = prepared(cluster, store, keys)
        with Load(store, owner) as load:
            at_first, begin = store.stats().redirects, time.monotonic()
            for slot in slots:
                begin_to_move(slot, source, target)
            for slot in slots:
                assert move_keys(slot, source, target, each // 2) == each // 2
            half = store.stats().redirects
            time.sleep(1.0)
            asked = store.stats().redirects
            assert asked > half > at_first, "keys that have gone are found by ASK"
            assert server_of(store, tags[0]) == source, "ASK is not for good"
            for slot in slots:
                assert move_keys(slot, source, target, 2 * each) == each // 2
            before_moved = store.stats().redirects
            for slot in slots:
                end_to_move(slot, source, target, [third])
            end = time.monotonic()
            wait_for(lambda: server_of(store, tags[0]) == target)
            wait_for(lambda: agree(cluster))
            wait_for(no_redirects_for(1.5, store), RECOVERS_S)
            all_in_all = store.stats().redirects
        load.check()
        served = load.check_undisturbed(load.shards)
        assert store.stats().faults["moved"] == 0, "no ring of redirects"
        row.seen = {
            "served": served,
            "misses": dict(store.stats().misses),
            "drops": dict(store.stats().drops),
            "redirects, ASK": before_moved - at_first,
            "redirects, MOVED": all_in_all - before_moved,
            "seconds": round(end - begin, 1),
        }
        check_all_there(store, keys)
        assert store.stats().redirects == all_in_all
        for slot in slots:  # back again, for the other tests' sake
            begin_to_move(slot, target, source)
            move_keys(slot, target, source, 2 * each, 0)
            end_to_move(slot, target, source, [third])
        check_all_there(store, keys)


def no_redirects_for(seconds: float, store: RedisStore) -> Callable[[], bool]:
    """Whether nothing was redirected for so long."""
    last = [store.stats().redirects, time.monotonic()]

    def quiet() -> bool:
        now = store.stats().redirects
        if now != last[0]:
            last[:] = now, time.monotonic()
        return time.monotonic() - last[1] > seconds

    return quiet


def test_a_node_comes_and_goes(book: Book, cluster: RedisCluster) -> None:
    with (
        book(
            24,
            "node added and removed",
            injected="a fourth master gets 3 slots, gives them back, is forgotten and killed, under load",
            expected="no misses; it is a node of the store for as long as it has slots",
        ) as row,
        RedisServer(*node_options(2000), *EMPTY_STAYS_MASTER, bus=True) as newcomer,
        RedisStore(cluster.url, deadline_s=D) as store,
    ):
        source, *others = masters(cluster)
        at = owners(cluster, TAGS)
        tags = [tag for tag in TAGS if at[tag] == source][:3]
        slots = [key_slot(name_of(tag)) for tag in tags]
        keys = [*KEYS[:150], *(tag + b"%d" % i for tag in tags for i in range(5))]
        owner = prepared(cluster, store, keys)
        new = newcomer.port
        bus = client_at(new).config_get("cluster-port")["cluster-port"]
        client_at(source).execute_command("CLUSTER MEET", "127.0.0.1", new, bus)
        known = lambda: [len(client_at(n.port).execute_command("CLUSTER NODES")) for n in (*cluster.nodes, newcomer)]  # noqa: E731
        wait_for(lambda: known() == [7] * 7)
        wait_for(lambda: client_at(new).execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        with Load(store, owner) as load:
            for slot in slots:
                begin_to_move(slot, source, new)
                move_keys(slot, source, new, 10)
                end_to_move(slot, source, new, others)
            wait_for(lambda: new in nodes_by_port(store))
            wait_for(no_redirects_for(0.7, store))
            assert calls_of(client_at(new), "get")["calls"] > 0
            assert [server_of(store, tag) for tag in tags] == [new] * 3
            for slot in slots:
                begin_to_move(slot, new, source)
                move_keys(slot, new, source, 10)
                end_to_move(slot, new, source, others)
            wait_for(lambda: new not in nodes_by_port(store))
            name = id_of(new)
            for node in cluster.nodes:
                client_at(node.port).execute_command("CLUSTER FORGET", name)
            newcomer.kill()
            time.sleep(0.5)
            load.wait_until_served()
        load.check()
        served = load.check_undisturbed(load.shards)
        assert not any(load.opened.values())
        row.seen = {"served": served, "misses": dict(store.stats().misses), "redirects": store.stats().redirects}
        check_all_there(store, keys)


# --- 25: no command has keys of two slots ----------------------------------------------------------
def test_batches_are_divided_among_slots(book: Book, cluster: RedisCluster) -> None:
    with (
        book(
            25,
            "CROSSSLOT",
            injected="batches of random keys over all slots, through every call",
            expected="no error; no command with several keys",
        ) as row,
        RedisStore(cluster.url, ttl_s=100, deadline_s=PATIENT_S) as store,
        contextlib.ExitStack() as stack,
    ):
        chance = random.Random(25)
        keys = [chance.randbytes(16).hex().encode() for _ in range(1500)]
        assert len({key_slot(name_of(key)) for key in keys}) > 1000
        clients = [client_at(port) for port in masters(cluster)]
        for client in clients:
            client.config_resetstat()
        heard = [stack.enter_context(monitored(node_at(cluster.nodes, port))) for port in masters(cluster)]
        fill(store, keys, SIZE)
        assert all(ask(store, keys, SIZE))
        out = [memoryview(bytearray(SIZE)) for _ in keys]
        assert store.get_many(keys, out) == [value_of(key) for key in keys]
        assert store.probe(keys) == len(keys) and all(store.touch_many(keys))
        assert store.health().ok
        assert store.delete_many(keys) == len(keys)
        assert store.probe(keys) == 0 and not any(store.touch_many(keys)) and not any(ask(store, keys, SIZE))
        stack.close()  # what was heard is complete
        commands = [line.split(" ") for lines in heard for line in lines]
        keyed = [words for words in commands if words[0].upper() in ("GET", "SET", "DEL", "EXISTS", "PEXPIRE")]
        assert len(keyed) > 10 * len(keys)
        others = {words[0].upper() for words in commands} - {words[0].upper() for words in keyed}
        assert others <= {"INFO", "CLUSTER", "ASKING", "PING", "REPLCONF", "CLIENT"}
        assert all(len(words) == 2 for words in keyed if words[0].upper() in ("GET", "DEL", "EXISTS"))
        stats = [client.info("commandstats") for client in clients]
        many = {name for each in stats for name in each} & {f"cmdstat_{n}" for n in ("mget", "mset", "unlink", "eval")}
        failed = sum(facts["failed_calls"] + facts["rejected_calls"] for each in stats for facts in each.values())
        assert not many and failed == 0
        assert sum(calls_of(client, "set")["calls"] for client in clients) == len(keys) + 3  # and health's
        seen = store.stats()
        assert not seen.faults and not seen.drops and set(seen.misses) == {"absent"} and not seen.redirects
        row.seen = {"keys": len(keys), "commands": len(keyed), "errors": failed}


# --- 20, 22: Sentinel ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def groups() -> Iterator[list[RedisSentinel]]:
    """The group that is in use, if any; use `group`."""
    with contextlib.ExitStack() as stack:
        used: list[RedisSentinel] = []
        yield used
        for each in used:
            stack.push(each)


@pytest.fixture
def group(groups: list[RedisSentinel]) -> RedisSentinel:
    """A master with two replicas, all in sync, and three sentinels. A test may kill nodes, and hang anything."""
    if not groups:
        groups.append(RedisSentinel().__enter__())
    made = groups[0]
    awake([*made.nodes, *made.sentinels])
    agreed = lambda: {int(ask_sentinel(s, "GET-MASTER-ADDR-BY-NAME")[1]) for s in made.sentinels}  # noqa: E731
    wait_for(lambda: len(agreed()) == 1, 60)
    (master,) = agreed()
    for node in made.nodes:  # what the sentinels would do too, after eight seconds
        client = client_at(node.port)
        told = client.info("replication")
        if node.port != master and (told["role"] == "master" or told["master_port"] != master):
            client.replicaof("127.0.0.1", master)
    made.wait_until_ok()
    client_at(master).flushall()
    return made


def ask_sentinel(sentinel: RedisServer, question: str) -> Any:
    return client_at(sentinel.port).execute_command("SENTINEL " + question, NAME)


def prepared_group(group: RedisSentinel, store: RedisStore) -> RedisServer:
    put_all(store, KEYS)
    replicated([group.master.port])
    return group.master


ALL_IN_ONE = dict.fromkeys(KEYS, 0)


@pytest.mark.slow
def test_sentinel_hands_over_to_a_replica(book: Book, group: RedisSentinel) -> None:
    """The old master lives on. For some eight seconds it still takes writes, which are then lost; then none."""
    with (
        book(
            20,
            "Sentinel failover by hand",
            injected="SENTINEL FAILOVER under load; the old master becomes a replica",
            expected="readonly or conn for a moment; writes go to the new master",
        ) as row,
        RedisStore(group.url, deadline_s=D) as store,
    ):
        old = prepared_group(group, store)
        with Load(store, ALL_IN_ONE) as load:
            at = time.monotonic()
            ask_sentinel(group.sentinels[0], "FAILOVER")
            wait_for(lambda: int(ask_sentinel(group.sentinels[0], "GET-MASTER-ADDR-BY-NAME")[1]) != old.port)
            named = time.monotonic()
            wait_for(lambda: client_at(old.port).info("replication")["role"] == "slave")
            demoted = time.monotonic()
            wait_for(lambda: server_of(store, KEYS[0]) != old.port)
            recovered = recovery(load, 0, demoted)
            found = time.monotonic()
            time.sleep(1.0)
        load.check()
        load.check_undisturbed([0], found + D)
        stats = store.stats()
        assert set(stats.misses) <= {"conn", "loading", "breaker", "timeout", "absent"}
        assert set(stats.drops) <= {"readonly", "conn", "loading", "breaker", "timeout"}
        assert set(stats.faults) & {"conn", "readonly"}, "the switch was not noticed"
        row.seen = {
            **{f"{name}, after it was demoted": seconds for name, seconds in recovered.items()},
            "new master named after s": round(named - at, 2),
            "old one demoted after s": round(demoted - at, 2),
            "misses": dict(stats.misses),
            "drops": dict(stats.drops),
            "faults": dict(stats.faults),
        }
        group.wait_until_ok()
        check_all_there(store)
        assert server_of(store, KEYS[0]) == group.master.port != old.port


def test_a_store_that_still_writes_to_a_replica(book: Book, group: RedisSentinel, cluster: RedisCluster) -> None:
    """Both maps are wrong: Sentinel's replica says READONLY, the cluster's says MOVED."""
    with (
        book(
            20,
            "a replica taken for the master",
            injected="a map that is wrong: put, get and put again",
            expected="Sentinel: readonly once, then the master; cluster: MOVED at once",
        ) as row,
        RedisStore(group.url, deadline_s=PATIENT_S) as watched,
        RedisStore(cluster.url, deadline_s=PATIENT_S) as sharded,
    ):
        prepared_group(group, watched)
        prepared(cluster, sharded)
        node = next(node for node in group.nodes if node is not group.master)
        time.sleep(0.5)  # the last question is so old that a hint leads to another
        watched._topology._shard = Shard(watched._topology._node("127.0.0.1", node.port))  # type: ignore[attr-defined]
        assert all(ask(watched, KEYS, SIZE))
        assert watched.put_many(KEYS[:10], [value_of(key) for key in KEYS[:10]]) == 0
        assert watched.put_many(KEYS[:10], [value_of(key) for key in KEYS[:10]]) == 10
        seen = dict(watched.stats().drops)
        assert seen == {"readonly": 10} and watched.stats().faults == Counter(readonly=1)
        before = sharded.stats()
        for shard in sharded._topology.shards():
            wrong = Shard(shard.replicas[0])
            slots = sharded._topology._slots  # type: ignore[attr-defined]
            slots[:] = [wrong if at is shard else at for at in slots]
        fill(sharded, KEYS, SIZE)
        assert all(ask(sharded, KEYS, SIZE))
        redirects = sharded.stats().redirects - before.redirects
        assert redirects and not sharded.stats().drops and not sharded.stats().misses
        row.seen = {"Sentinel, drops": seen, "cluster, redirects": redirects}


@pytest.mark.parametrize("how", ["kill -9", "SIGSTOP, one sentinel hung"])
@pytest.mark.slow
def test_sentinel_replaces_a_dead_master(book: Book, group: RedisSentinel, how: str) -> None:
    with (
        book(
            22,
            f"Sentinel failover, {how}",
            injected=f"{how} under load; down-after 1 s, two of three sentinels must agree",
            expected="misses until a replica is the master; no wrong value when the old master comes back",
        ) as row,
        RedisStore(group.url, deadline_s=D) as store,
    ):
        old = prepared_group(group, store)
        with Load(store, ALL_IN_ONE) as load:
            if how == "kill -9":
                at = time.monotonic()
                old.kill()
            else:
                group.sentinels[2].stop()
                at = time.monotonic()
                old.stop()
            recovered = recovery(load, 0, at)
            up = time.monotonic()
            time.sleep(0.5)
            well = time.monotonic()
            assert server_of(store, KEYS[0]) != old.port
            awake([old, group.sentinels[2]])
            time.sleep(1.0)  # the old one still takes itself for the master
        load.check()
        load.check_undisturbed([0], well)
        missed = load.bad("get", [0], at, up)
        assert missed and set(missed) <= {"conn", "breaker", "timeout", "loading"}
        row.seen = {**recovered, "misses": missed, **load.slow(at, up)}
        check_all_there(store)
        assert server_of(store, KEYS[0]) == group.master.port != old.port


def test_replicas_of_a_sentinels_master_serve_reads(book: Book, group: RedisSentinel) -> None:
    with (
        book(
            31,
            "read replicas: Sentinel",
            injected="kill -9 of one of two replicas under load",
            expected="replicas serve the reads; a few misses until a breaker opens, then the other one serves",
        ) as row,
        RedisStore(group.url, ttl_s=100, deadline_s=D, read_replicas=True) as store,
    ):
        master = prepared_group(group, store)
        assert all(ask(store, KEYS, SIZE))
        victim, other = (node for node in group.nodes if node is not master)
        before, gets = gets_of(master.port), gets_of(other.port)
        with Load(store, ALL_IN_ONE) as load:
            at = time.monotonic()
            victim.kill()
            wait_for(lambda: victim.port not in nodes_by_port(store))
            gone = time.monotonic()
            time.sleep(1.0)
            load.wait_until_served()
        load.check()
        load.check_undisturbed([0], gone + D)
        missed, hits = load.bad("get", [0], at), load.good("get", [0], at)
        assert set(missed) <= {"conn", "breaker"} and hits > sum(missed.values())
        assert gets_of(other.port) > gets
        row.seen = {"misses": missed, "hits": hits, "GETs of the master": gets_of(master.port) - before}
        check_all_there(store)


@pytest.mark.slow
def test_sentinels_die_one_by_one(book: Book, groups: list[RedisSentinel], group: RedisSentinel) -> None:
    ahead = [0.0]
    with (
        book(
            22,
            "Sentinel failover, one sentinel dead",
            injected="kill -9 of a sentinel, then of the master, under load",
            expected="the other two replace it",
        ) as row,
        book(
            22,
            "all sentinels dead",
            injected="SIGSTOP, then kill -9 of all sentinels while the master lives; each time the map is due again",
            expected="everything goes on hitting; a new store finds nobody: conn",
        ) as last,
        RedisStore(group.url, deadline_s=D, clock=lambda: time.monotonic() + ahead[0]) as store,
        RedisStore(group.url, deadline_s=D) as late,
    ):
        old = prepared_group(group, store)
        groups.clear()  # a sentinel that died knows nothing when it starts again
        with contextlib.ExitStack() as stack, Load(store, ALL_IN_ONE) as load:
            stack.push(group)
            group.sentinels[2].kill()  # one that hung before does nothing for half a minute: Sentinel's TILT
            at = time.monotonic()
            old.kill()
            recovered = recovery(load, 0, at)
            time.sleep(1.0)
            missed = load.bad("get", [0], at)
            row.seen = {**recovered, "misses": missed}
            dead = time.monotonic()
            for how in (RedisServer.stop, RedisServer.kill):
                for sentinel in group.sentinels:
                    how(sentinel)
                ahead[0] += 61.0  # the map is a minute old
                time.sleep(1.2)
                load.wait_until_served()
            asked = store.stats().faults
            assert ask(late, KEYS, SIZE) == [False] * len(KEYS)
            assert not late.health().ok
            load.wait_until_served()
            end = time.monotonic()
            load.__exit__(None, None, None)
            load.check()
            served = load.check_undisturbed([0], dead, end)
            assert store.stats().faults == asked and store._topology._breaker.faults  # type: ignore[attr-defined]
            assert set(late.stats().misses) == {"conn"}
            last.seen = {"served": served, "misses": {}, "a new store's misses": dict(late.stats().misses)}
            last.seen |= load.slow(dead, end)


# --- 17: one shard is full -------------------------------------------------------------------------
def test_one_shard_is_full(book: Book, cluster: RedisCluster) -> None:
    with (
        book(
            17,
            "one shard full",
            injected="maxmemory reached on one master of three, noeviction, under load",
            expected="drops of its keys: oom, then its write breaker; all reads hit; other shards store",
        ) as row,
        RedisStore(cluster.url, deadline_s=D) as store,
    ):
        owner = prepared(cluster, store)
        full, *others = masters(cluster)
        with Load(store, owner) as load:
            at = time.monotonic()
            client_at(full).config_set("maxmemory", 1)
            wait_for(lambda: nodes_by_port(store)[full].write_breaker.state == "open")
            time.sleep(1.0)
            load.wait_until_served(others)
            end = time.monotonic()
            client_at(full).config_set("maxmemory", 0)
            load.wait_until_served()
        load.check()
        served = load.check_undisturbed(others)
        assert load.good("get", [full], at, end) and not load.bad("get", [full])
        stats = store.stats()
        assert set(stats.drops) == {"oom", "breaker"} and not stats.misses
        assert {name for name, times in load.opened.items() if times} == {f"writes {full}"}
        row.seen = {"drops": dict(stats.drops), "misses": {}, "other shards served": served}
        check_all_there(store)


# --- 26: passwords and rights ----------------------------------------------------------------------
def set_user(ports: Iterable[int], *rules: str) -> None:
    for port in ports:
        client_at(port).execute_command("ACL", "SETUSER", "kvlab", *rules)


def make_user(cluster: RedisCluster, without: str = "") -> str:
    """The store's user on every node, with one right less if it is named; the URL to log in with."""
    rights = [f"+{name}" for name in RIGHTS if name != without]
    set_user([node.port for node in cluster.nodes], "reset", "on", ">old", "~kv:*", "resetchannels", *rights)
    return login(cluster, "old")


def login(cluster: RedisCluster, password: str) -> str:
    return cluster.url.replace("://", f"://kvlab:{password}@")


def denied(cluster: RedisCluster) -> list[str]:
    """What any node has refused the user."""
    lines = [line for node in cluster.nodes for line in client_at(node.port).acl_log()]
    return sorted({str(line["object"]) for line in lines})


def forget_denied(cluster: RedisCluster) -> None:
    for node in cluster.nodes:
        client_at(node.port).acl_log_reset()


def test_passwords_are_rotated_with_two_valid_ones(book: Book, cluster: RedisCluster) -> None:
    ports = [node.port for node in cluster.nodes]
    url = make_user(cluster)
    with (
        book(
            26,
            "password rotation, cluster",
            injected="new password beside the old on all nodes, workers restarted, old one removed, under load",
            expected="0 misses, 0 drops",
        ) as row,
        RedisStore(url, deadline_s=D) as before,
        RedisStore(login(cluster, "new"), deadline_s=D) as after,
    ):
        owner = prepared(cluster, before)
        with Load(before, owner, threads=2) as old_load:
            set_user(ports, ">new")
            with Load(after, owner, threads=2) as new_load:
                old_load.wait_until_served()
                old_load.__exit__(None, None, None)
                set_user(ports, "<old")
                new_load.wait_until_served()
        for load in (old_load, new_load):
            load.check()
            load.check_undisturbed(load.shards)
        served = [load.good("", load.shards) for load in (old_load, new_load)]
        faults = before.stats().faults + after.stats().faults
        assert set(faults) <= {"timeout"}
        row.seen = {"served with the old": served[0], "with the new": served[1], "misses": {}, "drops": {}}
        check_all_there(after)
        with RedisStore(url, deadline_s=PATIENT_S) as late:
            assert not late.health().ok and late.health().detail.count("auth")
            assert ask(late, KEYS[:3], SIZE) == [False] * 3 and late.stats().misses == Counter(auth=3)


def test_a_password_changed_on_one_node(book: Book, cluster: RedisCluster) -> None:
    url = make_user(cluster)
    with (
        book(
            26,
            "password changed on one node",
            injected="ACL SETUSER and CLIENT KILL on one master of three, under load",
            expected="its keys miss: auth, then breaker; other shards miss nothing",
        ) as row,
        RedisStore(url, deadline_s=D) as store,
    ):
        owner = prepared(cluster, store)
        victim, *others = masters(cluster)
        with Load(store, owner) as load:
            at = time.monotonic()
            set_user([victim], "resetpass", ">other")
            client_at(victim).client_kill_filter(_type="normal", skipme=True)
            wait_for(lambda: nodes_by_port(store)[victim].breaker.state == "open")
            time.sleep(1.0)
            assert not store.health().ok and f"127.0.0.1:{victim}: auth" in store.health().detail
            end = time.monotonic()
            set_user([victim], "resetpass", ">old")
            load.wait_until_served()
        load.check()
        served = load.check_undisturbed(others)
        missed = load.bad("get", [victim], at)
        assert missed and set(missed) <= {"auth", "breaker", "conn"} and store.stats().faults["auth"] >= 3
        assert {port for port, times in load.opened.items() if times} <= {victim, f"writes {victim}"}
        faults = dict(store.stats().faults)
        row.seen = {"misses": missed, "faults": faults, "other shards served": served, "seconds": round(end - at, 1)}
        check_all_there(store)


@pytest.mark.parametrize("read_replicas", [False, True])
def test_the_documented_rights_are_enough(book: Book, cluster: RedisCluster, read_replicas: bool) -> None:
    url = make_user(cluster)
    with (
        book(
            26,
            f"rights of a cluster's user{', read replicas' if read_replicas else ''}",
            injected=f"ACL with no more than {' '.join(f'+{right}' for right in RIGHTS)}",
            expected="nothing is refused, in ASK and health neither",
        ) as row,
        RedisStore(url, ttl_s=100, deadline_s=PATIENT_S, read_replicas=read_replicas) as store,
    ):
        forget_denied(cluster)
        prepared(cluster, store)
        check_all_there(store)
        source, target, *_ = masters(cluster)
        with one_slot_moving(store, cluster, source, target) as (here, gone):
            forget_denied(cluster)
            with patient(store):
                # A replica does not know that a slot moves: what has gone is a miss there.
                assert ask(store, [here, gone], SIZE) == [True, not read_replicas]
                fill(store, [here, gone], SIZE)
                assert store.probe([here]) == 1 and all(store.touch_many([here, gone]))
                assert store.delete_many([here, gone]) == 2
        assert denied(cluster) == [] and not store.stats().faults
        row.seen = {"refused": 0, "redirects": store.stats().redirects}


@contextlib.contextmanager
def one_slot_moving(
    store: RedisStore, cluster: RedisCluster, source: int, target: int
) -> Iterator[tuple[bytes, bytes]]:
    """A slot of two keys, of which the first is still there and the second has gone."""
    at = owners(cluster, TAGS)
    tag = next(tag for tag in TAGS if at[tag] == source)
    here, gone, slot = tag + b"here", tag + b"gone", key_slot(name_of(tag))
    put_all(store, [here, gone])
    begin_to_move(slot, source, target)
    client_at(source).execute_command("MIGRATE", "127.0.0.1", target, name_of(gone), 0, 5000)
    replicated([source, target])
    try:
        yield here, gone
    finally:
        client_at(source).execute_command("MIGRATE", "127.0.0.1", target, name_of(here), 0, 5000)
        third = set(masters(cluster)) - {source, target}
        for giver, taker in ((source, target), (target, source)):  # there and back: a slot that stays half open is none
            if giver == target:
                begin_to_move(slot, giver, taker)
                move_keys(slot, giver, taker, 10, 0)
            end_to_move(slot, giver, taker, third)


@pytest.mark.parametrize("right", ["cluster|slots", "asking", "readonly"])
def test_a_right_that_only_clusters_need_is_missing(book: Book, cluster: RedisCluster, right: str) -> None:
    with RedisStore(cluster.url, deadline_s=PATIENT_S) as other:
        prepared(cluster, other)
        source, target, *_ = masters(cluster)
        url = make_user(cluster, without=right)
        forget_denied(cluster)
        with (
            book(26, f"no right to {right.upper()}", injected=f"ACL without +{right}", expected="auth") as row,
            RedisStore(url, deadline_s=PATIENT_S, read_replicas=right == "readonly") as store,
            one_slot_moving(other, cluster, source, target) as (here, gone),
        ):
            keys = [here, gone] if right == "asking" else [here, KEYS[0]]
            found = ask(store, keys, SIZE)
            health = store.health()
            row.seen = {"health": health.detail.partition(": ")[2], "misses": dict(store.stats().misses)}
            assert found == [right == "asking", False]
            assert right in denied(cluster)
            # Without +asking this is "moved" as long as `Pool.exchange` takes no notice of what ASKING was answered.
            assert store.stats().misses == Counter(auth=found.count(False))
            if right != "asking":
                assert not health.ok and "auth" in health.detail and right in health.detail
            assert all(node.breaker.state == "closed" for node in store.nodes)


# --- 20, 31: reading from replicas -----------------------------------------------------------------
def gets_of(port: int) -> int:
    return calls_of(client_at(port), "get")["calls"]


def test_replicas_serve_reads_and_masters_renew(book: Book, cluster: RedisCluster) -> None:
    with (
        book(
            31,
            "read replicas: who serves",
            injected="read_replicas=True, all is well",
            expected="replicas serve all reads; masters renew the TTL",
        ) as row,
        RedisStore(cluster.url, ttl_s=100, deadline_s=PATIENT_S, read_replicas=True) as store,
    ):
        owner = prepared(cluster, store)
        shards = masters(cluster)
        before = {port: gets_of(port) for node in cluster.nodes for port in [node.port]}
        for key, port in owner.items():
            client_at(port).pexpire(name_of(key), 50_000)
        for _ in range(10):
            assert all(ask(store, KEYS, SIZE))
        assert store.probe(KEYS) == len(KEYS)
        by_masters = sum(gets_of(port) - before[port] for port in shards)
        by_replicas = sum(gets_of(port) - before[port] for port in before if port not in shards)
        assert (by_masters, by_replicas) == (0, 10 * len(KEYS))
        assert all(client_at(port).pttl(name_of(key)) > 90_000 for key, port in owner.items())
        assert not store.stats().faults and not store.stats().redirects
        row.seen = {"GETs of masters": by_masters, "GETs of replicas": by_replicas}
        check_all_there(store)


@pytest.mark.slow
def test_replicas_serve_reads_while_their_master_is_dead(book: Book, cluster: RedisCluster) -> None:
    settings = [("yes", "no"), ("yes", "yes"), ("no", "no"), ("no", "yes")]
    with (
        book(
            31,
            "read replicas: master killed",
            injected="kill -9 of a master, its replica kept from taking over; under load",
            expected="its keys go on hitting, unless all slots must be covered and reads are not allowed when down",
        ) as row,
        RedisStore(cluster.url, ttl_s=1000, deadline_s=D, read_replicas=True) as store,
    ):
        owner = prepared(cluster, store)
        assert all(ask(store, KEYS, SIZE))
        victim = cluster.master_of(name_of(KEYS[0]))
        (replica,) = masters(cluster)[victim.port]
        others = set(owner.values()) - {victim.port}
        client_at(replica).config_set("cluster-replica-no-failover", "yes")
        alive = [node.port for node in cluster.nodes if node is not victim]
        seen = {}
        for port in alive:
            client_at(port).config_set("cluster-require-full-coverage", "yes")
        with Load(store, owner) as load:
            at = time.monotonic()
            victim.kill()
            wait_for(lambda: load.bad("put", [victim.port], at))
            time.sleep(1.0)
            seen["first second, whatever is set"] = shares(load, victim.port, others, at, at + 1.0)
            for coverage, allow in settings:
                for port in alive:
                    client_at(port).config_set("cluster-require-full-coverage", coverage)
                    client_at(port).config_set("cluster-allow-reads-when-down", allow)
                expected = {"fail"} if coverage == "yes" else {"ok"}
                wait_for(lambda expected=expected: {state_of(port) for port in alive} == expected)
                time.sleep(0.5)
                begin = time.monotonic()
                time.sleep(1.0)
                name = f"full coverage {coverage}, reads when down {allow}"
                seen[name] = shares(load, victim.port, others, begin, time.monotonic())
            client_at(replica).config_set("cluster-replica-no-failover", "no")
            promoted = time.monotonic()
            recovered = recovery(load, victim.port, promoted)
        load.check()
        row.seen = {"share of hits, of its keys and of others": seen, **recovered}
        for name, (its, of_others) in seen.items():
            if "coverage yes, reads when down no" in name:
                assert its == 0.0 and of_others == 0.0
            else:
                assert its > 0.99 and of_others > 0.99, (name, load.bad("get", load.shards))
        heal(cluster)
        check_all_there(store)


def shares(load: Load, victim: int, others: Iterable[int], since: float, until: float) -> tuple[float, float]:
    """What part of the keys that were asked for was hit, the victim's and the others'."""

    def share(shards: Iterable[int]) -> float:
        good, bad = load.good("get", shards, since, until), load.bad("get", shards, since, until)
        return round(good / (good + sum(bad.values())), 4)

    return share([victim]), share(list(others))


def state_of(port: int) -> str:
    return str(client_at(port).execute_command("CLUSTER INFO")["cluster_state"])


def is_failed(port: int, other: int) -> bool:
    """Whether a node has been told that another has failed."""
    nodes = client_at(port).execute_command("CLUSTER NODES")
    return any("fail" in facts["flags"].split(",") for at, facts in nodes.items() if at.endswith(f":{other}"))


@pytest.mark.slow
def test_masters_serve_reads_while_a_replica_is_dead(book: Book, cluster: RedisCluster) -> None:
    with (
        book(
            31,
            "read replicas: replica killed",
            injected="kill -9 of a replica under load",
            expected="a few misses until its breaker opens, then the master serves",
        ) as row,
        RedisStore(cluster.url, deadline_s=D, read_replicas=True) as store,
    ):
        owner = prepared(cluster, store)
        assert all(ask(store, KEYS, SIZE))
        (shard, (replica,)), *rest = masters(cluster).items()
        others = [port for port, _ in rest]
        with Load(store, owner) as load:
            at = time.monotonic()
            node_at(cluster.nodes, replica).kill()
            wait_for(lambda: load.first("get", shard, at) is not None)
            first = load.first("get", shard, at)
            wait_for(lambda: all(is_failed(port, replica) for port in (shard, *others)))
            wait_for(lambda: replica not in nodes_by_port(store))
            gone = time.monotonic()
            gets = gets_of(shard)
            load.wait_until_served()
            assert gets_of(shard) > gets
            time.sleep(0.5)
            end = time.monotonic()
            node_at(cluster.nodes, replica).start()
            heal(cluster)
        load.check()
        served = load.check_undisturbed(others, at, end)
        load.check_undisturbed(load.shards, gone + D, end)
        missed = load.bad("get", [shard], at, gone)
        hits = load.good("get", [shard], at, gone)
        assert store.stats().faults["conn"] and set(missed) <= {"conn", "breaker"}
        assert hits > sum(missed.values())
        row.seen = {
            "first hit after s": round(first or 0.0, 2),
            "misses until the cluster has dropped it": missed,
            "hits meanwhile": hits,
            "seconds": round(gone - at, 1),
            "other shards served": served,
        }
        check_all_there(store)


def test_a_replica_that_lags_has_misses_and_nothing_wrong(book: Book, cluster: RedisCluster) -> None:
    with (
        book(
            31,
            "read replicas: replica lags",
            injected="replication of one shard held while keys are written and removed",
            expected="what it has not got is a miss; what it still has is the identical value",
        ) as row,
        RedisStore(cluster.url, deadline_s=PATIENT_S, read_replicas=True) as store,
    ):
        fresh = [b"fresh %d" % i for i in range(60)]
        owner = prepared(cluster, store)
        shard, (replica,) = next(iter(masters(cluster).items()))
        at = owners(cluster, fresh)
        late = [key for key in fresh if at[key] == shard]
        removed = [key for key in KEYS if owner[key] == shard][:10]
        client = client_at(replica)
        client.config_set("masteruser", "nobody")  # it cannot log in again
        client.config_set("masterauth", "wrong")
        client.client_kill_filter(_type="master")
        wait_for(lambda: client.info("replication")["master_link_status"] == "down")
        fill(store, [*fresh, *KEYS], SIZE)  # the same values as before
        replicated(port for port in masters(cluster) if port != shard)
        assert store.delete_many(removed) == len(removed)
        assert ask(store, fresh, SIZE) == [at[key] != shard for key in fresh]
        assert store.stats().misses == Counter(absent=len(late))
        assert all(ask(store, KEYS, SIZE)), "the replica still has what was removed"
        hits = store.stats().hits
        client.config_set("masteruser", "")
        client.config_set("masterauth", "")
        wait_for(lambda: client.info("replication")["master_link_status"] == "up")
        wait_for(lambda: all(ask(store, fresh, SIZE)))
        assert ask(store, removed, SIZE) == [False] * len(removed)
        assert set(store.stats().misses) == {"absent"} and not store.stats().faults
        row.seen = {"misses while it lagged": len(late), "old values, identical": len(removed), "hits": hits}
        fill(store, removed, SIZE)
        replicated([shard])
        check_all_there(store)


# --- 4: the worker stands still --------------------------------------------------------------------
def test_a_worker_of_a_cluster_that_stands_still(book: Book, cluster: RedisCluster) -> None:
    """Parts of a batch that had not begun when it stopped begin late, and are answered."""
    stops, threads = 10, 2
    with (
        book(
            4,
            "the worker stands still, cluster",
            injected=f"{stops} times no thread of it runs for two deadlines, while {threads} read; the nodes are well",
            expected="the answers have come, and are taken; the breakers stay closed",
        ) as row,
        RedisStore(cluster.url) as store,
    ):
        row.seen, row.added_ms = read_while_standing_still(store, stops, threads)
        assert all(node.breaker.state == "closed" for node in store.nodes)


# --- a whole request -------------------------------------------------------------------------------
@pytest.mark.slow
def test_no_state_of_a_cluster_changes_a_token(book: Book, cluster: RedisCluster) -> None:
    model, size = build_model(), 16
    chance = random.Random(4)
    prompts = [chance.choices(range(97), k=12 * size) for _ in range(6)]
    plain = [generate(model, prompt, 8, stop_at_eos=False).tokens for prompt in prompts]
    with (
        book(
            22,
            "a hung shard under an engine",
            injected="SIGSTOP of a master between requests, until its replica has taken over",
            expected="the same tokens; the blocks before the first lost one are used, none behind it",
        ) as row,
        RedisStore(cluster.url, deadline_s=D) as store,
        DistributedKVCache(precision="fp32", store=store, model=model, block_tokens=size) as cache,
    ):

        def answer() -> list[int]:
            """How many tokens the cache gave for each prompt; what was said is what is always said."""
            said = [generate(model, prompt, 8, cache, stop_at_eos=False) for prompt in prompts]
            assert [each.tokens for each in said] == plain
            cache.stats().check()
            store.stats().check()
            return [each.cached_tokens for each in said]

        whole = 12 * size - 1  # the last token is always computed
        with patient(store):
            assert answer() == [0] * len(prompts)
            assert answer() == [whole] * len(prompts)
        replicated(masters(cluster))
        chains = [cache._namespace.keys(prompt) for prompt in prompts]  # type: ignore[union-attr]
        owner = owners(cluster, [key for chain in chains for key in chain])
        victim = next(iter(masters(cluster)))
        lost = [next((i for i, key in enumerate(chain) if owner[key] == victim), 12) for chain in chains]
        assert any(0 < n < 12 for n in lost)
        (replica,) = masters(cluster)[victim]
        client_at(replica).config_set("cluster-replica-no-failover", "yes")
        node_at(cluster.nodes, victim).stop()
        hung = answer()
        before_failover = store.stats()
        begin = time.monotonic()
        client_at(replica).config_set("cluster-replica-no-failover", "no")
        wait_for(lambda: slots_moved_away(cluster, victim))
        with patient(store):
            wait_for(lambda: answer() == [whole] * len(prompts))
        took = time.monotonic() - begin
        node_at(cluster.nodes, victim).cont()
        heal(cluster)
        with patient(store):
            wait_for(lambda: answer() == [whole] * len(prompts))
        for n, block in zip(hung, lost, strict=True):
            assert n <= min(block * size, whole), "used what lies behind a lost block"
            assert n % size == 0 or n == whole
        assert before_failover.faults["timeout"] and before_failover.hits
        row.seen = {
            "cached tokens while it hung": hung,
            "what lies before the first lost block": [n * size for n in lost],
            "faults": dict(before_failover.faults),
            "all cached again after s": round(took, 1),
        }


def slots_moved_away(cluster: RedisCluster, victim: int) -> bool:
    alive = [node.port for node in cluster.nodes if node.port != victim]
    return all(victim not in servers_of(slots_seen_by(port)) for port in alive)


# --- 33: fork --------------------------------------------------------------------------------------
@forks
def test_parent_and_child_of_a_fork_share_nothing_of_a_cluster(book: Book, cluster: RedisCluster) -> None:
    with (
        book(
            33,
            "fork, cluster",
            injected="os.fork after connections and threads to every node exist; both read at once",
            expected="both read right, the child with threads and connections of its own",
        ) as row,
        RedisStore(cluster.url, deadline_s=PATIENT_S, max_connections=4) as store,
    ):
        fill(store, KEYS, SIZE)
        threads = {thread.name for thread in threading.enumerate()}
        assert any(name.startswith("kvlab 127.0.0.1:") for name in threads)

        def read() -> list[int]:
            before = store.stats()
            for _ in range(20):
                assert all(ask(store, KEYS, SIZE))
            fill(store, KEYS[:50], SIZE)
            own = sum(thread.name.startswith("kvlab 127.0.0.1:") for thread in threading.enumerate())
            return [store.stats().hits - before.hits, store.stats().misses.total(), own]

        def read_in_threads() -> list[int]:
            first, got = read(), list[list[int]]()
            more = [threading.Thread(target=lambda: got.append([sum(ask(store, KEYS, SIZE))])) for _ in range(4)]
            for thread in more:
                thread.start()
            for thread in more:
                thread.join()
            assert got == [[len(KEYS)]] * 4
            return first

        said: list[Any] = []
        said.append(in_child(read_in_threads, lambda: said.append(read())))
        assert [each[:2] for each in said] == [[20 * len(KEYS), 0]] * 2
        assert all(each[2] >= 2 for each in said)
        row.seen = {"hits of each": 20 * len(KEYS), "misses": 0}
        check_all_there(store)


# --- 29: interrupts --------------------------------------------------------------------------------
@pytest.mark.parametrize("which", ["the caller's own part", "another's part"])
@pytest.mark.parametrize("kind", [Interrupt, Alarm])
def test_an_alarm_in_the_middle_of_a_get_from_many(
    book: Book, cluster: RedisCluster, kind: type[BaseException], which: str
) -> None:
    """The first shard of a batch is asked in the caller's thread: an `Alarm` there is a fault of that shard."""
    with (
        book(
            29,
            f"interrupt, cluster: {kind.__name__} while {which} hangs",
            injected="SIGALRM raises while a node hangs; its answer comes afterwards",
            expected="no buffer changes after the call; later calls are right",
        ) as row,
        RedisStore(cluster.url, deadline_s=PATIENT_S) as store,
    ):
        owner = prepared(cluster, store)
        assert all(ask(store, KEYS, SIZE))
        store._deadline_s = 1.0
        first = owner[KEYS[0]]
        hangs = first if which == "the caller's own part" else next(p for p in owner.values() if p != first)
        out = [memoryview(bytearray(b"\xee" * SIZE)) for _ in KEYS]
        before = store.stats()
        node_at(cluster.nodes, hangs).stop()
        got, raised = None, False
        with alarm(kind, 0.2):
            try:
                got = store.get_many(KEYS, out)
            except kind:
                raised = True
        left = [bytes(buffer) for buffer in out]
        node_at(cluster.nodes, hangs).cont()
        time.sleep(0.5)
        assert [bytes(buffer) for buffer in out] == left, "written to after the call"
        assert raised == (kind is Interrupt or which == "another's part")
        allowed = lambda key: (bytes([0xEE]) * SIZE, value_of(key))  # noqa: E731
        assert all(value in allowed(key) for key, value in zip(KEYS, left, strict=True))
        assert all(value == allowed(key)[0] for key, value in zip(KEYS, left, strict=True) if owner[key] == hangs)
        if got is not None:
            assert [value is not None for value in got] == [owner[key] != hangs for key in KEYS]
        store.stats().check()
        row.seen = {"raised": raised, "misses": dict(store.stats().misses - before.misses)}
        check_all_there(store)


def test_an_interrupt_while_the_parts_are_handed_out(
    book: Book, cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three shards has its part, the third not yet."""
    with (
        book(
            29,
            "interrupt, cluster: between two parts",
            injected="a signal's handler raises when one thread has its part and the next has not",
            expected="no buffer changes after the call",
        ) as row,
        RedisStore(cluster.url, deadline_s=PATIENT_S) as store,
    ):
        owner = prepared(cluster, store)
        assert all(ask(store, KEYS, SIZE))
        store._deadline_s = 1.0
        ports = list(dict.fromkeys(owner[key] for key in KEYS))
        nodes = nodes_by_port(store)

        def interrupted(work: object) -> Any:
            raise Interrupt

        monkeypatch.setattr(nodes[ports[2]], "start", interrupted)
        out = [memoryview(bytearray(b"\xee" * SIZE)) for _ in KEYS]
        hangs = node_at(cluster.nodes, ports[1])
        hangs.stop()
        with pytest.raises(Interrupt):
            store.get_many(KEYS, out)
        left = [bytes(buffer) for buffer in out]
        hangs.cont()
        time.sleep(0.5)
        written = sum(bytes(buffer) != before for buffer, before in zip(out, left, strict=True))
        monkeypatch.undo()
        assert written == 0, f"{written} buffers were written to after the call"
        row.seen = {"buffers written to afterwards": written}
        check_all_there(store)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # when it is raised in a __del__
def test_interrupts_at_any_moment_of_a_get(book: Book, cluster: RedisCluster) -> None:
    """Whatever was going on: nothing is written afterwards, nothing stays locked, counted or half open."""
    rounds, chance = 150, random.Random(29)
    with (
        book(
            29,
            "interrupt, cluster: at any moment",
            injected=f"{rounds} times SIGALRM raises at a random moment of a get or put of {len(KEYS)} keys",
            expected="no buffer changes after the call; later calls are right",
        ) as row,
        RedisStore(cluster.url, ttl_s=100, deadline_s=PATIENT_S) as store,
    ):
        prepared(cluster, store)
        assert all(ask(store, KEYS, SIZE))
        begin = time.perf_counter()
        assert all(ask(store, KEYS, SIZE))
        took, seen = time.perf_counter() - begin, Counter[str]()
        values = [value_of(key) for key in KEYS]
        for i in range(rounds):
            out = [memoryview(bytearray(b"\xee" * SIZE)) for _ in KEYS]
            try:
                with alarm(Interrupt, max(1e-5, chance.random() * 1.2 * took)):
                    store.get_many(KEYS, out) if i % 4 else store.put_many(KEYS, values)
                    seen["came too late"] += 1
            except Interrupt:
                left = [bytes(buffer) for buffer in out]
                time.sleep(0.005)
                written = sum(bytes(buffer) != before for buffer, before in zip(out, left, strict=True))
                assert written == 0, f"{written} buffers were written to after call {i}"
                assert all(begins_with_value(k, v) for k, v in zip(KEYS, left, strict=True))
                seen["interrupted"] += 1
            assert all(ask(store, KEYS[:60], SIZE)), store.stats()
        assert seen["interrupted"] > rounds / 10
        assert all(node.breaker.state == node.write_breaker.state == "closed" for node in store.nodes)
        # Servers whose part was cut short count as having timed out, though they did nothing wrong.
        assert set(store.stats().faults) <= {"timeout"} and not store.stats().misses
        store._topology._hinted = True  # type: ignore[attr-defined]
        time.sleep(0.6)
        asked_at = store._topology._asked_at  # type: ignore[attr-defined]
        assert all(ask(store, KEYS, SIZE))
        assert store._topology._asked_at > asked_at, "nobody may ask for the map any more"  # type: ignore[attr-defined]
        row.seen = dict(seen)
        check_all_there(store)


def begins_with_value(key: bytes, buffer: bytes) -> bool:
    """Whether a buffer of 0xEE was filled with nothing but the key's value, perhaps not to the end."""
    right = value_of(key)
    upto = next((n for n in range(SIZE) if buffer[n] != right[n]), SIZE)
    return buffer[upto:] == b"\xee" * (SIZE - upto)


# --- 32: many threads ------------------------------------------------------------------------------
def test_many_threads_share_the_connections_of_each_node(book: Book, cluster: RedisCluster) -> None:
    most, threads = 4, 16
    with (
        book(
            32,
            "16 threads, cluster",
            injected=f"{threads} threads read and write over {most} connections a node",
            expected="nothing wrong; no node has more connections",
        ) as row,
        RedisStore(cluster.url, deadline_s=PATIENT_S, max_connections=most) as store,
        contextlib.ExitStack() as stack,
    ):
        owner = prepared(cluster, store)
        ports = list(masters(cluster))
        watchers = {port: client_at(port) for port in ports}
        lines = lambda: {p: {c["id"] for c in watchers[p].client_list(_type="normal")} for p in ports}  # noqa: E731
        store.close()
        known = lines()
        store = stack.enter_context(RedisStore(cluster.url, deadline_s=PATIENT_S, max_connections=most))
        peak = Counter[int]()
        with Load(store, owner, threads=threads) as load:
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                for port, now in lines().items():
                    peak[port] = max(peak[port], len(now - known[port]))
                time.sleep(0.01)
        load.check()
        served = load.check_undisturbed(load.shards)
        assert not store.stats().faults and not store.stats().misses and not store.stats().drops
        assert all(1 < n <= most + 1 for n in peak.values()), "and one that asks for the map"
        row.seen = {"served": served, "most connections of a node": max(peak.values()), "allowed": most}
        check_all_there(store)
