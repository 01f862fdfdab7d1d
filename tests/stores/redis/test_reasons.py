"""What each reply means: the reason that it is counted under, and what it says of the server."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from kvlab.stores import RedisStore
from kvlab.stores.faults import Reason
from kvlab.stores.redis.connection import TooBig
from kvlab.stores.redis.pool import NoConnection
from kvlab.stores.redis.reasons import Refused, in_words, reason_of, server_works, takes_writes
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import RedisServer, valkey_program
from tests.harness.helpers import FakeClock
from tests.stores.redis.scripted import LONG_S, A, B, Many, SlotMap, name, opened, resp


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Refused(Reason.BREAKER), "breaker"),
        (TooBig(), "too_big"),
        (NoConnection(), "pool"),
        (redis.AuthenticationError("x"), "auth"),
        (redis.exceptions.NoPermissionError("x"), "auth"),
        (redis.TimeoutError("x"), "timeout"),
        (TimeoutError("x"), "timeout"),
        (redis.BusyLoadingError("x"), "loading"),
        (redis.exceptions.MasterDownError("x"), "loading"),
        (redis.exceptions.ClusterDownError("x"), "down"),
        (redis.exceptions.MovedError("1 h:1"), "moved"),
        (redis.exceptions.AskError("1 h:1"), "moved"),
        (redis.exceptions.TryAgainError("x"), "moved"),
        (redis.ReadOnlyError("x"), "readonly"),
        (redis.exceptions.OutOfMemoryError("x"), "oom"),
        (redis.InvalidResponse("x"), "protocol"),
        (redis.ConnectionError("x"), "conn"),
        (OSError("x"), "conn"),
        (redis.ResponseError("BUSY x"), "busy"),
        (redis.ResponseError("MISCONF x"), "misconf"),
        (redis.ResponseError("ERR x"), "response"),
        (KeyError("x"), "error"),
        (7, "protocol"),
        (b"x", "protocol"),
        (None, "protocol"),
    ],
)
def test_each_reply_has_one_reason(reply: Any, reason: str) -> None:
    assert reason_of(reply) == reason


@pytest.mark.parametrize(
    ("faults", "verdict"),
    [
        ([], True),
        ([redis.exceptions.MovedError("1 h:1"), redis.ReadOnlyError("x")], True),
        ([redis.exceptions.ClusterDownError("x"), redis.exceptions.NoPermissionError("x")], True),
        ([TooBig(), redis.ResponseError("ERR x")], True),
        ([redis.ReadOnlyError("x"), redis.ConnectionError("x")], False),
        ([redis.AuthenticationError("x")], False),
        ([redis.BusyLoadingError("x")], False),
        ([KeyError("x")], False),
        ([NoConnection(), redis.ConnectionError("x")], None),
    ],
)
def test_what_faults_say_of_the_link(faults: list[Exception], verdict: bool | None) -> None:
    assert server_works(faults) is verdict


@pytest.mark.parametrize(
    ("replies", "verdict"),
    [
        ([], None),
        ([b"OK"], True),
        ([True], True),
        ([redis.exceptions.OutOfMemoryError("x"), b"OK"], True),
        ([redis.exceptions.OutOfMemoryError("x")], False),
        ([redis.ResponseError("ERR x"), redis.exceptions.MovedError("1 h:1")], False),
        ([redis.exceptions.MovedError("1 h:1"), redis.exceptions.TryAgainError("x")], None),
        ([redis.exceptions.ClusterDownError("Hash slot not served")], None),
        ([redis.exceptions.ClusterDownError("The cluster is down")], False),
        ([redis.ConnectionError("x"), TimeoutError("x"), Refused(Reason.TOO_BIG)], None),
    ],
)
def test_what_replies_to_writes_say_of_the_server(replies: list[Any], verdict: bool | None) -> None:
    assert takes_writes(replies) is verdict


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("no", "response: no"),
        ("two\r\n  lines\tof it", "response: two lines of it"),
        ("unknown command 'X', with args beginning with: 'a' 'secret'", "response: unknown command 'X'"),
        ("unknown command 'X' with args beginning with: secret", "response: unknown command 'X'"),
        ("you said secret and me/secret", "response: you said *** and me/***"),
        ("", "response: "),
    ],
)
def test_a_fault_is_told_in_one_line_without_secrets(said: str, told: str) -> None:
    assert in_words(redis.ResponseError(said), ("secret", "other")) == told


def test_notes_say_who_said_it() -> None:
    error = redis.ConnectionError("gone")
    error.add_note("from 10.0.0.1:1")
    assert in_words(error) == "conn: gone (from 10.0.0.1:1)"


# --- what a server may answer, and what is done about it ----------------------------------------
# Every error word that Redis 7 and 8, Valkey 8 and 9 and proxies in front of them can send to the commands of
# the store. What it means: "server", nothing works there; "writes", it takes no writes; "key", this key alone.
SERVER, WRITES, KEY = "server", "writes", "key"
NO_PASSWORD_SET = (
    "ERR AUTH <password> called without any password configured for the default user. "
    "Are you sure your configuration is correct?"
)
WORDS: list[tuple[str, str, str]] = [
    ("LOADING Redis is loading the dataset in memory", "loading", SERVER),
    ("LOADING Valkey is loading the dataset in memory", "loading", SERVER),
    ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", "loading", SERVER),
    ("NOMASTERLINK Can't SYNC while not connected with my master", "loading", SERVER),
    ("BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.", "busy", SERVER),
    ("BUSY Valkey is busy running a script.", "busy", SERVER),
    ("BUSY a module keeps it", "busy", SERVER),
    ("NOAUTH Authentication required.", "auth", SERVER),
    ("WRONGPASS invalid username-password pair or user is disabled.", "auth", SERVER),
    ("ERR invalid password", "auth", SERVER),
    ("ERR Client sent AUTH, but no password is set", "auth", SERVER),
    (NO_PASSWORD_SET, "auth", SERVER),
    ("DENIED Redis is running in protected mode because protected mode is enabled", "auth", SERVER),
    ("DENIED Valkey is running in protected mode", "auth", SERVER),
    ("ERR max number of clients reached", "conn", SERVER),
    ("ERR max number of clients + cluster connections reached", "conn", SERVER),
    ("NOPERM User default has no permissions to run the 'set' command", "auth", WRITES),
    ("NOPERM No permissions to access a key", "auth", WRITES),
    ("READONLY You can't write against a read only replica.", "readonly", WRITES),
    ("REDIRECT 127.0.0.1:7000", "readonly", WRITES),
    ("OOM command not allowed when used memory > 'maxmemory'.", "oom", WRITES),
    (
        "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
        "misconf",
        WRITES,
    ),
    ("MISCONF Errors writing to the AOF file: No space left on device", "misconf", WRITES),
    ("NOREPLICAS Not enough good replicas to write.", "noreplicas", WRITES),
    ("CLUSTERDOWN The cluster is down", "down", WRITES),
    ("CLUSTERDOWN The cluster is down and only accepts read commands", "down", WRITES),
    ("ERR unknown command 'SET', with args beginning with: 'kv:a' 'x' ", "response", WRITES),
    ("ERR syntax error", "response", WRITES),
    ("ERR wrong number of arguments for 'set' command", "response", WRITES),
    ("ERR invalid expire time in 'set' command", "response", WRITES),
    ("ERR string exceeds maximum allowed size (proto-max-bulk-len)", "response", WRITES),
    ("ERR operation not permitted", "response", WRITES),
    ("ERR This instance has cluster support disabled", "response", WRITES),
    ("ERR max daily request limit exceeded. Limit: 10000", "response", WRITES),
    ("ERR server closed connection", "response", WRITES),
    ("ERR", "response", WRITES),
    ("WRONGTYPE Operation against a key holding the wrong kind of value", "response", WRITES),
    ("EXECABORT Transaction discarded because of previous errors.", "response", WRITES),
    ("UNBLOCKED force unblock from blocking operation", "response", WRITES),
    ("UNKILLABLE Sorry the script already executed write", "response", WRITES),
    ("BUSYKEY Target key name already exists.", "response", WRITES),
    ("NOPROTO unsupported protocol version", "response", WRITES),
    ("NOSCRIPT No matching script. Please use EVAL.", "response", WRITES),
    ("IOERR error or timeout", "response", WRITES),
    ("INPROG Failover already in progress", "response", WRITES),
    ("NOGOODSLAVE No suitable replica to promote", "response", WRITES),
    ("NOQUORUM no", "response", WRITES),
    ("QUOTAEXCEEDED a word of the future", "response", WRITES),
    ("upstream failure", "response", WRITES),
    ("no upstream host", "response", WRITES),
    (" nothing in front", "response", WRITES),
    ("CLUSTERDOWN Hash slot not served", "down", KEY),
    ("CROSSSLOT Keys in request don't hash to the same slot", "response", KEY),
    ("TRYAGAIN Multiple keys request during rehashing of slot", "moved", KEY),
    ("MOVED 1234 127.0.0.1:7000", "moved", KEY),
    ("ASK 1234 127.0.0.1:7000", "moved", KEY),
]
CALLS: dict[bytes, Callable[[RedisStore], Any]] = {
    b"SET": lambda store: store.put_many([A], [b"x"]),
    b"GET": lambda store: store.get_many([A]),
    b"EXISTS": lambda store: store.probe([A]),
    b"TOUCH": lambda store: store.touch_many([A]),
    b"DEL": lambda store: store.delete_many([A]),
}


@pytest.mark.parametrize(("said", "reason", "means"), [pytest.param(*word, id=word[0][:30]) for word in WORDS])
@pytest.mark.parametrize("verb", CALLS)
def test_what_is_refused_is_counted_and_not_asked_for_ever(verb: bytes, said: str, reason: str, means: str) -> None:
    with Many(1) as many, opened(f"redis://{many.address(0)}", RedisStore, clock=FakeClock()) as store:
        many.twist = lambda at, command: resp(said) if command[0] == verb else ...
        for _ in range(10):
            assert CALLS[verb](store) in (0, [None], [False])
        stops = means == SERVER or (means == WRITES and verb == b"SET")
        assert len(many.asked(0, verb)) == (3 if stops else 10)
        (node,) = store.nodes
        assert node.breaker.state == ("open" if means == SERVER else "closed")
        if means == WRITES:
            assert node.write_breaker.state == ("open" if verb == b"SET" else "closed")
        if verb in (b"SET", b"GET"):
            counted = store.stats().drops if verb == b"SET" else store.stats().misses
            assert counted == (Counter({reason: 3, "breaker": 7}) if stops else Counter({reason: 10}))


@pytest.mark.parametrize("means", [WRITES, KEY])
def test_one_write_that_is_taken_keeps_writes_going(means: str) -> None:
    for said in [word for word, _, effect in WORDS if effect == means]:
        with Many(1) as many, opened(f"redis://{many.address(0)}", RedisStore, clock=FakeClock()) as store:
            many.twist = lambda at, command, said=said: resp(said) if command[:2] == [b"SET", name(A)] else ...
            for _ in range(10):
                assert store.put_many([A, B], [b"x", b"y"]) == 1
            assert store.nodes[0].write_breaker.state == "closed"


@pytest.mark.parametrize("step", [b"AUTH", b"SELECT", b"READONLY"])
def test_whatever_is_refused_on_connecting_stops_all_calls(step: bytes) -> None:
    for said in [word for word, _, means in WORDS if means != KEY]:
        with SlotMap(1, [(0, 16383, 0)]) as cluster:
            cluster.twist = lambda at, command, said=said: resp(said) if command[0] == step else ...
            place = cluster.address(0)
            url = f"redis-cluster://{place}" if step == b"READONLY" else f"redis://:secret@{place}/3"
            with opened(url, RedisStore, read_replicas=step == b"READONLY", clock=FakeClock()) as store:
                for _ in range(10):
                    assert store.get_many([A]) == [None] and store.put_many([A], [b"x"]) == 0
                assert len(cluster.asked(0, step)) == 3 and not cluster.asked(0, b"GET", b"SET")
                assert [node.breaker.state for node in store.nodes] == ["open"]


def test_whatever_is_refused_of_the_map_is_a_counted_miss() -> None:
    for said, reason, _ in WORDS:
        with SlotMap(1) as cluster, opened(cluster.url, RedisStore, clock=FakeClock()) as store:
            cluster.said = resp(said)
            for _ in range(10):
                assert store.get_many([A]) == [None]
            why = {"response": "protocol"}.get(reason, reason)  # this is no cluster
            assert store.stats().misses == Counter({why: 3, "breaker": 7}), said
            assert f"{why}: " in store.health().detail


# --- real servers -------------------------------------------------------------------------------
def full(client: redis.Redis) -> None:
    client.config_set("maxmemory", 1)


def without_a_disk(client: redis.Redis) -> None:
    folder = Path(tempfile.mkdtemp())
    client.config_set("dir", str(folder))
    folder.rmdir()
    client.config_set("save", "1 1")
    client.bgsave()
    give_up = time.monotonic() + LONG_S
    while client.info("persistence")["rdb_last_bgsave_status"] == "ok":
        assert time.monotonic() < give_up
        time.sleep(0.01)


def without_replicas(client: redis.Redis) -> None:
    client.config_set("min-replicas-to-write", 1)


def a_replica(client: redis.Redis) -> None:
    client.execute_command("REPLICAOF", "127.0.0.1", "1")


def a_replica_without_its_master(client: redis.Redis) -> None:
    a_replica(client)
    client.config_set("replica-serve-stale-data", "no")


def with_a_password(client: redis.Redis) -> None:
    client.config_set("requirepass", "secret")


def without_rights(client: redis.Redis) -> None:
    client.execute_command("ACL", "SETUSER", "default", "-set")


def for_others_only(client: redis.Redis) -> None:
    client.execute_command("ACL", "SETUSER", "default", "resetkeys", "~other:*")


def busy(client: redis.Redis) -> None:
    client.config_set("busy-reply-threshold", 1)

    def run() -> None:
        with contextlib.suppress(redis.RedisError):  # it ends with the server
            client.eval("while true do end", 0)

    threading.Thread(target=run, daemon=True).start()
    give_up = time.monotonic() + LONG_S
    with pytest.raises(redis.ResponseError, match="BUSY"):
        while time.monotonic() < give_up:
            client.ping()


REAL: list[tuple[Callable[[redis.Redis], None], str, str]] = [  # what writes meet, and what a read gives
    (full, "oom", "one"),
    (without_a_disk, "misconf", "one"),
    (without_replicas, "noreplicas", "one"),
    (a_replica, "readonly", "one"),
    (a_replica_without_its_master, "readonly", "loading"),
    (with_a_password, "auth", "breaker"),
    (without_rights, "auth", "one"),
    (for_others_only, "auth", "auth"),
    (busy, "busy", "breaker"),
]


@pytest.mark.parametrize(
    "program", [pytest.param("redis", marks=pytest.mark.redis), pytest.param("valkey", marks=pytest.mark.valkey)]
)
@pytest.mark.parametrize(("make", "reason", "read"), [pytest.param(*real, id=real[0].__name__) for real in REAL])
def test_a_real_server_that_refuses_writes_is_sent_three_of_them(
    program: str, make: Callable[[redis.Redis], None], reason: str, read: str
) -> None:
    where = {"program": valkey_program()} if program == "valkey" else {}
    with RedisServer("--enable-protected-configs", "yes", **where) as server, FaultProxy(server.port) as proxy:
        client = server.client()
        client.set(name(b"there"), b"one")
        make(client)
        with RedisStore(proxy.url, deadline_s=LONG_S, clock=FakeClock()) as store:
            for _ in range(6):
                assert store.put_many([A], [bytes(1 << 20)]) == 0
            assert store.stats().drops == Counter({reason: 3, "breaker": 3})
            assert proxy.bytes_up < (3 << 20) + (1 << 16)
            why: list[str] = []
            got = store.get_many([b"there"], reasons=why)
            assert (got, why) == (([b"one"], [""]) if read == "one" else ([None], [read]))
            health = store.health()
            assert not health.ok and f"{'loading' if read == 'loading' else reason}: " in health.detail
