"""What the Redis store does beyond the contract: rights, round trips, deadlines, sizes, threads, forks."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from kvlab.stores import RedisStore
from kvlab.stores.redis.store import COMMANDS, KEY_PREFIX, WINDOW_BYTES
from kvlab.testbed.certs import make_certs
from kvlab.testbed.cluster import RedisCluster
from kvlab.testbed.proxy import FaultProxy
from kvlab.testbed.server import RedisServer
from tests.harness.scripted import ScriptedServer

LONG_S = 30.0  # no machine is so busy
VALUE = os.urandom(200_000)


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of its own: these tests change its users."""
    pytest.importorskip("cryptography", reason="certificates need it: pip install 'kvlab[secure]'")
    with RedisServer(tls=make_certs(tmp_path)) as server:
        yield server


def with_user(server: RedisServer, rights: list[str]) -> str:
    """A user with these rights alone; the URL by which it comes in over TLS."""
    server.client().execute_command("ACL", "SETUSER", "kvlab", "reset", "on", ">secret", "~kv:*", *rights)
    return server.tls_url.replace("rediss://", "rediss://kvlab:secret@")


# --- rights -------------------------------------------------------------------------------------
RIGHTS = [f"+{name.lower()}" for name in COMMANDS]
FAILS = {  # without this right: what a put and a get come to
    "+get": (1, Counter(), [None], Counter(auth=1)),
    "+set": (0, Counter(auth=1), [VALUE], Counter()),
    "+del": (1, Counter(), [VALUE], Counter()),
    "+exists": (1, Counter(), [VALUE], Counter()),
    "+pexpire": (1, Counter(), [None], Counter(auth=1)),
    "+info": (0, Counter(auth=1), [VALUE], Counter()),
}


@pytest.mark.redis
def test_a_user_with_exactly_the_rights_listed_does_everything_over_tls(tls_server: RedisServer) -> None:
    with RedisStore(with_user(tls_server, RIGHTS), ttl_s=100, deadline_s=LONG_S) as store:
        assert store.health().ok, store.health()
        assert store.put_many([b"a", b"b"], [VALUE, (VALUE[:128], memoryview(VALUE)[128:])]) == 2
        assert store.get_many([b"a", b"b"]) == [VALUE, VALUE]
        assert (store.probe([b"a", b"b", b"c"]), store.touch_many([b"c", b"a"])) == (2, [False, True])
        assert store.delete_many([b"a", b"c"]) == 1
        assert store.stats().misses == store.stats().drops == store.stats().faults == Counter()


@pytest.mark.redis
@pytest.mark.parametrize("missing", RIGHTS)
def test_with_any_right_missing_it_fails_closed(tls_server: RedisServer, missing: str) -> None:
    put, drops, got, misses = FAILS[missing]
    tls_server.client().set(KEY_PREFIX + b"k", VALUE)
    url = with_user(tls_server, [right for right in RIGHTS if right != missing])
    with RedisStore(url, ttl_s=100, deadline_s=LONG_S) as store:
        health = store.health()
        assert not health.ok and "auth: " in health.detail and f"'{missing[1:]}'" in health.detail.lower()
        assert store.put_many([b"k"], [VALUE]) == put and store.stats().drops == drops
        assert store.get_many([b"k"]) == got and store.stats().misses == misses
        assert store.probe([b"k"]) == (0 if missing == "+exists" else 1)
        assert store.touch_many([b"k"]) == [missing != "+pexpire"]
        assert store.delete_many([b"k"]) == (0 if missing == "+del" else 1)
        assert store.stats().faults["auth"] >= 1
        store.stats().check()


@pytest.mark.redis
def test_keys_of_others_are_out_of_reach(tls_server: RedisServer) -> None:
    url = with_user(tls_server, RIGHTS)
    client = redis.Redis.from_url(url)
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.get("session:1")
    for command in (["KEYS", "*"], ["FLUSHALL"], ["CONFIG", "GET", "*"], ["EVAL", "return 1", "0"]):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*command)


