"""Who is asked for which key, and what becomes of a batch when servers move slots, lie, hang or die.

The servers here are scripted: a whole cluster is one object whose map and faults the test changes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError

from kvlab.stores import RedisStore
from kvlab.stores.redis.cluster import Cluster
from kvlab.stores.redis.connection import Deadline, Pool
from kvlab.stores.redis.node import Node
from kvlab.stores.redis.store import KEY_PREFIX, MAX_REDIRECTS
from kvlab.stores.redis.topology import Shard, SubBatch
from kvlab.testbed.server import free_port
from tests.harness.helpers import FakeClock
from tests.harness.scripted import ScriptedServer

LONG_S = 30.0  # no machine is so busy
SHORT_S = 0.4  # for calls that are to run out of time
HANG_S = 10 * SHORT_S  # what took so long has hung
SILENT = b""
CLOSED = None
Said = Any  # bytes, None, or ... for what is usual
THIRDS = [(0, 5460), (5461, 10922), (10923, 16383)]


def resp(value: Any) -> bytes:
    """A reply as a server sends it; text is an error."""
    if value is None:
        return b"$-1\r\n"
    if isinstance(value, str):
        return b"-%s\r\n" % value.encode()
    if isinstance(value, int):
        return b":%d\r\n" % value
    if isinstance(value, bytes):
        return b"$%d\r\n%b\r\n" % (len(value), value)
    return b"*%d\r\n" % len(value) + b"".join(map(resp, value))


class Many:
    """Scripted servers with one memory: what one is given all have, so only who was asked makes a difference.

    Attributes:
        twist: called as twist(server, command) before a server answers: bytes are said instead, None closes the
            connection, ... leaves it to `usual`.
        usual: what all answer when nothing goes wrong.
    """

    def __init__(self, count: int) -> None:
        self.servers = [ScriptedServer(partial(self._answer, at)) for at in range(count)]
        self.data: dict[bytes, bytes] = {}
        self.twist: Callable[[int, list[bytes]], Said] = lambda at, command: ...
        self.maxmemory = [0] * count

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for server in self.servers:
                stack.enter_context(server)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def asked(self, at: int, *names: bytes) -> list[list[bytes]]:
        """The commands that a server has heard, only those with these names if any are given."""
        return [command for command in list(self.servers[at].commands) if not names or command[0] in names]

    def forget(self) -> None:
        """Forget what was asked."""
        for server in self.servers:
            server.commands.clear()

    def port(self, at: int) -> int:
        return self.servers[at].port

    def address(self, at: int) -> str:
        return f"127.0.0.1:{self.port(at)}"

    def _answer(self, at: int, command: list[bytes]) -> bytes | None:
        said = self.twist(at, command)
        return self.usual(at, command) if said is ... else said

    def usual(self, at: int, command: list[bytes]) -> bytes:
        name, *rest = command
        if name == b"GET":
            return resp(self.data.get(rest[0]))
        if name == b"SET":
            self.data[rest[0]] = rest[1]
        elif name in (b"EXISTS", b"PEXPIRE"):
            return resp(int(rest[0] in self.data))
        elif name == b"DEL":
            return resp(int(self.data.pop(rest[0], None) is not None))
        elif name == b"INFO":
            return resp(b"# Memory\r\nmaxmemory:%d\r\n" % self.maxmemory[at])
        return b"+OK\r\n"


class SlotMap(Many):
    """A cluster: `lines` are what CLUSTER SLOTS answers, (first, last, server, replica, …)."""

    def __init__(self, count: int = 3, lines: list[tuple[int, ...]] | None = None) -> None:
        super().__init__(count)
        self.lines = lines or [(*THIRDS[at], at) for at in range(3)]
        self.said: Said = ...  # instead of the map

    @property
    def url(self) -> str:
        return self.url_of(*range(len(self.servers)))

    def url_of(self, *seeds: int) -> str:
        return "redis-cluster://" + ",".join(map(self.address, seeds))

    def questions(self) -> int:
        """How often the map was asked for."""
        return sum(len(self.asked(at, b"CLUSTER")) for at in range(len(self.servers)))

    def usual(self, at: int, command: list[bytes]) -> bytes | None:
        if command[0] == b"CLUSTER":
            return self.map() if self.said is ... else self.said
        return super().usual(at, command)

    def map(self) -> bytes:
        """The map as a server tells it."""
        told = [[f, t, *([b"127.0.0.1", self.port(at), b"id", []] for at in who)] for f, t, *who in self.lines]
        return resp(told)


def key_of(at: int, number: int = 0) -> bytes:
    """A key whose slot is in the server's third."""
    first, last = THIRDS[at]
    found = (b"%d" % i for i in range(10_000) if first <= key_slot(b"kv:%d" % i) <= last)
    return next(key for i, key in enumerate(found) if i == number)


A, B, C = key_of(0), key_of(1), key_of(2)
A2, B2 = key_of(0, 1), key_of(1, 1)


def slot(key: bytes) -> int:
    return key_slot(KEY_PREFIX + key)


def name(key: bytes) -> bytes:
    return KEY_PREFIX + key


@pytest.fixture
def cluster() -> Iterator[SlotMap]:
    with SlotMap() as made:
        for key in (A, B, C, A2, B2):
            made.data[name(key)] = b"value of " + key
        yield made


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


class Orderly(RedisStore):
    """Its calls let the thread that asks for a newer map finish first, so that it is certain who is asked for keys."""

    def _spread(self, names: Any, work: Any, deadline: Deadline, reading: bool = False) -> Any:
        if names and not self._closed and isinstance(self._topology, Discovered) and self._topology._known:
            self._topology._refresh(deadline)
            wait_for_askers()
        return super()._spread(names, work, deadline, reading)


def wait_for_askers() -> None:
    """Wait until no thread asks for a map any more."""
    for thread in threading.enumerate():
        if thread.name == ASKER:
            thread.join(LONG_S)
            assert not thread.is_alive()


@contextmanager
def opened(url: str, kind: type[RedisStore] = Orderly, **settings: Any) -> Iterator[RedisStore]:
    """A store; in the end its sums must be right."""
    with kind(url, **{"deadline_s": LONG_S, **settings}) as store:
        yield store
        store.stats().check()


def values(*keys: bytes) -> list[bytes]:
    return [b"value of " + key for key in keys]


def bounded(call: Callable[[], Any]) -> Any:
    """What a call gives that must not hang."""
    start = time.monotonic()
    result = call()
    assert time.monotonic() - start < HANG_S
    return result


# --- a batch is divided -------------------------------------------------------------------------
@given(keys=st.lists(st.binary(max_size=8), max_size=40), holes=st.sets(st.integers(0, 15)))
def test_split_has_each_index_once_with_the_server_of_its_slot(keys: list[bytes], holes: set[int]) -> None:
    topology = known_cluster(holes)
    parts, why = topology.split(keys, Deadline(LONG_S))
    placed = {i: part.node for part in parts for i in part.indices}
    assert sum(len(part.indices) for part in parts) == len(placed)
    assert len({part.node for part in parts}) == len(parts) and not any(part.asking for part in parts)
    for i, key in enumerate(keys):
        shard = topology._slots[key_slot(key)]
        assert placed.pop(i, None) is (shard.master if shard else None)
    assert not placed
    assert why == ("down" if any(topology._slots[key_slot(key)] is None for key in keys) else "")


