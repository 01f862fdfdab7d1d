"""A master that sentinels watch: who is asked when it dies, when they disagree, and when they lie."""

from __future__ import annotations

from collections import Counter

import pytest

from kvlab.stores.redis.discovery import MAP_AGE_S, PAUSE_S
from tests.harness.helpers import FakeClock
from tests.stores.redis.scripted import (
    CLOSED,
    HOST,
    LONG_S,
    SHORT_S,
    SILENT,
    A,
    B,
    C,
    Said,
    Watched,
    bounded,
    opened,
    resp,
    values,
)


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


# --- nonsense -----------------------------------------------------------------------------------


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
        store.deadline_s = LONG_S
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


# --- replicas -----------------------------------------------------------------------------------


def test_with_replicas_reads_are_theirs_and_writes_and_refreshes_the_masters(watched: Watched) -> None:
    with opened(watched.url, ttl_s=100, read_replicas=True) as store:
        for _ in range(6):
            assert store.get_many([A, B]) == values(A, B)
        assert watched.asked(0, b"GET") == [] and len(watched.asked(1, b"GET") + watched.asked(2, b"GET")) == 12
        assert [len(watched.asked(at, b"PEXPIRE")) for at in range(3)] == [12, 0, 0]
        store.put_many([A], [b"x"])
        assert [len(watched.asked(at, b"SET")) for at in range(3)] == [1, 0, 0]
        assert sum(len(watched.asked(at, b"READONLY")) for at in range(6)) == 0  # no cluster


def test_sentinels_replicas_share_the_reads(watched: Watched) -> None:
    with opened(watched.url, ttl_s=100, read_replicas=True) as store:
        for _ in range(6):
            store.get_many([A])
        assert [len(watched.asked(at, b"GET")) for at in range(3)] == [0, 3, 3]


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


# --- logins -------------------------------------------------------------------------------------


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