@pytest.mark.redis
def test_a_certificate_of_another_ca_is_refused(tls_server: RedisServer, tmp_path: Path) -> None:
    other = make_certs(tmp_path / "other")
    mine, _, query = tls_server.tls_url.partition("?")
    assert query
    with RedisStore(f"{mine}?ssl_ca_certs={other.ca}", deadline_s=LONG_S) as store:
        assert store.get_many([b"a"]) == [None]
        assert store.stats().misses == Counter(conn=1)
        assert "certificate verify failed" in store.health().detail.lower()


def test_a_wrong_password_is_tried_once_a_call_and_then_left_alone() -> None:
    tried = []

    def script(command: list[bytes]) -> bytes:
        tried.append(command[0].upper())
        return b"-WRONGPASS invalid username-password pair or user is disabled.\r\n"

    with ScriptedServer(script) as server:
        url = server.url.replace("redis://", "redis://:wrong@")
        with RedisStore(url, deadline_s=LONG_S) as store:
            for calls in (1, 2, 3):
                store.get_many([b"a"])
                assert tried == [b"AUTH"] * calls
            for _ in range(20):
                store.get_many([b"a"])
            assert tried == [b"AUTH"] * 3
            assert store.stats().misses == Counter(auth=3, breaker=20)


@pytest.mark.redis
@pytest.mark.parametrize("setting", ["protocol=3", "decode_responses=True", "socket_timeout=0.001"])
def test_settings_in_the_url_do_not_change_how_it_speaks(redis_server: RedisServer, setting: str) -> None:
    with RedisStore(f"{redis_server.url}?{setting}", deadline_s=LONG_S) as store:
        assert store.put_many([b"a"], [VALUE]) == 1
        assert store.get_many([b"a", b"b"]) == [VALUE, None]