def known_cluster(holes: set[int] = frozenset()) -> Cluster:  # type: ignore[assignment]
    """A map of four masters, in sixteen stripes; the holes are nobody's. Nothing is asked."""
    made = Cluster([], lambda host, port: Node(f"{host}:{port}", Pool("redis://h", 1), 1), False, time.monotonic)
    shards = [Shard(made._node("10.0.0.1", 1 + i)) for i in range(4)]
    width = SLOTS // 16
    made._slots = [None if at // width in holes else shards[at // width % 4] for at in range(SLOTS)]
    made._by_master = {shard.master: shard for shard in shards}
    made._known, made._asked_at = True, time.monotonic()
    return made


REPLIES = st.one_of(
    st.sampled_from([b"value", None, 1, MovedError("5 10.0.0.1:2"), MovedError("7 :3"), AskError("5 10.0.0.1:2")]),
    st.builds(
        lambda kind, slot, port: kind(f"{slot} 10.0.0.2:{port}"),
        st.sampled_from([MovedError, AskError]),
        st.integers(-1, SLOTS),
        st.integers(-1, 65537),
    ),
)


@given(replies=st.lists(REPLIES, max_size=30), start=st.integers(0, 5))
def test_redirect_has_each_index_at_most_once_and_all_that_can_be_followed(replies: list[Any], start: int) -> None:
    topology = known_cluster()
    part = SubBatch(topology.shards()[0].master, range(start, start + len(replies)))
    before = list(topology._slots)
    found = topology.redirect(part, replies)
    placed = {i: (one.node.name, one.asking) for one in found for i in one.indices}
    assert sum(len(one.indices) for one in found) == len(placed)
    expected = {}
    for i, reply in zip(part.indices, replies, strict=True):
        if isinstance(reply, AskError) and 0 <= reply.slot_id < SLOTS and 0 < reply.port < 65536:
            where = f"{reply.host or '10.0.0.1'}:{reply.port}"
            expected[i] = where, type(reply) is AskError
            if type(reply) is MovedError:
                before[reply.slot_id] = where  # type: ignore[call-overload]
    assert placed == expected
    names = [shard if isinstance(shard, str) else shard.master.name for shard in before]  # type: ignore[union-attr]
    assert [shard.master.name for shard in topology._slots] == names  # type: ignore[union-attr]


def test_each_server_gets_its_own_keys_and_the_batch_keeps_its_order(cluster: SlotMap) -> None:
    batch = [C, A, b"absent", B2, A2, A, C, B]
    expected = [cluster.data.get(name(key)) for key in batch]
    with opened(cluster.url) as store:
        assert store.get_many(batch) == expected
        for at, (first, last) in enumerate(THIRDS):
            heard = [command[1] for command in cluster.asked(at, b"GET")]
            assert heard == [name(key) for key in batch if first <= slot(key) <= last]
        out = [memoryview(bytearray(32)) for _ in batch]
        assert [None if got is None else bytes(got) for got in store.get_many(batch, out)] == expected
        assert store.stats().misses == Counter(absent=2) and store.stats().faults == Counter()


def test_each_server_is_asked_once_for_all_of_its_keys(cluster: SlotMap, monkeypatch: pytest.MonkeyPatch) -> None:
    trips: list[int] = []
    exchange = Pool.exchange

    def counted(self: Pool, commands: Any, *others: Any, **more: Any) -> Any:
        trips.append(len(commands))
        return exchange(self, commands, *others, **more)

    monkeypatch.setattr(Pool, "exchange", counted)
    with opened(cluster.url, ttl_s=100) as store:
        keys = [key_of(at, number) for number in range(4) for at in range(3)]
        store.get_many(keys)
        assert trips == [8, 8, 8]  # GET and PEXPIRE
        trips.clear()
        assert store.put_many(keys, keys) == 12
        assert sorted(trips) == [1, 1, 1, 4, 4, 4]  # INFO comes first, once
        trips.clear()
        assert (store.probe(keys), store.touch_many(keys), store.delete_many(keys)) == (12, [True] * 12, 12)
        assert trips == [4] * 9
        assert cluster.questions() == 1


def test_the_servers_of_a_batch_are_asked_at_the_same_time(cluster: SlotMap) -> None:
    together = threading.Barrier(3)

    def wait_for_all(at: int, command: list[bytes]) -> Said:
        if command[0] == b"GET":
            together.wait(LONG_S)
        return ...

    cluster.twist = wait_for_all
    with opened(cluster.url) as store:
        assert store.get_many([A, B, C]) == values(A, B, C)


def test_a_batch_for_one_server_starts_no_threads(cluster: SlotMap, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    start = Node.start
    monkeypatch.setattr(Node, "start", lambda node, work: started.append(node.name) or start(node, work))
    with opened(cluster.url, ttl_s=100) as store:
        assert store.get_many([A, A2, A]) == values(A, A2, A)
        store.put_many([A, A2], [b"1", b"2"])
        assert (store.probe([A]), store.touch_many([A]), store.delete_many([A2])) == (1, [True], 1)
        assert started == []
        store.get_many([A, B, C])
        assert started == [cluster.address(1), cluster.address(2)]


def test_a_key_twice_in_a_batch_is_answered_twice_and_the_last_write_stays(cluster: SlotMap) -> None:
    with opened(cluster.url) as store:
        assert store.put_many([A, B, A, B], [b"1", b"2", b"3", b"4"]) == 4
        assert store.get_many([B, A, A, B]) == [b"4", b"3", b"3", b"4"]
        assert store.delete_many([A, B, A]) == 2


def test_tags_in_braces_decide_the_slot(cluster: SlotMap) -> None:
    with opened(cluster.url) as store:
        keys = [b"{same}%d" % i for i in range(10)]
        store.put_many(keys, keys)
        assert sorted(len(cluster.asked(at, b"SET")) for at in range(3)) == [0, 0, 10]


# --- MOVED and ASK ------------------------------------------------------------------------------
def says(kind: str, key: bytes, to: str, *by: int) -> Callable[[int, list[bytes]], Said]:
    """Those servers send whoever asks for a key elsewhere, unless told that it was ASKED for."""

    def twist(at: int, command: list[bytes]) -> Said:
        here = at in by and len(command) > 1 and command[1] == name(key)
        return resp(f"{kind} {slot(key)} {to}") if here else ...

    return twist


def test_moved_is_followed_at_once_and_remembered(cluster: SlotMap, clock: FakeClock) -> None:
    cluster.twist = says("MOVED", A, cluster.address(1), 0)
    with opened(cluster.url, clock=clock) as store:
        assert store.get_many([A, A2, B]) == values(A, A2, B)
        assert len(cluster.asked(0, b"GET")) == 2 and store.stats().redirects == 1
        cluster.forget()
        assert store.get_many([A, A2, B]) == values(A, A2, B)
        assert [command[1] for command in cluster.asked(0, b"GET")] == [name(A2)]
        assert store.stats().redirects == 1 and store.stats().misses == Counter()
        assert store.put_many([A], [b"new"]) == 1 and store.get_many([A]) == [b"new"]


def test_a_fill_of_the_callers_buffers_follows_too(cluster: SlotMap) -> None:
    cluster.twist = says("MOVED", A, cluster.address(1), 0)
    with opened(cluster.url, ttl_s=100) as store:
        out = [memoryview(bytearray(b"\xaa" * 32)) for _ in range(3)]
        got = store.get_many([B, A, A2], out)
        assert [bytes(view) for view in got if view is not None] == values(B, A, A2)
        assert [view.obj is buffer.obj for view, buffer in zip(got, out, strict=True)] == [True] * 3  # type: ignore


def test_probe_touch_and_delete_follow(cluster: SlotMap) -> None:
    cluster.twist = says("MOVED", A, cluster.address(1), 0)
    for call, expected in ((RedisStore.probe, 2), (RedisStore.touch_many, [True, True]), (RedisStore.delete_many, 2)):
        with opened(cluster.url, ttl_s=100) as store:
            assert call(store, [B, A]) == expected  # type: ignore[operator]
            assert store.stats().redirects == 1 and store.stats().requested == 0


def test_ask_is_followed_with_asking_before_each_command_and_not_remembered(cluster: SlotMap) -> None:
    keys = [b"{t}%d" % i for i in range(3)]
    there = next(at for at, (first, last) in enumerate(THIRDS) if first <= key_slot(b"kv:{t}") <= last)
    other = (there + 1) % 3
    cluster.data |= {name(key): b"value of " + key for key in keys}

    def migrating(at: int, command: list[bytes]) -> Said:
        return resp(f"ASK {slot(keys[0])} {cluster.address(other)}") if at == there and len(command) > 1 else ...

    with opened(cluster.url, ttl_s=100) as store:
        store.get_many([A, B, C])  # the map is known
        cluster.twist = migrating
        for calls in (1, 2):
            cluster.forget()
            assert store.get_many(keys) == values(*keys)
            heard = [command[0] for command in cluster.asked(other)]
            assert heard[0::2] == [b"ASKING"] * 6 and heard[1::2] == [b"GET"] * 3 + [b"PEXPIRE"] * 3
            assert len(cluster.asked(there, b"GET")) == 3 and store.stats().redirects == 3 * calls
        cluster.forget()
        assert store.put_many(keys[:2], [b"1", b"2"]) == 2
        assert [c[0] for c in cluster.asked(other) if c[0] != b"INFO"] == [b"ASKING", b"SET"] * 2


def test_of_one_batch_some_keys_move_some_are_asked_for_and_some_stay(cluster: SlotMap) -> None:
    moved, asked = says("MOVED", A, cluster.address(2), 0), says("ASK", A2, cluster.address(2), 0)
    cluster.twist = lambda at, command: moved(at, command) if moved(at, command) is not ... else asked(at, command)
    with opened(cluster.url) as store:
        assert store.get_many([A2, B, A, C]) == values(A2, B, A, C)
        assert store.stats().redirects == 2
        assert [command[0] for command in cluster.asked(2)].count(b"ASKING") == 1
        assert store.get_many([A2, A]) == values(A2, A)
        assert store.stats().redirects == 3


@pytest.mark.parametrize("kind", ["MOVED", "ASK"])
def test_two_servers_that_send_each_other_a_key_are_left_after_a_few_questions(cluster: SlotMap, kind: str) -> None:
    to_b, to_a = says(kind, A, cluster.address(1), 0), says(kind, A, cluster.address(0), 1)
    cluster.twist = lambda at, command: (to_b if at == 0 else to_a)(at, command)
    with opened(cluster.url) as store:
        why: list[str] = []
        assert store.get_many([A, B], reasons=why) == [None, *values(B)] and why == ["moved", ""]
        questions = sum([c[:2] == [b"GET", name(A)] for at in range(3) for c in cluster.asked(at)])
        assert questions == MAX_REDIRECTS + 1
        stats = store.stats()
        assert (stats.misses, stats.faults) == (Counter(moved=1), Counter(moved=1))
        assert stats.redirects == MAX_REDIRECTS
        assert store.put_many([A], [b"new"]) == 0
        assert (store.stats().drops, store.stats().faults) == (Counter(moved=1), Counter(moved=2))
        assert [node.breaker.state for node in store.nodes] == ["closed"] * 3


def test_a_chain_to_ever_new_servers_ends_and_leaves_none_behind(clock: FakeClock) -> None:
    with SlotMap(8, [(0, SLOTS - 1, 0)]) as cluster, opened(cluster.url_of(0), clock=clock) as store:
        cluster.twist = lambda at, c: (
            resp(f"MOVED {slot(A)} {cluster.address((at + 1) % 8)}") if c[0] == b"GET" else ...
        )
        for _ in range(3):
            assert store.get_many([A]) == [None]
        assert store.stats().misses == Counter(moved=3) and store.stats().faults == Counter(moved=3)
        assert store.stats().redirects == 3 * MAX_REDIRECTS
        assert len(store._topology._nodes) > 1
        cluster.twist = lambda at, command: ...
        clock.now += PAUSE_S
        store.get_many([A])
        assert len(store.nodes) == len(store._topology._nodes) == 1


def test_servers_heard_of_stay_few_though_nobody_tells_the_map_again(clock: FakeClock) -> None:
    with SlotMap(1, [(0, SLOTS - 1, 0)]) as cluster, opened(cluster.url, clock=clock) as store:
        store.get_many([A])
        port = iter(range(700, 1000))  # where hardly anybody listens
        cluster.twist = lambda at, c: (
            resp(f"MOVED {slot(A)} 127.0.0.1:{next(port)}") if c[0] == b"GET" else b"-NOPERM no\r\n"
        )
        for _ in range(100):
            clock.now += PAUSE_S
            store._topology._slots = [store._topology.shards()[0]] * SLOTS  # as many slots would do
            store.get_many([A])
        assert len(store._topology._nodes) <= 64


def test_moved_without_a_host_means_the_same_host(cluster: SlotMap) -> None:
    cluster.twist = says("MOVED", A, f":{cluster.port(1)}", 0)
    with opened(cluster.url) as store:
        assert store.get_many([A]) == values(A)
        assert {node.name for node in store.nodes} == {cluster.address(at) for at in range(3)}


@pytest.mark.parametrize(
    "said",
    [
        "MOVED",
        "MOVED 1",
        "MOVED 1 ",
        "MOVED 1 127.0.0.1",
        "MOVED 1 127.0.0.1:",
        "MOVED 1 127.0.0.1:port",
        "MOVED 1 127.0.0.1:0",
        "MOVED 1 127.0.0.1:-1",
        "MOVED 1 127.0.0.1:99999",
        "MOVED 1 127.0.0.1:1 more",
        "MOVED -1 127.0.0.1:7000",
        "MOVED 16384 127.0.0.1:7000",
        "MOVED 20000 127.0.0.1:7000",
        "MOVED x 127.0.0.1:7000",
        "MOVED 99999999999999999999 127.0.0.1:7000",
        "MOVED 1 127.0.0.1:99999999999999999999",
        f"MOVED 1 {'ü' * 70}:1",
        "ASK 1",
        "ASK 1 127.0.0.1:0",
        "ASK 20000 127.0.0.1:7000",
        "ASK",
        "TRYAGAIN later",
        "MOVED 1 [::1]:1",
        "MOVED 1 [:1",
        "MOVED 1 h/x:1",
        "ASK 1 h]:1",
        "MOVED 1 h℀:1",
    ],
)
def test_a_redirect_that_names_no_server_is_a_counted_miss(cluster: SlotMap, said: str) -> None:
    cluster.twist = lambda at, command: resp(said) if command[0] in (b"GET", b"SET", b"EXISTS") and at == 0 else ...
    with opened(cluster.url, deadline_s=2) as store:
        assert store.get_many([A, B]) == [None, *values(B)]
        assert set(store.stats().misses) <= {"moved", "protocol", "conn", "error"}
        assert store.put_many([A], [b"x"]) == store.probe([A]) == 0
        store.stats().check()


def test_a_redirect_to_a_dead_server_costs_its_keys_alone(cluster: SlotMap) -> None:
    cluster.twist = says("MOVED", A, f"127.0.0.1:{free_port()}", 0)
    with opened(cluster.url) as store:
        assert store.get_many([A, A2, B]) == [None, *values(A2, B)]
        assert store.stats().misses == Counter(conn=1)


# --- what servers refuse ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"-CLUSTERDOWN The cluster is down\r\n", "down"),
        (b"-CLUSTERDOWN Hash slot not served\r\n", "down"),
        (b"-LOADING Redis is loading the dataset in memory\r\n", "loading"),
        (b"-MASTERDOWN Pool with MASTER is down\r\n", "loading"),
        (b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n", "moved"),
        (b"-NOPERM this user has no permissions\r\n", "auth"),
        (b"-NOAUTH Authentication required.\r\n", "auth"),
        (b"-BUSY Redis is busy running a script.\r\n", "busy"),
        (b"-ERR what\r\n", "response"),
        (b"*2\r\n:1\r\n:2\r\n", "protocol"),
        (CLOSED, "conn"),
    ],
)
def test_what_one_server_refuses_costs_its_keys_alone(cluster: SlotMap, said: Said, reason: str) -> None:
    cluster.twist = lambda at, command: said if at == 0 and command[0] == b"GET" else ...
    with opened(cluster.url) as store:
        why: list[str] = []
        assert store.get_many([A, B, C], reasons=why) == [None, *values(B, C)]
        assert why == [reason, "", ""] and store.stats().misses == Counter({reason: 1})


def test_readonly_from_a_master_is_a_counted_drop_and_a_hint(cluster: SlotMap, clock: FakeClock) -> None:
    cluster.twist = lambda at, command: resp("READONLY You can't write") if at == 0 and command[0] == b"SET" else ...
    with opened(cluster.url, clock=clock) as store:
        assert store.put_many([A, B], [b"1", b"2"]) == 1 and store.stats().drops == Counter(readonly=1)
        cluster.lines[0] = (*THIRDS[0], 2)  # another has taken over
        clock.now += PAUSE_S
        assert store.put_many([A, B], [b"1", b"2"]) == 2
        assert store.stats().redirects == 0


def test_a_server_that_hangs_costs_its_keys_alone_and_opens_its_breaker_alone(
    cluster: SlotMap, clock: FakeClock
) -> None:
    with opened(cluster.url, deadline_s=1, clock=clock) as store:
        store.get_many([A, B, C])
        cluster.twist = lambda at, command: SILENT if at == 0 else ...
        for _ in range(3):
            assert bounded(lambda: store.get_many([A, B, C])) == [None, *values(B, C)]
        states = {node.name: node.breaker.state for node in store.nodes}
        assert states.pop(cluster.address(0)) == "open" and set(states.values()) == {"closed"}
        cluster.forget()
        assert store.get_many([A, B]) == [None, *values(B)] and cluster.asked(0, b"GET") == []
        assert store.stats().misses == Counter(timeout=3, breaker=1)
        cluster.twist = lambda at, command: ...
        clock.cool_down()
        assert store.get_many([A, B]) == values(A, B)


def test_nodes_keep_what_their_breakers_know_when_the_map_is_asked_for_again(
    cluster: SlotMap, clock: FakeClock
) -> None:
    with opened(cluster.url, clock=clock) as store:
        store.get_many([A, B, C])
        before = store.nodes
        cluster.twist = lambda at, command: CLOSED if at == 0 and command[0] == b"GET" else ...
        for _ in range(3):
            store.get_many([A])
        asked = cluster.questions()
        clock.now += PAUSE_S
        store.get_many([A])
        assert cluster.questions() == asked + 1
        assert store.nodes == before and store.nodes[0].breaker.state == "open"
        assert store.stats().misses == Counter(conn=3, breaker=1)


# --- when the map is asked for ------------------------------------------------------------------
def test_the_map_is_asked_for_once_and_again_after_a_while(cluster: SlotMap, clock: FakeClock) -> None:
    with opened(cluster.url, clock=clock) as store:
        for _ in range(5):
            store.get_many([A, B, C])
        assert cluster.questions() == 1
        clock.now += MAP_AGE_S - 0.01
        store.get_many([A])
        assert cluster.questions() == 1
        clock.now += 0.01
        for _ in range(5):
            store.get_many([A])
        assert cluster.questions() == 2


def test_hints_bring_one_question_in_each_pause(cluster: SlotMap, clock: FakeClock) -> None:
    cluster.twist = lambda at, command: b"-CLUSTERDOWN no\r\n" if command[0] == b"GET" else ...
    with opened(cluster.url, clock=clock) as store:
        for _ in range(10):
            store.get_many([A, B, C])
        assert cluster.questions() == 1
        clock.now += PAUSE_S - 0.01
        store.get_many([A])
        assert cluster.questions() == 1
        for asked in (2, 3, 4):
            clock.now += PAUSE_S
            for _ in range(5):
                store.get_many([A])
            assert cluster.questions() == asked
        cluster.twist = lambda at, command: ...
        clock.now += PAUSE_S
        for _ in range(3):
            assert store.get_many([A]) == values(A)
            clock.now += PAUSE_S
        assert cluster.questions() == 5  # the last hint, and no more


@pytest.mark.parametrize(
    ("said", "hints"),
    [
        (b"-MOVED 1 127.0.0.1:0\r\n", True),
        (b"-CLUSTERDOWN no\r\n", True),
        (b"-READONLY no\r\n", True),
        (b"-LOADING no\r\n", True),
        (CLOSED, True),
        (b":1\r\n", True),
        (b"-ERR no\r\n", False),
        (b"-NOPERM no\r\n", False),
        (b"-OOM no\r\n", False),
        (b"$-1\r\n", False),
    ],
)
def test_only_what_may_mean_another_map_is_a_hint(cluster: SlotMap, clock: FakeClock, said: Said, hints: bool) -> None:
    cluster.twist = lambda at, command: said if command[0] == b"GET" else ...
    with opened(cluster.url, clock=clock) as store:
        store.get_many([A])
        clock.now += PAUSE_S
        store.get_many([A])
        assert cluster.questions() == 1 + hints


@pytest.mark.parametrize("said", [CLOSED, b"-NOPERM no\r\n", b"$3\r\nwat\r\n"])
def test_the_old_map_goes_on_while_nobody_tells_a_new_one(cluster: SlotMap, clock: FakeClock, said: Said) -> None:
    with opened(cluster.url, clock=clock) as store:
        store.get_many([A])
        cluster.said = said
        for _ in range(8):
            clock.now += MAP_AGE_S
            assert store.get_many([A, B, C]) == values(A, B, C)
        assert store.stats().misses == Counter()
        cluster.said = ...
        cluster.lines = [(0, SLOTS - 1, 1)]
        clock.now += MAP_AGE_S
        cluster.forget()
        assert store.get_many([A]) == values(A) and len(cluster.asked(1, b"GET")) == 1


def test_while_nobody_tells_one_thread_a_second_tries(
    cluster: SlotMap, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread.name) or start(thread))
    with opened(cluster.url_of(0), clock=clock) as store:
        store.get_many([A])
        cluster.said = CLOSED
        clock.now += MAP_AGE_S
        for _ in range(90):
            store.get_many([A])
            clock.now += 0.1
        assert 8 <= started.count(ASKER) <= 10
        assert store.stats().faults == Counter(conn=started.count(ASKER)) and store.stats().misses == Counter()


