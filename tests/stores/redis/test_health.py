"""What health says of one server and of many, and that it tells what writes and reads would meet."""

from __future__ import annotations

from collections import Counter

import pytest

from kvlab.stores import RedisStore
from kvlab.stores.base import MAX_VALUE_BYTES
from kvlab.stores.redis.discovery import SLOTS
from kvlab.testbed.cluster import RedisCluster
from kvlab.testbed.server import RedisServer, valkey_program
from tests.harness.helpers import FakeClock
from tests.stores.redis.scripted import CLOSED, LONG_S, A, Many, Said, SlotMap, Watched, name, opened, resp, values

# --- several servers ----------------------------------------------------------------------------


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


def test_health_names_every_sick_master_up_to_three() -> None:
    lines = [(at * SLOTS // 4, (at + 1) * SLOTS // 4 - 1, at) for at in range(4)]
    with SlotMap(4, lines) as cluster, opened(cluster.url) as store:
        for sick in ({1}, {0, 2}, {0, 1, 2, 3}):
            cluster.twist = lambda at, c, sick=sick: b"-LOADING no\r\n" if at in sick and c[0] == b"GET" else ...
            detail = store.health().detail
            assert f"{len(sick)} of 4 masters fail: " in detail and detail.endswith("…") == (len(sick) > 3)
            assert sum(f"{cluster.address(at)}: loading" in detail for at in sick) == min(3, len(sick))


def test_health_tells_sick_sentinels_from_a_sick_master(watched: Watched) -> None:
    with opened(watched.url) as store:
        watched.twist = lambda at, command: CLOSED if at >= 3 else ...
        assert "last known" not in store.health().detail
        watched.twist = lambda at, command: ...
        assert store.health().ok
        watched.twist = lambda at, command: CLOSED if at >= 3 else ...
        health = store.health()
        assert not health.ok and "from the sentinel at 127.0.0.1:" in health.detail
        assert health.detail.endswith(f"; last known masters: all healthy ({watched.address(0)})")
        watched.twist = lambda at, command: CLOSED
        assert store.health().detail.endswith(f"; last known masters: 1 of 1 failing ({watched.address(0)})")


# --- servers of another kind than the URL says --------------------------------------------------


def test_a_sentinel_taken_for_a_redis_is_called_one(watched: Watched) -> None:
    with opened(f"redis://{watched.address(3)}") as store:
        assert store.get_many([A]) == [None]
        assert not store.health().ok and "redis-sentinel://" in store.health().detail


@pytest.mark.cluster
def test_one_node_of_a_cluster_taken_for_a_server_alone_is_said(redis_cluster: RedisCluster) -> None:
    keys = [b"%d" % i for i in range(60)]
    for node in redis_cluster.nodes[:3]:
        with RedisStore(node.url, deadline_s=LONG_S) as store:
            assert not any(store.health().ok for _ in range(3))
            assert "moved: this is a node of a Redis Cluster" in store.health().detail
            stored = store.put_many(keys, keys)
            assert 0 < stored < 60 and store.stats().drops == Counter(moved=60 - stored)
            assert store.stats().faults["moved"] == 1


# --- one server ---------------------------------------------------------------------------------
COMMANDS_OF = {
    100: (b"GET", b"SET", b"EXISTS", b"PEXPIRE", b"DEL"),
    None: (b"GET", b"SET", b"EXISTS", b"TOUCH", b"DEL"),
}
SAYS = {
    "refused": b"-ERR no\r\n",
    "unknown": b"-ERR unknown command 'X', with args beginning with: 'a' \r\n",
    "no right": b"-NOPERM User kvlab has no permissions to run the 'x' command\r\n",
    "no replicas": b"-NOREPLICAS Not enough good replicas to write.\r\n",
    "read only": b"-READONLY You can't write against a read only replica.\r\n",
    "full": b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
    "loading": b"-LOADING Redis is loading the dataset in memory\r\n",
    "down": b"-CLUSTERDOWN The cluster is down\r\n",
    "moved": b"-MOVED 1 127.0.0.1:1\r\n",
    "of another kind": b"*0\r\n",
    "hanging up": CLOSED,
}


def everything_works(store: RedisStore) -> bool:
    return (
        store.put_many([A], [b"x"]) == 1
        and store.get_many([A]) == [b"x"]
        and (store.probe([A]), store.touch_many([A]), store.delete_many([A])) == (1, [True], 1)
    )


@pytest.mark.parametrize("said", SAYS)
@pytest.mark.parametrize(("ttl_s", "verb"), [(ttl_s, verb) for ttl_s in COMMANDS_OF for verb in COMMANDS_OF[ttl_s]])
def test_health_is_never_good_where_a_command_fails(ttl_s: float | None, verb: bytes, said: str) -> None:
    with Many(1) as many:
        many.twist = lambda at, command: SAYS[said] if command[0] == verb else ...
        url = f"redis://{many.address(0)}"
        with opened(url, RedisStore, ttl_s=ttl_s) as store:
            health = store.health()
            assert not health.ok and health.detail.count("\n") == 0
            refused = verb == b"PEXPIRE" and said in ("refused", "unknown", "no right")  # then loads are misses
            assert ("reads work, but " in health.detail) == (verb not in (b"GET", b"EXISTS") and not refused)
        with opened(url, RedisStore, ttl_s=ttl_s) as store:
            works = everything_works(store)
            without = verb == b"TOUCH" and said in ("refused", "unknown", "no right")  # then EXISTS tells what is there
            assert works == without


@pytest.mark.parametrize(("ttl_s", "unused"), [(100, b"TOUCH"), (None, b"PEXPIRE")])
def test_health_asks_for_nothing_that_the_store_does_not(ttl_s: float | None, unused: bytes) -> None:
    with Many(1) as many, opened(f"redis://{many.address(0)}", RedisStore, ttl_s=ttl_s) as store:
        assert store.health().ok and many.asked(0, unused) == []
        assert everything_works(store) and many.asked(0, unused) == []
        names = {command[1] for command in many.asked(0) if command[0] == b"SET"}
        assert len(names) == 2 and name(A) in names and not many.data  # a key of its own, that is gone


NO_MEMORY = {
    "no such line": resp(b"# Memory\r\nused_memory:1\r\n"),
    "a text": resp(b"maxmemory:lots\r\n"),
    "less than nothing": resp(b"maxmemory:-1\r\n"),
    "too many digits": resp(b"maxmemory:" + b"9" * 40 + b"\r\n"),
    "another name": resp(b"maxmemory_human:1B\r\nmaxmemory_policy:noeviction\r\n"),
    "nothing": resp(b""),
    "no value": b"$-1\r\n",
    "other bytes": resp(bytes(range(256))),
}
KEPT_TO_ITSELF = {name: SAYS[name] for name in ("refused", "unknown", "no right")}


@pytest.mark.parametrize("said", [*NO_MEMORY, *KEPT_TO_ITSELF])
def test_a_server_need_not_tell_its_memory(said: str, clock: FakeClock) -> None:
    answer = {**NO_MEMORY, **KEPT_TO_ITSELF}[said]
    with Many(1) as many, opened(f"redis://{many.address(0)}", RedisStore, clock=clock) as store:
        many.twist = lambda at, command: answer if command[0] == b"INFO" else ...
        for _ in range(3):
            assert everything_works(store)
            clock.now += 61.0
        assert store.put_many([A], [bytes(MAX_VALUE_BYTES)]) == 1
        assert store.put_many([A], [bytes(MAX_VALUE_BYTES + 1)]) == 0
        assert store.stats().drops == Counter(too_big=1)
        assert store.nodes[0].breaker.state == "closed"
        health = store.health()
        assert health.ok and ("; it refuses INFO: " in health.detail) == (said in KEPT_TO_ITSELF)


@pytest.mark.parametrize("said", ["loading", "down", "of another kind", "hanging up"])
def test_a_server_that_cannot_be_asked_for_its_memory_is_sick_and_is_written_nothing(said: str) -> None:
    with Many(1) as many:
        many.twist = lambda at, command: SAYS[said] if command[0] == b"INFO" else ...
        with opened(f"redis://{many.address(0)}", RedisStore) as store:
            assert not store.health().ok
            assert store.put_many([A], [b"x"]) == 0 and many.data == {}


# --- missing commands ---------------------------------------------------------------------------
@pytest.mark.parametrize("quote", ["'{}'", "`{}`", '"{}"', "{}"])
def test_commands_that_a_server_does_not_know_are_named(quote: str) -> None:
    with Many(1) as many, opened(f"redis://{many.address(0)}", RedisStore, ttl_s=9) as store:
        for missing in ([b"EXISTS"], [b"DEL", b"PEXPIRE"], [b"GET", b"SET", b"DEL"]):
            many.twist = lambda at, c, missing=missing: (
                resp(f"ERR unknown command {quote.format(c[0].decode())}") if c[0] in missing else ...
            )
            detail = store.health().detail
            named = detail.partition("the store needs ")[2].partition(";")[0]
            assert set(named.split(", ")) == {name.decode() for name in missing}
            assert "sentinel" not in detail and "cluster" not in detail
        many.twist = lambda at, c: resp(f"ERR unknown command {quote.format(c[0].decode())}")
        assert "knows none of the commands that the store needs" in store.health().detail


def test_a_command_that_only_clusters_need_is_named_too(cluster: SlotMap) -> None:
    cluster.twist = lambda at, c: resp("ERR unknown command 'ASKING'") if (at, c[0]) == (1, b"ASKING") else ...
    with opened(cluster.url) as store:
        detail = store.health().detail
        assert f"1 of 3 masters fail: {cluster.address(1)}: reads work, but response: " in detail
        assert detail.endswith("the store needs ASKING; was it renamed or switched off?")


@pytest.mark.parametrize(
    "program", [pytest.param("redis", marks=pytest.mark.redis), pytest.param("valkey", marks=pytest.mark.valkey)]
)
@pytest.mark.parametrize("missing", ["GET", "SET", "EXISTS", "DEL", "PEXPIRE", "TOUCH", "INFO"])
def test_a_command_that_was_renamed_is_told_by_its_name(program: str, missing: str) -> None:
    where = {"program": valkey_program()} if program == "valkey" else {}
    with RedisServer("--rename-command", missing, "", **where) as server:
        for ttl_s, unused in ((100, "TOUCH"), (None, "PEXPIRE")):
            with RedisStore(server.url, ttl_s=ttl_s, deadline_s=LONG_S) as store:
                health = store.health()
                assert health.ok == (missing in ("INFO", unused))
                if not health.ok:
                    assert health.detail.endswith(f": the store needs {missing}; was it renamed or switched off?")
                assert "sentinel" not in health.detail and "cluster" not in health.detail


@pytest.mark.parametrize("mode", [b"standalone", b"cluster", b"sentinel", b"", b"x" * 100, b"sentinel\0"])
@pytest.mark.parametrize("field", [b"redis_mode", b"server_mode"])
def test_a_server_is_called_what_it_calls_itself(field: bytes, mode: bytes) -> None:
    with Many(1) as many, opened(f"redis://{many.address(0)}", RedisStore) as store:

        def odd(at: int, command: list[bytes]) -> Said:
            if command == [b"INFO", b"server"]:
                return resp(b"# Server\r\nredis_version:9\r\n%b:%b\r\n" % (field, mode))
            return b"-MOVED 1 127.0.0.1:1\r\n" if command[0] == b"EXISTS" else ...

        many.twist = odd
        detail = store.health().detail
        assert ("redis-cluster://" in detail) == (mode == b"cluster")
        assert ("redis-sentinel://" in detail) == mode.startswith(b"sentinel") and "moved: " in detail