# --- round trips and sizes -----------------------------------------------------------------------
@pytest.mark.redis
def test_a_probe_is_one_round_trip_and_a_load_one_for_each_window(redis_server: RedisServer) -> None:
    with FaultProxy(redis_server.port) as proxy, RedisStore(proxy.url, ttl_s=100, deadline_s=LONG_S) as store:
        keys = [b"%d" % i for i in range(1024)]
        store.put_many(keys, [b"small"] * 1024)
        value = bytes(192 << 10)
        big, room = keys[:64], [memoryview(bytearray(len(value))) for _ in range(64)]
        store.put_many(big, [value] * 64)
        proxy.reset_counts()
        assert store.probe(keys) == 1024
        assert proxy.round_trips() == 1
        assert None not in store.get_many(big, room)
        assert proxy.round_trips() == 2
        proxy.reset_counts()
        windows = -(-64 * (1 << 20) // WINDOW_BYTES)
        store.get_many(big, [memoryview(bytearray(1 << 20)) for _ in range(64)])
        assert proxy.round_trips() == windows


@pytest.mark.redis
def test_a_value_over_the_servers_share_is_refused_before_a_byte_is_sent() -> None:
    small = RedisServer("--maxmemory", "16mb")
    with small as server, FaultProxy(server.port) as proxy, RedisStore(proxy.url, deadline_s=LONG_S) as store:
        assert store.put_many([b"fits", b"not"], [bytes(1 << 20), bytes((1 << 20) + 1)]) == 1
        assert store.stats().drops == Counter(too_big=1)
        proxy.reset_counts()
        assert store.put_many([b"not"], [bytes(2 << 20)]) == 0
        assert proxy.bytes_up == 0
        assert store.probe([b"fits", b"not"]) == 1


@pytest.mark.redis
def test_the_share_is_asked_for_again_after_a_minute() -> None:
    now = [0.0]
    with RedisServer() as server, RedisStore(server.url, deadline_s=LONG_S, clock=lambda: now[0]) as store:
        value = bytes(1 << 20)
        assert store.put_many([b"a"], [value]) == 1
        server.client().config_set("maxmemory", 8 << 20)
        assert store.put_many([b"a"], [value]) == 1
        now[0] += 61
        assert store.put_many([b"a"], [value]) == 0
        assert store.stats().drops == Counter(too_big=1)


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


# --- deadlines and breakers ----------------------------------------------------------------------
@pytest.mark.redis
def test_faults_of_probes_are_counted_though_they_are_no_requests() -> None:
    with RedisServer() as server, RedisStore(server.url) as store:
        server.kill()
        for _ in range(5):
            assert store.probe([b"a"]) == 0
        stats = store.stats()
        assert (stats.requested, stats.misses, stats.faults) == (0, Counter(), Counter(conn=3, breaker=2))


@pytest.mark.redis
def test_one_call_tries_after_the_cool_down_and_the_rest_go_on() -> None:
    now = [0.0]
    with RedisServer() as server, RedisStore(server.url, deadline_s=LONG_S, clock=lambda: now[0]) as store:
        store.put_many([b"a"], [b"one"])
        server.kill()
        for _ in range(10):
            store.get_many([b"a"])
        assert store.stats().misses == Counter(conn=3, breaker=7) and store.nodes[0].breaker.state == "open"
        server.start()
        assert store.put_many([b"a"], [b"one"]) == 0
        now[0] += 1.0
        assert store.put_many([b"a"], [b"one"]) == 1
        assert store.get_many([b"a"]) == [b"one"] and store.nodes[0].breaker.state == "closed"


@pytest.mark.redis
def test_refused_writes_stop_writes_alone() -> None:
    now = [0.0]
    with RedisServer() as server, RedisStore(server.url, deadline_s=LONG_S, clock=lambda: now[0]) as store:
        store.put_many([b"a"], [b"one"])
        server.client().config_set("maxmemory", 1)
        assert [store.put_many([b"b"], [b"two"]) for _ in range(5)] == [0] * 5
        assert store.stats().drops == Counter(oom=3, breaker=2)
        assert store.get_many([b"a"]) == [b"one"] and store.nodes[0].breaker.state == "closed"
        server.client().config_set("maxmemory", 0)
        assert store.put_many([b"b"], [b"two"]) == 0
        now[0] += 1.0
        assert store.put_many([b"b"], [b"two"]) == 1


@pytest.mark.redis
def test_a_full_pool_says_nothing_about_the_server(redis_server: RedisServer) -> None:
    with FaultProxy(redis_server.port) as proxy, RedisStore(proxy.url, deadline_s=4, max_connections=1) as store:
        store.put_many([b"a"], [b"one"])
        proxy.latency_s = 0.8
        answers: list[list[object]] = []
        threads = [threading.Thread(target=lambda: answers.append(store.get_many([b"a"]))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.stats().misses["pool"] >= 1 and store.nodes[0].breaker.state == "closed"
        store.stats().check()


# --- threads and forks ---------------------------------------------------------------------------
@pytest.mark.redis
def test_connections_are_bounded(redis_server: RedisServer) -> None:
    with RedisStore(redis_server.url, deadline_s=LONG_S, max_connections=4) as store:
        store.put_many([b"a"], [VALUE])

        def read() -> None:
            for _ in range(50):
                assert store.get_many([b"a"]) == [VALUE]

        threads = [threading.Thread(target=read) for _ in range(24)]
        for thread in threads:
            thread.start()
        most = 0
        while any(thread.is_alive() for thread in threads):
            most = max(most, len(redis_server.client().client_list()))
        assert store.stats().hits == 24 * 50
        assert most <= 4 + 2  # and those of this test


@pytest.mark.redis
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_after_connect_is_safe_on_both_sides(redis_server: RedisServer) -> None:
    store = RedisStore(redis_server.url, deadline_s=LONG_S, max_connections=2)
    keys = [b"%d" % i for i in range(50)]
    values = [b"value of " + key for key in keys]
    store.put_many(keys, values)
    stop = threading.Event()

    def keep_busy() -> None:  # so that the fork finds locks and connections in use
        while not stop.is_set():
            store.get_many(keys[:5])

    threads = [threading.Thread(target=keep_busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                good = all(store.get_many(keys) == values for _ in range(50))
                os._exit(0 if good else 1)
            except BaseException:
                os._exit(2)
        children.append(child)
    for _ in range(50):
        assert store.get_many(keys) == values
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    stop.set()
    for thread in threads:
        thread.join()
    store.stats().check()
    store.close()