def test_a_question_that_nobody_answered_is_asked_again_after_the_pause(cluster: SlotMap, clock: FakeClock) -> None:
    with opened(cluster.url_of(0), clock=clock) as store:
        store.get_many([A])
        cluster.said = CLOSED
        clock.now += MAP_AGE_S
        store.get_many([A])
        cluster.said, cluster.lines = ..., [(0, SLOTS - 1, 1)]
        cluster.forget()
        store.get_many([A])
        assert cluster.questions() == 0
        clock.now += PAUSE_S
        store.get_many([A])
        assert cluster.questions() == 1 and len(cluster.asked(1, b"GET")) == 1


def test_a_question_that_was_interrupted_tells_nothing_and_blocks_nobody(
    cluster: SlotMap, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(BaseException): ...

    def interrupted(*_: Any) -> Any:
        raise Interrupted

    cluster.said = CLOSED
    with opened(cluster.url, clock=clock) as store:
        store.get_many([A])
        store.get_many([A])
        with monkeypatch.context() as patch:
            patch.setattr(Pool, "ask", interrupted)
            with pytest.raises(Interrupted):
                store.get_many([A])
        assert store._topology._breaker.faults == 2
        cluster.said = ...
        assert store.get_many([A]) == values(A)


def test_a_server_that_hangs_does_not_take_all_of_the_time_for_the_map(cluster: SlotMap) -> None:
    cluster.twist = lambda at, command: SILENT if at == 0 and command[0] == b"CLUSTER" else ...
    for _ in range(6):  # whom it asks first is drawn by lot
        with opened(cluster.url, deadline_s=2) as store:
            assert store.get_many([B, C]) == values(B, C)


def test_healthy_servers_are_asked_for_the_map_before_faulty_ones(cluster: SlotMap, clock: FakeClock) -> None:
    with opened(cluster.url_of(0), clock=clock) as store:
        store.get_many([A, B, C])
        cluster.twist = lambda at, command: CLOSED if at == 0 and command[0] == b"GET" else ...
        store.get_many([A, B, C])
        cluster.forget()
        for _ in range(10):
            clock.now += MAP_AGE_S
            store.get_many([B])
        assert cluster.questions() == 10 and cluster.asked(0, b"CLUSTER") == []


def test_the_seeds_are_asked_when_all_servers_known_have_gone(clock: FakeClock) -> None:
    with SlotMap(5, [(*THIRDS[at], at + 1) for at in range(3)]) as cluster:
        cluster.data |= {name(A): b"value of " + A}
        with opened(cluster.url_of(0), deadline_s=4, clock=clock) as store:
            store.get_many([A, B, C])
            cluster.twist = lambda at, command: ... if at in (0, 4) else CLOSED
            cluster.lines = [(0, SLOTS - 1, 4)]
            store.get_many([A])
            clock.now += PAUSE_S
            assert store.get_many([A]) == values(A)
            assert [node.name for node in store.nodes] == [cluster.address(4)]


def test_the_seeds_are_asked_before_servers_that_do_not_answer(clock: FakeClock) -> None:
    lines = [(*THIRDS[at], at) for at in range(3)]
    with SlotMap(4, lines) as cluster, opened(cluster.url_of(3), clock=clock) as store:
        store.get_many([A, B, C])
        cluster.twist = lambda at, command: ... if at == 3 else CLOSED
        store.get_many([A, B, C])
        cluster.forget()
        clock.now += PAUSE_S
        store.get_many([A])
        assert [len(cluster.asked(at, b"CLUSTER")) for at in range(4)] == [0, 0, 0, 1]


def in_threads(count: int, call: Callable[[], Any]) -> list[Any]:
    """What so many threads get that call at the same moment."""
    go, got = threading.Barrier(count), list[Any]()

    def run() -> None:
        go.wait()
        got.append(call())

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def test_many_threads_at_the_first_call_ask_once(cluster: SlotMap) -> None:
    with opened(cluster.url) as store:
        assert in_threads(16, lambda: store.get_many([A, B, C])) == [values(A, B, C)] * 16
        assert cluster.questions() == 1


def test_threads_wait_for_the_first_answer_no_longer_than_their_deadline(cluster: SlotMap) -> None:
    heard, go_on, got = threading.Event(), threading.Event(), []

    def slow(at: int, command: list[bytes]) -> Said:
        if command[0] == b"CLUSTER":
            heard.set()
            go_on.wait(LONG_S)
        return ...

    cluster.twist = slow
    with opened(cluster.url) as store:
        asker = threading.Thread(target=lambda: got.append(store.get_many([A, B])))
        asker.start()
        assert heard.wait(LONG_S)
        store._deadline_s = SHORT_S
        assert bounded(lambda: in_threads(15, lambda: store.get_many([A, B]))) == [[None, None]] * 15
        assert store.stats().misses == Counter(pool=30)
        go_on.set()
        asker.join()
        assert got == [values(A, B)] and cluster.questions() == 1


def test_threads_at_a_first_call_that_nobody_answers_all_return_in_time(cluster: SlotMap) -> None:
    cluster.twist = lambda at, command: SILENT
    with opened(cluster.url, deadline_s=SHORT_S) as store:
        assert bounded(lambda: in_threads(16, lambda: store.get_many([A, B]))) == [[None, None]] * 16
        assert set(store.stats().misses) <= {"timeout", "pool", "breaker"} and store.stats().misses["timeout"] >= 2


@pytest.mark.parametrize("kind", ["cluster", "sentinel"])
def test_who_knows_a_map_waits_for_no_newer_one(
    cluster: SlotMap, watched: Watched, clock: FakeClock, kind: str
) -> None:
    many, asked, go_on = cluster if kind == "cluster" else watched, threading.Event(), threading.Event()

    def slow(at: int, command: list[bytes]) -> Said:
        if command[0] in (b"CLUSTER", b"SENTINEL"):
            asked.set()
            go_on.wait(LONG_S)
        return ...

    with opened(many.url, RedisStore, clock=clock) as store:
        store.get_many([A])
        many.twist = slow
        cluster.lines, watched.master = [(0, SLOTS - 1, 1)], [1, 1, 1]
        clock.now += MAP_AGE_S
        for _ in range(5):
            assert store.get_many([A, B]) == values(A, B)
        assert asked.wait(LONG_S)
        assert store.get_many([A, B]) == values(A, B) and many.asked(0, b"GET")
        go_on.set()
        wait_for_askers()
        many.forget()
        assert store.get_many([A, B]) == values(A, B)
        assert not many.asked(0, b"GET") and len(many.asked(1, b"GET")) == 2
        assert store.stats().misses == Counter() and store.stats().faults == Counter()


def test_after_a_hint_the_next_call_asks_in_half_of_its_time(
    cluster: SlotMap, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []
    by: list[str] = []
    ask = Cluster._ask

    def watched_ask(topology: Cluster, deadline: Deadline) -> None:
        times.append(deadline.rest)
        by.append(threading.current_thread().name)
        ask(topology, deadline)

    monkeypatch.setattr(Cluster, "_ask", watched_ask)
    with opened(cluster.url, RedisStore, clock=clock) as store:
        store.get_many([A])
        cluster.twist = lambda at, command: resp("READONLY no") if at == 0 and command[0] == b"SET" else ...
        store.put_many([A], [b"x"])
        cluster.lines = [(0, SLOTS - 1, 1)]
        clock.now += PAUSE_S
        assert store.put_many([A], [b"x"]) == 1
        clock.now += MAP_AGE_S
        assert store.get_many([A]) == [b"x"]
        wait_for_askers()
        me = threading.current_thread().name
        assert by == [me, me, ASKER] and LONG_S / 2 < times[0] < LONG_S and times[1] <= LONG_S / 2 < times[2]


def test_without_a_thread_to_ask_the_old_map_goes_on(
    cluster: SlotMap, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with opened(cluster.url, clock=clock) as store:
        store.get_many([A])
        cluster.lines = [(0, SLOTS - 1, 1)]
        clock.now += MAP_AGE_S
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_more)
            assert store.get_many([A]) == values(A)
        cluster.forget()
        assert store.get_many([A]) == values(A)
        assert cluster.questions() == len(cluster.asked(1, b"GET")) == 1


@pytest.mark.parametrize("url", ["redis-cluster://127.0.0.1:{}", "redis-sentinel://127.0.0.1:{}/main"])
def test_a_deadline_that_passed_before_the_first_question_is_a_counted_miss(url: str) -> None:
    with opened(url.format(free_port()), deadline_s=1e-9) as store:
        assert store.get_many([A]) == [None] and store.put_many([A], [b"x"]) == 0
        assert set(store.stats().misses) <= {"timeout", "pool", "conn"}


# --- maps that are nonsense ---------------------------------------------------------------------
def line(*parts: Any) -> bytes:
    return resp([[*parts]])


HOST = b"127.0.0.1"
NONSENSE: list[tuple[str, Said, set[str]]] = [
    ("a number", b":1\r\n", {"protocol"}),
    ("a text", b"$2\r\nhi\r\n", {"protocol"}),
    ("OK", b"+OK\r\n", {"protocol"}),
    ("nothing", b"*-1\r\n", {"protocol"}),
    ("null", b"$-1\r\n", {"protocol"}),
    ("a list of numbers", resp([1, 2, 3]), {"protocol"}),
    ("a line that is too short", line(0, 1), {"protocol"}),
    ("no servers", line(0, 16383, []), {"protocol"}),
    ("text for slots", line(b"0", b"16383", [HOST, 1]), {"protocol"}),
    ("null for slots", line(None, None, [HOST, 1]), {"protocol"}),
    ("a slot too many", line(0, 16384, [HOST, 1]), {"protocol"}),
    ("many slots too many", line(0, 1 << 60, [HOST, 1]), {"protocol"}),
    ("slots below zero", line(-1, 5, [HOST, 1]), {"protocol"}),
    ("slots the wrong way", line(9, 5, [HOST, 1]), {"protocol"}),
    ("no port", line(0, 16383, [HOST]), {"protocol"}),
    ("port 0", line(0, 16383, [HOST, 0]), {"protocol"}),
    ("port 65536", line(0, 16383, [HOST, 65536]), {"protocol"}),
    ("a port below zero", line(0, 16383, [HOST, -7]), {"protocol"}),
    ("no number for a port", line(0, 16383, [HOST, b"port"]), {"protocol"}),
    ("null for a port", line(0, 16383, [HOST, None]), {"protocol"}),
    ("a number for a host", line(0, 16383, [1, 1]), {"protocol"}),
    ("a list for a host", line(0, 16383, [[HOST], 1]), {"protocol"}),
    ("?", line(0, 16383, [b"?", 1]), {"down"}),
    ("a host that no URL can hold", line(0, 16383, [b"h/[", 1]), {"protocol", "error"}),
    ("an error for a host", b"*1\r\n*3\r\n:0\r\n:9\r\n*2\r\n-ERR x\r\n:1\r\n", {"protocol"}),
    ("a line of errors", b"*2\r\n-ERR x\r\n-ERR y\r\n", {"protocol"}),
    ("lists in lists", b"*1\r\n" * 5000, {"protocol", "timeout"}),
    ("lists without end", b"*1\r\n" * 8 + b"*-7\r\n", {"protocol"}),
    ("HTTP", b"HTTP/1.1 400 Bad Request\r\n\r\n", {"protocol"}),
    ("not allowed", b"-NOPERM no permissions to run 'cluster|slots'\r\n", {"auth"}),
    ("no cluster", b"-ERR This instance has cluster support disabled\r\n", {"protocol"}),
    ("a password is wanted", b"-NOAUTH Authentication required.\r\n", {"auth"}),
    ("loading", b"-LOADING Redis is loading\r\n", {"loading"}),
    ("the cluster is down", b"-CLUSTERDOWN no\r\n", {"down"}),
    ("a redirect", b"-MOVED 1 127.0.0.1:1\r\n", {"moved", "conn"}),
    ("a redirect to nowhere", b"-MOVED\r\n", {"moved", "protocol", "error"}),
    ("hanging up", CLOSED, {"conn"}),
    ("silence", SILENT, {"timeout"}),
    ("half of it", b"*1\r\n*3\r\n:0\r\n:1638", {"timeout"}),
    ("a long list that does not come", b"*1000000\r\n", {"timeout"}),
]


@pytest.mark.parametrize(("said", "reasons"), [pytest.param(*rest, id=what) for what, *rest in NONSENSE])
def test_a_map_that_is_nonsense_is_a_counted_miss(said: Said, reasons: set[str]) -> None:
    with SlotMap(1) as cluster, opened(cluster.url, deadline_s=SHORT_S) as store:
        cluster.said = said
        why: list[str] = []
        assert bounded(lambda: store.get_many([A, B], reasons=why)) == [None, None]
        assert set(why) <= reasons and store.put_many([A], [b"x"]) == store.probe([A]) == 0
        assert set(store.stats().faults) <= reasons
        health = bounded(store.health)
        assert not health.ok and any(f"{reason}: " in health.detail for reason in reasons), health
        assert "\n" not in health.detail and cluster.asked(0, b"GET", b"SET") == []
        cluster.said, cluster.lines = ..., [(0, SLOTS - 1, 0)]
        store._deadline_s = LONG_S
        assert store.health().ok


def test_an_empty_map_means_that_nobody_serves_anything() -> None:
    with SlotMap(1) as cluster, opened(cluster.url) as store:
        cluster.said = b"*0\r\n"
        assert store.get_many([A, B]) == [None, None] and store.stats().misses == Counter(down=2)
        assert not store.health().ok and "nobody serves" in store.health().detail


def test_one_server_that_has_left_the_cluster_does_not_hide_the_others(cluster: SlotMap) -> None:
    cluster.twist = lambda at, command: b"*0\r\n" if at == 0 and command[0] == b"CLUSTER" else ...
    cluster.lines = [(0, SLOTS - 1, 1)]
    got = []
    for _ in range(12):  # whom it asks first is drawn by lot
        with opened(cluster.url) as store:
            got.append(store.get_many([A]))
    assert got == [values(A)] * 12


@pytest.mark.parametrize("host", [None, b""])
def test_a_host_that_is_not_named_is_the_one_that_was_asked(host: bytes | None) -> None:
    with SlotMap(2) as cluster, opened(cluster.url_of(0)) as store:
        cluster.said = line(0, SLOTS - 1, [host, cluster.port(1)])
        assert store.put_many([A], [b"x"]) == 1 and store.get_many([A]) == [b"x"]
        assert [node.name for node in store.nodes] == [cluster.address(1)]


def test_a_map_in_the_way_of_old_servers_will_do() -> None:
    with SlotMap(1) as cluster, opened(cluster.url) as store:
        cluster.said = line(0, SLOTS - 1, [HOST, cluster.port(0)])  # no ids
        assert store.put_many([A], [b"x"]) == 1


def test_servers_of_a_map_that_was_not_believed_are_not_asked(cluster: SlotMap, clock: FakeClock) -> None:
    good = [HOST, cluster.port(0)]
    cluster.said = resp([*([i, i, [HOST, 20_000 + i]] for i in range(200)), [0, SLOTS, good]])
    with opened(cluster.url_of(0), clock=clock) as store:
        assert store.get_many([A]) == [None]
        assert store._topology._nodes == {}


def test_a_map_as_slow_as_drops_is_bounded_by_the_deadline() -> None:
    stop = threading.Event()
    with SlotMap(1) as cluster, opened(cluster.url, deadline_s=SHORT_S) as store:

        def drip(at: int, command: list[bytes]) -> Said:
            connection = cluster.servers[0]._open[-1]
            connection.sendall(b"*1000\r\n")
            while not stop.wait(0.02):
                connection.sendall(b":1\r\n")
            return CLOSED

        cluster.twist = drip
        assert bounded(lambda: store.get_many([A])) == [None] and store.stats().misses == Counter(timeout=1)
        stop.set()


def test_a_map_of_more_servers_than_a_cluster_can_have_is_not_believed() -> None:
    with SlotMap(1) as cluster, opened(cluster.url, deadline_s=SHORT_S) as store:
        cluster.said = resp([[0, 0, [HOST, 20_000 + i]] for i in range(MAX_SERVERS + 1)])
        why: list[str] = []
        assert bounded(lambda: store.get_many([A], reasons=why)) == [None] and why == ["protocol"]
        assert store._topology._nodes == {}


# --- slots that nobody serves, seeds that do not answer -----------------------------------------
def test_slots_that_nobody_serves_cost_their_keys_alone(cluster: SlotMap) -> None:
    cluster.lines = cluster.lines[:2]
    with opened(cluster.url) as store:
        why: list[str] = []
        assert store.get_many([C, A, B], reasons=why) == [None, *values(A, B)] and why == ["down", "", ""]
        assert store.put_many([A, C], [b"1", b"2"]) == 1
        assert (store.stats().misses, store.stats().drops) == (Counter(down=1), Counter(down=1))
        assert store.stats().faults == Counter(down=2)
        assert store.touch_many([C, A]) == [False, True] and store.delete_many([C, A]) == 1
        health = store.health()
        assert not health.ok and f"nobody serves {SLOTS - THIRDS[2][0]} of {SLOTS} slots" in health.detail


def test_slots_that_somebody_serves_again_are_found_after_the_pause(cluster: SlotMap, clock: FakeClock) -> None:
    whole, cluster.lines = cluster.lines, cluster.lines[:2]
    with opened(cluster.url, clock=clock) as store:
        assert store.get_many([C]) == [None]
        cluster.lines = whole
        assert store.get_many([C]) == [None]
        clock.now += PAUSE_S
        assert store.get_many([C]) == values(C)


@pytest.mark.parametrize("url", ["redis-cluster://127.0.0.1:{0},127.0.0.1:{1}", "redis-sentinel://127.0.0.1:{0}/main"])
def test_seeds_that_refuse_are_left_alone_after_three_calls(url: str, clock: FakeClock) -> None:
    with opened(url.format(free_port(), free_port()), clock=clock) as store:
        for _ in range(6):
            assert store.get_many([A, B]) == [None, None]
        assert store.put_many([A], [b"x"]) == store.probe([A]) == store.delete_many([A]) == 0
        assert store.stats().misses == Counter(conn=6, breaker=6) and store.stats().drops == Counter(breaker=1)
        assert store.stats().faults == Counter(conn=3, breaker=6)
        assert not store.health().ok and "conn: " in store.health().detail
        clock.cool_down()
        store.get_many([A])
        store.get_many([A])
        assert store.stats().misses == Counter(conn=7, breaker=7)


def test_seeds_that_come_up_are_found_after_the_cool_down(cluster: SlotMap, clock: FakeClock) -> None:
    cluster.twist = lambda at, command: CLOSED
    with opened(cluster.url, clock=clock) as store:
        for _ in range(4):
            store.get_many([A])
        cluster.twist = lambda at, command: ...
        assert store.get_many([A]) == [None]
        clock.cool_down()
        assert store.get_many([A, B, C]) == values(A, B, C)


def test_servers_that_have_left_are_let_go(cluster: SlotMap, clock: FakeClock) -> None:
    with opened(cluster.url_of(1), clock=clock) as store:
        store.get_many([A, B, C])
        (gone,) = [node for node in store.nodes if node.name == cluster.address(0)]
        assert [connection.is_connected for connection in gone.pool._idle] == [True]
        cluster.lines[0] = (*THIRDS[0], 1)
        clock.now += MAP_AGE_S
        assert store.get_many([A, B, C]) == values(A, B, C)
        assert gone not in store.nodes and not any(c.is_connected for c in gone.pool._idle)
        assert len(store._topology._nodes) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("kind", ["cluster", "sentinel"])
def test_the_child_of_a_fork_waits_for_no_lock_of_its_parent(
    cluster: SlotMap, watched: Watched, clock: FakeClock, kind: str
) -> None:
    with opened((cluster if kind == "cluster" else watched).url, clock=clock) as store:
        assert store.get_many([A, B]) == values(A, B)
        with store._topology._lock, store._topology._lease._free, store._topology._breaker._lock:
            child = os.fork()
            if child == 0:
                try:
                    signal.alarm(round(LONG_S))  # ends a child that hangs
                    clock.now += MAP_AGE_S
                    good = store.get_many([A, B]) == values(A, B) and store.health().ok
                    os._exit(0 if good else 1)
                except BaseException:
                    os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert store.get_many([A, B]) == values(A, B)


def test_close_lets_go_of_every_server(cluster: SlotMap) -> None:
    with opened(cluster.url) as store:
        store.get_many([A, B, C])
        nodes = store.nodes
    assert len(nodes) == 3 and not any(c.is_connected for node in nodes for c in node.pool._idle)
    asked = cluster.questions()
    assert store.get_many([A]) == [None] and store.put_many([A], [b"x"]) == 0 and not store.health().ok
    assert store.stats().misses == Counter(closed=1) and cluster.questions() == asked


# --- health -------------------------------------------------------------------------------------
def test_health_tries_every_master_and_says_which_is_sick(cluster: SlotMap) -> None:
    with opened(cluster.url, deadline_s=4) as store:
        assert store.health().ok and store.health().detail.endswith("3 masters answer")
        for at in range(3):
            cluster.twist = lambda server, c, at=at: b"-LOADING no\r\n" if server == at and c[0] == b"GET" else ...
            health = store.health()
            assert not health.ok and cluster.address(at) in health.detail and "loading: " in health.detail
        cluster.twist = lambda at, c: b"-READONLY no\r\n" if at == 1 and c[0] in (b"SET", b"DEL", b"PEXPIRE") else ...
        assert f"{cluster.address(1)}: reads work, but readonly: " in store.health().detail
        assert store.get_many([A]) == values(A)


def test_health_sees_a_sick_master_however_few_its_slots() -> None:
    with SlotMap(2, [(0, SLOTS - 2, 0), (SLOTS - 1, SLOTS - 1, 1)]) as cluster, opened(cluster.url_of(0)) as store:
        cluster.twist = lambda at, command: CLOSED if at == 1 else ...
        assert not store.health().ok


# --- replicas of a cluster ----------------------------------------------------------------------
@pytest.fixture
def replicated() -> Iterator[SlotMap]:
    """Two masters (0, 1) and two replicas (2, 3)."""
    with SlotMap(4, [(0, 5460, 0, 2), (5461, SLOTS - 1, 1, 3)]) as made:
        for key in (A, B, C):
            made.data[name(key)] = b"value of " + key
        yield made


def test_reads_go_to_replicas_and_all_else_to_masters(replicated: SlotMap) -> None:
    with opened(replicated.url, ttl_s=100, read_replicas=True) as store:
        assert store.put_many([A, B], [b"1", b"2"]) == 2
        assert store.get_many([A, B]) == [b"1", b"2"]
        assert store.probe([A, B]) == 2 and store.touch_many([A, B]) == [True, True]
        assert [bool(replicated.asked(at, b"GET", b"EXISTS")) for at in range(4)] == [False, False, True, True]
        assert [len(replicated.asked(at, b"SET")) for at in range(4)] == [1, 1, 0, 0]
        assert [len(replicated.asked(at, b"PEXPIRE")) for at in range(4)] == [2, 2, 0, 0]
        assert store.delete_many([A, B]) == 2
        assert [len(replicated.asked(at, b"DEL")) for at in range(4)] == [1, 1, 0, 0]
        assert [len(replicated.asked(at, b"READONLY")) for at in range(4)] == [1, 1, 1, 1]


def test_without_being_told_so_replicas_are_not_asked(replicated: SlotMap) -> None:
    with opened(replicated.url_of(0), ttl_s=100) as store:
        for _ in range(5):
            assert store.get_many([A, B]) == values(A, B)
        assert replicated.asked(2) == replicated.asked(3) == [] and replicated.asked(0, b"READONLY") == []


def test_readonly_is_said_once_a_connection(replicated: SlotMap) -> None:
    with opened(replicated.url_of(0), read_replicas=True) as store:
        for _ in range(10):
            assert store.get_many([A, B]) == values(A, B)
        assert [command[0] for command in replicated.asked(2)] == [b"READONLY"] + [b"GET"] * 10


@pytest.mark.parametrize("said", [CLOSED, SILENT, b"-LOADING no\r\n", b"-MASTERDOWN no\r\n"])
def test_a_replica_that_fails_is_left_for_its_master_and_tried_again(
    replicated: SlotMap, clock: FakeClock, said: Said
) -> None:
    with opened(replicated.url, deadline_s=1 if said == SILENT else LONG_S, read_replicas=True, clock=clock) as store:
        assert store.get_many([A]) == values(A)
        replicated.twist = lambda at, command: said if at == 2 and command[0] == b"GET" else ...
        for _ in range(3):
            assert store.get_many([A, B]) == [None, *values(B)]
        replicated.forget()
        for _ in range(5):
            assert store.get_many([A, B]) == values(A, B)
        assert replicated.asked(2) == [] and len(replicated.asked(0, b"GET")) == 5
        clock.cool_down()
        assert store.get_many([A]) == [None] and len(replicated.asked(2, b"GET")) == 1
        replicated.twist = lambda at, command: ...
        assert store.get_many([A]) == values(A)  # its master
        clock.cool_down()
        replicated.forget()
        assert store.get_many([A]) == values(A) and len(replicated.asked(2, b"GET")) == 1
        assert sum(store.stats().misses.values()) == 4


def test_only_what_a_replica_had_is_renewed(replicated: SlotMap) -> None:
    with opened(replicated.url, ttl_s=100, read_replicas=True) as store:
        assert store.get_many([b"absent", A, b"none", B, A]) == [None, *values(A), None, *values(B, A)]
        renewed = [command[1:] for at in (0, 1) for command in replicated.asked(at, b"PEXPIRE")]
        assert renewed == [[name(A), b"100000"], [name(A), b"100000"], [name(B), b"100000"]]


@pytest.mark.parametrize("ttl_s", [None, 100])
@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_several_replicas_take_turns(replicas: int, ttl_s: float | None) -> None:
    lines = [(0, SLOTS - 1, *range(replicas + 1))]
    with SlotMap(replicas + 1, lines) as cluster, opened(cluster.url, ttl_s=ttl_s, read_replicas=True) as store:
        cluster.data[name(A)] = b"here"
        for _ in range(3 * replicas):
            store.get_many([A])
        assert [len(cluster.asked(at, b"GET")) for at in range(replicas + 1)] == [0] + [3] * replicas


def test_sentinels_replicas_take_turns(watched: Watched) -> None:
    with opened(watched.url, ttl_s=100, read_replicas=True) as store:
        for _ in range(6):
            store.get_many([A])
        assert [len(watched.asked(at, b"GET")) for at in range(3)] == [0, 3, 3]


def test_a_user_who_may_not_renew_is_told_so_with_replicas_too(replicated: SlotMap) -> None:
    replicated.twist = lambda at, command: b"-NOPERM no\r\n" if command[0] == b"PEXPIRE" else ...
    with opened(replicated.url, ttl_s=100, read_replicas=True) as store:
        assert store.get_many([A, b"absent"]) == [None, None]
        assert store.stats().misses == Counter(auth=1, absent=1)


def test_a_master_that_does_not_renew_takes_no_value_from_a_replicas_reader(replicated: SlotMap) -> None:
    replicated.twist = lambda at, command: CLOSED if command[0] == b"PEXPIRE" else ...
    with opened(replicated.url, ttl_s=100, read_replicas=True) as store:
        assert store.get_many([A, B]) == values(A, B)
        assert store.stats().misses == Counter() and store.stats().faults == Counter(conn=2)


# --- Sentinel -----------------------------------------------------------------------------------
class Watched(Many):
    """Servers 0, 1 and 2, of which `master` is one, and three sentinels, 3, 4 and 5.

    Attributes:
        master: what each sentinel takes for the master.
        flags: what they say of each server, if it is a replica.
    """

    def __init__(self) -> None:
        super().__init__(6)
        self.master = [0, 0, 0]
        self.flags = ["slave", "slave", "slave"]

    @property
    def url(self) -> str:
        return self.url_of(3, 4, 5)

    def url_of(self, *sentinels: int) -> str:
        return "redis-sentinel://" + ",".join(map(self.address, sentinels)) + "/main"

    def usual(self, at: int, command: list[bytes]) -> bytes | None:
        if at < 3:
            return super().usual(at, command)
        if command[0] == b"SENTINEL":
            master = self.master[at - 3]
            if command[1] == b"GET-MASTER-ADDR-BY-NAME":
                known = command[2] == b"main"
                return resp([b"127.0.0.1", b"%d" % self.port(master)]) if known else b"*-1\r\n"
            others = [i for i in range(3) if i != master]
            return resp(
                [
                    [b"name", b"x", b"ip", HOST, b"port", b"%d" % self.port(i), b"flags", self.flags[i].encode()]
                    for i in others
                ]
            )
        return b"+OK\r\n" if command[0] == b"AUTH" else resp("ERR unknown command")

    def questions(self) -> list[int]:
        return [sum(c[1] == b"GET-MASTER-ADDR-BY-NAME" for c in self.asked(at, b"SENTINEL")) for at in (3, 4, 5)]


@pytest.fixture
def watched() -> Iterator[Watched]:
    with Watched() as made:
        for key in (A, B, C):
            made.data[name(key)] = b"value of " + key
        yield made


def test_all_keys_are_the_masters(watched: Watched) -> None:
    with opened(watched.url, ttl_s=100) as store:
        assert store.get_many([A, B, C]) == values(A, B, C) and store.put_many([A], [b"x"]) == 1
        assert store.health().ok and [node.name for node in store.nodes] == [watched.address(0)]
        assert watched.asked(1) == watched.asked(2) == []
        assert {command[0] for at in (3, 4, 5) for command in watched.asked(at)} == {b"SENTINEL"}


def test_a_master_that_sentinel_does_not_know_is_a_counted_miss(watched: Watched) -> None:
    with opened(watched.url.replace("/main", "/other")) as store:
        assert store.get_many([A]) == [None] and store.put_many([A], [b"x"]) == 0
        assert store.stats().misses == Counter(protocol=1) and store.stats().faults == Counter(protocol=2)
        health = store.health()
        assert not health.ok and "Sentinel knows no master called 'other'" in health.detail


def test_a_sentinel_that_hangs_or_is_cut_off_leaves_it_to_the_others(watched: Watched) -> None:
    for said in (SILENT, CLOSED, b"*-1\r\n", b"-IDONTKNOW no\r\n"):
        watched.twist = lambda at, command, said=said: said if at == 3 else ...
        for _ in range(4):  # whom it asks first is drawn by lot
            with opened(watched.url, deadline_s=2) as store:
                assert store.get_many([A]) == values(A)


def test_an_old_masters_refusals_bring_the_new_one(watched: Watched, clock: FakeClock) -> None:
    watched.twist = lambda at, command: resp("READONLY no") if at == 0 and command[0] == b"SET" else ...
    with opened(watched.url, clock=clock) as store:
        assert store.put_many([A], [b"x"]) == 0 and store.stats().drops == Counter(readonly=1)
        old = store.nodes[0]
        watched.master = [1, 1, 1]
        assert store.put_many([A], [b"x"]) == 0  # not asked again so soon
        clock.now += PAUSE_S
        assert store.put_many([A], [b"x"]) == 1 and store.get_many([A]) == [b"x"]
        assert [node.name for node in store.nodes] == [watched.address(1)] and sum(watched.questions()) == 2
        assert not any(connection.is_connected for connection in old.pool._idle)


def test_sentinels_that_disagree_are_asked_again_until_one_names_a_master_that_takes_writes(
    watched: Watched, clock: FakeClock
) -> None:
    watched.twist = lambda at, command: resp("READONLY no") if at == 0 and command[0] == b"SET" else ...
    watched.master = [0, 1, 1]
    with opened(watched.url, clock=clock) as store:
        for _ in range(100):
            if store.put_many([A], [b"x"]):
                break
            clock.now += PAUSE_S + 1
        assert [node.name for node in store.nodes] == [watched.address(1)]


def test_a_master_that_dies_is_a_hint(watched: Watched, clock: FakeClock) -> None:
    with opened(watched.url, clock=clock) as store:
        store.get_many([A])
        watched.twist = lambda at, command: CLOSED if at == 0 else ...
        assert store.get_many([A]) == [None]
        watched.master = [2, 2, 2]
        clock.now += PAUSE_S
        assert store.get_many([A]) == values(A)
        assert store.stats().misses == Counter(conn=1)


def test_the_last_master_goes_on_while_no_sentinel_answers(watched: Watched, clock: FakeClock) -> None:
    with opened(watched.url, clock=clock) as store:
        store.get_many([A])
        watched.twist = lambda at, command: CLOSED if at >= 3 else ...
        for _ in range(5):
            clock.now += MAP_AGE_S
            assert store.get_many([A]) == values(A)
        assert not store.health().ok and "conn: " in store.health().detail


def test_health_tells_sick_sentinels_from_a_sick_master(watched: Watched) -> None:
    with opened(watched.url) as store:
        watched.twist = lambda at, command: CLOSED if at >= 3 else ...
        assert "known from before" not in store.health().detail
        watched.twist = lambda at, command: ...
        assert store.health().ok
        watched.twist = lambda at, command: CLOSED if at >= 3 else ...
        health = store.health()
        assert not health.ok and "from the sentinel at 127.0.0.1:" in health.detail
        assert health.detail.endswith(f"; known from before and well: {watched.address(0)}")
        watched.twist = lambda at, command: CLOSED
        assert store.health().detail.endswith(f"; known from before, 1 of them sick: {watched.address(0)}")


def test_health_names_every_sick_master_up_to_three() -> None:
    lines = [(at * SLOTS // 4, (at + 1) * SLOTS // 4 - 1, at) for at in range(4)]
    with SlotMap(4, lines) as cluster, opened(cluster.url) as store:
        for sick in ({1}, {0, 2}, {0, 1, 2, 3}):
            cluster.twist = lambda at, c, sick=sick: b"-LOADING no\r\n" if at in sick and c[0] == b"GET" else ...
            detail = store.health().detail
            assert f"{len(sick)} of 4 masters fail: " in detail and detail.endswith("…") == (len(sick) > 3)
            assert sum(f"{cluster.address(at)}: loading" in detail for at in sick) == min(3, len(sick))


def test_a_sentinel_taken_for_a_redis_is_called_one(watched: Watched) -> None:
    with opened(f"redis://{watched.address(3)}") as store:
        assert store.get_many([A]) == [None]
        assert not store.health().ok and "redis-sentinel://" in store.health().detail


SENTINEL_NONSENSE: list[tuple[str, Said, set[str]]] = [
    ("a number", b":1\r\n", {"protocol"}),
    ("a text", b"$2\r\nhi\r\n", {"protocol"}),
    ("an empty list", b"*0\r\n", {"protocol"}),
    ("a host alone", resp([HOST]), {"protocol"}),
    ("no number for a port", resp([HOST, b"x"]), {"protocol"}),
    ("port 0", resp([HOST, b"0"]), {"protocol"}),
    ("port 65536", resp([HOST, b"65536"]), {"protocol"}),
    ("superscripts for a port", resp([HOST, "²".encode()]), {"protocol"}),
    ("null", resp([None, None]), {"protocol"}),
    ("no host", resp([b"", b"1"]), {"protocol"}),
    ("lists", resp([[HOST], [b"1"]]), {"protocol"}),
    ("a host that no URL can hold", resp([b"h/[", b"1"]), {"protocol", "error"}),
    ("an error for a host", b"*2\r\n-ERR x\r\n$1\r\n1\r\n", {"protocol"}),
    ("an error", b"-ERR no\r\n", {"protocol"}),
    ("a password is wanted", b"-NOAUTH Authentication required.\r\n", {"auth"}),
    ("hanging up", CLOSED, {"conn"}),
    ("silence", SILENT, {"timeout"}),
    ("half of it", b"*2\r\n$9\r\n127", {"timeout"}),
]


@pytest.mark.parametrize(("said", "reasons"), [pytest.param(*rest, id=what) for what, *rest in SENTINEL_NONSENSE])
def test_nonsense_from_all_sentinels_is_a_counted_miss(watched: Watched, said: Said, reasons: set[str]) -> None:
    watched.twist = lambda at, command: said if at >= 3 else ...
    with opened(watched.url, deadline_s=SHORT_S) as store:
        assert bounded(lambda: store.get_many([A])) == [None]
        assert set(store.stats().misses) <= reasons
        health = bounded(store.health)
        assert not health.ok and any(f"{reason}: " in health.detail for reason in reasons), health
        watched.twist = lambda at, command: ...
        store._deadline_s = LONG_S
        assert store.health().ok


@pytest.mark.parametrize(
    "said",
    [
        b"*-1\r\n",
        b":1\r\n",
        b"$2\r\nhi\r\n",
        resp([[]]),
        resp([[b"ip"]]),
        resp([[b"ip", HOST, b"port", b"1"]]),
        resp([[b"ip", HOST, b"port", b"0", b"flags", b"slave"]]),
        resp([[b"ip", HOST, b"port", b"1", b"flags", 1]]),
        resp([1]),
        resp([None]),
        b"-NOPERM no\r\n",
        CLOSED,
    ],
)
def test_nonsense_about_replicas_is_at_worst_a_counted_miss(watched: Watched, said: Said) -> None:
    watched.twist = lambda at, command: said if at >= 3 and command[1] == b"REPLICAS" else ...
    with opened(watched.url, read_replicas=True) as store:
        assert store.get_many([A]) in ([None], values(A))
        store.health()
        assert store.put_many([A], [b"x"]) in (0, 1)


def test_with_replicas_reads_are_theirs_and_writes_and_renewals_the_masters(watched: Watched) -> None:
    with opened(watched.url, ttl_s=100, read_replicas=True) as store:
        for _ in range(6):
            assert store.get_many([A, B]) == values(A, B)
        assert watched.asked(0, b"GET") == [] and len(watched.asked(1, b"GET") + watched.asked(2, b"GET")) == 12
        assert [len(watched.asked(at, b"PEXPIRE")) for at in range(3)] == [12, 0, 0]
        store.put_many([A], [b"x"])
        assert [len(watched.asked(at, b"SET")) for at in range(3)] == [1, 0, 0]
        assert sum(len(watched.asked(at, b"READONLY")) for at in range(6)) == 0  # no cluster


@pytest.mark.parametrize("flag", ["s_down", "o_down", "disconnected"])
def test_replicas_that_are_down_are_not_used(watched: Watched, flag: str) -> None:
    watched.flags[1] = f"slave,{flag}"
    with opened(watched.url, read_replicas=True) as store:
        for _ in range(4):
            assert store.get_many([A]) == values(A)
        assert watched.asked(1) == [] and len(watched.asked(2, b"GET")) == 4
    watched.flags[2] = f"{flag},slave"
    watched.forget()
    with opened(watched.url, read_replicas=True) as store:
        assert store.get_many([A]) == values(A)
        assert watched.asked(1) == watched.asked(2) == [] and len(watched.asked(0, b"GET")) == 1


def test_each_login_goes_where_it_belongs(watched: Watched) -> None:
    def logins(*servers: int) -> set[tuple[bytes, ...]]:
        return {tuple(command[1:]) for at in servers for command in watched.asked(at, b"AUTH")}

    url = watched.url.replace("://", "://me:data@") + "?sentinel_username=watch&sentinel_password=eyes"
    with opened(url) as store:
        assert store.get_many([A]) == values(A)
    assert (logins(0, 1, 2), logins(3, 4, 5)) == ({(b"me", b"data")}, {(b"watch", b"eyes")})
    watched.forget()
    with opened(watched.url.replace("://", "://me:data@")) as store:
        assert store.get_many([A]) == values(A)
    assert (logins(0, 1, 2), logins(3, 4, 5)) == ({(b"me", b"data")}, set())


def test_a_sentinels_login_that_is_wrong_is_counted_as_that(watched: Watched) -> None:
    watched.twist = lambda at, command: b"-WRONGPASS no\r\n" if command[0] == b"AUTH" else ...
    with opened(watched.url + "?sentinel_password=wrong") as store:
        assert store.get_many([A]) == [None] and store.stats().misses == Counter(auth=1)
        assert "auth: " in store.health().detail and "wrong" not in store.health().detail.lower().replace(
            "wrongpass", ""
        )


def test_the_database_is_chosen_at_the_master_alone(watched: Watched) -> None:
    with opened(watched.url + "/2") as store:
        assert store.get_many([A]) == values(A)
    assert [c[1] for at in range(3) for c in watched.asked(at, b"SELECT")] == [b"2"]
    assert sum(len(watched.asked(at, b"SELECT")) for at in (3, 4, 5)) == 0
